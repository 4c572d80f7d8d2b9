// What the attention kernels share: where a head's tensors lie, which keys a row sees, and one step of online softmax.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>

#include "../params.h"
#include "dispatch.h"
#include "vec.h"

namespace qvl::cpu {

constexpr double kLog2e = 1.4426950408889634, kLn2 = 0.6931471805599453;
constexpr int kMaxDim = 256;  // of queries, keys and values

// attention_decode.cpp: few queries for many keys, where reading the keys is all that costs.
bool is_decode(const AttentionParams& p);
std::int64_t attention_decode_scratch_bytes(const AttentionParams& p);
void attention_decode(const AttentionParams& p);

// Multiply-adds of a KV head's queries, masked ones too; of an average segment.
inline std::int64_t products_of_head(const AttentionParams& p) {
  const std::int64_t segments = p.offsets_q.data != nullptr ? std::max<std::int64_t>(p.offsets_q.size[0] - 1, 1) : 1;
  const std::int64_t rows = p.query.size[2] / segments * (p.query.size[1] / p.key.size[1]);
  return rows * (p.key.size[2] / segments) * (p.query.size[3] + p.value.size[3]);
}

// Whether the caller lets factors be rounded, and rows see enough keys on average for that to pay.
inline bool may_round(const AttentionParams& p) {
  constexpr std::int64_t kFewestKeys = 256;
  if (!p.rounded || p.query.dtype == DType::f64) return false;
  const std::int64_t segments = p.offsets_k.data != nullptr ? p.offsets_k.size[0] - 1 : 1;
  const std::int64_t keys = p.key.size[2] / std::max<std::int64_t>(segments, 1);
  return (p.causal ? keys / 2 : keys) >= kFewestKeys;
}

// attention_rounded.cpp: integers in place of floats, where the call and the CPU allow.
bool is_rounded(const AttentionParams& p);
std::int64_t attention_rounded_scratch_bytes(const AttentionParams& p, std::int64_t threads);
void attention_rounded(const AttentionParams& p);

// attention_amx.cpp: bfloat16 in AMX's registers, where the call and the CPU allow.
bool is_amx(const AttentionParams& p);
std::int64_t attention_amx_scratch_bytes(const AttentionParams& p, std::int64_t threads);
void attention_amx(const AttentionParams& p);

// attention_backward_amx.cpp: the same for the gradients of bfloat16 tensors.
bool is_backward_amx(const AttentionParams& p);
std::int64_t attention_backward_amx_scratch_bytes(const AttentionParams& p, std::int64_t threads);
void attention_backward_amx(const AttentionBackwardParams& p);

// Calls f(T{}, S{}) with the storage types of queries and of keys and values.
template <class F>
void with_cache_type(const AttentionParams& p, const F& f) {
  with_storage_type(p.query.dtype, [&](auto t) {
    if constexpr (!std::is_same_v<decltype(t), double>)
      if (p.key.dtype == DType::i8) return f(t, std::int8_t{});
    if constexpr (std::is_same_v<decltype(t), float>) {
      if (p.key.dtype == DType::bf16) return f(t, bf16{});
      if (p.key.dtype == DType::f16) return f(t, f16{});
    }
    f(t, t);
  });
}

// The length of the longest sequence that the offsets cut, or what it is where there are none.
inline std::int64_t longest_sequence(const TensorView& offsets, std::int64_t otherwise) {
  if (offsets.data == nullptr) return otherwise;
  const std::int64_t* const at = offsets.as<std::int64_t>();
  std::int64_t longest = 0;
  for (std::int64_t s = 0; s + 1 < offsets.size[0]; ++s) longest = std::max(longest, at[s + 1] - at[s]);
  return longest;
}

constexpr std::int64_t round_up(std::int64_t n, std::int64_t to) { return (n + to - 1) / to * to; }

// Memory handed out in pieces of 16 elements, whole cache lines of floats.
class Pieces {
 public:
  std::int64_t take(std::int64_t count) {
    const std::int64_t start = size_;
    size_ += round_up(count, 16);
    return start;
  }
  std::int64_t size() const { return size_; }

 private:
  std::int64_t size_ = 0;
};

// Where the tensors of one segment and KV head lie, and which keys its rows see. T is the storage type of queries and
// output, S that of keys and values: T; of 16 bits where T is float; or int8 with a scale for each key.
template <class T, class S = T>
struct Head {
  const T* query;
  const S *key, *value;
  const Acc<T>*key_scale, *value_scale;
  std::int64_t key_scale_row, value_scale_row;
  T* out;
  Acc<T>* lse;
  std::int64_t len_q, len_k, group;
  std::int64_t query_row, query_head, key_row, value_row, out_row, out_head, lse_head;  // strides
  const TensorView* mask;
  std::int64_t batch, first_head;

  // Row r is the query at position r / group of head r % group.
  std::int64_t rows() const { return len_q * group; }
  std::int64_t position(std::int64_t row) const { return len_k - len_q + row / group; }
  const T* query_of(std::int64_t row) const { return query + row / group * query_row + row % group * query_head; }
  T* out_of(std::int64_t row) const { return out + row / group * out_row + row % group * out_head; }
};

struct Range {
  std::int64_t begin, end;
};

// The keys that the query at `position` sees.
inline Range visible(const AttentionParams& p, std::int64_t position, std::int64_t len_k) {
  std::int64_t begin = 0, end = len_k;
  if (p.left >= 0) begin = std::max(begin, position - p.left);
  if (p.causal) end = std::min(end, position + 1);
  if (p.right >= 0) end = std::min(end, position + p.right + 1);
  return {begin, std::max(begin, end)};
}

// Copies n elements of storage to the compute type, zeros up to `padded`.
template <class S, class A>
void widen(const S* from, std::int64_t n, std::int64_t padded, A* to) {
  using V = Vec<A>;
  std::int64_t i = 0;
  for (; i + V::N <= n; i += V::N) store(to + i, load(from + i));
  if (i < n) store(to + i, load(from + i, static_cast<int>(n - i)), static_cast<int>(n - i));
  std::fill(to + n, to + padded, A(0));
}

template <class T, class S = T>
Head<T, S> head_of(const AttentionParams& p, std::int64_t segment, std::int64_t kv_head) {
  const TensorView &q = p.query, &k = p.key, &v = p.value, &o = p.out;
  const bool packed = p.offsets_q.data != nullptr;
  const std::int64_t batch = packed ? 0 : segment;
  const std::int64_t q0 = packed ? p.offsets_q.as<std::int64_t>()[segment] : 0;
  const std::int64_t k0 = packed ? p.offsets_k.as<std::int64_t>()[segment] : 0;
  Head<T, S> h{};
  h.group = q.size[1] / k.size[1];
  h.batch = batch;
  h.first_head = kv_head * h.group;
  h.len_q = packed ? p.offsets_q.as<std::int64_t>()[segment + 1] - q0 : q.size[2];
  h.len_k = packed ? p.offsets_k.as<std::int64_t>()[segment + 1] - k0 : k.size[2];
  if (p.key_lengths.data)
    h.len_k = std::clamp<std::int64_t>(p.key_lengths.as<std::int64_t>()[batch * p.key_lengths.stride[0]], 0, h.len_k);
  h.query = q.as<T>() + batch * q.stride[0] + h.first_head * q.stride[1] + q0 * q.stride[2];
  h.key = k.as<S>() + batch * k.stride[0] + kv_head * k.stride[1] + k0 * k.stride[2];
  h.value = v.as<S>() + batch * v.stride[0] + kv_head * v.stride[1] + k0 * v.stride[2];
  h.out = o.as<T>() + batch * o.stride[0] + h.first_head * o.stride[1] + q0 * o.stride[2];
  if (p.key_scale.data) {
    const TensorView &ks = p.key_scale, &vs = p.value_scale;
    h.key_scale = ks.as<Acc<T>>() + batch * ks.stride[0] + kv_head * ks.stride[1] + k0 * ks.stride[2];
    h.value_scale = vs.as<Acc<T>>() + batch * vs.stride[0] + kv_head * vs.stride[1] + k0 * vs.stride[2];
    h.key_scale_row = ks.stride[2], h.value_scale_row = vs.stride[2];
  }
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

// -inf where row `row` does not see the key, up to `padded`; the mask's values where it has them. scores[j] belongs to
// key tile + j, j in [begin, end).
template <class T, class S>
void hide(const AttentionParams& p, const Head<T, S>& head, std::int64_t row, std::int64_t tile, Range keys,
          std::int64_t padded, Acc<T>* scores) {
  using A = Acc<T>;
  constexpr A kHidden = -std::numeric_limits<A>::infinity();
  const Range seen = visible(p, head.position(row), head.len_k);
  const auto [begin, end] = keys;
  for (std::int64_t j = begin; j < std::min(seen.begin - tile, end); ++j) scores[j] = kHidden;
  for (std::int64_t j = std::max(std::min(seen.end - tile, end), begin); j < padded; ++j) scores[j] = kHidden;
  if (head.mask == nullptr) return;
  const TensorView& mask = *head.mask;
  const std::int64_t at = head.batch * mask.stride[0] + (head.first_head + row % head.group) * mask.stride[1] +
                          row / head.group * mask.stride[2] + tile * mask.stride[3];
  if (mask.dtype == DType::boolean) {
    const bool* keep = mask.as<bool>() + at;
    for (std::int64_t j = begin; j < end; ++j)
      if (!keep[j * mask.stride[3]]) scores[j] = kHidden;
  } else {
    const A* add = mask.as<A>() + at;
    for (std::int64_t j = begin; j < end; ++j) scores[j] += add[j * mask.stride[3]] * static_cast<A>(kLog2e);
  }
}

// One row of online softmax in base 2: scores [begin, padded) become 2^(score - top) with `top` the largest so far,
// `total` their sum so far. Returns what earlier sums shrink by. padded - begin is a multiple of the vector.
template <class A>
A soften(A* scores, std::int64_t begin, std::int64_t padded, A& top, A& total) {
  using V = Vec<A>;
  V largest_so_far(top);
  for (std::int64_t j = begin; j < padded; j += V::N) largest_so_far = max(largest_so_far, load(scores + j));
  const A now = largest(largest_so_far);
  const A safe = now == -std::numeric_limits<A>::infinity() ? A(0) : now;  // nothing seen yet: -inf - -inf is NaN
  const V shift(safe);
  V added = V::zero();
  for (std::int64_t j = begin; j < padded; j += V::N) {
    const V e = exp2_to_127(load(scores + j) - shift);
    store(scores + j, e);
    added = added + e;
  }
  const A shrink = first(exp2_to_127(V(top - safe)));
  total = total * shrink + sum(added);
  top = now;
  return shrink;
}

// The log-sum-exp of row `row`, where the caller wants it.
template <class T, class S>
void write_lse(const Head<T, S>& head, std::int64_t row, Acc<T> top, Acc<T> total) {
  if (head.lse != nullptr)
    head.lse[row % head.group * head.lse_head + row / head.group] = top * static_cast<Acc<T>>(kLn2) + std::log(total);
}

// out = o / total for row `row`, and its log-sum-exp; zeros where the row saw no key.
template <class T, class S>
void write_row(const Head<T, S>& head, std::int64_t row, std::int64_t dim_v, const Acc<T>* o, Acc<T> top,
               Acc<T> total) {
  using V = Vec<Acc<T>>;
  const V inverse(total == 0 ? Acc<T>(0) : 1 / total);
  T* to = head.out_of(row);
  std::int64_t c = 0;
  for (; c + V::N <= dim_v; c += V::N) store(to + c, load(o + c) * inverse);
  if (const int rest = static_cast<int>(dim_v - c); rest > 0) store(to + c, load(o + c, rest) * inverse, rest);
  write_lse(head, row, top, total);
}

}  // namespace qvl::cpu
