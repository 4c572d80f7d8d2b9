// The five products of attention's backward for one block of rows and one tile of keys, and what both kernels do to the
// rows beside them.
//
//   P = exp2(Q K^T - lse)      dP = dO V^T      dS = P (dP - delta)
//   dQ = dS K                  dV += P^T dO     dK += dS^T Q
#pragma once

#include "attention_tiles.h"
#include "parallel.h"

namespace qvl::cpu {

template <class A, class S>
A dot(const S* a, const S* b, std::int64_t n) {
  using V = Vec<A>;
  V acc = V::zero();
  std::int64_t i = 0;
  for (; i + V::N <= n; i += V::N) acc = fma(load(a + i), load(b + i), acc);
  if (const int rest = static_cast<int>(n - i); rest > 0) acc = fma(load(a + i, rest), load(b + i, rest), acc);
  return sum(acc);
}

// Rows of a gradient: row r of the group, or key j, of one head and segment.
template <class U>
struct Gradient {
  U* data;
  std::int64_t stride, head;  // between a head's rows, between heads

  template <class T>
  U* row(const Head<T>& of, std::int64_t row) const {
    return data + row / of.group * stride + row % of.group * head;
  }
};

// Where a segment's and KV head's part of each gradient lies: rows of `out` and `query` as the head's, keys of the
// others.
template <class T>
struct Gradients {
  Gradient<const T> out;
  Gradient<Acc<T>> query, key, value;

  Gradients(const AttentionBackwardParams& p, const Head<T>& head, std::int64_t segment, std::int64_t kv_head) {
    const TensorView &queries = p.forward.offsets_q, &keys = p.forward.offsets_k;
    const std::int64_t q0 = queries.data ? queries.as<std::int64_t>()[segment] : 0;
    const std::int64_t k0 = keys.data ? keys.as<std::int64_t>()[segment] : 0;
    out = of<const T>(head, p.grad_out, head.first_head, q0);
    query = of<Acc<T>>(head, p.grad_query, head.first_head, q0);
    key = of<Acc<T>>(head, p.grad_key, kv_head, k0);
    value = of<Acc<T>>(head, p.grad_value, kv_head, k0);
  }

 private:
  // Of head `number`, from token `first` on.
  template <class U>
  static Gradient<U> of(const Head<T>& head, const TensorView& t, std::int64_t number, std::int64_t first) {
    return {t.as<U>() + head.batch * t.stride[0] + number * t.stride[1] + first * t.stride[2], t.stride[2],
            t.stride[1]};
  }
};

// Memory that is read soon, asked for a few lines at a time between two tiles of products, so that it is in L2 then.
class Ahead {
 public:
  // A part is `rows` times `bytes` bytes, `row` bytes apart; there is room for ten.
  void add(const void* from, std::int64_t rows, std::int64_t row, std::int64_t bytes) {
    parts_[count_++] = {static_cast<const char*>(from), rows, row, bytes};
    lines_ += rows * ((bytes + kLine - 1) / kLine);
  }
  // From now on all of it is asked for in `times` calls of some().
  void spread(std::int64_t times) { each_ = (lines_ + times - 1) / times; }
  void some() {
    for (std::int64_t n = each_; n > 0 && at_ < count_; --n) {
      Part& part = parts_[at_];
      prefetch_l2(part.from + byte_);
      if ((byte_ += kLine) < part.bytes) continue;
      byte_ = 0, part.from += part.row;
      if (--part.rows == 0) ++at_;
    }
  }

 private:
  static constexpr std::int64_t kLine = 64;
  static constexpr int kParts = 10;
  struct Part {
    const char* from;
    std::int64_t rows, row, bytes;
  };
  Part parts_[kParts];
  std::int64_t lines_ = 0, each_ = 0, byte_ = 0;
  int count_ = 0, at_ = 0;
};

// kTile: keys between two rows of scores. Where memory counts for more than the last per cent of the products, the
// panels of Q and dO stand in for strips (kHasStrips false), and the transposed keys have the scale instead of Q.
// Strips are [D][6]; panels are columns [panel][count][2 N], with the counts below. All but the sums is packed by the
// caller.
template <class A, int kTile, int kMaxStrips, bool kHasStrips>
struct GradientTile {
  using V = Vec<A>;
  static constexpr int kScores =
      kMaxStrips * kStrip * kTile + kStrip;  // elements of `weights`; strips of keys reach over

  std::int64_t dim, dim_v, columns, columns_v;         // D and Dv, and both rounded up to whole panels
  std::int64_t row_count, key_count, sum_count;        // rows in a panel of Q and dO, of K, of dK and dV
  const A *query_strips, *grad_strips, *query, *grad;  // the rows': Q scaled, dO; panels of Q, dO
  const A *lse, *delta;                                // lse in base 2; infinity makes a row's P zero
  A* grad_query;                                       // panels, dQ without the scale
  const A *key_panels, *value_panels, *key;            // the tile's: K and V transposed, panels of K
  A *grad_key, *grad_value;                            // panels, sums
  A *weights, *grad_scores;                            // P and dS
  int strips;
  Ahead* ahead;            // of what comes next; null with strips
  Range seen[kMaxStrips];  // the keys that some row of a strip sees, from a whole panel on

  // Adds to dQ, dK and dV. hide(s, scores) hides what strip s does not see of [begin, round_up(end, panel)).
  template <class Hide>
  void run(std::int64_t width, const Hide& hide) {
    products_of_rows(kHasStrips ? query_strips : query, key_panels, dim, width, weights);
    products_of_rows(kHasStrips ? grad_strips : grad, value_panels, dim_v, width, grad_scores);
    for (int s = 0; s < strips; ++s) {
      if (seen[s].end > seen[s].begin) hide(s, weights + s * kStrip * kTile);
      for (int r = s * kStrip; r < (s + 1) * kStrip; ++r) soften_row(r, seen[s]);
    }
    gradients_of_queries();
    products_of_keys(weights, grad, columns_v, width, grad_value);
    products_of_keys(grad_scores, query, columns, width, grad_key);
  }

 private:
  void look_ahead() const {
    if constexpr (!kHasStrips) ahead->some();
  }

  // The products are functions of their own: inlined into one, gcc 12 spills accumulators.
  [[gnu::noinline]] void gradients_of_queries() const {
    for (std::int64_t c = 0; c < columns; c += kPanel<A>)
      for (int s = 0; s < strips; ++s) {
        const auto [begin, end] = seen[s];
        if (begin == end) continue;
        look_ahead();
        A* const to = grad_query + c * row_count + s * kStrip * kPanel<A>;
        Tile<A> acc;
        load_tile(to, kPanel<A>, acc);
        multiply_add<kTile, 1>(grad_scores + s * kStrip * kTile + begin, key + c * key_count + begin * kPanel<A>,
                               end - begin, acc);
        store_tile(to, kPanel<A>, acc);
      }
  }

  // scores = rows . panels, where the strips see the keys.
  [[gnu::noinline]] void products_of_rows(const A* rows, const A* panels, std::int64_t n, std::int64_t width,
                                          A* scores) const {
    for (std::int64_t j = 0; j < width; j += kPanel<A>)
      for (int s = 0; s < strips; ++s)
        if (j >= seen[s].begin && j < seen[s].end) {
          look_ahead();
          A* const to = scores + s * kStrip * kTile + j;
          if constexpr (kHasStrips)
            score_panel(rows + s * kStrip * n, panels + j * n, n, to, kTile);
          else
            score_by_columns(rows + s * kStrip * kPanel<A>, panels + j * n, n, to);
        }
  }

  // As score_panel, from the rows' panels of columns.
  [[gnu::noinline]] void score_by_columns(const A* rows, const A* panel, std::int64_t n, A* to) const {
    Tile<A> acc;
    clear_tile<A>(acc);
    for (std::int64_t c = 0; c < n; c += kPanel<A>)
      multiply_add<kPanel<A>, 1>(rows + c * row_count, panel + c * kPanel<A>, std::min<std::int64_t>(kPanel<A>, n - c),
                                 acc);
    store_tile(to, kTile, acc);
  }

  // Row r's scores become P, and dP becomes dS.
  void soften_row(int r, Range keys) const {
    A *const p = weights + r * kTile, *const ds = grad_scores + r * kTile;
    const std::int64_t begin = keys.begin, padded = keys.end > begin ? round_up(keys.end, kPanel<A>) : begin;
    const V shift(lse[r]), mean(delta[r]);
    for (std::int64_t j = begin; j < padded; j += V::N) {
      const V e = exp2_to_127(load(p + j) - shift);
      store(p + j, e);
      store(ds + j, e * (load(ds + j) - mean));
    }
    for (A* row : {p, ds}) {  // what was not computed, for the strips of keys that reach over it
      std::fill(row, row + begin, A(0));
      std::fill(row + padded, row + kTile, A(0));
    }
  }

  // sums += scores^T rows, six keys at a time, over the strips of rows that see one of them.
  [[gnu::noinline]] void products_of_keys(const A* scores, const A* rows, std::int64_t n, std::int64_t width,
                                          A* sums) const {
    for (std::int64_t c = 0; c < n; c += kPanel<A>)
      for (std::int64_t j = 0; j < width; j += kStrip) {
        std::int64_t from = 0, to = strips;
        while (from < to && seen[from].end <= j) ++from;
        while (from < to && seen[to - 1].begin >= j + kStrip) --to;
        if (from == to) continue;
        look_ahead();
        from *= kStrip, to *= kStrip;
        A* const sum = sums + c * sum_count + j * kPanel<A>;
        Tile<A> acc;
        load_tile(sum, kPanel<A>, acc);
        multiply_add<1, kTile>(scores + from * kTile + j, rows + c * row_count + from * kPanel<A>, to - from, acc);
        store_tile(sum, kPanel<A>, acc);
      }
  }
};

// Chunk `index` of `chunks` of [0, n), in whole multiples of `step`.
inline Range chunk_of(std::int64_t n, std::int64_t chunks, std::int64_t index, std::int64_t step) {
  const std::int64_t size = round_up((n + chunks - 1) / chunks, step);
  return {std::min(n, index * size), std::min(n, (index + 1) * size)};
}

// What chunks of rows and keys are multiples of, and how many are worth packing for.
struct ChunkSizes {
  std::int64_t rows, fewest_rows, keys, fewest_keys;
};

// Calls make(segment, KV head, scratch).run(rows, keys) for every pair of a chunk of rows and one of keys, in the order
// and on the threads that attention_backward.cpp describes. A thread has `size` elements of scratch.
template <class T, class Make>
void run_pairs(const AttentionBackwardParams& p, std::int64_t size, const ChunkSizes& of, const Make& make) {
  using A = Acc<T>;
  constexpr std::int64_t kMaxChunks = 8;
  const AttentionParams& f = p.forward;
  const std::int64_t kv_heads = f.key.size[1];
  const std::int64_t segments = f.offsets_q.data ? f.offsets_q.size[0] - 1 : f.query.size[0];
  const std::int64_t heads = segments * kv_heads;
  const std::int64_t workers = f.scratch.numel() / (size * static_cast<std::int64_t>(sizeof(A)));
  std::int64_t chunks = 1;  // by the shapes alone
  for (std::int64_t s = 0; s < segments; ++s) {
    const Head<T> head = head_of<T>(f, s, 0);
    chunks = std::max(chunks, std::min({head.rows() / of.fewest_rows, head.len_k / of.fewest_keys, kMaxChunks}));
  }
  const std::int64_t work = f.query.numel() * std::max<std::int64_t>(f.key.size[2], 1);
  for (std::int64_t step = 0; step < chunks; ++step)
    parallel_tasks(heads * chunks, work, workers, [&](std::int64_t task, std::int64_t worker) {
      const std::int64_t head = task % heads, rows = chunks - 1 - task / heads;
      auto pair = make(head / kv_heads, head % kv_heads, f.scratch.as<A>() + worker * size);
      pair.run(chunk_of(pair.rows(), chunks, rows, of.rows),
               chunk_of(pair.keys(), chunks, (rows - step + chunks) % chunks, of.keys));
    });
}

}  // namespace qvl::cpu
