// Linear attention, forward: features inside, a chunk of tokens at a time; a state of M x Dv instead of scores.
//
// Regime: arithmetic. A key costs 2 M D FLOPs for its features and 2 M Dv for the state, a query row the same for its
// features and for reading the state; with a causal mask a row also meets the keys of its own chunk, kChunk / 2 (M +
// Dv) more FMAs on average (a fifth for M = 256 and D = 64).
//
//   chunk     kChunk = 96 keys and the rows at their positions, in blocks of 96: features 96 x M (96 KiB for M = 256),
//             values, and a state of M x Dv (128 KiB for Dv = 128), in L2; one panel of W, of the state or of the
//             transposed keys (at most 16 KiB) stays in L1 while the block's strips pass it
//   segment   kSegment = 8 chunks: their keys are summed into a local state of their own, and a chunk's rows read
//             prefix + local, the prefix being the segments before. One thread after the other or all segments at
//             once, the sums are the same: results do not depend on the threads
//   bytes     q, k, v and out once, a state once a chunk; features of a longer sequence are never in memory
//
// Bidirectional: all segments' states at once, summed in order, then all blocks of rows against the one state.
// Causal: heads one by one where they fill the threads; else the segments' states at once, their prefixes, and then all
// segments' rows at once, which computes the keys' features twice.
// No look-ahead: row i is relative to the largest shift up to its own key, so a later key does not move its rounding.
//
// Source: Katharopoulos et al., 2020, section 3; chunks: Hua et al., Transformer quality in linear time, 2022, section
// 3; FAVOR+: Choromanski et al., 2021, section 3.

#include "linear_attention.h"

#include "dispatch.h"
#include "parallel.h"

namespace qvl::cpu {
namespace {

// Scratch of one thread, in elements of the compute type.
struct Layout {
  LinearSizes sizes;
  std::int64_t strips, query, key, key_panels, values, value_panels, state_panels, out, scores, shift, prefix, local,
      running, size;

  Layout(const LinearAttentionParams& p, int panel) : sizes(p, panel) {
    Pieces pieces;
    strips = pieces.take(kGroup * kStrip * sizes.dim + kStripSlack);
    query = pieces.take(kChunk * sizes.width);
    key = pieces.take(kChunk * sizes.width);
    key_panels = pieces.take(p.causal ? kChunk * sizes.width : 0);
    values = pieces.take(kChunk * kValueRow);
    value_panels = pieces.take(p.causal ? kChunk * sizes.columns : 0);
    state_panels = pieces.take(sizes.columns * sizes.width);
    out = pieces.take(kChunk * sizes.columns);
    scores = pieces.take(kChunk * kChunk);
    shift = pieces.take(3 * kChunk);
    prefix = pieces.take(sizes.state);
    local = pieces.take(sizes.state);
    running = pieces.take(sizes.state);
    size = pieces.size();
  }
};

// What all threads share: W, a state for every segment, and for the bidirectional form a transposed state for every
// head.
struct Shared {
  std::int64_t heads, segments, projection, states, panels, size;

  Shared(const LinearAttentionParams& p, const LinearSizes& at) {
    Pieces pieces;
    heads = linear_sequences(p) * p.key.size[1];
    segments = most_segments(p);
    projection = pieces.take(at.projection);
    states = pieces.take(p.causal && heads_fill_the_threads(p) ? 0 : heads * segments * at.state);
    panels = pieces.take(p.causal ? 0 : heads * at.columns * at.width);
    size = pieces.size();
  }
};

template <class T>
class Pass {
 public:
  using A = Acc<T>;
  using V = Vec<A>;

  Pass(const LinearHead<T>& head, const Layout& layout, const A* projection, A* scratch)
      : head_(head), l_(layout), at_(layout.sizes), features_(at_, projection), m_(scratch) {}

  A* prefix() { return m_ + l_.prefix; }
  A* local() { return m_ + l_.local; }

  // The state of one segment's keys alone, in local().
  void sum_segment(std::int64_t segment) {
    clear_state(local(), at_);
    for (std::int64_t k0 = segment * kSegment; k0 < end_of(segment); k0 += kChunk) {
      const std::int64_t count = std::min<std::int64_t>(kChunk, end_of(segment) - k0);
      load_keys(k0, count);
      add_keys(count);
    }
  }

  // The rows at one segment's keys, given the prefix; local() becomes the segment's own state. The first segment has
  // the rows before the first key too.
  void run_segment(std::int64_t segment) {
    clear_state(local(), at_);
    const std::int64_t first_key = segment * kSegment;
    if (segment == 0 && head_.offset < 0) {
      read_running(prefix());
      const std::int64_t rows = head_.row_at(0);
      for (std::int64_t r = 0; r < rows; r += kChunk)
        run_block(r, std::min<std::int64_t>(kChunk, rows - r), m_ + l_.state_panels, m_ + l_.running, 0, 0);
    }
    for (std::int64_t k0 = first_key; k0 < end_of(segment); k0 += kChunk) {
      const std::int64_t count = std::min<std::int64_t>(kChunk, end_of(segment) - k0);
      load_keys(k0, count);
      const std::int64_t rows = head_.row_at(k0 + count);
      if (head_.row_at(k0) < rows) prepare_chunk(count);
      for (std::int64_t r = head_.row_at(k0); r < rows; r += kChunk)
        run_block(r, std::min<std::int64_t>(kChunk, rows - r), m_ + l_.state_panels, m_ + l_.running, k0, count);
      add_keys(count);
    }
  }

  // out of `count` rows from `first`: they see the state (`panels` is its transpose), and of the keys from k0, `keys`
  // many and prepared, those up to their own position.
  void run_block(std::int64_t first, std::int64_t count, const A* panels, const A* state, std::int64_t k0,
                 std::int64_t keys) {
    A *phi = m_ + l_.query, *unused = m_ + l_.shift + 2 * kChunk;
    features_.run(count, [&](std::int64_t i) { return head_.query_of(first + i); }, false, m_ + l_.strips, phi, unused);
    A kept[kChunk], total[kChunk], run[kChunk];
    std::int64_t seen[kChunk / kStrip];
    const A top = top_of(state, at_);
    for (std::int64_t i = 0; i < round_up(count, kStrip); ++i) {
      run[i] = top, kept[i] = 1, total[i] = 0;
      if (top != kNoKey<A> && i < count) total[i] = feature_dot(phi, i, state, at_);
    }
    std::fill_n(seen, kChunk / kStrip, 0);
    if (keys > 0) meet_keys(first, count, k0, keys, seen, kept, total, run);
    for (std::int64_t c = 0; c < at_.columns; c += kPanel<A>)
      read(count, top == kNoKey<A> ? nullptr : panels + c * at_.width, kept, seen, c);
    for (std::int64_t i = 0; i < count; ++i) write(first + i, i, total[i], run[i]);
  }

 private:
  std::int64_t end_of(std::int64_t segment) const {
    return std::min<std::int64_t>((segment + 1) * kSegment, head_.len_k);
  }

  void load_keys(std::int64_t k0, std::int64_t count) {
    qvl::cpu::load_keys(head_, at_, features_, {k0, k0 + count}, m_ + l_.strips, m_ + l_.key, m_ + l_.shift,
                        m_ + l_.values);
  }
  void add_keys(std::int64_t count) { add_rows(m_ + l_.values, m_ + l_.shift, m_ + l_.key, count, local(), at_); }

  // What the rows of a chunk read: prefix + local, its transpose, the keys transposed, and the values as panels.
  void prepare_chunk(std::int64_t count) {
    merge_states(prefix(), local(), m_ + l_.running, at_);
    transpose_panels(m_ + l_.running, at_.rows, at_.dim_v, at_, m_ + l_.state_panels);
    transpose_panels(m_ + l_.key, kChunk, count, at_, m_ + l_.key_panels);
    for (std::int64_t i = 0; i < count; ++i)
      to_panels(m_ + l_.values + i * kValueRow, at_.dim_v, i, kChunk, m_ + l_.value_panels);
  }

  void read_running(const A* state) {
    std::copy_n(state, at_.state, m_ + l_.running);
    transpose_panels(m_ + l_.running, at_.rows, at_.dim_v, at_, m_ + l_.state_panels);
  }

  // The sums of `count` rows in the panel of columns c: `kept` times the state's part (`panel`, null for none), and the
  // part of the keys `seen` by each strip. A function of its own, as score_features.
  [[gnu::noinline]] void read(std::int64_t count, const A* panel, const A* kept, const std::int64_t* seen,
                              std::int64_t c) const {
    const A *phi = m_ + l_.query, *scores = m_ + l_.scores;
    A* out = m_ + l_.out + c * kChunk;
    for (std::int64_t s = 0; s * kStrip < count; ++s) {
      Tile<A> acc;
      clear_tile<A>(acc);
      if (panel != nullptr) {
        multiply_features(phi + s * kStrip * kPanel<A>, panel, at_, acc);
        multiply_tile(kept + s * kStrip, acc);
      }
      multiply_add<kChunk, 1>(scores + s * kStrip * kChunk, m_ + l_.value_panels + c * kChunk, seen[s], acc);
      store_tile(out + s * kStrip * kPanel<A>, kPanel<A>, acc);
    }
  }

  // scores = phi(q) . phi(k) 2^(shift - run) of the keys that each row sees, their sum in `total`, and what the
  // state's part shrinks by in `kept`. run is the largest shift that a row sees.
  void meet_keys(std::int64_t first, std::int64_t count, std::int64_t k0, std::int64_t keys, std::int64_t* seen,
                 A* kept, A* total, A* run) {
    A *shift = m_ + l_.shift, *runs = shift + kChunk;
    const A top = run[0];
    for (std::int64_t j = 0; j < keys; ++j) runs[j] = std::max(j > 0 ? runs[j - 1] : top, shift[j]);
    Factors<A> factors(shift, keys);
    for (std::int64_t s = 0; s * kStrip < count; ++s) {
      const std::int64_t last = std::min<std::int64_t>((s + 1) * kStrip, count) - 1;
      seen[s] = position(first + last) - k0 + 1;
      for (std::int64_t j = 0; j < seen[s]; j += kPanel<A>) {
        score_features(m_ + l_.query + s * kStrip * kPanel<A>, m_ + l_.key_panels + j * at_.width, at_,
                       m_ + l_.scores + s * kStrip * kChunk + j, kChunk);
      }
      for (std::int64_t i = s * kStrip; i < (s + 1) * kStrip; ++i) {
        A* const row = m_ + l_.scores + i * kChunk;
        const std::int64_t own = i < count ? position(first + i) - k0 + 1 : 0;
        if (own > 0) run[i] = runs[own - 1];
        kept[i] = power(top, run[i]);
        total[i] *= kept[i];
        if (run[i] == kNoKey<A>)
          std::fill_n(row, own, A(0));
        else
          total[i] += weigh(row, own, factors.at(run[i]));
        std::fill(row + own, row + seen[s], A(0));
      }
    }
  }

  // row[j] *= factors[j], and the sum.
  static A weigh(A* row, std::int64_t count, const A* factors) {
    V added = V::zero();
    std::int64_t j = 0;
    for (; j + V::N <= count; j += V::N) {
      const V weight = load(row + j) * load(factors + j);
      store(row + j, weight);
      added = added + weight;
    }
    A sum_of_rest = 0;
    for (; j < count; ++j) sum_of_rest += row[j] *= factors[j];
    return sum(added) + sum_of_rest;
  }

  std::int64_t position(std::int64_t row) const { return head_.offset + row / head_.group; }

  void write(std::int64_t row, std::int64_t i, A total, A run) {
    const A inverse = std::abs(total) < std::numeric_limits<A>::min() ? A(0) : 1 / total;
    const std::int64_t query = row / head_.group, of_group = row % head_.group;
    T* const to = head_.out + query * head_.out_row + of_group * head_.out_head;
    const A* const from = m_ + l_.out + i * kPanel<A>;
    for (std::int64_t c = 0; c < at_.dim_v; c += V::N) {
      const A* const part = from + c / kPanel<A> * kPanel<A> * kChunk + c % kPanel<A>;
      const std::int64_t n = std::min<std::int64_t>(V::N, at_.dim_v - c);
      if (n == V::N)
        store(to + c, load(part) * V(inverse));
      else
        store(to + c, load(part) * V(inverse), static_cast<int>(n));
    }
    if (head_.normalizer == nullptr) return;
    head_.normalizer[of_group * head_.normalizer_head + query] = total;
    head_.normalizer_top[of_group * head_.normalizer_head + query] = run;
  }

  const LinearHead<T> head_;
  const Layout& l_;
  const LinearSizes& at_;
  const Features<T> features_;
  A* const m_;
};

template <class T>
class Forward {
 public:
  using A = Acc<T>;

  explicit Forward(const LinearAttentionParams& p)
      : p_(p), l_(p, kPanel<A>), shared_(p, l_.sizes), m_(p.scratch.as<A>()), kv_heads_(p.key.size[1]) {
    work_ = (p.query.numel() + p.key.numel()) * l_.sizes.features;
  }

  void run() {
    Features<T>::pack_projection(p_, l_.sizes, m_ + shared_.projection);
    if (p_.causal && heads_fill_the_threads(p_)) return each_head_alone();
    sum_segments();
    add_up_segments();
    p_.causal ? run_segments() : run_blocks();
  }

 private:
  Pass<T> worker(std::int64_t head, std::int64_t worker) {
    return Pass<T>(linear_head<T>(p_, head / kv_heads_, head % kv_heads_), l_, m_ + shared_.projection,
                   m_ + shared_.size + worker * l_.size);
  }
  A* state(std::int64_t head, std::int64_t segment) {
    return m_ + shared_.states + (head * shared_.segments + segment) * l_.sizes.state;
  }
  std::int64_t segments_of(std::int64_t head) const {
    const std::int64_t keys = linear_head<T>(p_, head / kv_heads_, head % kv_heads_).len_k;
    return std::max<std::int64_t>(1, (keys + kSegment - 1) / kSegment);
  }

  void each_head_alone() {
    parallel_tasks(shared_.heads, work_, p_.threads, [&](std::int64_t head, std::int64_t thread) {
      Pass<T> run = worker(head, thread);
      read_state(p_, head, l_.sizes, run.prefix());
      for (std::int64_t s = 0; s < segments_of(head); ++s) {
        run.run_segment(s);
        merge_states(run.prefix(), run.local(), run.prefix(), l_.sizes);
      }
      write_state(p_, head, l_.sizes, run.prefix());
    });
  }

  void sum_segments() {
    parallel_tasks(shared_.heads * shared_.segments, work_, p_.threads, [&](std::int64_t task, std::int64_t thread) {
      const std::int64_t head = task / shared_.segments, segment = task % shared_.segments;
      if (segment >= segments_of(head)) return;
      Pass<T> run = worker(head, thread);
      run.sum_segment(segment);
      std::copy_n(run.local(), l_.sizes.state, state(head, segment));
    });
  }

  // Each segment's state becomes the sum of what is before it, or, bidirectional, the first becomes the sum of all.
  void add_up_segments() {
    const LinearSizes& at = l_.sizes;
    parallel_tasks(shared_.heads, work_, p_.threads, [&](std::int64_t head, std::int64_t thread) {
      Pass<T> run = worker(head, thread);
      read_state(p_, head, at, run.prefix());
      for (std::int64_t s = 0; s < segments_of(head); ++s) {
        std::copy_n(run.prefix(), at.state, run.local());
        merge_states(run.prefix(), state(head, s), run.prefix(), at);
        if (p_.causal) std::copy_n(run.local(), at.state, state(head, s));
      }
      write_state(p_, head, at, run.prefix());
      if (p_.causal) return;
      std::copy_n(run.prefix(), at.state, state(head, 0));
      transpose_panels(run.prefix(), at.rows, at.dim_v, at, m_ + shared_.panels + head * at.columns * at.width);
    });
  }

  void run_segments() {
    parallel_tasks(shared_.heads * shared_.segments, work_, p_.threads, [&](std::int64_t task, std::int64_t thread) {
      const std::int64_t head = task / shared_.segments, segment = task % shared_.segments;
      if (segment >= segments_of(head)) return;
      Pass<T> run = worker(head, thread);
      std::copy_n(state(head, segment), l_.sizes.state, run.prefix());
      run.run_segment(segment);
    });
  }

  void run_blocks() {
    const LinearSizes& at = l_.sizes;
    std::int64_t blocks = 0;
    for (std::int64_t head = 0; head < shared_.heads; head += kv_heads_)
      blocks = std::max(blocks, (linear_head<T>(p_, head / kv_heads_, 0).rows() + kChunk - 1) / kChunk);
    parallel_tasks(shared_.heads * blocks, work_, p_.threads, [&](std::int64_t task, std::int64_t thread) {
      const std::int64_t head = task / blocks, first = task % blocks * kChunk;
      const std::int64_t rows = linear_head<T>(p_, head / kv_heads_, head % kv_heads_).rows();
      if (first >= rows) return;
      worker(head, thread)
          .run_block(first, std::min<std::int64_t>(kChunk, rows - first),
                     m_ + shared_.panels + head * at.columns * at.width, state(head, 0), 0, 0);
    });
  }

  const LinearAttentionParams& p_;
  const Layout l_;
  const Shared shared_;
  A* const m_;
  const std::int64_t kv_heads_;
  std::int64_t work_;
};

}  // namespace

std::int64_t linear_attention_scratch_bytes(const LinearAttentionParams& p) {
  if (is_linear_decode(p)) return linear_attention_decode_scratch_bytes(p);
  const bool wide = p.query.dtype == DType::f64;
  const Layout layout(p, wide ? kPanel<double> : kPanel<float>);
  return (Shared(p, layout.sizes).size + p.threads * layout.size) * (wide ? 8 : 4);
}

void linear_attention(const LinearAttentionParams& p) {
  if (is_linear_decode(p)) return linear_attention_decode(p);
  with_storage_type(p.query.dtype, [&](auto t) { Forward<decltype(t)>(p).run(); });
}

}  // namespace qvl::cpu
