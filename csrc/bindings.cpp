// The Python module of the CPU kernels, built once per ISA under the name QVL_MODULE.

#include "bindings.h"

namespace qvl {
namespace {

void rms_norm(const TensorView& x, const Optional& residual, const TensorView& weight, const TensorView& y,
              const Optional& hidden, const Optional& rstd, double eps) {
  RmsNormParams p{};
  require(x.device < 0 && is_float(x.dtype) && weight.ndim == 1 && x.ndim > 0, "rms_norm: dtype");
  require(residual.has_value() == hidden.has_value(), "rms_norm: residual needs hidden");
  p.x = rows_of(x, x, "rms_norm: x");
  p.weight = contiguous(weight, x.size[x.ndim - 1], x.dtype, x, "rms_norm: weight");
  p.y = contiguous(y, x.numel(), x.dtype, x, "rms_norm: y");
  if (residual) {
    p.residual = same_shape(*residual, x, "rms_norm: residual");
    p.hidden = contiguous(*hidden, x.numel(), x.dtype, x, "rms_norm: hidden");
  }
  if (rstd) p.rstd = contiguous(*rstd, row_count(x), compute_type(x.dtype), x, "rms_norm: rstd");
  p.eps = eps;
  launch([p] { cpu::rms_norm(p); });
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
  launch([p] { cpu::rms_norm_backward(p); });
}

bool is_matrix(const TensorView& t, std::int64_t rows, std::int64_t columns) {
  return t.device < 0 && t.ndim == 2 && t.size[0] == rows && t.size[1] == columns;
}

// (..., C) as (rows, C), the last stride 1: contiguous, or a matrix with any distance between its rows.
TensorView matrix(const TensorView& t, const char* what) {
  if (t.ndim == 2) {
    require(unit_stride(t), what);
    return t;
  }
  TensorView flat = contiguous(t, t.numel(), t.dtype, t, what);
  flat.ndim = 2;
  flat.size[0] = row_count(t), flat.size[1] = t.size[t.ndim - 1];
  flat.stride[0] = flat.size[1], flat.stride[1] = 1;
  return flat;
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

std::int64_t packed_linear(const TensorView& x, const TensorView& weight, const Optional& scale,
                           const Optional& minimum, const Optional& bias, const Optional& residual, const TensorView& y,
                           const TensorView& scratch, int activation, bool rounded) {
  PackedLinearParams p{};
  p.rounded = rounded;
  require(activation >= 0 && activation <= 2, "packed_linear: activation");
  p.activation = static_cast<Activation>(activation);
  require(x.device < 0 && x.ndim > 0 && is_float(x.dtype) && x.dtype != DType::f64, "packed_linear: x");
  p.x = matrix(x, "packed_linear: x");
  packed_weight(p, weight, scale, minimum, p.x.size[1]);
  const std::int64_t halves = p.activation == Activation::swiglu ? 2 : 1, outputs = weight.size[0] / halves;
  require(weight.size[0] % halves == 0, "packed_linear: swiglu");
  p.y = contiguous(y, p.x.size[0] * outputs, x.dtype, x, "packed_linear: y");
  p.y = matrix(p.y, "packed_linear: y");
  require(p.y.size[1] == outputs, "packed_linear: y");
  if (bias) p.bias = contiguous(*bias, weight.size[0], DType::f32, x, "packed_linear: bias");
  if (residual) p.residual = contiguous(*residual, y.numel(), x.dtype, x, "packed_linear: residual");
  p.scratch = contiguous(scratch, scratch.numel(), DType::u8, x, "packed_linear: scratch");
  return run(cpu::packed_linear_scratch_bytes(p, threads()), scratch, [p, n = threads()] { cpu::packed_linear(p, n); });
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
  return run(cpu::packed_linear_backward_scratch_bytes(p, threads()), scratch,
             [p, n = threads()] { cpu::packed_linear_backward(p, n); });
}

void layer_norm(const TensorView& x, const Optional& residual, const TensorView& weight, const TensorView& bias,
                const TensorView& y, const Optional& hidden, double eps) {
  LayerNormParams p{};
  require(x.device < 0 && is_float(x.dtype) && weight.ndim == 1 && bias.ndim == 1 && x.ndim > 0, "layer_norm: dtype");
  require(residual.has_value() == hidden.has_value(), "layer_norm: residual needs hidden");
  p.x = rows_of(x, x, "layer_norm: x");
  p.weight = contiguous(weight, x.size[x.ndim - 1], x.dtype, x, "layer_norm: weight");
  p.bias = contiguous(bias, x.size[x.ndim - 1], x.dtype, x, "layer_norm: bias");
  p.y = same_shape(y, x, "layer_norm: y");
  if (residual) {
    p.residual = same_shape(*residual, x, "layer_norm: residual");
    p.hidden = same_shape(*hidden, x, "layer_norm: hidden");
  }
  p.eps = eps;
  launch([p] { cpu::layer_norm(p); });
}

RotaryParams rotary_params(const TensorView& query, const TensorView& key, const TensorView& cos, const TensorView& sin,
                           const TensorView& query_out, const TensorView& key_out) {
  RotaryParams p{};
  require(query.device < 0 && is_float(query.dtype) && query.ndim > 0 && key.ndim > 0, "rotary: dtype");
  const std::int64_t dim = query.size[query.ndim - 1];
  require(dim % 2 == 0 && key.size[key.ndim - 1] == dim && key.device < 0 && key.dtype == query.dtype, "rotary: key");
  p.query = same_shape(query, query, "rotary: query"), p.query_out = same_shape(query_out, query, "rotary: query_out");
  p.key = same_shape(key, key, "rotary: key"), p.key_out = same_shape(key_out, key, "rotary: key_out");
  p.query_cos = broadcast(cos, query, "rotary: cos"), p.query_sin = broadcast(sin, query, "rotary: sin");
  p.key_cos = broadcast(cos, key, "rotary: cos"), p.key_sin = broadcast(sin, key, "rotary: sin");
  return p;
}

void rotary(const TensorView& query, const TensorView& key, const TensorView& cos, const TensorView& sin,
            const TensorView& query_out, const TensorView& key_out) {
  const RotaryParams p = rotary_params(query, key, cos, sin, query_out, key_out);
  launch([p] { cpu::rotary(p); });
}

void norm_rotary(const TensorView& query, const TensorView& key, const TensorView& query_weight,
                 const TensorView& key_weight, const TensorView& cos, const TensorView& sin,
                 const TensorView& query_out, const TensorView& key_out, double eps) {
  RotaryParams p = rotary_params(query, key, cos, sin, query_out, key_out);
  require(query.ndim == 4 && key.ndim == 4 && key.size[0] == query.size[0] && key.size[2] == query.size[2],
          "norm_rotary: key");
  for (const TensorView* angle : {&cos, &sin})
    require(angle->ndim == 4 && angle->size[1] == 1, "norm_rotary: cos, sin");
  const std::int64_t dim = query.size[3];
  require(query_weight.ndim == 1 && key_weight.ndim == 1, "norm_rotary: weights");
  p.query_weight = contiguous(query_weight, dim, query.dtype, query, "norm_rotary: query_weight");
  p.key_weight = contiguous(key_weight, dim, query.dtype, query, "norm_rotary: key_weight");
  p.eps = eps;
  launch([p] { cpu::norm_rotary(p); });
}

void append_kv(const TensorView& key, const TensorView& value, const TensorView& key_cache,
               const TensorView& value_cache, const TensorView& starts, const Optional& key_scale,
               const Optional& value_scale) {
  require(key.ndim == 4 && key_cache.ndim == 4 && value.ndim == 4 && value_cache.ndim == 4, "append_kv: tensors");
  require(is_float(key.dtype) && value.dtype == key.dtype && value_cache.dtype == key_cache.dtype, "append_kv: dtypes");
  const std::int64_t batch = key.size[0], heads = key.size[1], tokens = key.size[2], capacity = key_cache.size[2];
  require(has_shape(key, {batch, heads, tokens, key.size[3]}), "append_kv: key");
  require(has_shape(value, {batch, heads, tokens, value.size[3]}), "append_kv: value");
  require(has_shape(key_cache, {batch, heads, capacity, key.size[3]}), "append_kv: key_cache");
  require(has_shape(value_cache, {batch, heads, capacity, value.size[3]}), "append_kv: value_cache");
  for (const TensorView* t : {&key, &value, &key_cache, &value_cache}) require(unit_stride(*t), "append_kv: strides");
  const bool integers = key_cache.dtype == DType::i8;
  require(integers || is_float(key_cache.dtype), "append_kv: cache dtype");
  require((key.dtype == DType::f64) == (key_cache.dtype == DType::f64), "append_kv: cache dtype");
  require(key_scale.has_value() == integers && value_scale.has_value() == integers, "append_kv: scales");
  AppendKvParams p{key, value, key_cache, value_cache, contiguous(starts, batch, DType::i64, key, "append_kv: lengths"),
                   {},  {}};
  if (integers) {
    p.key_scale = *key_scale, p.value_scale = *value_scale;
    for (const TensorView* t : {&p.key_scale, &p.value_scale})
      require(has_shape(*t, {batch, heads, capacity}) && t->dtype == DType::f32, "append_kv: scales");
  }
  launch([p] { cpu::append_kv(p); });
}

void swiglu(const TensorView& gate, const TensorView& up, const TensorView& y) {
  require(gate.device < 0 && is_float(gate.dtype), "swiglu: dtype");
  const SwigluParams p{same_shape(gate, gate, "swiglu: gate"), same_shape(up, gate, "swiglu: up"),
                       same_shape(y, gate, "swiglu: y")};
  launch([p] { cpu::swiglu(p); });
}

void gelu_tanh(const TensorView& x, const TensorView& y) {
  require(x.device < 0 && is_float(x.dtype), "gelu_tanh: dtype");
  const GeluTanhParams p{same_shape(x, x, "gelu_tanh: x"), same_shape(y, x, "gelu_tanh: y")};
  launch([p] { cpu::gelu_tanh(p); });
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

double bf16_loop(std::int64_t steps, const TensorView& sink) {
  contiguous(sink, sink.numel(), DType::f32, sink, "bf16_loop: sink");
  require(sink.device < 0 && sink.numel() >= threads(), "bf16_loop: sink");
  py::gil_scoped_release release;
  return cpu::bf16_loop(steps, threads(), sink.as<float>());
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
  qvl::define_attention(m);
  m.def("rms_norm", &qvl::rms_norm);
  m.def("rms_norm_backward", &qvl::rms_norm_backward);
  m.def("layer_norm", &qvl::layer_norm);
  m.def("rotary", &qvl::rotary);
  m.def("norm_rotary", &qvl::norm_rotary);
  m.def("append_kv", &qvl::append_kv);
  m.def("swiglu", &qvl::swiglu);
  m.def("gelu_tanh", &qvl::gelu_tanh);
  m.def("packed_linear", &qvl::packed_linear);
  m.def("packed_linear_backward", &qvl::packed_linear_backward);
  m.def("fma_loop", &qvl::fma_loop);
  m.def("int8_loop", &qvl::int8_loop);
  m.def("bf16_loop", &qvl::bf16_loop);
  m.def("read_loop", &qvl::read_loop);
  qvl::py::class_<qvl::Recording>(m, "Recording", qvl::py::module_local())
      .def(qvl::py::init<>())
      .def("begin", &qvl::Recording::begin)
      .def("end", &qvl::Recording::end)
      .def("replay", &qvl::Recording::replay)
      .def("__len__", &qvl::Recording::size);
  m.def("openmp_library", [] { return std::string(qvl::openmp().library); });
  m.def("max_threads", &qvl::threads);
}
