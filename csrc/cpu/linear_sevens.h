// Products of int8 weights with x in 7 bits, for CPUs without VNNI. The caller asks for it (`PackedLinearParams::
// rounded`); with VNNI it gets `Bytes`, which keeps 8 bits.
//
//   x = step u + least     u = 0 ... 127, for each 128 of a row: its range in 127 steps, so that what is of one sign,
//                          as after an activation, loses no bit to the other
//   w = scale q            as packed, |q| <= 127
//   x w^T                  scale (step sum u q + least sum q)
//
// `vpmaddubsw` adds two products in 16 bits, and 2 * 127 * 127 = 32258 fits: with x in 8 bits it would saturate unless
// `vpsignb` moved the sign of x to the weights, a third instruction on the two ports that multiply. `vpmaddwd` with
// ones widens, `vpaddd` adds: 64 products in six instructions, four of them multiplications, against eight and four of
// `Integers` and eight FMAs. Where the weights of two steps are small enough, as they are known to be once the panel is
// made, two sums are added before they are widened: five instructions, three of them multiplications. Of 8 normal rows
// nine steps in ten are; whichever way, the sums are the same.
//
// The error of x is at most half a step, range / 254. 128 normal numbers range over 5.2, so a step is 0.041 and its
// rounding 0.041 / sqrt(12) = 1.2 % of a product; x in 8 bits, 0.6 %; steps of the largest magnitude / 63, 1.3 %, and
// twice as much as here where x has one sign; a step for each 64 1.1 %, for as many more instructions as it has blocks.
// Six bits would let all sums of two steps be added in 16 bits, at 2.4 %.
//
// The sums over q meet the `least` in a product of floats over the blocks, 1 / 128 of the whole.
#pragma once

#include "linear.h"
#include "vec_sevens.h"

namespace qvl::cpu {

// x[i] is least + step q[i] within half a step; NaN in both where a number of x is not finite.
struct Rounding {
  float step, least;
};
inline Rounding quantize_range(const float* x, std::uint8_t* q) {
  using V = Vec<float>;
  V top = load(x), bottom = top, finite = V::zero();
  for (int i = 0; i < kBlock; i += V::N) {
    const V v = load(x + i);
    top = max(top, v);
    bottom = min(bottom, v);
    finite = fma(v, V::zero(), finite);
  }
  const float least = sum(finite) - largest(V::zero() - bottom), range = largest(top) - least;
  const V inverse(range > 1e-30f ? 127.0f / range : 0.0f), from(least);
  for (int i = 0; i < kBlock; i += V::N) store_bytes(q + i, (load(x + i) - from) * inverse);
  return {range > 1e-30f || range != range ? range / 127.0f : 0.0f, least};
}

// A float stands for four bytes.
struct Sevens {
  static constexpr std::int64_t kDepth = 512;
  static constexpr int kWidth = kPanel<float>;
  static constexpr std::int64_t kWords = kBlock / 4;
  static constexpr std::int64_t kScales = kDepth / 4 * kWidth;  // of a panel: where they start, then scale sum q
  static constexpr std::int64_t kSums = kScales + kDepth / kBlock * kWidth;
  static constexpr std::int64_t kFits = kSums + kDepth / kBlock * kWidth;
  static constexpr std::int64_t kPanelFloats = kFits + 16;
  static std::int64_t strip_floats(std::int64_t depth) { return least_at(depth) + depth / kBlock * kStrip; }
  static std::int64_t steps_at(std::int64_t depth) { return depth / 4 * kStrip + kStripSlack; }
  // Of the vector of outputs j and its block at b.
  static std::int64_t fit_at(std::int64_t b, int j) { return kFits + b / kBlock * 2 + j / IntVec::N; }
  static std::int64_t least_at(std::int64_t depth) { return steps_at(depth) + depth / kBlock * kStrip; }

  template <class T>
  static void fill_strip(const PackedLinearParams& p, std::int64_t first, std::int64_t depth, float* strip) {
    float words[8][kWords] = {}, wide[kBlock];
    for (std::int64_t k = 0; k < depth; k += kBlock) {
      for (int r = 0; r < kStrip; ++r) {
        widen_x<T>(p, first + r, k, wide);
        const Rounding range = quantize_range(wide, reinterpret_cast<std::uint8_t*>(words[r]));
        strip[steps_at(depth) + k / kBlock * kStrip + r] = range.step;
        strip[least_at(depth) + k / kBlock * kStrip + r] = range.least;
      }
      transpose_words(words, kWords, strip + k / 4 * kStrip, kStrip);
    }
  }
  static void fill_panel(const PackedLinearParams& p, std::int64_t first, std::int64_t outputs, std::int64_t k,
                         std::int64_t depth, float* panel) {
    for (std::int64_t b = 0; b < depth; b += kBlock) {
      float *const to = panel + b / 4 * kWidth, *const scales = panel + kScales + b / kBlock * kWidth;
      fill_bytes(p, first, outputs, k + b, kWidth, to, scales);
      for (int j = 0; j < kWidth; j += IntVec::N) {
        const std::uint32_t fit = fit_of(to + j);
        std::memcpy(panel + fit_at(b, j), &fit, sizeof fit);
        store(scales + kSums - kScales + j, load(scales + j) * to_float(sum_words(to + j)));
      }
    }
  }
  // Bit i: of steps 2 i and 2 i + 1 of a block the sums of products may be added in 16 bits, for a vector of outputs.
  static std::uint32_t fit_of(const float* panel) {
    std::uint32_t fit = 0;
    for (std::int64_t i = 0; i < kWords; i += 2, panel += 2 * kWidth)
      fit |= sums_fit(load_pairs(panel), load_pairs(panel + kWidth)) ? 1u << i / 2 : 0u;
    return fit;
  }
  // The sum of each output's q in the block.
  static IntVec sum_words(const float* panel) {
    IntVec sum = IntVec::zero();
    const IntVec ones = repeat_byte(1);
    for (std::int64_t i = 0; i < kWords; ++i) sum = add_dot_bytes<false>(sum, ones, load_pairs(panel + i * kWidth));
    return sum;
  }
  static void add(const float* strip, std::int64_t whole, const float* panel, std::int64_t k, std::int64_t depth,
                  float* sums) {
    Tile<float> acc;
    load_tile(sums, kOutputs, acc);
    multiply_add<1, kStrip>(strip + least_at(whole) + k / kBlock * kStrip, panel + kSums, depth / kBlock, acc);
    store_tile(sums, kOutputs, acc);
    for (int j = 0; j < kWidth; j += IntVec::N) add_vector(strip, whole, panel, k, depth, j, sums + j);
  }
  // One vector of outputs: its two vectors of weights, the ones, and what is multiplied are registers beside six sums,
  // so that x alone is loaded. With two there would be twelve sums, and weights and ones from memory: 48 loads for
  // twelve sums instead of 28 were half of the time on Zen 3.
  [[gnu::noinline]] static void add_vector(const float* strip, std::int64_t whole, const float* panel, std::int64_t k,
                                           std::int64_t depth, int j, float* sums) {
    using V = Vec<float>;
    const float* x = strip + k / 4 * kStrip;
    const float* step = strip + steps_at(whole) + k / kBlock * kStrip;
    const float* w = panel + j;
    for (std::int64_t b = 0; b < depth; b += kBlock, step += kStrip) {
      std::uint32_t fit;
      std::memcpy(&fit, panel + fit_at(b, j), sizeof fit);
      IntVec acc[kStrip];
#pragma GCC unroll 6
      for (int r = 0; r < kStrip; ++r) acc[r] = IntVec::zero();
      for (int i = 0; i < kWords; i += 2, x += 2 * kStrip, w += 2 * kWidth, fit >>= 1) {
        const IntVec here = load_pairs(w), next = load_pairs(w + kWidth);
        if ((fit & 1) != 0) {
#pragma GCC unroll 6
          for (int r = 0; r < kStrip; ++r)
            acc[r] = add_dot_two_sevens(acc[r], repeat_pair(x + r), here, repeat_pair(x + kStrip + r), next);
          continue;
        }
#pragma GCC unroll 6
        for (int r = 0; r < kStrip; ++r) {
          acc[r] = add_dot_bytes<false>(acc[r], repeat_pair(x + r), here);
          acc[r] = add_dot_bytes<false>(acc[r], repeat_pair(x + kStrip + r), next);
        }
      }
      const V scale = load(panel + kScales + b / kBlock * kWidth + j);
#pragma GCC unroll 6
      for (int r = 0; r < kStrip; ++r)
        store(sums + r * kOutputs, fma(to_float(acc[r]), scale * V(step[r]), load(sums + r * kOutputs)));
    }
  }
};

}  // namespace qvl::cpu
