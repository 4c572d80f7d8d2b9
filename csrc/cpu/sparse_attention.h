// What sparse attention's kernels share: how a head's rows are cut, which cells of keys a block of queries lists, and
// what each row sees of a cell.
//
// A cell is the part of a key block that a kernel takes at once: 64 keys, or 32 where the blocks are. What a row sees
// of it is one word of bits.
#pragma once

#include <cstring>
#include <utility>

#include "attention_tiles.h"

namespace qvl::cpu {

inline std::int64_t blocks_of(std::int64_t n, std::int64_t block) { return (n + block - 1) / block; }
inline std::int64_t cell_of(const SparseAttentionParams& p) { return std::min<std::int64_t>(p.block, 64); }
inline std::int64_t query_blocks(const SparseAttentionParams& p) {
  return blocks_of(p.attention.query.size[2], p.block);
}
inline std::int64_t key_blocks(const SparseAttentionParams& p) { return blocks_of(p.attention.key.size[2], p.block); }

struct Cell {
  std::int64_t key;          // the first
  const std::uint8_t* bits;  // of the query block's first row, or null: all are seen
};

// The query heads of a KV head that have the same lists are one `sharing`; their rows go together, row r being position
// r / heads, head r % heads.
struct Sharing {
  std::int64_t count, heads;  // of a KV head; query heads of each

  explicit Sharing(const SparseAttentionParams& p) {
    const std::int64_t group = p.attention.query.size[1] / p.attention.key.size[1];
    count = p.shared ? 1 : group, heads = p.shared ? group : 1;
  }
};

// The head with the rows of one sharing alone.
template <class T>
Head<T> head_of(const SparseAttentionParams& p, const Sharing& sharing, std::int64_t kv_head, std::int64_t index) {
  const std::int64_t kv_heads = p.attention.key.size[1];
  Head<T> head = head_of<T>(p.attention, kv_head / kv_heads, kv_head % kv_heads);
  const std::int64_t skip = index * sharing.heads;
  head.group = sharing.heads;
  head.first_head += skip;
  head.query += skip * head.query_head;
  head.out += skip * head.out_head;
  if (head.lse != nullptr) head.lse += skip * head.lse_head;
  return head;
}

// How many keys of the front the query, or row `row`, may see.
template <class T>
std::int64_t limit_of_query(const AttentionParams& p, const Head<T>& head, std::int64_t query) {
  return p.causal ? std::clamp<std::int64_t>(head.len_k - head.len_q + query + 1, 0, head.len_k) : head.len_k;
}
template <class T>
std::int64_t limit_of(const AttentionParams& p, const Head<T>& head, std::int64_t row) {
  return limit_of_query(p, head, p.causal ? row / head.group : 0);
}

// Calls f(Cell) for the cells below `end` that query block `block` of a query head lists: full blocks, then partial.
template <class F>
void for_cells(const SparseAttentionParams& p, std::int64_t query_head, std::int64_t block, Range keys, const F& f) {
  const std::int64_t cell = cell_of(p), head = p.full_offsets.size[0] == 1 ? 0 : query_head;
  const std::int64_t at = head * p.full_offsets.size[1] + block;
  const auto walk = [&](const TensorView& offsets, const TensorView& blocks, const std::int32_t* masks) {
    const auto* const ends = offsets.as<std::int32_t>() + at;
    for (std::int64_t i = ends[0]; i < ends[1]; ++i) {
      const std::int64_t first = std::int64_t{blocks.as<std::int32_t>()[i]} * p.block;
      if (first < keys.begin) continue;
      for (std::int64_t key = first; key < std::min(first + p.block, keys.end); key += cell)
        f(Cell{key, masks == nullptr
                        ? nullptr
                        : p.bits.as<std::uint8_t>() + masks[i] * p.block * p.block / 8 + (key - first) / 8});
    }
  };
  walk(p.full_offsets, p.full, nullptr);
  walk(p.partial_offsets, p.partial, p.masks.as<std::int32_t>());
}

// What the rows of one strip see of a cell, bit j being key j of it.
struct Words {
  std::uint64_t row[kStrip];
  std::uint64_t any, all;

  std::int64_t begin() const { return any == 0 ? 0 : __builtin_ctzll(any); }
  std::int64_t end() const { return any == 0 ? 0 : 64 - __builtin_clzll(any); }
  // Whether each row sees all keys of [begin, end).
  bool cover(std::int64_t begin, std::int64_t end) const {
    const std::uint64_t wanted = (end >= 64 ? ~0ull : (1ull << end) - 1) >> begin << begin;
    return (all & wanted) == wanted;
  }
};

// Of rows [first, first + kStrip) of a head; those from `count` on see what the last one does. `block` is the query
// block's first position. Most cells are full: they cost no division.
template <class T>
Words words_of(const SparseAttentionParams& p, const Head<T>& head, Cell cell, std::int64_t block, std::int64_t first,
               std::int64_t count) {
  const std::int64_t width = cell_of(p);
  const std::uint64_t whole = width == 64 ? ~0ull : (1ull << width) - 1;
  if (cell.bits == nullptr && cell.key + width <= limit_of(p.attention, head, first))
    return {{whole, whole, whole, whole, whole, whole}, whole, whole};
  Words w{{}, 0, ~0ull};
  std::int64_t query = first / head.group, of_group = first % head.group;
  for (int r = 0; r < kStrip; ++r) {
    if (r > 0 && first + r < count && ++of_group == head.group) of_group = 0, ++query;
    const std::int64_t seen = std::clamp<std::int64_t>(limit_of_query(p.attention, head, query) - cell.key, 0, width);
    std::uint64_t word = seen == 64 ? ~0ull : (1ull << seen) - 1;
    if (cell.bits != nullptr) {
      std::uint64_t bits = 0;
      std::memcpy(&bits, cell.bits + (query - block) * p.block / 8, static_cast<std::size_t>(width / 8));
      word &= bits;
    }
    w.row[r] = word, w.any |= word, w.all &= word;
  }
  return w;
}

// -inf where a row does not see the key; scores[r * row] belongs to key `begin` of the cell.
template <class A>
void hide_unseen(const Words& words, std::int64_t begin, std::int64_t end, A* scores, std::int64_t row) {
  using V = Vec<A>;
  const V hidden(-std::numeric_limits<A>::infinity());
  for (int r = 0; r < kStrip; ++r)
    for (std::int64_t j = begin; j < end; j += V::N) {
      A* const at = scores + r * row + j - begin;
      store(at, choose(static_cast<std::uint32_t>(words.row[r] >> j), load(at), hidden));
    }
}

// Keys [key, key + cell) of a head: K transposed to panels of keys, V to panels of columns; zeros beyond the last key.
template <class T, class A>
void pack_cell(const Head<T>& head, std::int64_t key, std::int64_t cell, std::int64_t dim, std::int64_t dim_v, A* keys,
               A* values) {
  const std::int64_t count = std::min(cell, head.len_k - key), columns = round_up(dim_v, kPanel<A>);
  const std::int64_t packed = round_up(count, kPanel<A>);
  pack_transposed(head.key + key * head.key_row, head.key_row, count, dim, keys);
  std::fill_n(keys + packed * dim, (cell - packed) * dim, A(0));
  for (std::int64_t j = 0; j < count; ++j) to_panels(head.value + (key + j) * head.value_row, dim_v, j, cell, values);
  for (std::int64_t c = 0; c < columns; c += kPanel<A>)
    std::fill(values + c * cell + count * kPanel<A>, values + (c + kPanel<A>)*cell, A(0));
}

}  // namespace qvl::cpu
