// The Python module of the CPU kernels, built once per ISA under the name QVL_MODULE.
//
// Python has validated the arguments and allocated every output. What is checked again here is what memory safety
// needs: devices, dtypes, element counts and the layout that a kernel assumes. Kernels run without the GIL.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <initializer_list>
#include <optional>
#include <utility>

#include "checks.h"
#include "cpu/parallel.h"
#include "params.h"

namespace py = pybind11;

namespace qvl {
namespace {

using Optional = std::optional<TensorView>;

void rms_norm(const TensorView& x, const Optional& residual, const TensorView& weight, const TensorView& y,
              const Optional& hidden, const Optional& rstd, double eps) {
  RmsNormParams p{};
  require(x.device < 0 && is_float(x.dtype) && weight.ndim == 1, "rms_norm: dtype");
  require(residual.has_value() == hidden.has_value(), "rms_norm: residual needs hidden");
  p.x = rows_of(x, x, "rms_norm: x");
  p.weight = contiguous(weight, x.size[x.ndim - 1], x.dtype, x, "rms_norm: weight");
  p.y = contiguous(y, x.numel(), x.dtype, x, "rms_norm: y");
  if (residual) {
    p.residual = rows_of(*residual, x, "rms_norm: residual");
    p.hidden = contiguous(*hidden, x.numel(), x.dtype, x, "rms_norm: hidden");
  }
  if (rstd) p.rstd = contiguous(*rstd, row_count(x), compute_type(x.dtype), x, "rms_norm: rstd");
  p.eps = eps;
  py::gil_scoped_release release;
  cpu::rms_norm(p);
}

void rms_norm_backward(const TensorView& grad_y, const Optional& grad_hidden, const TensorView& hidden,
                       const TensorView& weight, const TensorView& rstd, const TensorView& grad_x,
                       const TensorView& grad_weight, const TensorView& partial) {
  RmsNormBackwardParams p{};
  require(hidden.device < 0 && is_float(hidden.dtype) && weight.ndim == 1, "rms_norm_backward: dtype");
  require(partial.ndim == 2 && partial.size[0] > 0, "rms_norm_backward: partial");
  const DType wide = compute_type(hidden.dtype);
  p.hidden = rows_of(hidden, hidden, "rms_norm_backward: hidden");
  p.grad_y = rows_of(grad_y, hidden, "rms_norm_backward: grad_y");
  if (grad_hidden) p.grad_hidden = rows_of(*grad_hidden, hidden, "rms_norm_backward: grad_hidden");
  const std::int64_t channels = hidden.size[hidden.ndim - 1];
  p.weight = contiguous(weight, channels, hidden.dtype, hidden, "rms_norm_backward: weight");
  p.rstd = contiguous(rstd, row_count(hidden), wide, hidden, "rms_norm_backward: rstd");
  p.grad_x = contiguous(grad_x, hidden.numel(), hidden.dtype, hidden, "rms_norm_backward: grad_x");
  p.grad_weight = contiguous(grad_weight, channels, hidden.dtype, hidden, "rms_norm_backward: grad_weight");
  p.partial = contiguous(partial, partial.size[0] * channels, wide, hidden, "rms_norm_backward: partial");
  py::gil_scoped_release release;
  cpu::rms_norm_backward(p);
}

bool unit_stride(const TensorView& t) { return t.size[t.ndim - 1] <= 1 || t.stride[t.ndim - 1] == 1; }

bool has_shape(const TensorView& t, std::initializer_list<std::int64_t> shape) {
  return t.device < 0 && t.ndim == static_cast<int>(shape.size()) && std::equal(shape.begin(), shape.end(), t.size);
}

// What forward and backward have in common, checked. `options` are qvl_kernels._attention.Options.
AttentionParams attention_params(const TensorView& query, const TensorView& key, const TensorView& value,
                                 const TensorView& out, const Optional& lse, const TensorView& scratch,
                                 const py::tuple& options) {
  AttentionParams p{};
  p.query = query, p.key = key, p.value = value, p.out = out, p.scratch = scratch;
  p.scale = options[0].cast<double>(), p.causal = options[1].cast<bool>();
  p.left = options[2].cast<std::int64_t>(), p.right = options[3].cast<std::int64_t>();
  const auto optional = [&](std::size_t i) { return options[i].cast<Optional>(); };
  const Optional mask = optional(4), key_lengths = optional(5), offsets_q = optional(6), offsets_k = optional(7);
  const Optional key_scale = optional(8), value_scale = optional(9);
  require(query.ndim == 4 && key.ndim == 4 && value.ndim == 4 && is_float(query.dtype), "attention: tensors");
  const std::int64_t batch = query.size[0], heads = query.size[1], len_q = query.size[2], dim = query.size[3];
  const std::int64_t kv_heads = key.size[1], len_k = key.size[2], dim_v = value.size[3];
  require(query.device < 0 && has_shape(key, {batch, kv_heads, len_k, dim}), "attention: key");
  require(has_shape(value, {batch, kv_heads, len_k, dim_v}), "attention: value");
  require(has_shape(out, {batch, heads, len_q, dim_v}) && kv_heads > 0 && heads % kv_heads == 0, "attention: out");
  require(dim <= 256 && dim_v <= 256, "attention: head dimension");
  for (const TensorView* t : {&query, &key, &value, &out}) require(unit_stride(*t), "attention: strides");
  const DType stored = key_scale ? DType::i8 : query.dtype;
  require(out.dtype == query.dtype && key.dtype == stored && value.dtype == stored, "attention: dtypes");
  require(key_scale.has_value() == value_scale.has_value(), "attention: scales");
  if (key_scale) {
    p.key_scale = *key_scale, p.value_scale = *value_scale;
    for (const TensorView* t : {&p.key_scale, &p.value_scale})
      require(has_shape(*t, {batch, kv_heads, len_k}) && t->dtype == DType::f32, "attention: scales");
    require(query.dtype != DType::f64, "attention: scales");
  }
  if (lse) {
    p.lse = contiguous(*lse, batch * heads * len_q, compute_type(query.dtype), query, "attention: lse");
    require(lse->ndim == 3, "attention: lse");
  }
  if (mask) {
    p.mask = *mask;
    require(has_shape(*mask, {batch, heads, len_q, len_k}), "attention: mask");
    require(mask->dtype == DType::boolean || mask->dtype == compute_type(query.dtype), "attention: mask dtype");
  }
  if (key_lengths) {
    p.key_lengths = *key_lengths;
    require(has_shape(*key_lengths, {batch}) && key_lengths->dtype == DType::i64, "attention: key_lengths");
  }
  require(offsets_q.has_value() == offsets_k.has_value(), "attention: offsets");
  if (offsets_q) {
    p.offsets_q = contiguous(*offsets_q, offsets_q->numel(), DType::i64, query, "attention: offsets_q");
    p.offsets_k = contiguous(*offsets_k, offsets_q->numel(), DType::i64, query, "attention: offsets_k");
    require(batch == 1, "attention: offsets");
    const std::int64_t last = offsets_q->numel() - 1;
    for (const auto& [offsets, length] : {std::pair(&p.offsets_q, len_q), std::pair(&p.offsets_k, len_k)}) {
      const std::int64_t* at = offsets->as<std::int64_t>();
      require(last >= 0 && at[0] >= 0 && at[last] <= length && std::is_sorted(at, at + last + 1), "attention: offsets");
    }
  }
  contiguous(scratch, scratch.numel(), DType::u8, query, "attention: scratch");
  return p;
}

std::int64_t threads() { return openmp().max_threads ? openmp().max_threads() : 1; }

// Both answer with 0, or, having done nothing, with the bytes of scratch memory that they need.
std::int64_t attention(const TensorView& query, const TensorView& key, const TensorView& value, const TensorView& out,
                       const Optional& lse, const TensorView& scratch, const py::tuple& options) {
  const AttentionParams p = attention_params(query, key, value, out, lse, scratch, options);
  const std::int64_t needed = cpu::attention_scratch_bytes(p, threads());
  if (needed > scratch.numel()) return needed;
  py::gil_scoped_release release;
  cpu::attention(p);
  return 0;
}

std::int64_t attention_backward(const TensorView& grad_out, const TensorView& grad_query, const TensorView& grad_key,
                                const TensorView& grad_value, const TensorView& query, const TensorView& key,
                                const TensorView& value, const TensorView& out, const TensorView& lse,
                                const TensorView& scratch, const py::tuple& options) {
  AttentionBackwardParams p{attention_params(query, key, value, out, lse, scratch, options), grad_out, grad_query,
                            grad_key, grad_value};
  require(p.forward.key_scale.data == nullptr, "attention_backward: int8");
  const auto beside = [](const TensorView& grad, const TensorView& of, DType dtype) {
    return grad.device < 0 && grad.dtype == dtype && grad.ndim == 4 && std::equal(of.size, of.size + 4, grad.size) &&
           unit_stride(grad);
  };
  const DType wide = compute_type(query.dtype);
  require(beside(grad_out, out, query.dtype), "attention_backward: grad_out");
  require(beside(grad_query, query, wide), "attention_backward: grad_query");
  require(beside(grad_key, key, wide) && beside(grad_value, value, wide), "attention_backward: grad_key, grad_value");
  const std::int64_t needed = cpu::attention_backward_scratch_bytes(p.forward, threads());
  if (needed > scratch.numel()) return needed;
  py::gil_scoped_release release;
  cpu::attention_backward(p);
  return 0;
}

bool is_matrix(const TensorView& t, std::int64_t rows, std::int64_t columns) {
  return t.device < 0 && t.ndim == 2 && t.size[0] == rows && t.size[1] == columns;
}

// The packed weight of in_features columns, checked.
void packed_weight(PackedLinearParams& p, const TensorView& weight, const Optional& scale, const Optional& minimum,
                   std::int64_t in_features) {
  require(weight.ndim == 2 && weight.device < 0, "packed_linear: weight");
  const std::int64_t rows = weight.size[0], padded = (in_features + 127) / 128 * 128;
  const bool quantized = weight.dtype == DType::i8 || weight.dtype == DType::u8;
  require(quantized || weight.dtype == DType::f32 || weight.dtype == DType::bf16, "packed_linear: weight dtype");
  const std::int64_t width = !quantized ? in_features : weight.dtype == DType::i8 ? padded : padded / 2;
  p.weight = contiguous(weight, rows * width, weight.dtype, weight, "packed_linear: weight");
  require(scale.has_value() == quantized && minimum.has_value() == (weight.dtype == DType::u8), "packed_linear: scale");
  const std::int64_t groups = weight.dtype == DType::i8 ? padded / 128 : padded / 32;
  if (scale) p.scale = contiguous(*scale, rows * groups, DType::bf16, weight, "packed_linear: scale");
  if (minimum) p.minimum = contiguous(*minimum, rows * groups, DType::bf16, weight, "packed_linear: minimum");
}

// Both answer with 0, or, having done nothing, with the bytes of scratch memory that they need.
std::int64_t packed_linear(const TensorView& x, const TensorView& weight, const Optional& scale,
                           const Optional& minimum, const Optional& bias, const Optional& residual, const TensorView& y,
                           const TensorView& scratch, int activation) {
  PackedLinearParams p{};
  require(activation >= 0 && activation <= 2, "packed_linear: activation");
  p.activation = static_cast<Activation>(activation);
  require(x.ndim == 2 && is_float(x.dtype) && x.dtype != DType::f64 && unit_stride(x), "packed_linear: x");
  packed_weight(p, weight, scale, minimum, x.size[1]);
  const std::int64_t outputs = weight.size[0] / (p.activation == Activation::swiglu ? 2 : 1);
  p.x = x;
  require(is_matrix(x, x.size[0], x.size[1]) && is_matrix(y, x.size[0], outputs), "packed_linear: y");
  p.y = contiguous(y, x.size[0] * outputs, x.dtype, x, "packed_linear: y");
  if (bias) p.bias = contiguous(*bias, weight.size[0], DType::f32, x, "packed_linear: bias");
  if (residual) p.residual = contiguous(*residual, y.numel(), x.dtype, x, "packed_linear: residual");
  p.scratch = contiguous(scratch, scratch.numel(), DType::u8, x, "packed_linear: scratch");
  const std::int64_t needed = cpu::packed_linear_scratch_bytes(p, threads());
  if (needed > scratch.numel()) return needed;
  py::gil_scoped_release release;
  cpu::packed_linear(p, threads());
  return 0;
}

std::int64_t packed_linear_backward(const TensorView& grad, const TensorView& weight, const Optional& scale,
                                    const Optional& minimum, const TensorView& grad_x, const TensorView& scratch) {
  PackedLinearParams p{};
  require(grad.ndim == 2 && is_float(grad.dtype) && grad.dtype != DType::f64 && unit_stride(grad),
          "packed_linear_backward: grad");
  require(grad_x.ndim == 2 && is_matrix(grad, grad_x.size[0], weight.size[0]), "packed_linear_backward: grad");
  packed_weight(p, weight, scale, minimum, grad_x.size[1]);
  p.x = grad;
  p.y = contiguous(grad_x, grad_x.numel(), grad.dtype, grad, "packed_linear_backward: grad_x");
  p.scratch = contiguous(scratch, scratch.numel(), DType::u8, grad, "packed_linear_backward: scratch");
  const std::int64_t needed = cpu::packed_linear_backward_scratch_bytes(p, threads());
  if (needed > scratch.numel()) return needed;
  py::gil_scoped_release release;
  cpu::packed_linear_backward(p, threads());
  return 0;
}

double fma_loop(std::int64_t steps, const TensorView& sink) {
  contiguous(sink, sink.numel(), DType::f32, sink, "fma_loop: sink");
  require(sink.device < 0 && sink.numel() >= threads(), "fma_loop: sink");
  py::gil_scoped_release release;
  return cpu::fma_loop(steps, threads(), sink.as<float>());
}

double int8_loop(std::int64_t steps, const TensorView& sink) {
  contiguous(sink, sink.numel(), DType::f32, sink, "int8_loop: sink");
  require(sink.device < 0 && sink.numel() >= threads(), "int8_loop: sink");
  py::gil_scoped_release release;
  return cpu::int8_loop(steps, threads(), sink.as<float>());
}

void read_loop(const TensorView& data, const TensorView& sink) {
  contiguous(data, data.numel(), DType::f32, sink, "read_loop: data");
  contiguous(sink, sink.numel(), DType::f32, sink, "read_loop: sink");
  require(sink.device < 0 && sink.numel() >= threads(), "read_loop: sink");
  py::gil_scoped_release release;
  cpu::read_loop(data.as<float>(), data.numel(), threads(), sink.as<float>());
}

}  // namespace
}  // namespace qvl

PYBIND11_MODULE(QVL_MODULE, m) {
  m.doc() = "CPU kernels of qvl_kernels for one instruction set";
  m.def("rms_norm", &qvl::rms_norm);
  m.def("rms_norm_backward", &qvl::rms_norm_backward);
  m.def("attention", &qvl::attention);
  m.def("attention_backward", &qvl::attention_backward);
  m.def("packed_linear", &qvl::packed_linear);
  m.def("packed_linear_backward", &qvl::packed_linear_backward);
  m.def("fma_loop", &qvl::fma_loop);
  m.def("int8_loop", &qvl::int8_loop);
  m.def("read_loop", &qvl::read_loop);
  m.def("openmp_library", [] { return std::string(qvl::openmp().library); });
  m.def("max_threads", &qvl::threads);
}
