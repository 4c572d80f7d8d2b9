// Attention over listed blocks, forward: the dense kernel's tiles (attention.cpp), gathered from a list.
//
// Regime: arithmetic (prompts). Per query row and listed key 2 (D + Dv) FLOPs. A block of queries is only 64 G rows,
// too few to pay for packing its keys, so that they are packed once for all blocks of queries:
//
//   stream  every so manieth KV head, one after the other, in one memory for a head's packed keys, 4 L (D + Dv) bytes.
//           There are as many streams as threads, or as heads: a thread works on a stream of its own, from cells that
//           it packed itself, and then helps with the others. Whoever needs a cell first packs it
//   rows    those of one query block and the heads that share its list, cut into chunks of 258 = 43 strips at most
//   tile    192 keys, three cells of 64 from anywhere: what the strip sees of each goes to its row of scores one after
//           the other, and from there on nothing knows of blocks; softmax and the strips' group are attention.cpp's
//   mask    a word of bits for each row and cell (sparse_attention.h): vectors that no row of a strip sees are left
//           out, and only where a row does not see all are scores hidden
//
// Bytes: a chunk reads a listed cell once from L2 or L3, 256 (D + Dv) of them for 64 keys, and does 128 R (D + Dv)
// FLOPs with its R rows: half a FLOP a byte and row, 32 for 64 rows.
//
// Source: Child et al., Generating long sequences with sparse transformers, 2019, section 5.5; Dao, FlashAttention-2,
// 2023, section 3.1.

#include "sparse_attention.h"

#include <atomic>
#include <new>
#include <thread>

#include "attention_sums.h"
#include "dispatch.h"
#include "parallel.h"

namespace qvl::cpu {
namespace {

constexpr int kMaxRows = 43 * kStrip;
constexpr int kCells = kScoreRow / 32;

using Flag = std::atomic<std::uint8_t>;

// How many tasks of a head are taken, and how many done.
struct Progress {
  std::atomic<std::int64_t> taken{0}, done{0};
};

// Scratch in elements of the compute type, after the heads' progress and which of their cells are packed: packed keys,
// those of a head for each stream; a part a thread.
struct Layout {
  std::int64_t dim, dim_v, columns, keys;  // D, Dv, Dv rounded up to whole panels, Lk to whole blocks
  std::int64_t heads, cells, head_size;    // KV heads; of each the cells, the elements of its packed keys
  std::int64_t streams, flags;             // bytes of all flags
  std::int64_t query, out, scores, top, total, thread_size;

  Layout(const SparseAttentionParams& p, std::int64_t threads, int panel)
      : dim(p.attention.query.size[3]),
        dim_v(p.attention.value.size[3]),
        columns(round_up(dim_v, panel)),
        keys(key_blocks(p) * p.block) {
    heads = p.attention.query.size[0] * p.attention.key.size[1];
    cells = keys / cell_of(p), head_size = keys * (dim + columns);
    streams = std::max<std::int64_t>(1, std::min(threads, heads));
    flags = round_up(heads * (static_cast<std::int64_t>(sizeof(Progress)) + cells), 64);
    Pieces pieces;
    query = pieces.take(kMaxRows * dim);
    out = pieces.take(kMaxRows * columns);
    scores = pieces.take(kGroup * kStrip * kScoreRow);
    top = pieces.take(kMaxRows);
    total = pieces.take(kMaxRows * panel / 2);
    thread_size = pieces.size();
  }
};

enum : std::uint8_t { kNothing, kBegun, kPacked };

// A KV head's keys and values: who needs a cell first packs it, and has it in its caches; who comes meanwhile waits.
template <class T>
class PackedHead {
 public:
  using A = Acc<T>;

  PackedHead(const Head<T>& head, const Layout& at, std::int64_t cell, A* packed, Flag* flags)
      : keys(packed), values(packed + at.keys * at.dim), head_(head), at_(at), cell_(cell), flags_(flags) {}

  void need(std::int64_t key) const {
    Flag& flag = flags_[key / cell_];
    std::uint8_t state = flag.load(std::memory_order_acquire);
    if (state == kPacked) return;
    if (state == kNothing && flag.compare_exchange_strong(state, kBegun)) {
      pack_cell(head_, key, cell_, at_.dim, at_.dim_v, keys + key * at_.dim, values + key * at_.columns);
      flag.store(kPacked, std::memory_order_release);
      return;
    }
    while (flag.load(std::memory_order_acquire) != kPacked) std::this_thread::yield();
  }

  A *const keys, *const values;

 private:
  const Head<T>& head_;
  const Layout& at_;
  const std::int64_t cell_;
  Flag* const flags_;
};

// Rows [first, first + count) of one sharing, all of the query block that starts at position `block`.
template <class T>
class Chunk {
 public:
  using A = Acc<T>;
  using V = Vec<A>;

  Chunk(const SparseAttentionParams& p, const Head<T>& head, const Layout& at, const PackedHead<T>& packed, A* scratch)
      : p_(p),
        head_(head),
        cell_(cell_of(p)),
        dim_(at.dim),
        columns_(at.columns),
        packed_(packed),
        query_(scratch + at.query),
        out_(scratch + at.out),
        scores_(scratch + at.scores),
        top_(scratch + at.top),
        total_(scratch + at.total) {}

  void run(std::int64_t block, std::int64_t first, std::int64_t count) {
    block_ = block * p_.block, first_ = first, count_ = count, strips_ = (count + kStrip - 1) / kStrip;
    load_queries();
    const Range seen{0, limit_of(p_.attention, head_, first + count - 1)};
    for_cells(p_, head_.first_head, block, seen, [&](Cell cell) {
      if (cells_ * cell_ == kScoreRow) add_tile(false);
      packed_.need(cell.key);
      tile_[cells_++] = cell;
    });
    add_tile(true);
  }

 private:
  // What a strip sees of a cell: keys [first, last), in whole vectors [begin, end); their scores start at column `at`.
  struct Piece {
    std::int64_t first, last, begin, end, at;
    bool hides;
  };

  void load_queries() {
    const V by(static_cast<A>(p_.attention.scale * kLog2e));
    const std::int64_t rows = strips_ * kStrip;
    for (std::int64_t r = 0; r < rows; ++r)
      widen_scaled(head_.query_of(first_ + std::min(r, count_ - 1)), dim_, by, query_ + r * dim_);
    std::fill_n(top_, rows, -std::numeric_limits<A>::infinity());
    std::fill_n(total_, rows * V::N, A(0));
  }

  void add_tile(bool last) {
    for (std::int64_t strip = 0; strip < strips_; strip += kGroup)
      add_group(strip, static_cast<int>(std::min<std::int64_t>(kGroup, strips_ - strip)), last);
    cells_ = 0, first_tile_ = false;
  }

  void add_group(std::int64_t first_strip, int strips, bool last) {
    for (int s = 0; s < strips; ++s) look(first_strip + s, s);
    for (int c = 0; c < cells_; ++c)
      for (std::int64_t j = 0; j < cell_; j += kPanel<A>)
        for (int s = 0; s < strips; ++s) score(first_strip + s, s, c, j);
    A shrink[kGroup * kStrip];
    for (int s = 0; s < strips; ++s)
      if (width_[s] > 0) soften(first_strip + s, s, shrink + s * kStrip);
    Target<T> target[kGroup];
    for (int s = 0; last && s < strips; ++s) {
      const std::int64_t row = (first_strip + s) * kStrip;
      set_target(head_, first_ + row, std::min<std::int64_t>(kStrip, count_ - row), top_ + row, total_ + row * V::N,
                 target[s]);
    }
    for (std::int64_t column = 0; column < columns_; column += kPanel<A>)
      for (int s = 0; s < strips; ++s)
        if (width_[s] > 0 || first_tile_ || last)
          add_values(first_strip + s, s, column, shrink + s * kStrip, last ? target + s : nullptr);
  }

  void look(std::int64_t strip, int s) {
    std::int64_t at = 0;
    for (int c = 0; c < cells_; ++c) {
      const Words& w = words_[s][c] = words_of(p_, head_, tile_[c], block_, first_ + strip * kStrip, first_ + count_);
      const std::int64_t begin = w.begin() / V::N * V::N, end = round_up(w.end(), V::N);
      pieces_[s][c] = {w.begin(), w.end(), begin, end, at, !w.cover(begin, end)};
      at += end - begin;
    }
    width_[s] = at;
  }

  A* row_of(int s) const { return scores_ + s * kStrip * kScoreRow; }

  void score(std::int64_t strip, int s, int c, std::int64_t j) const {
    const Piece& piece = pieces_[s][c];
    const std::int64_t begin = std::max(piece.begin, j), end = std::min(piece.end, j + kPanel<A>);
    if (begin < end)
      score_rows(query_ + strip * kStrip * dim_, dim_, packed_.keys + (tile_[c].key + j) * dim_ + begin - j, dim_,
                 end - begin, row_of(s) + piece.at + begin - piece.begin, kScoreRow);
  }

  void hide(int s) const {
    for (int c = 0; c < cells_; ++c) {
      const Piece& piece = pieces_[s][c];
      if (piece.hides) hide_unseen(words_[s][c], piece.begin, piece.end, row_of(s) + piece.at, kScoreRow);
    }
  }

  // A row's first top is the largest of its first vectors.
  void soften(std::int64_t strip, int s, A* shrink) const {
    A *const tops = top_ + strip * kStrip, *const scores = row_of(s);
    hide(s);
    for (int r = 0; r < kStrip; ++r)
      if (tops[r] == -std::numeric_limits<A>::infinity()) {
        const A* const row = scores + r * kScoreRow;
        tops[r] = largest(max(load(row), load(row + (width_[s] > V::N ? V::N : 0))));
      }
    soften_strip(tops, total_ + strip * kStrip * V::N, 0, width_[s], scores, shrink, [&] {
      for (int c = 0; c < cells_; ++c)
        for (std::int64_t j = 0; j < cell_; j += kPanel<A>) score(strip, s, c, j);
      hide(s);
    });
  }

  // o = o shrink + p v for one strip and one panel of columns; with the last tile to the output.
  void add_values(std::int64_t strip, int s, std::int64_t column, const A* shrink, const Target<T>* target) const {
    A* const o = out_ + strip * kStrip * columns_ + column * kStrip;
    Tile<A> acc;
    if (first_tile_) {
      clear_tile<A>(acc);
    } else {
      load_tile(o, kPanel<A>, acc);
      if (width_[s] > 0) multiply_tile(shrink, acc);
    }
    for (int c = 0; c < cells_; ++c) {
      const Piece& piece = pieces_[s][c];
      const A* const values = packed_.values + tile_[c].key * columns_ + column * cell_ + piece.first * kPanel<A>;
      const A* const p = row_of(s) + piece.at + piece.first - piece.begin;
      multiply_add<kScoreRow, 1>(p, values, piece.last - piece.first, acc);
    }
    if (target == nullptr) return store_tile(o, kPanel<A>, acc);
    write_tile(*target, column, p_.attention.value.size[3], acc);
  }

  const SparseAttentionParams& p_;
  const Head<T>& head_;
  const std::int64_t cell_, dim_, columns_;
  const PackedHead<T>& packed_;
  A *const query_, *const out_, *const scores_, *const top_, *const total_;
  std::int64_t block_ = 0, first_ = 0, count_ = 0, strips_ = 0;
  bool first_tile_ = true;
  int cells_ = 0;
  Cell tile_[kCells];
  Words words_[kGroup][kCells];
  Piece pieces_[kGroup][kCells];
  std::int64_t width_[kGroup];
};

template <class T>
void forward(const SparseAttentionParams& p, std::int64_t threads) {
  using A = Acc<T>;
  const AttentionParams& f = p.attention;
  const Layout at(p, threads, kPanel<A>);
  const Sharing sharing(p);
  auto* const progress = f.scratch.as<Progress>();
  auto* const flags = reinterpret_cast<Flag*>(progress + at.heads);
  for (std::int64_t i = 0; i < at.heads; ++i) new (progress + i) Progress;
  for (std::int64_t i = 0; i < at.heads * at.cells; ++i) new (flags + i) Flag(kNothing);
  A* const packed = reinterpret_cast<A*>(f.scratch.as<char>() + at.flags);
  A* const scratch = packed + at.streams * at.head_size;
  // Rows of a query block go in `chunks` parts of `size` rows.
  const std::int64_t rows = p.block * sharing.heads, chunks = blocks_of(rows, kMaxRows);
  const std::int64_t size = round_up(blocks_of(rows, chunks), kStrip);
  const std::int64_t of_block = chunks, of_sharing = query_blocks(p) * of_block, of_head = sharing.count * of_sharing;
  const auto run = [&](std::int64_t head, std::int64_t task, A* own) {
    const std::int64_t block = task / of_block % query_blocks(p);
    const Head<T> rows_of = head_of<T>(p, sharing, head, task / of_sharing);
    const std::int64_t begin = block * rows + task % of_block * size;
    const std::int64_t end = std::min({begin + size, (block + 1) * rows, rows_of.rows()});
    const PackedHead<T> keys(rows_of, at, cell_of(p), packed + head % at.streams * at.head_size,
                             flags + head * at.cells);
    if (begin < end) Chunk<T>(p, rows_of, at, keys, own).run(block, begin, end - begin);
  };
  // Whoever comes here has seen all tasks of the stream's head before taken, by threads that are at them.
  const auto help = [&](std::int64_t head, A* own) {
    if (progress[head].taken.load(std::memory_order_relaxed) >= of_head) return;
    if (head >= at.streams)
      while (progress[head - at.streams].done.load(std::memory_order_acquire) < of_head) std::this_thread::yield();
    for (std::int64_t task; (task = progress[head].taken.fetch_add(1, std::memory_order_relaxed)) < of_head;) {
      run(head, task, own);
      progress[head].done.fetch_add(1, std::memory_order_release);
    }
  };
  const std::int64_t work = f.query.numel() * std::max<std::int64_t>(f.key.size[2], 1);
  parallel_for(std::min(threads, at.heads * of_head), work, [&](std::int64_t first, std::int64_t last) {
    A* const own = scratch + first * at.thread_size;
    for (std::int64_t stream = first; stream < last; ++stream)
      for (std::int64_t head = stream % at.streams; head < at.heads; head += at.streams) help(head, own);
    for (std::int64_t head = 0; head < at.heads; ++head) help(head, own);
  });
}

}  // namespace

std::int64_t sparse_attention_scratch_bytes(const SparseAttentionParams& p, std::int64_t threads) {
  const bool wide = p.attention.query.dtype == DType::f64;
  const Layout at(p, threads, wide ? kPanel<double> : kPanel<float>);
  return at.flags + (at.streams * at.head_size + threads * at.thread_size) * (wide ? 8 : 4);
}

void sparse_attention(const SparseAttentionParams& p, std::int64_t threads) {
  with_storage_type(p.attention.query.dtype, [&](auto t) { forward<decltype(t)>(p, threads); });
}

}  // namespace qvl::cpu
