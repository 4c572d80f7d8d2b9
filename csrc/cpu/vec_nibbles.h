// int4 weights from their bytes (`qvl_kernels/_packing.py`), in the order and the width that products want them: as
// 16-bit integers, unsigned bytes, bytes with their scale, or floats.
#pragma once

#include "vec_linear.h"

namespace qvl {

// The low or the high halves of as many bytes as a Vec<float> has lanes.
inline Vec<float> low_halves(const std::uint8_t* p) {
  return from_bytes(_mm_and_si128(load_lanes(p), _mm_set1_epi8(15)));
}
inline Vec<float> high_halves(const std::uint8_t* p) {
  return from_bytes(_mm_and_si128(_mm_srli_epi16(load_lanes(p), 4), _mm_set1_epi8(15)));
}

// 64 int4 weights, 32 bytes, one a byte: first the low halves, then the high ones.
inline void split_nibbles(const std::uint8_t* p, float* to) {
  const __m256i x = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)), low = _mm256_set1_epi8(15);
  __m256i* const halves = reinterpret_cast<__m256i*>(to);
  _mm256_storeu_si256(halves, _mm256_and_si256(x, low));
  _mm256_storeu_si256(halves + 1, _mm256_and_si256(_mm256_srli_epi16(x, 4), low));
}
alignas(64) constexpr float kNibbles[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
// 128 int4 weights, four groups of 32 in 64 bytes, as bytes: scale q + minimum of each group's, rounded, looked up
// among the sixteen that there are.
#if defined(__AVX512F__)
inline void nibbles_as_bytes(const std::uint8_t* p, const float* scale, const float* minimum, std::int8_t* first64,
                             std::int8_t* second64) {
  const auto levels = [&](int group) __attribute__((always_inline)) {
    const Vec<float> q = load(kNibbles);
    return _mm512_cvtps_epi32(fma(q, Vec<float>(scale[group]), Vec<float>(minimum[group])).v);
  };
  const __m512i low = _mm512_packs_epi32(levels(0), levels(2)), high = _mm512_packs_epi32(levels(1), levels(3));
  // 128 bits i have levels 4 i to 4 i + 3 of groups 0, 2, 1 and 3; brought together, twice each
  const __m512i all = _mm512_packs_epi16(low, high);
  const __m512i of_low =
      _mm512_permutexvar_epi32(_mm512_setr_epi32(0, 4, 8, 12, 0, 4, 8, 12, 1, 5, 9, 13, 1, 5, 9, 13), all);
  const __m512i of_high =
      _mm512_permutexvar_epi32(_mm512_setr_epi32(2, 6, 10, 14, 2, 6, 10, 14, 3, 7, 11, 15, 3, 7, 11, 15), all);
  const __m512i x = _mm512_loadu_si512(p), mask = _mm512_set1_epi8(15);
  const __m512i a = _mm512_shuffle_epi8(of_low, _mm512_and_si512(x, mask));
  const __m512i b = _mm512_shuffle_epi8(of_high, _mm512_and_si512(_mm512_srli_epi16(x, 4), mask));
  _mm512_storeu_si512(first64, _mm512_shuffle_i64x2(a, b, 0x44));
  _mm512_storeu_si512(second64, _mm512_shuffle_i64x2(a, b, 0xee));
}
#else
inline void nibbles_as_bytes(const std::uint8_t* p, const float* scale, const float* minimum, std::int8_t* first64,
                             std::int8_t* second64) {
  const auto store = [&](int group, __m256i nibbles, std::int8_t* to) __attribute__((always_inline)) {
    const auto levels = [&](int i) __attribute__((always_inline)) {
      return _mm256_cvtps_epi32(fma(load(kNibbles + i), Vec<float>(scale[group]), Vec<float>(minimum[group])).v);
    };
    const __m256i words = _mm256_packs_epi32(levels(0), levels(8));  // 0 to 3, 8 to 11, 4 to 7, 12 to 15
    const __m256i bytes = _mm256_packs_epi16(words, words);
    const __m256i at = _mm256_setr_epi32(0, 4, 1, 5, 0, 4, 1, 5);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to),
                        _mm256_shuffle_epi8(_mm256_permutevar8x32_epi32(bytes, at), nibbles));
  };
  const __m256i mask = _mm256_set1_epi8(15);
  for (int i = 0; i < 2; ++i) {
    const __m256i x = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p) + i);
    std::int8_t* const to = i == 0 ? first64 : second64;
    store(2 * i, _mm256_and_si256(x, mask), to);
    store(2 * i + 1, _mm256_and_si256(_mm256_srli_epi16(x, 4), mask), to + 32);
  }
}
#endif

// One (AVX2) or two blocks of 64 int4 weights, 32 bytes each, in four times as many 16-bit integers. Pairs of them are
// by turns of the first group, the low halves of the bytes, and of the second, the high halves, which are 16 times the
// weight; so products of all four with x in the same order (`nibble_at`) can be added, and sums of both groups
// alternate in what comes out.
struct Nibbles {
  static constexpr int kBytes = 2 * Words::N;
  Words part[4];
};
// Which weight of a block part[p] has at i. Parts 0 and 1 are made of the even and the odd bytes as they lie, 2 and 3
// of bytes in which neighbouring words of 32 bits have changed places.
inline int nibble_at(int p, int i) { return (i / 2 % 2 == 1 ? 32 : 0) + 2 * (p >= 2 ? i ^ 2 : i) + p % 2; }

#if defined(__AVX512F__)
inline Nibbles nibbles(const std::uint8_t* p) {
  __m512i x = _mm512_loadu_si512(p);
  asm("" : "+v"(x));  // loaded once, not by each that reads it
  const __m512i odd = _mm512_srli_epi16(x, 8), by_turns = _mm512_set1_epi64(0x00f000f0000f000f);
  const __m512i swapped = _mm512_shuffle_epi32(x, _MM_PERM_CDAB),
                odd_swapped = _mm512_shuffle_epi32(odd, _MM_PERM_CDAB);
  return {{{_mm512_and_si512(x, by_turns)},
           {_mm512_and_si512(odd, by_turns)},
           {_mm512_and_si512(swapped, by_turns)},
           {_mm512_and_si512(odd_swapped, by_turns)}}};
}
#else
inline Nibbles nibbles(const std::uint8_t* p) {
  __m256i x = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  asm("" : "+x"(x));
  const __m256i odd = _mm256_srli_epi16(x, 8), by_turns = _mm256_set1_epi64x(0x00f000f0000f000f);
  const __m256i swapped = _mm256_shuffle_epi32(x, 0xb1), odd_swapped = _mm256_shuffle_epi32(odd, 0xb1);
  return {{{_mm256_and_si256(x, by_turns)},
           {_mm256_and_si256(odd, by_turns)},
           {_mm256_and_si256(swapped, by_turns)},
           {_mm256_and_si256(odd_swapped, by_turns)}}};
}
#endif

// The weights of Nibbles in two vectors of unsigned bytes, for x in 8 bits (`order_as_nibble_bytes`): words of four
// weights are of the first and of the second group by turns, part 0 as they lie, part 1 after words have changed
// places. Without VNNI the second group is shifted down, since 16 times the weight would saturate.
template <bool kVnni>
struct NibbleBytes {
  static constexpr int kBytes = Nibbles::kBytes;
  IntVec part[2];
};
template <bool kVnni>
[[gnu::always_inline]] inline NibbleBytes<kVnni> nibble_bytes(const std::uint8_t* p) {
  IntVec x = load_bytes(p);
  asm("" : "+v"(x.v));  // loaded once, not by each that reads it
  const IntVec swapped = swap_words(x);
  if constexpr (kVnni) {
    const IntVec by_turns = repeat_words(static_cast<std::int64_t>(0xf0f0f0f00f0f0f0f));
    return {{both(x, by_turns), both(swapped, by_turns)}};
  }
  const IntVec shift = repeat_words(std::int64_t{4} << 32), low = repeat_byte(15);
  return {{both(shift_right(x, shift), low), both(shift_right(swapped, shift), low)}};
}
// int32 lanes: products with x in the order of the weights, added up by twos or fours
template <bool kVnni>
[[gnu::always_inline]] inline Ints dot_nibbles(const Nibbles& a, const std::int16_t* x) {
  Ints sum = products(a.part[0], words(x));
#pragma GCC unroll 3
  for (int j = 1; j < 4; ++j) sum = add_products<kVnni>(sum, a.part[j], words(x + j * Words::N));
  return sum;
}
template <bool kVnni>
[[gnu::always_inline]] inline Ints dot_nibbles(const NibbleBytes<kVnni>& a, const std::int8_t* x) {
  const IntVec x0 = load_bytes(x), x1 = load_bytes(x + NibbleBytes<kVnni>::kBytes);
  if constexpr (kVnni)
    return {add_dot_bytes<true>(add_dot_bytes<true>(IntVec::zero(), a.part[0], x0), a.part[1], x1).v};
  return {sum_pairs(add_words(dot_pairs_of_bytes(a.part[0], x0), dot_pairs_of_bytes(a.part[1], x1))).v};
}
// A block of 64 numbers as bytes in the order of nibble_bytes.
inline void order_as_nibble_bytes(const std::int16_t* q, std::int8_t* part0, std::int8_t* part1) {
  const __m256i first = narrow(q), second = narrow(q + 32);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(part0), _mm256_blend_epi32(first, second, 0xaa));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(part1),
                      _mm256_shuffle_epi32(_mm256_blend_epi32(second, first, 0xaa), 0xb1));
}

}  // namespace qvl
