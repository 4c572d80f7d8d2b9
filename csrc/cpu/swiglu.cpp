// SwiGLU: y = gate / (1 + exp(-gate)) up.
//
// Regime: memory for a prompt, instructions for a decode step. Reads gate and up once and writes y once: 3 s bytes an
// element of s bytes, against 5 s for silu and a product one after the other; about 20 instructions and one division a
// vector. exp overflows to infinity below gate = -88.7, and y is -0 there, as torch's is. Two vectors at a time hide
// the 60 cycles from a load to its store on cores that reorder little.

#include "../params.h"
#include "dispatch.h"
#include "elementwise.h"
#include "vec.h"

namespace qvl::cpu {
namespace {

template <class A>
Vec<A> activate(Vec<A> gate, Vec<A> up) {
  return gate / (Vec<A>(A(1)) + exp(Vec<A>::zero() - gate)) * up;
}

template <class T>
void activate(const T* gate, const T* up, T* y, std::int64_t n) {
  using V = Vec<Acc<T>>;
  std::int64_t i = 0;
#pragma GCC unroll 2
  for (; i + V::N <= n; i += V::N) store(y + i, activate(load(gate + i), load(up + i)));
  if (const int rest = static_cast<int>(n - i); rest > 0)
    store(y + i, activate(load(gate + i, rest), load(up + i, rest)), rest);
}

}  // namespace

void swiglu(const SwigluParams& p) {
  with_storage_type(p.y.dtype, [&](auto t) {
    using T = decltype(t);
    for_elements<3>({&p.gate, &p.up, &p.y}, [&](const RowWalk<3>& walk, std::int64_t n, std::int64_t from) {
      activate(p.gate.as<T>() + walk[0] + from, p.up.as<T>() + walk[1] + from, p.y.as<T>() + walk[2] + from, n);
    });
  });
}

}  // namespace qvl::cpu
