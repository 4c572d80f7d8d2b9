// Linear attention, backward: what one thread does with one sequence and KV head. linear_attention_backward.cpp has the
// equations and the order of the tasks.
#pragma once

#include "linear_attention.h"

namespace qvl::cpu {

// Scratch of one thread, in elements of the compute type.
struct GradientLayout {
  LinearSizes sizes;
  std::int64_t made;  // width of a gradient row in panels
  std::int64_t strips, query, key, key_panels, query_values, key_values, value_panels, grad_panels, weights,
      grad_weights, grad_phi, grad_value, grad_row, query_shift, key_shift, prefix, local, running, state_panels, size;

  GradientLayout(const LinearAttentionParams& p, int panel) : sizes(p, panel), made(round_up(sizes.dim, panel)) {
    Pieces pieces;
    strips = pieces.take(Features<float>::strips_size(sizes));
    query = pieces.take(kChunk * sizes.width);
    key = pieces.take(kChunk * sizes.width);
    key_panels = pieces.take(p.causal ? kChunk * sizes.width : 0);
    query_values = pieces.take(kChunk * kValueRow);
    key_values = pieces.take(kChunk * kValueRow);
    value_panels = pieces.take(kChunk * (sizes.dim_v + 1));
    grad_panels = pieces.take(kChunk * sizes.columns);
    weights = pieces.take(kChunk * kChunk);
    grad_weights = pieces.take(kChunk * kChunk);
    grad_phi = pieces.take(kChunk * sizes.width);
    grad_value = pieces.take(kChunk * sizes.columns);
    grad_row = pieces.take(kChunk * made);
    query_shift = pieces.take(kChunk);
    key_shift = pieces.take(kChunk);
    prefix = pieces.take(sizes.state);
    local = pieces.take(sizes.state);
    running = pieces.take(sizes.state);
    state_panels = pieces.take(sizes.columns * sizes.width);
    size = pieces.size();
  }
};

// Rows of a gradient.
template <class U>
struct GradientRows {
  U* data;
  std::int64_t row, head;
};

template <class T>
class GradientPass {
 public:
  using A = Acc<T>;
  using V = Vec<A>;

  GradientPass(const LinearAttentionBackwardParams& p, std::int64_t sequence, std::int64_t kv_head,
               const GradientLayout& layout, const A* projection, const A* columns, A* scratch)
      : head_(linear_head<T>(p.forward, sequence, kv_head)),
        l_(layout),
        at_(layout.sizes),
        features_(at_, projection),
        columns_(columns),
        m_(scratch) {
    const bool packed = p.forward.offsets_q.data != nullptr;
    const std::int64_t q0 = packed ? p.forward.offsets_q.as<std::int64_t>()[sequence] : 0;
    const std::int64_t k0 = packed ? p.forward.offsets_k.as<std::int64_t>()[sequence] : 0;
    grad_out_ = rows_of<const T>(p.grad_out, head_.first_head, q0);
    grad_query_ = rows_of<T>(p.grad_query, head_.first_head, q0);
    grad_key_ = rows_of<T>(p.grad_key, kv_head, k0);
    grad_value_ = rows_of<T>(p.grad_value, kv_head, k0);
  }

  A* prefix() { return m_ + l_.prefix; }
  A* local() { return m_ + l_.local; }
  std::int64_t rows() const { return head_.rows(); }
  std::int64_t keys() const { return head_.len_k; }

  // local() = S of one segment's keys.
  void sum_keys(std::int64_t segment) {
    clear_state(local(), at_);
    for (std::int64_t k0 = segment * kSegment; k0 < end_of(segment); k0 += kChunk) add_keys(load_keys(k0));
  }

  // local() = R of the rows at one segment's keys, from the last chunk on.
  void sum_rows_at(std::int64_t segment) {
    clear_state(local(), at_);
    for_chunks_backward(segment, [&](std::int64_t k0, std::int64_t k1) {
      for_blocks(head_.row_at(k0), head_.row_at(k1), [&](std::int64_t first, std::int64_t count) {
        load_queries(first, count);
        add_queries(count);
      });
    });
  }

  // Bidirectional: gradients of the rows [first, end), all of which see `state`; local() = their R.
  void run_rows(std::int64_t first, std::int64_t end, const A* state) {
    clear_state(local(), at_);
    for_blocks(first, end, [&](std::int64_t begin, std::int64_t count) {
      load_queries(begin, count);
      write_queries(begin, count, state, nullptr);
      add_queries(count);
    });
  }

  // Bidirectional: gradients of the keys of a chunk, all of which are seen by the rows of `state`.
  void run_keys(std::int64_t k0, const A* state, const A* panels) {
    const std::int64_t count = load_keys(k0);
    start_keys(count, state, panels);
    write_keys(k0, count);
  }

  // Causal: gradients of the rows at one segment's keys, given the S of the segments before; local() = its own S.
  void sweep_rows(std::int64_t segment) {
    clear_state(local(), at_);
    if (segment == 0) clear_rows_before_the_keys();
    for (std::int64_t k0 = segment * kSegment; k0 < end_of(segment); k0 += kChunk) {
      const std::int64_t keys = load_keys(k0), begin = head_.row_at(k0), end = head_.row_at(k0 + keys);
      if (begin < end) {
        merge_states(prefix(), local(), m_ + l_.running, at_);
        transpose_values(keys);
      }
      for_blocks(begin, end, [&](std::int64_t first, std::int64_t count) {
        std::int64_t seen[kChunk / kStrip];
        load_queries(first, count);
        meet(first, count, {k0, k0 + keys}, false, seen);
        write_queries(first, count, m_ + l_.running, seen);
      });
      add_keys(keys);
    }
  }

  // Causal: gradients of one segment's keys, given the R of the segments after; local() = its own R.
  void sweep_keys(std::int64_t segment) {
    clear_state(local(), at_);
    for_chunks_backward(segment, [&](std::int64_t k0, std::int64_t k1) {
      const std::int64_t keys = load_keys(k0);
      merge_states(prefix(), local(), m_ + l_.running, at_);
      transpose_panels(m_ + l_.running, at_.rows, at_.dim_v, at_, m_ + l_.state_panels);
      start_keys(keys, m_ + l_.running, m_ + l_.state_panels);
      transpose_values(keys);
      transpose_panels(m_ + l_.key, kChunk, keys, at_, m_ + l_.key_panels);
      for_blocks(head_.row_at(k0), head_.row_at(k1), [&](std::int64_t first, std::int64_t count) {
        std::int64_t seen[kChunk / kStrip];
        load_queries(first, count);
        meet(first, count, {k0, k1}, true, seen);
        for (std::int64_t i = 0; i < count; ++i)
          to_panels(m_ + l_.query_values + i * kValueRow, at_.dim_v, i, kChunk, m_ + l_.grad_panels);
        add_to_keys(m_ + l_.grad_weights, m_ + l_.query, at_.width, count, keys, seen, m_ + l_.grad_phi);
        add_to_keys(m_ + l_.weights, m_ + l_.grad_panels, at_.columns, count, keys, seen, m_ + l_.grad_value);
        add_queries(count);
      });
      write_keys(k0, keys);
    });
  }

 private:
  std::int64_t end_of(std::int64_t segment) const {
    return std::min<std::int64_t>((segment + 1) * kSegment, head_.len_k);
  }
  template <class U>
  GradientRows<U> rows_of(const TensorView& t, std::int64_t head, std::int64_t first) const {
    return {t.as<U>() + head_.batch * t.stride[0] + head * t.stride[1] + first * t.stride[2], t.stride[2], t.stride[1]};
  }
  template <class U>
  U* row_of(const GradientRows<U>& t, std::int64_t row) const {
    return t.data + row / head_.group * t.row + row % head_.group * t.head;
  }
  template <class Body>
  void for_chunks_backward(std::int64_t segment, const Body& body) const {
    const std::int64_t first = segment * kSegment, end = end_of(segment);
    for (std::int64_t c = (end - first + kChunk - 1) / kChunk - 1; c >= 0; --c)
      body(first + c * kChunk, std::min<std::int64_t>(first + (c + 1) * kChunk, end));
  }
  template <class Body>
  static void for_blocks(std::int64_t begin, std::int64_t end, const Body& body) {
    for (std::int64_t r = begin; r < end; r += kChunk) body(r, std::min<std::int64_t>(kChunk, end - r));
  }

  std::int64_t load_keys(std::int64_t k0) {
    const Range keys{k0, std::min<std::int64_t>(k0 + kChunk, head_.len_k)};
    qvl::cpu::load_keys(head_, at_, features_, keys, m_ + l_.strips, m_ + l_.key, m_ + l_.key_shift,
                        m_ + l_.key_values);
    return keys.end - keys.begin;
  }
  void add_keys(std::int64_t count) {
    add_rows(m_ + l_.key_values, m_ + l_.key_shift, m_ + l_.key, count, local(), at_);
  }
  void add_queries(std::int64_t count) {
    add_rows(m_ + l_.query_values, m_ + l_.query_shift, m_ + l_.query, count, local(), at_);
  }

  // What fills up the last panel is whatever the rows hold: no row sees these keys.
  void transpose_values(std::int64_t count) {
    pack_transposed(m_ + l_.key_values, kValueRow, round_up(count, kPanel<A>), at_.dim_v + 1, m_ + l_.value_panels);
  }

  // Features, g^ and -run of a block of rows; -inf for a row that saw no key, whose g^ is 0.
  void load_queries(std::int64_t first, std::int64_t count) {
    A grad[kMaxDim], out[kMaxDim];
    A* const shift = m_ + l_.query_shift;
    features_.run(
        count, [&](std::int64_t i) { return head_.query_of(first + i); }, false, m_ + l_.strips, m_ + l_.query, shift);
    for (std::int64_t i = 0; i < count; ++i) {
      const std::int64_t row = first + i, query = row / head_.group, of_group = row % head_.group;
      const A total = head_.normalizer[of_group * head_.normalizer_head + query];
      const A run = head_.normalizer_top[of_group * head_.normalizer_head + query];
      A* const to = m_ + l_.query_values + i * kValueRow;
      std::fill_n(to, at_.rows, A(0));
      shift[i] = kNoKey<A>;
      if (std::abs(total) < std::numeric_limits<A>::min() || run == kNoKey<A>) continue;
      shift[i] = -run;
      widen(static_cast<const T*>(row_of(grad_out_, row)), at_.dim_v, at_.dim_v, grad);
      widen(static_cast<const T*>(head_.out + query * head_.out_row + of_group * head_.out_head), at_.dim_v, at_.dim_v,
            out);
      A delta = 0;
      for (std::int64_t c = 0; c < at_.dim_v; ++c) {
        to[c] = grad[c] / total;
        delta += to[c] * out[c];
      }
      to[at_.dim_v] = -delta;
    }
  }

  // For each row of a block and each key that it sees d a = g^ . v^ and, if asked for, a = phi . phi, both times
  // 2^(shift - run); zeros up to whole strips of keys.
  void meet(std::int64_t first, std::int64_t count, Range keys, bool with_weights, std::int64_t* seen) {
    A *weights = m_ + l_.weights, *grads = m_ + l_.grad_weights;
    Factors<A> factors(m_ + l_.key_shift, keys.end - keys.begin);
    for (std::int64_t s = 0; s * kStrip < count; ++s) {
      const std::int64_t last = std::min<std::int64_t>((s + 1) * kStrip, count) - 1;
      seen[s] = position(first + last) - keys.begin + 1;
      for (std::int64_t j = 0; j < seen[s]; j += kPanel<A>) {
        Tile<A> acc;
        clear_tile<A>(acc);
        multiply_add<kValueRow, 1>(m_ + l_.query_values + s * kStrip * kValueRow,
                                   m_ + l_.value_panels + j * (at_.dim_v + 1), at_.dim_v + 1, acc);
        store_tile(grads + s * kStrip * kChunk + j, kChunk, acc);
        if (!with_weights) continue;
        score_features(m_ + l_.query + s * kStrip * kPanel<A>, m_ + l_.key_panels + j * at_.width, at_,
                       weights + s * kStrip * kChunk + j, kChunk);
      }
      for (std::int64_t i = s * kStrip; i <= last; ++i) {
        const std::int64_t own = position(first + i) - keys.begin + 1;
        const A run = -m_[l_.query_shift + i];
        const A* const factor = run == -kNoKey<A> ? nullptr : factors.at(run);
        for (A* row : {grads + i * kChunk, weights + i * kChunk}) {
          if (row == weights + i * kChunk && !with_weights) continue;
          std::int64_t j = 0;
          if (factor != nullptr)
            for (; j < own; ++j) row[j] *= factor[j];
          std::fill(row + j, row + round_up(seen[s], kStrip), A(0));
        }
      }
    }
  }

  // d x of a block of rows: from the state they see, and, with `seen`, from the chunk that they met.
  void write_queries(std::int64_t first, std::int64_t count, const A* state, const std::int64_t* seen) {
    const A top = top_of(state, at_);
    A by[kChunk];
    for (std::int64_t i = 0; i < round_up(count, kStrip); ++i) {
      const A shift = m_[l_.query_shift + std::min(i, count - 1)];
      by[i] = shift == kNoKey<A> ? A(0) : power(top, -shift);
    }
    for (std::int64_t p = 0; p < at_.panels; ++p)
      for (std::int64_t s = 0; s * kStrip < count; ++s)
        add_queries(s, p, top == kNoKey<A> ? nullptr : state, by + s * kStrip, seen == nullptr ? 0 : seen[s]);
    through_features(m_ + l_.query, count);
    for (std::int64_t i = 0; i < count; ++i)
      write_row(gradient_panels() + i * kPanel<A>, at_.dim, row_of(grad_query_, first + i));
  }

  // d phi of strip s and panel p. A function of its own, as score_features.
  [[gnu::noinline]] void add_queries(std::int64_t s, std::int64_t p, const A* state, const A* by, std::int64_t seen) {
    Tile<A> acc;
    clear_tile<A>(acc);
    if (state != nullptr) {
      multiply_add<kValueRow, 1>(m_ + l_.query_values + s * kStrip * kValueRow, state + p * at_.rows * kPanel<A>,
                                 at_.dim_v + 1, acc);
      multiply_tile(by, acc);
    }
    multiply_add<kChunk, 1>(m_ + l_.grad_weights + s * kStrip * kChunk, m_ + l_.key + p * kChunk * kPanel<A>, seen,
                            acc);
    store_tile(m_ + l_.grad_phi + (p * kChunk + s * kStrip) * kPanel<A>, kPanel<A>, acc);
  }

  void clear_rows_before_the_keys() {
    for (std::int64_t r = 0; r < head_.row_at(0); ++r) clear_row(row_of(grad_query_, r), at_.dim);
  }

  // d phi and d v of a chunk of keys from the rows of `state`, all of which see them.
  void start_keys(std::int64_t count, const A* state, const A* panels) {
    const A top = top_of(state, at_);
    A by[kChunk];
    for (std::int64_t j = 0; j < round_up(count, kStrip); ++j)
      by[j] = j < count && top != kNoKey<A> ? power(m_[l_.key_shift + j], -top) : A(0);
    const auto put = [&](A* to, std::int64_t s, Tile<A>& acc) {
#pragma GCC unroll 6
      for (int r = 0; r < kStrip; ++r) {
        acc[r][0] = acc[r][0] * V(by[s * kStrip + r]);
        acc[r][1] = acc[r][1] * V(by[s * kStrip + r]);
      }
      store_tile(to, kPanel<A>, acc);
    };
    for (std::int64_t p = 0; p < at_.panels; ++p)
      for (std::int64_t s = 0; s * kStrip < count; ++s) {
        Tile<A> acc;
        clear_tile<A>(acc);
        multiply_add<kValueRow, 1>(m_ + l_.key_values + s * kStrip * kValueRow, state + p * at_.rows * kPanel<A>,
                                   at_.dim_v + 1, acc);
        put(m_ + l_.grad_phi + (p * kChunk + s * kStrip) * kPanel<A>, s, acc);
      }
    for (std::int64_t c = 0; c < at_.columns; c += kPanel<A>)
      for (std::int64_t s = 0; s * kStrip < count; ++s) {
        Tile<A> acc;
        clear_tile<A>(acc);
        multiply_features(m_ + l_.key + s * kStrip * kPanel<A>, panels + c * at_.width, at_, acc);
        put(m_ + l_.grad_value + c * kChunk + s * kStrip * kPanel<A>, s, acc);
      }
  }

  // sums += weights^T rows over the rows of a block that see the keys; `rows` and `sums` are panels of `width` columns.
  void add_to_keys(const A* weights, const A* rows, std::int64_t width, std::int64_t count, std::int64_t keys,
                   const std::int64_t* seen, A* sums) const {
    for (std::int64_t c = 0; c < width; c += kPanel<A>)
      for (std::int64_t j = 0; j < keys; j += kStrip) {
        std::int64_t from = 0;
        while (from * kStrip < count && seen[from] <= j) ++from;
        from *= kStrip;
        if (from >= count) continue;
        Tile<A> acc;
        load_tile(sums + c * kChunk + j * kPanel<A>, kPanel<A>, acc);
        multiply_add<1, kChunk>(weights + from * kChunk + j, rows + c * kChunk + from * kPanel<A>, count - from, acc);
        store_tile(sums + c * kChunk + j * kPanel<A>, kPanel<A>, acc);
      }
  }

  void write_keys(std::int64_t k0, std::int64_t count) {
    through_features(m_ + l_.key, count);
    const A by = static_cast<A>(-1 / std::sqrt(static_cast<double>(at_.dim)));
    A key[kMaxDim];
    for (std::int64_t j = 0; j < count; ++j) {
      T* const to = grad_key_.data + (k0 + j) * grad_key_.row;
      T* const to_value = grad_value_.data + (k0 + j) * grad_value_.row;
      if (head_.hidden(k0 + j)) {
        clear_row(to, at_.dim);
        clear_row(to_value, at_.dim_v);
        continue;
      }
      A* const row = gradient_panels() + j * kPanel<A>;
      if (at_.kind == FeatureKind::favor) {
        widen(head_.key + (k0 + j) * head_.key_row, at_.dim, at_.dim, key);
        const A norm = by * sum_of_row(m_ + l_.grad_phi + j * kPanel<A>);
        for (std::int64_t d = 0; d < at_.dim; ++d)
          row[d / kPanel<A> * kPanel<A> * kChunk + d % kPanel<A>] += norm * key[d];
      }
      write_row(row, at_.dim, to);
      write_row(m_ + l_.grad_value + j * kPanel<A>, at_.dim_v, to_value);
    }
  }

  // Panels of d phi to panels of d x, but for the norm's part.
  void through_features(const A* phi, std::int64_t count) {
    A* const grad = m_ + l_.grad_phi;
    if (at_.kind == FeatureKind::given) return;
    const bool favor = at_.kind == FeatureKind::favor;
    const V one(A(1));
    for (std::int64_t p = 0; p < at_.panels; ++p)
      for (std::int64_t i = p * kChunk * kPanel<A>; i < (p * kChunk + count) * kPanel<A>; i += V::N) {
        const V x = load(phi + i);
        store(grad + i, load(grad + i) * (favor ? x : min(one, x)));  // elu: x > 0 has phi > 1 and slope 1, else phi
      }
    if (!favor) return;
    for (std::int64_t c = 0; c < l_.made; c += kPanel<A>)
      for (std::int64_t s = 0; s * kStrip < count; ++s)
        score_features(grad + s * kStrip * kPanel<A>, columns_ + c * at_.width, at_,
                       m_ + l_.grad_row + c * kChunk + s * kStrip * kPanel<A>, kPanel<A>);
  }
  A* gradient_panels() { return m_ + (at_.kind == FeatureKind::favor ? l_.grad_row : l_.grad_phi); }

  A sum_of_row(const A* row) const {
    V total = V::zero();
    for (std::int64_t p = 0; p < at_.panels; ++p) {
      const A* const x = row + p * kChunk * kPanel<A>;
      total = total + load(x) + load(x + V::N);
    }
    return sum(total);
  }

  static void write_row(const A* from, std::int64_t dim, T* to) {
    for (std::int64_t c = 0; c < dim; c += V::N) {
      const V x = load(from + c / kPanel<A> * kPanel<A> * kChunk + c % kPanel<A>);
      if (c + V::N <= dim)
        store(to + c, x);
      else
        store(to + c, x, static_cast<int>(dim - c));
    }
  }
  static void clear_row(T* to, std::int64_t dim) { std::fill_n(to, dim, T{}); }

  std::int64_t position(std::int64_t row) const { return head_.offset + row / head_.group; }

  const LinearHead<T> head_;
  const GradientLayout& l_;
  const LinearSizes& at_;
  const Features<T> features_;
  const A* const columns_;
  A* const m_;
  GradientRows<const T> grad_out_{};
  GradientRows<T> grad_query_{}, grad_key_{}, grad_value_{};
};

}  // namespace qvl::cpu
