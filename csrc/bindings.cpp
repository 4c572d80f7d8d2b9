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

bool unit_stride(const TensorView& t) { return t.size[t.ndim - 1] <= 1 || t.stride[t.ndim - 1] == 1; }

bool has_shape(const TensorView& t, std::initializer_list<std::int64_t> shape) {
  return t.device < 0 && t.ndim == static_cast<int>(shape.size()) && std::equal(shape.begin(), shape.end(), t.size);
}

void attention(const TensorView& query, const TensorView& key, const TensorView& value, const TensorView& out,
               const Optional& lse, const Optional& mask, const Optional& key_lengths, const Optional& offsets_q,
               const Optional& offsets_k, const TensorView& scratch, double scale, bool causal,
               std::pair<std::int64_t, std::int64_t> window) {
  AttentionParams p{query, key, value, {}, {}, {}, {}, out, {}, scratch, scale, causal, window.first, window.second};
  require(query.ndim == 4 && key.ndim == 4 && value.ndim == 4 && is_float(query.dtype), "attention: tensors");
  const std::int64_t batch = query.size[0], heads = query.size[1], len_q = query.size[2], dim = query.size[3];
  const std::int64_t kv_heads = key.size[1], len_k = key.size[2], dim_v = value.size[3];
  require(query.device < 0 && has_shape(key, {batch, kv_heads, len_k, dim}), "attention: key");
  require(has_shape(value, {batch, kv_heads, len_k, dim_v}), "attention: value");
  require(has_shape(out, {batch, heads, len_q, dim_v}) && kv_heads > 0 && heads % kv_heads == 0, "attention: out");
  require(dim <= 256 && dim_v <= 256, "attention: head dimension");
  for (const TensorView* t : {&query, &key, &value, &out})
    require(t->dtype == query.dtype && unit_stride(*t), "attention: dtypes and strides");
  if (lse) {
    p.lse = contiguous(*lse, batch * heads * len_q, "attention: lse");
    require(lse->ndim == 3 && is_compute_type_of(lse->dtype, query.dtype), "attention: lse");
  }
  if (mask) {
    p.mask = *mask;
    require(has_shape(*mask, {batch, heads, len_q, len_k}), "attention: mask");
    require(mask->dtype == DType::boolean || is_compute_type_of(mask->dtype, query.dtype), "attention: mask dtype");
  }
  if (key_lengths) {
    p.key_lengths = *key_lengths;
    require(has_shape(*key_lengths, {batch}) && key_lengths->dtype == DType::i64, "attention: key_lengths");
  }
  require(offsets_q.has_value() == offsets_k.has_value(), "attention: offsets");
  if (offsets_q) {
    p.offsets_q = contiguous(*offsets_q, offsets_q->numel(), "attention: offsets_q");
    p.offsets_k = contiguous(*offsets_k, offsets_q->numel(), "attention: offsets_k");
    require(offsets_q->dtype == DType::i64 && offsets_k->dtype == DType::i64 && batch == 1, "attention: offsets");
    const std::int64_t last = offsets_q->numel() - 1;
    for (const auto& [offsets, length] : {std::pair(&p.offsets_q, len_q), std::pair(&p.offsets_k, len_k)}) {
      const std::int64_t* at = offsets->as<std::int64_t>();
      require(last >= 0 && at[0] >= 0 && at[last] <= length && std::is_sorted(at, at + last + 1), "attention: offsets");
    }
  }
  contiguous(scratch, scratch.numel(), "attention: scratch");
  require(scratch.dtype == DType::u8 && scratch.numel() >= cpu::attention_scratch_bytes(p, 1), "attention: scratch");
  py::gil_scoped_release release;
  cpu::attention(p);
}

}  // namespace
}  // namespace qvl

PYBIND11_MODULE(QVL_MODULE, m) {
  m.doc() = "CPU kernels of qvl_kernels for one instruction set";
  m.def("rms_norm", &qvl::rms_norm);
  m.def("rms_norm_backward", &qvl::rms_norm_backward);
  m.def("attention", &qvl::attention);
  m.def("attention_scratch_bytes",
        [](const qvl::TensorView& query, const qvl::TensorView& key, const qvl::TensorView& value, bool packed) {
          qvl::AttentionParams p{};
          p.query = query, p.key = key, p.value = value;
          if (packed) p.offsets_q = key;  // only asked whether it is there
          return qvl::cpu::attention_scratch_bytes(p, qvl::openmp().max_threads ? qvl::openmp().max_threads() : 1);
        });
  m.def("openmp_library", [] { return std::string(qvl::openmp().library); });
  m.def("max_threads", [] { return qvl::openmp().max_threads ? qvl::openmp().max_threads() : 1; });
}
