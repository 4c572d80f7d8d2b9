// The intrinsics of AMX, beside vec.h: eight registers of 16 rows x 64 bytes and products between them, on Intel's
// server cores since 2023. Only the AVX-512 module has them, and asks at run time.
//
//   dot_halves<C, A, B>   C[i][j] += sum over k < 32 of A[i][k] B[j][k], bfloat16 in, float32 out; numbers below 2^-126
//                         count as zero. A has 16 rows of 32 numbers; B has its numbers in pairs along k, [k / 2][j][2]
//   dot_bytes<C, A, B>    the same of 64 signed bytes, int32 out; B has its numbers in fours, [k / 4][j][4]
//
// A product takes 16 cycles for 16384 FLOPs (32768 of bytes), 16 times what two FMAs of 512 bits do in that time, and 8
// cycles pass before a register that was loaded from L1 can be followed by the next load. So operands should be loaded
// once for two products: 2 x 2 registers of sums, two of A and two of B.
//
// The registers have no meaning until `Tiles` exists on the thread, and cost a context switch 8 KiB while it does. It
// also makes the thread's other arithmetic count numbers below 2^-126 as zero, as the products do: without, an
// exponential that ends there takes 30 times as long.
//
// Every CPU that has AMX has AVX512_BF16 too, whose conversion to bfloat16 is used beside it.
#pragma once

#include "vec.h"

#if defined(__AVX512F__)

#include <sys/syscall.h>
#include <unistd.h>

#include <cstdlib>

namespace qvl {

constexpr int kTileRows = 16, kTileBytes = 64, kTileHalves = 32;  // kTileHalves: bfloat16 numbers of a row

// Whether the CPU has AMX for bfloat16 and bytes (all have both) and the system lets this process use it (Linux gives
// the registers to who asks: arch_prctl(ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA)). QVL_AMX=0 says no.
inline bool has_amx() {
  static const bool use = [] {
    const char* const wanted = std::getenv("QVL_AMX");
    if (wanted != nullptr && wanted[0] == '0') return false;
    return __builtin_cpu_supports("amx-tile") && __builtin_cpu_supports("amx-bf16") &&
           __builtin_cpu_supports("amx-int8") && syscall(SYS_arch_prctl, 0x1023, 18) == 0;
  }();
  return use;
}

// While it exists, the thread's eight registers have 16 rows of 64 bytes, and subnormal numbers are zero.
class Tiles {
 public:
  Tiles() : control_(_mm_getcsr()) {
    constexpr unsigned kFlushToZero = 0x8000, kDenormalsAreZero = 0x40;
    _mm_setcsr(control_ | kFlushToZero | kDenormalsAreZero);
    struct alignas(64) {
      std::uint8_t palette = 1, start = 0, reserved[14] = {};
      std::uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      std::uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } const shape;
    asm volatile("ldtilecfg %0" : : "m"(shape));
  }
  ~Tiles() {
    asm volatile("tilerelease");
    _mm_setcsr(control_);
  }
  Tiles(const Tiles&) = delete;
  Tiles& operator=(const Tiles&) = delete;

 private:
  const unsigned control_;
};

// kTile: the register's number. Rows lie `stride` bytes apart.
template <int kTile>
[[gnu::always_inline]] inline void clear_tile_register() {
  asm volatile("tilezero %%tmm%c0" : : "i"(kTile));
}
// Registers 0 to 3, where every user has its 2 x 2 sums.
[[gnu::always_inline]] inline void clear_sums() {
  clear_tile_register<0>(), clear_tile_register<1>(), clear_tile_register<2>(), clear_tile_register<3>();
}
template <int kTile>
[[gnu::always_inline]] inline void load_tile_register(const void* p, std::int64_t stride = kTileBytes) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(p), "r"(stride), "i"(kTile) : "memory");
}
template <int kTile>
[[gnu::always_inline]] inline void store_tile_register(void* p, std::int64_t stride = kTileBytes) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" : : "r"(p), "r"(stride), "i"(kTile) : "memory");
}
template <int kC, int kA, int kB>
[[gnu::always_inline]] inline void dot_halves() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(kC), "i"(kA), "i"(kB));
}
template <int kC, int kA, int kB>
[[gnu::always_inline]] inline void dot_bytes() {
  asm volatile("tdpbssd %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(kC), "i"(kA), "i"(kB));
}

// 2^x with a relative error below 7.5e-5, a 26th of bfloat16's rounding, where `Tiles` exists: inf from 128 on, 0 below
// -126, NaN for NaN. x = n + f with n = floor(x); a minimax cubic is 2^f.
inline Vec<float> exp2_halves(Vec<float> x) {
  constexpr int kFloor = 9;
  const Vec<float> f = _mm512_reduce_ps(x.v, kFloor);
  Vec<float> y(7.802452e-2f);
  y = fma(y, f, Vec<float>(2.2606716e-1f));
  y = fma(y, f, Vec<float>(6.9583354e-1f));
  y = fma(y, f, Vec<float>(9.9992522e-1f));
  return _mm512_scalef_ps(y.v, x.v);
}

// Two vectors one after the other.
inline void store_halves(bf16* p, Vec<float> a, Vec<float> b) {
  __m512i both;
  asm("vcvtne2ps2bf16 %1, %2, %0" : "=v"(both) : "v"(a.v), "v"(b.v));
  _mm512_storeu_si512(p, both);
}

// a0 b0 a1 b1 .. of 32 numbers each, in two rows of a register that are 16 rows apart.
inline void store_interleaved(bf16* p, const bf16* a, const bf16* b) {
  const __m512i x = _mm512_loadu_si512(a), y = _mm512_loadu_si512(b);
  const __m512i low = _mm512_unpacklo_epi16(x, y), high = _mm512_unpackhi_epi16(x, y);  // of each 128 bits
  _mm512_storeu_si512(p, _mm512_permutex2var_epi64(low, _mm512_setr_epi64(0, 1, 8, 9, 2, 3, 10, 11), high));
  _mm512_storeu_si512(p + kTileRows * kTileHalves,
                      _mm512_permutex2var_epi64(low, _mm512_setr_epi64(4, 5, 12, 13, 6, 7, 14, 15), high));
}

// a = parts[0] + parts[1] + parts[2], each a bfloat16 number: 24 bits cut after the 8th and the 16th. Infinities and
// NaN are in the first part.
inline void split_three(Vec<float> a, Vec<float> (&parts)[3]) {
  constexpr int kNan = 0x81, kInfinity = 0x18;  // classes of vfpclassps
  const __m512i upper = _mm512_set1_epi32(-65536);
  const auto cut = [&](__m512 x) { return _mm512_castsi512_ps(_mm512_and_si512(_mm512_castps_si512(x), upper)); };
  const __mmask16 finite = _knot_mask16(_mm512_fpclass_ps_mask(a.v, kNan | kInfinity));
  const __m512 high = cut(a.v), rest = _mm512_maskz_sub_ps(finite, a.v, high);
  parts[0].v = _mm512_mask_mov_ps(a.v, finite, high);
  parts[1].v = cut(rest);
  parts[2].v = _mm512_sub_ps(rest, parts[1].v);
}

// Sixteen rows of sixteen words of 32 bits (pairs of bf16), transposed: row i of the result is word i of all rows. Rows
// of the result lie `stride` elements apart.
template <class T>
inline void store_transposed(T* p, const T* const (&rows)[kTileRows], std::int64_t stride = kTileBytes / sizeof(T)) {
  __m512i r[16], t[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) r[i] = _mm512_loadu_si512(rows[i]);
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4)
#pragma GCC unroll 2
    for (int j = 0; j < 2; ++j) {
      r[i + 2 * j] = _mm512_unpacklo_epi64(t[i + j], t[i + j + 2]);
      r[i + 2 * j + 1] = _mm512_unpackhi_epi64(t[i + j], t[i + j + 2]);
    }
  // Lane l of r[4 i + j] is now pair 4 l + j of rows 4 i to 4 i + 3.
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    const __m512i a = _mm512_shuffle_i32x4(r[j], r[4 + j], 0x88), b = _mm512_shuffle_i32x4(r[8 + j], r[12 + j], 0x88);
    const __m512i c = _mm512_shuffle_i32x4(r[j], r[4 + j], 0xdd), d = _mm512_shuffle_i32x4(r[8 + j], r[12 + j], 0xdd);
    _mm512_storeu_si512(p + j * stride, _mm512_shuffle_i32x4(a, b, 0x88));
    _mm512_storeu_si512(p + (4 + j) * stride, _mm512_shuffle_i32x4(c, d, 0x88));
    _mm512_storeu_si512(p + (8 + j) * stride, _mm512_shuffle_i32x4(a, b, 0xdd));
    _mm512_storeu_si512(p + (12 + j) * stride, _mm512_shuffle_i32x4(c, d, 0xdd));
  }
}

}  // namespace qvl

#endif
