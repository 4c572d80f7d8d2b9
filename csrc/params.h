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
double fma_loop(std::int64_t steps, std::int64_t threads, float* sink);
void read_loop(const float* data, std::int64_t n, std::int64_t threads, float* sink);
void rms_norm(const RmsNormParams& p);
void rms_norm_backward(const RmsNormBackwardParams& p);
void layer_norm(const LayerNormParams& p);
void rotary(const RotaryParams& p);
void norm_rotary(const RotaryParams& p);
void swiglu(const SwigluParams& p);
void gelu_tanh(const GeluTanhParams& p);
}  // namespace cpu

}  // namespace qvl
