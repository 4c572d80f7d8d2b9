// The only place with intrinsics: vectors of the compute type (float or double) and conversions from storage types.
//
// One source per kernel is compiled once per instruction set; what differs is here:
//
//                AVX2      AVX-512
//   Vec<float>   8 lanes   16 lanes
//   Vec<double>  4 lanes   8 lanes
//
// float16 and bfloat16 are storage types: they widen on load and are rounded to nearest even on store, NaN stays NaN.
// A Vec is not initialised by itself: GCC would clear an array of them with a loop, and then keep it in memory instead
// of registers. `zero()` and, for arrays, `clear` do. `load(p, n)` and `store(p, v, n)` touch exactly the first n < N
// elements; lanes beyond read as zero.
#pragma once

#include <immintrin.h>

#include <cmath>
#include <cstdint>
#include <cstring>

namespace qvl {

struct bf16 {
  std::uint16_t bits;
};
struct f16 {
  std::uint16_t bits;
};

// The compute type of a storage type.
template <class T>
struct AccOf {
  using type = float;
};
template <>
struct AccOf<double> {
  using type = double;
};
template <class T>
using Acc = typename AccOf<T>::type;

template <class A>
struct Vec;

#if defined(__AVX512F__)

template <>
struct Vec<float> {
  static constexpr int N = 16;
  __m512 v;
  Vec() = default;
  static Vec zero() { return _mm512_setzero_ps(); }
  Vec(__m512 x) : v(x) {}
  explicit Vec(float x) : v(_mm512_set1_ps(x)) {}
};
template <>
struct Vec<double> {
  static constexpr int N = 8;
  __m512d v;
  Vec() = default;
  static Vec zero() { return _mm512_setzero_pd(); }
  Vec(__m512d x) : v(x) {}
  explicit Vec(double x) : v(_mm512_set1_pd(x)) {}
};

inline Vec<float> operator+(Vec<float> a, Vec<float> b) { return _mm512_add_ps(a.v, b.v); }
inline Vec<float> operator-(Vec<float> a, Vec<float> b) { return _mm512_sub_ps(a.v, b.v); }
inline Vec<float> operator*(Vec<float> a, Vec<float> b) { return _mm512_mul_ps(a.v, b.v); }
inline Vec<float> operator/(Vec<float> a, Vec<float> b) { return _mm512_div_ps(a.v, b.v); }
inline Vec<float> fma(Vec<float> a, Vec<float> b, Vec<float> c) { return _mm512_fmadd_ps(a.v, b.v, c.v); }
inline Vec<float> max(Vec<float> a, Vec<float> b) { return _mm512_max_ps(a.v, b.v); }
inline float sum(Vec<float> a) { return _mm512_reduce_add_ps(a.v); }
inline float largest(Vec<float> a) { return _mm512_reduce_max_ps(a.v); }
inline __m256 halves(Vec<float> a) {
  return _mm256_add_ps(_mm512_castps512_ps256(a.v), _mm512_extractf32x8_ps(a.v, 1));
}
inline Vec<float> min(Vec<float> a, Vec<float> b) { return _mm512_min_ps(a.v, b.v); }
inline bool any_above(Vec<float> a, Vec<float> b) { return _mm512_cmp_ps_mask(a.v, b.v, _CMP_GT_OQ) != 0; }
inline float first(Vec<float> a) { return _mm512_cvtss_f32(a.v); }
inline Vec<float> shift_bits_left(Vec<float> a, int by) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_castps_si512(a.v), by));
}
inline Vec<double> operator+(Vec<double> a, Vec<double> b) { return _mm512_add_pd(a.v, b.v); }
inline Vec<double> operator-(Vec<double> a, Vec<double> b) { return _mm512_sub_pd(a.v, b.v); }
inline Vec<double> operator*(Vec<double> a, Vec<double> b) { return _mm512_mul_pd(a.v, b.v); }
inline Vec<double> operator/(Vec<double> a, Vec<double> b) { return _mm512_div_pd(a.v, b.v); }
inline Vec<double> fma(Vec<double> a, Vec<double> b, Vec<double> c) { return _mm512_fmadd_pd(a.v, b.v, c.v); }
inline Vec<double> max(Vec<double> a, Vec<double> b) { return _mm512_max_pd(a.v, b.v); }
inline double sum(Vec<double> a) { return _mm512_reduce_add_pd(a.v); }
inline double largest(Vec<double> a) { return _mm512_reduce_max_pd(a.v); }
inline Vec<double> min(Vec<double> a, Vec<double> b) { return _mm512_min_pd(a.v, b.v); }
inline bool any_above(Vec<double> a, Vec<double> b) { return _mm512_cmp_pd_mask(a.v, b.v, _CMP_GT_OQ) != 0; }
inline double first(Vec<double> a) { return _mm512_cvtsd_f64(a.v); }

// Lane i is a's where bit i is set, else b's.
inline Vec<float> choose(std::uint32_t bits, Vec<float> a, Vec<float> b) {
  return _mm512_mask_mov_ps(b.v, static_cast<__mmask16>(bits), a.v);
}
inline Vec<double> choose(std::uint32_t bits, Vec<double> a, Vec<double> b) {
  return _mm512_mask_mov_pd(b.v, static_cast<__mmask8>(bits), a.v);
}

inline __mmask16 first16(int n) { return static_cast<__mmask16>((1u << n) - 1u); }
inline __mmask8 first8(int n) { return static_cast<__mmask8>((1u << n) - 1u); }

// The first n lanes; the others become 0.
inline Vec<float> first_lanes(Vec<float> a, int n) { return _mm512_maskz_mov_ps(first16(n), a.v); }
inline Vec<double> first_lanes(Vec<double> a, int n) { return _mm512_maskz_mov_pd(first8(n), a.v); }

inline Vec<float> widen_bf16(__m256i x) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16)); }
inline __m256i round_bf16(__m512 x) {
  const __m512i bits = _mm512_castps_si512(x);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
  const __mmask16 nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
  return _mm512_cvtepi32_epi16(_mm512_mask_mov_epi32(_mm512_srli_epi32(rounded, 16), nan, _mm512_set1_epi32(0x7fc0)));
}

inline Vec<float> load(const float* p) { return _mm512_loadu_ps(p); }
inline Vec<float> load(const float* p, int n) { return _mm512_maskz_loadu_ps(first16(n), p); }
inline Vec<float> load(const bf16* p) { return widen_bf16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
inline Vec<float> load(const bf16* p, int n) { return widen_bf16(_mm256_maskz_loadu_epi16(first16(n), p)); }
inline Vec<float> load(const f16* p) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
inline Vec<float> load(const f16* p, int n) { return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(first16(n), p)); }
inline Vec<float> load(const std::int8_t* p) {
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
}
inline Vec<float> load(const std::int8_t* p, int n) {
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_maskz_loadu_epi8(first16(n), p)));
}
inline Vec<double> load(const double* p) { return _mm512_loadu_pd(p); }
inline Vec<double> load(const double* p, int n) { return _mm512_maskz_loadu_pd(first8(n), p); }

inline void store(float* p, Vec<float> a) { _mm512_storeu_ps(p, a.v); }
inline void store(float* p, Vec<float> a, int n) { _mm512_mask_storeu_ps(p, first16(n), a.v); }
inline void store(bf16* p, Vec<float> a) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), round_bf16(a.v)); }
inline void store(bf16* p, Vec<float> a, int n) { _mm256_mask_storeu_epi16(p, first16(n), round_bf16(a.v)); }
inline void store(f16* p, Vec<float> a) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT));
}
inline void store(f16* p, Vec<float> a, int n) {
  _mm256_mask_storeu_epi16(p, first16(n), _mm512_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT));
}
inline void store(double* p, Vec<double> a) { _mm512_storeu_pd(p, a.v); }
inline void store(double* p, Vec<double> a, int n) { _mm512_mask_storeu_pd(p, first8(n), a.v); }

// Rounded to int16, to nearest even; beyond its range to the limits.
inline void store_rounded(std::int16_t* p, Vec<float> a) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtsepi32_epi16(_mm512_cvtps_epi32(a.v)));
}
inline void store_rounded(std::int16_t* p, Vec<float> a, Vec<float> b) {
  store_rounded(p, a), store_rounded(p + 16, b);
}

#elif defined(__AVX2__)

template <>
struct Vec<float> {
  static constexpr int N = 8;
  __m256 v;
  Vec() = default;
  static Vec zero() { return _mm256_setzero_ps(); }
  Vec(__m256 x) : v(x) {}
  explicit Vec(float x) : v(_mm256_set1_ps(x)) {}
};
template <>
struct Vec<double> {
  static constexpr int N = 4;
  __m256d v;
  Vec() = default;
  static Vec zero() { return _mm256_setzero_pd(); }
  Vec(__m256d x) : v(x) {}
  explicit Vec(double x) : v(_mm256_set1_pd(x)) {}
};

inline Vec<float> operator+(Vec<float> a, Vec<float> b) { return _mm256_add_ps(a.v, b.v); }
inline Vec<float> operator-(Vec<float> a, Vec<float> b) { return _mm256_sub_ps(a.v, b.v); }
inline Vec<float> operator*(Vec<float> a, Vec<float> b) { return _mm256_mul_ps(a.v, b.v); }
inline Vec<float> operator/(Vec<float> a, Vec<float> b) { return _mm256_div_ps(a.v, b.v); }
inline Vec<float> fma(Vec<float> a, Vec<float> b, Vec<float> c) { return _mm256_fmadd_ps(a.v, b.v, c.v); }
inline float sum(Vec<float> a) {
  __m128 x = _mm_add_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
  x = _mm_add_ps(x, _mm_movehl_ps(x, x));
  return _mm_cvtss_f32(_mm_add_ss(x, _mm_movehdup_ps(x)));
}
inline Vec<float> max(Vec<float> a, Vec<float> b) { return _mm256_max_ps(a.v, b.v); }
inline float largest(Vec<float> a) {
  __m128 x = _mm_max_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
  x = _mm_max_ps(x, _mm_movehl_ps(x, x));
  return _mm_cvtss_f32(_mm_max_ss(x, _mm_movehdup_ps(x)));
}
inline __m256 halves(Vec<float> a) { return a.v; }
inline Vec<float> min(Vec<float> a, Vec<float> b) { return _mm256_min_ps(a.v, b.v); }
inline bool any_above(Vec<float> a, Vec<float> b) {
  return _mm256_movemask_ps(_mm256_cmp_ps(a.v, b.v, _CMP_GT_OQ)) != 0;
}
inline float first(Vec<float> a) { return _mm256_cvtss_f32(a.v); }
inline Vec<float> shift_bits_left(Vec<float> a, int by) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_castps_si256(a.v), by));
}
inline Vec<double> operator+(Vec<double> a, Vec<double> b) { return _mm256_add_pd(a.v, b.v); }
inline Vec<double> operator-(Vec<double> a, Vec<double> b) { return _mm256_sub_pd(a.v, b.v); }
inline Vec<double> operator*(Vec<double> a, Vec<double> b) { return _mm256_mul_pd(a.v, b.v); }
inline Vec<double> operator/(Vec<double> a, Vec<double> b) { return _mm256_div_pd(a.v, b.v); }
inline Vec<double> fma(Vec<double> a, Vec<double> b, Vec<double> c) { return _mm256_fmadd_pd(a.v, b.v, c.v); }
inline Vec<double> max(Vec<double> a, Vec<double> b) { return _mm256_max_pd(a.v, b.v); }
inline double largest(Vec<double> a) {
  const __m128d x = _mm_max_pd(_mm256_castpd256_pd128(a.v), _mm256_extractf128_pd(a.v, 1));
  return _mm_cvtsd_f64(_mm_max_sd(x, _mm_unpackhi_pd(x, x)));
}
inline Vec<double> min(Vec<double> a, Vec<double> b) { return _mm256_min_pd(a.v, b.v); }
inline bool any_above(Vec<double> a, Vec<double> b) {
  return _mm256_movemask_pd(_mm256_cmp_pd(a.v, b.v, _CMP_GT_OQ)) != 0;
}
inline double first(Vec<double> a) { return _mm256_cvtsd_f64(a.v); }
inline double sum(Vec<double> a) {
  const __m128d x = _mm_add_pd(_mm256_castpd256_pd128(a.v), _mm256_extractf128_pd(a.v, 1));
  return _mm_cvtsd_f64(_mm_add_sd(x, _mm_unpackhi_pd(x, x)));
}

// Lane i is a's where bit i is set, else b's.
inline Vec<float> choose(std::uint32_t bits, Vec<float> a, Vec<float> b) {
  const __m256i lane = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
  const __m256i set = _mm256_and_si256(_mm256_set1_epi32(static_cast<int>(bits)), lane);
  return _mm256_blendv_ps(b.v, a.v, _mm256_castsi256_ps(_mm256_cmpeq_epi32(set, lane)));
}
inline Vec<double> choose(std::uint32_t bits, Vec<double> a, Vec<double> b) {
  const __m256i lane = _mm256_setr_epi64x(1, 2, 4, 8);
  const __m256i set = _mm256_and_si256(_mm256_set1_epi64x(bits), lane);
  return _mm256_blendv_pd(b.v, a.v, _mm256_castsi256_pd(_mm256_cmpeq_epi64(set, lane)));
}

inline __m256i first8(int n) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
inline __m256i first4(int n) { return _mm256_cmpgt_epi64(_mm256_set1_epi64x(n), _mm256_setr_epi64x(0, 1, 2, 3)); }
inline Vec<float> first_lanes(Vec<float> a, int n) { return _mm256_and_ps(a.v, _mm256_castsi256_ps(first8(n))); }
inline Vec<double> first_lanes(Vec<double> a, int n) { return _mm256_and_pd(a.v, _mm256_castsi256_pd(first4(n))); }
// AVX2 has no masked access to 16-bit elements: a tail goes through a small buffer.
inline __m128i load_first8_u16(const void* p, int n) {
  std::uint16_t buffer[8] = {};
  std::memcpy(buffer, p, static_cast<std::size_t>(n) * 2);
  return _mm_loadu_si128(reinterpret_cast<const __m128i*>(buffer));
}
inline void store_first8_u16(void* p, __m128i x, int n) {
  std::uint16_t buffer[8];
  _mm_storeu_si128(reinterpret_cast<__m128i*>(buffer), x);
  std::memcpy(p, buffer, static_cast<std::size_t>(n) * 2);
}

inline Vec<float> widen_bf16(__m128i x) { return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(x), 16)); }
inline __m128i round_bf16(__m256 x) {
  const __m256i bits = _mm256_castps_si256(x);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd);
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
  const __m256i high = _mm256_blendv_epi8(_mm256_srli_epi32(rounded, 16), _mm256_set1_epi32(0x7fc0), nan);
  return _mm_packus_epi32(_mm256_castsi256_si128(high), _mm256_extracti128_si256(high, 1));
}

inline Vec<float> load(const float* p) { return _mm256_loadu_ps(p); }
inline Vec<float> load(const float* p, int n) { return _mm256_maskload_ps(p, first8(n)); }
inline Vec<float> load(const bf16* p) { return widen_bf16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
inline Vec<float> load(const bf16* p, int n) { return widen_bf16(load_first8_u16(p, n)); }
inline Vec<float> load(const f16* p) { return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
inline Vec<float> load(const f16* p, int n) { return _mm256_cvtph_ps(load_first8_u16(p, n)); }
inline Vec<float> load(const std::int8_t* p) {
  return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
}
inline Vec<float> load(const std::int8_t* p, int n) {
  std::int8_t buffer[8] = {};
  std::memcpy(buffer, p, static_cast<std::size_t>(n));
  return load(buffer);
}
inline Vec<double> load(const double* p) { return _mm256_loadu_pd(p); }
inline Vec<double> load(const double* p, int n) { return _mm256_maskload_pd(p, first4(n)); }

inline void store(float* p, Vec<float> a) { _mm256_storeu_ps(p, a.v); }
inline void store(float* p, Vec<float> a, int n) { _mm256_maskstore_ps(p, first8(n), a.v); }
inline void store(bf16* p, Vec<float> a) { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), round_bf16(a.v)); }
inline void store(bf16* p, Vec<float> a, int n) { store_first8_u16(p, round_bf16(a.v), n); }
inline void store(f16* p, Vec<float> a) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT));
}
inline void store(f16* p, Vec<float> a, int n) {
  store_first8_u16(p, _mm256_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT), n);
}
inline void store(double* p, Vec<double> a) { _mm256_storeu_pd(p, a.v); }
inline void store(double* p, Vec<double> a, int n) { _mm256_maskstore_pd(p, first4(n), a.v); }

// Words: 16-bit integers, two for each lane of Ints: 32-bit integers, as many as floats.
inline void store_rounded(std::int16_t* p, Vec<float> a) {
  const __m256i i = _mm256_cvtps_epi32(a.v);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p),
                   _mm_packs_epi32(_mm256_castsi256_si128(i), _mm256_extracti128_si256(i, 1)));
}
inline void store_rounded(std::int16_t* p, Vec<float> a, Vec<float> b) {
  const __m256i halves = _mm256_packs_epi32(_mm256_cvtps_epi32(a.v), _mm256_cvtps_epi32(b.v));  // a0 b0 a1 b1
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm256_permute4x64_epi64(halves, 0xd8));
}

#else
#error "vec.h needs -mavx2 -mfma -mf16c or the AVX-512 flags of setup.py"
#endif

// acc += a b in acc's own register. In assembly on AVX2, where twelve sums and their factors take 15 of 16 registers:
// GCC would copy sums, and keep some in memory, where what surrounds a loop is large.
template <class A>
[[gnu::always_inline]] inline Vec<A> add_product(Vec<A> acc, Vec<A> a, Vec<A> b) {
  return fma(a, b, acc);
}
#if !defined(__AVX512F__)
[[gnu::always_inline]] inline Vec<float> add_product(Vec<float> acc, Vec<float> a, Vec<float> b) {
  __m256 sum = acc.v;
  asm("vfmadd231ps %1, %2, %0" : "+x"(sum) : "x"(a.v), "x"(b.v));
  return sum;
}
#endif

// Sets N vectors to zero, one by one, so that they can be registers.
template <int N, class A>
[[gnu::always_inline]] inline void clear(Vec<A> (&v)[N]) {
#pragma GCC unroll 16
  for (int i = 0; i < N; ++i) v[i] = Vec<A>::zero();
}

// Asks for the line, or the lines of [p, p + bytes), in L2.
inline void prefetch_l2(const void* line) { _mm_prefetch(static_cast<const char*>(line), _MM_HINT_T1); }
inline void prefetch_l2(const void* p, std::int64_t bytes) {
  for (std::int64_t i = 0; i < bytes; i += 64) prefetch_l2(static_cast<const char*>(p) + i);
}

// 2^x for x <= 127 with an error below 1 ULP, NaN for NaN; 0 for x < -126.5, so that results are never subnormal (they
// are slow and nothing needs them). x = n + f with |f| <= 1/2: adding 1.5 2^23 + 127 rounds x to n and leaves n + 127,
// the exponent of 2^n, in the lowest bits. 2^f is 1 + f times a minimax polynomial; its relative error is 2e-9.
inline Vec<float> exp2_to_127(Vec<float> x) {
  constexpr float kRound = 12582912.0f + 127.0f;
  x = max(Vec<float>(-127.0f), x);  // in this order a NaN stays
  const Vec<float> rounded = x + Vec<float>(kRound), f = x - (rounded - Vec<float>(kRound));
  Vec<float> y(1.535336196e-4f);
  y = fma(y, f, Vec<float>(1.339887502e-3f));
  y = fma(y, f, Vec<float>(9.618436918e-3f));
  y = fma(y, f, Vec<float>(5.550332367e-2f));
  y = fma(y, f, Vec<float>(2.402264774e-1f));
  y = fma(y, f, Vec<float>(6.931471825e-1f));
  y = fma(y, f, Vec<float>(1.0f));
  return y * shift_bits_left(rounded, 23);
}
// float64 exists for gradcheck, not for speed.
inline Vec<double> exp2_to_127(Vec<double> x) {
  double lane[Vec<double>::N];
  std::memcpy(lane, &x.v, sizeof lane);
  for (double& value : lane) value = std::exp2(value);
  std::memcpy(&x.v, lane, sizeof lane);
  return x;
}

// e^x with an error below 1.5 ULP, inf above 88.73, 0 below -87, NaN for NaN. As above, but x log2(e) is kept in two
// parts: rounded to one it would cost x / 2 ULP. The result is built as 2 2^f times 2^(n - 1), so that n = 128 is no
// overflow.
inline Vec<float> exp(Vec<float> x) {
  constexpr float kRound = 12582912.0f + 126.0f, kLog2e = 1.44269502f, kLog2eRest = 1.92596299e-8f;
  x = min(Vec<float>(89.4f), max(Vec<float>(-87.3f), x));  // in this order a NaN stays
  const Vec<float> rounded = fma(x, Vec<float>(kLog2e), Vec<float>(kRound));
  const Vec<float> f = fma(x, Vec<float>(kLog2eRest), fma(x, Vec<float>(kLog2e), Vec<float>(kRound) - rounded));
  Vec<float> y(2 * 1.535336196e-4f);
  y = fma(y, f, Vec<float>(2 * 1.339887502e-3f));
  y = fma(y, f, Vec<float>(2 * 9.618436918e-3f));
  y = fma(y, f, Vec<float>(2 * 5.550332367e-2f));
  y = fma(y, f, Vec<float>(2 * 2.402264774e-1f));
  y = fma(y, f, Vec<float>(2 * 6.931471825e-1f));
  y = fma(y, f, Vec<float>(2.0f));
  return y * shift_bits_left(rounded, 23);
}
inline Vec<double> exp(Vec<double> x) {
  double lane[Vec<double>::N];
  std::memcpy(lane, &x.v, sizeof lane);
  for (double& value : lane) value = std::exp(value);
  std::memcpy(&x.v, lane, sizeof lane);
  return x;
}

// The sums of the lanes of four vectors, together: a third of the instructions of four sums.
inline void four_sums(Vec<float> a, Vec<float> b, Vec<float> c, Vec<float> d, float* to) {
  const __m256 ab = _mm256_hadd_ps(halves(a), halves(b)), cd = _mm256_hadd_ps(halves(c), halves(d));
  const __m256 abcd = _mm256_hadd_ps(ab, cd);
  _mm_storeu_ps(to, _mm_add_ps(_mm256_castps256_ps128(abcd), _mm256_extractf128_ps(abcd, 1)));
}
inline void four_sums(Vec<double> a, Vec<double> b, Vec<double> c, Vec<double> d, double* to) {
  to[0] = sum(a), to[1] = sum(b), to[2] = sum(c), to[3] = sum(d);
}

// Asks for the cache lines of [p, p + bytes).
inline void prefetch(const void* p, std::int64_t bytes) {
  const char* const line = static_cast<const char*>(p);
  for (std::int64_t i = 0; i < bytes; i += 64) _mm_prefetch(line + i, _MM_HINT_T0);
}

// dst[i * stride + j] = rows[j][i] for an 8 x 8 block of floats, stored in the order of i: with a stride below 8 a line
// is cut short by the next.
inline void transpose8x8(const float* const (&rows)[8], float* dst, std::int64_t stride) {
  __m256 r[8], t[8];
  for (int j = 0; j < 8; ++j) r[j] = _mm256_loadu_ps(rows[j]);
  for (int j = 0; j < 8; j += 2) {
    t[j] = _mm256_unpacklo_ps(r[j], r[j + 1]);
    t[j + 1] = _mm256_unpackhi_ps(r[j], r[j + 1]);
  }
  for (int j = 0; j < 8; j += 4) {
    r[j] = _mm256_shuffle_ps(t[j], t[j + 2], 0x44);
    r[j + 1] = _mm256_shuffle_ps(t[j], t[j + 2], 0xee);
    r[j + 2] = _mm256_shuffle_ps(t[j + 1], t[j + 3], 0x44);
    r[j + 3] = _mm256_shuffle_ps(t[j + 1], t[j + 3], 0xee);
  }
  for (int i = 0; i < 4; ++i) _mm256_storeu_ps(dst + i * stride, _mm256_permute2f128_ps(r[i], r[i + 4], 0x20));
  for (int i = 0; i < 4; ++i) _mm256_storeu_ps(dst + (i + 4) * stride, _mm256_permute2f128_ps(r[i], r[i + 4], 0x31));
}

// What a value becomes by being stored as T and read back.
inline Vec<float> rounded_to(const float*, Vec<float> a) { return a; }
inline Vec<double> rounded_to(const double*, Vec<double> a) { return a; }
inline Vec<float> rounded_to(const bf16*, Vec<float> a) { return widen_bf16(round_bf16(a.v)); }
inline Vec<float> rounded_to(const f16*, Vec<float> a) {
#if defined(__AVX512F__)
  return _mm512_cvtph_ps(_mm512_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT));
#else
  return _mm256_cvtph_ps(_mm256_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT));
#endif
}

}  // namespace qvl
