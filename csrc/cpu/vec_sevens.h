// The intrinsics of linear_sevens.h, beside vec_linear.h: products of unsigned bytes of at most 127 with signed ones.
//
//   add_dot_two_sevens    twice four products, added in 16 bits before they are widened: five instructions instead of
//                         the six of two add_dot_bytes
//   sums_fit              whether these sums fit, whatever is multiplied
#pragma once

#include "vec_linear.h"

namespace qvl {

#if defined(__AVX512F__)

// Numbers of 0 to 255, rounded to nearest even.
inline void store_bytes(std::uint8_t* p, Vec<float> a) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(a.v)));
}
inline IntVec add(IntVec a, IntVec b) { return {_mm512_add_epi32(a.v, b.v)}; }
inline IntVec largest_bytes(IntVec a, IntVec b) { return {_mm512_max_epi8(a.v, b.v)}; }
inline IntVec add_pairs_of_bytes(IntVec a, IntVec b) {
  const __m512i ones = _mm512_set1_epi8(1);
  return {_mm512_add_epi16(_mm512_maddubs_epi16(ones, a.v), _mm512_maddubs_epi16(ones, b.v))};
}
inline bool any_word_above(IntVec a, int limit) {
  return _mm512_cmpgt_epi16_mask(a.v, _mm512_set1_epi16(static_cast<short>(limit))) != 0;
}
inline IntVec negative_bytes(IntVec a) { return {_mm512_sub_epi8(_mm512_setzero_si512(), a.v)}; }

#else

inline void store_bytes(std::uint8_t* p, Vec<float> a) {
  const __m256i i = _mm256_cvtps_epi32(a.v);
  const __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(i), _mm256_extracti128_si256(i, 1));
  _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_packus_epi16(words, words));
}

inline IntVec add(IntVec a, IntVec b) { return {_mm256_add_epi32(a.v, b.v)}; }
inline IntVec largest_bytes(IntVec a, IntVec b) { return {_mm256_max_epi8(a.v, b.v)}; }
inline IntVec add_pairs_of_bytes(IntVec a, IntVec b) {
  const __m256i ones = _mm256_set1_epi8(1);
  return {_mm256_add_epi16(_mm256_maddubs_epi16(ones, a.v), _mm256_maddubs_epi16(ones, b.v))};
}
inline bool any_word_above(IntVec a, int limit) {
  return _mm256_movemask_epi8(_mm256_cmpgt_epi16(a.v, _mm256_set1_epi16(static_cast<short>(limit)))) != 0;
}
inline IntVec negative_bytes(IntVec a) { return {_mm256_sub_epi8(_mm256_setzero_si256(), a.v)}; }

#endif

// What add_dot_bytes adds for a and b and for c and d.
inline IntVec add_dot_two_sevens(IntVec acc, IntVec a, IntVec b, IntVec c, IntVec d) {
  return add(acc, sum_pairs(add_words(dot_pairs_of_bytes(a, b), dot_pairs_of_bytes(c, d))));
}

// Whether a sum of four products, two neighbours of b and two of d with numbers of 0 to 127, fits 16 bits: the positive
// and the negative ones add up to 258 at most, since 258 * 127 = 32766.
inline bool sums_fit(IntVec b, IntVec d) {
  const IntVec none = IntVec::zero();
  const IntVec above = add_pairs_of_bytes(largest_bytes(b, none), largest_bytes(d, none));
  const IntVec below =
      add_pairs_of_bytes(largest_bytes(negative_bytes(b), none), largest_bytes(negative_bytes(d), none));
  return !any_word_above(above, 258) && !any_word_above(below, 258);
}

}  // namespace qvl
