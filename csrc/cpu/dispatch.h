// From a tensor's dtype, known at run time, to the storage type that a kernel is compiled for.
#pragma once

#include "../tensor_view.h"
#include "vec.h"

namespace qvl::cpu {

// Calls f(T{}) with the storage type T of `dtype`, one of the four floating types.
template <class F>
void with_storage_type(DType dtype, const F& f) {
  switch (dtype) {
    case DType::f32:
      return f(float{});
    case DType::bf16:
      return f(bf16{});
    case DType::f16:
      return f(f16{});
    default:
      return f(double{});
  }
}

}  // namespace qvl::cpu
