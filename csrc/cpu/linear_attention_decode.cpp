// Linear attention, one token: what a decode step does with the state, the same at any length.
//
// Regime: memory. A KV head of G query heads reads W (M D) once for G + 1 vectors, and its state (M Dv) once, which it
// writes anew: 2 M (D (G + 1) + Dv (G + 2)) FLOPs on 4 M (D + 2 Dv) bytes. No panels: packing W would cost as much as
// the step. The state passes in columns of four vectors, so that the sums of two query heads stay in registers; more
// heads read the new columns again.
//
// Source: Katharopoulos et al., 2020, section 3.4.

#include "dispatch.h"
#include "linear_attention.h"
#include "parallel.h"

namespace qvl::cpu {
namespace {

constexpr int kWide = 4;  // vectors of a state's row at a time

template <class T>
class Step {
 public:
  using A = Acc<T>;
  using V = Vec<A>;

  static std::int64_t scratch_size(const LinearAttentionParams& p, const LinearSizes& at) {
    return (p.query.size[1] / p.key.size[1] + 1) * round_up(at.features, 16);
  }

  Step(const LinearAttentionParams& p, const LinearSizes& at, std::int64_t head, A* scratch)
      : p_(p),
        at_(at),
        head_(linear_head<T>(p, head / p.key.size[1], head % p.key.size[1])),
        index_(head),
        phi_(scratch),
        row_(round_up(at.features, 16)) {}

  // phi_[0] is the key's features, phi_[1 + g] those of query head g.
  void run() {
    const A shift = make_features(), old = p_.top.as<A>()[index_];
    const A own = head_.hidden(0) ? kNoKey<A> : shift, top = std::max(old, own);
    const A kept = power(old, top), scale = power(own, top);
    for (std::int64_t m = 0; m < at_.features; ++m) phi_[m] = scale == 0 ? A(0) : phi_[m] * scale;
    p_.next_top.as<A>()[index_] = top;
    const A* z = p_.total.as<A>() + index_ * at_.features;
    A* const next_z = p_.next_total.as<A>() + index_ * at_.features;
    for (std::int64_t m = 0; m < at_.features; ++m) next_z[m] = z[m] * kept + phi_[m];
    A value[kMaxDim] = {};
    if (scale != 0) widen(head_.value, at_.dim_v, at_.dim_v, value);
    for (std::int64_t g = 0; g < head_.group; g += 2) {
      const bool first = g == 0, two = g + 1 < head_.group;
      A sums[2][kMaxDim + kWide * V::N], inverse[2];
      for (int i = 0; i < 1 + two; ++i) {
        const A total = dot(phi_ + (1 + g + i) * row_, next_z, at_.features);
        inverse[i] = std::abs(total) < std::numeric_limits<A>::min() ? A(0) : 1 / total;
      }
      for (std::int64_t c = 0; c < at_.dim_v; c += kWide * V::N)
        first ? columns<true>(g, two, c, kept, value, sums) : columns<false>(g, two, c, kept, value, sums);
      for (int i = 0; i < 1 + two; ++i) write(g + i, sums[i], inverse[i]);
    }
  }

 private:
  // Returns the key's shift.
  A make_features() {
    A x[kMaxDim];
    A shift = 0;
    for (std::int64_t i = 0; i <= head_.group; ++i) {
      const T* const from = i == 0 ? head_.key : head_.query_of(i - 1);
      A* const phi = phi_ + i * row_;
      if (at_.kind != FeatureKind::favor) {
        widen(from, at_.features, at_.features, phi);
        if (at_.kind == FeatureKind::elu)
          for (std::int64_t m = 0; m < at_.features; ++m) phi[m] = phi[m] > 0 ? phi[m] + 1 : std::exp(phi[m]);
        continue;
      }
      widen(from, at_.dim, at_.dim, x);
      const A made = raise(x, phi, i == 0);
      if (i == 0) shift = made;
    }
    return shift;
  }

  // phi 2^-shift of one row of favor features; returns the shift, meaningful with `norm`.
  A raise(const A* x, A* phi, bool norm) const {
    const A* const w = p_.projection.as<A>();
    const double root = std::sqrt(static_cast<double>(at_.dim));
    const A scale = static_cast<A>(kLog2e / std::sqrt(root));
    const A bias = norm ? static_cast<A>(-0.5 * kLog2e / root) * dot(x, x, at_.dim) -
                              static_cast<A>(0.5 * std::log2(static_cast<double>(at_.features)))
                        : A(0);
    A top = kNoKey<A>;
    for (std::int64_t m = 0; m < at_.features; m += 4) {
      const A* rows[4];
      for (int i = 0; i < 4; ++i) rows[i] = w + std::min(m + i, at_.features - 1) * at_.dim;
      V acc[4];
      clear(acc);
      std::int64_t d = 0;
      for (; d + V::N <= at_.dim; d += V::N)
        for (int i = 0; i < 4; ++i) acc[i] = fma(load(rows[i] + d), load(x + d), acc[i]);
      if (const int rest = static_cast<int>(at_.dim - d); rest > 0)
        for (int i = 0; i < 4; ++i) acc[i] = fma(load(rows[i] + d, rest), load(x + d, rest), acc[i]);
      four_sums(acc[0], acc[1], acc[2], acc[3], phi + m);  // rows of scratch hold 16 features and more
      for (int i = 0; i < 4; ++i) top = std::max(top, phi[m + i]);
    }
    const A shift = std::ceil(top * scale + bias);
    const V by((shift == kNoKey<A> ? A(0) : shift) - bias), factor(scale);
    for (std::int64_t m = 0; m < at_.features; m += V::N) store(phi + m, exp2_to_127(load(phi + m) * factor - by));
    return shift;
  }

  // Columns [c, c + kWide N) of the new state (written with `Update`, else read), and of phi(q) S of one or two heads.
  template <bool Update>
  void columns(std::int64_t g, bool two, std::int64_t c, A kept, const A* value, A (&sums)[2][kMaxDim + kWide * V::N]) {
    const A *from = p_.sums.as<A>() + index_ * at_.features * at_.dim_v + c, *phi_q = phi_ + (1 + g) * row_;
    A* to = p_.next_sums.as<A>() + index_ * at_.features * at_.dim_v + c;
    const A* const second = two ? phi_q + row_ : phi_q;
    V a[kWide], b[kWide], v[kWide];
    clear(a);
    clear(b);
    int lanes[kWide];
    for (int w = 0; w < kWide; ++w) {
      lanes[w] = static_cast<int>(std::clamp<std::int64_t>(at_.dim_v - c - w * V::N, 0, V::N));
      v[w] = lanes[w] > 0 ? load(value + c + w * V::N, lanes[w]) : V::zero();
    }
    const bool whole = lanes[kWide - 1] == V::N;
    for (std::int64_t m = 0; m < at_.features; ++m, from += at_.dim_v, to += at_.dim_v) {
      const V k(kept), key(phi_[m]), q(phi_q[m]), r(second[m]);
#pragma GCC unroll 4
      for (int w = 0; w < kWide; ++w) {
        if (!whole && lanes[w] == 0) continue;
        V s;
        if constexpr (Update) {
          s = whole ? load(from + w * V::N) : load(from + w * V::N, lanes[w]);
          s = fma(key, v[w], s * k);
          whole ? store(to + w * V::N, s) : store(to + w * V::N, s, lanes[w]);
        } else {
          s = whole ? load(to + w * V::N) : load(to + w * V::N, lanes[w]);
        }
        a[w] = fma(q, s, a[w]);
        b[w] = fma(r, s, b[w]);
      }
    }
    for (int w = 0; w < kWide; ++w) {
      store(sums[0] + c + w * V::N, a[w]);
      store(sums[1] + c + w * V::N, b[w]);
    }
  }

  void write(std::int64_t g, const A* sums, A inverse) const {
    T* const to = head_.out + g * head_.out_head;
    for (std::int64_t c = 0; c < at_.dim_v; c += V::N) {
      const V x = load(sums + c) * V(inverse);
      c + V::N <= at_.dim_v ? store(to + c, x) : store(to + c, x, static_cast<int>(at_.dim_v - c));
    }
  }

  static A dot(const A* a, const A* b, std::int64_t n) {
    V acc = V::zero();
    std::int64_t i = 0;
    for (; i + V::N <= n; i += V::N) acc = fma(load(a + i), load(b + i), acc);
    if (const int rest = static_cast<int>(n - i); rest > 0) acc = fma(load(a + i, rest), load(b + i, rest), acc);
    return sum(acc);
  }

  const LinearAttentionParams& p_;
  const LinearSizes& at_;
  const LinearHead<T> head_;
  const std::int64_t index_;
  A* const phi_;
  const std::int64_t row_;
};

}  // namespace

bool is_linear_decode(const LinearAttentionParams& p) {
  return p.query.size[2] == 1 && p.key.size[2] == 1 && p.top.data && p.next_top.data && !p.normalizer.data;
}

std::int64_t linear_attention_decode_scratch_bytes(const LinearAttentionParams& p) {
  const bool wide = p.query.dtype == DType::f64;
  const LinearSizes at(p, wide ? kPanel<double> : kPanel<float>);
  return p.threads * Step<float>::scratch_size(p, at) * (wide ? 8 : 4);
}

void linear_attention_decode(const LinearAttentionParams& p) {
  with_storage_type(p.query.dtype, [&](auto t) {
    using T = decltype(t);
    const LinearSizes at(p, kPanel<Acc<T>>);
    const std::int64_t heads = p.key.size[0] * p.key.size[1], size = Step<T>::scratch_size(p, at);
    parallel_tasks(heads, p.next_sums.numel(), p.threads, [&](std::int64_t head, std::int64_t thread) {
      Step<T>(p, at, head, p.scratch.as<Acc<T>>() + thread * size).run();
    });
  });
}

}  // namespace qvl::cpu
