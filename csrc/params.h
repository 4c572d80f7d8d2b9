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
};

// The gradients of a call whose `out` and `lse` are kept. grad_out as out; grad_query, grad_key and grad_value have the
// shapes of query, key and value in the compute type, last strides 1, and come as zeros: sums are added to them.
struct AttentionBackwardParams {
  AttentionParams forward;
  TensorView grad_out, grad_query, grad_key, grad_value;
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

namespace cpu {
// What scratch (u8) has to hold at least, for so many threads.
std::int64_t attention_scratch_bytes(const AttentionParams& p, std::int64_t threads);
std::int64_t attention_backward_scratch_bytes(const AttentionParams& p, std::int64_t threads);
void attention(const AttentionParams& p);
void attention_backward(const AttentionBackwardParams& p);
std::int64_t sparse_attention_scratch_bytes(const SparseAttentionParams& p, std::int64_t threads);
std::int64_t sparse_attention_backward_scratch_bytes(const SparseAttentionParams& p, std::int64_t threads);
void sparse_attention(const SparseAttentionParams& p);
void sparse_attention_backward(const SparseAttentionBackwardParams& p);
double fma_loop(std::int64_t steps, std::int64_t threads, float* sink);
void read_loop(const float* data, std::int64_t n, std::int64_t threads, float* sink);
void rms_norm(const RmsNormParams& p);
void rms_norm_backward(const RmsNormBackwardParams& p);
}  // namespace cpu

}  // namespace qvl
