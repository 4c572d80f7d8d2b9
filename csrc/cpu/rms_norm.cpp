// RMSNorm of (rows, C), forward and backward.
//
// Regime: memory. Forward reads x (and residual) once from memory and writes y (and h) once: 2 (4) C s bytes a row for
// s bytes an element, against 5 (8) for separate add, square-mean and scale passes. The second pass over a row finds it
// in cache: C = 8192 floats are 32 KiB, the size of L1. Work is split over rows; a row is never split, so results do
// not depend on threads. Four accumulators hide the latency of the FMA (4 cycles, 2 a cycle, but two loads feed each: 4
// are enough).

#include <algorithm>
#include <cmath>

#include "../params.h"
#include "../rows.h"
#include "dispatch.h"
#include "parallel.h"
#include "vec.h"

namespace qvl::cpu {
namespace {

// h = x + residual rounded to T, stored when there is a residual; returns the sum of h^2.
template <class T>
Acc<T> add_and_square(const T* x, const T* residual, T* hidden, std::int64_t channels) {
  using V = Vec<Acc<T>>;
  const auto element = [&](std::int64_t c) {
    if (residual == nullptr) return load(x + c);
    const V h = load(x + c) + load(residual + c);
    store(hidden + c, h);
    return rounded_to(hidden, h);
  };
  V square[4];
  clear(square);
  std::int64_t c = 0;
  for (; c + 4 * V::N <= channels; c += 4 * V::N)
    for (int i = 0; i < 4; ++i) {
      const V h = element(c + i * V::N);
      square[i] = fma(h, h, square[i]);
    }
  for (; c + V::N <= channels; c += V::N) {
    const V h = element(c);
    square[0] = fma(h, h, square[0]);
  }
  if (const int rest = static_cast<int>(channels - c); rest > 0) {
    V h = load(x + c, rest);
    if (residual != nullptr) {
      h = h + load(residual + c, rest);
      store(hidden + c, h, rest);
      h = rounded_to(hidden, h);
    }
    square[1] = fma(h, h, square[1]);
  }
  return sum((square[0] + square[1]) + (square[2] + square[3]));
}

// y = h rstd w
template <class T>
void scale_row(const T* hidden, const T* weight, Acc<T> rstd, T* y, std::int64_t channels) {
  using V = Vec<Acc<T>>;
  const V r(rstd);
  std::int64_t c = 0;
  for (; c + V::N <= channels; c += V::N) store(y + c, load(hidden + c) * r * load(weight + c));
  if (const int rest = static_cast<int>(channels - c); rest > 0)
    store(y + c, load(hidden + c, rest) * r * load(weight + c, rest), rest);
}

template <class T>
void forward(const RmsNormParams& p) {
  const std::int64_t channels = p.weight.size[0], rows = channels ? p.y.numel() / channels : 0;
  const Rows x_rows(p.x), residual_rows(p.residual);
  parallel_for(rows, rows * channels, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t row = begin; row < end; ++row) {
      const T* x = p.x.as<T>() + x_rows.offset(row);
      const T* residual = p.residual.data ? p.residual.as<T>() + residual_rows.offset(row) : nullptr;
      T* hidden = residual ? p.hidden.as<T>() + row * channels : nullptr;
      const Acc<T> square = add_and_square(x, residual, hidden, channels);
      const Acc<T> rstd = 1 / std::sqrt(square / static_cast<Acc<T>>(channels) + static_cast<Acc<T>>(p.eps));
      scale_row(residual ? hidden : x, p.weight.as<T>(), rstd, p.y.as<T>() + row * channels, channels);
      if (p.rstd.data) p.rstd.as<Acc<T>>()[row] = rstd;
    }
  });
}

// Adds grad_y h rstd to the chunk's weight gradient and returns sum(grad_y w h rstd).
template <class T>
Acc<T> project(const T* grad_y, const T* hidden, const T* weight, Acc<T> rstd, Acc<T>* grad_weight,
               std::int64_t channels) {
  using V = Vec<Acc<T>>;
  const V r(rstd);
  V dot = V::zero();
  std::int64_t c = 0;
  for (; c + V::N <= channels; c += V::N) {
    const V g = load(grad_y + c) * (load(hidden + c) * r);
    store(grad_weight + c, load(grad_weight + c) + g);
    dot = fma(g, load(weight + c), dot);
  }
  if (const int rest = static_cast<int>(channels - c); rest > 0) {
    const V g = load(grad_y + c, rest) * (load(hidden + c, rest) * r);
    store(grad_weight + c, load(grad_weight + c, rest) + g, rest);
    dot = fma(g, load(weight + c, rest), dot);
  }
  return sum(dot);
}

// grad_x = rstd (grad_y w - h rstd mean) + grad_hidden
template <class T>
void input_gradient(const T* grad_y, const T* grad_hidden, const T* hidden, const T* weight, Acc<T> rstd, Acc<T> mean,
                    T* grad_x, std::int64_t channels) {
  using V = Vec<Acc<T>>;
  const V r(rstd), shrink(-rstd * rstd * mean);
  std::int64_t c = 0;
  for (; c + V::N <= channels; c += V::N) {
    V g = fma(load(grad_y + c) * load(weight + c), r, load(hidden + c) * shrink);
    if (grad_hidden != nullptr) g = g + load(grad_hidden + c);
    store(grad_x + c, g);
  }
  if (const int rest = static_cast<int>(channels - c); rest > 0) {
    V g = fma(load(grad_y + c, rest) * load(weight + c, rest), r, load(hidden + c, rest) * shrink);
    if (grad_hidden != nullptr) g = g + load(grad_hidden + c, rest);
    store(grad_x + c, g, rest);
  }
}

// The sum over rows is made in two steps, chunks of rows and then their partial sums, so that its order, and with it
// every bit of the result, is the same for any number of threads.
template <class T>
void backward(const RmsNormBackwardParams& p) {
  using A = Acc<T>;
  using V = Vec<A>;
  const std::int64_t channels = p.weight.size[0], rows = channels ? p.hidden.numel() / channels : 0;
  const std::int64_t chunks = p.partial.size[0];
  const Rows grad_y_rows(p.grad_y), grad_hidden_rows(p.grad_hidden), hidden_rows(p.hidden);
  A* partial = p.partial.as<A>();
  parallel_for(chunks, rows * channels, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t chunk = begin; chunk < end; ++chunk) {
      std::fill_n(partial + chunk * channels, channels, A(0));
      for (std::int64_t row = rows * chunk / chunks; row < rows * (chunk + 1) / chunks; ++row) {
        const T* grad_y = p.grad_y.as<T>() + grad_y_rows.offset(row);
        const T* hidden = p.hidden.as<T>() + hidden_rows.offset(row);
        const T* grad_hidden = p.grad_hidden.data ? p.grad_hidden.as<T>() + grad_hidden_rows.offset(row) : nullptr;
        const A rstd = p.rstd.as<A>()[row];
        const A dot = project(grad_y, hidden, p.weight.as<T>(), rstd, partial + chunk * channels, channels);
        input_gradient(grad_y, grad_hidden, hidden, p.weight.as<T>(), rstd, dot / static_cast<A>(channels),
                       p.grad_x.as<T>() + row * channels, channels);
      }
    }
  });
  T* grad_weight = p.grad_weight.as<T>();
  for (std::int64_t c = 0; c < channels; c += V::N) {
    const int n = static_cast<int>(std::min<std::int64_t>(V::N, channels - c));
    V total = V::zero();
    for (std::int64_t chunk = 0; chunk < chunks; ++chunk) {
      const A* from = partial + chunk * channels + c;
      total = total + (n == V::N ? load(from) : load(from, n));
    }
    if (n == V::N)
      store(grad_weight + c, total);
    else
      store(grad_weight + c, total, n);
  }
}

}  // namespace

void rms_norm(const RmsNormParams& p) {
  with_storage_type(p.x.dtype, [&](auto t) { forward<decltype(t)>(p); });
}

void rms_norm_backward(const RmsNormBackwardParams& p) {
  with_storage_type(p.hidden.dtype, [&](auto t) { backward<decltype(t)>(p); });
}

}  // namespace qvl::cpu
