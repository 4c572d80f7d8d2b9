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
//   block   kRows = 48 rows (row r is position r / G, head r % G): Q and dO as strips and by columns; P and dS of
//           48 x 96 (36 KiB) go from product to product; every panel is in L1 while the block's strips pass it
//   bytes   a tile reads q, dO, out and reads and writes dQ once: (3 D + 2 Dv) a row against 96 (3 D + 2 Dv) FMAs
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
static_assert(kTile % kStrip == 0 && kTile % kPanel<float> == 0);

// Scratch of one thread, in elements of the compute type.
struct Layout {
  std::int64_t dim, dim_v, columns, columns_v;  // D and Dv, and both rounded up to whole panels
  std::int64_t query_strips, grad_strips, query, grad, grad_query, lse, delta;             // the rows'
  std::int64_t key_panels, value_panels, key, grad_key, grad_value, weights, grad_scores;  // the tile's
  std::int64_t size;

  Layout(std::int64_t d, std::int64_t dv, int panel)
      : dim(d), dim_v(dv), columns(round_up(d, panel)), columns_v(round_up(dv, panel)) {
    Pieces pieces;
    query_strips = pieces.take(kRows * dim + kStripSlack);
    grad_strips = pieces.take(kRows * dim_v + kStripSlack);
    query = pieces.take(kRows * columns);
    grad = pieces.take(kRows * columns_v);
    grad_query = pieces.take(kRows * columns);
    lse = pieces.take(kRows);
    delta = pieces.take(kRows);
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
  for (std::int64_t c = 0; c < dim; c += kPanel<A>) {
    const A* from = panels + c * count + k * kPanel<A>;
    const std::int64_t n = std::min<std::int64_t>(kPanel<A>, dim - c);
    for (std::int64_t i = 0; i < n; ++i) to[c + i] += factor * from[i];
  }
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
    A* const m = scratch;
    tile_ = {at.dim,
             at.dim_v,
             at.columns,
             at.columns_v,
             kRows,
             kTile,
             kTile,
             m + at.query_strips,
             m + at.grad_strips,
             m + at.query,
             m + at.grad,
             m + at.lse,
             m + at.delta,
             m + at.grad_query,
             m + at.key_panels,
             m + at.value_panels,
             m + at.key,
             m + at.grad_key,
             m + at.grad_value,
             m + at.weights,
             m + at.grad_scores,
             kStrips,
             nullptr,
             {}};
  }

  void run(Range rows, Range keys) {
    for (std::int64_t tile = keys.begin; tile < keys.end; tile += kTile) {
      const std::int64_t width = std::min<std::int64_t>(kTile, keys.end - tile);
      bool loaded = false;
      for (std::int64_t first = rows.begin; first < rows.end; first += kRows) {
        const std::int64_t count = std::min<std::int64_t>(kRows, rows.end - first);
        if (range(first).begin >= tile + width || range(first + count - 1).end <= tile) continue;  // limits rise
        if (!loaded) load_keys(tile, width);
        loaded = true;
        load_rows(first, count);
        add_block(first, count, tile, width);
        store_rows(first, count);
      }
      if (loaded) store_keys(tile, width);
    }
  }

  std::int64_t rows() const { return head_.rows(); }
  std::int64_t keys() const { return head_.len_k; }

 private:
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
      A &lse = m_[at_.lse + r], &delta = m_[at_.delta + r];
      lse = kNone, delta = 0;
      if (r < count) {
        const std::int64_t position = (first + r) / head_.group, of_group = (first + r) % head_.group;
        widen(head_.query_of(first + r), at_.dim, at_.dim, q);
        widen(grads_.out.row(head_, first + r), at_.dim_v, at_.dim_v, g);
        widen(static_cast<const T*>(head_.out) + position * head_.out_row + of_group * head_.out_head, at_.dim_v,
              at_.dim_v, out);
        delta = dot<A>(g, out, at_.dim_v);
        const A saved = head_.lse[of_group * head_.lse_head + position];
        if (saved != -kNone) lse = saved * static_cast<A>(kLog2e);  // -inf: the row saw no key
      } else {
        std::fill_n(q, at_.dim, A(0));
        std::fill_n(g, at_.dim_v, A(0));
      }
      to_panels(q, at_.dim, r, kRows, m_ + at_.query);
      to_panels(g, at_.dim_v, r, kRows, m_ + at_.grad);
      multiply(q, scale, at_.dim);
      if (r % kStrip < kStrip - 1) continue;
      to_strip(query[0], kMaxDim, at_.dim, m_ + at_.query_strips + r / kStrip * kStrip * at_.dim);
      to_strip(grad[0], kMaxDim, at_.dim_v, m_ + at_.grad_strips + r / kStrip * kStrip * at_.dim_v);
    }
  }

  void add_block(std::int64_t first, std::int64_t count, std::int64_t tile, std::int64_t width) {
    for (int s = 0; s < kStrips; ++s) {
      Range& seen = tile_.seen[s];
      seen = {0, 0};
      if (s * kStrip >= count) continue;
      const std::int64_t begin = range(first + s * kStrip).begin - tile;
      const std::int64_t end = range(first + std::min<std::int64_t>((s + 1) * kStrip, count) - 1).end - tile;
      seen.begin = std::clamp<std::int64_t>(begin, 0, width) / kPanel<A> * kPanel<A>;
      seen.end = std::clamp<std::int64_t>(end, seen.begin, width);
    }
    tile_.template run<false>(width, [&](int s, A* scores) {
      const Range seen = tile_.seen[s];
      for (std::int64_t r = 0; r < kStrip; ++r)  // rows beyond the last have its masks
        hide(p_, head_, first + std::min(s * kStrip + r, count - 1), tile, seen, round_up(seen.end, kPanel<A>),
             scores + r * kTile);
    });
  }

  void store_rows(std::int64_t first, std::int64_t count) {
    const A scale = static_cast<A>(p_.scale);
    for (std::int64_t r = 0; r < count; ++r)
      add_from_panels(m_ + at_.grad_query, r, kRows, scale, at_.dim, grads_.query.row(head_, first + r));
  }

  void store_keys(std::int64_t tile, std::int64_t width) {
    const A scale = static_cast<A>(p_.scale);
    for (std::int64_t j = 0; j < width; ++j) {
      add_from_panels(m_ + at_.grad_key, j, kTile, scale, at_.dim, grads_.key.data + (tile + j) * grads_.key.stride);
      add_from_panels(m_ + at_.grad_value, j, kTile, A(1), at_.dim_v,
                      grads_.value.data + (tile + j) * grads_.value.stride);
    }
  }

  const AttentionParams& p_;
  const Head<T> head_;
  const Layout& at_;
  A* const m_;
  const Gradients<T> grads_;
  GradientTile<A, kTile, kStrips, true> tile_;
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
