// What the linear attention kernels share: feature blocks, states, and where a head's tensors lie.
//
// Features of a block of kChunk rows lie as panels [panel][kChunk][2 N], features in lanes. They are phi 2^-shift with
// a whole shift for each row: a query's cancels; a key's is a power of two that its weight carries, so no exponential
// overflows and every rescaling is exact. With elu and given features all shifts are 0. A key that is masked out has
// shift -inf and value 0.
//
// A state is the sum of v^ phi^T over keys, v^ = (v, 1) 2^(shift - top), as panels [panel][rows][2 N] of rows = Dv + 1,
// rounded up to whole strips; its row Dv is the sum of phi, and behind it comes top. Every product below is
// attention_tiles.h's register tile:
//
//   product              a                          stride of r, k     b
//   W x'                 strip of x, [D][6]         1, 6               panel of W, [D][2 N]
//   state += v^ phi^T    six columns of values      1, kValueRow       panel of phi, [kChunk][2 N]
//   phi S, phi phi^T     six rows of phi, 2 N long  2 N, 1             panel of the state or of phi, transposed
#pragma once

#include "attention_tiles.h"

namespace qvl::cpu {

// linear_attention_decode.cpp: one token, where reading W and the state is all that costs.
bool is_linear_decode(const LinearAttentionParams& p);
std::int64_t linear_attention_decode_scratch_bytes(const LinearAttentionParams& p);
void linear_attention_decode(const LinearAttentionParams& p);

constexpr int kChunk = 96;              // whole strips, whole panels of either ISA
constexpr int kSegment = 8 * kChunk;    // keys whose states are summed apart, whatever the number of threads
constexpr int kValueRow = kMaxDim + 8;  // of values in a block: not a multiple of the page, as lines would share sets
constexpr int kGroup = 4;               // strips that pass one panel of W while it is in L1

template <class A>
constexpr A kNoKey = -std::numeric_limits<A>::infinity();

struct LinearSizes {
  std::int64_t dim, features, panels, width, dim_v, columns, rows, state, projection;
  FeatureKind kind;

  LinearSizes(const LinearAttentionParams& p, int panel)
      : dim(p.query.size[3]),
        features(p.kind == FeatureKind::favor ? p.projection.size[0] : dim),
        panels((features + panel - 1) / panel),
        width(panels * panel),
        dim_v(p.value.size[3]),
        columns(round_up(dim_v, panel)),
        rows(round_up(dim_v + 1, kStrip)),
        state(width * rows + 16),
        projection(p.kind == FeatureKind::favor ? width * dim : 0),
        kind(p.kind) {}
};

// One sequence and KV head.
template <class T>
struct LinearHead : Head<T> {
  const bool* key_mask;
  std::int64_t key_mask_row, offset;  // query i stands at position offset + i of the keys
  Acc<T>*normalizer, *normalizer_top;
  std::int64_t normalizer_head;

  bool hidden(std::int64_t j) const { return key_mask != nullptr && !key_mask[j * key_mask_row]; }
  // The first row of the group whose position is at least `key`.
  std::int64_t row_at(std::int64_t key) const {
    return std::clamp<std::int64_t>(key - offset, 0, this->len_q) * this->group;
  }
};

template <class T>
LinearHead<T> linear_head(const LinearAttentionParams& p, std::int64_t sequence, std::int64_t kv_head) {
  AttentionParams call{};
  call.query = p.query, call.key = p.key, call.value = p.value, call.out = p.out;
  call.offsets_q = p.offsets_q, call.offsets_k = p.offsets_k;
  LinearHead<T> h{};
  static_cast<Head<T>&>(h) = head_of<T>(call, sequence, kv_head);
  h.offset = h.len_k - h.len_q;
  if (p.key_mask.data) {
    const std::int64_t first = p.offsets_k.data ? p.offsets_k.as<std::int64_t>()[sequence] : 0;
    h.key_mask = p.key_mask.as<bool>() + h.batch * p.key_mask.stride[0] + first * p.key_mask.stride[1];
    h.key_mask_row = p.key_mask.stride[1];
  }
  if (p.normalizer.data) {
    const std::int64_t first = p.offsets_q.data ? p.offsets_q.as<std::int64_t>()[sequence] : 0;
    h.normalizer_head = p.query.size[2];
    h.normalizer = p.normalizer.as<Acc<T>>() + (h.batch * p.query.size[1] + h.first_head) * h.normalizer_head + first;
    h.normalizer_top = h.normalizer + p.query.size[0] * p.query.size[1] * h.normalizer_head;
  }
  return h;
}

inline std::int64_t linear_sequences(const LinearAttentionParams& p) {
  return p.offsets_q.data ? p.offsets_q.numel() - 1 : p.query.size[0];
}

// The keys of the longest sequence, in segments.
inline std::int64_t most_segments(const LinearAttentionParams& p) {
  return std::max<std::int64_t>(1, (longest_sequence(p.offsets_k, p.key.size[2]) + kSegment - 1) / kSegment);
}

// Whether a head's segments are worth sharing out: they cost the keys' features and sums twice. It moves no bit.
inline bool heads_fill_the_threads(const LinearAttentionParams& p) {
  const std::int64_t heads = linear_sequences(p) * p.key.size[1];
  return most_segments(p) == 1 || heads >= 4 * p.threads || (!p.offsets_q.data && heads % p.threads == 0);
}

// 2^(shift - top); 0 where nothing has been seen.
template <class A>
A power(A shift, A top) {
  return shift == kNoKey<A> ? A(0) : std::exp2(shift - top);
}

template <class A>
A& top_of(A* state, const LinearSizes& at) {
  return state[at.width * at.rows];
}
template <class A>
A top_of(const A* state, const LinearSizes& at) {
  return state[at.width * at.rows];
}

template <class A>
void clear_state(A* state, const LinearSizes& at) {
  std::fill_n(state, at.width * at.rows, A(0));
  top_of(state, at) = kNoKey<A>;
}

// to = a + b, relative to the larger top. `to` may be `a` or `b`.
template <class A>
void merge_states(const A* a, const A* b, A* to, const LinearSizes& at) {
  using V = Vec<A>;
  const A top_a = top_of(a, at), top_b = top_of(b, at), top = std::max(top_a, top_b);
  const V by_a(power(top_a, top)), by_b(power(top_b, top));
  for (std::int64_t i = 0; i < at.width * at.rows; i += V::N) store(to + i, fma(load(a + i), by_a, load(b + i) * by_b));
  top_of(to, at) = top;
}

// state += sum over `count` rows of values[i] phi[i]^T, values relative to `top`.
template <class A>
void add_to_state(const A* values, const A* phi, std::int64_t count, A top, A* state, const LinearSizes& at) {
  using V = Vec<A>;
  if (top == kNoKey<A>) return;
  const A old = top_of(state, at), now = std::max(old, top);
  const V kept(power(old, now)), scale(power(top, now));
  for (std::int64_t p = 0; p < at.panels; ++p)
    for (std::int64_t r = 0; r < at.rows; r += kStrip) {
      Tile<A> acc, sum;
      clear_tile<A>(acc);
      multiply_add<1, kValueRow>(values + r, phi + p * kChunk * kPanel<A>, count, acc);
      A* const to = state + (p * at.rows + r) * kPanel<A>;
      load_tile(to, kPanel<A>, sum);
#pragma GCC unroll 6
      for (int i = 0; i < kStrip; ++i) {
        sum[i][0] = fma(sum[i][0], kept, acc[i][0] * scale);
        sum[i][1] = fma(sum[i][1], kept, acc[i][1] * scale);
      }
      store_tile(to, kPanel<A>, sum);
    }
  top_of(state, at) = now;
}

// Panels [panel][stride][2 N] of `count` rows, transposed: [row panel][width][2 N]. Rows that fill up a panel repeat
// the last.
template <class A>
void transpose_panels(const A* from, std::int64_t stride, std::int64_t count, const LinearSizes& at, A* to) {
  for (std::int64_t r = 0; r < round_up(count, kPanel<A>); r += 8)
    for (std::int64_t p = 0; p < at.panels; ++p) {
      const A* rows[8];
      for (int i = 0; i < 8; ++i) rows[i] = from + (p * stride + std::min(r + i, count - 1)) * kPanel<A>;
      A* const first = to + r / kPanel<A> * kPanel<A> * at.width;
      transpose_eight(rows, kPanel<A>, first + p * kPanel<A> * kPanel<A> + r % kPanel<A>, kPanel<A>);
    }
}

// acc += six rows of features times a transposed panel [width][2 N].
template <class A>
[[gnu::always_inline]] inline void multiply_features(const A* phi, const A* panel, const LinearSizes& at,
                                                     Tile<A>& acc) {
  for (std::int64_t m = 0; m < at.features; m += kPanel<A>)
    multiply_add<kPanel<A>, 1>(phi + m * kChunk, panel + m * kPanel<A>,
                               std::min<std::int64_t>(kPanel<A>, at.features - m), acc);
}

// to[r row + j] = six rows of features times a transposed panel. A function of its own: where such a tile is inlined
// into a long one, gcc 12 keeps some of its accumulators in memory.
template <class A>
[[gnu::noinline]] void score_features(const A* phi, const A* panel, const LinearSizes& at, A* to, std::int64_t row) {
  Tile<A> acc;
  clear_tile<A>(acc);
  multiply_features(phi, panel, at, acc);
  store_tile(to, row, acc);
}

// phi_i . z for row i of a block, z being row Dv of a state.
template <class A>
A feature_dot(const A* phi, std::int64_t i, const A* state, const LinearSizes& at) {
  using V = Vec<A>;
  V a = V::zero(), b = V::zero();
  for (std::int64_t p = 0; p < at.panels; ++p) {
    const A *x = phi + (p * kChunk + i) * kPanel<A>, *z = state + (p * at.rows + at.dim_v) * kPanel<A>;
    a = fma(load(x), load(z), a);
    b = fma(load(x + V::N), load(z + V::N), b);
  }
  return sum(a + b);
}

// Computes blocks of features.
template <class T>
class Features {
 public:
  using A = Acc<T>;
  using V = Vec<A>;

  Features(const LinearSizes& at, const A* panels) : at_(at), panels_(panels) {}

  static std::int64_t strips_size(const LinearSizes& at) {
    return at.kind == FeatureKind::favor ? kGroup * kStrip * at.dim + kStripSlack : 0;
  }

  // W log2(e) / D^(1/4), as panels: features are powers of two inside.
  static void pack_projection(const LinearAttentionParams& p, const LinearSizes& at, A* panels) {
    if (at.kind != FeatureKind::favor) return;
    pack_transposed(p.projection.as<A>(), at.dim, at.features, at.dim, panels);
    multiply(panels, V(static_cast<A>(kLog2e / std::sqrt(std::sqrt(static_cast<double>(at.dim))))), at.width * at.dim);
  }

  // phi and shift of `count` rows; row(i) is where row i lies, or null for one that is masked out. `norms` false leaves
  // out -|x'|^2 / 2 - log(M) / 2 and with it the meaning of shift: for queries, where it cancels.
  template <class RowAt>
  void run(std::int64_t count, const RowAt& row, bool norms, A* strips, A* phi, A* shift) const {
    if (at_.kind != FeatureKind::favor) return load_rows(count, row, phi, shift);
    for (std::int64_t first = 0; first < count; first += kGroup * kStrip) {
      const int group = static_cast<int>(std::min<std::int64_t>(kGroup, (count - first + kStrip - 1) / kStrip));
      A bias[kGroup * kStrip];
      for (int s = 0; s < group; ++s) load_strip(first + s * kStrip, count, row, norms, s, strips, bias);
      for (std::int64_t p = 0; p < at_.panels; ++p)
        for (int s = 0; s < group; ++s)
          score_panel(strips + s * kStrip * at_.dim, panels_ + p * kPanel<A> * at_.dim, at_.dim,
                      phi + (p * kChunk + first + s * kStrip) * kPanel<A>, kPanel<A>);
      for (int s = 0; s < group; ++s) raise(first + s * kStrip, count, bias + s * kStrip, phi, shift);
    }
    for (std::int64_t i = 0; i < count; ++i)
      if (row(i) == nullptr) shift[i] = kNoKey<A>;
  }

 private:
  template <class RowAt>
  void load_strip(std::int64_t first, std::int64_t count, const RowAt& row, bool norms, int s, A* strips,
                  A* bias) const {
    A rows[kStrip][kMaxDim];
    const A half = static_cast<A>(-0.5 * kLog2e / std::sqrt(static_cast<double>(at_.dim)));
    const A scale = static_cast<A>(-0.5 * std::log2(static_cast<double>(at_.features)));
    for (int r = 0; r < kStrip; ++r) {
      const T* const from = first + r < count ? row(first + r) : nullptr;
      if (from == nullptr)
        std::fill_n(rows[r], at_.dim, A(0));
      else
        widen(from, at_.dim, at_.dim, rows[r]);
      bias[s * kStrip + r] = norms ? half * squares(rows[r]) + scale : A(0);
    }
    to_strip(rows[0], kMaxDim, at_.dim, strips + s * kStrip * at_.dim);
  }

  A squares(const A* x) const {
    V acc = V::zero();
    std::int64_t i = 0;
    for (; i + V::N <= at_.dim; i += V::N) acc = fma(load(x + i), load(x + i), acc);
    if (const int rest = static_cast<int>(at_.dim - i); rest > 0) acc = fma(load(x + i, rest), load(x + i, rest), acc);
    return sum(acc);
  }

  // Six rows of exponents, without their bias, to 2^(exponent + bias - shift), the largest in (1/2, 1].
  void raise(std::int64_t first, std::int64_t count, const A* bias, A* phi, A* shift) const {
    A* const rows = phi + first * kPanel<A>;
    const std::int64_t stride = kChunk * kPanel<A>;
    if (const std::int64_t used = at_.features % kPanel<A>; used > 0)
      for (int r = 0; r < kStrip; ++r) {
        A* const last = rows + (at_.panels - 1) * stride + r * kPanel<A>;
        std::fill(last + used, last + kPanel<A>, kNoKey<A>);
      }
    V top[kStrip];
    for (auto& t : top) t = V(kNoKey<A>);
    for (std::int64_t p = 0; p < at_.panels; ++p)
#pragma GCC unroll 6
      for (int r = 0; r < kStrip; ++r) {
        const A* const x = rows + p * stride + r * kPanel<A>;
        top[r] = max(load(x), max(load(x + V::N), top[r]));
      }
    V by[kStrip];
    for (int r = 0; r < kStrip; ++r) {
      const A most = std::ceil(largest(top[r]) + bias[r]);
      if (first + r < count) shift[first + r] = most;
      by[r] = V((most == kNoKey<A> ? A(0) : most) - bias[r]);
    }
    for (std::int64_t p = 0; p < at_.panels; ++p)
#pragma GCC unroll 6
      for (int r = 0; r < kStrip; ++r) {
        A* const x = rows + p * stride + r * kPanel<A>;
        store(x, exp2_to_127(load(x) - by[r]));
        store(x + V::N, exp2_to_127(load(x + V::N) - by[r]));
      }
  }

  template <class RowAt>
  void load_rows(std::int64_t count, const RowAt& row, A* phi, A* shift) const {
    for (std::int64_t i = 0; i < count; ++i) {
      const T* const from = row(i);
      shift[i] = from == nullptr ? kNoKey<A> : A(0);
      if (from != nullptr) {
        to_panels(from, at_.features, i, kChunk, phi);
      } else {
        for (std::int64_t p = 0; p < at_.panels; ++p) std::fill_n(phi + (p * kChunk + i) * kPanel<A>, kPanel<A>, A(0));
      }
      if (at_.kind != FeatureKind::elu) continue;
      for (std::int64_t p = 0; p < at_.panels; ++p)
        for (int w = 0; w < 2; ++w) {
          A* const to = phi + (p * kChunk + i) * kPanel<A> + w * V::N;
          const V x = load(to), none = V::zero();
          store(to, max(none, x) + exp2_to_127(min(none, x) * V(static_cast<A>(kLog2e))));  // a NaN stays
        }
      A* const last = phi + ((at_.panels - 1) * kChunk + i) * kPanel<A>;
      std::fill(last + (at_.features - 1) % kPanel<A> + 1, last + kPanel<A>, A(0));
    }
  }

  const LinearSizes& at_;
  const A* const panels_;
};

// Features, shifts and values with their 1 (zeros where masked out) of `count` keys from k0.
template <class T>
void load_keys(const LinearHead<T>& head, const LinearSizes& at, const Features<T>& features, Range keys,
               Acc<T>* strips, Acc<T>* phi, Acc<T>* shift, Acc<T>* values) {
  using A = Acc<T>;
  const auto row = [&](std::int64_t i) -> const T* {
    return head.hidden(keys.begin + i) ? nullptr : head.key + (keys.begin + i) * head.key_row;
  };
  features.run(keys.end - keys.begin, row, true, strips, phi, shift);
  for (std::int64_t j = keys.begin; j < keys.end; ++j, values += kValueRow) {
    const bool hidden = head.hidden(j);
    std::fill_n(values, at.rows, A(0));
    if (!hidden) widen(head.value + j * head.value_row, at.dim_v, at.dim_v, values);
    values[at.dim_v] = hidden ? A(0) : A(1);
  }
}

// state += sum of 2^shift values phi^T over `count` rows. The values are lost.
template <class A>
void add_rows(A* values, const A* shift, const A* phi, std::int64_t count, A* state, const LinearSizes& at) {
  const A top = count > 0 ? *std::max_element(shift, shift + count) : kNoKey<A>;
  for (std::int64_t i = 0; i < count; ++i)
    if (shift[i] != top) multiply(values + i * kValueRow, Vec<A>(power(shift[i], top)), at.rows);
  add_to_state(values, phi, count, top, state, at);
}

// 2^(shift - run) for the rows of a chunk one after the other: computed again only where run has risen.
template <class A>
class Factors {
 public:
  Factors(const A* shift, std::int64_t count) : shift_(shift), count_(count) {}

  // Of use for the keys that the row sees; a later one's shift may be anything above run.
  const A* at(A run) {
    using V = Vec<A>;
    if (run == run_) return factor_;
    run_ = run;
    for (std::int64_t j = 0; j < count_; j += V::N)
      store(factor_ + j, exp2_to_127(min(V(A(127)), load(shift_ + j) - V(run))));
    return factor_;
  }

 private:
  const A* const shift_;
  const std::int64_t count_;
  A run_ = std::numeric_limits<A>::quiet_NaN();
  A factor_[kChunk];
};

// A state from and to the caller's (M, Dv), (M) and top.
template <class A>
void read_state(const LinearAttentionParams& p, std::int64_t head, const LinearSizes& at, A* state) {
  clear_state(state, at);
  if (p.top.data == nullptr) return;
  const A* const sums = p.sums.as<A>() + head * at.features * at.dim_v;
  for (std::int64_t m = 0; m < at.features; ++m) {
    A* const to = state + m / kPanel<A> * kPanel<A> * at.rows + m % kPanel<A>;
    for (std::int64_t c = 0; c < at.dim_v; ++c) to[c * kPanel<A>] = sums[m * at.dim_v + c];
    to[at.dim_v * kPanel<A>] = p.total.as<A>()[head * at.features + m];
  }
  top_of(state, at) = p.top.as<A>()[head];
}

template <class A>
void write_state(const LinearAttentionParams& p, std::int64_t head, const LinearSizes& at, const A* state) {
  if (p.next_top.data == nullptr) return;
  A* const sums = p.next_sums.as<A>() + head * at.features * at.dim_v;
  for (std::int64_t m = 0; m < at.features; ++m) {
    const A* const from = state + m / kPanel<A> * kPanel<A> * at.rows + m % kPanel<A>;
    for (std::int64_t c = 0; c < at.dim_v; ++c) sums[m * at.dim_v + c] = from[c * kPanel<A>];
    p.next_total.as<A>()[head * at.features + m] = from[at.dim_v * kPanel<A>];
  }
  p.next_top.as<A>()[head] = top_of(state, at);
}

}  // namespace qvl::cpu
