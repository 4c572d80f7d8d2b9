// A tensor as the kernels see it: no torch header is needed to build, no torch version is tied to the binary.
#pragma once

#include <cstdint>

namespace qvl {

enum class DType : std::uint8_t { f32, bf16, f16, f64, i8, u8, i32, i64, boolean };

constexpr int kMaxDims = 6;

// Sizes and strides are in elements. `data` is borrowed: the caller's Python tensor keeps it alive during the call.
struct TensorView {
  void* data = nullptr;
  std::int64_t size[kMaxDims] = {};
  std::int64_t stride[kMaxDims] = {};
  std::int32_t ndim = 0;
  std::int32_t device = -1;  // CUDA ordinal, or -1 for the CPU
  DType dtype = DType::f32;

  template <class T>
  T* as() const {
    return static_cast<T*>(data);
  }
  std::int64_t numel() const {
    std::int64_t n = 1;
    for (int i = 0; i < ndim; ++i) n *= size[i];
    return n;
  }
};

}  // namespace qvl
