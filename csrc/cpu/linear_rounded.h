// Products of linear.cpp with x rounded to the width of the weights, for CPUs whose instructions for narrow numbers do
// more of them. AVX-512 only; the caller asks for them (`PackedLinearParams::rounded`).
//
//   Halves   bfloat16 weights as they are, x rounded to bfloat16: `vdpbf16ps`, 32 products an instruction, twice what
//            an FMA does where both take the same time (AMD; on Intel it takes twice as long and nothing is gained).
//            x in bfloat16 loses nothing
//   Bytes    int8 weights as they are, x as 8 bits with a step for each 128: `vpdpbusd`, 64 products an instruction.
//            int4 weights are rounded again, to 8 bits with a scale for 128 of a row: 1 / 254 of the largest, a tenth
//            of what int4 has lost. One factor has to be unsigned: x + 128, and the sums start at -128 times the sum
//            of the panel's weights
//
// Registers: the instructions take 5 to 6 cycles, two a cycle, so 6 rows x 4 vectors of sums, 24 of 32 registers; 4
// loads and 6 broadcasts feed 24 of them. The panel is as wide: 64 outputs, 32 KiB.
#pragma once

#include "linear.h"

#if defined(__AVX512F__)

namespace qvl::cpu {

constexpr int kWideVectors = 4;
constexpr int kWideWidth = kWideVectors * IntVec::N;

// acc[r][v] = step(acc[r][v], panel vector v, strip row r) over `count` words of 32 bits.
template <class Acc, class Step>
[[gnu::always_inline]] inline void multiply_words(const float* strip, const float* panel, std::int64_t count,
                                                  Acc (&acc)[kStrip][kWideVectors], const Step& step) {
  for (std::int64_t i = 0; i < count; ++i, strip += kStrip, panel += kWideWidth) {
    const IntVec w[kWideVectors] = {load_pairs(panel), load_pairs(panel + IntVec::N), load_pairs(panel + 2 * IntVec::N),
                                    load_pairs(panel + 3 * IntVec::N)};
#pragma GCC unroll 6
    for (int r = 0; r < kStrip; ++r) {
      const IntVec x = repeat_pair(strip + r);
#pragma GCC unroll 4
      for (int v = 0; v < kWideVectors; ++v) acc[r][v] = step(acc[r][v], w[v], x);
    }
  }
}

// `count` words of eight rows, transposed to place j of a panel or a strip; `to` has room for eight a word.
inline void transpose_words(const float (*rows)[128], std::int64_t count, float* to, std::int64_t stride) {
  for (std::int64_t i = 0; i < count; i += 8) {
    const float* from[8];
    for (int j = 0; j < 8; ++j) from[j] = rows[j] + i;
    transpose8x8(from, to + i * stride, stride);
  }
}

// Products of bfloat16. A float stands for a pair of them.
struct Halves {
  static constexpr std::int64_t kDepth = 256;
  static constexpr int kWidth = kWideWidth;
  static constexpr std::int64_t kPanelFloats = kDepth / 2 * kWidth;
  static std::int64_t strip_floats(std::int64_t depth) { return round_up(depth, 16) / 2 * kStrip + kStripSlack; }

  // n numbers, and zeros up to a whole transposition.
  template <class T>
  static void fill_row(const T* from, std::int64_t n, float* row) {
    bf16* const to = reinterpret_cast<bf16*>(row);
    if constexpr (std::is_same_v<T, bf16>) {
      std::copy_n(from, n, to);
      std::fill(to + n, to + round_up(n, 16), bf16{0});
    } else {
      for (std::int64_t i = 0; i < n; i += Vec<float>::N) store(to + i, load_up_to(from + i, n - i));
    }
  }
  template <class T>
  static void fill_strip(const PackedLinearParams& p, std::int64_t first, std::int64_t depth, float* strip) {
    float rows[8][kDepth / 2] = {};
    for (std::int64_t k = 0; k < depth; k += kDepth) {
      const std::int64_t n = std::min(kDepth, depth - k);
      for (int r = 0; r < kStrip; ++r) {
        const std::int64_t row = std::min(first + r, p.x.size[0] - 1);
        fill_row(p.x.as<T>() + row * p.x.stride[0] + k, n, rows[r]);
      }
      transpose_words(rows, round_up(n, 16) / 2, strip + k / 2 * kStrip, kStrip);
    }
  }
  static void fill_panel(const PackedLinearParams& p, std::int64_t first, std::int64_t outputs, std::int64_t k,
                         std::int64_t depth, float* panel) {
    float rows[8][kDepth / 2];
    for (int j = 0; j < kWidth; j += 8) {
      for (int i = 0; i < 8; ++i)
        fill_row(
            p.weight.as<bf16>() + std::min<std::int64_t>(first + j + i, first + outputs - 1) * p.weight.size[1] + k,
            depth, rows[i]);
      transpose_words(rows, round_up(depth, 16) / 2, panel + j, kWidth);
    }
  }
  [[gnu::noinline]] static void add(const float* strip, std::int64_t, const float* panel, std::int64_t k,
                                    std::int64_t depth, float* sums) {
    using V = Vec<float>;
    V acc[kStrip][kWideVectors];
#pragma GCC unroll 6
    for (int r = 0; r < kStrip; ++r)
#pragma GCC unroll 4
      for (int v = 0; v < kWideVectors; ++v) acc[r][v] = load(sums + r * kOutputs + v * V::N);
    multiply_words(strip + k / 2 * kStrip, panel, (depth + 1) / 2, acc,
                   [](V a, IntVec w, IntVec x) __attribute__((always_inline)) { return add_dot_halves(a, w, x); });
#pragma GCC unroll 6
    for (int r = 0; r < kStrip; ++r)
#pragma GCC unroll 4
      for (int v = 0; v < kWideVectors; ++v) store(sums + r * kOutputs + v * V::N, acc[r][v]);
  }
};

// Products of bytes. A float stands for four of them.
struct Bytes {
  static constexpr std::int64_t kDepth = 512;
  static constexpr int kWidth = kWideWidth;
  static constexpr std::int64_t kWords = kBlock / 4;
  static constexpr std::int64_t kPanelFloats = (kDepth / 4 + 2 * kDepth / kBlock) * kWidth;
  static constexpr float kMost = 127.0f;
  static std::int64_t strip_floats(std::int64_t depth) {
    return (depth / 4 + depth / kBlock) * kStrip + 2 * kStripSlack;
  }
  static std::int64_t steps_at(std::int64_t depth) { return depth / 4 * kStrip + kStripSlack; }

  template <class T>
  static void fill_strip(const PackedLinearParams& p, std::int64_t first, std::int64_t depth, float* strip) {
    float words[8][kBlock] = {}, wide[kBlock];
    std::int16_t integers[kBlock];
    for (std::int64_t k = 0; k < depth; k += kBlock) {
      for (int r = 0; r < kStrip; ++r) {
        const std::int64_t row = std::min(first + r, p.x.size[0] - 1);
        const std::int64_t n = std::min<std::int64_t>(kBlock, p.x.size[1] - k);
        widen(p.x.as<T>() + row * p.x.stride[0] + k, n, kBlock, wide);
        strip[steps_at(depth) + k / kBlock * kStrip + r] = quantize_block(wide, kMost, integers);
        std::uint8_t* const to = reinterpret_cast<std::uint8_t*>(words[r]);
        for (int i = 0; i < kBlock; ++i) to[i] = static_cast<std::uint8_t>(integers[i] + 128);
      }
      transpose_words(words, kWords, strip + k / 4 * kStrip, kStrip);
    }
  }
  // 128 weights of one row; returns their scale.
  static float fill_row(const PackedLinearParams& p, std::int64_t n, std::int64_t k, float* words) {
    std::int8_t* const to = reinterpret_cast<std::int8_t*>(words);
    if (p.weight.dtype == DType::i8) {
      std::copy_n(p.weight.as<std::int8_t>() + n * p.weight.size[1] + k, kBlock, to);
      return bf16_at(p.scale, n * p.scale.size[1] + k / kBlock);
    }
    float wide[kBlock];
    std::int16_t integers[kBlock];
    decode(p, n, k, kBlock, kBlock, wide);
    const float scale = quantize_block(wide, kMost, integers);
    for (int i = 0; i < kBlock; ++i) to[i] = static_cast<std::int8_t>(integers[i]);
    return scale;
  }
  static float* scales_of(float* panel, std::int64_t block) { return panel + (kDepth / 4 + 2 * block) * kWidth; }
  static void fill_panel(const PackedLinearParams& p, std::int64_t first, std::int64_t outputs, std::int64_t k,
                         std::int64_t depth, float* panel) {
    float words[8][kBlock];
    for (std::int64_t b = 0; b < depth; b += kBlock) {
      float *const to = panel + b / 4 * kWidth, *const scales = scales_of(panel, b / kBlock);
      for (int j = 0; j < kWidth; j += 8) {
        for (int i = 0; i < 8; ++i) {
          scales[j + i] = 0.0f;
          if (j + i < outputs)
            scales[j + i] = fill_row(p, first + j + i, k + b, words[i]);
          else
            std::fill_n(words[i], kWords, 0.0f);
        }
        transpose_words(words, kWords, to + j, kWidth);
      }
      for (int v = 0; v < kWideVectors; ++v) store_words(scales + kWidth + v * IntVec::N, offset(to + v * IntVec::N));
    }
  }
  // -128 times the sum of each output's weights in the block
  static IntVec offset(const float* panel) {
    IntVec sum = IntVec::zero();
    const IntVec all = repeat_byte(128);
    for (std::int64_t i = 0; i < kWords; ++i) sum = add_dot_bytes<true>(sum, all, load_pairs(panel + i * kWidth));
    return negative(sum);
  }
  static void add(const float* strip, std::int64_t whole, const float* panel, std::int64_t k, std::int64_t depth,
                  float* sums) {
    for (std::int64_t b = 0; b < depth; b += kBlock)
      add_block(strip + (k + b) / 4 * kStrip, strip + steps_at(whole) + (k + b) / kBlock * kStrip,
                panel + b / 4 * kWidth, panel + (kDepth / 4 + 2 * (b / kBlock)) * kWidth, sums);
  }
  [[gnu::noinline]] static void add_block(const float* strip, const float* steps, const float* panel,
                                          const float* scales, float* sums) {
    using V = Vec<float>;
    IntVec acc[kStrip][kWideVectors];
#pragma GCC unroll 6
    for (int r = 0; r < kStrip; ++r)
#pragma GCC unroll 4
      for (int v = 0; v < kWideVectors; ++v) acc[r][v] = load_pairs(scales + kWidth + v * IntVec::N);
    multiply_words(strip, panel, kWords, acc, [](IntVec a, IntVec w, IntVec x) __attribute__((always_inline)) {
      return add_dot_bytes<true>(a, x, w);
    });
    const V scale[kWideVectors] = {load(scales), load(scales + V::N), load(scales + 2 * V::N), load(scales + 3 * V::N)};
#pragma GCC unroll 6
    for (int r = 0; r < kStrip; ++r, sums += kOutputs) {
      const V step(steps[r]);
#pragma GCC unroll 4
      for (int v = 0; v < kWideVectors; ++v)
        store(sums + v * V::N, fma(to_float(acc[r][v]), scale[v] * step, load(sums + v * V::N)));
    }
  }
};

}  // namespace qvl::cpu

#endif
