#include "linear_amx.h"

#include "parallel.h"
#include "vec_amx.h"

namespace qvl::cpu {

#if defined(__AVX512F__)

namespace {

constexpr std::int64_t kRows = 2 * kTileRows;  // of a strip, and outputs of a panel
constexpr std::int64_t kDepth = 256, kSteps = kDepth / kTileHalves;
constexpr std::int64_t kTileFloats = kTileRows * kTileBytes / 4;
constexpr std::int64_t kPairFloats = 2 * kTileFloats;  // of one step: two registers
constexpr std::int64_t kPanelFloats = kSteps * kPairFloats;

// Sizes of a call, and where things lie in scratch, in floats. `parts`: of a number of x.
struct Plan {
  std::int64_t depth, rows, outputs, parts, blocks, strips, shared, own;

  Plan(const PackedLinearParams& p, std::int64_t of_x)
      : depth(p.x.size[1]), rows(p.x.size[0]), outputs(p.y.size[1]), parts(of_x) {
    const std::int64_t all = (rows + kRows - 1) / kRows, most = parts == 1 ? 32 : 16;
    blocks = std::max<std::int64_t>(1, (all + most - 1) / most);
    strips = (all + blocks - 1) / blocks;
    shared = strips * parts * kPairFloats * ((depth + kTileHalves - 1) / kTileHalves);
    own = kPanelFloats + strips * kRows * kOutputs;
  }
  std::int64_t bytes(std::int64_t threads) const {
    return (shared + threads * own) * static_cast<std::int64_t>(sizeof(float));
  }
  std::int64_t steps(std::int64_t k) const { return (std::min(kDepth, depth - k) + kTileHalves - 1) / kTileHalves; }
  std::int64_t strips_of(std::int64_t block) const {
    return std::min(strips, (rows - block * strips * kRows + kRows - 1) / kRows);
  }
  // Where a strip's steps from k on start, [k / kDepth][strip][step][part][kPairFloats].
  std::int64_t strip_at(std::int64_t block, std::int64_t k, std::int64_t s) const {
    return (strips_of(block) * k / kTileHalves + s * steps(k)) * parts * kPairFloats;
  }
};

// `count` numbers as bfloat16, rounded, or in three parts, and zeros up to a whole register.
template <int kParts, class T>
void to_halves(const T* from, std::int64_t count, bf16 (*to)[kDepth]) {
  using V = Vec<float>;
  const std::int64_t padded = round_up(count, kTileHalves);
  if constexpr (kParts == 1 && std::is_same_v<T, bf16>) {
    std::int64_t i = 0;
    for (; i + kTileHalves <= count; i += kTileHalves) std::memcpy(*to + i, from + i, kTileBytes);
    std::copy(from + i, from + count, *to + i);
    std::fill(*to + count, *to + padded, bf16{0});
    return;
  }
  alignas(64) float wide[kDepth];
  widen(from, count, padded, wide);
  for (std::int64_t i = 0; i < padded; i += kTileHalves) {
    V a[3] = {load(wide + i)}, b[3] = {load(wide + i + V::N)};
    if constexpr (kParts == 3) split_three(load(wide + i), a), split_three(load(wide + i + V::N), b);
    for (int part = 0; part < kParts; ++part) store_halves(to[part] + i, a[part], b[part]);
  }
}

// Strip `s` of a block, in all its depth.
template <int kParts, class T>
void fill_strip(const PackedLinearParams& p, const Plan& plan, std::int64_t block, std::int64_t s) {
  alignas(64) bf16 rows[kTileRows][kParts][kDepth];
  const std::int64_t first = (block * plan.strips + s) * kRows;
  for (std::int64_t k = 0; k < plan.depth; k += kDepth) {
    float* const to = p.scratch.as<float>() + plan.strip_at(block, k, s);
    for (int half = 0; half < 2; ++half) {
      for (int r = 0; r < kTileRows; ++r) {
        const std::int64_t row = std::min(first + half * kTileRows + r, plan.rows - 1);
        to_halves<kParts>(p.x.as<T>() + row * p.x.stride[0] + k, std::min(kDepth, plan.depth - k), rows[r]);
      }
      for (std::int64_t i = 0; i < plan.steps(k); ++i)
        for (int part = 0; part < kParts; ++part) {
          const float* words[kTileRows];
          for (int r = 0; r < kTileRows; ++r)
            words[r] = reinterpret_cast<const float*>(rows[r][part] + i * kTileHalves);
          store_transposed(to + (i * kParts + part) * kPairFloats + half * kTileFloats, words);
        }
    }
  }
}

// Row n of W from k on to its places in a panel, [step][kPairFloats]. What lies beyond K is 0 or, in quantised rows,
// meets zeros of x.
void fill_row(const PackedLinearParams& p, std::int64_t n, std::int64_t k, std::int64_t steps, float* panel) {
  using V = Vec<float>;
  const std::int64_t width = p.weight.size[1];
  const auto place = [&](std::int64_t i) { return reinterpret_cast<bf16*>(panel + i * kPairFloats); };
  if (p.weight.dtype == DType::bf16) {
    const bf16* const w = p.weight.as<bf16>() + n * width + k;
    const std::int64_t whole = std::min(steps, (width - k) / kTileHalves);
    for (std::int64_t i = 0; i < whole; ++i) std::memcpy(place(i), w + i * kTileHalves, kTileBytes);
    if (whole == steps) return;
    bf16 last[1][kDepth];
    to_halves<1>(w + whole * kTileHalves, width - k - whole * kTileHalves, last);
    std::memcpy(place(whole), last, kTileBytes);
  } else if (p.weight.dtype == DType::i8) {
    const std::int8_t* w = p.weight.as<std::int8_t>() + n * width + k;
    const bf16* const scales = p.scale.as<bf16>() + n * p.scale.size[1] + k / kBlock;
    for (std::int64_t i = 0; i < steps; ++i, w += kTileHalves) {
      const V scale(to_float(scales[i * kTileHalves / kBlock]));
      store_halves(place(i), load(w) * scale, load(w + V::N) * scale);
    }
  } else {
    const std::uint8_t* const bytes = p.weight.as<std::uint8_t>() + n * width + k / 2;
    const std::int64_t group = n * p.scale.size[1] + k / kTileHalves;
    for (std::int64_t i = 0; i < steps; ++i) {
      const std::uint8_t* const w = bytes + i / 2 * kTileHalves;
      const V scale(to_float(p.scale.as<bf16>()[group + i])), minimum(to_float(p.minimum.as<bf16>()[group + i]));
      const V a = i % 2 ? high_halves(w) : low_halves(w), b = i % 2 ? high_halves(w + V::N) : low_halves(w + V::N);
      store_halves(place(i), fma(a, scale, minimum), fma(b, scale, minimum));
    }
  }
}

// Rows [first, first + kRows) of W, of which there are `outputs` or the last is repeated. Asks for what the same rows
// have further on: it is needed four panels later.
[[gnu::noinline]] void fill_panel(const PackedLinearParams& p, std::int64_t first, std::int64_t outputs, std::int64_t k,
                                  std::int64_t steps, float* panel) {
  const std::int64_t bits = p.weight.dtype == DType::bf16 ? 16 : p.weight.dtype == DType::i8 ? 8 : 4;
  const std::int64_t row = p.weight.size[1] * std::max<std::int64_t>(bits / 8, 1), next = (k + kDepth) * bits / 8;
  for (std::int64_t j = 0; j < kRows; ++j) {
    const std::int64_t n = first + std::min(j, outputs - 1);
    fill_row(p, n, k, steps, panel + j / kTileRows * kTileFloats + j % kTileRows * (kTileFloats / kTileRows));
    if (next < row) prefetch_l2(p.weight.as<char>() + n * row + next, std::min(kDepth * bits / 8, row - next));
  }
}

// Where the sums of two times 16 outputs and two times 16 rows lie: (outputs, rows).
using Sums = float* [2][2];

// sums += panel strip over so many steps; the first time they are written. Without the second half of a strip its sums
// are left alone.
template <int kParts, bool kWhole>
[[gnu::noinline]] void add(const float* panel, const float* strip, std::int64_t steps, bool first, const Sums& sums) {
  if (first) {
    clear_tile_register<0>(), clear_tile_register<1>(), clear_tile_register<2>(), clear_tile_register<3>();
  } else {
    load_tile_register<0>(sums[0][0]), load_tile_register<2>(sums[1][0]);
    if constexpr (kWhole) load_tile_register<1>(sums[0][1]), load_tile_register<3>(sums[1][1]);
  }
  for (std::int64_t i = 0; i < steps; ++i, panel += kPairFloats) {
    load_tile_register<4>(panel), load_tile_register<5>(panel + kTileFloats);
#pragma GCC unroll 3
    for (int part = 0; part < kParts; ++part, strip += kPairFloats) {
      load_tile_register<6>(strip);
      if constexpr (kWhole) load_tile_register<7>(strip + kTileFloats);
      dot_halves<0, 4, 6>();
      if constexpr (kWhole) dot_halves<1, 4, 7>();
      dot_halves<2, 5, 6>();
      if constexpr (kWhole) dot_halves<3, 5, 7>();
    }
  }
  store_tile_register<0>(sums[0][0]), store_tile_register<2>(sums[1][0]);
  if constexpr (kWhole) store_tile_register<1>(sums[0][1]), store_tile_register<3>(sums[1][1]);
}

// Tile (o, r) of a task's sums: 16 outputs of 16 rows.
float* sums_at(float* sums, std::int64_t row_tiles, std::int64_t o, std::int64_t r) {
  return sums + (o * row_tiles + r) * kTileFloats;
}

// The task's sums, 16 rows at a time, to y.
template <class T>
void finish_task(const PackedLinearParams& p, const Plan& plan, std::int64_t row0, Range outputs, float* sums,
                 std::int64_t row_tiles) {
  const std::int64_t share = p.activation == Activation::swiglu ? kOutputs / 2 : kOutputs;
  alignas(64) float rows[kTileRows][kOutputs];
  for (std::int64_t t = 0; t < row_tiles && row0 + t * kTileRows < plan.rows; ++t) {
    for (std::int64_t o = 0; o < kOutputs / kTileRows; ++o) {
      const float* const tile = sums_at(sums, row_tiles, o, t);
      const float* words[kTileRows];
      for (int i = 0; i < kTileRows; ++i) words[i] = tile + i * kTileRows;
      store_transposed(&rows[0][o * kTileRows], words, kOutputs);
    }
    const std::int64_t first = row0 + t * kTileRows, count = std::min<std::int64_t>(kTileRows, plan.rows - first);
    for (std::int64_t r = first + kTileRows; r < std::min(first + 2 * kTileRows, plan.rows); ++r)
      prefetch(p.y.as<T>() + r * plan.outputs + outputs.begin,
               (outputs.end - outputs.begin) * static_cast<std::int64_t>(sizeof(T)));
    for (std::int64_t r = 0; r < count; ++r)
      finish<T>(p, first + r, outputs.begin, outputs.end - outputs.begin, rows[r], rows[r] + share);
  }
}

// sums of outputs [c, c + kRows) of a task, all strips, over the part of K that the panel has.
template <int kParts>
void add_panel(const Plan& plan, std::int64_t block, std::int64_t k, std::int64_t c, const float* shared,
               const float* panel, float* sums) {
  const std::int64_t strips = plan.strips_of(block), steps = plan.steps(k), o = c / kTileRows;
  const std::int64_t rows = plan.rows - block * plan.strips * kRows;
  for (std::int64_t s = 0; s < strips; ++s) {
    const float* const strip = shared + plan.strip_at(block, k, s);
    const Sums at = {{sums_at(sums, 2 * strips, o, 2 * s), sums_at(sums, 2 * strips, o, 2 * s + 1)},
                     {sums_at(sums, 2 * strips, o + 1, 2 * s), sums_at(sums, 2 * strips, o + 1, 2 * s + 1)}};
    if (rows - s * kRows > kTileRows)
      add<kParts, true>(panel, strip, steps, k == 0, at);
    else
      add<kParts, false>(panel, strip, steps, k == 0, at);
  }
}

// Outputs of one task; with SwiGLU half as many, and the same of the other half of W.
template <int kParts, class T>
void run_task(const PackedLinearParams& p, const Plan& plan, std::int64_t block, std::int64_t task, float* memory) {
  const std::int64_t share = p.activation == Activation::swiglu ? kOutputs / 2 : kOutputs, first = task * share;
  const std::int64_t count = std::min(share, plan.outputs - first);
  float *const panel = memory, *const sums = memory + kPanelFloats;
  {
    const Tiles tiles;
    for (std::int64_t k = 0; k < plan.depth; k += kDepth)
      for (std::int64_t c = 0; c < kOutputs; c += kRows) {
        const std::int64_t within = c % share, half = c / share;
        if (within >= count) continue;
        fill_panel(p, half * plan.outputs + first + within, count - within, k, plan.steps(k), panel);
        add_panel<kParts>(plan, block, k, c, p.scratch.as<float>(), panel, sums);
      }
  }
  finish_task<T>(p, plan, block * plan.strips * kRows, {first, first + count}, sums, 2 * plan.strips_of(block));
}

template <int kParts, class T>
void run(const PackedLinearParams& p, std::int64_t threads) {
  const Plan plan(p, kParts);
  const std::int64_t share = p.activation == Activation::swiglu ? kOutputs / 2 : kOutputs;
  const std::int64_t tasks = (plan.outputs + share - 1) / share;
  for (std::int64_t block = 0; block < plan.blocks; ++block) {
    const std::int64_t strips = plan.strips_of(block);
    parallel_for(strips, strips * kRows * plan.depth, [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t s = begin; s < end; ++s) fill_strip<kParts, T>(p, plan, block, s);
    });
    const std::int64_t work = strips * kRows * plan.outputs * plan.depth;
    parallel_tasks(tasks, work, threads, [&](std::int64_t task, std::int64_t worker) {
      run_task<kParts, T>(p, plan, block, task, p.scratch.as<float>() + plan.shared + worker * plan.own);
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
  return Plan(p, is_one_part(p) ? 1 : 3).bytes(threads);
}

void linear_amx(const PackedLinearParams& p, std::int64_t threads) {
  with_x_type(p.x.dtype, [&](auto t) {
    using T = decltype(t);
    if constexpr (!std::is_same_v<T, bf16>)
      if (!is_one_part(p)) return run<3, T>(p, threads);
    run<1, T>(p, threads);
  });
}

#else

bool is_linear_amx(const PackedLinearParams&) { return false; }
std::int64_t linear_amx_scratch_bytes(const PackedLinearParams&, std::int64_t) { return 0; }
void linear_amx(const PackedLinearParams&, std::int64_t) {}

#endif

}  // namespace qvl::cpu
