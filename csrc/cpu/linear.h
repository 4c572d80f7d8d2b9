// What the linear kernels share: weights as floats, rows of x as integers, and the epilogue.
#pragma once

#include "attention_tiles.h"
#include "vec_nibbles.h"

namespace qvl::cpu {

constexpr int kBlock = 128;             // along K: the group of int8, four groups of int4, and what shares a scale of x
constexpr std::int64_t kOutputs = 128;  // of a task of linear.cpp: the distance between its rows of sums

inline bool is_quantized(const PackedLinearParams& p) { return p.scale.data != nullptr; }

// linear_decode.cpp: few rows of x, where reading the weights is all that costs. For so few only x that meets int4 is
// rounded because of `PackedLinearParams::rounded`.
constexpr std::int64_t kDecodeRows = 16;  // at least
bool is_linear_decode(const PackedLinearParams& p);
std::int64_t linear_decode_scratch_bytes(const PackedLinearParams& p);
void linear_decode(const PackedLinearParams& p, std::int64_t threads);

// linear_floats.cpp: more rows, products of floats.
std::int64_t linear_floats_scratch_bytes(const PackedLinearParams& p, std::int64_t threads);
void linear_floats(const PackedLinearParams& p, std::int64_t threads);

// Calls f(T{}) with the type of x, one of the three narrow ones.
template <class F>
void with_x_type(DType dtype, const F& f) {
  with_storage_type(dtype, [&](auto t) {
    if constexpr (!std::is_same_v<decltype(t), double>) f(t);
  });
}

inline float to_float(bf16 x) {
  const std::uint32_t bits = static_cast<std::uint32_t>(x.bits) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

inline float bf16_at(const TensorView& t, std::int64_t i) { return to_float(t.as<bf16>()[i]); }

// W[n, k0 ... k0 + count) as floats, and zeros up to `padded`. Quantised rows: k0 at a multiple of 16 or of the vector,
// and up to a whole vector more than `count` is decoded.
inline void decode(const PackedLinearParams& p, std::int64_t n, std::int64_t k0, std::int64_t count,
                   std::int64_t padded, float* to) {
  using V = Vec<float>;
  const std::int64_t width = p.weight.size[1];
  if (p.weight.dtype == DType::f32) return widen(p.weight.as<float>() + n * width + k0, count, padded, to);
  if (p.weight.dtype == DType::bf16) return widen(p.weight.as<bf16>() + n * width + k0, count, padded, to);
  const std::int64_t groups = p.scale.size[1];
  for (std::int64_t i = 0; i < count; i += V::N) {
    const std::int64_t k = k0 + i;
    if (p.weight.dtype == DType::i8) {
      const V scale(bf16_at(p.scale, n * groups + k / kBlock));
      store(to + i, load(p.weight.as<std::int8_t>() + n * width + k) * scale);
    } else {
      const std::int64_t group = n * groups + k / 32;
      const std::uint8_t* const bytes = p.weight.as<std::uint8_t>() + n * width + k / 64 * 32 + k % 32;
      const V quants = k % 64 < 32 ? low_halves(bytes) : high_halves(bytes);
      store(to + i, fma(quants, V(bf16_at(p.scale, group)), V(bf16_at(p.minimum, group))));
    }
  }
  std::fill(to + count, to + std::max(padded, count), 0.0f);
}

inline float quantize_block(const float* x, float limit, std::int16_t* q) { return quantize(x, kBlock, limit, q); }

// kBlock numbers of a row of x (of the last where there are fewer) from k on, and zeros beyond its end.
template <class T>
void widen_x(const PackedLinearParams& p, std::int64_t row, std::int64_t k, float* wide) {
  const T* const from = p.x.as<T>() + std::min(row, p.x.size[0] - 1) * p.x.stride[0] + k;
  widen(from, std::min<std::int64_t>(kBlock, p.x.size[1] - k), kBlock, wide);
}

// The same as integers, as above.
template <class T>
float quantize_x(const PackedLinearParams& p, std::int64_t row, std::int64_t k, float limit, std::int16_t* q) {
  float wide[kBlock];
  widen_x<T>(p, row, k, wide);
  return quantize_block(wide, limit, q);
}

// `count` words of 32 bits (of rows that have kWords) of eight rows, transposed to place j of a panel or a strip; `to`
// has room for eight in a word.
template <int kWords>
void transpose_words(const float (*rows)[kWords], std::int64_t count, float* to, std::int64_t stride) {
  for (std::int64_t i = 0; i < count; i += 8) {
    const float* from[8];
    for (int j = 0; j < 8; ++j) from[j] = rows[j] + i;
    transpose8x8(from, to + i * stride, stride);
  }
}

// kBlock int8 or int4 weights of a row of W from k on as bytes, `second64` being where the last 64 go; returns their
// scale. int4 weights are rounded again, with one step for their four groups: 1 / 127 of the largest of the 64 numbers
// that they can be.
inline float bytes_of_row(const PackedLinearParams& p, std::int64_t n, std::int64_t k, std::int8_t* first64,
                          std::int8_t* second64) {
  using V = Vec<float>;
  if (p.weight.dtype == DType::i8) {
    const std::int8_t* const w = p.weight.as<std::int8_t>() + n * p.weight.size[1] + k;
    std::memcpy(first64, w, kBlock / 2);
    std::memcpy(second64, w + kBlock / 2, kBlock / 2);
    return bf16_at(p.scale, n * p.scale.size[1] + k / kBlock);
  }
  constexpr int kGroup = 32, kGroups = kBlock / kGroup;
  const std::int64_t group = n * p.scale.size[1] + k / kGroup;
  const V scale = load(p.scale.as<bf16>() + group, kGroups), minimum = load(p.minimum.as<bf16>() + group, kGroups);
  const V end = fma(scale, V(15.0f), minimum);
  const float most = largest(max(max(minimum, V::zero() - minimum), max(end, V::zero() - end)));
  const V inverse(most > 1e-30f ? 127.0f / most : 0.0f);
  float scales[V::N], minima[V::N];
  store(scales, scale * inverse), store(minima, minimum * inverse);
  nibbles_as_bytes(p.weight.as<std::uint8_t>() + n * p.weight.size[1] + k / 2, scales, minima, first64, second64);
  return most / 127.0f;
}

// kBlock weights from k on of `width` rows of W, of which there are `outputs` from `first` on or the last is repeated:
// words of four to a panel [kBlock / 4][width], and their scales.
inline void fill_bytes(const PackedLinearParams& p, std::int64_t first, std::int64_t outputs, std::int64_t k, int width,
                       float* panel, float* scales) {
  float words[8][kBlock / 4];
  for (int j = 0; j < width; j += 8) {
    for (int i = 0; i < 8; ++i) {
      const std::int64_t n = first + std::min<std::int64_t>(j + i, outputs - 1);
      std::int8_t* const bytes = reinterpret_cast<std::int8_t*>(words[i]);
      scales[j + i] = bytes_of_row(p, n, k, bytes, bytes + kBlock / 2);
    }
    transpose_words(words, kBlock / 4, panel + j, width);
  }
}

// y[row, first ... first + count) from sums of products; `up` are those of the second half with SwiGLU. What is read
// of the sums are whole vectors.
template <class T>
void finish(const PackedLinearParams& p, std::int64_t row, std::int64_t first, std::int64_t count, const float* sums,
            const float* up) {
  using V = Vec<float>;
  const std::int64_t outputs = p.y.size[1], at = row * outputs + first;
  const float* const bias = p.bias.data == nullptr ? nullptr : p.bias.as<float>() + first;
  const T* const residual = p.residual.data == nullptr ? nullptr : p.residual.as<T>() + at;
  T* const to = p.y.as<T>() + at;
  const auto step = [&](std::int64_t i, std::int64_t n) __attribute__((always_inline)) {
    V y = load(sums + i);
    if (bias != nullptr) y = y + load_up_to(bias + i, n);
    if (p.activation == Activation::gelu_tanh) {
      const V inner = y * fma(y * y, V(1.5957691216057308f * 0.044715f), V(1.5957691216057308f));  // 2 sqrt(2 / pi)
      y = y * sigmoid(inner);
    } else if (p.activation == Activation::swiglu) {
      V u = load(up + i);
      if (bias != nullptr) u = u + load_up_to(bias + outputs + i, n);
      y = y * sigmoid(y) * u;
    }
    if (residual != nullptr) y = y + load_up_to(residual + i, n);
    if (n == V::N)
      store(to + i, y);
    else
      store(to + i, y, static_cast<int>(n));
  };
  std::int64_t i = 0;
  for (; i + V::N <= count; i += V::N) step(i, V::N);
  if (i < count) step(i, count - i);
}

}  // namespace qvl::cpu
