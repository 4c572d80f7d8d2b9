// The Python module of the CPU kernels, built once per ISA under the name QVL_MODULE.
//
// Python has validated the arguments and allocated every output. What is checked again here is what memory safety
// needs: devices, dtypes, element counts and the layout that a kernel assumes. Kernels run without the GIL.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>

#include "cpu/parallel.h"
#include "params.h"
#include "tensor_view.h"

namespace py = pybind11;

namespace qvl {
namespace {

using Optional = std::optional<TensorView>;

void require(bool holds, const char* what) {
  if (!holds) throw std::invalid_argument(what);
}

bool is_compute_type_of(DType dtype, DType storage) {
  return dtype == (storage == DType::f64 ? DType::f64 : DType::f32);
}

bool is_float(DType dtype) {
  return dtype == DType::f32 || dtype == DType::bf16 || dtype == DType::f16 || dtype == DType::f64;
}

// An input: CPU memory in rows of `like`'s channels.
TensorView rows_of(const TensorView& t, const TensorView& like, const char* what) {
  require(t.device < 0 && t.dtype == like.dtype && t.ndim > 0 && t.numel() == like.numel(), what);
  require(t.size[t.ndim - 1] == like.size[like.ndim - 1], what);
  require(t.numel() == 0 || t.size[t.ndim - 1] == 1 || t.stride[t.ndim - 1] == 1, what);
  return t;
}

// An output or a vector: CPU memory, contiguous, with this many elements.
TensorView contiguous(const TensorView& t, std::int64_t numel, const char* what) {
  require(t.device < 0 && t.numel() == numel, what);
  std::int64_t expected = 1;
  for (int i = t.ndim - 1; i >= 0 && numel > 0; --i) {
    require(t.size[i] == 1 || t.stride[i] == expected, what);
    expected *= t.size[i];
  }
  return t;
}

void rms_norm(const TensorView& x, const Optional& residual, const TensorView& weight, const TensorView& y,
              const Optional& hidden, const Optional& rstd, double eps) {
  RmsNormParams p{};
  require(is_float(x.dtype) && weight.ndim == 1 && weight.dtype == x.dtype && y.dtype == x.dtype, "rms_norm: dtypes");
  require(residual.has_value() == hidden.has_value(), "rms_norm: residual needs hidden");
  const std::int64_t channels = weight.size[0], numel = x.numel();
  p.x = rows_of(x, x, "rms_norm: x");
  p.weight = contiguous(weight, x.size[x.ndim - 1], "rms_norm: weight");
  p.y = contiguous(y, numel, "rms_norm: y");
  if (residual) {
    p.residual = rows_of(*residual, x, "rms_norm: residual");
    p.hidden = contiguous(*hidden, numel, "rms_norm: hidden");
    require(hidden->dtype == x.dtype, "rms_norm: hidden");
  }
  if (rstd) {
    p.rstd = contiguous(*rstd, channels ? numel / channels : rstd->numel(), "rms_norm: rstd");
    require(is_compute_type_of(rstd->dtype, x.dtype), "rms_norm: rstd");
  }
  p.eps = eps;
  py::gil_scoped_release release;
  cpu::rms_norm(p);
}

void rms_norm_backward(const TensorView& grad_y, const Optional& grad_hidden, const TensorView& hidden,
                       const TensorView& weight, const TensorView& rstd, const TensorView& grad_x,
                       const TensorView& grad_weight, const TensorView& partial) {
  RmsNormBackwardParams p{};
  require(is_float(hidden.dtype) && weight.ndim == 1 && weight.dtype == hidden.dtype, "rms_norm_backward: dtypes");
  require(grad_x.dtype == hidden.dtype && grad_weight.dtype == hidden.dtype, "rms_norm_backward: gradients");
  require(is_compute_type_of(rstd.dtype, hidden.dtype) && partial.dtype == rstd.dtype, "rms_norm_backward: rstd");
  const std::int64_t channels = weight.size[0], numel = hidden.numel();
  p.grad_y = rows_of(grad_y, hidden, "rms_norm_backward: grad_y");
  p.hidden = rows_of(hidden, hidden, "rms_norm_backward: hidden");
  if (grad_hidden) p.grad_hidden = rows_of(*grad_hidden, hidden, "rms_norm_backward: grad_hidden");
  p.weight = contiguous(weight, hidden.size[hidden.ndim - 1], "rms_norm_backward: weight");
  p.rstd = contiguous(rstd, channels ? numel / channels : rstd.numel(), "rms_norm_backward: rstd");
  p.grad_x = contiguous(grad_x, numel, "rms_norm_backward: grad_x");
  p.grad_weight = contiguous(grad_weight, channels, "rms_norm_backward: grad_weight");
  require(partial.ndim == 2 && partial.size[0] > 0, "rms_norm_backward: partial");
  p.partial = contiguous(partial, partial.size[0] * channels, "rms_norm_backward: partial");
  py::gil_scoped_release release;
  cpu::rms_norm_backward(p);
}

}  // namespace
}  // namespace qvl

PYBIND11_MODULE(QVL_MODULE, m) {
  m.doc() = "CPU kernels of qvl_kernels for one instruction set";
  m.def("rms_norm", &qvl::rms_norm);
  m.def("rms_norm_backward", &qvl::rms_norm_backward);
  m.def("openmp_library", [] { return std::string(qvl::openmp().library); });
  m.def("max_threads", [] { return qvl::openmp().max_threads ? qvl::openmp().max_threads() : 1; });
}
