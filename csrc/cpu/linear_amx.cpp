#include "linear_amx.h"

#include "linear_amx_products.h"
#include "parallel.h"

namespace qvl::cpu {

#if defined(__AVX512F__)

namespace {

constexpr std::int64_t kRows = 2 * kTileRows;  // of a strip, and outputs of a panel

// Sizes of a call, and where things lie in scratch, in floats.
template <class P>
struct Plan {
  std::int64_t depth, rows, outputs, blocks, strips, shared, own;

  explicit Plan(const PackedLinearParams& p) : depth(p.x.size[1]), rows(p.x.size[0]), outputs(p.y.size[1]) {
    const std::int64_t all = (rows + kRows - 1) / kRows;
    blocks = std::max<std::int64_t>(1, (all + P::kStrips - 1) / P::kStrips);
    strips = (all + blocks - 1) / blocks;
    shared = strips * P::kStripFloats * units_of(depth);
    own = P::kOwnFloats + panel_floats() + strips * kRows * kOutputs;
  }
  static std::int64_t units_of(std::int64_t depth) { return (depth + P::kUnit - 1) / P::kUnit; }
  static constexpr std::int64_t panel_floats() { return P::kDepth / P::kUnit * P::kPanelFloats; }
  std::int64_t bytes(std::int64_t threads) const {
    return (shared + threads * own) * static_cast<std::int64_t>(sizeof(float));
  }
  // Along K of the panels and strips that start at k.
  std::int64_t depth_at(std::int64_t k) const { return std::min(P::kDepth, depth - k); }
  std::int64_t strips_of(std::int64_t block) const {
    return std::min(strips, (rows - block * strips * kRows + kRows - 1) / kRows);
  }
  // Where a strip's units from k on start, [k / kDepth][strip][unit][kStripFloats].
  std::int64_t strip_at(std::int64_t block, std::int64_t k, std::int64_t s) const {
    return (strips_of(block) * k / P::kUnit + s * units_of(depth_at(k))) * P::kStripFloats;
  }
};

// Rows [first, first + kRows) of W, of which there are `outputs` or the last is repeated. Asks for what the same rows
// have further on: it is needed four panels later.
template <class P>
[[gnu::noinline]] void fill_panel(const PackedLinearParams& p, std::int64_t first, std::int64_t outputs, std::int64_t k,
                                  std::int64_t units, float* panel) {
  const std::int64_t bits = p.weight.dtype == DType::bf16 ? 16 : p.weight.dtype == DType::i8 ? 8 : 4;
  const std::int64_t row = p.weight.size[1] * std::max<std::int64_t>(bits / 8, 1), next = (k + P::kDepth) * bits / 8;
  for (std::int64_t j = 0; j < kRows; ++j) {
    const std::int64_t n = first + std::min(j, outputs - 1);
    P::fill_row(p, n, k, units, j, panel);
    if (next < row) prefetch_l2(p.weight.as<char>() + n * row + next, std::min(P::kDepth * bits / 8, row - next));
  }
}

// Tile (o, r) of a task's sums: 16 outputs of 16 rows.
float* sums_at(float* sums, std::int64_t row_tiles, std::int64_t o, std::int64_t r) {
  return sums + (o * row_tiles + r) * kTileFloats;
}

// The task's sums, 16 rows at a time, to y.
template <class T>
void finish_task(const PackedLinearParams& p, std::int64_t row0, Range outputs, float* sums, std::int64_t row_tiles) {
  const std::int64_t share = p.activation == Activation::swiglu ? kOutputs / 2 : kOutputs;
  alignas(64) float rows[kTileRows][kOutputs];
  for (std::int64_t t = 0; t < row_tiles && row0 + t * kTileRows < p.x.size[0]; ++t) {
    for (std::int64_t o = 0; o < kOutputs / kTileRows; ++o) {
      const float* const tile = sums_at(sums, row_tiles, o, t);
      const float* words[kTileRows];
      for (int i = 0; i < kTileRows; ++i) words[i] = tile + i * kTileRows;
      store_transposed(&rows[0][o * kTileRows], words, kOutputs);
    }
    const std::int64_t first = row0 + t * kTileRows, count = std::min<std::int64_t>(kTileRows, p.x.size[0] - first);
    for (std::int64_t r = first + kTileRows; r < std::min(first + 2 * kTileRows, p.x.size[0]); ++r)
      prefetch(p.y.as<T>() + r * p.y.size[1] + outputs.begin,
               (outputs.end - outputs.begin) * static_cast<std::int64_t>(sizeof(T)));
    for (std::int64_t r = 0; r < count; ++r)
      finish<T>(p, first + r, outputs.begin, outputs.end - outputs.begin, rows[r], rows[r] + share);
  }
}

// sums of outputs [c, c + kRows) of a task, all strips, over the part of K that the panel has.
template <class P>
void add_panel(const Plan<P>& plan, std::int64_t block, std::int64_t k, std::int64_t c, const float* shared,
               const float* panel, P& product, float* sums) {
  const std::int64_t strips = plan.strips_of(block), units = plan.units_of(plan.depth_at(k)), o = c / kTileRows;
  const std::int64_t rows = plan.rows - block * plan.strips * kRows;
  for (std::int64_t s = 0; s < strips; ++s) {
    const Sums at = {{sums_at(sums, 2 * strips, o, 2 * s), sums_at(sums, 2 * strips, o, 2 * s + 1)},
                     {sums_at(sums, 2 * strips, o + 1, 2 * s), sums_at(sums, 2 * strips, o + 1, 2 * s + 1)}};
    product.add(panel, shared + plan.strip_at(block, k, s), units, k == 0, rows - s * kRows > kTileRows, at);
  }
  product.finish();
}

// Outputs of one task; with SwiGLU half as many, and the same of the other half of W.
template <class P, class T>
void run_task(const PackedLinearParams& p, const Plan<P>& plan, std::int64_t block, std::int64_t task, float* memory) {
  const std::int64_t share = p.activation == Activation::swiglu ? kOutputs / 2 : kOutputs, first = task * share;
  const std::int64_t count = std::min(share, plan.outputs - first);
  float *const panel = memory + P::kOwnFloats, *const sums = panel + plan.panel_floats();
  P product(memory);
  {
    const Tiles tiles;
    for (std::int64_t k = 0; k < plan.depth; k += P::kDepth)
      for (std::int64_t c = 0; c < kOutputs; c += kRows) {
        const std::int64_t within = c % share, half = c / share;
        if (within >= count) continue;
        fill_panel<P>(p, half * plan.outputs + first + within, count - within, k, plan.units_of(plan.depth_at(k)),
                      panel);
        add_panel(plan, block, k, c, p.scratch.as<float>(), panel, product, sums);
      }
  }
  finish_task<T>(p, block * plan.strips * kRows, {first, first + count}, sums, 2 * plan.strips_of(block));
}

template <class P, class T>
void run(const PackedLinearParams& p, std::int64_t threads) {
  const Plan<P> plan(p);
  float* const shared = p.scratch.as<float>();
  const std::int64_t share = p.activation == Activation::swiglu ? kOutputs / 2 : kOutputs;
  const std::int64_t tasks = (plan.outputs + share - 1) / share;
  for (std::int64_t block = 0; block < plan.blocks; ++block) {
    const std::int64_t strips = plan.strips_of(block), row0 = block * plan.strips * kRows;
    parallel_for(strips, strips * kRows * plan.depth, [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t s = begin; s < end; ++s)
        for (std::int64_t k = 0; k < plan.depth; k += P::kDepth)
          P::template fill_strip<T>(p, row0 + s * kRows, k, plan.depth_at(k), shared + plan.strip_at(block, k, s));
    });
    const std::int64_t work = strips * kRows * plan.outputs * plan.depth;
    parallel_tasks(tasks, work, threads, [&](std::int64_t task, std::int64_t worker) {
      run_task<P, T>(p, plan, block, task, shared + plan.shared + worker * plan.own);
    });
  }
}

// Whether one part of x is enough: it may be rounded, or loses nothing.
bool is_one_part(const PackedLinearParams& p) {
  return p.x.dtype == DType::bf16 || (p.rounded && p.x.size[0] > kDecodeRows);
}

}  // namespace

bool is_linear_amx(const PackedLinearParams& p) {
  if (p.x.size[1] == 0 || !has_amx()) return false;
  // Of few rows linear_decode.cpp reads bfloat16 weights as fast as memory gives them, up to 4 or 8 of them (measured).
  if (p.weight.dtype == DType::bf16) return p.x.size[0] > (is_one_part(p) ? 4 : 8);
  return is_quantized(p) && p.rounded && p.x.size[0] > kDecodeRows;
}

std::int64_t linear_amx_scratch_bytes(const PackedLinearParams& p, std::int64_t threads) {
  if (is_quantized(p)) return Plan<AmxBytes>(p).bytes(threads);
  return is_one_part(p) ? Plan<AmxHalves<1>>(p).bytes(threads) : Plan<AmxHalves<3>>(p).bytes(threads);
}

void linear_amx(const PackedLinearParams& p, std::int64_t threads) {
  with_x_type(p.x.dtype, [&](auto t) {
    using T = decltype(t);
    if (is_quantized(p)) return run<AmxBytes, T>(p, threads);
    if constexpr (!std::is_same_v<T, bf16>)
      if (!is_one_part(p)) return run<AmxHalves<3>, T>(p, threads);
    run<AmxHalves<1>, T>(p, threads);
  });
}

#else

bool is_linear_amx(const PackedLinearParams&) { return false; }
std::int64_t linear_amx_scratch_bytes(const PackedLinearParams&, std::int64_t) { return 0; }
void linear_amx(const PackedLinearParams&, std::int64_t) {}

#endif

}  // namespace qvl::cpu
