// Attention over listed blocks, backward: the dense backward's five products (attention_gradients.h) for each listed
// pair of a block of queries and a cell of keys.
//
// Regime: arithmetic, 2 (3 D + 2 Dv) FLOPs for each query row and listed key. A pair is only 64 G rows by 64 keys, too
// little to pay for packing either side, so that a wave of heads is packed once and its gradients are summed packed:
//
//   wave    as many KV heads as kWaveBytes hold, at least one. A row takes 2 D + Dv elements (panels of Q and dO, dQ),
//           a key 3 D + 2 Dv (K and V transposed, panels of K, dK, dV): 1.5 and 2.5 KiB for D = 128 and fp32
//   pair    up to 11 strips (66 rows) by one cell of 64 keys: P and dS are 17 KiB each, in L1; the rows, 100 KiB, stay
//           in L2 for all cells of their chunk, whose 160 KiB each come from L3
//   out     at the end the sums are scaled and written in the storage type
//
// Order and threads as in attention_backward.cpp: step t pairs chunk i of the query blocks with chunk i - t of the key
// blocks; no two pairs of a step share a row or a key, so that there are no locks and every sum has one order.
//
// Source: Dao, FlashAttention-2, 2023, section 3.1, algorithm 2.

#include "attention_gradients.h"
#include "dispatch.h"
#include "parallel.h"
#include "sparse_attention.h"

namespace qvl::cpu {
namespace {

constexpr std::int64_t kWaveBytes = 48 << 20;
constexpr std::int64_t kMaxChunks = 8;
constexpr int kCell = 64;
constexpr int kStrips = (kCell + kStrip - 1) / kStrip;

// Scratch in elements of the compute type: of a KV head at work its query blocks, then its cells, and a part a thread.
struct Layout {
  std::int64_t dim, dim_v, columns, columns_v;  // D and Dv, and both rounded up to whole panels
  std::int64_t rows, cell, sums;                // of a query block in whole strips; keys of a cell, in whole strips
  std::int64_t blocks, cells;                   // query blocks of all sharings, and cells, of a KV head
  std::int64_t query, grad, grad_query, lse, delta, block_size;
  std::int64_t key_panels, value_panels, key, grad_key, grad_value, cell_size;
  std::int64_t scores, thread_size, wave;

  Layout(const SparseAttentionParams& p, std::int64_t bytes, int panel, std::int64_t scores_)
      : dim(p.attention.query.size[3]), dim_v(p.attention.value.size[3]), scores(scores_) {
    const Sharing sharing(p);
    columns = round_up(dim, panel), columns_v = round_up(dim_v, panel);
    rows = round_up(p.block * sharing.heads, kStrip), cell = cell_of(p), sums = round_up(cell, kStrip);
    blocks = sharing.count * query_blocks(p), cells = key_blocks(p) * (p.block / cell);
    std::int64_t at = 0;
    const auto take = [&](std::int64_t n) {
      const std::int64_t start = at;
      at += round_up(n, 16);
      return start;
    };
    query = take(rows * columns);
    grad = take(rows * columns_v);
    grad_query = take(rows * columns);
    lse = take(rows);
    delta = take(rows);
    block_size = std::exchange(at, 0);
    key_panels = take(cell * dim);
    value_panels = take(cell * dim_v);
    key = take(cell * columns);
    grad_key = take(sums * columns);
    grad_value = take(sums * columns_v);
    cell_size = std::exchange(at, 0);
    thread_size = 2 * round_up(scores, 16);
    const std::int64_t heads = p.attention.query.size[0] * p.attention.key.size[1];
    wave = std::clamp<std::int64_t>(kWaveBytes / std::max<std::int64_t>(head_size() * bytes, 1), 1,
                                    std::max<std::int64_t>(heads, 1));
  }
  std::int64_t head_size() const { return blocks * block_size + cells * cell_size; }
};

// One KV head at work: its packed rows and keys, and where they come from and go to.
template <class T>
class Work {
 public:
  using A = Acc<T>;
  using V = Vec<A>;
  using Tile = GradientTile<A, kCell, kStrips, false>;

  Work(const SparseAttentionBackwardParams& p, const Layout& at, std::int64_t kv_head, A* memory)
      : b_(p), p_(p.forward), at_(at), sharing_(p_), kv_head_(kv_head), m_(memory) {}

  // Of query block `index` of all sharings: rows beyond the last have an lse that makes all their probabilities zero.
  void pack_rows(std::int64_t index) const {
    constexpr A kNone = std::numeric_limits<A>::infinity();
    const Head<T> head = head_of_block(index);
    const Source<const T> from = of<const T>(b_.grad_out, head);
    const std::int64_t first = first_row(index), count = std::min(p_.block * head.group, head.rows() - first);
    A* const m = block_of(index);
    for (std::int64_t r = 0; r < at_.rows; ++r) {
      m[at_.lse + r] = kNone, m[at_.delta + r] = 0;
      if (r >= count) {
        clear_row(m + at_.query, r, at_.dim);
        clear_row(m + at_.grad, r, at_.dim_v);
        continue;
      }
      const std::int64_t position = (first + r) / head.group, of_group = (first + r) % head.group;
      const T* const grad = from.row(position, of_group);
      const T* const out = head.out + position * head.out_row + of_group * head.out_head;
      to_panels(head.query_of(first + r), at_.dim, r, at_.rows, m + at_.query);
      to_panels(grad, at_.dim_v, r, at_.rows, m + at_.grad);
      m[at_.delta + r] = dot<A>(grad, out, at_.dim_v);
      const A saved = head.lse[of_group * head.lse_head + position];
      if (saved != -kNone) m[at_.lse + r] = saved * static_cast<A>(kLog2e);  // -inf: the row saw no key
    }
    std::fill_n(m + at_.grad_query, at_.rows * at_.columns, A(0));
  }

  void pack_keys(std::int64_t index) const {
    const Head<T> head = head_of<T>(p_, sharing_, kv_head_, 0);
    const std::int64_t first = index * at_.cell, count = std::min(at_.cell, head.len_k - first);
    if (count <= 0) return;
    A* const m = cell_at(index);
    const T *key = head.key + first * head.key_row, *value = head.value + first * head.value_row;
    pack_transposed(key, head.key_row, count, at_.dim, m + at_.key_panels);
    multiply(m + at_.key_panels, V(static_cast<A>(p_.attention.scale * kLog2e)), round_up(count, kPanel<A>) * at_.dim);
    pack_transposed(value, head.value_row, count, at_.dim_v, m + at_.value_panels);
    for (std::int64_t j = 0; j < count; ++j) to_panels(key + j * head.key_row, at_.dim, j, at_.cell, m + at_.key);
    std::fill_n(m + at_.grad_key, at_.sums * at_.columns, A(0));
    std::fill_n(m + at_.grad_value, at_.sums * at_.columns_v, A(0));
  }

  // Query blocks [rows), of each sharing, against the key blocks [keys).
  void add(Range rows, Range keys, A* scratch) const {
    for (std::int64_t s = 0; s < sharing_.count; ++s)
      for (std::int64_t block = rows.begin; block < rows.end; ++block) {
        const std::int64_t index = s * query_blocks(p_) + block;
        const Head<T> head = head_of_block(index);
        const std::int64_t first = first_row(index), count = std::min(p_.block * head.group, head.rows() - first);
        const Range seen{keys.begin * p_.block,
                         std::min(keys.end * p_.block, limit_of(p_.attention, head, first + count - 1))};
        const std::int64_t strips = (count + kStrip - 1) / kStrip, parts = blocks_of(strips, kStrips);
        const std::int64_t size = blocks_of(strips, parts);
        for_cells(p_, head.first_head, block, seen, [&](Cell cell) {
          for (std::int64_t strip = 0; strip < strips; strip += size)
            add_pair(head, index, cell, strip, static_cast<int>(std::min(size, strips - strip)), first + count,
                     scratch);
        });
      }
  }

  void write_rows(std::int64_t index) const {
    const Head<T> head = head_of_block(index);
    const Source<T> to = of<T>(b_.grad_query, head);
    const std::int64_t first = first_row(index), count = std::min(p_.block * head.group, head.rows() - first);
    for (std::int64_t r = 0; r < count; ++r)
      write(block_of(index) + at_.grad_query, r, at_.rows, p_.attention.scale, at_.dim,
            to.row((first + r) / head.group, (first + r) % head.group));
  }

  void write_keys(std::int64_t index) const {
    Head<T> head = head_of<T>(p_, sharing_, kv_head_, 0);
    head.first_head = kv_head_ % p_.attention.key.size[1];
    const Source<T> key = of<T>(b_.grad_key, head), value = of<T>(b_.grad_value, head);
    const A* const m = cell_at(index);
    const std::int64_t first = index * at_.cell, count = std::min(at_.cell, head.len_k - first);
    for (std::int64_t j = 0; j < count; ++j) {
      write(m + at_.grad_key, j, at_.sums, p_.attention.scale, at_.dim, key.row(first + j, 0));
      write(m + at_.grad_value, j, at_.sums, 1.0, at_.dim_v, value.row(first + j, 0));
    }
  }

 private:
  template <class U>
  struct Source {
    U* data;
    std::int64_t position, head;  // strides
    U* row(std::int64_t at, std::int64_t of_group) const { return data + at * position + of_group * head; }
  };
  template <class U>
  static Source<U> of(const TensorView& t, const Head<T>& head) {
    return {t.as<U>() + head.batch * t.stride[0] + head.first_head * t.stride[1], t.stride[2], t.stride[1]};
  }

  void clear_row(A* panels, std::int64_t r, std::int64_t dim) const {
    for (std::int64_t c = 0; c < dim; c += kPanel<A>)
      std::fill_n(panels + c * at_.rows + r * kPanel<A>, kPanel<A>, A(0));
  }

  A* block_of(std::int64_t index) const { return m_ + index * at_.block_size; }
  A* cell_at(std::int64_t index) const { return m_ + at_.blocks * at_.block_size + index * at_.cell_size; }
  Head<T> head_of_block(std::int64_t index) const {
    return head_of<T>(p_, sharing_, kv_head_, index / query_blocks(p_));
  }
  std::int64_t first_row(std::int64_t index) const { return index % query_blocks(p_) * p_.block * sharing_.heads; }

  // Strips [strip, strip + strips) of a query block against one cell; `rows` is where the head's rows of the block end.
  void add_pair(const Head<T>& head, std::int64_t index, Cell cell, std::int64_t strip, int strips, std::int64_t rows,
                A* scratch) const {
    const A *const b = block_of(index), *const k = cell_at(cell.key / at_.cell);
    const std::int64_t row = strip * kStrip, block = index % query_blocks(p_) * p_.block;
    Words words[kStrips];
    Tile t;
    t.dim = at_.dim, t.dim_v = at_.dim_v, t.columns = at_.columns, t.columns_v = at_.columns_v;
    t.row_count = at_.rows, t.key_count = at_.cell, t.sum_count = at_.sums, t.strips = strips;
    t.query_strips = t.grad_strips = nullptr;
    t.query = b + at_.query + row * kPanel<A>, t.grad = b + at_.grad + row * kPanel<A>;
    t.lse = b + at_.lse + row, t.delta = b + at_.delta + row;
    t.grad_query = block_of(index) + at_.grad_query + row * kPanel<A>;
    t.key_panels = k + at_.key_panels, t.value_panels = k + at_.value_panels, t.key = k + at_.key;
    t.grad_key = cell_at(cell.key / at_.cell) + at_.grad_key;
    t.grad_value = cell_at(cell.key / at_.cell) + at_.grad_value;
    t.weights = scratch, t.grad_scores = scratch + at_.thread_size / 2;
    for (int s = 0; s < strips; ++s) {
      words[s] = words_of(p_, head, cell, block, first_row(index) + row + s * kStrip, rows);
      t.seen[s] = {words[s].begin() / kPanel<A> * kPanel<A>, words[s].end()};
    }
    t.template run<true>(at_.cell, [&](int s, A* scores) {
      const std::int64_t begin = t.seen[s].begin, padded = round_up(t.seen[s].end, kPanel<A>);
      if (!words[s].cover(begin, padded)) hide_unseen(words[s], begin, padded, scores + begin, kCell);
    });
  }

  // Row k of the sums, times `by`, to storage.
  static void write(const A* panels, std::int64_t k, std::int64_t count, double by, std::int64_t dim, T* to) {
    const V factor(static_cast<A>(by));
    A row[kMaxDim + kPanel<A>];
    for (std::int64_t c = 0; c < dim; c += kPanel<A>) {
      const A* const from = panels + c * count + k * kPanel<A>;
      store(row + c, load(from));
      store(row + c + V::N, load(from + V::N));
    }
    std::int64_t c = 0;
    for (; c + V::N <= dim; c += V::N) store(to + c, load(row + c) * factor);
    if (const int rest = static_cast<int>(dim - c); rest > 0) store(to + c, load(row + c, rest) * factor, rest);
  }

  const SparseAttentionBackwardParams& b_;
  const SparseAttentionParams& p_;
  const Layout& at_;
  const Sharing sharing_;
  const std::int64_t kv_head_;
  A* const m_;
};

template <class T>
constexpr std::int64_t kScores = GradientTile<Acc<T>, kCell, kStrips, false>::kScores;

template <class T>
void backward(const SparseAttentionBackwardParams& p) {
  using A = Acc<T>;
  const AttentionParams& f = p.forward.attention;
  const Layout at(p.forward, sizeof(A), kPanel<A>, kScores<T>);
  A* const memory = f.scratch.as<A>();
  A* const threads = memory + at.wave * at.head_size();
  const std::int64_t room = f.scratch.numel() / static_cast<std::int64_t>(sizeof(A)) - at.wave * at.head_size();
  const std::int64_t workers = room / at.thread_size;
  const std::int64_t kv_heads = f.query.size[0] * f.key.size[1];
  const std::int64_t rows = query_blocks(p.forward), keys = key_blocks(p.forward);
  const std::int64_t chunks =
      std::max<std::int64_t>(1, std::min({rows / 16, keys / 16, kMaxChunks}));  // by shapes alone
  const std::int64_t work = f.query.numel() * std::max<std::int64_t>(f.key.size[2], 1);
  for (std::int64_t wave = 0; wave < kv_heads; wave += at.wave) {
    const std::int64_t heads = std::min(at.wave, kv_heads - wave), parts = at.blocks + at.cells;
    const auto head = [&](std::int64_t i) { return Work<T>(p, at, wave + i, memory + i * at.head_size()); };
    parallel_tasks(heads * parts, work, workers, [&](std::int64_t task, std::int64_t) {
      const std::int64_t i = task % parts;
      i < at.blocks ? head(task / parts).pack_rows(i) : head(task / parts).pack_keys(i - at.blocks);
    });
    for (std::int64_t step = 0; step < chunks; ++step)
      parallel_tasks(heads * chunks, work, workers, [&](std::int64_t task, std::int64_t worker) {
        const std::int64_t i = chunks - 1 - task / heads;
        head(task % heads)
            .add(chunk_of(rows, chunks, i, 1), chunk_of(keys, chunks, (i - step + chunks) % chunks, 1),
                 threads + worker * at.thread_size);
      });
    parallel_tasks(heads * parts, work, workers, [&](std::int64_t task, std::int64_t) {
      const std::int64_t i = task % parts;
      i < at.blocks ? head(task / parts).write_rows(i) : head(task / parts).write_keys(i - at.blocks);
    });
  }
}

}  // namespace

std::int64_t sparse_attention_backward_scratch_bytes(const SparseAttentionParams& p, std::int64_t threads) {
  const bool wide = p.attention.query.dtype == DType::f64;
  const std::int64_t bytes = wide ? 8 : 4;
  const Layout at(p, bytes, wide ? kPanel<double> : kPanel<float>, wide ? kScores<double> : kScores<float>);
  return (at.wave * at.head_size() + threads * at.thread_size) * bytes;
}

void sparse_attention_backward(const SparseAttentionBackwardParams& p) {
  with_storage_type(p.forward.attention.query.dtype, [&](auto t) { backward<decltype(t)>(p); });
}

}  // namespace qvl::cpu
