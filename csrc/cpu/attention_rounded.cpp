// Softmax attention, forward, with both products of integers: attention.cpp's blocks and tiles where the caller lets
// queries, keys, values and weights be rounded (`AttentionParams::rounded`).
//
// Regime: arithmetic. `vpmaddwd` multiplies and adds pairs of int16, 16 products in two instructions on AVX2 where an
// FMA does 8 in one; with VNNI `vpdpwssd` does it in one, 16 or, on AVX-512, 32. Without VNNI there AVX-512 gains
// nothing.
//
//   query, key   integers up to most() = sqrt(2^31 / D), 4095 for D = 128 and 5792 for 64, and a step a row: sums of D
//                stay below 2^31. Rows of queries in place; keys transposed in panels, [D / 2][2 N] pairs
//   scores       as floats, masked as in attention.cpp
//   piece        64 keys of a tile. A row's weights are 2^(score - the piece's largest) as integers up to 2^14; what is
//                between that and the row's largest so far is in the step, so that a piece of small weights is as exact
//                as any. Values are integers up to 2047 with a step for each column: 64 products stay below 2^31.
//                Weights are stored over their scores, values by pairs of keys in panels of columns, [32][2 N] pairs
//   tile         6 rows x 2 vectors of integers in registers for one piece, or for D; then they are scaled and added to
//                floats in L1: 36 instructions after 37 for each of 32, or D / 2, pairs
//
// Measured on AVX2 (Zen 3): 1.67 times an FMA's speed in the loop (`vpaddd` takes a pipe from `vpmaddwd`), 1.2 times
// attention.cpp over 1024 keys and more: softmax takes as long as there, and rounds too.
//
// Source: Zhang et al., SageAttention, 2024, for integers in both products; 8 bits need a smoothing of keys that 12 do
// not.

#include "attention_rows.h"
#include "vec_linear.h"

namespace qvl::cpu {
namespace {

constexpr float kWeightBits = 14, kMostWeight = 16384, kMostValue = 2047;

// to[r][w] = to[r][w] keep[r] + steps[r] scales[w] sum over i < pairs of a[r row + i] panel[i][w], pairs of int16 being
// multiplied and added; without `keep` what was there is not read. `a` is addressed as 32-bit words. Not inlined: GCC
// then keeps the twelve sums in registers.
template <bool kVnni>
[[gnu::noinline]] void add_pairs(const float* a, std::int64_t row, const float* panel, std::int64_t pairs,
                                 const float* steps, const float* scales, const float* keep, float* to,
                                 std::int64_t to_row) {
  using V = Vec<float>;
  const float* const rows[kStrip] = {a, a + row, a + 2 * row, a + 3 * row, a + 4 * row, a + 5 * row};
  IntVec acc[kStrip][2];
#pragma GCC unroll 6
  for (int r = 0; r < kStrip; ++r) acc[r][0] = acc[r][1] = IntVec::zero();
  for (std::int64_t i = 0; i < pairs; ++i, panel += kPanel<float>) {
    const IntVec w0 = load_pairs(panel), w1 = load_pairs(panel + V::N);
#pragma GCC unroll 6
    for (int r = 0; r < kStrip; ++r) {
      const IntVec x = repeat_pair(rows[r] + i);
      acc[r][0] = add_dot_pairs<kVnni>(acc[r][0], w0, x);
      acc[r][1] = add_dot_pairs<kVnni>(acc[r][1], w1, x);
    }
  }
  const V s0 = load(scales), s1 = load(scales + V::N);
#pragma GCC unroll 6
  for (int r = 0; r < kStrip; ++r, to += to_row) {
    const V step(steps[r]), x0 = to_float(acc[r][0]) * (s0 * step), x1 = to_float(acc[r][1]) * (s1 * step);
    store(to, keep == nullptr ? x0 : fma(load(to), V(keep[r]), x0));
    store(to + V::N, keep == nullptr ? x1 : fma(load(to + V::N), V(keep[r]), x1));
  }
}

template <class T, class S, bool kVnni>
class RoundedBlock : public Rows<T, S> {
  using Base = Rows<T, S>;
  using Base::at_, Base::count_, Base::first_, Base::head_, Base::m_, Base::p_, Base::strips_, Base::tile_,
      Base::tile_memory_;
  using Base::kHidden;
  using V = Vec<float>;
  static constexpr int kWidth = kPanel<float>;

 public:
  using Base::Base;

  void run() {
    load_queries();
    this->for_tiles(*this);
  }

  void load_queries() {
    const V scale(static_cast<float>(p_.scale * kLog2e));
    alignas(64) float wide[kMaxDim + V::N] = {};
    alignas(64) std::int16_t integers[kMaxDim + V::N] = {};
    for (std::int64_t r = 0; r < strips_ * kStrip; ++r) {
      widen_scaled(head_.query_of(first_ + std::min(r, count_ - 1)), dim(), scale, wide);
      m_[at_.query_step + r] = quantize(wide, dim(), most(), integers);
      std::memcpy(m_ + at_.query + r * at_.dim, integers, static_cast<std::size_t>(at_.dim) * sizeof(float));
    }
    std::fill_n(m_ + at_.top, strips_ * kStrip, kHidden);
    std::fill_n(m_ + at_.total, strips_ * kStrip * V::N, 0.0f);
  }

  // Whole pieces, though a block may see less of its last one: else the scales of values, and with them the results,
  // would depend on how rows are cut, and so on the number of threads.
  void pack(std::int64_t tile, std::int64_t seen) {
    const std::int64_t keys = std::min({round_up(seen, kPiece), tile_, head_.len_k - tile});
    pack_keys(tile, keys);
    for (std::int64_t piece = 0; piece < keys; piece += kPiece)
      for (std::int64_t c = 0; c < at_.columns; c += kWidth)
        pack_values(tile + piece, std::min<std::int64_t>(kPiece, keys - piece), c,
                    tile_memory_ + at_.value + (c * tile_ + piece * kWidth) / 2,
                    tile_memory_ + at_.value_step + piece / kPiece * at_.columns + c);
  }

  void add_group(const Group& group, std::int64_t tile) {
    const Part* const part = group.part;
    const auto scores_of = [&](int s) { return m_ + at_.scores + s * kStrip * kTile; };
    const auto steps_of = [&](int s) { return m_ + at_.weight_step + s * kPieces * kStrip; };
    for (std::int64_t j = group.keys.begin; j < group.keys.end; j += kWidth)
      for (int s = 0; s < group.strips; ++s)
        if (j >= part[s].keys.begin && j < part[s].keys.end) score(part[s].strip, j, scores_of(s) + j);
    float shrink[kGroup][kStrip];
    for (int s = 0; s < group.strips; ++s)
      if (!part[s].empty()) soften(part[s], tile, scores_of(s), steps_of(s), shrink[s]);
    Target<T> target[kGroup];
    for (int s = 0; s < group.strips; ++s)
      if (part[s].last && !part[s].empty()) this->finish(part[s].strip, target[s]);
    for (std::int64_t c = 0; c < at_.columns; c += kWidth)
      for (int s = 0; s < group.strips; ++s)
        if (!part[s].empty()) add_values(part[s], c, scores_of(s), steps_of(s), shrink[s], target[s]);
  }

 private:
  std::int64_t dim() const { return p_.query.size[3]; }
  std::int64_t dim_v() const { return p_.value.size[3]; }
  // Of queries and keys, as the table above says.
  float most() const {
    return std::min(32767.0f,
                    std::floor(std::sqrt(2147483647.0f / static_cast<float>(std::max<std::int64_t>(dim(), 1)))));
  }

  // Eight keys at a time become lines of pairs.
  void pack_keys(std::int64_t tile, std::int64_t keys) {
    alignas(64) float wide[kMaxDim + V::N] = {}, pairs[8][kMaxDim / 2 + V::N] = {};
    const float* eight[8];
    for (int i = 0; i < 8; ++i) eight[i] = pairs[i];
    for (std::int64_t j = 0; j < round_up(keys, kWidth); j += 8) {
      for (int i = 0; i < 8; ++i) {
        const std::int64_t key = j + i;
        float& step = tile_memory_[at_.key_step + key];
        step = 0.0f;
        if (key >= keys) continue;  // what is left there is multiplied by 0 and hidden
        const S* const from = head_.key + (tile + key) * head_.key_row;
        prefetch(from + std::min<std::int64_t>(8, keys - 1 - key) * head_.key_row,
                 dim() * static_cast<std::int64_t>(sizeof(S)));
        widen(from, dim(), dim(), wide);
        step = quantize(wide, dim(), most(), reinterpret_cast<std::int16_t*>(pairs[i]));
        if (head_.key_scale != nullptr) step *= head_.key_scale[(tile + key) * head_.key_scale_row];
      }
      transpose_eight(eight, at_.dim, tile_memory_ + at_.key + j / kWidth * kWidth * at_.dim + j % kWidth, kWidth);
    }
  }

  // Columns [c, c + 2 N) of `keys` values from `first` on.
  void pack_values(std::int64_t first, std::int64_t keys, std::int64_t c, float* to, float* steps) {
    alignas(64) float wide[kPiece][kWidth];
    V top[2] = {V::zero(), V::zero()}, finite[2] = {V::zero(), V::zero()};
    const std::int64_t n = std::min<std::int64_t>(dim_v() - c, kWidth);
    for (std::int64_t j = 0; j < keys; ++j) {
      widen(head_.value + (first + j) * head_.value_row + c, n, kWidth, wide[j]);
      if (head_.value_scale != nullptr)
        multiply(wide[j], V(head_.value_scale[(first + j) * head_.value_scale_row]), kWidth);
      for (int h = 0; h < 2; ++h) {
        const V v = load(wide[j] + h * V::N);
        top[h] = max(top[h], max(v, V::zero() - v));
        finite[h] = fma(v, V::zero(), finite[h]);
      }
    }
    if (keys % 2 != 0) std::fill_n(wide[keys], kWidth, 0.0f);
    for (int h = 0; h < 2; ++h) {
      const V most = max(top[h], V(1e-30f)), by = quotient(V(kMostValue), most);
      store(steps + h * V::N, fma(most, V(1 / kMostValue), finite[h]));
      for (std::int64_t j = 0; j < keys; j += 2)
        store_pairs(to + j / 2 * kWidth + h * V::N, load(wide[j] + h * V::N) * by, load(wide[j + 1] + h * V::N) * by);
    }
    // Weights of hidden keys are 0, in whole vectors.
    for (std::int64_t j = (keys + 1) / 2; j < round_up(keys, V::N) / 2; ++j) std::fill_n(to + j * kWidth, kWidth, 0.0f);
  }

  void score(std::int64_t strip, std::int64_t j, float* scores) const {
    const std::int64_t row = strip * kStrip;
    add_pairs<kVnni>(m_ + at_.query + row * at_.dim, at_.dim, tile_memory_ + at_.key + j * at_.dim, at_.dim,
                     m_ + at_.query_step + row, tile_memory_ + at_.key_step + j, nullptr, scores, kTile);
  }

  // A strip's scores to integer weights, written over them, with a step for each piece and row; what earlier sums
  // shrink by, and the sums of the weights. Rows are lanes where something is computed once a row.
  void soften(const Part& part, std::int64_t tile, float* scores, float* steps, float* shrink) const {
    this->hide_strip(part, tile, scores);
    const std::int64_t padded = round_up(part.keys.end, V::N);
    float *const tops = m_ + at_.top + part.strip * kStrip, *const totals = m_ + at_.total + part.strip * kStrip * V::N;
    alignas(64) float top[V::N] = {}, most[kPieces][V::N], power[kPieces][V::N];
    for (auto& of_piece : most) std::fill_n(of_piece, V::N, kHidden);
    std::copy_n(tops, kStrip, top);
    for (int r = 0; r < kStrip; ++r)
      for_pieces(part.keys.begin, padded, [&](int piece, std::int64_t begin, std::int64_t end) {
        V of_piece(kHidden);
        for (std::int64_t j = begin; j < end; j += V::N) of_piece = max(of_piece, load(scores + r * kTile + j));
        most[piece][r] = largest(of_piece);
      });
    const V lowest(-1e30f);  // stands for the top of what saw nothing: -inf - -inf is NaN
    V now = max(load(top), lowest);
    for (const auto& of_piece : most) now = max(now, load(of_piece));
    const V kept = exp2_to_127(load(top) - now);
    for (int piece = 0; piece < kPieces; ++piece)
      store(power[piece], exp2_to_127(load(most[piece]) - now) * V(1 / kMostWeight));
    store(top, now);
    std::copy_n(top, kStrip, tops);
    store(top, kept);
    std::copy_n(top, kStrip, shrink);
    for (int r = 0; r < kStrip; ++r) {
      const float* const row = scores + r * kTile;
      std::int16_t* const weights = reinterpret_cast<std::int16_t*>(scores + r * kTile);
      V total = load(totals + r * V::N) * V(shrink[r]);
      for_pieces(part.keys.begin, padded, [&](int piece, std::int64_t begin, std::int64_t end) {
        const V shift(std::max(most[piece][r], -1e30f) - kWeightBits);
        V added = V::zero();
        std::int64_t j = begin;
        for (; j + 2 * V::N <= end; j += 2 * V::N) {
          const V e = exp2_to_127(load(row + j) - shift), f = exp2_to_127(load(row + j + V::N) - shift);
          added = added + (e + f);
          store_rounded(weights + j, e, f);
        }
        if (j < end) {
          const V e = exp2_to_127(load(row + j) - shift);
          added = added + e;
          store_rounded(weights + j, e);
        }
        total = fma(added, V(power[piece][r]), total);
        steps[piece * kStrip + r] = power[piece][r];
      });
      store(totals + r * V::N, total);
    }
  }

  // Calls f(piece, its first key, its end) for what keys [begin, end) have of each.
  template <class F>
  static void for_pieces(std::int64_t begin, std::int64_t end, const F& f) {
    for (std::int64_t key = begin; key < end; key = (key / kPiece + 1) * kPiece)
      f(static_cast<int>(key / kPiece), key, std::min(end, (key / kPiece + 1) * kPiece));
  }

  // o = o shrink + p v for one strip and one panel of columns; after the strip's last tile to the output.
  void add_values(const Part& part, std::int64_t c, const float* weights, const float* steps, const float* shrink,
                  const Target<T>& target) {
    static constexpr float kOnes[kStrip] = {1, 1, 1, 1, 1, 1};
    float* const o = m_ + at_.out + part.strip * kStrip * at_.columns + c * kStrip;
    const float* keep = part.first ? nullptr : shrink;
    for_pieces(part.keys.begin, round_up(part.keys.end, V::N), [&](int piece, std::int64_t begin, std::int64_t end) {
      add_pairs<kVnni>(weights + begin / 2, kTile, tile_memory_ + at_.value + (c * tile_ + begin * kWidth) / 2,
                       (end - begin) / 2, steps + piece * kStrip,
                       tile_memory_ + at_.value_step + piece * at_.columns + c, keep, o, kWidth);
      keep = kOnes;
    });
    if (!part.last) return;
    Tile<float> acc;
    load_tile(o, kWidth, acc);
    write_tile(target, c, dim_v(), acc);
  }
};

// Calls f(constant) with whether VNNI is used. On AVX-512 it always is, `is_rounded` says no without.
template <class F>
void with_vnni(const F& f) {
  if constexpr (IntVec::N == 8)
    if (!has_vnni()) return f(std::false_type{});
  f(std::true_type{});
}

Layout layout_of(const AttentionParams& p) { return {p, kPanel<float>, true}; }

}  // namespace

bool is_rounded(const AttentionParams& p) { return may_round(p) && (IntVec::N == 8 || has_vnni()); }

std::int64_t attention_rounded_scratch_bytes(const AttentionParams& p, std::int64_t threads) {
  return threads * layout_of(p).size * static_cast<std::int64_t>(sizeof(float));
}

void attention_rounded(const AttentionParams& p) {
  with_cache_type(p, [&](auto t, auto s) {
    using T = decltype(t);
    using S = decltype(s);
    if constexpr (!std::is_same_v<T, double>)
      with_vnni([&](auto vnni) { run_blocks<RoundedBlock<T, S, decltype(vnni)::value>, T, S>(p, layout_of(p)); });
  });
}

}  // namespace qvl::cpu
