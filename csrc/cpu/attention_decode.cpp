// Softmax attention of few queries over many keys: the step of a decoder, Lq G <= 16 rows for each KV head.
//
// Regime: memory. Every key and value is read once, for all rows of its group; 2 Lk (D + Dv) s bytes a KV head against
// 2 Lk (D + Dv) FLOPs a row leave an AVX2 core waiting for memory up to about 8 rows. So nothing is packed or copied:
//
//   scores  rows of K times rows of q along D, R rows and 8 / R keys at a time (8 accumulators: the latency of 4 x 2
//           FMAs), converted from storage in registers; 64 keys (float32 32), then softmax
//   values  V rows in place, R rows times 8 / R vectors of columns
//   int8    keys meet queries of 15 bits and values weights of 15 bits (p times the value's scale, in units of its
//           tile) in integer products: per 16 elements and two rows 5 and 6 instructions on AVX2 instead of 8 with
//           conversions to fp32, with VNNI 3 and 4. Sums of a tile are exact
//   memory  what comes next is asked for in time, in the order of its addresses: V while its keys are scored, the next
//           keys while values are added. Rows by columns instead, as they are added, cost a fifth of the bandwidth
//   chunks  1024 keys each are independent tasks; their sums are merged by their largest scores. The size is fixed:
//           the result does not depend on the number of threads.
//
// Source: Dao et al., Flash-Decoding, 2023.

#include "attention_decode_int8.h"
#include "dispatch.h"
#include "parallel.h"

namespace qvl::cpu {
namespace {

constexpr std::int64_t kMaxRows = 16;
constexpr std::int64_t kChunk = 1024;

std::int64_t chunks_of(const AttentionParams& p) { return (p.key.size[2] + kChunk - 1) / kChunk; }

// Elements of one chunk's result: per row its sums of values, the largest score and the total.
std::int64_t partial_size(const AttentionParams& p) {
  return p.query.size[2] * (p.query.size[1] / p.key.size[1]) * (p.value.size[3] + 2);
}

// Keys scored before their softmax: they, and the values asked for meanwhile, fill half of a 32 KiB L1 each at D = 128.
template <class S>
constexpr std::int64_t kTileOf = sizeof(S) < 4 ? kTile : kTile / 2;

// scores[r][j] = q[r] . key[j] for R rows and kKeys<R> keys. Keys beyond `keys` repeat the last one; the tile has room.
template <int R, class S, class A>
void dot_keys(const A* q, const S* key, std::int64_t key_row, std::int64_t keys, std::int64_t dim, Ahead<S>& next,
              A* scores) {
  using V = Vec<A>;
  constexpr int K = kKeys<R>;
  const S* k[K] = {key};
#pragma GCC unroll 8
  for (int j = 1; j < K; ++j) k[j] = k[j - 1] + (j < keys ? key_row : 0);
  V acc[8];
  clear(acc);
  std::int64_t d = 0;
  Ahead<S> ahead = next;  // in registers
  for (; d + V::N <= dim; d += V::N) {
    ahead.template ask<K * V::N>();
    V x[R];
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) x[r] = load(q + r * kMaxDim + d);
#pragma GCC unroll 8
    for (int j = 0; j < K; ++j) {
      const V line = load(k[j] + d);
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) acc[r * K + j] = add_product(acc[r * K + j], x[r], line);
    }
  }
  next = ahead;
  A sums[8];
  four_sums(acc[0], acc[1], acc[2], acc[3], sums);
  four_sums(acc[4], acc[5], acc[6], acc[7], sums + 4);
  if (const int rest = static_cast<int>(dim - d); rest > 0)  // apart, so that the sums above stay in registers
    for (int r = 0; r < R; ++r)
      for (int j = 0; j < K; ++j) sums[r * K + j] += sum(load(q + r * kMaxDim + d, rest) * load(k[j] + d, rest));
  for (int r = 0; r < R; ++r)
    for (int j = 0; j < K; ++j) scores[r * kTile + j] = sums[r * K + j];
}

template <int R, bool kVnni, class Q, class S, class A>
void score_rows(const Q* q, const S* key, std::int64_t key_row, std::int64_t keys, std::int64_t dim, Ahead<S>& next,
                A* scores) {
  for (std::int64_t j = 0; j < keys; j += kKeys<R>) {
    if constexpr (std::is_same_v<S, std::int8_t>) {
      for (int i = 0; i < kKeys<R>; ++i) next.ask_row();  // evenly, as below, it was 8 % slower over 32768 keys
      dot_int8_keys<R, kVnni>(q, key + j * key_row, key_row, keys - j, dim, scores + j);
    } else {
      dot_keys<R>(q, key + j * key_row, key_row, keys - j, dim, next, scores + j);
    }
  }
}

// o[r][c] = o[r][c] shrink[r] + sum_j p[r][j] v[j][c] for R rows and W vectors of columns.
template <int R, int W, class S, class A>
void add_columns(const A* p, const S* v, std::int64_t v_row, std::int64_t keys, const A* shrink, Ahead<S>& next, A* o,
                 std::int64_t o_row) {
  using V = Vec<A>;
  V acc[R][W];
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int w = 0; w < W; ++w) acc[r][w] = load(o + r * o_row + w * V::N) * V(shrink[r]);
  Ahead<S> ahead = next;  // in registers
  for (std::int64_t j = 0; j < keys; ++j) {
    ahead.template ask<W * V::N>();
    V x[R];
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) x[r] = V(p[r * kTile + j]);
#pragma GCC unroll 8
    for (int w = 0; w < W; ++w) {
      const V value = load(v + j * v_row + w * V::N);
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) acc[r][w] = add_product(acc[r][w], x[r], value);
    }
  }
  next = ahead;
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int w = 0; w < W; ++w) store(o + r * o_row + w * V::N, acc[r][w]);
}

template <int R, class S, class A>
void add_values(const A* p, const S* v, std::int64_t v_row, std::int64_t keys, const A* shrink, Ahead<S>& next, A* o,
                std::int64_t dim_v) {
  using V = Vec<A>;
  constexpr int W = R == 1 ? 8 : R == 2 ? 4 : 2;
  std::int64_t c = 0;
  for (; c + W * V::N <= dim_v; c += W * V::N) add_columns<R, W>(p, v + c, v_row, keys, shrink, next, o + c, dim_v);
  for (; c + V::N <= dim_v; c += V::N) add_columns<R, 1>(p, v + c, v_row, keys, shrink, next, o + c, dim_v);
  const int rest = static_cast<int>(dim_v - c);
  if (rest == 0) return;
  for (int r = 0; r < R; ++r) {
    V acc = load(o + r * dim_v + c, rest) * V(shrink[r]);
    for (std::int64_t j = 0; j < keys; ++j) acc = fma(V(p[r * kTile + j]), load(v + j * v_row + c, rest), acc);
    store(o + r * dim_v + c, acc, rest);
  }
}

// Calls f with the number of rows as a compile-time constant, 4 rows at a time and then the rest.
template <class F>
void by_four(std::int64_t rows, const F& f) {
  std::int64_t r = 0;
  for (; r + 4 <= rows; r += 4) f(std::integral_constant<int, 4>{}, r);
  if (rows - r == 3) f(std::integral_constant<int, 3>{}, r);
  if (rows - r == 2) f(std::integral_constant<int, 2>{}, r);
  if (rows - r == 1) f(std::integral_constant<int, 1>{}, r);
}

// The chunk's keys [from, to) for all rows of one KV head: sums o (rows, Dv), then the largest scores, then the totals.
template <bool kVnni, class T, class S>
void add_chunk(const AttentionParams& p, const Head<T, S>& head, std::int64_t from, std::int64_t to, Acc<T>* partial) {
  using A = Acc<T>;
  using V = Vec<A>;
  const std::int64_t rows = head.rows(), dim = p.query.size[3], dim_v = p.value.size[3];
  A *o = partial, *top = o + rows * dim_v, *total = top + rows;
  std::fill_n(o, rows * dim_v, A(0));
  std::fill_n(top, rows, -std::numeric_limits<A>::infinity());
  std::fill_n(total, rows, A(0));
  constexpr bool kIntegers = std::is_same_v<S, std::int8_t>;
  std::conditional_t<kIntegers, std::int16_t, A> q[kMaxRows * kMaxDim];
  A scores[kMaxRows * kTile], shrink[kMaxRows];
  [[maybe_unused]] A unit[kMaxRows], weight_unit[kMaxRows];  // of a row's integers
  [[maybe_unused]] std::int16_t weights[kMaxRows * kTile];
  for (std::int64_t r = 0; r < rows; ++r) {
    A row[kMaxDim + V::N];
    widen(head.query_of(r), dim, round_up(dim, V::N), row);
    for (std::int64_t d = 0; d < dim; ++d) row[d] *= static_cast<A>(p.scale * kLog2e);
    if constexpr (kIntegers)
      unit[r] = to_integers(row, dim, q + r * kMaxDim);
    else
      std::copy_n(row, dim, q + r * kMaxDim);
  }
  from = std::max(from, visible(p, head.position(0), head.len_k).begin);
  to = std::min(to, visible(p, head.position(rows - 1), head.len_k).end);
  for (std::int64_t tile = from; tile < to; tile += kTileOf<S>) {
    const std::int64_t keys = std::min(kTileOf<S>, to - tile), left = std::min(kTileOf<S>, to - tile - keys);
    const S *key = head.key + tile * head.key_row, *value = head.value + tile * head.value_row;
    Ahead<S> values{value, head.value_row, dim_v, keys};
    Ahead<S> next_keys{key + keys * head.key_row, head.key_row, dim, left};
    by_four(rows, [&](auto count, std::int64_t r) {
      score_rows<count(), kVnni>(q + r * kMaxDim, key, head.key_row, keys, dim, values, scores + r * kTile);
    });
    for (std::int64_t r = 0; r < rows; ++r) {
      const std::int64_t padded = round_up(keys, V::N);
      if constexpr (kIntegers)
        multiply_each(head.key_scale + tile * head.key_scale_row, head.key_scale_row, keys, unit[r],
                      scores + r * kTile);
      hide(p, head, r, tile, {0, keys}, padded, scores + r * kTile);
      shrink[r] = soften(scores + r * kTile, 0, padded, top[r], total[r]);
      if constexpr (kIntegers) {
        multiply_each(head.value_scale + tile * head.value_scale_row, head.value_scale_row, keys, A(1),
                      scores + r * kTile);
        weight_unit[r] = to_integers(scores + r * kTile, padded, weights + r * kTile);
      }
    }
    by_four(rows, [&](auto count, std::int64_t r) {
      if constexpr (kIntegers)
        add_int8_values<count(), kVnni>({weights + r * kTile, weight_unit + r, shrink + r}, value, head.value_row, keys,
                                        next_keys, o + r * dim_v, dim_v);
      else
        add_values<count()>(scores + r * kTile, value, head.value_row, keys, shrink + r, next_keys, o + r * dim_v,
                            dim_v);
    });
  }
}

// Merges the chunks of one KV head into the first and writes the result.
template <class T, class S>
void merge(const AttentionParams& p, const Head<T, S>& head, std::int64_t chunks, Acc<T>* partials) {
  using A = Acc<T>;
  const std::int64_t rows = head.rows(), dim_v = p.value.size[3], size = partial_size(p);
  for (std::int64_t r = 0; r < rows; ++r) {
    A top = -std::numeric_limits<A>::infinity(), total = 0, sums[kMaxDim] = {};
    for (std::int64_t i = 0; i < chunks; ++i) top = std::max(top, partials[i * size + rows * dim_v + r]);
    for (std::int64_t i = 0; i < chunks; ++i) {
      const A* from = partials + i * size;
      const A own = from[rows * dim_v + r];
      const A weight = own == -std::numeric_limits<A>::infinity() ? A(0) : std::exp2(own - top);
      total += weight * from[rows * (dim_v + 1) + r];
      for (std::int64_t c = 0; c < dim_v; ++c) sums[c] += weight * from[r * dim_v + c];
    }
    write_row(head, r, dim_v, sums, top, total);
  }
}

template <class T, class S>
void decode(const AttentionParams& p) {
  const std::int64_t kv_heads = p.key.size[1], heads = p.query.size[0] * kv_heads;
  const std::int64_t chunks = chunks_of(p), size = partial_size(p);
  Acc<T>* partials = p.scratch.as<Acc<T>>();
  const bool vnni = std::is_same_v<S, std::int8_t> && has_vnni();
  parallel_for(heads * chunks, p.key.numel(), [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t task = begin; task < end; ++task) {
      const std::int64_t head = task / chunks, chunk = task % chunks;
      const Head<T, S> own = head_of<T, S>(p, head / kv_heads, head % kv_heads);
      const auto add = vnni ? add_chunk<true, T, S> : add_chunk<false, T, S>;
      add(p, own, chunk * kChunk, (chunk + 1) * kChunk, partials + task * size);
    }
  });
  parallel_for(heads, heads * chunks * size, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t head = begin; head < end; ++head)
      merge(p, head_of<T, S>(p, head / kv_heads, head % kv_heads), chunks, partials + head * chunks * size);
  });
}

}  // namespace

// Measured: for 8 rows and up to 32 keys, 16 rows and up to 160, packed tiles take 0.5 to 0.9 of the time.
bool is_decode(const AttentionParams& p) {
  const std::int64_t rows = p.query.size[2] * (p.query.size[1] / p.key.size[1]);
  return p.offsets_q.data == nullptr && rows <= kMaxRows && p.key.size[2] > 16 * (rows - 6);
}

std::int64_t attention_decode_scratch_bytes(const AttentionParams& p) {
  const std::int64_t element = p.query.dtype == DType::f64 ? 8 : 4;
  return p.query.size[0] * p.key.size[1] * chunks_of(p) * partial_size(p) * element;
}

void attention_decode(const AttentionParams& p) {
  if (p.query.numel() == 0 && p.out.numel() == 0) return;
  with_cache_type(p, [&](auto t, auto s) { decode<decltype(t), decltype(s)>(p); });
}

}  // namespace qvl::cpu
