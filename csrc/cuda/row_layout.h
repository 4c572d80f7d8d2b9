// Where each row of a (..., C) tensor starts; filled on the host, read by kernels, so it includes nothing.
#pragma once

#ifdef __CUDACC__
#define QVL_HOST_DEVICE __host__ __device__
#else
#define QVL_HOST_DEVICE
#endif

namespace qvl::cuda {

constexpr int kMaxRowDims = 5;

// Row r = (i_0, ..., i_{dims-1}), the last index fastest, starts at sum(i_j stride[j]) elements. Dimensions that follow
// each other in memory are one, so dims is 0 or 1 for most tensors and no division is executed.
struct RowLayout {
  int dims;
  unsigned size[kMaxRowDims];
  long long stride[kMaxRowDims];

  QVL_HOST_DEVICE long long offset(unsigned row) const {
    long long at = 0;
#ifdef __CUDACC__
#pragma unroll
#endif
    for (int j = kMaxRowDims - 1; j > 0; --j)
      if (j < dims) {
        at += row % size[j] * stride[j];
        row /= size[j];
      }
    return at + row * stride[0];
  }
};

}  // namespace qvl::cuda
