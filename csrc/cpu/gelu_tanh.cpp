// GELU in its tanh form: y = x / 2 (1 + tanh(u)) = x / (1 + exp(-2 u)), u = sqrt(2 / pi) (x + 0.044715 x^3).
//
// The second form needs one exponential, and where 1 + tanh(u) cancels (x < -1) it keeps its digits. Regime: memory for
// an image, instructions for a few rows. 2 s bytes an element of s bytes; about 22 instructions and one division a
// vector.

#include "../params.h"
#include "dispatch.h"
#include "elementwise.h"
#include "vec.h"

namespace qvl::cpu {
namespace {

template <class A>
Vec<A> gelu(Vec<A> x) {
  constexpr A kMinusTwo = A(-1.5957691216057307117597842397375);  // -2 sqrt(2 / pi)
  constexpr A kCubic = A(0.044715) * kMinusTwo;
  const Vec<A> exponent = x * fma(x * x, Vec<A>(kCubic), Vec<A>(kMinusTwo));
  return x / (Vec<A>(A(1)) + exp(exponent));
}

template <class T>
void gelu(const T* x, T* y, std::int64_t n) {
  using V = Vec<Acc<T>>;
  std::int64_t i = 0;
#pragma GCC unroll 2
  for (; i + V::N <= n; i += V::N) store(y + i, gelu(load(x + i)));
  if (const int rest = static_cast<int>(n - i); rest > 0) store(y + i, gelu(load(x + i, rest)), rest);
}

}  // namespace

void gelu_tanh(const GeluTanhParams& p) {
  with_storage_type(p.y.dtype, [&](auto t) {
    using T = decltype(t);
    for_elements<2>({&p.x, &p.y}, [&](const RowWalk<2>& walk, std::int64_t n, std::int64_t from) {
      gelu(p.x.as<T>() + walk[0] + from, p.y.as<T>() + walk[1] + from, n);
    });
  });
}

}  // namespace qvl::cpu
