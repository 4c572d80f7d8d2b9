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

#include "attention_sums.h"
#include "dispatch.h"
#include "parallel.h"

namespace qvl::cpu {
namespace {

constexpr int kTile = kScoreRow;
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

  Block(const AttentionParams& p, const Head<T, S>& head, const Layout& at, A* scratch, std::int64_t first,
        std::int64_t count)
      : p_(p),
        head_(head),
        at_(at),
        m_(scratch),
        first_(first),
        count_(count),
        strips_((count + kStrip - 1) / kStrip),
        sums_{at.dim, at.columns, scratch + at.query, scratch + at.out, scratch + at.top, scratch + at.total} {}

  void run() {
    sums_.load_queries(head_, p_.scale, first_, count_);
    const Range all{range(0).begin, range(count_ - 1).end};  // limits rise with the position
    for (std::int64_t tile = all.begin / kTile * kTile; tile < all.end; tile += kTile) {
      const std::int64_t keys = std::min<std::int64_t>(kTile, head_.len_k - tile);
      pack(tile, keys);
      for (std::int64_t strip = 0; strip < strips_; strip += kGroup) add_group(strip, tile, keys);
    }
    sums_.write(head_, p_.value.size[3], first_, count_);
  }

 private:
  Range range(std::int64_t row) const { return visible(p_, head_.position(first_ + row), head_.len_k); }

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
                     sums_.sums_of(first_strip + s, c));
  }

  void score(std::int64_t strip, std::int64_t j, A* scores) const {
    sums_.score(strip, m_ + at_.key + j * at_.dim, scores + j);
  }

  void hide_strip(std::int64_t strip, std::int64_t tile, Range seen, A* scores) const {
    const std::int64_t row = strip * kStrip, last = std::min(row + kStrip, count_) - 1;
    const std::int64_t padded = round_up(seen.end, kPanel<A>);
    if (head_.mask == nullptr && range(last).begin <= tile + seen.begin && range(row).end >= tile + padded) return;
    for (int r = 0; r < kStrip; ++r)
      hide(p_, head_, first_ + std::min(row + r, count_ - 1), tile, seen, padded, scores + r * kTile);
  }

  void soften_strip(std::int64_t strip, std::int64_t tile, Range seen, A* scores, A* shrink) {
    hide_strip(strip, tile, seen, scores);
    sums_.soften_strip(strip, seen, scores, shrink, [&] {
      for (std::int64_t j = seen.begin; j < seen.end; j += kPanel<A>) score(strip, j, scores);
      hide_strip(strip, tile, seen, scores);
    });
  }

  // o[r][c] = o[r][c] shrink[r] + sum_j p[r][j] v[j][c] for one strip and one panel of columns.
  static void add_values(const A* p, Range keys, const A* values, const A* shrink, A* o) {
    Tile<A> acc;
    Sums<A>::load_shrunk(o, shrink, acc);
    multiply_add<kTile, 1>(p + keys.begin, values + keys.begin * kPanel<A>, keys.end - keys.begin, acc);
    store_tile(o, kPanel<A>, acc);
  }

  const AttentionParams& p_;
  const Head<T, S>& head_;
  const Layout& at_;
  A* const m_;
  const std::int64_t first_, count_, strips_;
  Sums<A> sums_;
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
