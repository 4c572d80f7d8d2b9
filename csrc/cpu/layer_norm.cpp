// LayerNorm of (rows, C), optionally of a sum x + residual that is written too.
//
// Regime: memory. Reads x (and residual) once from memory and writes y (and h) once: 2 (4) C s bytes a row for s bytes
// an element. Three passes over a row (sum, squares of what is left without the mean, output): the last two find it in
// L1, and two passes for mean and variance do not cancel as mean(h^2) - mean(h)^2 does. Work is split over rows; a row
// is never split, so results do not depend on threads. Four accumulators hide the latency of the additions.

#include <cmath>

#include "../params.h"
#include "../rows.h"
#include "dispatch.h"
#include "parallel.h"
#include "vec.h"

namespace qvl::cpu {
namespace {

// The sum of f(c, n) over a row: n elements from c on, n = N but for the last.
template <class A, class F>
A row_sum(std::int64_t channels, const F& f) {
  using V = Vec<A>;
  V total[4];
  clear(total);
  std::int64_t c = 0;
  for (; c + 4 * V::N <= channels; c += 4 * V::N)
    for (int i = 0; i < 4; ++i) total[i] = total[i] + f(c + i * V::N, V::N);
  for (; c + V::N <= channels; c += V::N) total[0] = total[0] + f(c, V::N);
  if (const int rest = static_cast<int>(channels - c); rest > 0) total[1] = total[1] + f(c, rest);
  return sum((total[0] + total[1]) + (total[2] + total[3]));
}

// h = x + residual rounded to T, stored; returns the sum of h.
template <class T>
Acc<T> add_and_sum(const T* x, const T* residual, T* hidden, std::int64_t channels) {
  using V = Vec<Acc<T>>;
  if (residual == nullptr)
    return row_sum<Acc<T>>(channels, [&](std::int64_t c, int n) { return n == V::N ? load(x + c) : load(x + c, n); });
  return row_sum<Acc<T>>(channels, [&](std::int64_t c, int n) {
    if (n == V::N) {
      const V h = load(x + c) + load(residual + c);
      store(hidden + c, h);
      return rounded_to(hidden, h);
    }
    const V h = load(x + c, n) + load(residual + c, n);
    store(hidden + c, h, n);
    return rounded_to(hidden, h);
  });
}

// The sum of (h - mean)^2.
template <class T>
Acc<T> centred_square(const T* hidden, Acc<T> mean, std::int64_t channels) {
  using V = Vec<Acc<T>>;
  const V m(mean);
  return row_sum<Acc<T>>(channels, [&](std::int64_t c, int n) {
    const V d = (n == V::N ? load(hidden + c) : load(hidden + c, n)) - (n == V::N ? m : first_lanes(m, n));
    return d * d;
  });
}

// y = (h - mean) rstd w + b
template <class T>
void scale_row(const T* hidden, const LayerNormParams& p, Acc<T> mean, Acc<T> rstd, T* y) {
  using V = Vec<Acc<T>>;
  const std::int64_t channels = p.weight.size[0];
  const T *weight = p.weight.as<T>(), *bias = p.bias.as<T>();
  const V m(mean), r(rstd);
  std::int64_t c = 0;
  for (; c + V::N <= channels; c += V::N)
    store(y + c, fma((load(hidden + c) - m) * r, load(weight + c), load(bias + c)));
  if (const int rest = static_cast<int>(channels - c); rest > 0)
    store(y + c, fma((load(hidden + c, rest) - m) * r, load(weight + c, rest), load(bias + c, rest)), rest);
}

template <class T>
void forward(const LayerNormParams& p) {
  using A = Acc<T>;
  const std::int64_t channels = p.weight.size[0], rows = channels ? p.y.numel() / channels : 0;
  const RowWalk<4> start({&p.x, &p.residual, &p.y, &p.hidden});
  parallel_for(rows, rows * channels, [&](std::int64_t begin, std::int64_t end) {
    RowWalk<4> walk = start;
    walk.seek(begin);
    for (std::int64_t row = begin; row < end; ++row, walk.next()) {
      const T* x = p.x.as<T>() + walk[0];
      const T* residual = p.residual.data ? p.residual.as<T>() + walk[1] : nullptr;
      T* hidden = residual ? p.hidden.as<T>() + walk[3] : nullptr;
      const A mean = add_and_sum(x, residual, hidden, channels) / static_cast<A>(channels);
      const T* h = residual ? hidden : x;
      const A variance = centred_square(h, mean, channels) / static_cast<A>(channels);
      scale_row(h, p, mean, 1 / std::sqrt(variance + static_cast<A>(p.eps)), p.y.as<T>() + walk[2]);
    }
  });
}

}  // namespace

void layer_norm(const LayerNormParams& p) {
  with_storage_type(p.x.dtype, [&](auto t) { forward<decltype(t)>(p); });
}

}  // namespace qvl::cpu
