// Dot products of few rows of x with rows of W, for linear_decode.cpp: R rows of W are read side by side (`Streams`),
// and each meets M rows of x.
//
//   fp32, bf16   W in vectors along K, widened in registers, times up to kTile rows of x
//   int8         weights widened to int16, `vpmaddwd` (`vpdpwssd` with VNNI) with x, added up over a block of 128 in
//                int32 (128 / 16 times 2 * 127 * 32767 is below 2^31), then scaled into float sums
//   int4         four vectors of int16 from 64 (AVX-512: 128) weights take a shift, two swaps and four masks, since x
//                was put in their order when it was rounded (`Nibbles`). Low and high halves of a byte alternate in
//                each, so that one sum holds both groups and one product by alternating scales ends it: nine vector
//                instructions for a row of x, as for int8, six of them on the ports that multiply. High halves stay
//                where they are, 16 times the weight, and 1 / 16 is in the step. The minimum times the sum of a group
//                of x is a product over groups
//   int4, x in 8 bits    where the caller lets x be rounded, with a step for each 32: two vectors of unsigned bytes, in
//                which words of both groups alternate (`nibble_bytes`), take a swap, two shifts and two masks (VNNI: no
//                shifts); two `vpmaddubsw`, added in 16 bits, and `vpmaddwd` with ones (VNNI: two `vpdpbusd`) multiply
//                them: five instructions and six for each row of x, instead of eight and nine
//
// Software asks for lines kAhead bytes ahead, all streams together.
#pragma once

#include "linear.h"

namespace qvl::cpu {

constexpr std::int64_t kAhead = 4096;  // bytes of prefetch: what memory delivers in its latency
constexpr std::int64_t kScales = 64;   // of a row of weights, brought into floats at once

// Rows n, n + apart, ... of the weights, which are read side by side.
struct Streams {
  std::int64_t n, apart;
  const char* first;
  std::int64_t bytes;  // of a row

  template <class W>
  const W* row(int r) const {
    return reinterpret_cast<const W*>(first + r * apart * bytes);
  }
};

// Asks for the lines that are read kAhead bytes after `at` in each stream.
template <int R>
[[gnu::always_inline]] inline void ask(const Streams& w, std::int64_t at) {
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) prefetch_line(w.row<char>(r) + at + kAhead / R);
}

// R rows of weights times M rows of x, `x_row` apart.
template <class W, int M, int R>
void dot_floats(const Streams& w, std::int64_t k, const float* x, std::int64_t x_row, Vec<float> (&acc)[R * M]) {
  using V = Vec<float>;
  constexpr std::int64_t kLine = 64 / sizeof(W);
  std::int64_t i = 0;
  for (; i + kLine <= k; i += kLine) {
    ask<R>(w, i * static_cast<std::int64_t>(sizeof(W)));
#pragma GCC unroll 4
    for (int part = 0; part < kLine; part += V::N) {
      V b[M];
#pragma GCC unroll 4
      for (int m = 0; m < M; ++m) b[m] = load(x + m * x_row + i + part);
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) {
        const V a = load(w.row<W>(r) + i + part);
#pragma GCC unroll 4
        for (int m = 0; m < M; ++m) acc[r * M + m] = fma(a, b[m], acc[r * M + m]);
      }
    }
  }
  for (; i < k; i += V::N)
    for (int r = 0; r < R; ++r) {
      const V a = load_up_to(w.row<W>(r) + i, k - i);
      for (int m = 0; m < M; ++m) acc[r * M + m] = fma(a, load(x + m * x_row + i), acc[r * M + m]);
    }
}

// Bytes [begin, end) of the rows of weights, and all of x, its rows x_row apart.
template <class X>
struct Piece {
  std::int64_t begin, end;
  const X* x;
  std::int64_t x_row;
};

// `scaled` are the scales of the piece times the steps of x, of each row of weights for each of x.
template <int M, int R, bool kVnni>
[[gnu::always_inline]] inline void dot_int8(const Streams& w, const Piece<std::int16_t>& piece,
                                            const float (&scaled)[R * M][kScales], Vec<float> (&acc)[R * M]) {
  const float* scale = scaled[0];
  for (std::int64_t b = piece.begin; b < piece.end; b += kBlock, ++scale) {
    ask<R>(w, b);
    ask<R>(w, b + 64);
    Ints total[R * M];
#pragma GCC unroll 8
    for (auto& t : total) t = no_ints();
#pragma GCC unroll 8
    for (int i = 0; i < kBlock; i += Words::N) {
      Words part[M];
#pragma GCC unroll 8
      for (int m = 0; m < M; ++m) part[m] = words(piece.x + m * piece.x_row + b + i);
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) {
        const Words a = words(w.row<std::int8_t>(r) + b + i);
#pragma GCC unroll 8
        for (int m = 0; m < M; ++m) total[r * M + m] = add_products<kVnni>(total[r * M + m], a, part[m]);
      }
    }
#pragma GCC unroll 8
    for (int j = 0; j < R * M; ++j) acc[j] = fma(to_float(total[j]), Vec<float>(scale[j * kScales]), acc[j]);
  }
}

template <int M, int R, bool kVnni, class X>
[[gnu::always_inline]] inline void dot_int4(const Streams& w, const Piece<X>& piece,
                                            const float (&scaled)[R * M][kScales], Vec<float> (&acc)[R * M]) {
  constexpr int kBytes = Nibbles::kBytes;
  const auto weights = [](const std::uint8_t* p) __attribute__((always_inline)) {
    if constexpr (std::is_same_v<X, std::int8_t>)
      return nibble_bytes<kVnni>(p);
    else
      return nibbles(p);
  };
  const float* scale = scaled[0];
  for (std::int64_t line = piece.begin; line < piece.end; line += 64) {
    ask<R>(w, line);
#pragma GCC unroll 2
    for (int i = 0; i < 64; i += kBytes, scale += kBytes / 16) {
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) {
        const auto a = weights(w.row<std::uint8_t>(r) + line + i);
#pragma GCC unroll 8
        for (int m = 0; m < M; ++m) {
          const Ints sum = dot_nibbles<kVnni>(a, piece.x + m * piece.x_row + 2 * line + 2 * i);
          acc[r * M + m] = add_scaled(sum, scale + (r * M + m) * kScales, acc[r * M + m]);
        }
      }
    }
  }
}

}  // namespace qvl::cpu
