// y = x W^T for few rows of x: every weight is read once, and reading is all that may cost.
//
// Regime: M = 1 to kMostRows, 2 M FLOPs for each weight of 4, 2, 1.02 or 0.63 bytes. A thread takes a contiguous range
// of outputs, so it streams one contiguous piece of the weights, and asks for lines a few KiB ahead across rows. x
// stays in L1 as float32 or, for quantised weights, as int16 with a step for each 128 (M K 2 bytes).
//
//   fp32, bf16   W in vectors along K, widened in registers, times kTile rows of x: kRows x kTile sums
//   int8         16 weights widened to int16, `vpmaddwd` with x, added up over a block of 128 in int32
//                (128 / 16 times 2 * 127 * 32767 is below 2^31), then scaled into float sums
//   int4         the four int16 vectors of 64 weights come from masks and shifts, without a shuffle, since x was put in
//                their order (even, then odd of each 32) when it was rounded; the minimum times the sum of a group of x
//                is a product over groups
//
// 16-bit activations cost no more than 8-bit ones here and lose almost nothing (2^-16 of a block's largest). More rows
// than kTile pass a row of weights again while it is in L1.

#include "linear.h"
#include "parallel.h"

namespace qvl::cpu {
namespace {

constexpr std::int64_t kMostRows = 16;
constexpr std::int64_t kChunk = 32;  // outputs whose sums are finished together
constexpr int kTile = 4;
constexpr std::int64_t kAhead = 4096;  // bytes of prefetch: what memory delivers in its latency, and a page

constexpr float kLimit = 32767.0f;

// Where things lie in scratch, in floats. `groups` are those of the weight's scales.
struct Layout {
  std::int64_t width, groups;
  std::int64_t x, step, sum, scaled, size;

  Layout(const PackedLinearParams& p, std::int64_t threads) {
    const std::int64_t rows = p.x.size[0], k = p.x.size[1];
    Pieces pieces;
    width = round_up(k, kBlock), groups = is_quantized(p) ? p.scale.size[1] : 0;
    x = pieces.take(rows * width);
    step = pieces.take(rows * groups);
    sum = pieces.take(rows * groups);
    scaled = pieces.take(round_up(kTile * groups, 16) * threads);
    size = pieces.size();
  }
};

// R rows of weights times M rows of x: to[m * kChunk + r].
template <class W, int M, int R>
void dot_floats(const W* w, std::int64_t k, const float* x, std::int64_t x_row, float* to) {
  using V = Vec<float>;
  constexpr std::int64_t kLine = 64 / sizeof(W);
  V acc[R * M];
  clear(acc);
  std::int64_t i = 0;
  for (; i + kLine <= k; i += kLine) {
    for (int r = 0; r < R; ++r) prefetch(reinterpret_cast<const char*>(w + r * k + i) + kAhead * R, 1);
#pragma GCC unroll 4
    for (int part = 0; part < kLine; part += V::N) {
      V b[M];
#pragma GCC unroll 4
      for (int m = 0; m < M; ++m) b[m] = load(x + m * x_row + i + part);
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) {
        const V a = load(w + r * k + i + part);
#pragma GCC unroll 4
        for (int m = 0; m < M; ++m) acc[r * M + m] = fma(a, b[m], acc[r * M + m]);
      }
    }
  }
  for (; i < k; i += V::N)
    for (int r = 0; r < R; ++r) {
      const V a = load_up_to(w + r * k + i, k - i);
      for (int m = 0; m < M; ++m) acc[r * M + m] = fma(a, load(x + m * x_row + i), acc[r * M + m]);
    }
  for (int r = 0; r < R; ++r)
    for (int m = 0; m < M; ++m) to[m * kChunk + r] = sum(acc[r * M + m]);
}

template <class W, int M>
void floats(const PackedLinearParams& p, const Layout& at, std::int64_t first, std::int64_t count, std::int64_t row,
            float* sums) {
  constexpr int kRows = M <= 2 ? 4 : 2;
  const std::int64_t k = p.x.size[1];
  const W* const w = p.weight.as<W>();
  const float* const x = p.scratch.as<float>() + at.x + row * at.width;
  std::int64_t r = 0;
  for (; r + kRows <= count; r += kRows)
    dot_floats<W, M, kRows>(w + (first + r) * k, k, x, at.width, sums + row * kChunk + r);
  for (; r < count; ++r) dot_floats<W, M, 1>(w + (first + r) * k, k, x, at.width, sums + row * kChunk + r);
}

// The scales of one row of weights times the steps of M rows of x, and with minima their product with x's sums.
template <int M>
void scale_groups(const PackedLinearParams& p, const Layout& at, std::int64_t n, std::int64_t row, float* scaled,
                  float (&y)[M]) {
  const bf16* const scale = p.scale.as<bf16>() + n * at.groups;
  const bf16* const minimum = p.minimum.as<bf16>() + n * at.groups;
  const float* const memory = p.scratch.as<float>();
  const bool shifted = p.minimum.data != nullptr;
  for (int m = 0; m < M; ++m) {
    const float *step = memory + at.step + (row + m) * at.groups, *total = memory + at.sum + (row + m) * at.groups;
    float* const to = scaled + m * at.groups;
    Float8 shift = Float8::zero();
    float rest = 0.0f;
    std::int64_t g = 0;
    for (; g + 8 <= at.groups; g += 8) {
      store8(to + g, load8(scale + g) * load8(step + g));
      if (shifted) shift = fma(load8(minimum + g), load8(total + g), shift);
    }
    for (; g < at.groups; ++g) {
      to[g] = bf16_at(p.scale, n * at.groups + g) * step[g];
      if (shifted) rest += bf16_at(p.minimum, n * at.groups + g) * total[g];
    }
    y[m] = sum(shift) + rest;
  }
}

template <int M>
void dot_int8(const std::int8_t* w, std::int64_t width, const std::int16_t* x, const float* scaled, float (&y)[M]) {
  const std::int64_t blocks = width / kBlock;
  Float8 acc[M];
  for (auto& a : acc) a = Float8::zero();
  for (std::int64_t b = 0; b < blocks; ++b) {
    prefetch(w + b * kBlock + kAhead, kBlock);
    Int32x8 total[M];
    for (auto& t : total) t = Int32x8::zero();
#pragma GCC unroll 8
    for (int i = 0; i < kBlock; i += 16) {
      const Int16x16 a = widen_to_16(w + b * kBlock + i);
#pragma GCC unroll 4
      for (int m = 0; m < M; ++m) total[m] = total[m] + dot_pairs(a, load16(x + m * width + b * kBlock + i));
    }
#pragma GCC unroll 4
    for (int m = 0; m < M; ++m) acc[m] = add_scaled(total[m], scaled + m * blocks + b, acc[m]);
  }
  for (int m = 0; m < M; ++m) y[m] += sum(acc[m]);
}

template <int M>
void dot_int4(const std::uint8_t* w, std::int64_t width, const std::int16_t* x, const float* scaled, float (&y)[M]) {
  const std::int64_t groups = width / 32;
  Float8 acc[M], more[M];  // two sums: one would wait for the latency of its own additions
#pragma GCC unroll 4
  for (int m = 0; m < M; ++m) acc[m] = more[m] = Float8::zero();
  for (std::int64_t g = 0; g < groups; g += 4) {
    prefetch(w + g * 16 + kAhead, 1);
#pragma GCC unroll 2
    for (int part = 0; part < 4; part += 2) {
      const Nibbles a = nibbles(w + (g + part) * 16);
#pragma GCC unroll 4
      for (int m = 0; m < M; ++m) {
        const std::int16_t* const q = x + m * width + (g + part) * 32;
        const float* const by = scaled + m * groups + g + part;
        acc[m] = add_scaled(dot_pairs(a.even_low, load16(q)) + dot_pairs(a.odd_low, load16(q + 16)), by, acc[m]);
        more[m] =
            add_scaled(dot_pairs(a.even_high, load16(q + 32)) + dot_pairs(a.odd_high, load16(q + 48)), by + 1, more[m]);
      }
    }
  }
  for (int m = 0; m < M; ++m) y[m] += sum(acc[m]) + sum(more[m]);
}

template <int M>
void integers(const PackedLinearParams& p, const Layout& at, std::int64_t first, std::int64_t count, std::int64_t row,
              float* scaled, float* sums) {
  const std::int16_t* const x = reinterpret_cast<const std::int16_t*>(p.scratch.as<float>() + at.x) + row * at.width;
  for (std::int64_t r = 0; r < count; ++r) {
    const std::int64_t n = first + r;
    float y[M];
    scale_groups<M>(p, at, n, row, scaled, y);
    if (p.minimum.data == nullptr)
      dot_int8<M>(p.weight.as<std::int8_t>() + n * at.width, at.width, x, scaled, y);
    else
      dot_int4<M>(p.weight.as<std::uint8_t>() + n * at.width / 2, at.width, x, scaled, y);
    for (int m = 0; m < M; ++m) sums[(row + m) * kChunk + r] = y[m];
  }
}

// sums[m * kChunk + i] = x[m] . W[first + i]
void chunk(const PackedLinearParams& p, const Layout& at, std::int64_t first, std::int64_t count, float* scaled,
           float* sums) {
  const std::int64_t rows = p.x.size[0];
  const auto with_rows = [&](auto m, std::int64_t row) {
    constexpr int M = decltype(m)::value;
    if (is_quantized(p))
      integers<M>(p, at, first, count, row, scaled, sums);
    else if (p.weight.dtype == DType::bf16)
      floats<bf16, M>(p, at, first, count, row, sums);
    else
      floats<float, M>(p, at, first, count, row, sums);
  };
  std::int64_t row = 0;
  for (; row + 4 <= rows; row += 4) with_rows(std::integral_constant<int, 4>{}, row);
  if (rows - row == 3) with_rows(std::integral_constant<int, 3>{}, row);
  if (rows - row == 2) with_rows(std::integral_constant<int, 2>{}, row);
  if (rows - row == 1) with_rows(std::integral_constant<int, 1>{}, row);
}

// x as the dot products read it.
template <class T>
void load_x(const PackedLinearParams& p, const Layout& at, std::int64_t row) {
  const std::int64_t k = p.x.size[1];
  float* const memory = p.scratch.as<float>();
  const T* const from = p.x.as<T>() + row * p.x.stride[0];
  if (!is_quantized(p)) return widen(from, k, at.width, memory + at.x + row * at.width);
  std::int16_t* const to = reinterpret_cast<std::int16_t*>(memory + at.x) + row * at.width;
  const std::int64_t per_block = kBlock / (at.width / at.groups);  // groups
  for (std::int64_t b = 0; b < at.width; b += kBlock) {
    float wide[kBlock];
    std::int16_t q[kBlock];
    const std::int64_t n = std::min<std::int64_t>(kBlock, k - b);
    widen(from + b, n, kBlock, wide);
    const float step = quantize_block(wide, kLimit, q);
    std::fill_n(memory + at.step + row * at.groups + b / kBlock * per_block, per_block, step);
    if (per_block == 1) {
      std::copy_n(q, kBlock, to + b);
      continue;
    }
    for (int g = 0; g < kBlock; g += 32) {
      std::int64_t total = 0;
      for (int i = 0; i < 16; ++i) {
        to[b + g + i] = q[g + 2 * i];
        to[b + g + 16 + i] = q[g + 2 * i + 1];
        total += q[g + 2 * i] + q[g + 2 * i + 1];
      }
      memory[at.sum + row * at.groups + (b + g) / 32] = step * static_cast<float>(total);
    }
  }
}

template <class T>
void run(const PackedLinearParams& p, std::int64_t threads) {
  const Layout at(p, threads);
  const std::int64_t rows = p.x.size[0], outputs = p.y.size[1], chunks = (outputs + kChunk - 1) / kChunk;
  for (std::int64_t row = 0; row < rows; ++row) load_x<T>(p, at, row);
  const std::int64_t workers = std::min(threads, chunks);
  parallel_for(workers, outputs * at.width * rows, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t worker = begin; worker < end; ++worker) {
      float* const scaled = p.scratch.as<float>() + at.scaled + worker * round_up(kTile * at.groups, 16);
      for (std::int64_t c = chunks * worker / workers; c < chunks * (worker + 1) / workers; ++c) {
        float sums[kMostRows * kChunk], up[kMostRows * kChunk];
        const std::int64_t first = c * kChunk, count = std::min(kChunk, outputs - first);
        chunk(p, at, first, count, scaled, sums);
        if (p.activation == Activation::swiglu) chunk(p, at, outputs + first, count, scaled, up);
        for (std::int64_t m = 0; m < rows; ++m) finish<T>(p, m, first, count, sums + m * kChunk, up + m * kChunk);
      }
    }
  });
}

}  // namespace

bool is_linear_decode(const PackedLinearParams& p) { return p.x.size[0] <= kMostRows; }

std::int64_t linear_decode_scratch_bytes(const PackedLinearParams& p, std::int64_t threads) {
  return Layout(p, threads).size * static_cast<std::int64_t>(sizeof(float));
}

void linear_decode(const PackedLinearParams& p, std::int64_t threads) {
  with_x_type(p.x.dtype, [&](auto t) { run<decltype(t)>(p, threads); });
}

}  // namespace qvl::cpu
