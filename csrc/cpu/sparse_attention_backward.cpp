// Attention over listed blocks, backward: the dense backward's five products (attention_gradients.h) for each listed
// pair of a block of queries and a cell of keys.
//
// Regime: arithmetic, 2 (3 D + 2 Dv) FLOPs for each query row and listed key. A pair is only 64 G rows by 64 keys, too
// little to pay for packing either side, so that a head is packed once and its gradients are summed packed:
//
//   slot    memory of one KV head: a row takes 2 D + Dv elements (panels of Q and dO, dQ), a key 3 D + 2 Dv (K and V
//           transposed, panels of K, dK, dV): 1.5 and 2.5 KiB for D = 128 and fp32. Heads follow each other in two
//           slots where kSlotBytes hold them, so that they stay in L3
//   pair    up to 11 strips (66 rows) by one cell of 64 keys: P and dS are 17 KiB each, in L1. Its 100 KiB of rows and
//           160 KiB of keys are packed by the first pair that needs them, and are in its L2 then; later pairs have them
//           from L3, asked for between the products of the pair before
//   out     a head's last step scales the sums and writes them in the storage type
//
// Order and threads as in attention_backward.cpp: step t pairs chunk i of the query blocks with chunk i - t of the key
// blocks; no two pairs of a step share a row or a key, so that there are no locks and every sum has one order. A chunk
// waits for the two that had its rows and its keys before, not for the whole step.
//
// Source: Dao, FlashAttention-2, 2023, section 3.1, algorithm 2.

#include <atomic>
#include <new>
#include <thread>

#include "attention_gradients.h"
#include "dispatch.h"
#include "parallel.h"
#include "sparse_attention.h"

namespace qvl::cpu {
namespace {

constexpr std::int64_t kSlotBytes = 32 << 20;
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
  std::int64_t scores, thread_size;
  std::int64_t heads, chunks, slots;  // KV heads; chunks of a head's blocks; heads that have memory at once
  std::int64_t flags;                 // bytes of all flags

  Layout(const SparseAttentionParams& p, std::int64_t bytes, int panel, std::int64_t scores_)
      : dim(p.attention.query.size[3]), dim_v(p.attention.value.size[3]), scores(scores_) {
    const Sharing sharing(p);
    columns = round_up(dim, panel), columns_v = round_up(dim_v, panel);
    rows = round_up(p.block * sharing.heads, kStrip), cell = cell_of(p), sums = round_up(cell, kStrip);
    blocks = sharing.count * query_blocks(p), cells = key_blocks(p) * (p.block / cell);
    Pieces of_block, of_cell;
    query = of_block.take(rows * columns);
    grad = of_block.take(rows * columns_v);
    grad_query = of_block.take(rows * columns);
    lse = of_block.take(rows);
    delta = of_block.take(rows);
    block_size = of_block.size();
    key_panels = of_cell.take(cell * dim);
    value_panels = of_cell.take(cell * dim_v);
    key = of_cell.take(cell * columns);
    grad_key = of_cell.take(sums * columns);
    grad_value = of_cell.take(sums * columns_v);
    cell_size = of_cell.size();
    thread_size = 2 * round_up(scores, 16);
    heads = p.attention.query.size[0] * p.attention.key.size[1];
    chunks = std::max<std::int64_t>(1, std::min({query_blocks(p) / 16, key_blocks(p) / 16, kMaxChunks}));
    slots = std::clamp<std::int64_t>(kSlotBytes / std::max<std::int64_t>(head_size() * bytes, 1), 1,
                                     std::max<std::int64_t>(heads, 1));
    flags = round_up(heads * chunks + slots * (blocks + cells), 64);
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

  Work(const SparseAttentionBackwardParams& p, const Layout& at, std::int64_t kv_head, std::uint8_t* packed, A* memory)
      : b_(p), p_(p.forward), at_(at), sharing_(p_), kv_head_(kv_head), packed_(packed), m_(memory) {}

  // Query blocks [rows), of each sharing, against the key blocks [keys). A pair's products hide the reading of the
  // next.
  void add(Range rows, Range keys, A* scratch) const {
    std::int64_t index = -1;
    Cell cell{};
    for (std::int64_t s = 0; s < sharing_.count; ++s)
      for (std::int64_t block = rows.begin; block < rows.end; ++block) {
        const std::int64_t next = s * query_blocks(p_) + block;
        const Head<T> head = head_of_block(next);
        const std::int64_t last = first_row(next) + rows_of(head, next) - 1;
        const Range seen{keys.begin * p_.block, std::min(keys.end * p_.block, limit_of(p_.attention, head, last))};
        for_cells(p_, head.first_head, block, seen, [&](Cell found) {
          Ahead ahead;
          if (index != next) look_ahead_rows(head, next, ahead);
          look_ahead_keys(head, found.key / at_.cell, ahead);
          if (index >= 0) add_pair(index, cell, ahead, scratch);
          index = next, cell = found;
        });
      }
    Ahead nothing;
    if (index >= 0) add_pair(index, cell, nothing, scratch);
  }

  // The gradients of query blocks [rows) and key blocks [keys), which are complete; the memory is free then.
  void write(Range rows, Range keys) const {
    for (std::int64_t s = 0; s < sharing_.count; ++s)
      for (std::int64_t block = rows.begin; block < rows.end; ++block) write_rows(s * query_blocks(p_) + block);
    const std::int64_t of_block = p_.block / at_.cell;
    for (std::int64_t i = keys.begin * of_block; i < keys.end * of_block; ++i) write_keys(i);
  }

 private:
  // Of query block `index` of all sharings: rows beyond the last have an lse that makes all their probabilities zero.
  void pack_rows(const Head<T>& head, std::int64_t index) const {
    constexpr A kNone = std::numeric_limits<A>::infinity();
    const Source<const T> from = of<const T>(b_.grad_out, head);
    const std::int64_t first = first_row(index), count = rows_of(head, index);
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

  void pack_keys(const Head<T>& head, std::int64_t index) const {
    const std::int64_t first = index * at_.cell, count = std::min(at_.cell, head.len_k - first);
    A* const m = cell_at(index);
    const T *key = head.key + first * head.key_row, *value = head.value + first * head.value_row;
    pack_transposed(key, head.key_row, count, at_.dim, m + at_.key_panels);
    multiply(m + at_.key_panels, V(static_cast<A>(p_.attention.scale * kLog2e)), round_up(count, kPanel<A>) * at_.dim);
    pack_transposed(value, head.value_row, count, at_.dim_v, m + at_.value_panels);
    for (std::int64_t j = 0; j < count; ++j) to_panels(key + j * head.key_row, at_.dim, j, at_.cell, m + at_.key);
    std::fill_n(m + at_.grad_key, at_.sums * at_.columns, A(0));
    std::fill_n(m + at_.grad_value, at_.sums * at_.columns_v, A(0));
  }

  void write_rows(std::int64_t index) const {
    const bool listed = std::exchange(packed_[index], 0);
    const Head<T> head = head_of_block(index);
    const Source<T> to = of<T>(b_.grad_query, head);
    const std::int64_t first = first_row(index), count = rows_of(head, index);
    for (std::int64_t r = 0; r < count; ++r)
      write_row(listed ? block_of(index) + at_.grad_query : nullptr, r, at_.rows, p_.attention.scale, at_.dim,
                to.row((first + r) / head.group, (first + r) % head.group));
  }

  void write_keys(std::int64_t index) const {
    const bool listed = std::exchange(packed_[at_.blocks + index], 0);
    Head<T> head = head_of<T>(p_, sharing_, kv_head_, 0);
    head.first_head = kv_head_ % p_.attention.key.size[1];
    const Source<T> key = of<T>(b_.grad_key, head), value = of<T>(b_.grad_value, head);
    const A* const m = cell_at(index);
    const std::int64_t first = index * at_.cell, count = std::min(at_.cell, head.len_k - first);
    for (std::int64_t j = 0; j < count; ++j) {
      write_row(listed ? m + at_.grad_key : nullptr, j, at_.sums, p_.attention.scale, at_.dim, key.row(first + j, 0));
      write_row(listed ? m + at_.grad_value : nullptr, j, at_.sums, 1.0, at_.dim_v, value.row(first + j, 0));
    }
  }

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

  std::int64_t rows_of(const Head<T>& head, std::int64_t index) const {
    return std::min(p_.block * head.group, head.rows() - first_row(index));
  }

  void look_ahead_rows(const Head<T>& head, std::int64_t index, Ahead& ahead) const {
    if (head.group > 2) return;  // more rows than L2 has room for, and products enough for each cell
    ahead.add(block_of(index), 1, 0, at_.block_size * sizeof(A));
    if (packed_[index]) return;
    const Source<const T> grad = of<const T>(b_.grad_out, head);
    const std::int64_t position = first_row(index) / head.group;
    const std::int64_t positions = (rows_of(head, index) + head.group - 1) / head.group;
    for (std::int64_t h = 0; h < head.group; ++h) {
      ahead.add(head.query + position * head.query_row + h * head.query_head, positions, head.query_row * sizeof(T),
                at_.dim * sizeof(T));
      ahead.add(grad.row(position, h), positions, grad.position * sizeof(T), at_.dim_v * sizeof(T));
      ahead.add(head.out + position * head.out_row + h * head.out_head, positions, head.out_row * sizeof(T),
                at_.dim_v * sizeof(T));
    }
  }

  void look_ahead_keys(const Head<T>& head, std::int64_t index, Ahead& ahead) const {
    ahead.add(cell_at(index), 1, 0, at_.cell_size * sizeof(A));
    if (packed_[at_.blocks + index]) return;
    const std::int64_t first = index * at_.cell, count = std::min(at_.cell, head.len_k - first);
    ahead.add(head.key + first * head.key_row, count, head.key_row * sizeof(T), at_.dim * sizeof(T));
    ahead.add(head.value + first * head.value_row, count, head.value_row * sizeof(T), at_.dim_v * sizeof(T));
  }

  // A query block against a cell; either is packed where this is its first time.
  void add_pair(std::int64_t index, Cell cell, Ahead& ahead, A* scratch) const {
    const Head<T> head = head_of_block(index);
    const std::int64_t count = rows_of(head, index);
    if (!std::exchange(packed_[index], 1)) pack_rows(head, index);
    if (!std::exchange(packed_[at_.blocks + cell.key / at_.cell], 1)) pack_keys(head, cell.key / at_.cell);
    const std::int64_t strips = (count + kStrip - 1) / kStrip, parts = blocks_of(strips, kStrips);
    const std::int64_t size = blocks_of(strips, parts);
    // As many times as tiles, about: cell / panel of S and of dP for a strip, and so on.
    ahead.spread(strips * (2 * at_.cell + 2 * at_.columns + at_.columns_v) / kPanel<A>);
    for (std::int64_t strip = 0; strip < strips; strip += size)
      add_strips(head, index, cell, strip, static_cast<int>(std::min(size, strips - strip)), ahead, scratch);
  }

  // Strips [strip, strip + strips) of a query block against one cell.
  void add_strips(const Head<T>& head, std::int64_t index, Cell cell, std::int64_t strip, int strips, Ahead& ahead,
                  A* scratch) const {
    const A *const b = block_of(index), *const k = cell_at(cell.key / at_.cell);
    const std::int64_t row = strip * kStrip, block = index % query_blocks(p_) * p_.block;
    Words words[kStrips];
    Tile t;
    t.dim = at_.dim, t.dim_v = at_.dim_v, t.columns = at_.columns, t.columns_v = at_.columns_v;
    t.row_count = at_.rows, t.key_count = at_.cell, t.sum_count = at_.sums, t.strips = strips;
    t.query_strips = t.grad_strips = nullptr, t.ahead = &ahead;
    t.query = b + at_.query + row * kPanel<A>, t.grad = b + at_.grad + row * kPanel<A>;
    t.lse = b + at_.lse + row, t.delta = b + at_.delta + row;
    t.grad_query = block_of(index) + at_.grad_query + row * kPanel<A>;
    t.key_panels = k + at_.key_panels, t.value_panels = k + at_.value_panels, t.key = k + at_.key;
    t.grad_key = cell_at(cell.key / at_.cell) + at_.grad_key;
    t.grad_value = cell_at(cell.key / at_.cell) + at_.grad_value;
    t.weights = scratch, t.grad_scores = scratch + at_.thread_size / 2;
    for (int s = 0; s < strips; ++s) {
      words[s] =
          words_of(p_, head, cell, block, first_row(index) + row + s * kStrip, first_row(index) + rows_of(head, index));
      t.seen[s] = {words[s].begin() / kPanel<A> * kPanel<A>, words[s].end()};
    }
    t.run(at_.cell, [&](int s, A* scores) {
      const std::int64_t begin = t.seen[s].begin, padded = round_up(t.seen[s].end, kPanel<A>);
      if (!words[s].cover(begin, padded)) hide_unseen(words[s], begin, padded, scores + begin, kCell);
    });
  }

  // Row k of the sums, times `by`, to storage; zeros where there are none.
  static void write_row(const A* panels, std::int64_t k, std::int64_t count, double by, std::int64_t dim, T* to) {
    if (panels == nullptr) return static_cast<void>(std::fill_n(to, dim, T()));
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
  std::uint8_t* const packed_;  // which query blocks, and then which cells, are
  A* const m_;
};

template <class T>
constexpr std::int64_t kScores = GradientTile<Acc<T>, kCell, kStrips, false>::kScores;

using Flag = std::atomic<std::uint8_t>;

// The tasks of all heads, (head, step, chunk), in an order in which each waits for earlier ones alone. `group` heads go
// side by side, as many as give every thread a chunk.
template <class T>
class Schedule {
 public:
  using A = Acc<T>;

  Schedule(const SparseAttentionBackwardParams& p, const Layout& at)
      : p_(p), at_(at), done_(reinterpret_cast<Flag*>(p.forward.attention.scratch.as<std::uint8_t>())) {
    const TensorView& scratch = p.forward.attention.scratch;
    auto* const bytes = scratch.as<std::uint8_t>();
    for (std::int64_t i = 0; i < at.heads * at.chunks; ++i) new (done_ + i) Flag(0);
    packed_ = bytes + at.heads * at.chunks;
    std::fill_n(packed_, at.slots * (at.blocks + at.cells), std::uint8_t{0});
    memory_ = reinterpret_cast<A*>(bytes + at.flags);
    threads_ = memory_ + at.slots * at.head_size();
    workers_ = (scratch.numel() - (reinterpret_cast<std::uint8_t*>(threads_) - bytes)) / (at.thread_size * sizeof(A));
    const OpenMp& omp = openmp();
    const std::int64_t threads = omp.max_threads == nullptr ? 1 : std::min<std::int64_t>(workers_, omp.max_threads());
    group_ = std::clamp<std::int64_t>(blocks_of(threads, at.chunks), 1, at.slots);
    slots_ = std::min(at.slots, threads > 1 ? 2 * group_ : 1);
  }

  void run() const {
    const AttentionParams& f = p_.forward.attention;
    const std::int64_t work = f.query.numel() * std::max<std::int64_t>(f.key.size[2], 1);
    parallel_tasks(at_.heads * at_.chunks * at_.chunks, work, workers_, [&](std::int64_t task, std::int64_t worker) {
      const std::int64_t of_group = group_ * at_.chunks * at_.chunks, first = task / of_group * group_;
      const std::int64_t heads = std::min(group_, at_.heads - first), i = task % of_group / heads;
      run(first + task % of_group % heads, i / at_.chunks, at_.chunks - 1 - i % at_.chunks,
          threads_ + worker * at_.thread_size);
    });
  }

 private:
  void run(std::int64_t head, std::int64_t step, std::int64_t chunk, A* scratch) const {
    const std::int64_t chunks = at_.chunks, slot = head % slots_;
    if (step > 0) {
      wait(head, chunk, step);                          // its rows
      wait(head, (chunk - 1 + chunks) % chunks, step);  // its keys
    } else if (head >= slots_) {
      for (std::int64_t i = 0; i < chunks; ++i) wait(head - slots_, i, chunks);
    }
    const Range rows = chunk_of(query_blocks(p_.forward), chunks, chunk, 1);
    const Range keys = chunk_of(key_blocks(p_.forward), chunks, (chunk - step + chunks) % chunks, 1);
    const Work<T> work(p_, at_, head, packed_ + slot * (at_.blocks + at_.cells), memory_ + slot * at_.head_size());
    work.add(rows, keys, scratch);
    if (step == chunks - 1) work.write(rows, keys);
    done_[head * chunks + chunk].store(static_cast<std::uint8_t>(step + 1), std::memory_order_release);
  }

  void wait(std::int64_t head, std::int64_t chunk, std::int64_t steps) const {
    while (done_[head * at_.chunks + chunk].load(std::memory_order_acquire) < steps) std::this_thread::yield();
  }

  const SparseAttentionBackwardParams& p_;
  const Layout& at_;
  Flag* const done_;  // steps that a head's chunk of rows has done
  std::uint8_t* packed_;
  A *memory_, *threads_;
  std::int64_t workers_, group_, slots_;
};

template <class T>
void backward(const SparseAttentionBackwardParams& p) {
  const Layout at(p.forward, sizeof(Acc<T>), kPanel<Acc<T>>, kScores<T>);
  Schedule<T>(p, at).run();
}

}  // namespace

std::int64_t sparse_attention_backward_scratch_bytes(const SparseAttentionParams& p, std::int64_t threads) {
  const bool wide = p.attention.query.dtype == DType::f64;
  const std::int64_t bytes = wide ? 8 : 4;
  const Layout at(p, bytes, wide ? kPanel<double> : kPanel<float>, wide ? kScores<double> : kScores<float>);
  return at.flags + (at.slots * at.head_size() + threads * at.thread_size) * bytes;
}

void sparse_attention_backward(const SparseAttentionBackwardParams& p) {
  with_storage_type(p.forward.attention.query.dtype, [&](auto t) { backward<decltype(t)>(p); });
}

}  // namespace qvl::cpu
