// The register tile of the attention kernels, and the packing that feeds it.
//
// Every product of attention, forward and backward, is acc[r][w] += sum_k a[r, k] b[k, w] for kStrip = 6 rows and two
// vectors: 12 accumulators hide the latency of 4 x 2 FMAs, and 2 loads and 6 broadcasts feed 12 of them.
//
//   product         a                      stride of r, k    b
//   S = Q K^T       rows of Q, or strip    D, 1 or 1, 6      panel of keys, [D][2 N]
//   O += P V        six rows of P          tile, 1           panel of V's columns, [tile][2 N]
//   dV += P^T dO    six columns of P       1, tile           panel of dO's columns, [rows][2 N]
//
// `b` is always packed as contiguous panels: rows of a tensor in place lie a power of two apart, and lines of one
// column panel would then share a few sets of the L1 cache. One panel (D 2 N floats, 8 KiB for D = 128 on AVX2) stays
// in L1 while several strips pass it.
#pragma once

#include "attention.h"

namespace qvl::cpu {

constexpr int kStrip = 6;

template <class A>
constexpr int kPanel = 2 * Vec<A>::N;

template <class A>
using Tile = Vec<A>[kStrip][2];

template <class A>
[[gnu::always_inline]] inline void clear_tile(Tile<A>& acc) {
#pragma GCC unroll 6
  for (auto& row : acc) clear(row);
}

template <class A>
[[gnu::always_inline]] inline void load_tile(const A* from, std::int64_t row, Tile<A>& acc) {
#pragma GCC unroll 6
  for (int r = 0; r < kStrip; ++r) {
    acc[r][0] = load(from + r * row);
    acc[r][1] = load(from + r * row + Vec<A>::N);
  }
}

template <class A>
[[gnu::always_inline]] inline void store_tile(A* to, std::int64_t row, const Tile<A>& acc) {
#pragma GCC unroll 6
  for (int r = 0; r < kStrip; ++r) {
    store(to + r * row, acc[r][0]);
    store(to + r * row + Vec<A>::N, acc[r][1]);
  }
}

// acc[r] *= by[r]
template <class A>
[[gnu::always_inline]] inline void multiply_tile(const A* by, Tile<A>& acc) {
#pragma GCC unroll 6
  for (int r = 0; r < kStrip; ++r) {
    acc[r][0] = acc[r][0] * Vec<A>(by[r]);
    acc[r][1] = acc[r][1] * Vec<A>(by[r]);
  }
}

// acc[r][w] += sum over k < count of a[r Row + k Step] panel[k][w]. Two steps at a time: 94 to 100 % of the FMA peak
// from L1; four lose a tenth on AVX2, where long displacements no longer fit the decoded-instruction cache. Inlined
// always: behind a call the accumulators would live in memory.
template <int Row, int Step, class A>
[[gnu::always_inline]] inline void multiply_add(const A* a, const A* panel, std::int64_t count, Tile<A>& acc) {
  using V = Vec<A>;
  constexpr int kUnroll = 2;
  std::int64_t k = 0;
  for (; k + kUnroll <= count; k += kUnroll, a += kUnroll * Step, panel += kUnroll * kPanel<A>) {
#pragma GCC unroll 2
    for (int i = 0; i < kUnroll; ++i) {
      const V b0 = load(panel + i * kPanel<A>), b1 = load(panel + i * kPanel<A> + V::N);
#pragma GCC unroll 6
      for (int r = 0; r < kStrip; ++r) {
        const V x(a[r * Row + i * Step]);
        acc[r][0] = add_product(acc[r][0], x, b0);
        acc[r][1] = add_product(acc[r][1], x, b1);
      }
    }
  }
  for (; k < count; ++k, a += Step, panel += kPanel<A>) {
    const V b0 = load(panel), b1 = load(panel + V::N);
#pragma GCC unroll 6
    for (int r = 0; r < kStrip; ++r) {
      const V x(a[r * Row]);
      acc[r][0] = add_product(acc[r][0], x, b0);
      acc[r][1] = add_product(acc[r][1], x, b1);
    }
  }
}

// acc[r][w] += sum over k < count of a[r row + k] panel[k][w]: rows in place, a run-time stride apart.
template <class A>
[[gnu::always_inline]] inline void multiply_add_rows(const A* a, std::int64_t row, const A* panel, std::int64_t count,
                                                     Tile<A>& acc) {
  using V = Vec<A>;
  const A* const rows[kStrip] = {a, a + row, a + 2 * row, a + 3 * row, a + 4 * row, a + 5 * row};
  std::int64_t k = 0;
  const auto step = [&](std::int64_t i) __attribute__((always_inline)) {
    const V b0 = load(panel + i * kPanel<A>), b1 = load(panel + i * kPanel<A> + V::N);
#pragma GCC unroll 6
    for (int r = 0; r < kStrip; ++r) {
      const V x(rows[r][i]);
      acc[r][0] = add_product(acc[r][0], x, b0);
      acc[r][1] = add_product(acc[r][1], x, b1);
    }
  };
  for (; k + 2 <= count; k += 2) step(k), step(k + 1);
  if (k < count) step(k);
}

// The same for the first vector of the panel alone: even and odd k have sums of their own, which hides the latency.
template <class A>
[[gnu::always_inline]] inline void multiply_add_half(const A* a, std::int64_t row, const A* panel, std::int64_t count,
                                                     Tile<A>& acc) {
  using V = Vec<A>;
  const A* const rows[kStrip] = {a, a + row, a + 2 * row, a + 3 * row, a + 4 * row, a + 5 * row};
  std::int64_t k = 0;
  const auto step = [&](std::int64_t i, int odd) __attribute__((always_inline)) {
    const V b = load(panel + i * kPanel<A>);
#pragma GCC unroll 6
    for (int r = 0; r < kStrip; ++r) acc[r][odd] = add_product(acc[r][odd], V(rows[r][i]), b);
  };
  for (; k + 2 <= count; k += 2) step(k, 0), step(k + 1, 1);
  if (k < count) step(k, 0);
}

// Six rows in place, `a` apart, against the first `keys` of one panel: s[r * row + j] = a[r] . panel[j].
template <class A>
void score_rows(const A* a, std::int64_t a_row, const A* panel, std::int64_t dim, std::int64_t keys, A* s,
                std::int64_t row) {
  Tile<A> acc;
  clear_tile<A>(acc);
  if (keys > Vec<A>::N) {
    multiply_add_rows(a, a_row, panel, dim, acc);
    store_tile(s, row, acc);
    return;
  }
  multiply_add_half(a, a_row, panel, dim, acc);
#pragma GCC unroll 6
  for (int r = 0; r < kStrip; ++r) store(s + r * row, acc[r][0] + acc[r][1]);
}

// One strip against one panel: s[r * row + j] = strip[r] . panel[j].
template <class A>
void score_panel(const A* strip, const A* panel, std::int64_t dim, A* s, std::int64_t row) {
  Tile<A> acc;
  clear_tile<A>(acc);
  multiply_add<1, kStrip>(strip, panel, dim, acc);
  store_tile(s, row, acc);
}

// row[i] *= by
template <class A>
void multiply(A* row, Vec<A> by, std::int64_t n) {
  std::int64_t i = 0;
  for (; i + Vec<A>::N <= n; i += Vec<A>::N) store(row + i, load(row + i) * by);
  if (const int rest = static_cast<int>(n - i); rest > 0) store(row + i, load(row + i, rest) * by, rest);
}

// to[i] = by * from[i]
template <class S, class A>
void widen_scaled(const S* from, std::int64_t n, Vec<A> by, A* to) {
  std::int64_t i = 0;
  for (; i + Vec<A>::N <= n; i += Vec<A>::N) store(to + i, load(from + i) * by);
  if (const int rest = static_cast<int>(n - i); rest > 0) store(to + i, load(from + i, rest) * by, rest);
}

// A row to place k of its column panels [panel][count][2 N], zeros beyond `dim`.
template <class S, class A>
void to_panels(const S* from, std::int64_t dim, std::int64_t k, std::int64_t count, A* panels, A scale = A(1)) {
  using V = Vec<A>;
  const V by(scale);
  A* to = panels + k * kPanel<A>;
  std::int64_t c = 0;
  for (; c + kPanel<A> <= dim; c += kPanel<A>, to += count * kPanel<A>) {
    store(to, load(from + c) * by);
    store(to + V::N, load(from + c + V::N) * by);
  }
  if (c == dim) return;
  widen(from + c, dim - c, kPanel<A>, to);
  multiply(to, by, kPanel<A>);
}

// to[d * stride + i] = rows[i][d]; the last line may be followed by 8 - stride more elements.
template <class A>
void transpose_eight(const A* const (&rows)[8], std::int64_t dim, A* to, std::int64_t stride) {
  std::int64_t d = 0;
  if constexpr (std::is_same_v<A, float>)
    for (; d + 8 <= dim; d += 8) {
      const A* from[8];
      for (int i = 0; i < 8; ++i) from[i] = rows[i] + d;
      transpose8x8(from, to + d * stride, stride);
    }
  for (; d < dim; ++d)
    for (int i = 0; i < std::min<int>(8, stride); ++i) to[d * stride + i] = rows[i][d];
}

// Six rows to one strip [D][6], and up to kStripSlack elements beyond.
constexpr int kStripSlack = 2;
template <class A>
void to_strip(const A* rows, std::int64_t row, std::int64_t dim, A* strip) {
  const A* eight[8];
  for (int i = 0; i < 8; ++i) eight[i] = rows + std::min(i, kStrip - 1) * row;
  transpose_eight(eight, dim, strip, kStrip);
}

// Rows, transposed, to panels of rows [panel][D][2 N], zeros for what fills up the last panel. With `scale` row j is
// multiplied by scale[j * scale_row].
template <class S, class A>
void pack_transposed(const S* from, std::int64_t row, std::int64_t rows, std::int64_t dim, A* to,
                     const A* scale = nullptr, std::int64_t scale_row = 0) {
  A wide[8][kMaxDim];
  for (std::int64_t j = 0; j < round_up(rows, kPanel<A>); j += 8) {
    A* const panel = to + j / kPanel<A> * kPanel<A> * dim + j % kPanel<A>;
    if (j >= rows) {
      for (std::int64_t d = 0; d < dim; ++d) std::fill_n(panel + d * kPanel<A>, 8, A(0));
      continue;
    }
    // Rows of a tensor (L, H, D) lie apart: nothing but this reads ahead.
    for (std::int64_t i = j + 8; i < std::min(j + 16, rows); ++i)
      prefetch(from + i * row, dim * static_cast<std::int64_t>(sizeof(S)));
    const A* eight[8];
    for (int i = 0; i < 8; ++i) {
      eight[i] = wide[i];
      if (j + i >= rows) {
        std::fill_n(wide[i], dim, A(0));
      } else if constexpr (std::is_same_v<S, A>) {
        eight[i] = from + (j + i) * row;
      } else {
        widen(from + (j + i) * row, dim, dim, wide[i]);
        if (scale != nullptr) multiply(wide[i], Vec<A>(scale[(j + i) * scale_row]), dim);
      }
    }
    transpose_eight(eight, dim, panel, kPanel<A>);
  }
}

}  // namespace qvl::cpu
