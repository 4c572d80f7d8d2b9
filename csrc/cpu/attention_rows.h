// What the two forward kernels of dense attention share: how rows and keys are cut, what a strip of a block's rows sees
// of a tile of keys, and the order of blocks. `Block` of attention.cpp multiplies floats, `RoundedBlock` of
// attention_rounded.cpp integers.
#pragma once

#include "attention_sums.h"
#include "dispatch.h"
#include "parallel.h"

namespace qvl::cpu {

constexpr int kTile = kScoreRow;
constexpr int kPiece = 64;  // keys of a tile whose weights and values share scales, where they are integers
constexpr int kPieces = kTile / kPiece;
// Elements of a block's queries and sums. A CPU with AVX-512 has 1 MiB of L2, one without may have half of that.
constexpr std::int64_t kBlockElements = (Vec<float>::N == 16 ? 360 : 240) * 256;
// Elements of packed tiles that a thread keeps, 2.25 MiB: 2304 keys for D = 128, 4608 for D = 64. If those are all keys
// of a head they are packed once, and not once for each block of its rows, which takes a twentieth of the time.
constexpr std::int64_t kKeptElements = 12 * kTile * 256, kMostTiles = 64;

// How a head's rows and keys are cut: into equal parts, so that none is a small rest.
struct Cut {
  std::int64_t rows, keys;  // of a block, of a tile
};

// Scratch of one thread, in elements of the compute type.
struct Layout {
  std::int64_t dim, columns, rows;  // D, or pairs of D; Dv rounded up to whole panels; and the most rows of a block
  std::int64_t query, out, scores, top, total, query_step, weight_step, packed, size;
  std::int64_t key, value, key_step, value_step, tile_size;  // within a packed tile; its size
  bool kept;                                                 // whether there is memory for all tiles of a head

  Layout(const AttentionParams& p, int panel, bool rounded = false)
      : dim(rounded ? (p.query.size[3] + 1) / 2 : p.query.size[3]), columns(round_up(p.value.size[3], panel)) {
    const std::int64_t d = p.query.size[3];
    constexpr std::int64_t kGroupRows = kGroup * kStrip, kMost = kBlockElements / 128 / kGroupRows;
    rows = std::clamp<std::int64_t>(kBlockElements / (d + columns) / kGroupRows, 4, kMost) * kGroupRows;
    Pieces pieces;
    Pieces of_tile;
    key = of_tile.take(kTile * dim);
    value = of_tile.take(kTile * columns);
    key_step = of_tile.take(rounded ? kTile : 0);
    value_step = of_tile.take(rounded ? kPieces * columns : 0);
    tile_size = of_tile.size();
    const std::int64_t tiles = (longest_sequence(p.offsets_k, p.key.size[2]) + kTile - 1) / kTile;
    kept = tiles <= kMostTiles && tiles * tile_size <= kKeptElements;
    query = pieces.take(rows * dim);
    out = pieces.take(rows * columns);
    packed = pieces.take(tile_size * (kept ? tiles : 1));
    scores = pieces.take(kGroup * kStrip * kTile);
    top = pieces.take(rows);
    total = pieces.take(rows * panel / 2);
    query_step = pieces.take(rounded ? rows : 0);
    weight_step = pieces.take(rounded ? kGroup * kPieces * kStrip : 0);
    size = pieces.size();
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

// A strip and its part of the tile at hand: keys from a whole panel on; whether it has seen a tile before, and will see
// another.
struct Part {
  std::int64_t strip;
  Range keys;
  bool first, last;

  bool empty() const { return keys.begin >= keys.end; }
};

// The strips of a group, and the keys of the tile that any of them sees.
struct Group {
  Part part[kGroup];
  int strips;
  Range keys;
};

// Rows [first, first + count) of a head. What derives from it has load_queries, pack and add_group. `packed`: how many
// keys of each of the head's tiles are packed already, by blocks before this one; null if tiles are not kept.
template <class T, class S>
class Rows {
 public:
  using A = Acc<T>;
  using V = Vec<A>;

  Rows(const AttentionParams& p, const Head<T, S>& head, const Layout& at, std::int64_t tile, A* scratch, Range rows,
       std::int64_t* packed)
      : p_(p),
        head_(head),
        at_(at),
        tile_(tile),
        m_(scratch),
        first_(rows.begin),
        count_(rows.end - rows.begin),
        strips_((count_ + kStrip - 1) / kStrip),
        packed_keys_(packed) {}

  // Calls block.pack(tile, keys), unless that is done, and then block.add_group(group, tile) for every group of strips,
  // for each tile that a row sees.
  template <class B>
  void for_tiles(B& block) {
    const Range all{range(0).begin, range(count_ - 1).end};  // limits rise with the position
    for (std::int64_t tile = all.begin / tile_ * tile_; tile < all.end; tile += tile_) {
      const std::int64_t keys = std::min<std::int64_t>(tile_, head_.len_k - tile),
                         seen = std::min(keys, all.end - tile);
      std::int64_t* const done = packed_keys_ == nullptr ? nullptr : packed_keys_ + tile / tile_;
      tile_memory_ = m_ + at_.packed + (done == nullptr ? 0 : tile / tile_ * at_.tile_size);
      if (done == nullptr || *done < seen) {
        block.pack(tile, seen);
        if (done != nullptr) *done = seen;
      }
      for (std::int64_t strip = 0; strip < strips_; strip += kGroup) block.add_group(group_of(strip, tile, keys), tile);
    }
    write_unseen();
  }

 protected:
  static constexpr A kHidden = -std::numeric_limits<A>::infinity();

  Range range(std::int64_t row) const { return visible(p_, head_.position(first_ + row), head_.len_k); }

  // The keys that a row of the strip sees.
  Range seen_by(std::int64_t strip) const {
    const std::int64_t row = strip * kStrip, last = std::min(row + kStrip, count_) - 1;
    return {range(row).begin, range(last).end};
  }

  void hide_strip(const Part& part, std::int64_t tile, A* scores) const {
    const std::int64_t row = part.strip * kStrip, last = std::min(row + kStrip, count_) - 1;
    const std::int64_t padded = round_up(part.keys.end, V::N);
    if (head_.mask == nullptr && range(last).begin <= tile + part.keys.begin && range(row).end >= tile + padded) return;
    for (int r = 0; r < kStrip; ++r)
      hide(p_, head_, first_ + std::min(row + r, count_ - 1), tile, part.keys, padded, scores + r * kTile);
  }

  void finish(std::int64_t strip, Target<T>& target) const {
    const std::int64_t row = strip * kStrip;
    set_target(head_, first_ + row, std::min<std::int64_t>(kStrip, count_ - row), m_ + at_.top + row,
               m_ + at_.total + row * V::N, target);
  }

  const AttentionParams& p_;
  const Head<T, S>& head_;
  const Layout& at_;
  const std::int64_t tile_;
  A* const m_;
  A* tile_memory_ = nullptr;  // the packed tile at hand
  const std::int64_t first_, count_, strips_;

 private:
  std::int64_t* const packed_keys_;

  Group group_of(std::int64_t first_strip, std::int64_t tile, std::int64_t keys) const {
    Group group{{}, static_cast<int>(std::min<std::int64_t>(kGroup, strips_ - first_strip)), {keys, 0}};
    for (int s = 0; s < group.strips; ++s) {
      Part& part = group.part[s];
      const Range seen = seen_by(first_strip + s);
      const std::int64_t from = std::max<std::int64_t>(seen.begin - tile, 0) / kPanel<A> * kPanel<A>;
      part = {first_strip + s,
              {from, std::max(from, std::min(seen.end - tile, keys))},
              seen.begin >= tile,
              seen.end <= tile + keys};
      if (seen.begin >= seen.end) part.keys.end = from;
      if (part.empty()) continue;
      group.keys = {std::min(group.keys.begin, from), std::max(group.keys.end, part.keys.end)};
    }
    return group;
  }

  void write_unseen() const {
    const A zeros[kMaxDim] = {};
    for (std::int64_t r = 0; r < count_; ++r) {
      const Range seen = seen_by(r / kStrip);
      if (seen.begin >= seen.end) write_row(head_, first_ + r, p_.value.size[3], zeros, kHidden, A(0));
    }
  }
};

// Runs a B, one of the kinds of block, for all rows of all heads.
template <class B, class T, class S, class L>
void run_blocks(const AttentionParams& p, const L& at) {
  using A = Acc<T>;
  const std::int64_t kv_heads = p.key.size[1];
  const std::int64_t segments = p.offsets_q.data ? p.offsets_q.size[0] - 1 : p.query.size[0];
  const std::int64_t workers = p.scratch.numel() / (at.size * static_cast<std::int64_t>(sizeof(A)));
  const std::int64_t heads = segments * kv_heads, wanted = (4 * workers + heads - 1) / std::max<std::int64_t>(heads, 1);
  const auto cut_of = [&](const Head<T, S>& head) { return at.cut(head.rows(), head.len_k, wanted, kPanel<A>); };
  std::int64_t blocks = 0;
  for (std::int64_t s = 0; s < segments; ++s) {
    const Head<T, S> head = head_of<T, S>(p, s, 0);
    const std::int64_t rows = cut_of(head).rows;
    if (rows > 0) blocks = std::max(blocks, (head.rows() + rows - 1) / rows);
  }
  const std::int64_t work = p.query.numel() * std::max<std::int64_t>(p.key.size[2], 1);
  const auto run_block = [&](std::int64_t head_at, std::int64_t number, std::int64_t worker, std::int64_t* packed) {
    const Head<T, S> head = head_of<T, S>(p, head_at / kv_heads, head_at % kv_heads);
    const Cut cut = cut_of(head);
    const Range rows{number * cut.rows, std::min((number + 1) * cut.rows, head.rows())};
    if (rows.begin >= rows.end) return;
    B block(p, head, at, cut.keys, p.scratch.as<A>() + worker * at.size, rows, packed);
    block.run();
  };
  // The last block first: with a causal mask it sees the most keys. Where heads are enough for the threads and their
  // packed tiles are kept, a head is a task.
  if (at.kept && wanted == 1)
    return parallel_tasks(heads, work, workers, [&](std::int64_t task, std::int64_t worker) {
      std::int64_t packed[kMostTiles] = {};
      for (std::int64_t number = blocks - 1; number >= 0; --number) run_block(task, number, worker, packed);
    });
  // Else tasks are numbered by block, then head, then segment: what is started last should be small.
  parallel_tasks(blocks * heads, work, workers, [&](std::int64_t task, std::int64_t worker) {
    run_block(task % heads, blocks - 1 - task / heads, worker, nullptr);
  });
}

}  // namespace qvl::cpu
