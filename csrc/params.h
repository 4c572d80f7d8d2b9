// What each operation is called with. A view whose data is null stands for an argument that was None.
#pragma once

#include "tensor_view.h"

namespace qvl {

// h = x + residual; y = h rstd w, rstd = 1 / sqrt(mean(h^2) + eps). All (..., C) but weight (C) and rstd (...).
struct RmsNormParams {
  TensorView x, residual, weight, y, hidden, rstd;
  double eps;
};

// grad_x = rstd (g - h rstd^2 mean(g h)) + grad_hidden with g = grad_y w; grad_weight = sum over rows of grad_y h rstd.
// partial (chunks, C) is scratch in the compute type: one sum of weight gradients per chunk of rows.
struct RmsNormBackwardParams {
  TensorView grad_y, grad_hidden, hidden, weight, rstd, grad_x, grad_weight, partial;
};

// out = softmax(scale q k^T + mask) v. query (B, Hq, Lq, D), key (B, Hkv, Lk, D), value (B, Hkv, Lk, Dv), out (B, Hq,
// Lq, Dv), last strides 1. int8 keys and values come with key_scale and value_scale (B, Hkv, Lk) in the compute type.
// mask (B, Hq, Lq, Lk), any strides, bool or the compute type; key_lengths (B) int64; lse (B, Hq, Lq) in the compute
// type, the log of the sum of exponentials. A window side is negative where it is open. Packed segments: B = 1, and
// offsets_q, offsets_k (S + 1) int64 say where each segment starts.
struct AttentionParams {
  TensorView query, key, value, key_scale, value_scale, mask, key_lengths, offsets_q, offsets_k, out, lse, scratch;
  double scale;
  bool causal;
  std::int64_t left, right;
  bool rounded;  // all that is multiplied may be rounded, as precision="medium" says
};

// The gradients of a call whose `out` and `lse` are kept. grad_out as out; grad_query, grad_key and grad_value have the
// shapes of query, key and value in the compute type, last strides 1, and come as zeros: sums are added to them.
struct AttentionBackwardParams {
  AttentionParams forward;
  TensorView grad_out, grad_query, grad_key, grad_value;
};

// phi of linear attention: exp(W x' - |x'|^2 / 2) / sqrt(M) with W = projection (M, D), elu(x) + 1, or given: query and
// key are features already.
enum class FeatureKind : std::uint8_t { favor, elu, given };

// out = phi(q) (sum of phi(k) v^T) / phi(q) (sum of phi(k)). query (B, Hq, Lq, D), key (B, Hkv, Lk, D), value (B, Hkv,
// Lk, Dv), out (B, Hq, Lq, Dv), last strides 1; projection in the compute type; key_mask (B, Lk) bool, any strides;
// offsets as in AttentionParams. normalizer (2, B, Hq, Lq): each row's denominator is the first times 2 to the second.
// State before and after, in the compute type, contiguous: 2^top sums (B, Hkv, M, Dv), 2^top total (B, Hkv, M), top (B,
// Hkv).
struct LinearAttentionParams {
  TensorView query, key, value, projection, key_mask, offsets_q, offsets_k, out, normalizer;
  TensorView sums, total, top, next_sums, next_total, next_top, scratch;
  FeatureKind kind;
  bool causal;
  std::int64_t threads;
};

// The gradients of a call whose `out` and `normalizer` are kept. grad_out as out; grad_query, grad_key and grad_value
// as query, key and value.
struct LinearAttentionBackwardParams {
  LinearAttentionParams forward;
  TensorView grad_out, grad_query, grad_key, grad_value;
};

enum class Activation : int { none, gelu_tanh, swiglu };

// y = f(x W^T + b) + residual. x (M, K), its last stride 1; weight (N, ...) contiguous, with scale and minimum (N,
// groups) as qvl_kernels/_packing.py describes; bias (N) float32; y (M, N, or N / 2 with swiglu) contiguous, residual
// the same in x's type.
struct PackedLinearParams {
  TensorView x, weight, scale, minimum, bias, residual, y, scratch;
  Activation activation;
  bool rounded;  // both factors may be rounded, as precision="medium" says
};

// Attention over listed blocks of `block` queries and keys. offsets (H or 1, blocks of queries + 1) int32 say where the
// lists of each head and block of queries start in full and partial, key blocks; masks (as partial) is each partial
// block's index in bits (U, block, block / 8) u8. shared: the query heads of a group have the same lists.
struct SparseAttentionParams {
  AttentionParams attention;
  TensorView full_offsets, full, partial_offsets, partial, masks, bits;
  std::int64_t block;
  bool shared;
};

// grad_out, grad_query, grad_key and grad_value as for AttentionBackwardParams, but in the storage type and written.
struct SparseAttentionBackwardParams {
  SparseAttentionParams forward;
  TensorView grad_out, grad_query, grad_key, grad_value;
};

// h = x + residual; y = (h - mean) rstd weight + bias, rstd = 1 / sqrt(mean((h - mean)^2) + eps). All (..., C) but
// weight and bias (C).
struct LayerNormParams {
  TensorView x, residual, weight, bias, y, hidden;
  double eps;
};

// out = n cos + rotate_half(n) sin with n = x, or, given weights (D), x / sqrt(mean(x^2) + eps) weight. query, key and
// their outs (..., D), last strides 1; query_cos, ... are cos and sin in the compute type with query's (key's) shape,
// stride 0 where they are broadcast.
struct RotaryParams {
  TensorView query, key, query_weight, key_weight, query_out, key_out;
  TensorView query_cos, query_sin, key_cos, key_sin;
  double eps;
};

// cache[b, h, starts[b] + l] = x[b, h, l] for x in (key, value): (B, Hkv, L, D or Dv) into (B, Hkv, capacity, D or Dv),
// last strides 1; starts (B) int64, contiguous. int8 caches come with scales (B, Hkv, capacity) float32.
struct AppendKvParams {
  TensorView key, value, key_cache, value_cache, starts, key_scale, value_scale;
};

// y = gate / (1 + exp(-gate)) up, all of one shape, last strides 1.
struct SwigluParams {
  TensorView gate, up, y;
};

// y = x / (1 + exp(-2 sqrt(2 / pi) (x + 0.044715 x^3))), both of one shape, last strides 1.
struct GeluTanhParams {
  TensorView x, y;
};

namespace cpu {
// What scratch (u8) has to hold at least, for so many threads.
std::int64_t attention_scratch_bytes(const AttentionParams& p, std::int64_t threads);
std::int64_t attention_backward_scratch_bytes(const AttentionParams& p, std::int64_t threads);
void attention(const AttentionParams& p);
void attention_backward(const AttentionBackwardParams& p);
std::int64_t linear_attention_scratch_bytes(const LinearAttentionParams& p);
std::int64_t linear_attention_backward_scratch_bytes(const LinearAttentionParams& p);
void linear_attention(const LinearAttentionParams& p);
void linear_attention_backward(const LinearAttentionBackwardParams& p);
std::int64_t packed_linear_scratch_bytes(const PackedLinearParams& p, std::int64_t threads);
void packed_linear(const PackedLinearParams& p, std::int64_t threads);
// y = x W: x (M, N), y (M, K), nothing else.
std::int64_t packed_linear_backward_scratch_bytes(const PackedLinearParams& p, std::int64_t threads);
void packed_linear_backward(const PackedLinearParams& p, std::int64_t threads);
std::int64_t sparse_attention_scratch_bytes(const SparseAttentionParams& p, std::int64_t threads);
std::int64_t sparse_attention_backward_scratch_bytes(const SparseAttentionParams& p, std::int64_t threads);
void sparse_attention(const SparseAttentionParams& p, std::int64_t threads);
void sparse_attention_backward(const SparseAttentionBackwardParams& p);
double fma_loop(std::int64_t steps, std::int64_t threads, float* sink);
double int8_loop(std::int64_t steps, std::int64_t threads, float* sink);
double bf16_loop(std::int64_t steps, std::int64_t threads, float* sink);
void read_loop(const float* data, std::int64_t n, std::int64_t threads, float* sink);
void rms_norm(const RmsNormParams& p);
void rms_norm_backward(const RmsNormBackwardParams& p);
void layer_norm(const LayerNormParams& p);
void rotary(const RotaryParams& p);
void norm_rotary(const RotaryParams& p);
void append_kv(const AppendKvParams& p);
void swiglu(const SwigluParams& p);
void gelu_tanh(const GeluTanhParams& p);
}  // namespace cpu

}  // namespace qvl
