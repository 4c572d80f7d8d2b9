// The roofs that the benches relate every figure to, measured as plainly as they can be: what this machine's vector
// units and its memory do when nothing is in the way.

#include "../params.h"
#include "parallel.h"
#include "vec_amx.h"
#include "vec_linear.h"

namespace qvl::cpu {

// `steps` times 12 independent fused multiply-adds of one vector on every thread; 12 hide a latency of 4 on two units.
// Returns the FLOPs. The sum goes to `sink`, so that nothing is optimised away.
double fma_loop(std::int64_t steps, std::int64_t threads, float* sink) {
  using V = Vec<float>;
  parallel_for(threads, kSerialElements, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t thread = begin; thread < end; ++thread) {
      V acc[12], x(0.999f), y(1e-3f);
      for (int i = 0; i < 12; ++i) acc[i] = V(static_cast<float>(i));  // equal ones would be computed once
      for (std::int64_t i = 0; i < steps; ++i)
#pragma GCC unroll 12
        for (auto& a : acc) a = fma(a, x, y);
      V total = V::zero();
      for (const auto& a : acc) total = total + a;
      sink[thread] = sum(total);
    }
  });
  return 2.0 * V::N * 12 * static_cast<double>(steps) * static_cast<double>(threads);
}

// What hides the latency of 5 on two units, and without VNNI, where only an addition of latency 1 follows itself, what
// the registers hold.
template <bool kVnni>
constexpr int kInt8Sums = kVnni ? 10 : 6;

template <bool kVnni>
void int8_steps(std::int64_t steps, float* sink) {
  constexpr int kSums = kInt8Sums<kVnni>;
  IntVec acc[kSums], x = repeat_pair(sink), y = repeat_pair(sink + 1);
  for (int i = 0; i < kSums; ++i) acc[i] = repeat_pair(sink + i % 2);
  for (std::int64_t i = 0; i < steps; ++i) {
#pragma GCC unroll 10
    for (auto& a : acc) {
      a = add_dot_bytes<kVnni>(a, x, y);
      keep(x);  // else the product, the same for all sums, would be computed once
    }
  }
  IntVec total = acc[0];
  for (int i = 1; i < kSums; ++i) total = add_dot_bytes<kVnni>(total, acc[i], y);
  *sink = sum(to_float(total));
}

// The same with products of 8-bit integers, summed in 32 bits: `vpdpbusd` where the CPU has it, else `vpmaddubsw`,
// `vpmaddwd` and `vpaddd`. What 8-bit weights could reach with 8-bit (7-bit, without VNNI) activations.
double int8_loop(std::int64_t steps, std::int64_t threads, float* sink) {
  parallel_for(threads, kSerialElements, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t thread = begin; thread < end; ++thread) {
      float own[2] = {1.0f, 2.0f};
      if (has_vnni())
        int8_steps<true>(steps, own);
      else
        int8_steps<false>(steps, own);
      sink[thread] = own[0];
    }
  });
  const int sums = has_vnni() ? kInt8Sums<true> : kInt8Sums<false>;
  return 2.0 * 4 * IntVec::N * sums * static_cast<double>(steps) * static_cast<double>(threads);
}

#if defined(__AVX512F__)

// Four independent sums hide the latency of 52 cycles behind 16 each.
float amx_steps(std::int64_t steps) {
  alignas(64) static constexpr float kZeros[kTileRows * kTileBytes / 4] = {};
  alignas(64) float made[kTileRows * kTileBytes / 4];
  const Tiles tiles;
  load_tile_register<4>(kZeros), load_tile_register<5>(kZeros);
  load_tile_register<6>(kZeros), load_tile_register<7>(kZeros);
  clear_sums();
  for (std::int64_t i = 0; i < steps; ++i) {
    dot_halves<0, 4, 6>();
    dot_halves<1, 4, 7>();
    dot_halves<2, 5, 6>();
    dot_halves<3, 5, 7>();
  }
  store_tile_register<0>(made);
  return made[0];
}

float dot_steps(std::int64_t steps) {
  Vec<float> acc[12];
  IntVec x = repeat_byte(0);
  clear(acc);
  for (std::int64_t i = 0; i < steps; ++i)
#pragma GCC unroll 12
    for (auto& a : acc) {
      a = add_dot_halves(a, x, x);
      keep(x);
    }
  Vec<float> total = Vec<float>::zero();
  for (const auto& a : acc) total = total + a;
  return sum(total);
}

#endif

// The same with products of bfloat16: of AMX's registers, or `vdpbf16ps` where that takes no longer than an FMA; 0
// where the CPU has nothing for them and FMAs are what there is.
double bf16_loop(std::int64_t steps, std::int64_t threads, float* sink) {
#if defined(__AVX512F__)
  const bool amx = has_amx();
  if (!amx && !has_fast_bf16()) return 0.0;
  parallel_for(threads, kSerialElements, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t thread = begin; thread < end; ++thread) sink[thread] = amx ? amx_steps(steps) : dot_steps(steps);
  });
  return (amx ? 4.0 * 2 * kTileRows * kTileRows * kTileHalves : 12.0 * 4 * Vec<float>::N) * static_cast<double>(steps) *
         static_cast<double>(threads);
#else
  (void)steps, (void)threads, (void)sink;
  return 0.0;
#endif
}

// Reads n floats once, each thread its own part, 8 vectors in flight.
void read_loop(const float* data, std::int64_t n, std::int64_t threads, float* sink) {
  using V = Vec<float>;
  parallel_for(threads, n, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t thread = begin; thread < end; ++thread) {
      const std::int64_t from = n / threads * thread, to = from + n / threads;
      V acc[8];
      clear(acc);
      for (std::int64_t i = from; i + 8 * V::N <= to; i += 8 * V::N)
#pragma GCC unroll 8
        for (int j = 0; j < 8; ++j) acc[j] = acc[j] + load(data + i + j * V::N);
      V total = V::zero();
      for (const auto& a : acc) total = total + a;
      sink[thread] = sum(total);
    }
  });
}

}  // namespace qvl::cpu
