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

enum class Activation : int { none, gelu_tanh, swiglu };

// y = f(x W^T + b) + residual. x (M, K), its last stride 1; weight (N, ...) contiguous, with scale and minimum (N,
// groups) as qvl_kernels/_packing.py describes; bias (N) float32; y (M, N, or N / 2 with swiglu) contiguous, residual
// the same in x's type.
struct PackedLinearParams {
  TensorView x, weight, scale, minimum, bias, residual, y, scratch;
  Activation activation;
};

namespace cpu {
// What scratch (u8) has to hold at least, for so many threads.
std::int64_t attention_scratch_bytes(const AttentionParams& p, std::int64_t threads);
std::int64_t attention_backward_scratch_bytes(const AttentionParams& p, std::int64_t threads);
void attention(const AttentionParams& p);
void attention_backward(const AttentionBackwardParams& p);
std::int64_t packed_linear_scratch_bytes(const PackedLinearParams& p, std::int64_t threads);
void packed_linear(const PackedLinearParams& p, std::int64_t threads);
// y = x W: x (M, N), y (M, K), nothing else.
std::int64_t packed_linear_backward_scratch_bytes(const PackedLinearParams& p, std::int64_t threads);
void packed_linear_backward(const PackedLinearParams& p, std::int64_t threads);
double fma_loop(std::int64_t steps, std::int64_t threads, float* sink);
double int8_loop(std::int64_t steps, std::int64_t threads, float* sink);
void read_loop(const float* data, std::int64_t n, std::int64_t threads, float* sink);
void rms_norm(const RmsNormParams& p);
void rms_norm_backward(const RmsNormBackwardParams& p);
}  // namespace cpu

}  // namespace qvl
