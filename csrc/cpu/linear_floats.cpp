// y = x W^T of floats, float32 and bfloat16 weights, for more rows of x than linear_decode.cpp reads the weights for: x
// is brought into panels, rows of W stay rows.
//
// Regime: from reading and arithmetic side by side (8 rows are 16 FLOPs for each weight of 2 bytes: at 25 GB/s 200
// GFLOP/s, the FMA peak of two cores with AVX2) to arithmetic alone, 2 M N K FLOPs. W would have to be brought into
// panels for every call, 6 % of the products of 512 rows and as much again as those of 32.
//
//   block   up to kMostRows rows of x, in panels of 2 N rows, transposed, [K][2 N]: 2 MiB for K = 2048, in L3
//   panel   kDepth of K at a time, 16 KiB (AVX-512 32), in L1 while a strip passes it; meanwhile the next is brought
//           from L3 to L2
//   tile    6 rows of W, every weight repeated in a vector, times one panel; of a last panel with up to N rows one
//           vector, with sums of their own for odd k (attention_tiles.h)
//   strip   up to kMostOutputs rows of W by kDepth, 48 KiB in L2 for all panels: float32 in place, bfloat16 widened
//           first (in the tile that would take the ports of FMAs and loads). While the first panel passes, the same
//           rows of the next piece of W are asked for, a line of each at a time: memory is read all the while. With
//           AVX-512, whose CPUs have 1 MiB of L2 and more, 192 KiB: panels pass four times as seldom, and the L3 of a
//           server delivers them at a third of the speed of the products
//   sums    (outputs, rows) of a strip, in L2; turned when they are finished

#include "linear.h"
#include "parallel.h"

namespace qvl::cpu {
namespace {

constexpr std::int64_t kMostRows = 256;
constexpr std::int64_t kLeastOutputs = 8 * kStrip, kMostOutputs = (Vec<float>::N == 16 ? 4 : 1) * kLeastOutputs;
constexpr std::int64_t kDepth = 256;
constexpr std::int64_t kWideRow = kDepth + 16;  // not a power of two: rows would share a few sets of L1

// Where things lie in scratch, in floats: a block's panels, and what a thread has.
struct Layout {
  std::int64_t rows;      // of a block, whole panels
  std::int64_t outputs;   // of a strip: fewer than kMostOutputs where threads would have less than four strips
  std::int64_t sums_row;  // from an output's sums to the next
  std::int64_t wide, sums, up, own;

  Layout(const PackedLinearParams& p, std::int64_t threads) : outputs(kMostOutputs) {
    while (outputs > kLeastOutputs && p.y.size[1] < 4 * threads * outputs) outputs /= 2;
    const std::int64_t all = p.x.size[0], blocks = (all + kMostRows - 1) / kMostRows;
    rows = round_up((all + blocks - 1) / blocks, kPanel<float>);
    sums_row = rows + 16;  // not a power of two, as kWideRow
    Pieces pieces;
    wide = pieces.take(p.weight.dtype == DType::f32 ? 0 : outputs * kWideRow);
    sums = pieces.take(outputs * sums_row);
    up = pieces.take(p.activation == Activation::swiglu ? outputs * sums_row : 0);
    own = pieces.size();
  }
};

// W's rows that are needed next, row_bytes apart.
struct Next {
  const char* at;
  std::int64_t row_bytes;

  void ask(std::int64_t byte) const {
    const char* line = at + byte;
#pragma GCC unroll 6
    for (int r = 0; r < kStrip; ++r, line += row_bytes) prefetch_l2(line);
  }
};

// Rows of W, `apart` from each other, of which the first `count` exist.
struct Rows {
  const float* first;
  std::int64_t apart, count;
};

// sums[r * sums_row + j] += sum over k < depth of w[r, k] panel[k][j] for the panel's first kVectors vectors. A line of
// a row of W is kLine weights; `next`, if any, is asked for meanwhile.
template <int kVectors, int kLine>
void add_tile(const Rows& w, const float* panel, std::int64_t depth, const Next* next, float* sums,
              std::int64_t sums_row) {
  using V = Vec<float>;
  const float* row[kStrip];
  for (int r = 0; r < kStrip; ++r) row[r] = w.first + std::min<std::int64_t>(r, w.count - 1) * w.apart;
  Tile<float> acc;
  clear_tile<float>(acc);
  const auto add = [&](std::int64_t k, int odd) __attribute__((always_inline)) {
    const V b0 = load(panel + k * kPanel<float>), b1 = kVectors == 2 ? load(panel + k * kPanel<float> + V::N) : b0;
#pragma GCC unroll 6
    for (int r = 0; r < kStrip; ++r) {
      const V x(row[r][k]);
      if constexpr (kVectors == 2) {
        acc[r][0] = add_product(acc[r][0], x, b0);
        acc[r][1] = add_product(acc[r][1], x, b1);
      } else {
        acc[r][odd] = add_product(acc[r][odd], x, b0);
      }
    }
  };
  std::int64_t k = 0;
  if (next != nullptr)
    for (; k + kLine <= depth; k += kLine) {
      next->ask(k * 64 / kLine);
      for (std::int64_t i = k; i < k + kLine; i += 2) add(i, 0), add(i + 1, 1);
    }
  for (; k + 2 <= depth; k += 2) add(k, 0), add(k + 1, 1);
  if (k < depth) add(k, 0);
#pragma GCC unroll 6
  for (int r = 0; r < kStrip; ++r) {
    float* const to = sums + r * sums_row;
    if constexpr (kVectors == 2) {
      store(to, load(to) + acc[r][0]);
      store(to + V::N, load(to + V::N) + acc[r][1]);
    } else {
      store(to, load(to) + (acc[r][0] + acc[r][1]));
    }
  }
}

// Rows [first_row, first_row + rows) of x with all of W, whose elements are of type W.
template <class W>
struct Block {
  const PackedLinearParams& p;
  const Layout& at;
  std::int64_t first_row, rows;
  const std::int64_t k = p.x.size[1];

  const W* weights(std::int64_t output) const { return p.weight.as<W>() + output * k; }
  float* panels(std::int64_t depth) const { return p.scratch.as<float>() + depth * at.rows; }

  template <class T>
  void pack(std::int64_t depth) const {
    pack_transposed(p.x.as<T>() + first_row * p.x.stride[0] + depth, p.x.stride[0], rows, std::min(kDepth, k - depth),
                    panels(depth));
  }

  // The panel of rows from `row` on at `depth`.
  const float* panel(std::int64_t row, std::int64_t depth) const {
    return panels(depth) + row * std::min(kDepth, k - depth);
  }

  // Asks for a part of the panel after that one: each of a strip's tiles does for its own.
  void ask_next_panel(std::int64_t row, std::int64_t depth, std::int64_t tile) const {
    row += kPanel<float>;
    if (row >= rows) row = 0, depth += kDepth;
    if (depth >= k) return;
    const std::int64_t part = std::min(kDepth, k - depth) * kPanel<float> / (at.outputs / kStrip);
    prefetch_l2(panel(row, depth) + tile * part, part * static_cast<std::int64_t>(sizeof(float)));
  }

  // sums[output * at.sums_row + row] of outputs [first, first + count); those from `next` on are computed after them.
  void add_strip(std::int64_t first, std::int64_t count, std::int64_t next, float* wide, float* sums) const {
    constexpr bool kInPlace = std::is_same_v<W, float>;
    constexpr std::int64_t kBytes = sizeof(W), kLine = 64 / kBytes;
    std::fill_n(sums, at.outputs * at.sums_row, 0.0f);
    for (std::int64_t d = 0; d < k; d += kDepth) {
      const std::int64_t depth = std::min(kDepth, k - d);
      const W *const from = weights(first) + d, *const soon = d + kDepth < k ? from + kDepth : weights(next);
      if constexpr (!kInPlace)
        for (std::int64_t n = 0; n < count; ++n) widen(from + n * k, depth, depth, wide + n * kWideRow);
      for (std::int64_t row = 0; row < rows; row += kPanel<float>)
        for (std::int64_t n = 0; n < count; n += kStrip) {
          const auto add = rows - row > Vec<float>::N ? add_tile<2, kLine> : add_tile<1, kLine>;
          Rows w{wide + n * kWideRow, kWideRow, std::min<std::int64_t>(kStrip, count - n)};
          if constexpr (kInPlace) w.first = from + n * k, w.apart = k;
          const Next asked{reinterpret_cast<const char*>(soon + n * k), k * kBytes};
          ask_next_panel(row, d, n / kStrip);
          add(w, panel(row, d), depth, row == 0 ? &asked : nullptr, sums + n * at.sums_row + row, at.sums_row);
        }
    }
  }

  // `count` outputs from `first` on of eight rows, from sums to y.
  template <class T>
  void finish_rows(std::int64_t row, std::int64_t first, std::int64_t count, const float* sums, const float* up) const {
    alignas(64) float turned[2][8][kMostOutputs + Vec<float>::N];
    const float* const halves[2] = {sums, up};
    for (int half = 0; half < (p.activation == Activation::swiglu ? 2 : 1); ++half)
      for (std::int64_t n = 0; n < at.outputs; n += 8) {
        const float* from[8];
        for (int i = 0; i < 8; ++i) from[i] = halves[half] + (n + i) * at.sums_row + row;
        transpose8x8(from, turned[half][0] + n, kMostOutputs + Vec<float>::N);
      }
    for (std::int64_t i = 0; i < std::min<std::int64_t>(8, rows - row); ++i)
      finish<T>(p, first_row + row + i, first, count, turned[0][i], turned[1][i]);
  }

  // Outputs [first, last), strip by strip.
  template <class T>
  void run(std::int64_t first, std::int64_t last, float* own) const {
    float *const wide = own + at.wide, *const sums = own + at.sums, *const up = own + at.up;
    for (std::int64_t n = first; n < last; n += at.outputs) {
      const std::int64_t count = std::min(at.outputs, last - n), half = p.y.size[1];
      const std::int64_t next = n + at.outputs < last ? n + at.outputs : n;
      const bool gated = p.activation == Activation::swiglu;
      add_strip(n, count, gated ? half + n : next, wide, sums);
      if (gated) add_strip(half + n, count, next, wide, up);
      for (std::int64_t row = 0; row < rows; row += 8) finish_rows<T>(row, n, count, sums, up);
    }
  }
};

template <class W, class T>
void run(const PackedLinearParams& p, std::int64_t threads) {
  const Layout at(p, threads);
  const std::int64_t k = p.x.size[1], outputs = p.y.size[1], depths = (k + kDepth - 1) / kDepth;
  const std::int64_t strips = (outputs + at.outputs - 1) / at.outputs;
  // A task is several strips, since what comes after its last is not known.
  const std::int64_t tasks = std::min(strips, 16 * threads);
  for (std::int64_t first = 0; first < p.x.size[0]; first += at.rows) {
    const Block<W> block{p, at, first, std::min(at.rows, p.x.size[0] - first)};
    parallel_for(depths, block.rows * k, [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t i = begin; i < end; ++i) block.template pack<T>(i * kDepth);
    });
    parallel_tasks(tasks, outputs * k * block.rows, threads, [&](std::int64_t task, std::int64_t worker) {
      block.template run<T>(strips * task / tasks * at.outputs,
                            std::min(outputs, strips * (task + 1) / tasks * at.outputs),
                            p.scratch.as<float>() + round_up(at.rows * k, 16) + worker * at.own);
    });
  }
}

}  // namespace

std::int64_t linear_floats_scratch_bytes(const PackedLinearParams& p, std::int64_t threads) {
  const Layout at(p, threads);
  return (round_up(at.rows * p.x.size[1], 16) + threads * at.own) * static_cast<std::int64_t>(sizeof(float));
}

void linear_floats(const PackedLinearParams& p, std::int64_t threads) {
  with_x_type(p.x.dtype, [&](auto t) {
    if (p.weight.dtype == DType::f32)
      run<float, decltype(t)>(p, threads);
    else
      run<bf16, decltype(t)>(p, threads);
  });
}

}  // namespace qvl::cpu
