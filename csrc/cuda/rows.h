// From a TensorView to what a kernel needs to know of its rows.
#pragma once

#include "../tensor_view.h"
#include "row_layout.h"

namespace qvl::cuda {

// The layout of the rows of a (..., C) tensor. Dimensions of size 1 are left out, dimensions that follow each other in
// memory become one.
inline RowLayout row_layout(const TensorView& t) {
  RowLayout rows{};
  for (int i = 0; i < t.ndim - 1; ++i) {
    if (t.size[i] == 1) continue;
    const int last = rows.dims - 1;
    if (last >= 0 && rows.stride[last] == t.stride[i] * t.size[i]) {
      rows.size[last] *= static_cast<unsigned>(t.size[i]);
      rows.stride[last] = t.stride[i];
    } else {
      rows.size[rows.dims] = static_cast<unsigned>(t.size[i]);
      rows.stride[rows.dims++] = t.stride[i];
    }
  }
  return rows;
}

inline std::int64_t size_of(DType dtype) {
  switch (dtype) {
    case DType::f64:
    case DType::i64:
      return 8;
    case DType::f32:
    case DType::i32:
      return 4;
    case DType::bf16:
    case DType::f16:
      return 2;
    default:
      return 1;
  }
}

// Whether every row of t starts on 16 bytes and has a multiple of 16 bytes. True where there is no tensor.
inline bool in_16_byte_units(const TensorView& t) {
  if (t.data == nullptr) return true;
  const std::int64_t width = 16 / size_of(t.dtype);
  if (reinterpret_cast<std::uintptr_t>(t.data) % 16 != 0 || t.size[t.ndim - 1] % width != 0) return false;
  for (int i = 0; i < t.ndim - 1; ++i)
    if (t.size[i] > 1 && t.stride[i] % width != 0) return false;
  return true;
}

}  // namespace qvl::cuda
