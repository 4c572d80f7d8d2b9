// Softmax, sparse and linear attention in the Python module of the CPU kernels.

#include <tuple>

#include "bindings.h"

namespace qvl {
namespace {

// Packed segments' offsets: ascending, within the tokens that query and key have.
void check_offsets(const TensorView& offsets_q, const TensorView& offsets_k, const TensorView& query,
                   const TensorView& key, const char* what) {
  const std::int64_t count = offsets_q.numel();
  require(count > 0, what);
  for (const auto& [offsets, length] : {std::pair(&offsets_q, query.size[2]), std::pair(&offsets_k, key.size[2])}) {
    const std::int64_t* at = contiguous(*offsets, count, DType::i64, query, what).as<std::int64_t>();
    require(at[0] >= 0 && at[count - 1] <= length && std::is_sorted(at, at + count), what);
  }
}

// qvl_kernels._attention.Options.
struct AttentionOptions {
  double scale;
  bool causal;
  std::int64_t left = -1, right = -1;
  bool rounded = false;
  Optional mask, key_lengths, offsets_q, offsets_k, key_scale, value_scale;

  AttentionOptions(double s, bool c) : scale(s), causal(c) {}
  explicit AttentionOptions(const py::tuple& options)
      : scale(options[0].cast<double>()),
        causal(options[1].cast<bool>()),
        left(options[2].cast<std::int64_t>()),
        right(options[3].cast<std::int64_t>()),
        rounded(options[4].cast<bool>()),
        mask(options[5].cast<Optional>()),
        key_lengths(options[6].cast<Optional>()),
        offsets_q(options[7].cast<Optional>()),
        offsets_k(options[8].cast<Optional>()),
        key_scale(options[9].cast<Optional>()),
        value_scale(options[10].cast<Optional>()) {}
};

// What forward and backward have in common, checked.
AttentionParams attention_params(const TensorView& query, const TensorView& key, const TensorView& value,
                                 const TensorView& out, const Optional& lse, const TensorView& scratch,
                                 const AttentionOptions& options) {
  AttentionParams p{};
  p.query = query, p.key = key, p.value = value, p.out = out, p.scratch = scratch;
  p.scale = options.scale, p.causal = options.causal, p.left = options.left, p.right = options.right;
  p.rounded = options.rounded;
  const auto& [mask, key_lengths, offsets_q, offsets_k, key_scale, value_scale] = std::tie(
      options.mask, options.key_lengths, options.offsets_q, options.offsets_k, options.key_scale, options.value_scale);
  require(query.ndim == 4 && key.ndim == 4 && value.ndim == 4 && is_float(query.dtype), "attention: tensors");
  const std::int64_t batch = query.size[0], heads = query.size[1], len_q = query.size[2], dim = query.size[3];
  const std::int64_t kv_heads = key.size[1], len_k = key.size[2], dim_v = value.size[3];
  require(query.device < 0 && has_shape(key, {batch, kv_heads, len_k, dim}), "attention: key");
  require(has_shape(value, {batch, kv_heads, len_k, dim_v}), "attention: value");
  require(has_shape(out, {batch, heads, len_q, dim_v}) && kv_heads > 0 && heads % kv_heads == 0, "attention: out");
  require(dim <= 256 && dim_v <= 256, "attention: head dimension");
  for (const TensorView* t : {&query, &key, &value, &out}) require(unit_stride(*t), "attention: strides");
  const bool halves = query.dtype == DType::f32 && (key.dtype == DType::bf16 || key.dtype == DType::f16);
  const bool stored = key_scale ? key.dtype == DType::i8 : key.dtype == query.dtype || halves;
  require(out.dtype == query.dtype && stored && value.dtype == key.dtype, "attention: dtypes");
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
    p.offsets_q = *offsets_q, p.offsets_k = *offsets_k;
    require(batch == 1, "attention: offsets");
    check_offsets(p.offsets_q, p.offsets_k, query, key, "attention: offsets");
  }
  contiguous(scratch, scratch.numel(), DType::u8, query, "attention: scratch");
  return p;
}

bool beside(const TensorView& grad, const TensorView& of, DType dtype) {
  return grad.device < 0 && grad.dtype == dtype && grad.ndim == 4 && std::equal(of.size, of.size + 4, grad.size) &&
         unit_stride(grad);
}

std::int64_t attention(const TensorView& query, const TensorView& key, const TensorView& value, const TensorView& out,
                       const Optional& lse, const TensorView& scratch, const py::tuple& options) {
  const AttentionParams p = attention_params(query, key, value, out, lse, scratch, AttentionOptions(options));
  return run(cpu::attention_scratch_bytes(p, threads()), scratch, [p] { cpu::attention(p); });
}

// A call without options, or -1 where a tensor is not as it must be: the caller then finds out what to say.
std::int64_t attention_plain(const TensorView& query, const TensorView& key, const TensorView& value,
                             const TensorView& out, const TensorView& scratch, bool causal, double scale) {
  AttentionParams p{};
  try {
    p = attention_params(query, key, value, out, std::nullopt, scratch, AttentionOptions(scale, causal));
  } catch (const std::invalid_argument&) {
    return -1;
  }
  return run(cpu::attention_scratch_bytes(p, threads()), scratch, [p] { cpu::attention(p); });
}

std::int64_t attention_backward(const TensorView& grad_out, const TensorView& grad_query, const TensorView& grad_key,
                                const TensorView& grad_value, const TensorView& query, const TensorView& key,
                                const TensorView& value, const TensorView& out, const TensorView& lse,
                                const TensorView& scratch, const py::tuple& options) {
  AttentionBackwardParams p{attention_params(query, key, value, out, lse, scratch, AttentionOptions(options)), grad_out,
                            grad_query, grad_key, grad_value};
  require(key.dtype == query.dtype, "attention_backward: dtypes");
  const DType wide = compute_type(query.dtype);
  require(beside(grad_out, out, query.dtype), "attention_backward: grad_out");
  require(beside(grad_query, query, wide), "attention_backward: grad_query");
  require(beside(grad_key, key, wide) && beside(grad_value, value, wide), "attention_backward: grad_key, grad_value");
  return run(cpu::attention_backward_scratch_bytes(p.forward, threads()), scratch, [p] { cpu::attention_backward(p); });
}

// What forward and backward have in common, checked. `options` are qvl_kernels._linear_attention.Options.
LinearAttentionParams linear_attention_params(const TensorView& query, const TensorView& key, const TensorView& value,
                                              const TensorView& out, const Optional& normalizer,
                                              const TensorView& scratch, const py::tuple& options) {
  LinearAttentionParams p{};
  p.query = query, p.key = key, p.value = value, p.out = out, p.scratch = scratch, p.threads = threads();
  const auto optional = [&](std::size_t i) { return options[i].cast<Optional>(); };
  const Optional projection = optional(0), key_mask = optional(3), offsets_q = optional(8), offsets_k = optional(9);
  p.kind = static_cast<FeatureKind>(options[1].cast<int>()), p.causal = options[2].cast<bool>();
  require(query.ndim == 4 && key.ndim == 4 && value.ndim == 4 && is_float(query.dtype), "linear_attention: tensors");
  const std::int64_t batch = query.size[0], heads = query.size[1], len_q = query.size[2], dim = query.size[3];
  const std::int64_t kv_heads = key.size[1], len_k = key.size[2], dim_v = value.size[3];
  require(query.device < 0 && has_shape(key, {batch, kv_heads, len_k, dim}), "linear_attention: key");
  require(has_shape(value, {batch, kv_heads, len_k, dim_v}), "linear_attention: value");
  require(has_shape(out, {batch, heads, len_q, dim_v}), "linear_attention: out");
  require(kv_heads > 0 && heads % kv_heads == 0 && dim_v <= 256, "linear_attention: heads");
  for (const TensorView* t : {&query, &key, &value, &out})
    require(unit_stride(*t) && t->dtype == query.dtype, "linear_attention: strides, dtypes");
  const DType wide = compute_type(query.dtype);
  require(projection.has_value() == (p.kind == FeatureKind::favor), "linear_attention: projection");
  const std::int64_t features = projection ? projection->size[0] : dim;
  if (projection) {
    p.projection = contiguous(*projection, features * dim, wide, query, "linear_attention: projection");
    require(projection->ndim == 2 && dim <= 256, "linear_attention: projection");
  }
  require(features > 0 && features <= 2048, "linear_attention: features");
  if (normalizer) {
    const std::int64_t rows = 2 * batch * heads * len_q;
    p.normalizer = contiguous(*normalizer, rows, wide, query, "linear_attention: normalizer");
  }
  if (key_mask) {
    p.key_mask = *key_mask;
    require(has_shape(*key_mask, {batch, len_k}) && key_mask->dtype == DType::boolean, "linear_attention: key_mask");
  }
  if (const Optional sums = optional(4), total = optional(5), top = optional(6); sums) {
    require(total && top, "linear_attention: state");
    p.sums = contiguous(*sums, batch * kv_heads * features * dim_v, wide, query, "linear_attention: S");
    p.total = contiguous(*total, batch * kv_heads * features, wide, query, "linear_attention: z");
    p.top = contiguous(*top, batch * kv_heads, wide, query, "linear_attention: top");
  }
  if (offsets_q) {
    require(offsets_k.has_value() && batch == 1 && p.top.data == nullptr, "linear_attention: offsets");
    p.offsets_q = *offsets_q, p.offsets_k = *offsets_k;
    check_offsets(p.offsets_q, p.offsets_k, query, key, "linear_attention: offsets");
  }
  contiguous(scratch, scratch.numel(), DType::u8, query, "linear_attention: scratch");
  return p;
}

std::int64_t linear_attention(const TensorView& query, const TensorView& key, const TensorView& value,
                              const TensorView& out, const Optional& normalizer, const Optional& next_sums,
                              const Optional& next_total, const Optional& next_top, const TensorView& scratch,
                              const py::tuple& options) {
  LinearAttentionParams p = linear_attention_params(query, key, value, out, normalizer, scratch, options);
  if (next_sums) {
    require(next_total && next_top && p.offsets_q.data == nullptr, "linear_attention: next state");
    const std::int64_t heads = query.size[0] * key.size[1];
    const std::int64_t features = p.projection.data ? p.projection.size[0] : query.size[3];
    const DType wide = compute_type(query.dtype);
    p.next_sums = contiguous(*next_sums, heads * features * value.size[3], wide, query, "linear_attention: next S");
    p.next_total = contiguous(*next_total, heads * features, wide, query, "linear_attention: next z");
    p.next_top = contiguous(*next_top, heads, wide, query, "linear_attention: next top");
  }
  return run(cpu::linear_attention_scratch_bytes(p), scratch, [p] { cpu::linear_attention(p); });
}

std::int64_t linear_attention_backward(const TensorView& grad_out, const TensorView& grad_query,
                                       const TensorView& grad_key, const TensorView& grad_value,
                                       const TensorView& query, const TensorView& key, const TensorView& value,
                                       const TensorView& out, const TensorView& normalizer, const TensorView& scratch,
                                       const py::tuple& options) {
  const LinearAttentionBackwardParams p{linear_attention_params(query, key, value, out, normalizer, scratch, options),
                                        grad_out, grad_query, grad_key, grad_value};
  require(p.forward.top.data == nullptr, "linear_attention_backward: state");
  for (const auto& [grad, of] : {std::pair(&grad_out, &out), std::pair(&grad_query, &query), std::pair(&grad_key, &key),
                                 std::pair(&grad_value, &value)})
    require(grad->device < 0 && grad->dtype == query.dtype && grad->ndim == 4 &&
                std::equal(of->size, of->size + 4, grad->size) && unit_stride(*grad),
            "linear_attention_backward: gradients");
  return run(cpu::linear_attention_backward_scratch_bytes(p.forward), scratch,
             [p] { cpu::linear_attention_backward(p); });
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
  const AttentionOptions options(blocks[8].cast<double>(), blocks[9].cast<bool>());
  SparseAttentionParams p{attention_params(query, key, value, out, lse, scratch, options)};
  require(key.dtype == query.dtype, "sparse_attention: dtypes");
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
  return run(cpu::sparse_attention_scratch_bytes(p, threads()), scratch,
             [p, n = threads()] { cpu::sparse_attention(p, n); });
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
  return run(cpu::sparse_attention_backward_scratch_bytes(p.forward, threads()), scratch,
             [p] { cpu::sparse_attention_backward(p); });
}

}  // namespace

void define_attention(py::module_& m) {
  m.def("attention", &attention);
  m.def("attention_plain", &attention_plain);
  m.def("attention_backward", &attention_backward);
  m.def("linear_attention", &linear_attention);
  m.def("linear_attention_backward", &linear_attention_backward);
  m.def("sparse_attention", &sparse_attention);
  m.def("sparse_attention_backward", &sparse_attention_backward);
}

}  // namespace qvl
