// Softmax attention, forward: tiles of keys, online softmax, grouped heads, causal and windowed work skipped.
//
// Regime: arithmetic (prompts, images). Per query row and key 2 (D + Dv) FLOPs; per tile of keys, K is packed and V, if
// it has to be converted, once for all rows of a block:
//
//   block   kBlockRows rows of one KV head: row r is position r / G, head r % G of its group, so that a strip of rows
//   has
//           nearly one causal limit and the group's heads share the packed tile
//   tile    kTile = 128 keys. K packed as panels of two vectors of keys and V as [128][Dv] stay in L2
//           (64 KiB each for D = 128); the accumulators of a block are 120 KiB
//   strip   kStrip = 6 rows: scores of 6 x 128 keys (3 KiB) stay in L1 between the two products
//   register tile  6 x 2 vectors: 12 accumulators, 2 loads and 6 broadcasts for 12 FMAs, which hides the latency of 4 x
//   2
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

constexpr int kTile = 128;
constexpr int kBlockRows = 40 * kStrip;

// Scratch of one thread, in elements of the compute type.
struct Layout {
  std::int64_t dim, dim_v;  // D, and Dv rounded up to whole panels
  std::int64_t query, out, key, value, scores, top, total, size;

  Layout(std::int64_t d, std::int64_t dv, int panel) : dim(d), dim_v(round_up(dv, panel)) {
    std::int64_t at = 0;
    const auto take = [&](std::int64_t n) {
      const std::int64_t start = at;
      at += round_up(n, 16);
      return start;
    };
    query = take(kBlockRows * dim);
    out = take(kBlockRows * dim_v);
    key = take(kTile * dim);
    value = take(kTile * dim_v);
    scores = take(kStrip * kTile);
    top = take(kBlockRows);
    total = take(kBlockRows);
    size = at;
  }
};

// o[r][c] = o[r][c] shrink[r] + sum_j p[r][j] v[j][c] over `keys` keys and two vectors of columns.
template <class A>
void add_values(const A* p, const A* v, std::int64_t v_row, std::int64_t keys, const A* shrink, A* o,
                std::int64_t o_row) {
  Tile<A> acc;
  load_tile(o, o_row, acc);
  for (int r = 0; r < kStrip; ++r)
    for (auto& part : acc[r]) part = part * Vec<A>(shrink[r]);
  multiply_add<kTile, 1>(p, v, v_row, keys, acc);
  store_tile(o, o_row, acc);
}

template <class T>
class Block {
 public:
  using A = Acc<T>;
  using V = Vec<A>;

  Block(const AttentionParams& p, const Head<T>& head, const Layout& at, A* scratch, std::int64_t first,
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
      pack_panels(head_.key + tile * head_.key_row, head_.key_row, keys, at_.dim, m_ + at_.key);
      const T* from = head_.value + tile * head_.value_row;
      const A* values = in_place() ? reinterpret_cast<const A*>(from) : m_ + at_.value;
      if (!in_place()) widen_rows(from, head_.value_row, keys, p_.value.size[3], at_.dim_v, m_ + at_.value);
      const std::int64_t value_row = in_place() ? head_.value_row : at_.dim_v;
      for (std::int64_t strip = 0; strip < strips_; ++strip) add_strip(strip, tile, keys, values, value_row);
    }
    write();
  }

 private:
  Range range(std::int64_t row) const { return visible(p_, head_.position(first_ + row), head_.len_k); }
  bool in_place() const {
    return std::is_same_v<T, A> && head_.value_row >= at_.dim_v && p_.value.size[3] == at_.dim_v;
  }

  void load_queries() {
    A wide[kMaxDim];
    for (std::int64_t r = 0; r < strips_ * kStrip; ++r) {
      widen(head_.query_of(first_ + std::min(r, count_ - 1)), at_.dim, at_.dim, wide);
      to_strip(wide, at_.dim, static_cast<A>(p_.scale * kLog2e), r, m_ + at_.query);
    }
    std::fill_n(m_ + at_.out, strips_ * kStrip * at_.dim_v, A(0));
    std::fill_n(m_ + at_.top, strips_ * kStrip, -std::numeric_limits<A>::infinity());
    std::fill_n(m_ + at_.total, strips_ * kStrip, A(0));
  }

  void add_strip(std::int64_t strip, std::int64_t tile, std::int64_t keys, const A* values, std::int64_t value_row) {
    const std::int64_t row = strip * kStrip, last = std::min(row + kStrip, count_) - 1;
    const std::int64_t begin = std::max<std::int64_t>(range(row).begin - tile, 0) / kPanel<A> * kPanel<A>;
    const std::int64_t end = std::min(range(last).end - tile, keys);
    if (begin >= end) return;
    A* scores = m_ + at_.scores;
    const A* query = m_ + at_.query + row * at_.dim;
    for (std::int64_t j = begin; j < end; j += kPanel<A>)
      score_panel(query, m_ + at_.key + j * at_.dim, at_.dim, scores + j, kTile);
    A shrink[kStrip];
    for (int r = 0; r < kStrip; ++r) {
      const std::int64_t padded = round_up(end, kPanel<A>);
      hide(p_, head_, first_ + std::min(row + r, count_ - 1), tile, {begin, end}, padded, scores + r * kTile);
      shrink[r] = soften(scores + r * kTile, begin, padded, m_[at_.top + row + r], m_[at_.total + row + r]);
    }
    for (std::int64_t c = 0; c < at_.dim_v; c += kPanel<A>)
      add_values(scores + begin, values + begin * value_row + c, value_row, end - begin, shrink,
                 m_ + at_.out + row * at_.dim_v + c, at_.dim_v);
  }

  void write() {
    for (std::int64_t r = 0; r < count_; ++r)
      write_row(head_, first_ + r, p_.value.size[3], m_ + at_.out + r * at_.dim_v, m_[at_.top + r], m_[at_.total + r]);
  }

  const AttentionParams& p_;
  const Head<T>& head_;
  const Layout& at_;
  A* const m_;
  const std::int64_t first_, count_, strips_;
};

template <class T>
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
    blocks = std::max(blocks, (head_of<T>(p, s, 0).rows() + kBlockRows - 1) / kBlockRows);
  const std::int64_t work = p.query.numel() * std::max<std::int64_t>(p.key.size[2], 1);
  parallel_tasks(blocks * segments * kv_heads, work, workers, [&](std::int64_t task, std::int64_t worker) {
    const std::int64_t block = blocks - 1 - task / (segments * kv_heads);
    const Head<T> head = head_of<T>(p, task % (segments * kv_heads) / kv_heads, task % kv_heads);
    const std::int64_t first = block * kBlockRows;
    if (first >= head.rows()) return;
    A* scratch = p.scratch.as<A>() + worker * at.size;
    Block<T>(p, head, at, scratch, first, std::min<std::int64_t>(kBlockRows, head.rows() - first)).run();
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
  with_storage_type(p.query.dtype, [&](auto t) { forward<decltype(t)>(p); });
}

}  // namespace qvl::cpu
