// Softmax attention, forward: tiles of keys, online softmax, grouped heads, causal and windowed work skipped.
//
// Regime: arithmetic (prompts, images). Per query row and key 2 (D + Dv) FLOPs; per tile of keys, K is packed and V, if
// it has to be converted, once for all rows of a block:
//
//   block   kBlockRows rows of one KV head: row r is position r / G, head r % G of its group, so that a strip of rows
//   has
//           nearly one causal limit and the group's heads share the packed tile
//   tile    kTile = 128 keys. K packed as panels of two vectors of keys, [panel][D][2 N], and V as [128][Dv] stay in L2
//           (64 KiB each for D = 128); the accumulators of a block are 120 KiB
//   strip   kStrip = 6 rows: scores of 6 x 128 keys (3 KiB) stay in L1 between the two products
//   register tile  6 x 2 vectors: 12 accumulators, 2 loads and 6 broadcasts for 12 FMAs, which hides the latency of 4 x
//   2
//
// Bytes of a block: q and out once, K and V once per block instead of once per row; the scores never leave L1.
// Only panels that a row limit crosses are masked; panels and tiles that no row sees are skipped.
//
// Source: Dao, FlashAttention-2, 2023, section 3.1; online softmax: Milakov and Gimelshein, 2018.

#include <algorithm>
#include <cmath>
#include <limits>

#include "../params.h"
#include "parallel.h"
#include "vec.h"

namespace qvl::cpu {
namespace {

constexpr int kStrip = 6;
constexpr int kTile = 128;
constexpr int kBlockRows = 40 * kStrip;
constexpr double kLog2e = 1.4426950408889634, kLn2 = 0.6931471805599453;

template <class A>
constexpr int kPanel = 2 * Vec<A>::N;

constexpr std::int64_t round_up(std::int64_t n, std::int64_t to) { return (n + to - 1) / to * to; }

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

// Where the tensors of one segment and KV head lie, and which keys its rows see.
template <class T>
struct Head {
  const T *query, *key, *value;
  T* out;
  Acc<T>* lse;
  std::int64_t len_q, len_k, group;
  std::int64_t query_row, query_head, key_row, value_row, out_row, out_head, lse_head;  // strides
  const TensorView* mask;
  std::int64_t batch, first_head;

  std::int64_t rows() const { return len_q * group; }
};

struct Range {
  std::int64_t begin, end;
};

// The keys that the query at `position` sees.
Range visible(const AttentionParams& p, std::int64_t position, std::int64_t len_k) {
  std::int64_t begin = 0, end = len_k;
  if (p.left >= 0) begin = std::max(begin, position - p.left);
  if (p.causal) end = std::min(end, position + 1);
  if (p.right >= 0) end = std::min(end, position + p.right + 1);
  return {begin, std::max(begin, end)};
}

// s[r][j] = sum_d q[r][d] k[d][j] for one strip and one panel.
template <class A>
void score_panel(const A* q, const A* k, std::int64_t dim, A* s) {
  using V = Vec<A>;
  V acc[kStrip][2];
  for (std::int64_t d = 0; d < dim; ++d) {
    const V k0 = load(k + d * kPanel<A>), k1 = load(k + d * kPanel<A> + V::N);
    for (int r = 0; r < kStrip; ++r) {
      const V x(q[r * dim + d]);
      acc[r][0] = fma(x, k0, acc[r][0]);
      acc[r][1] = fma(x, k1, acc[r][1]);
    }
  }
  for (int r = 0; r < kStrip; ++r) {
    store(s + r * kTile, acc[r][0]);
    store(s + r * kTile + V::N, acc[r][1]);
  }
}

// o[r][c] = o[r][c] shrink[r] + sum_j p[r][j] v[j][c] for keys [begin, end) and two vectors of columns.
template <class A>
void add_values(const A* p, const A* v, std::int64_t v_row, std::int64_t begin, std::int64_t end, const A* shrink, A* o,
                std::int64_t o_row) {
  using V = Vec<A>;
  V acc[kStrip][2];
  for (int r = 0; r < kStrip; ++r) {
    const V x(shrink[r]);
    acc[r][0] = load(o + r * o_row) * x;
    acc[r][1] = load(o + r * o_row + V::N) * x;
  }
  for (std::int64_t j = begin; j < end; ++j) {
    const V v0 = load(v + j * v_row), v1 = load(v + j * v_row + V::N);
    for (int r = 0; r < kStrip; ++r) {
      const V x(p[r * kTile + j]);
      acc[r][0] = fma(x, v0, acc[r][0]);
      acc[r][1] = fma(x, v1, acc[r][1]);
    }
  }
  for (int r = 0; r < kStrip; ++r) {
    store(o + r * o_row, acc[r][0]);
    store(o + r * o_row + V::N, acc[r][1]);
  }
}

// Copies n elements of T to the compute type, zeros up to `padded`.
template <class T>
void widen(const T* from, std::int64_t n, std::int64_t padded, Acc<T>* to) {
  using V = Vec<Acc<T>>;
  std::int64_t i = 0;
  for (; i + V::N <= n; i += V::N) store(to + i, load(from + i));
  if (i < n) store(to + i, load(from + i, static_cast<int>(n - i)), static_cast<int>(n - i));
  std::fill(to + n, to + padded, Acc<T>(0));
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
      pack_keys(tile, keys);
      const A* values =
          in_place() ? reinterpret_cast<const A*>(head_.value) + tile * head_.value_row : pack_values(tile, keys);
      const std::int64_t value_row = in_place() ? head_.value_row : at_.dim_v;
      for (std::int64_t strip = 0; strip < strips_; ++strip) add_strip(strip, tile, keys, values, value_row);
    }
    write();
  }

 private:
  std::int64_t position(std::int64_t row) const { return head_.len_k - head_.len_q + (first_ + row) / head_.group; }
  Range range(std::int64_t row) const { return visible(p_, position(row), head_.len_k); }
  bool in_place() const {
    return std::is_same_v<T, A> && head_.value_row >= at_.dim_v && p_.value.size[3] == at_.dim_v;
  }

  void load_queries() {
    const V scale(static_cast<A>(p_.scale * kLog2e));
    for (std::int64_t r = 0; r < strips_ * kStrip; ++r) {
      A* to = m_ + at_.query + r * at_.dim;
      const std::int64_t row = first_ + std::min(r, count_ - 1);
      widen(head_.query + row / head_.group * head_.query_row + row % head_.group * head_.query_head, at_.dim, at_.dim,
            to);
      std::int64_t d = 0;
      for (; d + V::N <= at_.dim; d += V::N) store(to + d, load(to + d) * scale);
      for (; d < at_.dim; ++d) to[d] *= static_cast<A>(p_.scale * kLog2e);
    }
    std::fill_n(m_ + at_.out, strips_ * kStrip * at_.dim_v, A(0));
    std::fill_n(m_ + at_.top, strips_ * kStrip, -std::numeric_limits<A>::infinity());
    std::fill_n(m_ + at_.total, strips_ * kStrip, A(0));
  }

  // [panel][D][2 N], zeros for the keys that fill up the last panel.
  void pack_keys(std::int64_t tile, std::int64_t keys) {
    A wide[8][kMaxDim];
    for (std::int64_t j = 0; j < round_up(keys, kPanel<A>); j += 8) {
      const A* rows[8];
      for (int i = 0; i < 8; ++i) {
        const T* from = head_.key + (tile + j + i) * head_.key_row;
        if (j + i >= keys) {
          std::fill_n(wide[i], at_.dim, A(0));
          rows[i] = wide[i];
        } else if constexpr (std::is_same_v<T, A>) {
          rows[i] = from;
        } else {
          widen(from, at_.dim, at_.dim, wide[i]);
          rows[i] = wide[i];
        }
      }
      A* to = m_ + at_.key + j / kPanel<A> * kPanel<A> * at_.dim + j % kPanel<A>;
      transpose(rows, to);
    }
  }

  void transpose(const A* const (&rows)[8], A* to) const {
    std::int64_t d = 0;
    if constexpr (std::is_same_v<A, float>)
      for (; d + 8 <= at_.dim; d += 8) {
        const A* from[8];
        for (int i = 0; i < 8; ++i) from[i] = rows[i] + d;
        transpose8x8(from, to + d * kPanel<A>, kPanel<A>);
      }
    for (; d < at_.dim; ++d)
      for (int i = 0; i < 8; ++i) to[d * kPanel<A> + i] = rows[i][d];
  }

  const A* pack_values(std::int64_t tile, std::int64_t keys) {
    A* to = m_ + at_.value;
    for (std::int64_t j = 0; j < keys; ++j)
      widen(head_.value + (tile + j) * head_.value_row, p_.value.size[3], at_.dim_v, to + j * at_.dim_v);
    return to;
  }

  void add_strip(std::int64_t strip, std::int64_t tile, std::int64_t keys, const A* values, std::int64_t value_row) {
    const std::int64_t row = strip * kStrip, last = std::min(row + kStrip, count_) - 1;
    const std::int64_t begin = std::max<std::int64_t>(range(row).begin - tile, 0) / kPanel<A> * kPanel<A>;
    const std::int64_t end = std::min(range(last).end - tile, keys);
    if (begin >= end) return;
    A* scores = m_ + at_.scores;
    const A* query = m_ + at_.query + row * at_.dim;
    for (std::int64_t j = begin; j < end; j += kPanel<A>)
      score_panel(query, m_ + at_.key + j * at_.dim, at_.dim, scores + j);
    A shrink[kStrip];
    for (int r = 0; r < kStrip; ++r) {
      hide(std::min(row + r, count_ - 1), tile, begin, end, scores + r * kTile);
      shrink[r] = soften(scores + r * kTile, begin, end, m_[at_.top + row + r], m_[at_.total + row + r]);
    }
    for (std::int64_t c = 0; c < at_.dim_v; c += kPanel<A>)
      add_values(scores, values + c, value_row, begin, end, shrink, m_ + at_.out + row * at_.dim_v + c, at_.dim_v);
  }

  // -inf where the row does not see the key, up to the end of the last panel; the mask's values where it has them.
  void hide(std::int64_t row, std::int64_t tile, std::int64_t begin, std::int64_t end, A* scores) const {
    constexpr A kHidden = -std::numeric_limits<A>::infinity();
    const Range seen = range(row);
    for (std::int64_t j = begin; j < std::min(seen.begin - tile, end); ++j) scores[j] = kHidden;
    for (std::int64_t j = std::max(seen.end - tile, begin); j < round_up(end, kPanel<A>); ++j) scores[j] = kHidden;
    if (head_.mask == nullptr) return;
    const TensorView& mask = *head_.mask;
    const std::int64_t at = head_.batch * mask.stride[0] +
                            (head_.first_head + (first_ + row) % head_.group) * mask.stride[1] +
                            (first_ + row) / head_.group * mask.stride[2] + tile * mask.stride[3];
    if (mask.dtype == DType::boolean) {
      const bool* keep = mask.as<bool>() + at;
      for (std::int64_t j = begin; j < end; ++j)
        if (!keep[j * mask.stride[3]]) scores[j] = kHidden;
    } else {
      const A* add = mask.as<A>() + at;
      for (std::int64_t j = begin; j < end; ++j) scores[j] += add[j * mask.stride[3]] * static_cast<A>(kLog2e);
    }
  }

  // Turns scores into exp2(score - top), with `top` the largest so far; returns what earlier sums shrink by.
  A soften(A* scores, std::int64_t begin, std::int64_t end, A& top, A& total) const {
    V largest_so_far(top);
    for (std::int64_t j = begin; j < end; j += V::N) largest_so_far = max(largest_so_far, load(scores + j));
    const A now = largest(largest_so_far);
    const A safe = now == -std::numeric_limits<A>::infinity() ? A(0) : now;  // nothing seen yet: -inf - -inf is NaN
    V added;
    const V shift(safe);
    for (std::int64_t j = begin; j < end; j += V::N) {
      const V e = exp2_of_nonpositive(load(scores + j) - shift);
      store(scores + j, e);
      added = added + e;
    }
    const A shrink = std::exp2(top - safe);
    total = total * shrink + sum(added);
    top = now;
    return shrink;
  }

  void write() {
    const std::int64_t dim_v = p_.value.size[3];
    for (std::int64_t r = 0; r < count_; ++r) {
      const std::int64_t row = first_ + r, query = row / head_.group, head = row % head_.group;
      const A total = m_[at_.total + r], top = m_[at_.top + r];
      const V inverse(total == 0 ? A(0) : A(1) / total);
      const A* from = m_ + at_.out + r * at_.dim_v;
      T* to = head_.out + query * head_.out_row + head * head_.out_head;
      std::int64_t c = 0;
      for (; c + V::N <= dim_v; c += V::N) store(to + c, load(from + c) * inverse);
      if (const int rest = static_cast<int>(dim_v - c); rest > 0) store(to + c, load(from + c, rest) * inverse, rest);
      if (head_.lse != nullptr) head_.lse[head * head_.lse_head + query] = top * static_cast<A>(kLn2) + std::log(total);
    }
  }

  static constexpr int kMaxDim = 256;

  const AttentionParams& p_;
  const Head<T>& head_;
  const Layout& at_;
  A* const m_;
  const std::int64_t first_, count_, strips_;
};

template <class T>
Head<T> head_of(const AttentionParams& p, std::int64_t segment, std::int64_t kv_head) {
  const TensorView &q = p.query, &k = p.key, &v = p.value, &o = p.out;
  const bool packed = p.offsets_q.data != nullptr;
  const std::int64_t batch = packed ? 0 : segment;
  const std::int64_t q0 = packed ? p.offsets_q.as<std::int64_t>()[segment] : 0;
  const std::int64_t k0 = packed ? p.offsets_k.as<std::int64_t>()[segment] : 0;
  Head<T> h{};
  h.group = q.size[1] / k.size[1];
  h.batch = batch;
  h.first_head = kv_head * h.group;
  h.len_q = packed ? p.offsets_q.as<std::int64_t>()[segment + 1] - q0 : q.size[2];
  h.len_k = packed ? p.offsets_k.as<std::int64_t>()[segment + 1] - k0 : k.size[2];
  if (p.key_lengths.data)
    h.len_k = std::clamp<std::int64_t>(p.key_lengths.as<std::int64_t>()[batch * p.key_lengths.stride[0]], 0, h.len_k);
  h.query = q.as<T>() + batch * q.stride[0] + h.first_head * q.stride[1] + q0 * q.stride[2];
  h.key = k.as<T>() + batch * k.stride[0] + kv_head * k.stride[1] + k0 * k.stride[2];
  h.value = v.as<T>() + batch * v.stride[0] + kv_head * v.stride[1] + k0 * v.stride[2];
  h.out = o.as<T>() + batch * o.stride[0] + h.first_head * o.stride[1] + q0 * o.stride[2];
  h.query_row = q.stride[2], h.query_head = q.stride[1];
  h.key_row = k.stride[2], h.value_row = v.stride[2];
  h.out_row = o.stride[2], h.out_head = o.stride[1];
  if (p.lse.data) {
    h.lse = p.lse.as<Acc<T>>() + batch * p.lse.stride[0] + h.first_head * p.lse.stride[1] + q0;
    h.lse_head = p.lse.stride[1];
  }
  h.mask = p.mask.data ? &p.mask : nullptr;
  return h;
}

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

std::int64_t attention_scratch_bytes(std::int64_t dim, std::int64_t dim_v, DType dtype, std::int64_t threads) {
  if (dtype == DType::f64) return threads * Layout(dim, dim_v, kPanel<double>).size * 8;
  return threads * Layout(dim, dim_v, kPanel<float>).size * 4;
}

void attention(const AttentionParams& p) {
  switch (p.query.dtype) {
    case DType::f32:
      return forward<float>(p);
    case DType::bf16:
      return forward<bf16>(p);
    case DType::f16:
      return forward<f16>(p);
    default:
      return forward<double>(p);
  }
}

}  // namespace qvl::cpu
