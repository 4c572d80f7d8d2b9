// What the dense and the sparse forward kernel share: online softmax of a strip; and what the sparse one keeps of a
// block of query rows. Scores of a strip are rows of kScoreRow keys: four strips of 192 floats are 18 KiB of L1.
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

template <class A>
struct Sums {
  using V = Vec<A>;

  std::int64_t dim, columns;  // D, and Dv rounded up to whole panels
  A *query, *out;             // strips [D][6]; strips of column panels [6][2 N]
  A *top, *total;             // a row's shift of the exponents; a row's sum of them, in N lanes

  // Rows [first, first + count) of the head; the last one fills up its strip. No key is seen yet.
  template <class T, class S>
  void load_queries(const Head<T, S>& head, double scale, std::int64_t first, std::int64_t count) {
    const V by(static_cast<A>(scale * kLog2e));
    const std::int64_t strips = (count + kStrip - 1) / kStrip;
    A rows[kStrip][kMaxDim];
    for (std::int64_t strip = 0; strip < strips; ++strip) {
      for (int r = 0; r < kStrip; ++r) {
        widen_scaled(head.query_of(first + std::min(strip * kStrip + r, count - 1)), dim, by, rows[r]);
      }
      to_strip(rows[0], kMaxDim, dim, query + strip * kStrip * dim);
    }
    std::fill_n(out, strips * kStrip * columns, A(0));
    std::fill_n(top, strips * kStrip, -std::numeric_limits<A>::infinity());
    std::fill_n(total, strips * kStrip * V::N, A(0));
  }

  void score(std::int64_t strip, const A* panel, A* scores) const {
    score_panel(query + strip * kStrip * dim, panel, dim, scores, kScoreRow);
  }

  // A row's first top is the largest of its first panel.
  template <class Again>
  void soften_strip(std::int64_t strip, Range seen, A* scores, A* shrink, const Again& again) {
    A* const tops = top + strip * kStrip;
    for (int r = 0; r < kStrip; ++r)
      if (tops[r] == -std::numeric_limits<A>::infinity()) {
        const A* const first = scores + r * kScoreRow + seen.begin;
        tops[r] = largest(max(load(first), load(first + V::N)));
      }
    cpu::soften_strip(tops, total + strip * kStrip * V::N, seen.begin, round_up(seen.end, kPanel<A>), scores, shrink,
                      again);
  }

  // The sums of one strip and one panel of columns.
  A* sums_of(std::int64_t strip, std::int64_t column) const { return out + strip * kStrip * columns + column * kStrip; }

  template <class T, class S>
  void write(const Head<T, S>& head, std::int64_t dim_v, std::int64_t first, std::int64_t count) const {
    A row[kMaxDim];
    for (std::int64_t r = 0; r < count; ++r) {
      const A* from = out + r / kStrip * kStrip * columns + r % kStrip * kPanel<A>;
      for (std::int64_t c = 0; c < columns; c += kPanel<A>) {
        store(row + c, load(from + c * kStrip));
        store(row + c + V::N, load(from + c * kStrip + V::N));
      }
      write_row(head, first + r, dim_v, row, top[r], sum(load(total + r * V::N)));
    }
  }
};

}  // namespace qvl::cpu
