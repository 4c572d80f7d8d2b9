// Linear attention, backward: features recomputed, two sweeps with a state each.
//
// With a_ij = phi_i . phi_j, its row sum n_i and delta_i = dO_i . O_i, let v^_j = (v_j, 1), g^_i = (dO_i, -delta_i) /
// n_i:
//
//   d a_ij = g^_i . v^_j                     S = sum over keys seen of v^_j phi_j^T
//   d phi_i = S^T g^_i                       R = sum over rows that see the key of g^_i phi_i^T
//   d phi_j = R^T v^_j, d v_j = R phi_j (its first Dv)
//   favor: d x = D^(-1/4) W^T (phi d phi) - x / sqrt(D) sum of phi d phi, the second term 0 for queries
//
// Regime: arithmetic. Per key and row 4 to 6 products of 2 M D FLOPs each. S goes with the keys, R against them; in the
// causal form each chunk adds its own masked products, as in the forward (linear_attention.cpp: chunks, segments and
// threads). A row's features are relative to its largest shift `run` in S and to -run in R, so that both only rise.
// Every gradient row is summed by one task and written once, in the storage type: no order depends on the threads.
//
// Source: Katharopoulos et al., 2020, section 3.3.1.

#include "dispatch.h"
#include "linear_attention_gradients.h"
#include "parallel.h"

namespace qvl::cpu {
namespace {

// What all threads share: W as panels of rows and of columns, the segments' sums S and R, and for the bidirectional
// form a transposed R for every head.
struct Shared {
  std::int64_t heads, segments, row_segments, projection, columns, keys, rows, panels, size;

  Shared(const LinearAttentionParams& p, const GradientLayout& l) {
    const LinearSizes& at = l.sizes;
    Pieces pieces;
    heads = linear_sequences(p) * p.key.size[1];
    segments = most_segments(p);
    const std::int64_t most_rows = p.query.size[2] * (p.query.size[1] / p.key.size[1]);
    row_segments = p.causal ? segments : std::max<std::int64_t>(1, (most_rows + kSegment - 1) / kSegment);
    const bool alone = p.causal && heads_fill_the_threads(p);
    projection = pieces.take(at.projection);
    columns = pieces.take(at.kind == FeatureKind::favor ? l.made * at.width : 0);
    keys = pieces.take(alone ? 0 : heads * segments * at.state);
    rows = pieces.take(alone ? 0 : heads * row_segments * at.state);
    panels = pieces.take(p.causal ? 0 : heads * at.columns * at.width);
    size = pieces.size();
  }
};

template <class T>
class Backward {
 public:
  using A = Acc<T>;

  explicit Backward(const LinearAttentionBackwardParams& p)
      : p_(p),
        f_(p.forward),
        l_(f_, kPanel<A>),
        at_(l_.sizes),
        shared_(f_, l_),
        m_(f_.scratch.as<A>()),
        kv_heads_(f_.key.size[1]),
        work_((f_.query.numel() + f_.key.numel()) * at_.features) {}

  void run() {
    pack();
    if (f_.causal && heads_fill_the_threads(f_)) return each_head_alone();
    tasks(shared_.segments, [&](GradientPass<T>& pass, std::int64_t head, std::int64_t s) {
      if (s * kSegment >= pass.keys()) return clear_state(keys_of(head, s), at_);
      pass.sum_keys(s);
      std::copy_n(pass.local(), at_.state, keys_of(head, s));
    });
    tasks(1, [&](GradientPass<T>& pass, std::int64_t head, std::int64_t) {
      add_up(pass, head, shared_.keys, shared_.segments, 1);
    });
    f_.causal ? run_causal() : run_bidirectional();
  }

 private:
  // body(pass, head, i) for every head and i < count, in parallel.
  template <class Body>
  void tasks(std::int64_t count, const Body& body) {
    parallel_tasks(shared_.heads * count, work_, f_.threads, [&](std::int64_t task, std::int64_t thread) {
      const std::int64_t head = task / count;
      GradientPass<T> pass(p_, head / kv_heads_, head % kv_heads_, l_, m_ + shared_.projection, m_ + shared_.columns,
                           m_ + shared_.size + thread * l_.size);
      body(pass, head, task % count);
    });
  }
  A* keys_of(std::int64_t head, std::int64_t segment) {
    return m_ + shared_.keys + (head * shared_.segments + segment) * at_.state;
  }
  A* rows_of(std::int64_t head, std::int64_t segment) {
    return m_ + shared_.rows + (head * shared_.row_segments + segment) * at_.state;
  }

  // W as panels of rows, for the features, and by columns with D^(-1/4), for their gradients.
  void pack() {
    Features<T>::pack_projection(f_, at_, m_ + shared_.projection);
    if (at_.kind != FeatureKind::favor) return;
    const A scale = static_cast<A>(1 / std::sqrt(std::sqrt(static_cast<double>(at_.dim))));
    for (std::int64_t i = 0; i < at_.features; ++i)
      to_panels(f_.projection.as<A>() + i * at_.dim, at_.dim, i, at_.width, m_ + shared_.columns, scale);
  }

  // Causal: each segment's sums become those of the segments before it, in direction `step`; else the first becomes
  // the sum of all.
  void add_up(GradientPass<T>& pass, std::int64_t head, std::int64_t states, std::int64_t count, std::int64_t step) {
    clear_state(pass.prefix(), at_);
    for (std::int64_t i = 0; i < count; ++i) {
      A* const own = m_ + states + (head * count + (step > 0 ? i : count - 1 - i)) * at_.state;
      std::copy_n(pass.prefix(), at_.state, pass.local());
      merge_states(pass.prefix(), own, pass.prefix(), at_);
      if (f_.causal) std::copy_n(pass.local(), at_.state, own);
    }
    if (!f_.causal) std::copy_n(pass.prefix(), at_.state, m_ + states + head * count * at_.state);
  }

  void each_head_alone() {
    tasks(1, [&](GradientPass<T>& pass, std::int64_t, std::int64_t) {
      const std::int64_t segments = std::max<std::int64_t>(1, (pass.keys() + kSegment - 1) / kSegment);
      clear_state(pass.prefix(), at_);
      for (std::int64_t s = 0; s < segments; ++s) {
        pass.sweep_rows(s);
        merge_states(pass.prefix(), pass.local(), pass.prefix(), at_);
      }
      clear_state(pass.prefix(), at_);
      for (std::int64_t s = segments - 1; s >= 0; --s) {
        pass.sweep_keys(s);
        merge_states(pass.prefix(), pass.local(), pass.prefix(), at_);
      }
    });
  }

  void run_causal() {
    tasks(shared_.segments, [&](GradientPass<T>& pass, std::int64_t head, std::int64_t s) {
      pass.sum_rows_at(s);
      std::copy_n(pass.local(), at_.state, rows_of(head, s));
    });
    tasks(1, [&](GradientPass<T>& pass, std::int64_t head, std::int64_t) {
      add_up(pass, head, shared_.rows, shared_.row_segments, -1);
    });
    tasks(2 * shared_.segments, [&](GradientPass<T>& pass, std::int64_t head, std::int64_t i) {
      const std::int64_t s = i / 2;
      std::copy_n(i % 2 ? keys_of(head, s) : rows_of(head, s), at_.state, pass.prefix());
      i % 2 ? pass.sweep_rows(s) : pass.sweep_keys(s);
    });
  }

  void run_bidirectional() {
    tasks(shared_.row_segments, [&](GradientPass<T>& pass, std::int64_t head, std::int64_t s) {
      const std::int64_t first = std::min(s * kSegment, pass.rows());
      pass.run_rows(first, std::min<std::int64_t>(first + kSegment, pass.rows()), keys_of(head, 0));
      std::copy_n(pass.local(), at_.state, rows_of(head, s));
    });
    tasks(1, [&](GradientPass<T>& pass, std::int64_t head, std::int64_t) {
      add_up(pass, head, shared_.rows, shared_.row_segments, 1);
      transpose_panels(rows_of(head, 0), at_.rows, at_.dim_v, at_, panels_of(head));
    });
    const std::int64_t chunks = shared_.segments * (kSegment / kChunk);
    tasks(chunks, [&](GradientPass<T>& pass, std::int64_t head, std::int64_t i) {
      if (i * kChunk < pass.keys()) pass.run_keys(i * kChunk, rows_of(head, 0), panels_of(head));
    });
  }
  A* panels_of(std::int64_t head) { return m_ + shared_.panels + head * at_.columns * at_.width; }

  const LinearAttentionBackwardParams& p_;
  const LinearAttentionParams& f_;
  const GradientLayout l_;
  const LinearSizes& at_;
  const Shared shared_;
  A* const m_;
  const std::int64_t kv_heads_, work_;
};

}  // namespace

std::int64_t linear_attention_backward_scratch_bytes(const LinearAttentionParams& p) {
  const bool wide = p.query.dtype == DType::f64;
  const GradientLayout layout(p, wide ? kPanel<double> : kPanel<float>);
  return (Shared(p, layout).size + p.threads * layout.size) * (wide ? 8 : 4);
}

void linear_attention_backward(const LinearAttentionBackwardParams& p) {
  with_storage_type(p.forward.query.dtype, [&](auto t) { Backward<decltype(t)>(p).run(); });
}

}  // namespace qvl::cpu
