// New keys and values into a cache: cache[b, h, starts[b] + l] = x[b, h, l], converted to the cache's type.
//
// Regime: memory, or for one token the cost of a call: B Hkv L rows of D elements are read once and written once in the
// cache's type. int8: a row is read twice, the second time from L1: its largest magnitude, then x / s rounded to
// nearest even with s = max|x| / 127, the same division as the reference's, hence the same bits. A row beyond the
// cache's capacity is not written: `starts` is data, which may have changed since the call was checked.

#include <algorithm>

#include "../params.h"
#include "dispatch.h"
#include "parallel.h"
#include "vec.h"

namespace qvl::cpu {
namespace {

constexpr std::int64_t kPiece = 64;  // elements that are rounded at a time

template <class T, class S>
void convert(const T* from, std::int64_t n, S* to, float*) {
  using V = Vec<Acc<T>>;
  std::int64_t i = 0;
  for (; i + V::N <= n; i += V::N) store(to + i, load(from + i));
  if (const int rest = static_cast<int>(n - i); rest > 0) store(to + i, load(from + i, rest), rest);
}

template <class T>
void convert(const T* from, std::int64_t n, std::int8_t* to, float* scale) {
  using V = Vec<float>;
  V most = V::zero();
  for (std::int64_t i = 0; i < n; i += V::N) {
    const V x = i + V::N <= n ? load(from + i) : load(from + i, static_cast<int>(n - i));
    most = max(most, max(x, V::zero() - x));
  }
  *scale = largest(most) / 127;
  const V divisor(*scale > 0 ? *scale : 1.0f);
  for (std::int64_t at = 0; at < n; at += kPiece) {
    const std::int64_t count = std::min(kPiece, n - at);
    std::int16_t rounded[kPiece];
    for (std::int64_t i = 0; i < count; i += V::N) {
      const bool whole = i + V::N <= count;
      const V x = whole ? load(from + at + i) : load(from + at + i, static_cast<int>(count - i));
      store_rounded(rounded + i, x / divisor);
    }
    for (std::int64_t i = 0; i < count; ++i) to[at + i] = static_cast<std::int8_t>(rounded[i]);
  }
}

// One of keys and values: rows begin to end of B Hkv L.
template <class T, class S>
void append(const TensorView& x, const TensorView& cache, const TensorView& scale, const std::int64_t* starts,
            std::int64_t begin, std::int64_t end) {
  const std::int64_t heads = x.size[1], tokens = x.size[2];
  for (std::int64_t row = begin; row < end; ++row) {
    const std::int64_t b = row / (heads * tokens), h = row / tokens % heads, l = row % tokens, at = starts[b] + l;
    if (at < 0 || at >= cache.size[2]) continue;
    float* const s = scale.data == nullptr
                         ? nullptr
                         : scale.as<float>() + b * scale.stride[0] + h * scale.stride[1] + at * scale.stride[2];
    convert(x.as<T>() + b * x.stride[0] + h * x.stride[1] + l * x.stride[2], x.size[3],
            cache.as<S>() + b * cache.stride[0] + h * cache.stride[1] + at * cache.stride[2], s);
  }
}

template <class F>
void with_types(DType from, DType cache, const F& f) {
  with_storage_type(from, [&](auto t) {
    if constexpr (std::is_same_v<decltype(t), double>) {
      f(t, t);
    } else if (cache == DType::i8) {
      f(t, std::int8_t{});
    } else {
      with_storage_type(cache, [&](auto s) {
        if constexpr (!std::is_same_v<decltype(s), double>) f(t, s);
      });
    }
  });
}

}  // namespace

void append_kv(const AppendKvParams& p) {
  const std::int64_t rows = p.key.size[0] * p.key.size[1] * p.key.size[2];
  const std::int64_t* starts = p.starts.as<std::int64_t>();
  with_types(p.key.dtype, p.key_cache.dtype, [&](auto t, auto s) {
    using T = decltype(t);
    using S = decltype(s);
    parallel_for(rows, rows * (p.key.size[3] + p.value.size[3]), [&](std::int64_t begin, std::int64_t end) {
      append<T, S>(p.key, p.key_cache, p.key_scale, starts, begin, end);
      append<T, S>(p.value, p.value_cache, p.value_scale, starts, begin, end);
    });
  });
}

}  // namespace qvl::cpu
