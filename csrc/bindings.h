// What the files of the CPU module's bindings share.
//
// Python has validated the arguments and allocated every output. What is checked again is what memory safety needs:
// devices, dtypes, element counts and the layout that a kernel assumes. Kernels run without the GIL.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <initializer_list>
#include <optional>
#include <utility>

#include "checks.h"
#include "cpu/parallel.h"
#include "params.h"
#include "recording.h"
#include "tensor_caster.h"

namespace qvl {

namespace py = pybind11;
using Optional = std::optional<TensorView>;

// bindings_attention.cpp: softmax, sparse and linear attention.
void define_attention(py::module_& m);

inline bool unit_stride(const TensorView& t) {
  return t.size[t.ndim - 1] <= 1 || t.stride[t.ndim - 1] == 1 || t.numel() == 0;
}

inline bool has_shape(const TensorView& t, std::initializer_list<std::int64_t> shape) {
  return t.device < 0 && t.ndim == static_cast<int>(shape.size()) && std::equal(shape.begin(), shape.end(), t.size);
}

inline std::int64_t threads() { return openmp().max_threads ? openmp().max_threads() : 1; }

// Every kernel but the roofs is run by this; `kernel` has copies of what it needs, so that it can be run again.
template <class Kernel>
void launch(const Kernel& kernel) {
  if (Recording* recording = Recording::current()) recording->add(kernel);
  py::gil_scoped_release release;
  kernel();
}

// Runs a kernel that needs scratch memory. All such functions answer with 0, or, having done nothing, with the bytes
// that they need.
template <class Kernel>
std::int64_t run(std::int64_t needed, const TensorView& scratch, const Kernel& kernel) {
  if (needed > scratch.numel()) return needed;
  launch(kernel);
  return 0;
}

}  // namespace qvl
