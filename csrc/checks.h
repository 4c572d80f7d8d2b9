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
