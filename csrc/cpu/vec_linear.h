// The intrinsics of integer products, beside vec.h, for the linear kernels and int8 caches (vec_nibbles.h: int4
// weights).
//
//   Words, Ints   int16 and int32 in vectors of the ISA's width (vec.h), for few rows of x
//   IntVec        the same for the register tile, where GCC needs help to keep them in registers
//
// A product of pairs is a[2 i] b[2 i] + a[2 i + 1] b[2 i + 1], int16 times int16 in int32: `vpmaddwd`, or with VNNI
// `vpdpwssd`, which adds in the same instruction.
#pragma once

#include <cstdlib>

#include "vec.h"

namespace qvl {

struct Int16x16 {
  __m256i v;
};

inline void store16(std::int16_t* p, Int16x16 a) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), a.v); }
inline Int16x16 widen_to_16(const std::int8_t* p) {
  return {_mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))};
}

// Words: 16-bit integers, two for each lane of Ints: 32-bit integers, as many as floats.
#if defined(__AVX512F__)
struct Words {
  static constexpr int N = 32;
  __m512i v;
};
struct Ints {
  __m512i v;
};
inline Words words(const std::int16_t* p) { return {_mm512_loadu_si512(p)}; }
inline Words words(const std::int8_t* p) {
  return {_mm512_cvtepi8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
}
// acc + the products of neighbours, added in pairs
inline Ints add_products(Ints acc, Words a, Words b) { return {_mm512_add_epi32(acc.v, _mm512_madd_epi16(a.v, b.v))}; }
inline Ints no_ints() { return {_mm512_setzero_si512()}; }
inline Vec<float> to_float(Ints a) { return _mm512_cvtepi32_ps(a.v); }
#else
struct Words {
  static constexpr int N = 16;
  __m256i v;
};
struct Ints {
  __m256i v;
};
inline Words words(const std::int16_t* p) { return {_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))}; }
inline Words words(const std::int8_t* p) {
  return {_mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))};
}
// acc + the products of neighbours, added in pairs
inline Ints add_products(Ints acc, Words a, Words b) { return {_mm256_add_epi32(acc.v, _mm256_madd_epi16(a.v, b.v))}; }
inline Ints no_ints() { return {_mm256_setzero_si256()}; }
inline Vec<float> to_float(Ints a) { return _mm256_cvtepi32_ps(a.v); }
#endif

// Asks for a cache line. In assembly, since GCC drops the calls of a function that does nothing else.
inline void prefetch_line(const void* p) { asm volatile("prefetcht0 %a0" : : "p"(p)); }

#if defined(__AVX512F__)

struct IntVec {
  static constexpr int N = 16;
  __m512i v;
  static IntVec zero() { return {_mm512_setzero_si512()}; }
};
inline IntVec load_pairs(const float* p) { return {_mm512_loadu_si512(p)}; }
inline IntVec load_bytes(const void* p) { return {_mm512_loadu_si512(p)}; }
// Pairs of int16: a[i], rounded, and b[i].
inline void store_pairs(float* p, Vec<float> a, Vec<float> b) {
  const __m512i low = _mm512_cvtps_epi32(a.v), high = _mm512_slli_epi32(_mm512_cvtps_epi32(b.v), 16);
  _mm512_storeu_si512(p, _mm512_mask_blend_epi16(0xaaaaaaaau, low, high));
}
inline void store_words(float* p, IntVec a) { _mm512_storeu_si512(p, a.v); }
inline IntVec repeat_byte(int byte) { return {_mm512_set1_epi8(static_cast<char>(byte))}; }
inline IntVec negative(IntVec a) { return {_mm512_sub_epi32(_mm512_setzero_si512(), a.v)}; }
inline IntVec repeat_pair(const float* p) {
  std::int32_t pair;
  std::memcpy(&pair, p, sizeof pair);
  return {_mm512_set1_epi32(pair)};
}
inline Words words(const std::int8_t* p, int n) {  // the first n, or all
  const __mmask32 first = n >= 32 ? 0xffffffffu : (1u << n) - 1u;
  return {_mm512_cvtepi8_epi16(_mm256_maskz_loadu_epi8(first, p))};
}
inline Words repeat_pair(const std::int16_t* p) {
  std::int32_t pair;
  std::memcpy(&pair, p, sizeof pair);
  return {_mm512_set1_epi32(pair)};
}
// a0 b0 a1 b1 ..: the low and the high half of each 128 bits, and both halves of products by columns in order again.
inline Words interleave_low(Words a, Words b) { return {_mm512_unpacklo_epi16(a.v, b.v)}; }
inline Words interleave_high(Words a, Words b) { return {_mm512_unpackhi_epi16(a.v, b.v)}; }
inline void in_order(Ints& low, Ints& high) {
  const __m512i a = low.v, b = high.v;
  low.v = _mm512_permutex2var_epi64(a, _mm512_setr_epi64(0, 1, 8, 9, 2, 3, 10, 11), b);
  high.v = _mm512_permutex2var_epi64(a, _mm512_setr_epi64(4, 5, 12, 13, 6, 7, 14, 15), b);
}
inline __m256i halves(Ints a) {
  return _mm256_add_epi32(_mm512_castsi512_si256(a.v), _mm512_extracti64x4_epi64(a.v, 1));
}
// Whether the CPU has VNNI is asked at run time; the module is compiled without.
inline bool has_vnni() { return __builtin_cpu_supports("avx512vnni"); }
// Whether a product of bfloat16 pairs takes no longer than an FMA of as many floats.
inline bool has_fast_bf16() { return __builtin_cpu_supports("avx512bf16") && __builtin_cpu_is("amd"); }
// acc + a[2 i] b[2 i] + a[2 i + 1] b[2 i + 1] of bfloat16 pairs; numbers below 2^-126 count as zero.
[[gnu::always_inline]] inline Vec<float> add_dot_halves(Vec<float> acc, IntVec a, IntVec b) {
  __m512 sum = acc.v;
  asm("vdpbf16ps %2, %1, %0" : "+v"(sum) : "v"(a.v), "v"(b.v));
  return sum;
}
template <bool kVnni>
[[gnu::always_inline]] inline IntVec add_dot_pairs(IntVec acc, IntVec a, IntVec b) {
  if constexpr (kVnni) {
    __m512i sum = acc.v;
    asm("vpdpwssd %2, %1, %0" : "+v"(sum) : "v"(a.v), "v"(b.v));
    return {sum};
  }
  return {_mm512_add_epi32(acc.v, _mm512_madd_epi16(a.v, b.v))};
}
template <bool kVnni>
[[gnu::always_inline]] inline Ints add_products(Ints acc, Words a, Words b) {
  return {add_dot_pairs<kVnni>(IntVec{acc.v}, IntVec{a.v}, IntVec{b.v}).v};
}
// Bits of both; neighbouring words of 32 bits with places changed; words shifted by words; two words by turns.
inline IntVec both(IntVec a, IntVec b) { return {_mm512_and_si512(a.v, b.v)}; }
inline IntVec swap_words(IntVec a) { return {_mm512_shuffle_epi32(a.v, _MM_PERM_CDAB)}; }
inline IntVec shift_right(IntVec a, IntVec by) { return {_mm512_srlv_epi32(a.v, by.v)}; }
inline IntVec repeat_words(std::int64_t two) { return {_mm512_set1_epi64(two)}; }
inline Ints products(Words a, Words b) { return {_mm512_madd_epi16(a.v, b.v)}; }
// c + a by[2 b + i % 2] in lane i, of the block of 32 bytes b
inline Vec<float> add_scaled(Ints a, const float* by, Vec<float> c) {
  const __m512d four = _mm512_castps_pd(_mm512_broadcast_f32x4(_mm_loadu_ps(by)));
  return _mm512_fmadd_ps(_mm512_cvtepi32_ps(a.v), _mm512_castpd_ps(_mm512_permute_pd(four, 0xf0)), c.v);
}
inline Vec<float> to_float(IntVec a) { return _mm512_cvtepi32_ps(a.v); }
inline Vec<float> from_bytes(__m128i bytes) { return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(bytes)); }
inline __m128i load_lanes(const std::uint8_t* p) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p)); }
inline Vec<float> quotient(Vec<float> a, Vec<float> b) { return _mm512_div_ps(a.v, b.v); }

#else

struct IntVec {
  static constexpr int N = 8;
  __m256i v;
  static IntVec zero() { return {_mm256_setzero_si256()}; }
};
inline IntVec load_pairs(const float* p) { return {_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))}; }
inline IntVec load_bytes(const void* p) { return {_mm256_loadu_si256(static_cast<const __m256i*>(p))}; }
inline void store_pairs(float* p, Vec<float> a, Vec<float> b) {
  const __m256i low = _mm256_cvtps_epi32(a.v), high = _mm256_slli_epi32(_mm256_cvtps_epi32(b.v), 16);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm256_blend_epi16(low, high, 0xaa));
}
inline void store_words(float* p, IntVec a) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), a.v); }
inline IntVec repeat_byte(int byte) { return {_mm256_set1_epi8(static_cast<char>(byte))}; }
inline IntVec negative(IntVec a) { return {_mm256_sub_epi32(_mm256_setzero_si256(), a.v)}; }
inline IntVec repeat_pair(const float* p) { return {_mm256_castps_si256(_mm256_broadcast_ss(p))}; }
inline Words words(const std::int8_t* p, int n) {
  if (n >= 16) return words(p);
  std::int8_t buffer[16] = {};
  std::memcpy(buffer, p, static_cast<std::size_t>(n));
  return words(buffer);
}
inline Words repeat_pair(const std::int16_t* p) {
  std::int32_t pair;
  std::memcpy(&pair, p, sizeof pair);
  return {_mm256_set1_epi32(pair)};
}
inline Words interleave_low(Words a, Words b) { return {_mm256_unpacklo_epi16(a.v, b.v)}; }
inline Words interleave_high(Words a, Words b) { return {_mm256_unpackhi_epi16(a.v, b.v)}; }
inline void in_order(Ints& low, Ints& high) {
  const __m256i a = low.v, b = high.v;
  low.v = _mm256_permute2x128_si256(a, b, 0x20);
  high.v = _mm256_permute2x128_si256(a, b, 0x31);
}
inline __m256i halves(Ints a) { return a.v; }
// AVX-VNNI, of laptops without AVX-512. A CPU that has that too runs this module only where it is to behave like one
// that has neither; QVL_AVX_VNNI is there to test it on such a CPU.
inline bool has_vnni() {
  static const bool use = __builtin_cpu_supports("avxvnni") &&
                          (!__builtin_cpu_supports("avx512f") || std::getenv("QVL_AVX_VNNI") != nullptr);
  return use;
}
// In assembly, since GCC finds no place for twelve sums, two vectors of weights, one of x and the product in the
// sixteen registers, and would keep the sums in memory.
template <bool kVnni>
[[gnu::always_inline]] inline IntVec add_dot_pairs(IntVec acc, IntVec a, IntVec b) {
  __m256i sum = acc.v, product;
  if constexpr (kVnni) {
    asm("%{vex%} vpdpwssd %2, %1, %0" : "+x"(sum) : "x"(a.v), "x"(b.v));
    return {sum};
  }
  asm("vpmaddwd %2, %3, %1\n\tvpaddd %1, %0, %0" : "+x"(sum), "=&x"(product) : "x"(a.v), "x"(b.v));
  return {sum};
}
inline Ints products(Words a, Words b) { return {_mm256_madd_epi16(a.v, b.v)}; }
template <bool kVnni>
inline Ints add_products(Ints acc, Words a, Words b) {
  __m256i sum = acc.v;
  asm("vpaddd %1, %0, %0" : "+x"(sum) : "x"(products(a, b).v));
  return {sum};
}
inline IntVec both(IntVec a, IntVec b) { return {_mm256_and_si256(a.v, b.v)}; }
inline IntVec swap_words(IntVec a) { return {_mm256_shuffle_epi32(a.v, 0xb1)}; }
inline IntVec shift_right(IntVec a, IntVec by) { return {_mm256_srlv_epi32(a.v, by.v)}; }
inline IntVec repeat_words(std::int64_t two) { return {_mm256_set1_epi64x(two)}; }
inline Vec<float> add_scaled(Ints a, const float* by, Vec<float> c) {
  double two;
  std::memcpy(&two, by, sizeof two);
  return _mm256_fmadd_ps(_mm256_cvtepi32_ps(a.v), _mm256_castpd_ps(_mm256_set1_pd(two)), c.v);
}
inline Vec<float> to_float(IntVec a) { return _mm256_cvtepi32_ps(a.v); }
inline Vec<float> from_bytes(__m128i bytes) { return _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(bytes)); }
inline __m128i load_lanes(const std::uint8_t* p) { return _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)); }
inline Vec<float> quotient(Vec<float> a, Vec<float> b) { return _mm256_div_ps(a.v, b.v); }

#endif

// acc + products of four unsigned bytes of a with four signed ones of b; the pairs saturate without VNNI.
template <bool kVnni>
[[gnu::always_inline]] inline IntVec add_dot_bytes(IntVec acc, IntVec a, IntVec b) {
#if defined(__AVX512F__)
  if constexpr (kVnni) {
    __m512i sum = acc.v;
    asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(a.v), "v"(b.v));
    return {sum};
  }
  return {_mm512_add_epi32(acc.v, _mm512_madd_epi16(_mm512_maddubs_epi16(a.v, b.v), _mm512_set1_epi16(1)))};
#else
  if constexpr (kVnni) {
    __m256i sum = acc.v;
    asm("%{vex%} vpdpbusd %2, %1, %0" : "+x"(sum) : "x"(a.v), "x"(b.v));
    return {sum};
  }
  return {_mm256_add_epi32(acc.v, _mm256_madd_epi16(_mm256_maddubs_epi16(a.v, b.v), _mm256_set1_epi16(1)))};
#endif
}
// The sums of the lanes of eight vectors, by halves of what is left: 22 instructions for 64 lanes.
inline void eight_sums(const Ints (&a)[8], float* to) {
  __m256i two[4], four[2];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const __m256i x = halves(a[2 * i]), y = halves(a[2 * i + 1]);
    two[i] = _mm256_add_epi32(_mm256_unpacklo_epi32(x, y), _mm256_unpackhi_epi32(x, y));  // x y x y
  }
#pragma GCC unroll 2
  for (int i = 0; i < 2; ++i)
    four[i] = _mm256_add_epi32(_mm256_unpacklo_epi64(two[2 * i], two[2 * i + 1]),
                               _mm256_unpackhi_epi64(two[2 * i], two[2 * i + 1]));
  const __m256i eight = _mm256_add_epi32(_mm256_permute2x128_si256(four[0], four[1], 0x20),
                                         _mm256_permute2x128_si256(four[0], four[1], 0x31));
  _mm256_storeu_ps(to, _mm256_cvtepi32_ps(eight));
}

// 32 integers as bytes, and n of them, whole vectors of 32; those that do not fit become the nearest that does.
inline __m256i narrow(const std::int16_t* q) {
  const __m256i* const from = reinterpret_cast<const __m256i*>(q);
  return _mm256_permute4x64_epi64(_mm256_packs_epi16(_mm256_loadu_si256(from), _mm256_loadu_si256(from + 1)), 0xd8);
}
inline void narrow(const std::int16_t* q, std::int64_t n, std::int8_t* to) {
  for (std::int64_t i = 0; i < n; i += 32) _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + i), narrow(q + i));
}
// int16 lanes: acc + a[2 i] b[2 i] + a[2 i + 1] b[2 i + 1], unsigned bytes of a with signed ones of b. In assembly for
// the reason of add_dot_pairs.
[[gnu::always_inline]] inline IntVec add_dot_nibbles(IntVec acc, IntVec a, IntVec b) {
  IntVec sum = acc, product = acc;
#if defined(__AVX512F__)
  product.v = _mm512_maddubs_epi16(a.v, b.v);
  sum.v = _mm512_add_epi16(sum.v, product.v);
#else
  asm("vpmaddubsw %3, %2, %1\n\tvpaddw %1, %0, %0" : "+x"(sum.v), "=&x"(product.v) : "x"(a.v), "x"(b.v));
#endif
  return sum;
}
// int16 lanes: a[2 i] b[2 i] + a[2 i + 1] b[2 i + 1], unsigned bytes of a with signed ones of b; sums of int16; and
// int32 lanes: sums of two int16 each
#if defined(__AVX512F__)
inline IntVec dot_pairs_of_bytes(IntVec a, IntVec b) { return {_mm512_maddubs_epi16(a.v, b.v)}; }
inline IntVec add_words(IntVec a, IntVec b) { return {_mm512_add_epi16(a.v, b.v)}; }
inline IntVec sum_pairs(IntVec a) { return {_mm512_madd_epi16(a.v, _mm512_set1_epi16(1))}; }
#else
inline IntVec dot_pairs_of_bytes(IntVec a, IntVec b) { return {_mm256_maddubs_epi16(a.v, b.v)}; }
inline IntVec add_words(IntVec a, IntVec b) { return {_mm256_add_epi16(a.v, b.v)}; }
inline IntVec sum_pairs(IntVec a) { return {_mm256_madd_epi16(a.v, _mm256_set1_epi16(1))}; }
#endif
// Tells the compiler that it has changed.
inline void keep(IntVec& a) { asm volatile("" : "+x"(a.v)); }

// n floats, in whole vectors with zeros behind them, as integers of at most `limit`: q[i] step is x[i] within half a
// step. Returns the step, the largest magnitude / limit; NaN, and with it every product, where a number is not finite.
inline float quantize(const float* x, std::int64_t n, float limit, std::int16_t* q) {
  using V = Vec<float>;
  V top = V::zero(), finite = V::zero();
  for (std::int64_t i = 0; i < n; i += V::N) {
    const V v = load(x + i);
    top = max(top, max(v, V::zero() - v));
    finite = fma(v, V::zero(), finite);
  }
  const float most = largest(top) + sum(finite);
  const V inverse(most > 1e-30f ? limit / most : 0.0f);
  for (std::int64_t i = 0; i < n; i += V::N) store_rounded(q + i, load(x + i) * inverse);
  return most > 1e-30f || most != most ? most / limit : 0.0f;
}

// One vector; n < N elements of it, or all.
template <class T>
inline Vec<Acc<T>> load_up_to(const T* p, std::int64_t n) {
  return n >= Vec<Acc<T>>::N ? load(p) : load(p, static_cast<int>(n));
}

// 1 / (1 + e^-x), within 3 ULP; NaN for NaN.
inline Vec<float> sigmoid(Vec<float> x) {
  const Vec<float> power = exp2_to_127(min(Vec<float>(127.0f), x * Vec<float>(-1.4426950408889634f)));
  return quotient(Vec<float>(1.0f), Vec<float>(1.0f) + power);
}

}  // namespace qvl
