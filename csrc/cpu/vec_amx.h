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

}  // namespace qvl

#endif
