// Softmax attention, backward: probabilities recomputed from the saved log-sum-exp, five products a tile.
//
//   P = exp(scale q k^T + mask - lse)      dV = P^T dO        delta = sum over columns of dO O
//   dP = dO v^T                            dS = P (dP - delta)
//   dQ = scale dS k                        dK = scale dS^T q
//
// Regime: arithmetic, 2 Lq Lk (3 D + 2 Dv) FLOPs a query head against 4 of the forward's two products.
//
//   tile    kTile = 96 keys: K and V transposed for the scores, K by columns for dQ, sums of dK and dV; these five
//           buffers, 48 KiB each for D = 128, stay in L2 while the rows pass
//   block   kRows = 48 rows (row r is position r / G, head r % G): Q and dO as strips and by columns, and sums of dQ,
//           120 KiB for D = 128; P and dS of 48 x 96 (36 KiB) go from product to product; every panel is in L1 while
//           the block's strips pass it
//   part    kBlocks blocks are packed once for all tiles of a pair (below), which they pass from L3
//   bytes   a tile reads a row's packed block and dQ, 3 D + 2 Dv, against 96 (3 D + 2 Dv) FMAs
//
// Sums are fp32 (float64 for float64) in the outputs themselves, which Python clears before and converts after. Order
// and threads: a head's rows and keys are cut into the same number of chunks. Step t pairs row chunk i with key chunk
// i - t (mod chunks): no two pairs of a step share a row or a key, so all heads' pairs run at once without locks, and
// every sum has one order whatever the number of threads.
//
// Source: Dao, FlashAttention-2, 2023, section 3.1, algorithm 2.

#include "attention_gradients.h"
#include "dispatch.h"

namespace qvl::cpu {
namespace {

constexpr int kTile = 96;  // whole strips (for dK, dV) and whole panels of either ISA (for the scores)
constexpr int kStrips = 8;
constexpr int kRows = kStrips * kStrip;
constexpr int kBlocks = 8;
static_assert(kTile % kStrip == 0 && kTile % kPanel<float> == 0);

// Scratch of one thread, in elements of the compute type.
struct Layout {
  std::int64_t dim, dim_v, columns, columns_v;  // D and Dv, and both rounded up to whole panels
  std::int64_t query_strips, grad_strips, query, grad, grad_query, lse, delta, block_size;  // of a block
  std::int64_t key_panels, value_panels, key, grad_key, grad_value, weights, grad_scores;   // the tile's
  std::int64_t size;

  Layout(std::int64_t d, std::int64_t dv, int panel)
      : dim(d), dim_v(dv), columns(round_up(d, panel)), columns_v(round_up(dv, panel)) {
    Pieces block, pieces;
    query_strips = block.take(kRows * dim + kStripSlack);
    grad_strips = block.take(kRows * dim_v + kStripSlack);
    query = block.take(kRows * columns);
    grad = block.take(kRows * columns_v);
    grad_query = block.take(kRows * columns);
    lse = block.take(kRows);
    delta = block.take(kRows);
    block_size = block.size();
    pieces.take(kBlocks * block_size);
    key_panels = pieces.take(kTile * dim);
    value_panels = pieces.take(kTile * dim_v);
    key = pieces.take(kTile * columns);
    grad_key = pieces.take(kTile * columns);
    grad_value = pieces.take(kTile * columns_v);
    weights = pieces.take(GradientTile<float, kTile, kStrips, true>::kScores);
    grad_scores = pieces.take(GradientTile<float, kTile, kStrips, true>::kScores);
    size = pieces.size();
  }
};

// to[c] += factor * row k of the panels [panel][count][2 N]
template <class A>
void add_from_panels(const A* panels, std::int64_t k, std::int64_t count, A factor, std::int64_t dim, A* to) {
  using V = Vec<A>;
  const V by(factor);
  const A* from = panels + k * kPanel<A>;
  std::int64_t c = 0;
  for (; c + kPanel<A> <= dim; c += kPanel<A>, from += count * kPanel<A>) {
    store(to + c, fma(load(from), by, load(to + c)));
    store(to + c + V::N, fma(load(from + V::N), by, load(to + c + V::N)));
  }
  for (std::int64_t i = 0; c + i < dim; ++i) to[c + i] += factor * from[i];
}

// One pair of chunks: the rows `rows` of one KV head's group against its keys `keys`.
template <class T>
class Pair {
 public:
  using A = Acc<T>;
  using V = Vec<A>;

  Pair(const AttentionBackwardParams& p, std::int64_t segment, std::int64_t kv_head, const Layout& at, A* scratch)
      : p_(p.forward),
        head_(head_of<T>(p.forward, segment, kv_head)),
        at_(at),
        m_(scratch),
        grads_(p, head_, segment, kv_head) {
    tile_.dim = at.dim, tile_.dim_v = at.dim_v, tile_.columns = at.columns, tile_.columns_v = at.columns_v;
    tile_.row_count = kRows, tile_.key_count = tile_.sum_count = kTile, tile_.strips = kStrips;
    tile_.key_panels = m_ + at.key_panels, tile_.value_panels = m_ + at.value_panels, tile_.key = m_ + at.key;
    tile_.grad_key = m_ + at.grad_key, tile_.grad_value = m_ + at.grad_value;
    tile_.weights = m_ + at.weights, tile_.grad_scores = m_ + at.grad_scores;
  }

  void run(Range rows, Range keys) {
    const std::int64_t blocks = (rows.end - rows.begin + kRows - 1) / kRows, parts = (blocks + kBlocks - 1) / kBlocks;
    for (std::int64_t i = 0; i < parts; ++i) {
      const std::int64_t begin = rows.begin + i * blocks / parts * kRows;
      add_part({begin, std::min(rows.begin + (i + 1) * blocks / parts * kRows, rows.end)}, keys);
    }
  }

  std::int64_t rows() const { return head_.rows(); }
  std::int64_t keys() const { return head_.len_k; }

 private:
  void add_part(Range rows, Range keys) {
    const Range seen{range(rows.begin).begin, range(rows.end - 1).end};  // limits rise
    bool loaded = false;
    for (std::int64_t tile = keys.begin; tile < keys.end; tile += kTile) {
      const std::int64_t width = std::min<std::int64_t>(kTile, keys.end - tile);
      if (seen.begin >= tile + width || seen.end <= tile) continue;
      if (!loaded) for_blocks(rows, [&](std::int64_t first, std::int64_t count) { load_rows(first, count); });
      loaded = true;
      load_keys(tile, width);
      for_blocks(rows, [&](std::int64_t first, std::int64_t count) {
        if (range(first).begin < tile + width && range(first + count - 1).end > tile)
          add_block(first, count, tile, width);
      });
      store_keys(tile, width);
    }
    if (loaded) for_blocks(rows, [&](std::int64_t first, std::int64_t count) { store_rows(first, count); });
  }

  // Calls f(first row, rows) for each block of the part, with block_ at its memory.
  template <class F>
  void for_blocks(Range rows, const F& f) {
    block_ = m_;
    for (std::int64_t first = rows.begin; first < rows.end; first += kRows, block_ += at_.block_size)
      f(first, std::min<std::int64_t>(kRows, rows.end - first));
  }

  Range range(std::int64_t row) const { return visible(p_, head_.position(row), head_.len_k); }

  void load_keys(std::int64_t tile, std::int64_t width) {
    const T *key = head_.key + tile * head_.key_row, *value = head_.value + tile * head_.value_row;
    pack_transposed(key, head_.key_row, width, at_.dim, m_ + at_.key_panels);
    pack_transposed(value, head_.value_row, width, at_.dim_v, m_ + at_.value_panels);
    for (std::int64_t j = 0; j < width; ++j) to_panels(key + j * head_.key_row, at_.dim, j, kTile, m_ + at_.key);
    std::fill_n(m_ + at_.grad_key, kTile * at_.columns, A(0));
    std::fill_n(m_ + at_.grad_value, kTile * at_.columns_v, A(0));
  }

  // Rows beyond `count` fill up the last strip: their lse makes all their probabilities zero.
  void load_rows(std::int64_t first, std::int64_t count) {
    constexpr A kNone = std::numeric_limits<A>::infinity();
    const V scale(static_cast<A>(p_.scale * kLog2e));
    A query[kStrip][kMaxDim], grad[kStrip][kMaxDim], out[kMaxDim];
    for (std::int64_t r = 0; r < kRows; ++r) {
      A *q = query[r % kStrip], *g = grad[r % kStrip];
      A &lse = block_[at_.lse + r], &delta = block_[at_.delta + r];
      lse = kNone, delta = 0;
      if (r < count) {
        const std::int64_t position = (first + r) / head_.group, of_group = (first + r) % head_.group;
        const std::int64_t soon = first + std::min(r + kAhead, count - 1);
        prefetch(head_.query_of(soon), at_.dim * kStored);
        prefetch(grads_.out.row(head_, soon), at_.dim_v * kStored);
        prefetch(head_.out_of(soon), at_.dim_v * kStored);
        widen(head_.query_of(first + r), at_.dim, at_.dim, q);
        widen(grads_.out.row(head_, first + r), at_.dim_v, at_.dim_v, g);
        widen(head_.out_of(first + r), at_.dim_v, at_.dim_v, out);
        delta = dot<A>(g, out, at_.dim_v);
        const A saved = head_.lse[of_group * head_.lse_head + position];
        if (saved != -kNone) lse = saved * static_cast<A>(kLog2e);  // -inf: the row saw no key
      } else {
        std::fill_n(q, at_.dim, A(0));
        std::fill_n(g, at_.dim_v, A(0));
      }
      to_panels(q, at_.dim, r, kRows, block_ + at_.query);
      to_panels(g, at_.dim_v, r, kRows, block_ + at_.grad);
      multiply(q, scale, at_.dim);
      if (r % kStrip < kStrip - 1) continue;
      to_strip(query[0], kMaxDim, at_.dim, block_ + at_.query_strips + r / kStrip * kStrip * at_.dim);
      to_strip(grad[0], kMaxDim, at_.dim_v, block_ + at_.grad_strips + r / kStrip * kStrip * at_.dim_v);
    }
    std::fill_n(block_ + at_.grad_query, kRows * at_.columns, A(0));
  }

  void add_block(std::int64_t first, std::int64_t count, std::int64_t tile, std::int64_t width) {
    tile_.query_strips = block_ + at_.query_strips, tile_.grad_strips = block_ + at_.grad_strips;
    tile_.query = block_ + at_.query, tile_.grad = block_ + at_.grad, tile_.grad_query = block_ + at_.grad_query;
    tile_.lse = block_ + at_.lse, tile_.delta = block_ + at_.delta;
    for (int s = 0; s < kStrips; ++s) {
      Range& seen = tile_.seen[s];
      seen = {0, 0};
      if (s * kStrip >= count) continue;
      const std::int64_t begin = range(first + s * kStrip).begin - tile;
      const std::int64_t end = range(first + std::min<std::int64_t>((s + 1) * kStrip, count) - 1).end - tile;
      seen.begin = std::clamp<std::int64_t>(begin, 0, width) / kPanel<A> * kPanel<A>;
      seen.end = std::clamp<std::int64_t>(end, seen.begin, width);
    }
    tile_.run(width, [&](int s, A* scores) {
      const Range seen = tile_.seen[s];
      for (std::int64_t r = 0; r < kStrip; ++r)  // rows beyond the last have its masks
        hide(p_, head_, first + std::min(s * kStrip + r, count - 1), tile, seen, round_up(seen.end, kPanel<A>),
             scores + r * kTile);
    });
  }

  void store_rows(std::int64_t first, std::int64_t count) {
    const A scale = static_cast<A>(p_.scale);
    for (std::int64_t r = 0; r < count; ++r) {
      prefetch(grads_.query.row(head_, first + std::min(r + kAhead, count - 1)), at_.dim * kBytes);
      add_from_panels(block_ + at_.grad_query, r, kRows, scale, at_.dim, grads_.query.row(head_, first + r));
    }
  }

  void store_keys(std::int64_t tile, std::int64_t width) {
    const A scale = static_cast<A>(p_.scale);
    const auto key = [&](std::int64_t j) { return grads_.key.data + (tile + j) * grads_.key.stride; };
    const auto value = [&](std::int64_t j) { return grads_.value.data + (tile + j) * grads_.value.stride; };
    for (std::int64_t j = 0; j < width; ++j) {
      const std::int64_t soon = std::min(j + kAhead, width - 1);
      prefetch(key(soon), at_.dim * kBytes), prefetch(value(soon), at_.dim_v * kBytes);
      add_from_panels(m_ + at_.grad_key, j, kTile, scale, at_.dim, key(j));
      add_from_panels(m_ + at_.grad_value, j, kTile, A(1), at_.dim_v, value(j));
    }
  }

  // Rows of a tensor (L, H, D) lie apart: nothing but this reads ahead.
  static constexpr std::int64_t kAhead = 8, kStored = sizeof(T), kBytes = sizeof(A);
  const AttentionParams& p_;
  const Head<T> head_;
  const Layout& at_;
  A* const m_;
  const Gradients<T> grads_;
  GradientTile<A, kTile, kStrips, true> tile_{};
  A* block_ = nullptr;  // the block at hand
};

template <class T>
void backward(const AttentionBackwardParams& p) {
  const Layout at(p.forward.query.size[3], p.forward.value.size[3], kPanel<Acc<T>>);
  run_pairs<T>(p, at.size, {kRows, 4 * kRows, kTile, 2 * kTile},
               [&](std::int64_t segment, std::int64_t kv_head, Acc<T>* scratch) {
                 return Pair<T>(p, segment, kv_head, at, scratch);
               });
}

}  // namespace

std::int64_t attention_backward_scratch_bytes(const AttentionParams& p, std::int64_t threads) {
  if (is_backward_amx(p)) return attention_backward_amx_scratch_bytes(p, threads);
  const bool wide = p.query.dtype == DType::f64;
  const Layout at(p.query.size[3], p.value.size[3], wide ? kPanel<double> : kPanel<float>);
  return threads * at.size * (wide ? 8 : 4);
}

void attention_backward(const AttentionBackwardParams& p) {
  if (is_backward_amx(p.forward)) return attention_backward_amx(p);
  with_storage_type(p.forward.query.dtype, [&](auto t) { backward<decltype(t)>(p); });
}

}  // namespace qvl::cpu
