// RMSNorm of (rows, C), forward and backward: fp32 and fp16 storage, fp32 arithmetic.
//
// Names end in the storage and in N, the elements of one access: 16 bytes where pointers, strides and C allow it
// (f32x4, f16x8), else one element (f32x1, f16x1). csrc/cuda/rms_norm.cpp chooses.

#include "common.cuh"
#include "rms_norm_sizes.h"
#include "row_layout.h"

namespace qvl::cuda {
namespace {

// One team per row: a warp for C <= 256 (query and key norms: rows are many and short), else a block.
//
// Regime: memory. Bytes per row, for s bytes an element: x in, y out, 2 C s; with a residual 4 C s (x and residual in,
// h and y out). Separate add, mean of squares and scale move 7 C s. Arithmetic is 4 operations an element, far below
// what 12 (MX250: 1.2 TFLOP/s over 48 GB/s = 25 FLOP a byte) would need to matter. Weights are shared by all rows and
// come from L2.
template <class T, int N>
__device__ void rms_norm(const T* x, const T* residual, const T* weight, T* y, T* hidden, float* rstd,
                         const RowLayout& x_rows, const RowLayout& residual_rows, int rows, int channels, float eps) {
  __shared__ TeamSum::Partial partial;
  const int row = blockIdx.x * blockDim.y + threadIdx.y;
  if (row >= rows) return;  // only where a team is one warp: no barrier is missed
  x += x_rows.offset(row);
  y += static_cast<long long>(row) * channels;
  if (residual != nullptr) {
    residual += residual_rows.offset(row);
    hidden += static_cast<long long>(row) * channels;
  }
  constexpr int kItems = kHeld / N;
  const int first = threadIdx.x * N, step = blockDim.x * N;
  float square = 0.0f;

  Floats<N> h[kItems];
#pragma unroll
  for (int i = 0; i < kItems; ++i) h[i] = first + i * step < channels ? load<T, N>(x + first + i * step) : Floats<N>{};
  const auto add_residual = [&](Floats<N>& value, int c) {
    const Floats<N> other = load<T, N>(residual + c);
#pragma unroll
    for (int j = 0; j < N; ++j) value.at[j] = rounded_to<T>(value.at[j] + other.at[j]);
    store(hidden + c, value);
  };
  const auto add_square = [&](const Floats<N>& value) {
#pragma unroll
    for (int j = 0; j < N; ++j) square += value.at[j] * value.at[j];
  };
#pragma unroll
  for (int i = 0; i < kItems; ++i) {
    const int c = first + i * step;
    if (residual != nullptr && c < channels) add_residual(h[i], c);
    add_square(h[i]);
  }
  for (int c = first + kItems * step; c < channels; c += step) {
    Floats<N> value = load<T, N>(x + c);
    if (residual != nullptr) add_residual(value, c);
    add_square(value);
  }

  const float scale = 1.0f / sqrtf(TeamSum(partial)(square) / channels + eps);
  if (rstd != nullptr && threadIdx.x == 0) rstd[row] = scale;
  const auto normalise = [&](const Floats<N>& value, int c) {
    const Floats<N> w = load<T, N>(weight + c);
    Floats<N> out;
#pragma unroll
    for (int j = 0; j < N; ++j) out.at[j] = value.at[j] * scale * w.at[j];
    store(y + c, out);
  };
#pragma unroll
  for (int i = 0; i < kItems; ++i)
    if (first + i * step < channels) normalise(h[i], first + i * step);
  for (int c = first + kItems * step; c < channels; c += step)
    normalise(residual != nullptr ? load<T, N>(hidden + c) : load<T, N>(x + c), c);
}

// One team per chunk of consecutive rows. It writes their grad_x and, to its row of partial (chunks, C), their share of
// the weight's gradient. A thread owns the same channels in every row, so that share is summed in registers, row after
// row: no atomics, and the same bits in every run.
//
// Regime: memory. Bytes per row: grad_y and h in, grad_x out, 3 C s (4 C s with grad_hidden); a kernel of its own for
// the weight would read grad_y and h again, 5 C s. partial adds 8 C bytes a chunk, written here and read below.
template <class T, int N>
__device__ void rms_norm_backward(const T* grad_y, const T* grad_hidden, const T* hidden, const T* weight,
                                  const float* rstd, T* grad_x, float* partial, const RowLayout& grad_y_rows,
                                  const RowLayout& grad_hidden_rows, const RowLayout& hidden_rows, int rows,
                                  int channels, int chunks, int rows_per_chunk) {
  __shared__ TeamSum::Partial scratch;
  TeamSum team_sum(scratch);
  const int chunk = blockIdx.x * blockDim.y + threadIdx.y;
  if (chunk >= chunks) return;
  partial += static_cast<long long>(chunk) * channels;
  constexpr int kItems = kHeld / N;
  const int first = threadIdx.x * N, step = blockDim.x * N, rest = first + kItems * step;

  Floats<N> w[kItems], weight_sum[kItems] = {};
#pragma unroll
  for (int i = 0; i < kItems; ++i)
    w[i] = first + i * step < channels ? load<T, N>(weight + first + i * step) : Floats<N>{};
  for (int c = rest; c < channels; c += step) store(partial + c, Floats<N>{});

  const int end = min(rows, (chunk + 1) * rows_per_chunk);
  for (int row = chunk * rows_per_chunk; row < end; ++row) {
    const T* g_row = grad_y + grad_y_rows.offset(row);
    const T* h_row = hidden + hidden_rows.offset(row);
    const T* grad_hidden_row = grad_hidden != nullptr ? grad_hidden + grad_hidden_rows.offset(row) : nullptr;
    T* grad_x_row = grad_x + static_cast<long long>(row) * channels;
    const float scale = rstd[row];
    float dot = 0.0f;

    Floats<N> g[kItems], normed[kItems];
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      const int c = first + i * step;
      g[i] = c < channels ? load<T, N>(g_row + c) : Floats<N>{};
      normed[i] = c < channels ? load<T, N>(h_row + c) : Floats<N>{};
    }
    // Adds the row's share to sum and to the dot product; h becomes h rstd.
    const auto accumulate = [&](const Floats<N>& g, Floats<N>& h, const Floats<N>& w, Floats<N>& sum) {
#pragma unroll
      for (int j = 0; j < N; ++j) {
        h.at[j] *= scale;
        const float product = g.at[j] * h.at[j];
        sum.at[j] += product;
        dot += product * w.at[j];
      }
    };
#pragma unroll
    for (int i = 0; i < kItems; ++i) accumulate(g[i], normed[i], w[i], weight_sum[i]);
    for (int c = rest; c < channels; c += step) {
      Floats<N> h = load<T, N>(h_row + c), sum = load<float, N>(partial + c);
      accumulate(load<T, N>(g_row + c), h, load<T, N>(weight + c), sum);
      store(partial + c, sum);
    }

    const float mean = team_sum(dot) / channels;
    const auto finish = [&](const Floats<N>& g, const Floats<N>& normed, const Floats<N>& w, int c) {
      Floats<N> out;
#pragma unroll
      for (int j = 0; j < N; ++j) out.at[j] = scale * (g.at[j] * w.at[j] - normed.at[j] * mean);
      if (grad_hidden_row != nullptr) {
        const Floats<N> other = load<T, N>(grad_hidden_row + c);
#pragma unroll
        for (int j = 0; j < N; ++j) out.at[j] += other.at[j];
      }
      store(grad_x_row + c, out);
    };
#pragma unroll
    for (int i = 0; i < kItems; ++i)
      if (first + i * step < channels) finish(g[i], normed[i], w[i], first + i * step);
    for (int c = rest; c < channels; c += step) {
      Floats<N> h = load<T, N>(h_row + c);
#pragma unroll
      for (int j = 0; j < N; ++j) h.at[j] *= scale;
      finish(load<T, N>(g_row + c), h, load<T, N>(weight + c), c);
    }
  }
#pragma unroll
  for (int i = 0; i < kItems; ++i)
    if (first + i * step < channels) store(partial + first + i * step, weight_sum[i]);
}

// grad_weight[c] = sum over chunks of partial[chunk][c]: the second step of the sum over rows.
//
// A block takes 32 channels, 128 contiguous bytes of each chunk, and splits the chunks over its warps. 4 C bytes a
// chunk are read once, mostly from L2, where the first step has just put them.
template <class T>
__device__ void sum_chunks(const float* partial, T* grad_weight, int channels, int chunks) {
  __shared__ float sums[kSumWarps][32];
  const int c = blockIdx.x * 32 + threadIdx.x;
  float sum = 0.0f;
  if (c < channels)
    for (int chunk = threadIdx.y; chunk < chunks; chunk += blockDim.y)
      sum += partial[static_cast<long long>(chunk) * channels + c];
  sums[threadIdx.y][threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.y != 0 || c >= channels) return;
  for (int i = 1; i < blockDim.y; ++i) sum += sums[i][threadIdx.x];
  grad_weight[c] = static_cast<T>(sum);
}

}  // namespace

// __restrict__ on the kernel's own parameters is what lets loads be hoisted above stores, and go through the read-only
// cache (ld.global.nc).
#define QVL_RMS_NORM(SUFFIX, T, N)                                                                                     \
  extern "C" __global__ void __launch_bounds__(kMaxThreads)                                                            \
      rms_norm_##SUFFIX(const T* __restrict__ x, const T* __restrict__ residual, const T* __restrict__ weight,         \
                        T* __restrict__ y, T* __restrict__ hidden, float* __restrict__ rstd, const RowLayout x_rows,   \
                        const RowLayout residual_rows, int rows, int channels, float eps) {                            \
    rms_norm<T, N>(x, residual, weight, y, hidden, rstd, x_rows, residual_rows, rows, channels, eps);                  \
  }                                                                                                                    \
  extern "C" __global__ void __launch_bounds__(kMaxThreads, 1) rms_norm_backward_##SUFFIX(                             \
      const T* __restrict__ grad_y, const T* __restrict__ grad_hidden, const T* __restrict__ hidden,                   \
      const T* __restrict__ weight, const float* __restrict__ rstd, T* __restrict__ grad_x,                            \
      float* __restrict__ partial, const RowLayout grad_y_rows, const RowLayout grad_hidden_rows,                      \
      const RowLayout hidden_rows, int rows, int channels, int chunks, int rows_per_chunk) {                           \
    rms_norm_backward<T, N>(grad_y, grad_hidden, hidden, weight, rstd, grad_x, partial, grad_y_rows, grad_hidden_rows, \
                            hidden_rows, rows, channels, chunks, rows_per_chunk);                                      \
  }
QVL_RMS_NORM(f32x4, float, 4)
QVL_RMS_NORM(f32x1, float, 1)
QVL_RMS_NORM(f16x8, __half, 8)
QVL_RMS_NORM(f16x1, __half, 1)

#define QVL_SUM_CHUNKS(SUFFIX, T)                                                                 \
  extern "C" __global__ void __launch_bounds__(kSumWarps * 32) rms_norm_backward_sum_##SUFFIX(    \
      const float* __restrict__ partial, T* __restrict__ grad_weight, int channels, int chunks) { \
    sum_chunks(partial, grad_weight, channels, chunks);                                           \
  }
QVL_SUM_CHUNKS(f32, float)
QVL_SUM_CHUNKS(f16, __half)

}  // namespace qvl::cuda
