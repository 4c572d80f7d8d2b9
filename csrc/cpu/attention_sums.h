// What the dense and the sparse forward kernel share: online softmax of a strip, and the way of its sums to the output.
// Scores of a strip are rows of kScoreRow keys: four strips of 192 floats are 18 KiB of L1.
#pragma once

#include "attention_tiles.h"

namespace qvl::cpu {

constexpr int kScoreRow = 192;
constexpr int kGroup = 4;  // strips that pass a panel while it is in L1

// With the tops as they are, scores [begin, padded) of a strip to 2^(score - top), and their sums to the totals; false,
// and nothing but the scores changed, where they will not do.
template <class A>
bool soften_relative(const A* top, A* total, std::int64_t begin, std::int64_t padded, A* scores) {
  using V = Vec<A>;
  V added[kStrip], largest = V::zero();
  clear(added);
  for (int r = 0; r < kStrip; ++r) {
    const V shift(top[r]), most(A(127));
    for (std::int64_t j = begin; j < padded; j += V::N) {
      const V e = exp2_to_127(min(most, load(scores + r * kScoreRow + j) - shift));  // in this order a NaN stays
      store(scores + r * kScoreRow + j, e);
      added[r] = added[r] + e;
    }
    largest = max(added[r], largest);  // a NaN is not kept
  }
  if (any_above(largest, V(A(65536)))) return false;
  for (int r = 0; r < kStrip; ++r) store(total + r * V::N, load(total + r * V::N) + added[r]);
  return true;
}

// Scores [begin, padded) of a strip to 2^(score - top), hidden ones being -inf. `top` has to be near the largest score,
// not equal to it: sums are relative to it, and floating point does not mind a common factor. So a row's first maximum
// serves until a tile's sum passes 2^16, and the later tiles spend nothing on maxima; then again() computes the scores
// anew. `shrink` is what earlier sums are multiplied by. top (6), total (6, N lanes).
template <class A, class Again>
void soften_strip(A* top, A* total, std::int64_t begin, std::int64_t padded, A* scores, A* shrink, const Again& again) {
  using V = Vec<A>;
  if (*std::min_element(top, top + kStrip) > -std::numeric_limits<A>::infinity()) {
    std::fill_n(shrink, kStrip, A(1));
    if (soften_relative(top, total, begin, padded, scores)) return;
    again();
  }
  for (int r = 0; r < kStrip; ++r) {
    A* const lanes = total + r * V::N;
    A added = 0;
    shrink[r] = soften(scores + r * kScoreRow, begin, padded, top[r], added);
    store(lanes, load(lanes) * V(shrink[r]));
    lanes[0] += added;
  }
}

// Where a strip's rows are written, times 1 / total, which is 0 where a row saw no key.
template <class T>
struct Target {
  T* row[kStrip];
  Acc<T> inverse[kStrip];
  int rows;
};

// Of `rows` rows of the head from `first` on; writes their log-sum-exp. top (6), total (6, N lanes).
template <class T, class S>
void set_target(const Head<T, S>& head, std::int64_t first, std::int64_t rows, const Acc<T>* top, const Acc<T>* total,
                Target<T>& target) {
  target.rows = static_cast<int>(rows);
  for (int r = 0; r < kStrip; ++r) {
    const Acc<T> of_row = sum(load(total + r * Vec<Acc<T>>::N));
    target.inverse[r] = of_row == 0 ? Acc<T>(0) : 1 / of_row;
    if (r >= target.rows) continue;
    target.row[r] = head.out_of(first + r);
    write_lse(head, first + r, top[r], of_row);
  }
}

// Columns [c, c + 2 N) of the strip, as far as there are any.
template <class T>
[[gnu::always_inline]] inline void write_tile(const Target<T>& target, std::int64_t c, std::int64_t dim_v,
                                              Tile<Acc<T>>& acc) {
  using A = Acc<T>;
  using V = Vec<A>;
  multiply_tile(target.inverse, acc);
  const std::int64_t rest = dim_v - c;
  if (rest >= kPanel<A>) {
#pragma GCC unroll 6
    for (int r = 0; r < kStrip; ++r) {
      if (r >= target.rows) return;
      T* const to = target.row[r] + c;
      store(to, acc[r][0]);
      store(to + V::N, acc[r][1]);
    }
    return;
  }
  A narrow[kStrip * kPanel<A>];
  store_tile(narrow, kPanel<A>, acc);
  for (int r = 0; r < target.rows; ++r) {
    T* const to = target.row[r] + c;
    const int w = rest >= V::N ? V::N : 0;
    const A* const from = narrow + r * kPanel<A>;
    if (w > 0) store(to, load(from));
    if (rest > w) store(to + w, load(from + w), static_cast<int>(rest) - w);
  }
}

}  // namespace qvl::cpu
