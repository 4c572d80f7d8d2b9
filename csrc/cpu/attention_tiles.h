// The register tile of the attention kernels, and the packing that feeds it.
//
// Every product of attention, forward and backward, is acc[r][w] += sum_k a[r, k] b[k, w] for kStrip = 6 rows and two
// vectors: 12 accumulators hide the latency of 4 x 2 FMAs, and 2 loads and 6 broadcasts feed 12 of them. With the
// operand named `a` packed or tiled so that its strides are constants, one pointer and constant offsets address it:
//
//   product         a                      stride of r, k    b
//   S = Q K^T       strip of Q, [D][6]     1, 6              panel of K^T, [D][2 N]
//   O += P V        strip of P, [6][tile]  tile, 1           rows of V
//   dV += P^T dO    six columns of P       1, tile           rows of dO
#pragma once

#include "attention.h"

namespace qvl::cpu {

constexpr int kStrip = 6;

template <class A>
constexpr int kPanel = 2 * Vec<A>::N;

template <class A>
using Tile = Vec<A>[kStrip][2];

template <class A>
void load_tile(const A* from, std::int64_t row, Tile<A>& acc) {
  for (int r = 0; r < kStrip; ++r) {
    acc[r][0] = load(from + r * row);
    acc[r][1] = load(from + r * row + Vec<A>::N);
  }
}

template <class A>
void store_tile(A* to, std::int64_t row, const Tile<A>& acc) {
  for (int r = 0; r < kStrip; ++r) {
    store(to + r * row, acc[r][0]);
    store(to + r * row + Vec<A>::N, acc[r][1]);
  }
}

// acc[r][w] += sum over k < count of a[r Row + k Step] b[k b_row + w N].
template <int Row, int Step, class A>
void multiply_add(const A* a, const A* b, std::int64_t b_row, std::int64_t count, Tile<A>& acc) {
  using V = Vec<A>;
  for (std::int64_t k = 0; k < count; ++k, a += Step, b += b_row) {
    const V b0 = load(b), b1 = load(b + V::N);
    for (int r = 0; r < kStrip; ++r) {
      const V x(a[r * Row]);
      acc[r][0] = fma(x, b0, acc[r][0]);
      acc[r][1] = fma(x, b1, acc[r][1]);
    }
  }
}

// One strip against one panel: s[r * row + j] = q[r] . k[j].
template <class A>
void score_panel(const A* strip, const A* panel, std::int64_t dim, A* s, std::int64_t row) {
  Tile<A> acc;
  multiply_add<1, kStrip>(strip, panel, kPanel<A>, dim, acc);
  store_tile(s, row, acc);
}

// Row r of a block, scaled, into its place among the strips [strip][D][6].
template <class A>
void to_strip(const A* from, std::int64_t dim, A scale, std::int64_t r, A* strips) {
  A* to = strips + r / kStrip * kStrip * dim + r % kStrip;
  for (std::int64_t d = 0; d < dim; ++d) to[d * kStrip] = from[d] * scale;
}

template <class A>
void transpose_eight(const A* const (&rows)[8], std::int64_t dim, A* to) {
  std::int64_t d = 0;
  if constexpr (std::is_same_v<A, float>)
    for (; d + 8 <= dim; d += 8) {
      const A* from[8];
      for (int i = 0; i < 8; ++i) from[i] = rows[i] + d;
      transpose8x8(from, to + d * kPanel<A>, kPanel<A>);
    }
  for (; d < dim; ++d)
    for (int i = 0; i < 8; ++i) to[d * kPanel<A> + i] = rows[i][d];
}

// Keys (or values) in rows of T to panels [panel][D][2 N], zeros for what fills up the last panel.
template <class T>
void pack_panels(const T* from, std::int64_t row, std::int64_t keys, std::int64_t dim, Acc<T>* to) {
  using A = Acc<T>;
  A wide[8][kMaxDim];
  for (std::int64_t j = 0; j < round_up(keys, kPanel<A>); j += 8) {
    const A* rows[8];
    for (int i = 0; i < 8; ++i) {
      rows[i] = wide[i];
      if (j + i >= keys) {
        std::fill_n(wide[i], dim, A(0));
      } else if constexpr (std::is_same_v<T, A>) {
        rows[i] = from + (j + i) * row;
      } else {
        widen(from + (j + i) * row, dim, dim, wide[i]);
      }
    }
    transpose_eight(rows, dim, to + j / kPanel<A> * kPanel<A> * dim + j % kPanel<A>);
  }
}

// Rows of T to rows of the compute type, `padded` wide, zeros beyond `dim`.
template <class T>
void widen_rows(const T* from, std::int64_t row, std::int64_t rows, std::int64_t dim, std::int64_t padded, Acc<T>* to) {
  for (std::int64_t j = 0; j < rows; ++j) widen(from + j * row, dim, padded, to + j * padded);
}

}  // namespace qvl::cpu
