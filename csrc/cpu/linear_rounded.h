// Products of linear.cpp with x rounded to the width of narrow weights, where instructions for narrow numbers do more
// of them. The caller asks for it (`PackedLinearParams::rounded`). For wide weights `Integers` is what rounding leads
// to, for int8 without VNNI `Sevens` (linear_sevens.h).
//
//   Halves   bfloat16 weights as they are, x rounded to bfloat16: `vdpbf16ps`, 32 products an instruction, twice what
//            an FMA does where both take the same time (AMD; on Intel it takes four times as long).
//            x in bfloat16 loses nothing
//   Bytes    int8 weights as they are, x as 8 bits with a step for each 128: `vpdpbusd` of VNNI, 64 products an
//            instruction, 32 on AVX2. One factor has to be unsigned: x + 128, and the sums start at -128 times the sum
//            of the panel's weights. int4 weights of more than kFoursRows rows, rounded to 8 bits again: what the
//            scales and minima of each 32 cost `Fours` is then more than rounding
//   Fours    int4 weights as they are, as unsigned bytes, x as in Bytes: `vpdpbusd`, or on every AVX2 `vpmaddubsw`: two
//            products of 15 and 127 can be added eight times in 16 bits before `vpmaddwd` widens them, and that is a
//            group of 32 weights, whose scale follows. 18 instructions for 256 products, against 32 of `Integers`. The
//            groups' minima meet the groups' sums of x in floats, 1 / 32 of the product
//
// Registers of the first two: the instructions take 5 to 6 cycles, two a cycle, so on AVX-512 6 rows x 4 vectors of
// sums, 24 of 32 registers; 4 loads and 6 broadcasts feed 24 of them. The panel is as wide: 64 outputs, 32 KiB. Fours,
// and Bytes on AVX2, have a panel of 2 vectors.
#pragma once

#include <numeric>

#include "linear.h"

namespace qvl::cpu {

constexpr std::int64_t kFoursRows = 128;  // with VNNI

// Products of unsigned 4-bit numbers with bytes. A float stands for four of them.
template <bool kVnni>
struct Fours {
  static constexpr std::int64_t kDepth = 512;
  static constexpr int kWidth = kPanel<float>;
  static constexpr int kGroup = 32, kGroupWords = kGroup / 4, kGroups = kBlock / kGroup;
  static constexpr std::int64_t kWords = kDepth / 4 * kWidth;  // where the scales start, then the minima
  static constexpr std::int64_t kPanelFloats = kWords + 2 * kDepth / kGroup * kWidth;
  static constexpr float kMost = 127.0f;
  static std::int64_t strip_floats(std::int64_t depth) { return sums_at(depth) + depth / kGroup * kStrip; }
  static std::int64_t steps_at(std::int64_t depth) { return depth / 4 * kStrip + kStripSlack; }
  static std::int64_t sums_at(std::int64_t depth) { return steps_at(depth) + depth / kBlock * kStrip; }

  template <class T>
  static void fill_strip(const PackedLinearParams& p, std::int64_t first, std::int64_t depth, float* strip) {
    float words[8][kBlock / 4] = {};
    std::int16_t integers[kBlock];
    for (std::int64_t k = 0; k < depth; k += kBlock) {
      for (int r = 0; r < kStrip; ++r) {
        const float step = quantize_x<T>(p, first + r, k, kMost, integers);
        strip[steps_at(depth) + k / kBlock * kStrip + r] = step;
        narrow(integers, kBlock, reinterpret_cast<std::int8_t*>(words[r]));
        for (int g = 0; g < kGroups; ++g) {
          const int sum = std::accumulate(integers + g * kGroup, integers + (g + 1) * kGroup, 0);
          strip[sums_at(depth) + (k / kGroup + g) * kStrip + r] = step * static_cast<float>(sum);
        }
      }
      transpose_words(words, kBlock / 4, strip + k / 4 * kStrip, kStrip);
    }
  }
  static void fill_panel(const PackedLinearParams& p, std::int64_t first, std::int64_t outputs, std::int64_t k,
                         std::int64_t depth, float* panel) {
    float words[8][2 * kGroupWords] = {};
    for (std::int64_t b = 0; b < depth; b += 2 * kGroup)
      for (int j = 0; j < kWidth; j += 8) {
        float* const scales = panel + kWords + b / kGroup * kWidth + j;
        float* const minima = scales + kDepth / kGroup * kWidth;
        for (int i = 0; i < 8; ++i) {
          const std::int64_t n = first + std::min<std::int64_t>(j + i, outputs - 1);
          split_nibbles(p.weight.as<std::uint8_t>() + n * p.weight.size[1] + (k + b) / 2, words[i]);
          for (int g = 0; g < 2; ++g) {
            const std::int64_t group = n * p.scale.size[1] + (k + b) / kGroup + g;
            scales[g * kWidth + i] = bf16_at(p.scale, group), minima[g * kWidth + i] = bf16_at(p.minimum, group);
          }
        }
        transpose_words(words, 2 * kGroupWords, panel + b / 4 * kWidth + j, kWidth);
      }
  }
  static void add(const float* strip, std::int64_t whole, const float* panel, std::int64_t k, std::int64_t depth,
                  float* sums) {
    for (std::int64_t b = 0; b < depth; b += kBlock)
      add_block(strip + (k + b) / 4 * kStrip, strip + steps_at(whole) + (k + b) / kBlock * kStrip,
                panel + b / 4 * kWidth, panel + kWords + b / kGroup * kWidth, sums);
    Tile<float> acc;
    load_tile(sums, kOutputs, acc);
    multiply_add<1, kStrip>(strip + sums_at(whole) + k / kGroup * kStrip, panel + kWords + kDepth / kGroup * kWidth,
                            depth / kGroup, acc);
    store_tile(sums, kOutputs, acc);
  }
  [[gnu::noinline]] static void add_block(const float* strip, const float* steps, const float* panel,
                                          const float* scales, float* sums) {
    using V = Vec<float>;
    float part[kStrip * kWidth];
    for (int g = 0; g < kGroups; ++g, scales += kWidth) {
      IntVec acc[kStrip][2];
#pragma GCC unroll 6
      for (int r = 0; r < kStrip; ++r) acc[r][0] = acc[r][1] = IntVec::zero();
#pragma GCC unroll 2
      for (int i = 0; i < kGroupWords; ++i, strip += kStrip, panel += kWidth) {
        const IntVec w0 = load_pairs(panel), w1 = load_pairs(panel + V::N);
#pragma GCC unroll 6
        for (int r = 0; r < kStrip; ++r) {
          const IntVec x = repeat_pair(strip + r);
          acc[r][0] = kVnni ? add_dot_bytes<true>(acc[r][0], w0, x) : add_dot_nibbles(acc[r][0], w0, x);
          acc[r][1] = kVnni ? add_dot_bytes<true>(acc[r][1], w1, x) : add_dot_nibbles(acc[r][1], w1, x);
        }
      }
      const V s0 = load(scales), s1 = load(scales + V::N);
#pragma GCC unroll 6
      for (int r = 0; r < kStrip; ++r) {
        float* const to = part + r * kWidth;
        const V a = to_float(kVnni ? acc[r][0] : sum_pairs(acc[r][0])) * s0,
                b = to_float(kVnni ? acc[r][1] : sum_pairs(acc[r][1])) * s1;
        store(to, g == 0 ? a : a + load(to));
        store(to + V::N, g == 0 ? b : b + load(to + V::N));
      }
    }
#pragma GCC unroll 6
    for (int r = 0; r < kStrip; ++r, sums += kOutputs) {
      const V step(steps[r]);
      store(sums, fma(load(part + r * kWidth), step, load(sums)));
      store(sums + V::N, fma(load(part + r * kWidth + V::N), step, load(sums + V::N)));
    }
  }
};

constexpr int kWideVectors = IntVec::N == 16 ? 4 : 2;
constexpr int kWideWidth = kWideVectors * IntVec::N;

// acc[r][v] = step(acc[r][v], panel vector v, strip row r) over `count` words of 32 bits.
template <class Acc, class Step>
[[gnu::always_inline]] inline void multiply_words(const float* strip, const float* panel, std::int64_t count,
                                                  Acc (&acc)[kStrip][kWideVectors], const Step& step) {
  for (std::int64_t i = 0; i < count; ++i, strip += kStrip, panel += kWideWidth) {
    IntVec w[kWideVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kWideVectors; ++v) w[v] = load_pairs(panel + v * IntVec::N);
#pragma GCC unroll 6
    for (int r = 0; r < kStrip; ++r) {
      const IntVec x = repeat_pair(strip + r);
#pragma GCC unroll 4
      for (int v = 0; v < kWideVectors; ++v) acc[r][v] = step(acc[r][v], w[v], x);
    }
  }
}

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
    float words[8][kWords] = {};
    std::int16_t integers[kBlock];
    for (std::int64_t k = 0; k < depth; k += kBlock) {
      for (int r = 0; r < kStrip; ++r) {
        strip[steps_at(depth) + k / kBlock * kStrip + r] = quantize_x<T>(p, first + r, k, kMost, integers);
        std::uint8_t* const to = reinterpret_cast<std::uint8_t*>(words[r]);
        for (int i = 0; i < kBlock; ++i) to[i] = static_cast<std::uint8_t>(integers[i] + 128);
      }
      transpose_words(words, kWords, strip + k / 4 * kStrip, kStrip);
    }
  }
  static float* scales_of(float* panel, std::int64_t block) { return panel + (kDepth / 4 + 2 * block) * kWidth; }
  static void fill_panel(const PackedLinearParams& p, std::int64_t first, std::int64_t outputs, std::int64_t k,
                         std::int64_t depth, float* panel) {
    for (std::int64_t b = 0; b < depth; b += kBlock) {
      float *const to = panel + b / 4 * kWidth, *const scales = scales_of(panel, b / kBlock);
      fill_bytes(p, first, outputs, k + b, kWidth, to, scales);
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
    V scale[kWideVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kWideVectors; ++v) scale[v] = load(scales + v * V::N);
#pragma GCC unroll 6
    for (int r = 0; r < kStrip; ++r, sums += kOutputs) {
      const V step(steps[r]);
#pragma GCC unroll 4
      for (int v = 0; v < kWideVectors; ++v)
        store(sums + v * V::N, fma(to_float(acc[r][v]), scale[v] * step, load(sums + v * V::N)));
    }
  }
};

#if defined(__AVX512F__)

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

#endif

}  // namespace qvl::cpu
