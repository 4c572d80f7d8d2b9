// The intrinsics of AMX, beside vec.h: eight registers of 16 rows x 64 bytes and products between them, on Intel's
// server cores since 2023. Only the AVX-512 module has them, and asks at run time.
//
//   dot_halves<C, A, B>   C[i][j] += sum over k < 32 of A[i][k] B[j][k], bfloat16 in, float32 out; numbers below 2^-126
//                         count as zero. A has 16 rows of 32 numbers; B has its numbers in pairs along k, [k / 2][j][2]
//
// A product takes 16 cycles for 16384 FLOPs, 16 times what two FMAs of 512 bits do in that time, and 8 cycles pass
// before a register that was loaded from L1 can be followed by the next load. So operands should be loaded once for two
// products: 2 x 2 registers of sums, two of A and two of B.
//
// The registers have no meaning until `Tiles` exists on the thread, and cost a context switch 8 KiB while it does.
#pragma once

#include "vec.h"

#if defined(__AVX512F__)

#include <sys/syscall.h>
#include <unistd.h>

#include <cstdlib>

namespace qvl {

constexpr int kTileRows = 16, kTileBytes = 64, kTileHalves = 32;  // kTileHalves: bfloat16 numbers of a row

// Whether the CPU has AMX for bfloat16 and the system lets this process use it (Linux gives the registers to who asks:
// arch_prctl(ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA)). QVL_AMX=0 says no.
inline bool has_amx() {
  static const bool use = [] {
    const char* const wanted = std::getenv("QVL_AMX");
    if (wanted != nullptr && wanted[0] == '0') return false;
    return __builtin_cpu_supports("amx-tile") && __builtin_cpu_supports("amx-bf16") &&
           syscall(SYS_arch_prctl, 0x1023, 18) == 0;
  }();
  return use;
}

// While it exists, the thread's eight registers have 16 rows of 64 bytes.
class Tiles {
 public:
  Tiles() {
    struct alignas(64) {
      std::uint8_t palette = 1, start = 0, reserved[14] = {};
      std::uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      std::uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } const shape;
    asm volatile("ldtilecfg %0" : : "m"(shape));
  }
  ~Tiles() { asm volatile("tilerelease"); }
  Tiles(const Tiles&) = delete;
  Tiles& operator=(const Tiles&) = delete;
};

// kTile: the register's number. Rows lie `stride` bytes apart.
template <int kTile>
[[gnu::always_inline]] inline void clear_tile_register() {
  asm volatile("tilezero %%tmm%c0" : : "i"(kTile));
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

// Two vectors as 32 bfloat16 numbers, a first, rounded to nearest even: every CPU with AMX has the instruction.
inline void store_halves(bf16* p, Vec<float> a, Vec<float> b) {
  __m512i pair;
  asm("vcvtne2ps2bf16 %2, %1, %0" : "=v"(pair) : "v"(b.v), "v"(a.v));
  _mm512_storeu_si512(p, pair);
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
// 16 rows of 16 words of 32 bits, `row` words apart, transposed: word j of row i to to[j * stride + i].
inline void transpose16x16(const float* rows, std::int64_t row, float* to, std::int64_t stride = 16) {
  __m512 a[16], b[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) a[i] = _mm512_loadu_ps(rows + i * row);
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {
    b[i] = _mm512_unpacklo_ps(a[i], a[i + 1]);
    b[i + 1] = _mm512_unpackhi_ps(a[i], a[i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4)
#pragma GCC unroll 2
    for (int h = 0; h < 2; ++h) {  // columns 4 n + 2 h and the next, of four rows
      const __m512d x = _mm512_castps_pd(b[i + h]), y = _mm512_castps_pd(b[i + h + 2]);
      a[i + 2 * h] = _mm512_castpd_ps(_mm512_unpacklo_pd(x, y));
      a[i + 2 * h + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(x, y));
    }
#pragma GCC unroll 4
  for (int c = 0; c < 4; ++c) {  // quarters of what is now four rows of columns c, c + 4, c + 8, c + 12
    const __m512 x = _mm512_shuffle_f32x4(a[c], a[4 + c], 0x44), y = _mm512_shuffle_f32x4(a[c], a[4 + c], 0xee);
    const __m512 z = _mm512_shuffle_f32x4(a[8 + c], a[12 + c], 0x44),
                 w = _mm512_shuffle_f32x4(a[8 + c], a[12 + c], 0xee);
    _mm512_storeu_ps(to + c * stride, _mm512_shuffle_f32x4(x, z, 0x88));
    _mm512_storeu_ps(to + (4 + c) * stride, _mm512_shuffle_f32x4(x, z, 0xdd));
    _mm512_storeu_ps(to + (8 + c) * stride, _mm512_shuffle_f32x4(y, w, 0x88));
    _mm512_storeu_ps(to + (12 + c) * stride, _mm512_shuffle_f32x4(y, w, 0xdd));
  }
}
// Asks for the cache lines of [p, p + bytes) in L2.
inline void prefetch_to_l2(const void* p, std::int64_t bytes) {
  const char* const line = static_cast<const char*>(p);
  for (std::int64_t i = 0; i < bytes; i += 64) _mm_prefetch(line + i, _MM_HINT_T1);
}

}  // namespace qvl

#endif
