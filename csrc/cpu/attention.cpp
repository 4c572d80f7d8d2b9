// Softmax attention, forward: tiles of keys, online softmax, grouped heads, causal and windowed work skipped.
//
// Regime: arithmetic (prompts, images). Per query row and key 2 (D + Dv) FLOPs. A tile of keys is packed once for all
// rows of a block:
//
//   block   up to 240 (D = 128) or 480 (D = 64) rows of one KV head, on AVX-512 360 or 720: row r is position r / G,
//           head r % G of its group, so that a strip of rows has nearly one causal limit and the group's heads share
//           the packed tile
//   tile    up to kTile = 192 keys, K transposed and V by columns (attention_tiles.h), 96 KiB each for D = 128, in L2
//           with the block's queries and sums of 120 or 180 KiB each; of up to 12 tiles a head all stay packed for its
//           other blocks (kKeptElements)
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

#include "attention_rows.h"

namespace qvl::cpu {
namespace {

template <class T, class S>
class Block : public Rows<T, S> {
  using Base = Rows<T, S>;
  using Base::at_, Base::count_, Base::first_, Base::head_, Base::m_, Base::p_, Base::strips_, Base::tile_,
      Base::tile_memory_;
  using Base::kHidden;
  using typename Base::A, typename Base::V;

 public:
  using Base::Base;

  void run() {
    load_queries();
    this->for_tiles(*this);
  }

  void load_queries() {
    const V scale(static_cast<A>(p_.scale * kLog2e));
    for (std::int64_t r = 0; r < strips_ * kStrip; ++r)
      widen_scaled(head_.query_of(first_ + std::min(r, count_ - 1)), at_.dim, scale, m_ + at_.query + r * at_.dim);
  }

  void pack(std::int64_t tile, std::int64_t keys) {
    const A* const scale = head_.key_scale ? head_.key_scale + tile * head_.key_scale_row : nullptr;
    pack_transposed(head_.key + tile * head_.key_row, head_.key_row, keys, at_.dim, tile_memory_ + at_.key, scale,
                    head_.key_scale_row);
    for (std::int64_t j = tile; j < tile + keys; ++j) {
      prefetch(head_.value + std::min(j + 8, tile + keys - 1) * head_.value_row,
               p_.value.size[3] * static_cast<std::int64_t>(sizeof(S)));
      to_panels(head_.value + j * head_.value_row, p_.value.size[3], j - tile, tile_, tile_memory_ + at_.value,
                head_.value_scale ? head_.value_scale[j * head_.value_scale_row] : A(1));
    }
  }

  void add_group(const Group& group, std::int64_t tile) {
    const Part* const part = group.part;
    A* const scores = m_ + at_.scores;
    for (std::int64_t j = group.keys.begin; j < group.keys.end; j += kPanel<A>)
      for (int s = 0; s < group.strips; ++s)
        if (j >= part[s].keys.begin && j < part[s].keys.end) score(part[s], j, scores + s * kStrip * kTile);
    A factor[kGroup * kStrip];
    for (int s = 0; s < group.strips; ++s)
      if (!part[s].empty()) soften_strip(part[s], tile, scores + s * kStrip * kTile, factor + s * kStrip);
    Target<T> target[kGroup];
    for (int s = 0; s < group.strips; ++s)
      if (part[s].last && !part[s].empty()) this->finish(part[s].strip, target[s]);
    for (std::int64_t c = 0; c < at_.columns; c += kPanel<A>)
      for (int s = 0; s < group.strips; ++s)
        if (!part[s].empty()) add_values(part[s], c, scores + s * kStrip * kTile, factor + s * kStrip, target[s]);
  }

 private:
  void score(const Part& part, std::int64_t j, A* scores) const {
    score_rows(m_ + at_.query + part.strip * kStrip * at_.dim, at_.dim, tile_memory_ + at_.key + j * at_.dim, at_.dim,
               part.keys.end - j, scores + j, kTile);
  }

  void score_again(const Part& part, std::int64_t tile, A* scores) const {
    for (std::int64_t j = part.keys.begin; j < part.keys.end; j += kPanel<A>) score(part, j, scores);
    this->hide_strip(part, tile, scores);
  }

  void soften_strip(const Part& part, std::int64_t tile, A* scores, A* shrink) {
    this->hide_strip(part, tile, scores);
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

  // o[r][c] = o[r][c] shrink[r] + sum_j p[r][j] v[j][c] for one strip and one panel of columns; after the strip's last
  // tile to the output.
  void add_values(const Part& part, std::int64_t c, const A* p, const A* shrink, const Target<T>& target) {
    A* const o = m_ + at_.out + part.strip * kStrip * at_.columns + c * kStrip;
    const A* const values = tile_memory_ + at_.value + c * tile_;
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
};

}  // namespace

std::int64_t attention_scratch_bytes(const AttentionParams& p, std::int64_t threads) {
  if (is_decode(p)) return attention_decode_scratch_bytes(p);
  if (is_amx(p)) return attention_amx_scratch_bytes(p, threads);
  if (is_rounded(p)) return attention_rounded_scratch_bytes(p, threads);
  const bool wide = p.query.dtype == DType::f64;
  const Layout at(p, wide ? kPanel<double> : kPanel<float>);
  return threads * at.size * (wide ? 8 : 4);
}

void attention(const AttentionParams& p) {
  if (is_decode(p)) return attention_decode(p);
  if (is_amx(p)) return attention_amx(p);
  if (is_rounded(p)) return attention_rounded(p);
  with_cache_type(p, [&](auto t, auto s) {
    using T = decltype(t);
    using S = decltype(s);
    run_blocks<Block<T, S>, T, S>(p, Layout(p, kPanel<Acc<T>>));
  });
}

}  // namespace qvl::cpu
