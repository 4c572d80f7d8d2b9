// What the bindings check again for memory safety, on the CPU and on a GPU. Messages for people come from Python.
#pragma once

#include <stdexcept>

#include "tensor_view.h"

namespace qvl {

inline void require(bool holds, const char* what) {
  if (!holds) throw std::invalid_argument(what);
}

inline bool is_float(DType dtype) {
  return dtype == DType::f32 || dtype == DType::bf16 || dtype == DType::f16 || dtype == DType::f64;
}

// The type in which kernels compute.
inline DType compute_type(DType storage) { return storage == DType::f64 ? DType::f64 : DType::f32; }

// The elements of t but for its last dimension.
inline std::int64_t row_count(const TensorView& t) {
  std::int64_t rows = 1;
  for (int i = 0; i < t.ndim - 1; ++i) rows *= t.size[i];
  return rows;
}

// An input: rows of `like`'s channels in `like`'s type, beside it.
inline TensorView rows_of(const TensorView& t, const TensorView& like, const char* what) {
  require(t.device == like.device && t.dtype == like.dtype && t.ndim > 0 && t.numel() == like.numel(), what);
  const int last = t.ndim - 1;
  require(t.size[last] == like.size[like.ndim - 1], what);
  require(t.numel() == 0 || t.size[last] == 1 || t.stride[last] == 1, what);
  return t;
}

// A tensor of `like`'s shape and type beside it, last stride 1.
inline TensorView same_shape(const TensorView& t, const TensorView& like, const char* what) {
  require(t.device == like.device && t.dtype == like.dtype && t.ndim == like.ndim, what);
  for (int i = 0; i < t.ndim; ++i) require(t.size[i] == like.size[i], what);
  require(t.ndim == 0 || t.size[t.ndim - 1] <= 1 || t.stride[t.ndim - 1] == 1, what);
  return t;
}

// A vector for every row of `like`, in the compute type, seen in like's shape: stride 0 where it is broadcast. The last
// dimension is not: it has like's size, stride 1.
inline TensorView broadcast(const TensorView& t, const TensorView& like, const char* what) {
  require(t.device == like.device && t.dtype == compute_type(like.dtype) && t.ndim > 0 && t.ndim <= like.ndim, what);
  const int last = like.ndim - 1, missing = like.ndim - t.ndim;
  require(t.size[t.ndim - 1] == like.size[last] && (like.size[last] <= 1 || t.stride[t.ndim - 1] == 1), what);
  TensorView all = like;
  all.data = t.data;
  all.dtype = t.dtype;
  for (int i = 0; i <= last; ++i) {
    const bool repeats = i < missing || t.size[i - missing] == 1;
    require(repeats || t.size[i - missing] == like.size[i], what);
    all.stride[i] = repeats && i < last ? 0 : t.stride[i - missing];
  }
  return all;
}

// An output or a vector: contiguous, with this many elements of this type, beside `like`.
inline TensorView contiguous(const TensorView& t, std::int64_t numel, DType dtype, const TensorView& like,
                             const char* what) {
  require(t.device == like.device && t.dtype == dtype && t.numel() == numel, what);
  std::int64_t expected = 1;
  for (int i = t.ndim - 1; i >= 0 && numel > 0; --i) {
    require(t.size[i] == 1 || t.stride[i] == expected, what);
    expected *= t.size[i];
  }
  return t;
}

}  // namespace qvl
