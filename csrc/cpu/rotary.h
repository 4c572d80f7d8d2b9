// Rotary position embedding of queries and keys in one pass, with or without an RMSNorm of each row before it.
//
// Regime: memory for a prompt; for a decode step (24 rows of 128) the call itself. A row of D elements of s bytes is
// read and written once: 2 D s bytes (4 D s when norm and rotation follow each other), and cos and sin once a token:
// rows are walked in the order of the queries' memory, (B, L, H, D) in a model, so that all heads of a token find them
// in L1. A row's halves are rotated together, as each needs the other: a vector of the first, one of the second, 4
// products, 2 additions. The row's squares are summed first; the second look at its D s <= 1 KiB finds them in L1.
#pragma once

#include <algorithm>
#include <cmath>

#include "../params.h"
#include "../rows.h"
#include "dispatch.h"
#include "parallel.h"
#include "vec.h"

namespace qvl::cpu {

template <class A>
struct Angles {
  const A *cos, *sin;
};

// The first n lanes (of the last vector), or all.
template <class T>
Vec<Acc<T>> load_lanes(const T* p, int n) {
  return n == Vec<Acc<T>>::N ? load(p) : load(p, n);
}

template <class T>
Acc<T> sum_of_squares(const T* x, std::int64_t dim) {
  using V = Vec<Acc<T>>;
  V square[2];
  clear(square);
  std::int64_t c = 0;
  for (; c + 2 * V::N <= dim; c += 2 * V::N)
    for (int i = 0; i < 2; ++i) {
      const V h = load(x + c + i * V::N);
      square[i] = fma(h, h, square[i]);
    }
  for (; c < dim; c += V::N) {
    const V h = load_lanes(x + c, static_cast<int>(std::min<std::int64_t>(V::N, dim - c)));
    square[0] = fma(h, h, square[0]);
  }
  return sum(square[0] + square[1]);
}

// Lanes [c, c + n) of both halves. `norm` maps a vector of elements and their index to what is rotated.
template <class T, class Norm>
[[gnu::always_inline]] inline void rotate_lanes(const T* x, Angles<Acc<T>> angles, T* y, std::int64_t half,
                                                std::int64_t c, int n, const Norm& norm) {
  using V = Vec<Acc<T>>;
  const V a = norm(load_lanes(x + c, n), c, n), b = norm(load_lanes(x + half + c, n), half + c, n);
  const V first = a * load_lanes(angles.cos + c, n) - b * load_lanes(angles.sin + c, n);
  const V second = fma(b, load_lanes(angles.cos + half + c, n), a * load_lanes(angles.sin + half + c, n));
  if (n == V::N) {
    store(y + c, first), store(y + half + c, second);
  } else {
    store(y + c, first, n), store(y + half + c, second, n);
  }
}

template <class T, class Norm>
void rotate_row(const T* x, Angles<Acc<T>> angles, T* y, std::int64_t half, const Norm& norm) {
  constexpr int N = Vec<Acc<T>>::N;
  std::int64_t c = 0;
  for (; c + N <= half; c += N) rotate_lanes(x, angles, y, half, c, N, norm);
  if (const int rest = static_cast<int>(half - c); rest > 0) rotate_lanes(x, angles, y, half, c, rest, norm);
}

// One of the two tensors: where its rows are, and how one is done.
template <class T, bool kNormed>
struct RotaryRows {
  using A = Acc<T>;
  using V = Vec<A>;
  const TensorView &x, &weight, &cos, &sin, &out;
  double eps;

  void run(std::int64_t begin, std::int64_t end) const {
    if (begin >= end) return;
    const std::int64_t dim = x.size[x.ndim - 1];
    RowWalk<4> walk({&x, &out, &cos, &sin});
    walk.seek(begin);
    for (std::int64_t row = begin; row < end; ++row, walk.next()) {
      const T* from = x.as<T>() + walk[0];
      const Angles<A> angles{cos.as<A>() + walk[2], sin.as<A>() + walk[3]};
      if constexpr (kNormed) {
        const A mean = sum_of_squares(from, dim) / static_cast<A>(dim);
        const V rstd(1 / std::sqrt(mean + static_cast<A>(eps)));
        const T* w = weight.as<T>();
        rotate_row(from, angles, out.as<T>() + walk[1], dim / 2,
                   [&](V h, std::int64_t c, int n) { return h * rstd * load_lanes(w + c, n); });
      } else {
        rotate_row(from, angles, out.as<T>() + walk[1], dim / 2, [](V h, std::int64_t, int) { return h; });
      }
    }
  }
};

// Queries' rows and then keys' rows are one range, shared out among the threads.
template <class T, bool kNormed>
void rotate(const RotaryParams& p) {
  const auto rows = [](const TensorView& t) { return t.numel() ? t.numel() / t.size[t.ndim - 1] : 0; };
  const RotaryRows<T, kNormed> query{p.query, p.query_weight, p.query_cos, p.query_sin, p.query_out, p.eps};
  const RotaryRows<T, kNormed> key{p.key, p.key_weight, p.key_cos, p.key_sin, p.key_out, p.eps};
  const std::int64_t queries = rows(p.query), all = queries + rows(p.key);
  parallel_for(all, p.query.numel() + p.key.numel(), [&](std::int64_t begin, std::int64_t end) {
    query.run(begin, std::min(end, queries));
    key.run(std::max(begin, queries) - queries, end - queries);
  });
}

}  // namespace qvl::cpu
