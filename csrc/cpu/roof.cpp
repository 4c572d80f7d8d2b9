// The roofs that the benches relate every figure to, measured as plainly as they can be: what this machine's vector
// units and its memory do when nothing is in the way.

#include "../params.h"
#include "parallel.h"
#include "vec.h"

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
