// What the kernels of attention for AMX share: one product of 32 x 32 sums, and the packing of its operands.
//
// Every product is C[32][32] += A[32][k] B[k][32] with k in steps of 32: 2 x 2 registers of sums, two of A and two of
// B, so that each loaded register serves two products. A step of an operand is two registers, one behind the other, and
// so is everything here contiguous:
//
//   rows        as A   [step][2][16 rows][32]             32 rows, k along each
//   transposed  as B   [step][2][16 pairs][16 rows][2]    32 rows, k along each
//   pairs       as B   [step][2][16 pairs][16 columns][2] 32 columns, k down each
//
// Rounding to bfloat16 happens here, for what is not bfloat16 already.
#pragma once

#include "attention.h"
#include "vec_amx.h"

#if defined(__AVX512F__)

namespace qvl::cpu {

constexpr int kSide = 2 * kTileRows;                      // rows and columns of a product
constexpr int kStep = 2 * kTileRows * kTileHalves;        // elements of a step of an operand
constexpr int kSums = kSide * kSide;                      // elements of a product
constexpr int kRegister = kTileRows * kTileRows;          // elements of a register of sums
constexpr std::int64_t kSumsRow = kSide * sizeof(float);  // bytes, where rows of a product are whole

// Sums as four registers, one behind the other.
[[gnu::always_inline]] inline void load_sums(const float* from) {
  load_tile_register<0>(from), load_tile_register<1>(from + kRegister);
  load_tile_register<2>(from + 2 * kRegister), load_tile_register<3>(from + 3 * kRegister);
}
[[gnu::always_inline]] inline void store_sums(float* to) {
  store_tile_register<0>(to), store_tile_register<1>(to + kRegister);
  store_tile_register<2>(to + 2 * kRegister), store_tile_register<3>(to + 3 * kRegister);
}
// Sums as 32 rows of 32.
[[gnu::always_inline]] inline void store_rows_of_sums(float* to) {
  store_tile_register<0>(to, kSumsRow), store_tile_register<1>(to + kTileRows, kSumsRow);
  to += kTileRows * kSide;
  store_tile_register<2>(to, kSumsRow), store_tile_register<3>(to + kTileRows, kSumsRow);
}

// The sums in registers += a b over `steps`; between(step) is arithmetic of the vector units, which goes on beside.
template <class Between>
[[gnu::always_inline]] inline void multiply_add_halves(const bf16* a, const bf16* b, std::int64_t steps,
                                                       const Between& between) {
  for (std::int64_t step = 0; step < steps; ++step, a += kStep, b += kStep) {
    load_tile_register<4>(a), load_tile_register<5>(a + kStep / 2);
    load_tile_register<6>(b), load_tile_register<7>(b + kStep / 2);
    dot_halves<0, 4, 6>();
    dot_halves<1, 4, 7>();
    dot_halves<2, 5, 6>();
    dot_halves<3, 5, 7>();
    between(step);
  }
}
[[gnu::always_inline]] inline void multiply_add_halves(const bf16* a, const bf16* b, std::int64_t steps) {
  multiply_add_halves(a, b, steps, [](std::int64_t) {});
}

// `n` numbers times `scale`, rounded, then zeros up to `padded`: in place where that is what is there, or in `buffer`.
template <class S>
const bf16* in_halves(const S* from, std::int64_t n, std::int64_t padded, float scale, bf16* buffer) {
  if constexpr (std::is_same_v<S, bf16>) {
    if (n == padded) return from;
    std::copy_n(from, n, buffer);
  } else {
    using V = Vec<float>;
    const V by(scale);
    std::int64_t i = 0;
    for (; i + V::N <= n; i += V::N) store(buffer + i, load(from + i) * by);
    if (i < n) store(buffer + i, load(from + i, static_cast<int>(n - i)) * by, static_cast<int>(n - i));
  }
  std::fill(buffer + n, buffer + padded, bf16{0});
  return buffer;
}

// A row of `dim` numbers, whole steps, to place r of 32 as A.
inline void to_rows(const bf16* from, std::int64_t dim, std::int64_t r, bf16* to) {
  to += r * kTileHalves;
  for (std::int64_t d = 0; d < dim; d += kTileHalves, from += kTileHalves, to += kStep)
    std::copy_n(from, kTileHalves, to);
}

// Rows [0, count) of `dim` numbers to blocks of 32 rows [block][step]..., transposed as B, zeros for what fills up the
// last. row(r, buffer) is row r, in place or written to the buffer.
template <class Row>
void pack_transposed_halves(std::int64_t count, std::int64_t dim, bf16* to, const Row& row) {
  alignas(64) bf16 buffer[kTileRows][kMaxDim];
  static constexpr bf16 kZeros[kMaxDim] = {};
  for (std::int64_t j = 0; j < round_up(count, kSide); j += kTileRows) {
    const bf16* rows[kTileRows];
    for (int i = 0; i < kTileRows; ++i) rows[i] = j + i < count ? row(j + i, buffer[i]) : kZeros;
    bf16* block = to + j / kSide * kSide * dim + j % kSide * kTileHalves;
    for (std::int64_t d = 0; d < dim; d += kTileHalves, block += kStep) {
      store_transposed(block, rows);
      for (const bf16*& each : rows) each += kTileHalves;
    }
  }
}

// Rows [0, count) of `columns` numbers, whole steps, to panels of 32 columns [panel][size / 32]..., pairs as B, zeros
// for what fills up the last 32 rows.
template <class Row>
void pack_pairs(std::int64_t count, std::int64_t columns, std::int64_t size, bf16* to, const Row& row) {
  alignas(64) bf16 buffer[2][kMaxDim];
  static constexpr bf16 kZeros[kMaxDim] = {};
  for (std::int64_t j = 0; j < round_up(count, kSide); j += 2) {
    const bf16* const a = j < count ? row(j, buffer[0]) : kZeros;
    const bf16* const b = j + 1 < count ? row(j + 1, buffer[1]) : kZeros;
    bf16* const pair = to + j / kSide * kStep + j % kSide / 2 * kTileHalves;
    for (std::int64_t c = 0; c < columns; c += kSide) store_interleaved(pair + c * size, a + c, b + c);
  }
}

}  // namespace qvl::cpu

#endif
