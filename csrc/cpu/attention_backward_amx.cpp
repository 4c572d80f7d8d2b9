// Softmax attention, backward, on AMX: attention_backward.cpp's five products of bfloat16, for bfloat16 tensors.
//
// Keys are the rows of scores and of their gradients, so that both are operands as they are stored, and lse and delta
// are vectors. With what is multiplied as A and as B (attention_amx.h), of a strip of 32 keys and a step of 32 rows:
//
//   S^T = K Q^T       A keys, B queries transposed            dP^T = V dO^T    A values, B dO transposed
//   dV += P^T dO      A weights, B pairs of rows of dO        dK += dS^T Q     A dS^T, B pairs of rows of Q
//   dQ^T = K^T dS^T   A columns of K, B pairs of keys of dS^T
//
// Regime: arithmetic. 256 scores are 320 cycles of AMX for D = 128, and 16 exponentials, differences and roundings.
//
//   tile    256 keys: K, V and columns of K (64 KiB each for D = 128), sums of dK and dV (128 KiB each); stays in L2
//           while the rows pass
//   block   256 rows (row r is position r / G, head r % G): Q and dO transposed and by pairs (64 KiB each), dS^T by
//           pairs (128 KiB)
//   strip   32 keys against the block: P^T and dS^T of 16 KiB each go from product to product in L1
//   step    32 rows: while AMX computes S^T and dP^T of the next one, the vector units make P and dS of the last
//
// P and dS are rounded to bfloat16, all sums are floats. Order and threads are those of attention_backward.cpp.
//
// Source: Dao, FlashAttention-2, 2023, section 3.1, algorithm 2.

#include "attention_amx.h"
#include "attention_gradients.h"

namespace qvl::cpu {

#if defined(__AVX512F__)

namespace {

using V = Vec<float>;

constexpr int kKeys = 256, kRows = 256;
constexpr std::int64_t kFewProducts = 1 << 18;  // of a head: as many and fewer are faster without packing

// Scratch of one thread, in floats.
struct AmxBackwardLayout {
  std::int64_t dim, dim_v;                                        // D and Dv rounded up to whole steps
  std::int64_t query, query_pairs, grad, grad_pairs, lse, delta;  // the rows'
  std::int64_t key, value, key_columns, grad_key, grad_value;     // the tile's
  std::int64_t scores, weights, grad_scores, grad_score_pairs, size;

  AmxBackwardLayout(std::int64_t d, std::int64_t dv) : dim(round_up(d, kSide)), dim_v(round_up(dv, kSide)) {
    Pieces pieces;
    query = pieces.take(kRows * dim / 2);
    query_pairs = pieces.take(kRows * dim / 2);
    grad = pieces.take(kRows * dim_v / 2);
    grad_pairs = pieces.take(kRows * dim_v / 2);
    lse = pieces.take(kRows);
    delta = pieces.take(kRows);
    key = pieces.take(kKeys * dim / 2);
    value = pieces.take(kKeys * dim_v / 2);
    key_columns = pieces.take(kKeys * dim / 2);
    grad_key = pieces.take(kKeys * dim);
    grad_value = pieces.take(kKeys * dim_v);
    scores = pieces.take(4 * kSums);
    weights = pieces.take(kSide * kRows / 2);
    grad_scores = pieces.take(kSide * kRows / 2);
    grad_score_pairs = pieces.take(kKeys * kRows / 2);
    size = pieces.size();
  }
};

// to[i] += by from[i]
void add_scaled(const float* from, std::int64_t n, float by, float* to) {
  const V scale(by);
  std::int64_t i = 0;
  for (; i + V::N <= n; i += V::N) store(to + i, fma(load(from + i), scale, load(to + i)));
  if (const int rest = static_cast<int>(n - i); rest > 0)
    store(to + i, fma(load(from + i, rest), scale, load(to + i, rest)), rest);
}

// One pair of chunks: rows of one KV head's group against its keys.
class AmxPair {
 public:
  AmxPair(const AttentionBackwardParams& p, std::int64_t segment, std::int64_t kv_head, const AmxBackwardLayout& at,
          float* scratch)
      : p_(p.forward),
        head_(head_of<bf16>(p.forward, segment, kv_head)),
        at_(at),
        m_(scratch),
        grads_(p, head_, segment, kv_head) {}

  std::int64_t rows() const { return head_.rows(); }
  std::int64_t keys() const { return head_.len_k; }

  void run(Range rows, Range keys) {
    const Tiles registers;
    for (std::int64_t tile = keys.begin; tile < keys.end; tile += kKeys) {
      tile_ = {tile, std::min<std::int64_t>(tile + kKeys, keys.end)};
      bool loaded = false;
      for (std::int64_t first = rows.begin; first < rows.end; first += kRows) {
        rows_ = {first, std::min<std::int64_t>(first + kRows, rows.end)};
        if (range(first).begin >= tile_.end || range(rows_.end - 1).end <= tile) continue;  // limits rise
        if (!loaded) load_keys();
        loaded = true;
        load_rows();
        for (std::int64_t strip = 0; strip < tile_.end - tile; strip += kSide) add_strip(strip);
        for (std::int64_t row = 0; row < rows_.end - first; row += kSide) add_queries(row);
      }
      if (loaded) store_keys();
    }
  }

 private:
  bf16* halves(std::int64_t at) const { return reinterpret_cast<bf16*>(m_ + at); }
  Range range(std::int64_t row) const { return visible(p_, head_.position(row), head_.len_k); }
  std::int64_t dim() const { return p_.query.size[3]; }
  std::int64_t dim_v() const { return p_.value.size[3]; }
  // What 32 rows see together.
  Range seen_by(std::int64_t row) const {
    return {range(rows_.begin + row).begin, range(std::min(rows_.begin + row + kSide, rows_.end) - 1).end};
  }

  void load_keys() {
    const std::int64_t count = tile_.end - tile_.begin;
    const auto key = [&](std::int64_t j, bf16* buffer) {
      return in_halves(head_.key + (tile_.begin + j) * head_.key_row, dim(), at_.dim, 1.0f, buffer);
    };
    alignas(64) bf16 buffer[kMaxDim];
    static constexpr bf16 kZeros[kMaxDim] = {};
    for (std::int64_t j = 0; j < round_up(count, kSide); ++j) {
      const bf16* const k = j < count ? key(j, buffer) : kZeros;
      to_rows(k, at_.dim, j % kSide, halves(at_.key) + j / kSide * kSide * at_.dim);
      const bf16* const v =
          j < count ? in_halves(head_.value + (tile_.begin + j) * head_.value_row, dim_v(), at_.dim_v, 1.0f, buffer)
                    : kZeros;
      to_rows(v, at_.dim_v, j % kSide, halves(at_.value) + j / kSide * kSide * at_.dim_v);
    }
    // Columns of keys are their pairs transposed.
    pack_pairs(count, at_.dim, kKeys, halves(at_.key_columns), key);
    for (std::int64_t i = 0; i < kKeys * at_.dim; i += kStep / 2) {
      bf16* const place = halves(at_.key_columns) + i;
      const bf16* pairs[kTileRows];
      for (int r = 0; r < kTileRows; ++r) pairs[r] = place + r * kTileHalves;
      store_transposed(place, pairs);
    }
    std::fill_n(m_ + at_.grad_key, kKeys * at_.dim, 0.0f);
    std::fill_n(m_ + at_.grad_value, kKeys * at_.dim_v, 0.0f);
  }

  // Rows that fill up the last step have an lse that makes all their weights zero.
  void load_rows() {
    constexpr float kNone = std::numeric_limits<float>::infinity();
    const std::int64_t count = rows_.end - rows_.begin;
    const auto query = [&](std::int64_t r, bf16* buffer) {
      return in_halves(head_.query_of(rows_.begin + r), dim(), at_.dim, 1.0f, buffer);
    };
    const auto grad = [&](std::int64_t r, bf16* buffer) {
      return in_halves(grads_.out.row(head_, rows_.begin + r), dim_v(), at_.dim_v, 1.0f, buffer);
    };
    pack_transposed_halves(count, at_.dim, halves(at_.query), query);
    pack_pairs(count, at_.dim, kRows, halves(at_.query_pairs), query);
    pack_transposed_halves(count, at_.dim_v, halves(at_.grad), grad);
    pack_pairs(count, at_.dim_v, kRows, halves(at_.grad_pairs), grad);
    for (std::int64_t r = 0; r < round_up(count, kSide); ++r) {
      float &lse = m_[at_.lse + r], &delta = m_[at_.delta + r];
      lse = kNone, delta = 0;
      if (r >= count) continue;
      const std::int64_t row = rows_.begin + r;
      delta = dot<float>(grads_.out.row(head_, row), static_cast<const bf16*>(head_.out_of(row)), dim_v());
      const float saved = head_.lse[row % head_.group * head_.lse_head + row / head_.group];
      if (saved != -kNone) lse = saved * static_cast<float>(kLog2e);  // -inf: the row saw no key
    }
  }

  // Keys [strip, strip + 32) of the tile against the steps of rows that see one of them.
  void add_strip(std::int64_t strip) {
    const std::int64_t first = tile_.begin + strip, steps = (rows_.end - rows_.begin + kSide - 1) / kSide;
    std::int64_t from = 0, to = steps;
    while (from < to && seen_by(from * kSide).end <= first) ++from;
    while (from < to && seen_by((to - 1) * kSide).begin >= std::min(first + kSide, tile_.end)) --to;
    if (from == to) return;
    const auto scores_of = [&](std::int64_t step) { return m_ + at_.scores + step % 2 * 2 * kSums; };
    score(strip, from, scores_of(from), [](std::int64_t) {});
    for (std::int64_t step = from; step < to; ++step) {
      const float by = hide_step(strip, step, scores_of(step));
      if (step + 1 < to) {
        const std::int64_t slices = (at_.dim + at_.dim_v) / kSide;
        std::int64_t key = 0;
        score(strip, step + 1, scores_of(step + 1), [&](std::int64_t slice) {
          const std::int64_t end = kSide / 2 * (slice + 1) / slices * 2;
          soften(strip, step, by, scores_of(step), key, end);
          key = end;
        });
      } else {
        soften(strip, step, by, scores_of(step), 0, kSide);
      }
    }
    add_products(halves(at_.weights), halves(at_.grad_pairs), {from, to}, at_.dim_v,
                 m_ + at_.grad_value + strip * at_.dim_v);
    add_products(halves(at_.grad_scores), halves(at_.query_pairs), {from, to}, at_.dim,
                 m_ + at_.grad_key + strip * at_.dim);
  }

  // S^T and behind it dP^T.
  template <class Between>
  [[gnu::always_inline]] void score(std::int64_t strip, std::int64_t step, float* to, const Between& between) const {
    clear_sums();
    multiply_add_halves(halves(at_.key) + strip * at_.dim, halves(at_.query) + step * kSide * at_.dim, at_.dim / kSide,
                        between);
    store_rows_of_sums(to);
    clear_sums();
    multiply_add_halves(halves(at_.value) + strip * at_.dim_v, halves(at_.grad) + step * kSide * at_.dim_v,
                        at_.dim_v / kSide, [&](std::int64_t slice) { between(at_.dim / kSide + slice); });
    store_rows_of_sums(to + kSums);
  }

  // P and dS of keys [begin, end) of the strip.
  [[gnu::always_inline]] void soften(std::int64_t strip, std::int64_t step, float by, const float* scores,
                                     std::int64_t begin, std::int64_t end) const {
    const V scale(by);
    const float *const lse = m_ + at_.lse + step * kSide, *const delta = m_ + at_.delta + step * kSide;
    const V lse0 = load(lse), lse1 = load(lse + V::N), delta0 = load(delta), delta1 = load(delta + V::N);
    bf16 *const weights = halves(at_.weights) + step * kStep, *const grads = halves(at_.grad_scores) + step * kStep;
    bf16* const pairs = halves(at_.grad_score_pairs) + (step * kKeys + strip) * kSide;
    for (std::int64_t key = begin; key < end; key += 2) {
#pragma GCC unroll 2
      for (std::int64_t j = key; j < key + 2; ++j) {
        const float *const s = scores + j * kSide, *const dp = s + kSums;
        const V p0 = exp2_halves(load(s) * scale - lse0), p1 = exp2_halves(load(s + V::N) * scale - lse1);
        store_halves(weights + j * kTileHalves, p0, p1);
        store_halves(grads + j * kTileHalves, p0 * (load(dp) - delta0), p1 * (load(dp + V::N) - delta1));
      }
      store_interleaved(pairs + key / 2 * kTileHalves, grads + key * kTileHalves, grads + (key + 1) * kTileHalves);
    }
  }

  // Scores of keys that some row of the step does not see become -inf; then they are scaled, and the answer is the
  // factor that is left.
  float hide_step(std::int64_t strip, std::int64_t step, float* scores) const {
    const std::int64_t key = tile_.begin + strip, end = std::min<std::int64_t>(key + kSide, tile_.end);
    const std::int64_t first = rows_.begin + step * kSide, last = std::min(first + kSide, rows_.end) - 1;
    const float scale = static_cast<float>(p_.scale * kLog2e);
    if (head_.mask == nullptr && range(last).begin <= key && range(first).end >= key + kSide && end == key + kSide)
      return scale;
    alignas(64) float by_rows[kSums];
    transpose(scores, by_rows);
    multiply(by_rows, V(scale), kSums);
    for (std::int64_t r = 0; r < kSide; ++r)
      hide(p_, head_, std::min(first + r, last), key, {0, end - key}, kSide, by_rows + r * kSide);
    for (std::int64_t r = 0; r < kSide; ++r)  // keys of another chunk
      std::fill(by_rows + r * kSide + end - key, by_rows + (r + 1) * kSide, -std::numeric_limits<float>::infinity());
    transpose(by_rows, scores);
    return 1.0f;
  }

  static void transpose(const float* from, float* to) {
    for (int i = 0; i < kSide; i += kTileRows)
      for (int j = 0; j < kSide; j += kTileRows) {
        const float* rows[kTileRows];
        for (int r = 0; r < kTileRows; ++r) rows[r] = from + (i + r) * kSide + j;
        store_transposed(to + j * kSide + i, rows, kSide);
      }
  }

  // A strip's sums of `dim` columns += its scores of the steps [begin, end) of rows times the pairs of rows.
  static void add_products(const bf16* scores, const bf16* pairs, Range steps, std::int64_t dim, float* sums) {
    for (std::int64_t c = 0; c < dim; c += kSide) {
      load_sums(sums + c * kSide);
      multiply_add_halves(scores + steps.begin * kStep, pairs + c * kRows + steps.begin * kStep,
                          steps.end - steps.begin);
      store_sums(sums + c * kSide);
    }
  }

  // dQ of rows [row, row + 32) of the block += what the tile's keys add.
  void add_queries(std::int64_t row) const {
    const Range seen = seen_by(row);
    const std::int64_t keys = tile_.end - tile_.begin;
    const std::int64_t from = std::max<std::int64_t>(seen.begin - tile_.begin, 0) / kSide;
    const std::int64_t to = (std::min(seen.end - tile_.begin, keys) + kSide - 1) / kSide;
    if (seen.begin >= seen.end || from >= to) return;
    float *const sums = m_ + at_.scores, *const by_rows = sums + kSums;
    const std::int64_t count = std::min<std::int64_t>(kSide, rows_.end - rows_.begin - row);
    for (std::int64_t c = 0; c < at_.dim; c += kSide) {
      clear_sums();
      multiply_add_halves(halves(at_.key_columns) + c * kKeys + from * kStep,
                          halves(at_.grad_score_pairs) + row * kKeys + from * kStep, to - from);
      store_rows_of_sums(sums);
      transpose(sums, by_rows);
      for (std::int64_t r = 0; r < count; ++r)
        add_scaled(by_rows + r * kSide, std::min<std::int64_t>(kSide, dim() - c), static_cast<float>(p_.scale),
                   grads_.query.row(head_, rows_.begin + row + r) + c);
    }
  }

  void store_keys() const {
    for (std::int64_t j = 0; j < tile_.end - tile_.begin; ++j) {
      store_key(m_ + at_.grad_key + j / kSide * kSide * at_.dim, j % kSide, dim(), static_cast<float>(p_.scale),
                grads_.key.data + (tile_.begin + j) * grads_.key.stride);
      store_key(m_ + at_.grad_value + j / kSide * kSide * at_.dim_v, j % kSide, dim_v(), 1.0f,
                grads_.value.data + (tile_.begin + j) * grads_.value.stride);
    }
  }

  // to += by row j of a strip's sums
  static void store_key(const float* sums, std::int64_t j, std::int64_t dim, float by, float* to) {
    sums += j / kTileRows * 2 * kRegister + j % kTileRows * kTileRows;
    for (std::int64_t c = 0; c < dim; c += kTileRows)
      add_scaled(sums + c / kSide * kSums + c % kSide / kTileRows * kRegister,
                 std::min<std::int64_t>(kTileRows, dim - c), by, to + c);
  }

  const AttentionParams& p_;
  const Head<bf16> head_;
  const AmxBackwardLayout& at_;
  float* const m_;
  Range rows_{}, tile_{};
  const Gradients<bf16> grads_;
};

AmxBackwardLayout layout_of(const AttentionParams& p) { return {p.query.size[3], p.value.size[3]}; }

}  // namespace

bool is_backward_amx(const AttentionParams& p) {
  return has_amx() && p.query.dtype == DType::bf16 && products_of_head(p) > kFewProducts;
}

std::int64_t attention_backward_amx_scratch_bytes(const AttentionParams& p, std::int64_t threads) {
  return threads * layout_of(p).size * static_cast<std::int64_t>(sizeof(float));
}

void attention_backward_amx(const AttentionBackwardParams& p) {
  const AmxBackwardLayout at = layout_of(p.forward);
  run_pairs<bf16>(p, at.size, {kRows, 2 * kRows, kKeys, 2 * kKeys},
                  [&](std::int64_t segment, std::int64_t kv_head, float* scratch) {
                    return AmxPair(p, segment, kv_head, at, scratch);
                  });
}

#else

bool is_backward_amx(const AttentionParams&) { return false; }
std::int64_t attention_backward_amx_scratch_bytes(const AttentionParams&, std::int64_t) { return 0; }
void attention_backward_amx(const AttentionBackwardParams&) {}

#endif

}  // namespace qvl::cpu
