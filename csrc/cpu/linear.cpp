// y = x W^T for many rows of x, and the gradient y = x W: register tiles, weights converted in the tile.
//
// Regime: prompts, images, training; 2 M N K FLOPs. The weights lie row-major in their format; a panel of them (2
// vectors of outputs) is brought into the tile's order once for kBlockStrips strips, 2 % of the product.
//
//   strips   6 rows of x, [depth][6], made once for all outputs. Floating weights: floats. Quantised weights: pairs of
//            int16 and a step for each 128 of a row
//   panel    2 vectors of outputs times kDepth of K, in L1 (16 or 32 KiB) while all strips of the block pass it. For
//            int8 pairs of int16 (|w| <= 127, |x| <= 32767). For int4 the weights are rounded again, to 11 bits with a
//            scale for 128 of a row, |w| <= 2047, |x| <= 8191: the product then costs what int8 costs, and has lost
//            1 / 4094 of the largest weight, a hundredth of what int4 has lost. A sum of 128 products stays below 2^31
//   tile     6 x 2 vectors of sums in registers (attention_tiles.h): floats over kDepth, or integers over 128, which
//            are then scaled and added to float sums
//   task     kOutputs outputs: their sums (kBlockStrips * 6 * 512 bytes) stay in L2 over all of K, then bias,
//            activation and residual are applied and y is written once
//
// Without VNNI an integer step is `vpmaddwd` and `vpaddd`: 32 products in two instructions on AVX-512, 16 on AVX2,
// against 16 and 8 of an FMA; with it 32 in one. `vpmaddubsw` takes more: 8-bit x needs `vpsignb` beside it, three
// instructions on the two ports that multiply, and loses 8 bits of x.
//
// The gradient decodes rows of W into panels of columns and multiplies in floats, whatever the format.

#include "linear.h"

#include "parallel.h"

namespace qvl::cpu {
namespace {

constexpr std::int64_t kBlockStrips = 88;
constexpr std::int64_t kOutputs = 128;
constexpr int kWidth = kPanel<float>;
constexpr int kPairs = kBlock / 2;

// Products of floats. `depth` is K, or N where the gradient is computed.
template <bool kGradient>
struct Floats {
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
    if constexpr (kGradient) {
      for (std::int64_t i = 0; i < depth; ++i)
        decode(p, k + i, first, std::min<std::int64_t>(outputs, kWidth), kWidth, panel + i * kWidth);
      return;
    }
    float wide[8][kDepth];
    const float* eight[8];
    for (int j = 0; j < kWidth; j += 8) {
      for (int i = 0; i < 8; ++i) {
        eight[i] = wide[i];
        if (j + i < outputs)
          decode(p, first + j + i, k, depth, depth, wide[i]);
        else
          std::fill_n(wide[i], depth, 0.0f);
      }
      transpose_eight(eight, depth, panel + j, kWidth);
    }
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
  static constexpr std::int64_t kDepth = 512;
  static constexpr std::int64_t kBlocks = kDepth / kBlock;
  static constexpr std::int64_t kPanelFloats = (kDepth / 2 + kBlocks) * kWidth;
  static constexpr float kMostInt4 = 2047.0f;
  static float most_x(const PackedLinearParams& p) { return p.weight.dtype == DType::i8 ? 32767.0f : 8191.0f; }
  static std::int64_t strip_floats(std::int64_t depth) {
    return (depth / 2 + depth / kBlock) * kStrip + 2 * kStripSlack;
  }
  static std::int64_t steps_at(std::int64_t depth) { return depth / 2 * kStrip + kStripSlack; }

  static void transpose(const float* const (&rows)[8], float* to, std::int64_t stride) {
    for (int i = 0; i < kPairs; i += 8) {
      const float* from[8];
      for (int j = 0; j < 8; ++j) from[j] = rows[j] + i;
      transpose8x8(from, to + i * stride, stride);
    }
  }
  template <class T>
  static void fill_strip(const PackedLinearParams& p, std::int64_t first, std::int64_t depth, float* strip) {
    float pairs[kStrip][kPairs], wide[kBlock];
    const float* eight[8];
    for (int i = 0; i < 8; ++i) eight[i] = pairs[std::min(i, kStrip - 1)];
    for (std::int64_t k = 0; k < depth; k += kBlock) {
      for (int r = 0; r < kStrip; ++r) {
        const std::int64_t row = std::min(first + r, p.x.size[0] - 1);
        const std::int64_t n = std::min<std::int64_t>(kBlock, p.x.size[1] - k);
        widen(p.x.as<T>() + row * p.x.stride[0] + k, n, kBlock, wide);
        strip[steps_at(depth) + k / kBlock * kStrip + r] =
            quantize_block(wide, most_x(p), reinterpret_cast<std::int16_t*>(pairs[r]));
      }
      transpose(eight, strip + k / 2 * kStrip, kStrip);
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
    decode(p, n, k, kBlock, kBlock, wide);
    return quantize_block(wide, kMostInt4, to);
  }
  static void fill_panel(const PackedLinearParams& p, std::int64_t first, std::int64_t outputs, std::int64_t k,
                         std::int64_t depth, float* panel) {
    float pairs[8][kPairs];
    const float* eight[8];
    for (int i = 0; i < 8; ++i) eight[i] = pairs[i];
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
        transpose(eight, panel + b / 2 * kWidth + j, kWidth);
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

// Sizes of a call, and where things lie in scratch, in floats.
template <class P>
struct Plan {
  std::int64_t depth, rows, outputs, blocks, strips, strip_floats, shared, own;

  Plan(const PackedLinearParams& p, std::int64_t of_depth) : depth(of_depth), rows(p.x.size[0]), outputs(p.y.size[1]) {
    const std::int64_t all = (rows + kStrip - 1) / kStrip;
    blocks = std::max<std::int64_t>(1, (all + kBlockStrips - 1) / kBlockStrips);
    strips = (all + blocks - 1) / blocks;
    strip_floats = round_up(P::strip_floats(depth), 16);
    shared = strips * strip_floats;
    own = P::kPanelFloats + strips * kStrip * kOutputs;
  }
  std::int64_t bytes(std::int64_t threads) const {
    return (shared + threads * own) * static_cast<std::int64_t>(sizeof(float));
  }
};

// The sums of one task: outputs `first` and on, with SwiGLU half of them, and the same of the other half of W.
template <class P, class T>
void run_task(const PackedLinearParams& p, const Plan<P>& plan, std::int64_t block, std::int64_t task, float* memory) {
  const bool gated = p.activation == Activation::swiglu;
  const std::int64_t share = gated ? kOutputs / 2 : kOutputs, first = task * share;
  const std::int64_t count = std::min(share, plan.outputs - first), row0 = block * plan.strips * kStrip;
  const std::int64_t rows = std::min(plan.strips * kStrip, plan.rows - row0), strips = (rows + kStrip - 1) / kStrip;
  float *const panel = memory, *const sums = memory + P::kPanelFloats;
  const float* const strip = p.scratch.as<float>();
  std::fill_n(sums, strips * kStrip * kOutputs, 0.0f);
  for (std::int64_t k = 0; k < plan.depth; k += P::kDepth) {
    const std::int64_t depth = std::min(P::kDepth, plan.depth - k);
    for (std::int64_t c = 0; c < kOutputs; c += kWidth) {
      const std::int64_t within = c % share, half = c / share;
      if (within >= count) continue;
      P::fill_panel(p, half * plan.outputs + first + within, count - within, k, depth, panel);
      for (std::int64_t s = 0; s < strips; ++s)
        P::add(strip + s * plan.strip_floats, plan.depth, panel, k, depth, sums + s * kStrip * kOutputs + c);
    }
  }
  for (std::int64_t r = 0; r < rows; ++r)
    finish<T>(p, row0 + r, first, count, sums + r * kOutputs, sums + r * kOutputs + share);
}

template <class P, class T>
void run(const PackedLinearParams& p, std::int64_t depth, std::int64_t threads) {
  const Plan<P> plan(p, depth);
  const std::int64_t share = p.activation == Activation::swiglu ? kOutputs / 2 : kOutputs;
  const std::int64_t tasks = (plan.outputs + share - 1) / share;
  for (std::int64_t block = 0; block < plan.blocks; ++block) {
    const std::int64_t row0 = block * plan.strips * kStrip;
    const std::int64_t strips = std::min(plan.strips, (plan.rows - row0 + kStrip - 1) / kStrip);
    parallel_for(strips, strips * kStrip * depth, [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t s = begin; s < end; ++s)
        P::template fill_strip<T>(p, row0 + s * kStrip, depth, p.scratch.as<float>() + s * plan.strip_floats);
    });
    parallel_tasks(tasks, strips * kStrip * plan.outputs * depth, threads, [&](std::int64_t task, std::int64_t worker) {
      run_task<P, T>(p, plan, block, task, p.scratch.as<float>() + plan.shared + worker * plan.own);
    });
  }
}

// Calls f(P{}, depth) with the kind of product that the weights and the CPU allow.
template <class F>
void with_product(const PackedLinearParams& p, const F& f) {
  const std::int64_t k = p.x.size[1];
  if (!is_quantized(p)) return f(Floats<false>{}, k);
  if constexpr (IntVec::N == 16)
    if (has_vnni()) return f(Integers<true>{}, round_up(k, kBlock));
  return f(Integers<false>{}, round_up(k, kBlock));
}

}  // namespace

std::int64_t packed_linear_scratch_bytes(const PackedLinearParams& p, std::int64_t threads) {
  if (is_linear_decode(p)) return linear_decode_scratch_bytes(p);
  std::int64_t bytes = 0;
  with_product(p, [&](auto product, std::int64_t depth) { bytes = Plan<decltype(product)>(p, depth).bytes(threads); });
  return bytes;
}

void packed_linear(const PackedLinearParams& p, std::int64_t threads) {
  if (p.y.numel() == 0) return;
  if (is_linear_decode(p)) return linear_decode(p, threads);
  with_product(p, [&](auto product, std::int64_t depth) {
    with_x_type(p.x.dtype, [&](auto t) { run<decltype(product), decltype(t)>(p, depth, threads); });
  });
}

std::int64_t packed_linear_backward_scratch_bytes(const PackedLinearParams& p, std::int64_t threads) {
  return Plan<Floats<true>>(p, p.x.size[1]).bytes(threads);
}

void packed_linear_backward(const PackedLinearParams& p, std::int64_t threads) {
  if (p.y.numel() == 0) return;
  with_x_type(p.x.dtype, [&](auto t) { run<Floats<true>, decltype(t)>(p, p.x.size[1], threads); });
}

}  // namespace qvl::cpu
