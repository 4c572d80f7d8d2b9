// y = x W^T for many rows of x where integers are multiplied (linear_floats.cpp has floats), and the gradient y = x W:
// register tiles, weights converted in the tile.
//
// Regime: prompts, images, training; 2 M N K FLOPs. The weights lie row-major in their format; a panel of them (2 or 4
// vectors of outputs) is brought into the tile's order once for kBlockStrips strips, 2 % of the product. What strips
// and panels hold is the business of the kinds of product (linear_products.h, linear_rounded.h, linear_sevens.h):
//
//   strips   6 rows of x, [depth][6], made once for all outputs
//   panel    its vectors of outputs times kDepth of K, in L1 (16 to 32 KiB) while all strips of the block pass it
//   tile     6 rows x the panel's vectors of sums in registers: floats over kDepth, or integers over 128, which are
//            then scaled and added to float sums
//   task     kOutputs outputs: their sums (kBlockStrips * 6 * 512 bytes) stay in L2 over all of K, then bias,
//            activation and residual are applied and y is written once

#include "linear_amx.h"
#include "linear_products.h"
#include "linear_rounded.h"
#include "linear_sevens.h"
#include "parallel.h"

namespace qvl::cpu {
namespace {

constexpr std::int64_t kBlockStrips = 88;

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
    for (std::int64_t c = 0; c < kOutputs; c += P::kWidth) {
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

#if defined(__AVX512F__)
bool multiplies_halves(const PackedLinearParams& p) {
  return p.weight.dtype == DType::bf16 && (p.rounded || p.x.dtype == DType::bf16) && has_fast_bf16();
}
#else
bool multiplies_halves(const PackedLinearParams&) { return false; }
#endif

// Whether linear_floats.cpp is fastest, measured on AVX2: float32 weights are streamed as fast for 8 rows, bfloat16 for
// 16, and where the caller allows 12-bit integers they are faster from 64 rows on, with VNNI from the first.
bool is_linear_floats(const PackedLinearParams& p) {
  const std::int64_t rows = p.x.size[0];
  if (is_quantized(p) || rows <= (p.weight.dtype == DType::f32 ? 8 : kDecodeRows)) return false;
  if (rows <= kDecodeRows) return true;
  const bool integers = p.rounded && (IntVec::N == 8 || has_vnni());
  return !multiplies_halves(p) && !(integers && (has_vnni() || rows > 64));
}

// Calls f(P{}, depth) with the kind of product that the weights and the CPU allow.
template <class F>
void with_product(const PackedLinearParams& p, const F& f) {
  const std::int64_t k = p.x.size[1], blocks = round_up(k, kBlock);
#if defined(__AVX512F__)
  if (multiplies_halves(p)) return f(Halves{}, k);
#endif
  const bool rounded = is_quantized(p) && p.rounded, fours = rounded && p.weight.dtype == DType::u8;
  if (!has_vnni())
    return fours ? f(Fours<false>{}, blocks) : rounded ? f(Sevens{}, blocks) : f(Integers<false>{}, blocks);
  if (fours && p.x.size[0] <= kFoursRows) return f(Fours<true>{}, blocks);
  rounded ? f(Bytes{}, blocks) : f(Integers<true>{}, blocks);
}

}  // namespace

std::int64_t packed_linear_scratch_bytes(const PackedLinearParams& p, std::int64_t threads) {
  if (is_linear_amx(p)) return linear_amx_scratch_bytes(p, threads);
  if (is_linear_floats(p)) return linear_floats_scratch_bytes(p, threads);
  if (is_linear_decode(p)) return linear_decode_scratch_bytes(p);
  std::int64_t bytes = 0;
  with_product(p, [&](auto product, std::int64_t depth) { bytes = Plan<decltype(product)>(p, depth).bytes(threads); });
  return bytes;
}

void packed_linear(const PackedLinearParams& p, std::int64_t threads) {
  if (p.y.numel() == 0) return;
  if (is_linear_amx(p)) return linear_amx(p, threads);
  if (is_linear_floats(p)) return linear_floats(p, threads);
  if (is_linear_decode(p)) return linear_decode(p, threads);
  with_product(p, [&](auto product, std::int64_t depth) {
    with_x_type(p.x.dtype, [&](auto t) { run<decltype(product), decltype(t)>(p, depth, threads); });
  });
}

std::int64_t packed_linear_backward_scratch_bytes(const PackedLinearParams& p, std::int64_t threads) {
  return Plan<Gradient>(p, p.x.size[1]).bytes(threads);
}

void packed_linear_backward(const PackedLinearParams& p, std::int64_t threads) {
  if (p.y.numel() == 0) return;
  with_x_type(p.x.dtype, [&](auto t) { run<Gradient, decltype(t)>(p, p.x.size[1], threads); });
}

}  // namespace qvl::cpu
