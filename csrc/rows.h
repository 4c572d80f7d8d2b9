// The rows of a (..., C) tensor with any strides in front and stride 1 in the last dimension.
#pragma once

#include <cstdint>

#include "tensor_view.h"

namespace qvl {

// offset(r) is where row r starts, in elements. Dimensions that follow each other in memory are merged first, so that
// the usual tensors cost one multiplication a row.
class Rows {
 public:
  explicit Rows(const TensorView& t) {
    for (int i = 0; i < t.ndim - 1; ++i) {
      if (t.size[i] == 1) continue;
      if (dims_ > 0 && stride_[dims_ - 1] == t.stride[i] * t.size[i]) {
        size_[dims_ - 1] *= t.size[i];
        stride_[dims_ - 1] = t.stride[i];
      } else {
        size_[dims_] = t.size[i];
        stride_[dims_++] = t.stride[i];
      }
    }
  }
  std::int64_t offset(std::int64_t row) const {
    std::int64_t at = 0;
    for (int i = dims_ - 1; i > 0; --i) {
      at += row % size_[i] * stride_[i];
      row /= size_[i];
    }
    return dims_ > 0 ? at + row * stride_[0] : 0;
  }

 private:
  int dims_ = 0;
  std::int64_t size_[kMaxDims];
  std::int64_t stride_[kMaxDims];
};

}  // namespace qvl
