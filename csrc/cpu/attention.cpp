// Softmax attention, forward: tiles of keys, online softmax, grouped heads, causal and windowed work skipped.
//
// Regime: arithmetic (prompts, images). Per query row and key 2 (D + Dv) FLOPs. A tile of keys is packed once for all
// rows of a block:
//
//   block   up to 240 (D = 128) or 480 (D = 64) rows of one KV head, on AVX-512 360 or 720: row r is position r / G,
//           head r % G of its group, so that a strip of rows has nearly one causal limit and the group's heads share
//           the packed tile
//   tile    up to kTile = 192 keys, K transposed and V by columns (attention_tiles.h), 96 KiB each for D = 128, in L2
//           with the block's queries and sums of 120 or 180 KiB each
//   group   kGroup strips pass one panel of K, then of V, while it is in L1: their scores (24 x 192, 18 KiB) stay there
//           between the two products, and L2 is read once a group instead of once a strip (42 B a cycle is what one
//           strip after the other would ask for on AVX-512)
//   strip   6 rows x 2 vectors, the register tile; where a limit leaves one vector of a panel, 6 rows x 1
//
// Rows and keys are cut into equal blocks and tiles. Bytes of a block: q and out once, K and V once per block instead
// of once per row; the scores never leave L1, and sums go from registers to the output after a strip's last tile: with
// up to 192 keys they are nowhere else. Only panels that a row limit crosses are masked; panels and tiles that no row
// sees are skipped.
//
// Source: Dao, FlashAttention-2, 2023, section 3.1; online softmax: Milakov and Gimelshein, 2018.

#include "attention_sums.h"
#include "dispatch.h"
#include "parallel.h"

namespace qvl::cpu {
namespace {

constexpr int kTile = kScoreRow;
// Elements of a block's queries and sums. A CPU with AVX-512 has 1 MiB of L2, one without may have half of that.
constexpr std::int64_t kBlockElements = (Vec<float>::N == 16 ? 360 : 240) * 256;

// How a head's rows and keys are cut: into equal parts, so that none is a small rest.
struct Cut {
  std::int64_t rows, keys;  // of a block, of a tile
};

// Scratch of one thread, in elements of the compute type.
struct Layout {
  std::int64_t dim, columns, rows;  // D, Dv rounded up to whole panels, and the most rows of a block
  std::int64_t query, out, key, value, scores, top, total, size;

  Layout(std::int64_t d, std::int64_t dv, int panel) : dim(d), columns(round_up(dv, panel)) {
    constexpr std::int64_t kGroupRows = kGroup * kStrip, kMost = kBlockElements / 128 / kGroupRows;
    rows = std::clamp<std::int64_t>(kBlockElements / (dim + columns) / kGroupRows, 4, kMost) * kGroupRows;
    std::int64_t at = 0;
    const auto take = [&](std::int64_t n) {
      const std::int64_t start = at;
      at += round_up(n, 16);
      return start;
    };
    query = take(rows * dim);
    out = take(rows * columns);
    key = take(kTile * dim);
    value = take(kTile * columns);
    scores = take(kGroup * kStrip * kTile);
    top = take(rows);
    total = take(rows * panel / 2);
    size = at;
  }

  // Blocks are whole strips, so that a row's neighbours, and thus its sums, do not depend on `tasks`, the number of
  // blocks that the threads would like of each head. Below 48 rows packing would cost more than it brings.
  Cut cut(std::int64_t head_rows, std::int64_t len_k, std::int64_t tasks, int panel) const {
    const auto parts = [](std::int64_t n, std::int64_t size) {
      return std::max<std::int64_t>((n + size - 1) / size, 1);
    };
    const std::int64_t blocks = std::max(parts(head_rows, rows), std::min(parts(head_rows, 48), tasks));
    return {round_up(parts(head_rows, blocks), kStrip), round_up(parts(len_k, parts(len_k, kTile)), panel)};
  }
};

template <class T, class S>
class Block {
 public:
  using A = Acc<T>;
  using V = Vec<A>;

  Block(const AttentionParams& p, const Head<T, S>& head, const Layout& at, std::int64_t tile, A* scratch, Range rows)
      : p_(p),
        head_(head),
        at_(at),
        tile_(tile),
        m_(scratch),
        first_(rows.begin),
        count_(rows.end - rows.begin),
        strips_((count_ + kStrip - 1) / kStrip) {}

  void run() {
    load_queries();
    const Range all{range(0).begin, range(count_ - 1).end};  // limits rise with the position
    for (std::int64_t tile = all.begin / tile_ * tile_; tile < all.end; tile += tile_) {
      const std::int64_t keys = std::min<std::int64_t>(tile_, head_.len_k - tile);
      pack(tile, std::min(keys, all.end - tile));
      for (std::int64_t strip = 0; strip < strips_; strip += kGroup) add_group(strip, tile, keys);
    }
    write_unseen();
  }

 private:
  static constexpr A kHidden = -std::numeric_limits<A>::infinity();

  Range range(std::int64_t row) const { return visible(p_, head_.position(first_ + row), head_.len_k); }

  // The keys that a row of the strip sees.
  Range seen_by(std::int64_t strip) const {
    const std::int64_t row = strip * kStrip, last = std::min(row + kStrip, count_) - 1;
    return {range(row).begin, range(last).end};
  }

  void write_unseen() const {
    const A zeros[kMaxDim] = {};
    for (std::int64_t r = 0; r < count_; ++r) {
      const Range seen = seen_by(r / kStrip);
      if (seen.begin >= seen.end) write_row(head_, first_ + r, p_.value.size[3], zeros, kHidden, A(0));
    }
  }

  void load_queries() {
    const V scale(static_cast<A>(p_.scale * kLog2e));
    for (std::int64_t r = 0; r < strips_ * kStrip; ++r)
      widen_scaled(head_.query_of(first_ + std::min(r, count_ - 1)), at_.dim, scale, m_ + at_.query + r * at_.dim);
  }

  void pack(std::int64_t tile, std::int64_t keys) {
    const A* const scale = head_.key_scale ? head_.key_scale + tile * head_.key_scale_row : nullptr;
    pack_transposed(head_.key + tile * head_.key_row, head_.key_row, keys, at_.dim, m_ + at_.key, scale,
                    head_.key_scale_row);
    for (std::int64_t j = tile; j < tile + keys; ++j) {
      prefetch(head_.value + std::min(j + 8, tile + keys - 1) * head_.value_row,
               p_.value.size[3] * static_cast<std::int64_t>(sizeof(S)));
      to_panels(head_.value + j * head_.value_row, p_.value.size[3], j - tile, tile_, m_ + at_.value,
                head_.value_scale ? head_.value_scale[j * head_.value_scale_row] : A(1));
    }
  }

  // A strip and its part of the tile at hand: keys from a whole panel on; whether it has seen a tile before, and will
  // see another.
  struct Part {
    std::int64_t strip;
    Range keys;
    bool first, last;
  };

  void add_group(std::int64_t first_strip, std::int64_t tile, std::int64_t keys) {
    const int strips = static_cast<int>(std::min<std::int64_t>(kGroup, strips_ - first_strip));
    Part part[kGroup];
    std::int64_t begin = keys, end = 0;
    for (int s = 0; s < strips; ++s) {
      const Range seen = seen_by(first_strip + s);
      const std::int64_t from = std::max<std::int64_t>(seen.begin - tile, 0) / kPanel<A> * kPanel<A>;
      part[s] = {first_strip + s,
                 {from, std::max(from, std::min(seen.end - tile, keys))},
                 seen.begin >= tile,
                 seen.end <= tile + keys};
      if (seen.begin >= seen.end) part[s].keys.end = from;
      if (part[s].keys.begin < part[s].keys.end) begin = std::min(begin, from), end = std::max(end, part[s].keys.end);
    }
    A* const scores = m_ + at_.scores;
    for (std::int64_t j = begin; j < end; j += kPanel<A>)
      for (int s = 0; s < strips; ++s)
        if (j >= part[s].keys.begin && j < part[s].keys.end) score(part[s], j, scores + s * kStrip * kTile);
    A factor[kGroup * kStrip];
    for (int s = 0; s < strips; ++s)
      if (part[s].keys.begin < part[s].keys.end)
        soften_strip(part[s], tile, scores + s * kStrip * kTile, factor + s * kStrip);
    Target<T> target[kGroup];
    for (int s = 0; s < strips; ++s)
      if (part[s].last && part[s].keys.begin < part[s].keys.end) finish(part[s].strip, target[s]);
    for (std::int64_t c = 0; c < at_.columns; c += kPanel<A>)
      for (int s = 0; s < strips; ++s)
        if (part[s].keys.begin < part[s].keys.end)
          add_values(part[s], c, scores + s * kStrip * kTile, factor + s * kStrip, target[s]);
  }

  void score(const Part& part, std::int64_t j, A* scores) const {
    score_rows(m_ + at_.query + part.strip * kStrip * at_.dim, at_.dim, m_ + at_.key + j * at_.dim, at_.dim,
               part.keys.end - j, scores + j, kTile);
  }

  void score_again(const Part& part, std::int64_t tile, A* scores) const {
    for (std::int64_t j = part.keys.begin; j < part.keys.end; j += kPanel<A>) score(part, j, scores);
    hide_strip(part, tile, scores);
  }

  void hide_strip(const Part& part, std::int64_t tile, A* scores) const {
    const std::int64_t row = part.strip * kStrip, last = std::min(row + kStrip, count_) - 1;
    const std::int64_t padded = round_up(part.keys.end, V::N);
    if (head_.mask == nullptr && range(last).begin <= tile + part.keys.begin && range(row).end >= tile + padded) return;
    for (int r = 0; r < kStrip; ++r)
      hide(p_, head_, first_ + std::min(row + r, count_ - 1), tile, part.keys, padded, scores + r * kTile);
  }

  void soften_strip(const Part& part, std::int64_t tile, A* scores, A* shrink) {
    hide_strip(part, tile, scores);
    A *const tops = m_ + at_.top + part.strip * kStrip, *const totals = m_ + at_.total + part.strip * kStrip * V::N;
    const std::int64_t padded = round_up(part.keys.end, V::N);
    if (part.first) {
      for (int r = 0; r < kStrip; ++r) soften_first(part, r, padded, scores + r * kTile, tops[r]);
      return;
    }
    cpu::soften_strip(tops, totals, part.keys.begin, padded, scores, shrink, [&] { score_again(part, tile, scores); });
  }

  void soften_first(const Part& part, int r, std::int64_t padded, A* scores, A& top) {
    V most(kHidden), total = V::zero();
    for (std::int64_t j = part.keys.begin; j < padded; j += V::N) most = max(most, load(scores + j));
    top = largest(most);
    const V shift(top == kHidden ? A(0) : top);  // nothing seen: -inf - -inf is NaN
    for (std::int64_t j = part.keys.begin; j < padded; j += V::N) {
      const V e = exp2_to_127(load(scores + j) - shift);
      store(scores + j, e);
      total = total + e;
    }
    store(m_ + at_.total + (part.strip * kStrip + r) * V::N, total);
  }

  void finish(std::int64_t strip, Target<T>& target) const {
    const std::int64_t row = strip * kStrip;
    set_target(head_, first_ + row, std::min<std::int64_t>(kStrip, count_ - row), m_ + at_.top + row,
               m_ + at_.total + row * V::N, target);
  }

  // o[r][c] = o[r][c] shrink[r] + sum_j p[r][j] v[j][c] for one strip and one panel of columns; after the strip's last
  // tile to the output.
  void add_values(const Part& part, std::int64_t c, const A* p, const A* shrink, const Target<T>& target) {
    A* const o = m_ + at_.out + part.strip * kStrip * at_.columns + c * kStrip;
    const A* const values = m_ + at_.value + c * tile_;
    const auto [begin, end] = part.keys;
    Tile<A> acc;
    if (part.first) {
      clear_tile<A>(acc);
    } else {
      load_tile(o, kPanel<A>, acc);
      multiply_tile(shrink, acc);
    }
    multiply_add<kTile, 1>(p + begin, values + begin * kPanel<A>, end - begin, acc);
    if (!part.last) return store_tile(o, kPanel<A>, acc);
    write_tile(target, c, p_.value.size[3], acc);
  }

  const AttentionParams& p_;
  const Head<T, S>& head_;
  const Layout& at_;
  const std::int64_t tile_;
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
  const std::int64_t heads = segments * kv_heads, wanted = (4 * workers + heads - 1) / std::max<std::int64_t>(heads, 1);
  const auto cut_of = [&](const Head<T, S>& head) { return at.cut(head.rows(), head.len_k, wanted, kPanel<A>); };
  // Tasks are numbered by block, then head, then segment, the last block first: with a causal mask it costs the most,
  // and what is started last should be small.
  std::int64_t blocks = 0;
  for (std::int64_t s = 0; s < segments; ++s) {
    const Head<T, S> head = head_of<T, S>(p, s, 0);
    const std::int64_t rows = cut_of(head).rows;
    if (rows > 0) blocks = std::max(blocks, (head.rows() + rows - 1) / rows);
  }
  const std::int64_t work = p.query.numel() * std::max<std::int64_t>(p.key.size[2], 1);
  parallel_tasks(blocks * heads, work, workers, [&](std::int64_t task, std::int64_t worker) {
    const std::int64_t block = blocks - 1 - task / heads;
    const Head<T, S> head = head_of<T, S>(p, task % heads / kv_heads, task % kv_heads);
    const Cut cut = cut_of(head);
    const Range rows{block * cut.rows, std::min((block + 1) * cut.rows, head.rows())};
    if (rows.begin >= rows.end) return;
    Block<T, S>(p, head, at, cut.keys, p.scratch.as<A>() + worker * at.size, rows).run();
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
