// Softmax attention, forward, on AMX: attention.cpp's blocks and tiles with both products of bfloat16.
//
// Regime: arithmetic, where queries are bfloat16 or the caller lets factors be rounded (`AttentionParams::rounded`).
// 256 scores and their values are 128 cycles of AMX for D = 128, and 16 exponentials of 7 cycles: each as long as the
// other, so everything that is not one of the two counts.
//
//   block   up to 640 KiB of queries (bfloat16, as A) and sums (floats, as registers hold them): 832 rows for D = 128,
//           1696 for D = 64. Row r is position r / G, head r % G of its group, as in attention.cpp
//   tile    up to 256 keys, K transposed and V by pairs (attention_amx.h), 64 KiB each for D = 128, in L2 with the
//           block, for which they are packed once
//   strip   32 rows of a block. Its weights of one tile, 16 KiB as A, stay in L1 between the two products
//   step    32 keys: 32 x 32 scores, 4 KiB, in one of two places: while AMX computes those of the next step, the vector
//           units make weights of the last ones, a few rows after each four products
//
// Scores are floats, scaled after the product, so that only what is multiplied is rounded: q, k, v (not at all where
// they are bfloat16) and the weights, whose sums are taken before. Steps that no row of a strip sees are skipped, masks
// looked at only in steps that some row does not see whole.
//
// Weights are relative to a top near the row's largest score (attention_sums.h): that of the first step that it sees,
// until a tile's sum passes 2^16; then the tile's largest score, and the tile's weights are computed anew. This is
// decided by row, so that rows do not depend on each other, nor on how many threads there are. A row that has seen
// nothing has the lowest float as its top, which the first key that it sees is too far above.
//
// Source: Dao, FlashAttention-2, 2023, section 3.1; online softmax: Milakov and Gimelshein, 2018.

#include "attention_amx.h"

#include "attention_rows.h"

namespace qvl::cpu {

#if defined(__AVX512F__)

namespace {

constexpr int kKeys = 256;                       // of a tile
constexpr std::int64_t kBlockBytes = 640 << 10;  // of a block's queries and sums
constexpr std::int64_t kFewProducts = 1 << 17;   // of a head: as many and fewer are faster without packing
constexpr float kMostAdded = 65536;              // to a row's sum by one tile, relative to its top
constexpr float kLowest = std::numeric_limits<float>::lowest();

// Scratch of one thread, in floats.
struct AmxLayout {
  std::int64_t dim, columns, rows;  // D and Dv rounded up to whole steps; the most rows of a block
  std::int64_t query, out, key, value, scores, weights, top, total, added, size;
  static constexpr bool kept = false;  // packed tiles: there is memory for one

  AmxLayout(std::int64_t d, std::int64_t dv) : dim(round_up(d, kSide)), columns(round_up(dv, kSide)) {
    rows = kBlockBytes / (2 * dim + 4 * columns) / kSide * kSide;
    Pieces pieces;
    query = pieces.take(rows * dim / 2);
    out = pieces.take(rows * columns);
    key = pieces.take(kKeys * dim / 2);
    value = pieces.take(kKeys * columns / 2);
    scores = pieces.take(2 * kSums);
    weights = pieces.take(kSide * kKeys / 2);
    top = pieces.take(rows);
    total = pieces.take(rows * kTileRows);
    added = pieces.take(kSide * kTileRows);
    size = pieces.size();
  }

  // As Layout::cut does, and below 64 rows packing would cost more than it brings.
  Cut cut(std::int64_t head_rows, std::int64_t len_k, std::int64_t tasks, int) const {
    const auto parts = [](std::int64_t n, std::int64_t size) {
      return std::max<std::int64_t>((n + size - 1) / size, 1);
    };
    const std::int64_t blocks = std::max(parts(head_rows, rows), std::min(parts(head_rows, 2 * kSide), tasks));
    return {round_up(parts(head_rows, blocks), kSide), round_up(parts(len_k, parts(len_k, kKeys)), kSide)};
  }
};

// 32 rows of a block, and what they see of the tile at hand, in whole steps of 32 keys.
struct Strip {
  std::int64_t row;  // the first, of the head
  const bf16* query;
  float *out, *top, *total;
  std::int64_t begin, end, first_step;  // steps of the tile; first_step shows every row a key, if one does
  bool first;                           // no tile was before
};

template <class T, class S>
class AmxBlock {
  using V = Vec<float>;

 public:
  AmxBlock(const AttentionParams& p, const Head<T, S>& head, const AmxLayout& at, std::int64_t tile, float* scratch,
           Range rows, const std::int64_t*)
      : p_(p),
        head_(head),
        at_(at),
        tile_(tile),
        m_(scratch),
        first_(rows.begin),
        count_(rows.end - rows.begin),
        scale_(static_cast<float>(p.scale * kLog2e)) {}

  void run() {
    const Tiles registers;
    load_queries();
    const Range all{range(first_).begin, range(first_ + count_ - 1).end};  // limits rise with the position
    for (std::int64_t tile = all.begin / tile_ * tile_; tile < all.end; tile += tile_) {
      const std::int64_t keys = std::min({tile_, head_.len_k - tile, all.end - tile});
      pack(tile, keys);
      for (std::int64_t r = 0; r < count_; r += kSide) {
        const Strip strip = strip_of(r, tile, keys);
        if (strip.begin < strip.end) add_strip(strip, tile);
      }
    }
    write();
  }

 private:
  bf16* halves(std::int64_t at) const { return reinterpret_cast<bf16*>(m_ + at); }
  Range range(std::int64_t row) const { return visible(p_, head_.position(row), head_.len_k); }
  std::int64_t last_of(std::int64_t row) const { return std::min(row + kSide, first_ + count_) - 1; }

  void load_queries() {
    alignas(64) bf16 buffer[kMaxDim];
    for (std::int64_t r = 0; r < round_up(count_, kSide); ++r) {
      const std::int64_t dim = r < count_ ? p_.query.size[3] : 0;  // rows that fill up the last strip are zeros
      const bf16* const row = in_halves(head_.query_of(first_ + std::min(r, count_ - 1)), dim, at_.dim, 1.0f, buffer);
      to_rows(row, at_.dim, r % kSide, halves(at_.query) + r / kSide * kSide * at_.dim);
    }
    std::fill_n(m_ + at_.top, round_up(count_, kSide), kLowest);
    std::fill_n(m_ + at_.total, round_up(count_, kSide) * kTileRows, 0.0f);
  }

  void pack(std::int64_t tile, std::int64_t keys) {
    const auto rows_of = [&](const S* data, std::int64_t row, std::int64_t dim, const float* scale,
                             std::int64_t scale_row) {
      return [=](std::int64_t j, bf16* buffer) -> const bf16* {
        const S* const from = data + (tile + j) * row;
        // Rows of a tensor (L, H, D) lie apart: nothing but this reads ahead.
        prefetch(from + std::min<std::int64_t>(16, keys - 1 - j) * row, dim * static_cast<std::int64_t>(sizeof(S)));
        const float by = scale == nullptr ? 1.0f : scale[(tile + j) * scale_row];
        return in_halves(from, dim, round_up(dim, kSide), by, buffer);
      };
    };
    pack_transposed_halves(keys, at_.dim, halves(at_.key),
                           rows_of(head_.key, head_.key_row, p_.key.size[3], head_.key_scale, head_.key_scale_row));
    pack_pairs(keys, at_.columns, tile_, halves(at_.value),
               rows_of(head_.value, head_.value_row, p_.value.size[3], head_.value_scale, head_.value_scale_row));
  }

  Strip strip_of(std::int64_t r, std::int64_t tile, std::int64_t keys) const {
    const Range first = range(first_ + r), last = range(last_of(first_ + r));
    const std::int64_t begin = std::max<std::int64_t>(first.begin - tile, 0) / kSide;
    const std::int64_t end = first.begin < last.end ? (std::min(last.end - tile, keys) + kSide - 1) / kSide : begin;
    const std::int64_t most = std::max<std::int64_t>(last.begin - tile, 0) / kSide;
    return {first_ + r,
            halves(at_.query) + r * at_.dim,
            m_ + at_.out + r * at_.columns,
            m_ + at_.top + r,
            m_ + at_.total + r * kTileRows,
            begin,
            end,
            most < end ? most : begin,
            first.begin >= tile};
  }

  void add_strip(const Strip& strip, std::int64_t tile) {
    float* const added = m_ + at_.added;
    weigh(strip, tile);
    V most = V::zero();
    for (int r = 0; r < kSide; ++r) most = max(load(added + r * V::N), most);  // a NaN is not kept
    if (any_above(most, V(kMostAdded))) {
      raise(strip, tile);
      weigh(strip, tile);
    }
    for (int r = 0; r < kSide * kTileRows; r += V::N) store(strip.total + r, load(strip.total + r) + load(added + r));
    add_values(strip);
  }

  // The strip's weights of the tile, and their sums to `added`, 32 rows of 16 lanes.
  void weigh(const Strip& strip, std::int64_t tile) {
    float *const added = m_ + at_.added, *const scores = m_ + at_.scores;
    bf16* const weights = halves(at_.weights);
    std::fill_n(added, kSide * kTileRows, 0.0f);
    const std::int64_t count = strip.end - strip.begin, dim_steps = at_.dim / kSide;
    const auto step_of = [&](std::int64_t i) {
      const std::int64_t step = strip.first_step + i;
      return step < strip.end ? step : step - count;
    };
    float by = scale_;
    score(strip, strip.first_step, scores, [](std::int64_t) {});
    for (std::int64_t i = 0; i < count; ++i) {
      float* const now = scores + i % 2 * kSums;
      by = hide_step(strip, tile, step_of(i), now);
      if (i == 0 && strip.first) set_tops(strip, now, by);
      bf16* const to = weights + step_of(i) * kStep;
      if (i + 1 < count) {
        std::int64_t row = 0;
        score(strip, step_of(i + 1), scores + (i + 1) % 2 * kSums, [&](std::int64_t step) {
          const std::int64_t end = kSide * (step + 1) / dim_steps;
          soften(now, by, strip.top, added, to, row, end);
          row = end;
        });
      } else {
        soften(now, by, strip.top, added, to, 0, kSide);
      }
    }
  }

  template <class Between>
  [[gnu::always_inline]] void score(const Strip& strip, std::int64_t step, float* to, const Between& between) const {
    clear_sums();
    multiply_add_halves(strip.query, halves(at_.key) + step * kSide * at_.dim, at_.dim / kSide, between);
    store_rows_of_sums(to);
  }

  [[gnu::always_inline]] static void soften(const float* scores, float by, const float* top, float* added, bf16* to,
                                            std::int64_t begin, std::int64_t end) {
    const V scale(by);
    for (std::int64_t r = begin; r < end; ++r) {
      const V shift(top[r]);
      const V x = exp2_halves(load(scores + r * kSide) * scale - shift);
      const V y = exp2_halves(load(scores + r * kSide + V::N) * scale - shift);
      store_halves(to + r * kTileHalves, x, y);
      store(added + r * V::N, load(added + r * V::N) + (x + y));
    }
  }

  // Scores that some row of the strip does not see become -inf; then they are scaled, and the answer is the factor that
  // is left.
  float hide_step(const Strip& strip, std::int64_t tile, std::int64_t step, float* scores) const {
    const std::int64_t key = tile + step * kSide, end = std::min<std::int64_t>(key + kSide, head_.len_k);
    const std::int64_t last = last_of(strip.row);
    if (head_.mask == nullptr && range(last).begin <= key && range(strip.row).end >= key + kSide) return scale_;
    const V scale(scale_);
    for (int i = 0; i < kSums; i += V::N) store(scores + i, load(scores + i) * scale);
    for (std::int64_t r = 0; r < kSide; ++r)
      hide(p_, head_, std::min(strip.row + r, last), key, {0, end - key}, kSide, scores + r * kSide);
    return 1.0f;
  }

  void set_tops(const Strip& strip, const float* scores, float by) const {
    const V scale(by);
    for (int r = 0; r < kSide; ++r) {
      const float* const row = scores + r * kSide;
      strip.top[r] = std::max(strip.top[r], largest(max(load(row) * scale, load(row + V::N) * scale)));
    }
  }

  // For rows that `weigh` added too much to: tops of the largest score, and sums so far to suit.
  void raise(const Strip& strip, std::int64_t tile) const {
    float* const scores = m_ + at_.scores;
    float old[kSide];
    std::copy_n(strip.top, kSide, old);
    for (std::int64_t step = strip.begin; step < strip.end; ++step) {
      score(strip, step, scores, [](std::int64_t) {});
      set_tops(strip, scores, hide_step(strip, tile, step, scores));
    }
    for (int r = 0; r < kSide; ++r) {
      if (!any_above(load(m_ + at_.added + r * V::N), V(kMostAdded))) {
        strip.top[r] = old[r];
        continue;
      }
      const V shrink = exp2_halves(V(old[r]) - V(strip.top[r]));
      store(strip.total + r * V::N, load(strip.total + r * V::N) * shrink);
      if (strip.first) continue;
      float* const out = strip.out + r / kTileRows * 2 * kRegister + r % kTileRows * kTileRows;
      for (std::int64_t c = 0; c < at_.columns; c += kSide)
        for (float* o : {out + c * kSide, out + c * kSide + kRegister}) store(o, load(o) * shrink);
    }
  }

  void add_values(const Strip& strip) const {
    const bf16 *const weights = halves(at_.weights) + strip.begin * kStep, *const values = halves(at_.value);
    for (std::int64_t c = 0; c < at_.columns; c += kSide) {
      float* const out = strip.out + c * kSide;
      if (strip.first)
        clear_sums();
      else
        load_sums(out);
      multiply_add_halves(weights, values + c * tile_ + strip.begin * kStep, strip.end - strip.begin);
      store_sums(out);
    }
  }

  void write() const {
    alignas(64) float row[kMaxDim];
    for (std::int64_t r = 0; r < count_; ++r) {
      const Range first = range(first_ + r / kSide * kSide), last = range(last_of(first_ + r / kSide * kSide));
      const float top = m_[at_.top + r], total = sum(load(m_ + at_.total + r * V::N));
      const float* const out = m_ + at_.out + r / kSide * kSide * at_.columns + r % kSide / kTileRows * 2 * kRegister +
                               r % kTileRows * kTileRows;
      if (first.begin >= last.end)
        std::fill_n(row, at_.columns, 0.0f);  // no key was seen, nothing is there
      else
        for (std::int64_t c = 0; c < at_.columns; c += kSide) {
          store(row + c, load(out + c * kSide));
          store(row + c + V::N, load(out + c * kSide + kRegister));
        }
      write_row(head_, first_ + r, p_.value.size[3], row, top, total);
    }
  }

  const AttentionParams& p_;
  const Head<T, S>& head_;
  const AmxLayout& at_;
  const std::int64_t tile_;
  float* const m_;
  const std::int64_t first_, count_;
  const float scale_;
};

AmxLayout layout_of(const AttentionParams& p) { return {p.query.size[3], p.value.size[3]}; }

}  // namespace

bool is_amx(const AttentionParams& p) {
  return has_amx() && (p.query.dtype == DType::bf16 || may_round(p)) && products_of_head(p) > kFewProducts;
}

std::int64_t attention_amx_scratch_bytes(const AttentionParams& p, std::int64_t threads) {
  return threads * layout_of(p).size * static_cast<std::int64_t>(sizeof(float));
}

void attention_amx(const AttentionParams& p) {
  with_cache_type(p, [&](auto t, auto s) {
    using T = decltype(t);
    using S = decltype(s);
    if constexpr (!std::is_same_v<T, double>) run_blocks<AmxBlock<T, S>, T, S>(p, layout_of(p));
  });
}

#else

bool is_amx(const AttentionParams&) { return false; }
std::int64_t attention_amx_scratch_bytes(const AttentionParams&, std::int64_t) { return 0; }
void attention_amx(const AttentionParams&) {}

#endif

}  // namespace qvl::cpu
