// The kinds of product that linear.cpp tiles: what a strip of x and a panel of W hold, and how they are multiplied.
//
//   Gradient   floats, whatever the format, from decoded rows in panels of columns
//   Integers   weights and x as pairs of int16 with steps for each 128, so that sums of 128 products stay below 2^31.
//              int8: |w| <= 127, |x| <= 32767. Others are rounded: int4 weights again, to 11 bits, |w| <= 2047, |x| <=
//              8191: the product then costs what int8 costs, and has lost 1 / 4094 of the largest weight, a hundredth
//              of what int4 has lost. float32 and bfloat16 weights where the caller lets x be rounded, both to 12
//              bits, <= 4095: an eighth of what rounding to bfloat16 loses of a normal number, at int8's price
//
// linear_rounded.h and linear_sevens.h have those that round x to the width of the weights.
//
// Without VNNI an integer step is `vpmaddwd` and `vpaddd`: 32 products in two instructions on AVX-512, 16 on AVX2,
// against 16 and 8 of an FMA; with it 32 in one. `vpmaddubsw` takes more where x keeps 8 bits, since it then needs
// `vpsignb` beside it: three instructions on the two ports that multiply.
#pragma once

#include "linear.h"

namespace qvl::cpu {

// Products of floats, `depth` being N.
struct Gradient {
  static constexpr int kWidth = kPanel<float>;
  static constexpr std::int64_t kDepth = 256;
  static constexpr std::int64_t kPanelFloats = kDepth * kWidth;
  static std::int64_t strip_floats(std::int64_t depth) { return depth * kStrip + kStripSlack; }

  template <class T>
  static void fill_strip(const PackedLinearParams& p, std::int64_t first, std::int64_t depth, float* strip) {
    float rows[kStrip][kDepth];
    for (std::int64_t k = 0; k < depth; k += kDepth) {
      const std::int64_t n = std::min(kDepth, depth - k);
      for (int r = 0; r < kStrip; ++r) {
        const std::int64_t row = std::min(first + r, p.x.size[0] - 1);
        widen(p.x.as<T>() + row * p.x.stride[0] + k, n, n, rows[r]);
      }
      to_strip(rows[0], kDepth, n, strip + k * kStrip);
    }
  }
  static void fill_panel(const PackedLinearParams& p, std::int64_t first, std::int64_t outputs, std::int64_t k,
                         std::int64_t depth, float* panel) {
    for (std::int64_t i = 0; i < depth; ++i)
      decode(p, k + i, first, std::min<std::int64_t>(outputs, kWidth), kWidth, panel + i * kWidth);
  }
  static void add(const float* strip, std::int64_t, const float* panel, std::int64_t k, std::int64_t depth,
                  float* sums) {
    Tile<float> acc;
    load_tile(sums, kOutputs, acc);
    multiply_add<1, kStrip>(strip + k * kStrip, panel, depth, acc);
    store_tile(sums, kOutputs, acc);
  }
};

// Products of integers. A float stands for a pair of int16: strips and panels are moved as floats, bit by bit.
template <bool kVnni>
struct Integers {
  static constexpr int kWidth = kPanel<float>;
  static constexpr int kPairs = kBlock / 2;
  static constexpr std::int64_t kDepth = 512;
  static constexpr std::int64_t kBlocks = kDepth / kBlock;
  static constexpr std::int64_t kPanelFloats = (kDepth / 2 + kBlocks) * kWidth;
  static float most_x(const PackedLinearParams& p) {
    return p.weight.dtype == DType::i8 ? 32767.0f : p.weight.dtype == DType::u8 ? 8191.0f : 4095.0f;
  }
  static std::int64_t strip_floats(std::int64_t depth) {
    return (depth / 2 + depth / kBlock) * kStrip + 2 * kStripSlack;
  }
  static std::int64_t steps_at(std::int64_t depth) { return depth / 2 * kStrip + kStripSlack; }

  template <class T>
  static void fill_strip(const PackedLinearParams& p, std::int64_t first, std::int64_t depth, float* strip) {
    float pairs[8][kPairs] = {};
    for (std::int64_t k = 0; k < depth; k += kBlock) {
      for (int r = 0; r < kStrip; ++r)
        strip[steps_at(depth) + k / kBlock * kStrip + r] =
            quantize_x<T>(p, first + r, k, most_x(p), reinterpret_cast<std::int16_t*>(pairs[r]));
      transpose_words(pairs, kPairs, strip + k / 2 * kStrip, kStrip);
    }
  }
  // 128 weights of one row as integers; returns their scale.
  static float fill_row(const PackedLinearParams& p, std::int64_t n, std::int64_t k, float* pairs) {
    std::int16_t* const to = reinterpret_cast<std::int16_t*>(pairs);
    if (p.weight.dtype == DType::i8) {
      const std::int8_t* const w = p.weight.as<std::int8_t>() + n * p.weight.size[1] + k;
      for (int i = 0; i < kBlock; i += 16) store16(to + i, widen_to_16(w + i));
      return bf16_at(p.scale, n * p.scale.size[1] + k / kBlock);
    }
    float wide[kBlock];
    decode(p, n, k, std::min<std::int64_t>(kBlock, p.x.size[1] - k), kBlock, wide);
    return quantize_block(wide, p.weight.dtype == DType::u8 ? 2047.0f : 4095.0f, to);
  }
  static void fill_panel(const PackedLinearParams& p, std::int64_t first, std::int64_t outputs, std::int64_t k,
                         std::int64_t depth, float* panel) {
    float pairs[8][kPairs];
    float* const scales = panel + kDepth / 2 * kWidth;
    for (std::int64_t b = 0; b < depth; b += kBlock)
      for (int j = 0; j < kWidth; j += 8) {
        for (int i = 0; i < 8; ++i) {
          float& scale = scales[b / kBlock * kWidth + j + i];
          scale = 0.0f;
          if (j + i < outputs)
            scale = fill_row(p, first + j + i, k + b, pairs[i]);
          else
            std::fill_n(pairs[i], kPairs, 0.0f);
        }
        transpose_words(pairs, kPairs, panel + b / 2 * kWidth + j, kWidth);
      }
  }
  static void add(const float* strip, std::int64_t whole, const float* panel, std::int64_t k, std::int64_t depth,
                  float* sums) {
    for (std::int64_t b = 0; b < depth; b += kBlock)
      add_block(strip + (k + b) / 2 * kStrip, strip + steps_at(whole) + (k + b) / kBlock * kStrip,
                panel + b / 2 * kWidth, panel + kDepth / 2 * kWidth + b / kBlock * kWidth, sums);
  }
  // Not inlined: GCC then keeps the twelve sums in registers, which are all that AVX2 has but four.
  [[gnu::noinline]] static void add_block(const float* strip, const float* steps, const float* panel,
                                          const float* scales, float* sums) {
    using V = Vec<float>;
    IntVec acc[kStrip][2];
#pragma GCC unroll 6
    for (int r = 0; r < kStrip; ++r) acc[r][0] = acc[r][1] = IntVec::zero();
    for (int i = 0; i < kPairs; ++i, strip += kStrip, panel += kWidth) {
      const IntVec w0 = load_pairs(panel), w1 = load_pairs(panel + V::N);
#pragma GCC unroll 6
      for (int r = 0; r < kStrip; ++r) {
        const IntVec x = repeat_pair(strip + r);
        acc[r][0] = add_dot_pairs<kVnni>(acc[r][0], w0, x);
        acc[r][1] = add_dot_pairs<kVnni>(acc[r][1], w1, x);
      }
    }
    const V s0 = load(scales), s1 = load(scales + V::N);
#pragma GCC unroll 6
    for (int r = 0; r < kStrip; ++r, sums += kOutputs) {
      const V step(steps[r]);
      store(sums, fma(to_float(acc[r][0]), s0 * step, load(sums)));
      store(sums + V::N, fma(to_float(acc[r][1]), s1 * step, load(sums + V::N)));
    }
  }
};

}  // namespace qvl::cpu
