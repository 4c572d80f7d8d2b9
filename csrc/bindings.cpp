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

bool unit_stride(const TensorView& t) { return t.size[t.ndim - 1] <= 1 || t.stride[t.ndim - 1] == 1 || t.numel() == 0; }

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

bool beside(const TensorView& grad, const TensorView& of, DType dtype) {
  return grad.device < 0 && grad.dtype == dtype && grad.ndim == 4 && std::equal(of.size, of.size + 4, grad.size) &&
         unit_stride(grad);
}

std::int64_t attention_backward(const TensorView& grad_out, const TensorView& grad_query, const TensorView& grad_key,
                                const TensorView& grad_value, const TensorView& query, const TensorView& key,
                                const TensorView& value, const TensorView& out, const TensorView& lse,
                                const TensorView& scratch, const py::tuple& options) {
  AttentionBackwardParams p{attention_params(query, key, value, out, lse, scratch, options), grad_out, grad_query,
                            grad_key, grad_value};
  require(p.forward.key_scale.data == nullptr, "attention_backward: int8");
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

// The lists of one kind: offsets that rise within [0, blocks], key blocks and masks in range.
void check_lists(const TensorView& offsets, const TensorView& blocks, std::int64_t rows, std::int64_t columns) {
  const char* const what = "sparse_attention: lists";
  require(offsets.ndim == 2 && offsets.size[0] >= 1 && offsets.size[1] == rows + 1, what);
  contiguous(offsets, offsets.numel(), DType::i32, offsets, what);
  contiguous(blocks, blocks.numel(), DType::i32, offsets, what);
  require(offsets.device < 0, what);
  const auto* at = offsets.as<std::int32_t>();
  require(at[0] >= 0 && at[offsets.numel() - 1] <= blocks.numel() && std::is_sorted(at, at + offsets.numel()), what);
  const auto* block = blocks.as<std::int32_t>();
  for (std::int64_t i = 0; i < blocks.numel(); ++i) require(block[i] >= 0 && block[i] < columns, what);
}

// `blocks` are qvl_kernels.sparse_attention.Blocks.
SparseAttentionParams sparse_params(const TensorView& query, const TensorView& key, const TensorView& value,
                                    const TensorView& out, const Optional& lse, const TensorView& scratch,
                                    const py::tuple& blocks) {
  const py::none none;
  const py::tuple options = py::make_tuple(blocks[8], blocks[9], -1, -1, none, none, none, none, none, none);
  SparseAttentionParams p{attention_params(query, key, value, out, lse, scratch, options)};
  TensorView* const lists[] = {&p.full_offsets, &p.full, &p.partial_offsets, &p.partial, &p.masks, &p.bits};
  for (std::size_t i = 0; i < 6; ++i) *lists[i] = blocks[i].cast<TensorView>();
  p.block = blocks[6].cast<std::int64_t>(), p.shared = blocks[7].cast<bool>();
  require(p.block == 32 || p.block == 64 || p.block == 128 || p.block == 256, "sparse_attention: block");
  const std::int64_t rows = (query.size[2] + p.block - 1) / p.block, columns = (key.size[2] + p.block - 1) / p.block;
  check_lists(p.full_offsets, p.full, rows, columns);
  check_lists(p.partial_offsets, p.partial, rows, columns);
  const std::int64_t heads = p.full_offsets.size[0];
  require(p.partial_offsets.size[0] == heads && (heads == query.size[1] || heads == 1), "sparse_attention: heads");
  require(p.shared || heads > 1 || query.size[1] == 1, "sparse_attention: heads");
  require(p.bits.ndim == 3 && p.bits.size[1] == p.block && p.bits.size[2] == p.block / 8, "sparse_attention: bits");
  contiguous(p.bits, p.bits.numel(), DType::u8, query, "sparse_attention: bits");
  contiguous(p.masks, p.partial.numel(), DType::i32, query, "sparse_attention: masks");
  const auto* mask = p.masks.as<std::int32_t>();
  for (std::int64_t i = 0; i < p.masks.numel(); ++i)
    require(mask[i] >= 0 && mask[i] < p.bits.size[0], "sparse_attention: masks");
  return p;
}

std::int64_t sparse_attention(const TensorView& query, const TensorView& key, const TensorView& value,
                              const TensorView& out, const Optional& lse, const TensorView& scratch,
                              const py::tuple& blocks) {
  const SparseAttentionParams p = sparse_params(query, key, value, out, lse, scratch, blocks);
  const std::int64_t needed = cpu::sparse_attention_scratch_bytes(p, threads());
  if (needed > scratch.numel()) return needed;
  py::gil_scoped_release release;
  cpu::sparse_attention(p);
  return 0;
}

std::int64_t sparse_attention_backward(const TensorView& grad_out, const TensorView& grad_query,
                                       const TensorView& grad_key, const TensorView& grad_value,
                                       const TensorView& query, const TensorView& key, const TensorView& value,
                                       const TensorView& out, const TensorView& lse, const TensorView& scratch,
                                       const py::tuple& blocks) {
  const SparseAttentionBackwardParams p{sparse_params(query, key, value, out, lse, scratch, blocks), grad_out,
                                        grad_query, grad_key, grad_value};
  require(beside(grad_out, out, query.dtype), "sparse_attention_backward: grad_out");
  require(beside(grad_query, query, query.dtype), "sparse_attention_backward: grad_query");
  require(beside(grad_key, key, query.dtype) && beside(grad_value, value, query.dtype),
          "sparse_attention_backward: grad_key, grad_value");
  const std::int64_t needed = cpu::sparse_attention_backward_scratch_bytes(p.forward, threads());
  if (needed > scratch.numel()) return needed;
  py::gil_scoped_release release;
  cpu::sparse_attention_backward(p);
  return 0;
}

double fma_loop(std::int64_t steps, const TensorView& sink) {
  contiguous(sink, sink.numel(), DType::f32, sink, "fma_loop: sink");
  require(sink.device < 0 && sink.numel() >= threads(), "fma_loop: sink");
  py::gil_scoped_release release;
  return cpu::fma_loop(steps, threads(), sink.as<float>());
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
  m.def("sparse_attention", &qvl::sparse_attention);
  m.def("sparse_attention_backward", &qvl::sparse_attention_backward);
  m.def("fma_loop", &qvl::fma_loop);
  m.def("read_loop", &qvl::read_loop);
  m.def("openmp_library", [] { return std::string(qvl::openmp().library); });
  m.def("max_threads", &qvl::threads);
}
