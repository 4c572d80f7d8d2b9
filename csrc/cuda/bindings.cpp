// The Python module of the CUDA side: for each operation its plan, and its execution on a stream.
//
// Python has validated the arguments and allocated every output. What is checked again here is what memory safety
// needs: devices, dtypes, element counts and the layout that a kernel assumes. Plans are made for tensors on any
// device, launches for tensors on one GPU.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>

#include "../checks.h"
#include "../tensor_caster.h"
#include "driver.h"
#include "rms_norm.h"

namespace py = pybind11;

namespace qvl::cuda {
namespace {

using Optional = std::optional<TensorView>;

bool is_stored(DType dtype) { return dtype == DType::f32 || dtype == DType::f16; }

RmsNormParams rms_norm_params(const TensorView& x, const Optional& residual, const TensorView& weight,
                              const TensorView& y, const Optional& hidden, const Optional& rstd, double eps) {
  require(is_stored(x.dtype) && weight.ndim == 1, "rms_norm: dtype");
  require(residual.has_value() == hidden.has_value(), "rms_norm: residual needs hidden");
  RmsNormParams p{};
  p.x = rows_of(x, x, "rms_norm: x");
  p.weight = contiguous(weight, x.size[x.ndim - 1], x.dtype, x, "rms_norm: weight");
  p.y = contiguous(y, x.numel(), x.dtype, x, "rms_norm: y");
  if (residual) {
    p.residual = rows_of(*residual, x, "rms_norm: residual");
    p.hidden = contiguous(*hidden, x.numel(), x.dtype, x, "rms_norm: hidden");
  }
  if (rstd) p.rstd = contiguous(*rstd, row_count(x), DType::f32, x, "rms_norm: rstd");
  p.eps = eps;
  return p;
}

RmsNormBackwardParams rms_norm_backward_params(const TensorView& grad_y, const Optional& grad_hidden,
                                               const TensorView& hidden, const TensorView& weight,
                                               const TensorView& rstd, const TensorView& grad_x,
                                               const TensorView& grad_weight, const TensorView& partial) {
  require(is_stored(hidden.dtype) && weight.ndim == 1, "rms_norm_backward: dtype");
  require(partial.ndim == 2 && partial.size[0] > 0, "rms_norm_backward: partial");
  RmsNormBackwardParams p{};
  p.hidden = rows_of(hidden, hidden, "rms_norm_backward: hidden");
  const std::int64_t channels = hidden.size[hidden.ndim - 1];
  p.grad_y = rows_of(grad_y, hidden, "rms_norm_backward: grad_y");
  if (grad_hidden) p.grad_hidden = rows_of(*grad_hidden, hidden, "rms_norm_backward: grad_hidden");
  p.weight = contiguous(weight, channels, hidden.dtype, hidden, "rms_norm_backward: weight");
  p.rstd = contiguous(rstd, row_count(hidden), DType::f32, hidden, "rms_norm_backward: rstd");
  p.grad_x = contiguous(grad_x, hidden.numel(), hidden.dtype, hidden, "rms_norm_backward: grad_x");
  p.grad_weight = contiguous(grad_weight, channels, hidden.dtype, hidden, "rms_norm_backward: grad_weight");
  p.partial = contiguous(partial, partial.size[0] * channels, DType::f32, hidden, "rms_norm_backward: partial");
  return p;
}

int gpu_of(const TensorView& t) {
  require(t.device >= 0, "a CUDA kernel needs tensors on a GPU");
  return t.device;
}

void* to_stream(std::uintptr_t stream) { return reinterpret_cast<void*>(stream); }

py::object value_of(const Argument& argument) {
  const std::string kind = argument.kind;
  const auto as = [&](auto value) {
    std::memcpy(&value, argument.bytes, sizeof(value));
    return value;
  };
  if (kind == "pointer") return py::int_(as(std::uintptr_t{}));
  if (kind == "i32") return py::int_(as(std::int32_t{}));
  if (kind == "f32") return py::float_(as(float{}));
  return py::bytes(reinterpret_cast<const char*>(argument.bytes), argument.size);
}

py::list arguments_of(const Plan& plan) {
  py::list list;
  for (const Argument& argument : plan) list.append(py::make_tuple(argument.name, argument.kind, value_of(argument)));
  return list;
}

std::array<std::uint32_t, 3> to_array(const Dim3& d) { return {d.x, d.y, d.z}; }

void bind_plan(py::module_& m) {
  py::class_<Plan>(m, "Plan", "One launch: what the driver is given, and what the PTX interpreter of the tests runs")
      .def_property_readonly("image", [](const Plan& p) { return p.image; })
      .def_property_readonly("kernel", [](const Plan& p) { return p.kernel; })
      .def_property_readonly("grid", [](const Plan& p) { return py::tuple(py::cast(to_array(p.grid))); })
      .def_property_readonly("block", [](const Plan& p) { return py::tuple(py::cast(to_array(p.block))); })
      .def_readonly("shared_bytes", &Plan::shared_bytes)
      .def_property_readonly("args", &arguments_of, "[(name, kind, value), ...]");
}

void bind_driver(py::module_& m) {
  m.def("set_image_folder", &set_image_folder,
        "Where the cubin and PTX files are; cuda_images beside this module unless set");
  m.def(
      "driver_status",
      []() -> std::optional<std::string> {
        std::string failure = driver_status();
        return failure.empty() ? std::nullopt : std::optional(std::move(failure));
      },
      "None where kernels can be launched, else one sentence that says why not");
}

void bind_rms_norm(py::module_& m) {
  m.def("plan_rms_norm", [](const TensorView& x, const Optional& residual, const TensorView& weight,
                            const TensorView& y, const Optional& hidden, const Optional& rstd, double eps) {
    return plan_rms_norm(rms_norm_params(x, residual, weight, y, hidden, rstd, eps));
  });
  m.def("rms_norm", [](const TensorView& x, const Optional& residual, const TensorView& weight, const TensorView& y,
                       const Optional& hidden, const Optional& rstd, double eps, std::uintptr_t stream) {
    const Plan plan = plan_rms_norm(rms_norm_params(x, residual, weight, y, hidden, rstd, eps));
    launch(plan, gpu_of(x), to_stream(stream));
  });
  m.def("rms_norm_backward_chunks", &rms_norm_backward_chunks, "The rows of `partial` that fill a GPU");
  m.def("plan_rms_norm_backward",
        [](const TensorView& grad_y, const Optional& grad_hidden, const TensorView& hidden, const TensorView& weight,
           const TensorView& rstd, const TensorView& grad_x, const TensorView& grad_weight, const TensorView& partial) {
          return plan_rms_norm_backward(
              rms_norm_backward_params(grad_y, grad_hidden, hidden, weight, rstd, grad_x, grad_weight, partial));
        });
  m.def("rms_norm_backward", [](const TensorView& grad_y, const Optional& grad_hidden, const TensorView& hidden,
                                const TensorView& weight, const TensorView& rstd, const TensorView& grad_x,
                                const TensorView& grad_weight, const TensorView& partial, std::uintptr_t stream) {
    const auto plans = plan_rms_norm_backward(
        rms_norm_backward_params(grad_y, grad_hidden, hidden, weight, rstd, grad_x, grad_weight, partial));
    for (const Plan& plan : plans) launch(plan, gpu_of(hidden), to_stream(stream));
  });
}

}  // namespace
}  // namespace qvl::cuda

PYBIND11_MODULE(_cuda, m) {
  m.doc() = "CUDA kernels of qvl_kernels";
  qvl::cuda::bind_plan(m);
  qvl::cuda::bind_driver(m);
  qvl::cuda::bind_rms_norm(m);
}
