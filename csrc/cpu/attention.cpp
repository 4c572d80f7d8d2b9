// Softmax attention, forward: tiles of keys, online softmax, grouped heads, causal and windowed work skipped.
//
// Regime: arithmetic (prompts, images). Per query row and key 2 (D + Dv) FLOPs. A tile of keys is packed once for all
// rows of a block:
//
//   block   kBlockRows rows of one KV head: row r is position r / G, head r % G of its group, so that a strip of rows
//           has nearly one causal limit and the group's heads share the packed tile
//   tile    kTile = 192 keys, K transposed and V by columns (attention_tiles.h), 96 KiB each for D = 128, in L2 with
//           the block's sums of 120 KiB
//   group   kGroup strips pass one panel of K, then of V, while it is in L1: their scores (24 x 192, 18 KiB) stay there
//           between the two products, and L2 is read once a group instead of once a strip (42 B a cycle is what one
//           strip after the other would ask for on AVX-512)
//   strip   6 rows x 2 vectors, the register tile
//
// Bytes of a block: q and out once, K and V once per block instead of once per row; the scores never leave L1.
// Only panels that a row limit crosses are masked; panels and tiles that no row sees are skipped.
//
// Source: Dao, FlashAttention-2, 2023, section 3.1; online softmax: Milakov and Gimelshein, 2018.

#include "attention_tiles.h"
#include "dispatch.h"
#include "parallel.h"

namespace qvl::cpu {
namespace {

constexpr int kTile = 192;
constexpr int kGroup = 4;
constexpr int kBlockRows = 10 * kGroup * kStrip;

// Scratch of one thread, in elements of the compute type.
struct Layout {
  std::int64_t dim, columns;  // D, and Dv rounded up to whole panels
  std::int64_t query, out, key, value, scores, top, total, size;

  Layout(std::int64_t d, std::int64_t dv, int panel) : dim(d), columns(round_up(dv, panel)) {
    std::int64_t at = 0;
    const auto take = [&](std::int64_t n) {
      const std::int64_t start = at;
      at += round_up(n, 16);
      return start;
    };
    query = take(kBlockRows * dim + kStripSlack);
    out = take(kBlockRows * columns);
    key = take(kTile * dim);
    value = take(kTile * columns);
    scores = take(kGroup * kStrip * kTile);
    top = take(kBlockRows);
    total = take(kBlockRows * panel / 2);
    size = at;
  }
};

template <class T, class S>
class Block {
 public:
  using A = Acc<T>;
  using V = Vec<A>;

  Block(const AttentionParams& p, const Head<T, S>& head, const Layout& at, A* scratch, std::int64_t first,
        std::int64_t count)
      : p_(p),
        head_(head),
        at_(at),
        m_(scratch),
        first_(first),
        count_(count),
        strips_((count + kStrip - 1) / kStrip) {}

  void run() {
    load_queries();
    const Range all{range(0).begin, range(count_ - 1).end};  // limits rise with the position
    for (std::int64_t tile = all.begin / kTile * kTile; tile < all.end; tile += kTile) {
      const std::int64_t keys = std::min<std::int64_t>(kTile, head_.len_k - tile);
      pack(tile, keys);
      for (std::int64_t strip = 0; strip < strips_; strip += kGroup) add_group(strip, tile, keys);
    }
    write();
  }

 private:
  Range range(std::int64_t row) const { return visible(p_, head_.position(first_ + row), head_.len_k); }

  void load_queries() {
    const V scale(static_cast<A>(p_.scale * kLog2e));
    A rows[kStrip][kMaxDim];
    for (std::int64_t strip = 0; strip < strips_; ++strip) {
      for (int r = 0; r < kStrip; ++r) {
        widen(head_.query_of(first_ + std::min(strip * kStrip + r, count_ - 1)), at_.dim, at_.dim, rows[r]);
        multiply(rows[r], scale, at_.dim);
      }
      to_strip(rows[0], kMaxDim, at_.dim, m_ + at_.query + strip * kStrip * at_.dim);
    }
    std::fill_n(m_ + at_.out, strips_ * kStrip * at_.columns, A(0));
    std::fill_n(m_ + at_.top, strips_ * kStrip, -std::numeric_limits<A>::infinity());
    std::fill_n(m_ + at_.total, strips_ * kStrip * V::N, A(0));
  }

  void pack(std::int64_t tile, std::int64_t keys) {
    const A* const scale = head_.key_scale ? head_.key_scale + tile * head_.key_scale_row : nullptr;
    pack_transposed(head_.key + tile * head_.key_row, head_.key_row, keys, at_.dim, m_ + at_.key, scale,
                    head_.key_scale_row);
    for (std::int64_t j = tile; j < tile + keys; ++j)
      to_panels(head_.value + j * head_.value_row, p_.value.size[3], j - tile, kTile, m_ + at_.value,
                head_.value_scale ? head_.value_scale[j * head_.value_scale_row] : A(1));
  }

  // The tile's keys that a strip sees, from a whole panel on.
  Range seen_by(std::int64_t strip, std::int64_t tile, std::int64_t keys) const {
    const std::int64_t row = strip * kStrip, last = std::min(row + kStrip, count_) - 1;
    const std::int64_t begin = std::max<std::int64_t>(range(row).begin - tile, 0) / kPanel<A> * kPanel<A>;
    return {begin, std::max(begin, std::min(range(last).end - tile, keys))};
  }

  void add_group(std::int64_t first_strip, std::int64_t tile, std::int64_t keys) {
    const int strips = static_cast<int>(std::min<std::int64_t>(kGroup, strips_ - first_strip));
    Range seen[kGroup];
    for (int s = 0; s < strips; ++s) seen[s] = seen_by(first_strip + s, tile, keys);
    A* const scores = m_ + at_.scores;
    for (std::int64_t j = seen[0].begin; j < seen[strips - 1].end; j += kPanel<A>)
      for (int s = 0; s < strips; ++s)
        if (j >= seen[s].begin && j < seen[s].end) score(first_strip + s, j, scores + s * kStrip * kTile);
    A shrink[kGroup * kStrip];
    for (int s = 0; s < strips; ++s)
      if (seen[s].begin < seen[s].end)
        soften_strip(first_strip + s, tile, seen[s], scores + s * kStrip * kTile, shrink + s * kStrip);
    for (std::int64_t c = 0; c < at_.columns; c += kPanel<A>)
      for (int s = 0; s < strips; ++s)
        if (seen[s].begin < seen[s].end)
          add_values(scores + s * kStrip * kTile, seen[s], m_ + at_.value + c * kTile, shrink + s * kStrip,
                     m_ + at_.out + (first_strip + s) * kStrip * at_.columns + c * kStrip);
  }

  void score(std::int64_t strip, std::int64_t j, A* scores) const {
    score_panel(m_ + at_.query + strip * kStrip * at_.dim, m_ + at_.key + j * at_.dim, at_.dim, scores + j, kTile);
  }

  void hide_strip(std::int64_t strip, std::int64_t tile, Range seen, A* scores) const {
    const std::int64_t row = strip * kStrip, last = std::min(row + kStrip, count_) - 1;
    const std::int64_t padded = round_up(seen.end, kPanel<A>);
    if (head_.mask == nullptr && range(last).begin <= tile + seen.begin && range(row).end >= tile + padded) return;
    for (int r = 0; r < kStrip; ++r)
      hide(p_, head_, first_ + std::min(row + r, count_ - 1), tile, seen, padded, scores + r * kTile);
  }

  // Scores to 2^(score - top). `top` has to be near the largest score, not equal to it: sums are relative to it, and
  // floating point does not mind a common factor. So the largest score of a strip's first tile serves until a tile's
  // sum passes 2^16, and the later tiles spend nothing on maxima.
  void soften_strip(std::int64_t strip, std::int64_t tile, Range seen, A* scores, A* shrink) {
    hide_strip(strip, tile, seen, scores);
    const A* const tops = m_ + at_.top + strip * kStrip;
    if (*std::min_element(tops, tops + kStrip) > -std::numeric_limits<A>::infinity()) {
      std::fill_n(shrink, kStrip, A(1));
      if (soften_relative(strip, seen, scores)) return;
      for (std::int64_t j = seen.begin; j < seen.end; j += kPanel<A>) score(strip, j, scores);  // they are gone
      hide_strip(strip, tile, seen, scores);
    }
    for (int r = 0; r < kStrip; ++r) {
      A& top = m_[at_.top + strip * kStrip + r];
      A* const lanes = m_ + at_.total + (strip * kStrip + r) * V::N;
      A added = 0;
      shrink[r] = soften(scores + r * kTile, seen.begin, round_up(seen.end, kPanel<A>), top, added);
      V total = load(lanes) * V(shrink[r]);
      store(lanes, total);
      lanes[0] += added;
    }
  }

  // With the tops as they are; false, and nothing but the scores changed, where they will not do.
  bool soften_relative(std::int64_t strip, Range seen, A* scores) {
    V added[kStrip], largest = V::zero();
    clear(added);
    for (int r = 0; r < kStrip; ++r) {
      const V shift(m_[at_.top + strip * kStrip + r]), most(A(127));
      for (std::int64_t j = seen.begin; j < round_up(seen.end, kPanel<A>); j += V::N) {
        const V e = exp2_to_127(min(most, load(scores + r * kTile + j) - shift));  // in this order a NaN stays
        store(scores + r * kTile + j, e);
        added[r] = added[r] + e;
      }
      largest = max(added[r], largest);  // a NaN is not kept
    }
    if (any_above(largest, V(A(65536)))) return false;
    for (int r = 0; r < kStrip; ++r) {
      A* const total = m_ + at_.total + (strip * kStrip + r) * V::N;
      store(total, load(total) + added[r]);
    }
    return true;
  }

  // o[r][c] = o[r][c] shrink[r] + sum_j p[r][j] v[j][c] for one strip and one panel of columns.
  static void add_values(const A* p, Range keys, const A* values, const A* shrink, A* o) {
    Tile<A> acc;
    load_tile(o, kPanel<A>, acc);
#pragma GCC unroll 6
    for (int r = 0; r < kStrip; ++r) {
      acc[r][0] = acc[r][0] * V(shrink[r]);
      acc[r][1] = acc[r][1] * V(shrink[r]);
    }
    multiply_add<kTile, 1>(p + keys.begin, values + keys.begin * kPanel<A>, keys.end - keys.begin, acc);
    store_tile(o, kPanel<A>, acc);
  }

  void write() {
    A row[kMaxDim];
    for (std::int64_t r = 0; r < count_; ++r) {
      const A* from = m_ + at_.out + r / kStrip * kStrip * at_.columns + r % kStrip * kPanel<A>;
      for (std::int64_t c = 0; c < at_.columns; c += kPanel<A>) std::copy_n(from + c * kStrip, kPanel<A>, row + c);
      write_row(head_, first_ + r, p_.value.size[3], row, m_[at_.top + r], sum(load(m_ + at_.total + r * V::N)));
    }
  }

  const AttentionParams& p_;
  const Head<T, S>& head_;
  const Layout& at_;
  A* const m_;
  const std::int64_t first_, count_, strips_;
};

template <class T, class S>
void forward(const AttentionParams& p) {
  using A = Acc<T>;
  const Layout at(p.query.size[3], p.value.size[3], kPanel<A>);
  const std::int64_t kv_heads = p.key.size[1];
  const std::int64_t segments = p.offsets_q.data ? p.offsets_q.size[0] - 1 : p.query.size[0];
  const std::int64_t workers = p.scratch.numel() / (at.size * static_cast<std::int64_t>(sizeof(A)));
  // Tasks are numbered by block, then head, then segment, the last block first: with a causal mask it costs the most,
  // and what is started last should be small.
  std::int64_t blocks = 0;
  for (std::int64_t s = 0; s < segments; ++s)
    blocks = std::max(blocks, (head_of<T, S>(p, s, 0).rows() + kBlockRows - 1) / kBlockRows);
  const std::int64_t work = p.query.numel() * std::max<std::int64_t>(p.key.size[2], 1);
  parallel_tasks(blocks * segments * kv_heads, work, workers, [&](std::int64_t task, std::int64_t worker) {
    const std::int64_t block = blocks - 1 - task / (segments * kv_heads);
    const Head<T, S> head = head_of<T, S>(p, task % (segments * kv_heads) / kv_heads, task % kv_heads);
    const std::int64_t first = block * kBlockRows;
    if (first >= head.rows()) return;
    A* scratch = p.scratch.as<A>() + worker * at.size;
    Block<T, S>(p, head, at, scratch, first, std::min<std::int64_t>(kBlockRows, head.rows() - first)).run();
  });
}

}  // namespace

std::int64_t attention_scratch_bytes(const AttentionParams& p, std::int64_t threads) {
  if (is_decode(p)) return attention_decode_scratch_bytes(p);
  const bool wide = p.query.dtype == DType::f64;
  const Layout at(p.query.size[3], p.value.size[3], wide ? kPanel<double> : kPanel<float>);
  return threads * at.size * (wide ? 8 : 4);
}

void attention(const AttentionParams& p) {
  if (is_decode(p)) return attention_decode(p);
  with_cache_type(p, [&](auto t, auto s) { forward<decltype(t), decltype(s)>(p); });
}

}  // namespace qvl::cpu
