// The products of attention_decode.cpp where keys and values are int8: integers of 15 bits times integers of 8, two to
// an instruction and with exact sums, and how queries and weights become such integers.
#pragma once

#include "attention.h"
#include "vec_linear.h"

namespace qvl::cpu {

constexpr std::int64_t kTile = 64;  // the most keys scored before their softmax

// Keys at a time for R rows.
template <int R>
constexpr int kKeys = R == 1   ? 8
                      : R == 2 ? 4
                               : 2;

// Rows that will be needed next, asked for in the order of their addresses.
template <class S>
struct Ahead {
  const S* at;
  std::int64_t row, dim, rows, column = 0;

  void ask_row() {
    if (rows <= 0) return;
    prefetch(at, dim * std::int64_t{sizeof(S)});
    at += row, --rows;
  }
  // The next n elements, or what is left of the row.
  template <int n>
  void ask() {
    if (rows <= 0) return;
    prefetch(at + column, n * std::int64_t{sizeof(S)});
    column += n;
    if (column >= dim) column = 0, at += row, --rows;
  }
};

// scores[r][j] = q[r] . key[j] for R rows and kKeys<R> keys, as for keys of other types. 256 products of 15 + 7 bits
// stay below 2^31.
template <int R, bool kVnni>
void dot_int8_keys(const std::int16_t* q, const std::int8_t* key, std::int64_t key_row, std::int64_t keys,
                   std::int64_t dim, float* scores) {
  constexpr int K = kKeys<R>;
  const std::int8_t* k[K] = {key};
#pragma GCC unroll 8
  for (int j = 1; j < K; ++j) k[j] = k[j - 1] + (j < keys ? key_row : 0);
  Ints acc[8];
#pragma GCC unroll 8
  for (Ints& a : acc) a = no_ints();
  std::int64_t d = 0;
  for (; d + Words::N <= dim; d += Words::N) {
    Words line[K];
#pragma GCC unroll 8
    for (int j = 0; j < K; ++j) line[j] = words(k[j] + d);
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      const Words x = words(q + r * kMaxDim + d);
#pragma GCC unroll 8
      for (int j = 0; j < K; ++j) acc[r * K + j] = add_products<kVnni>(acc[r * K + j], x, line[j]);
    }
  }
  float sums[8];
  eight_sums(acc, sums);
  if (d < dim)
    for (int r = 0; r < R; ++r)
      for (int j = 0; j < K; ++j) {
        std::int32_t rest = 0;
        for (std::int64_t i = d; i < dim; ++i) rest += q[r * kMaxDim + i] * k[j][i];
        sums[r * K + j] += static_cast<float>(rest);
      }
  for (int r = 0; r < R; ++r) std::memcpy(scores + r * kTile, sums + r * K, K * sizeof(float));
}

// One tile's values of 8 bits with weights of 15, w[r] = unit[r] p[r]: o[r][c] = o[r][c] shrink[r] + unit[r] sum_j
// p[r][j] v[j][c], exact sums of integers (64 products of 15 + 7 bits). Two keys at a time: their bytes, widened and
// interleaved, are pairs to multiply and add. p is 0 beyond the last key.
struct Weights {
  const std::int16_t* p;  // rows kTile apart
  const float *unit, *shrink;
};

// For R rows and W vectors of columns, or the first `columns` of them.
template <int R, int W, bool kVnni>
void add_int8_columns(const Weights& by, const std::int8_t* v, std::int64_t v_row, std::int64_t keys,
                      std::int64_t columns, Ahead<std::int8_t>& next, float* o, std::int64_t o_row) {
  using V = Vec<float>;
  Ints acc[R][W];
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int w = 0; w < W; ++w) acc[r][w] = no_ints();
  const bool all = columns >= W * V::N;
  Ahead<std::int8_t> ahead = next;
  for (std::int64_t j = 0; j < keys; j += 2, v += 2 * v_row) {
    ahead.ask<2 * W * V::N>();
    const std::int8_t* const after = j + 1 < keys ? v + v_row : v;
    Words x[R];
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) x[r] = repeat_pair(by.p + r * kTile + j);
#pragma GCC unroll 4
    for (int w = 0; w < W; w += 2) {
      const int at = w * V::N, n = static_cast<int>(columns) - at;
      const Words a = all ? words(v + at) : words(v + at, n), b = all ? words(after + at) : words(after + at, n);
      const Words low = interleave_low(a, b), high = interleave_high(a, b);
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) {
        acc[r][w] = add_products<kVnni>(acc[r][w], x[r], low);
        acc[r][w + 1] = add_products<kVnni>(acc[r][w + 1], x[r], high);
      }
    }
  }
  next = ahead;
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int w = 0; w < W; w += 2) {
      const V unit(by.unit[r]), shrink(by.shrink[r]);
      in_order(acc[r][w], acc[r][w + 1]);
#pragma GCC unroll 2
      for (int i = w; i < w + 2; ++i) {
        float* const to = o + r * o_row + i * V::N;
        const int n = static_cast<int>(columns) - i * V::N;
        if (n >= V::N)
          store(to, fma(to_float(acc[r][i]), unit, load(to) * shrink));
        else if (n > 0)
          store(to, fma(to_float(acc[r][i]), unit, load(to, n) * shrink), n);
      }
    }
}

template <int R, bool kVnni>
void add_int8_values(const Weights& by, const std::int8_t* v, std::int64_t v_row, std::int64_t keys,
                     Ahead<std::int8_t>& next, float* o, std::int64_t dim_v) {
  constexpr int W = R == 1 ? 8 : R == 2 ? 4 : 2;
  constexpr std::int64_t kColumns = W * Vec<float>::N, kPair = 2 * Vec<float>::N;
  std::int64_t c = 0;
  for (; c + kColumns <= dim_v; c += kColumns)
    add_int8_columns<R, W, kVnni>(by, v + c, v_row, keys, kColumns, next, o + c, dim_v);
  for (; c < dim_v; c += kPair)
    add_int8_columns<R, 2, kVnni>(by, v + c, v_row, keys, std::min(kPair, dim_v - c), next, o + c, dim_v);
}

// to[j] *= scale[j * stride] by
template <class A>
void multiply_each(const A* scale, std::int64_t stride, std::int64_t n, A by, A* to) {
  using V = Vec<A>;
  std::int64_t j = 0;
  if (stride == 1)
    for (; j + V::N <= n; j += V::N) store(to + j, load(to + j) * load(scale + j) * V(by));
  for (; j < n; ++j) to[j] *= scale[j * stride] * by;
}

// row = unit * integers of 15 bits and the sign, to half a unit; returns the unit. Rows and integers have room for a
// whole vector, where `row` is zero. A row that is not finite stays so: its unit is NaN.
inline float to_integers(const float* row, std::int64_t dim, std::int16_t* integers) {
  using V = Vec<float>;
  V most = V::zero(), of_all = V::zero();
  for (std::int64_t d = 0; d < dim; d += V::N) {
    const V x = load(row + d);
    most = max(most, max(x, V::zero() - x));
    of_all = fma(x, V::zero(), of_all);  // NaN where one of them is not finite
  }
  const float unit = largest(most) / 32767 + sum(of_all);
  const V inverse(unit >= std::numeric_limits<float>::min() ? 1 / unit : 0.0f);
  for (std::int64_t d = 0; d < dim; d += V::N) store_rounded(integers + d, load(row + d) * inverse);
  return unit;
}

}  // namespace qvl::cpu
