// y = x W^T for few rows of x: every weight is read once, and reading is all that may cost.
//
// Regime: M = 1 to kDecodeRows, of integers to 48 on some CPUs, 2 M FLOPs for each weight of 4, 2, 1.02 or 0.63 bytes.
// x is prepared once, as float32 or, for quantised weights, as int16 with a step for each 128 (M K 2 bytes, in L1 or
// L2); 16 bits lose almost nothing (2^-16 of a block's largest). With int4 they may be 8 bits: 0.6 % of a normal
// product, a twelfth of what int4 itself has lost.
//
//   streams      a thread has a contiguous range of outputs in R parts and reads a row of each part side by side: R = 4
//                for M = 1, 2 for M = 2, for floats and int8 with AVX-512, for x in 8 bits always 2, else 1, M sums
//                then being enough. What is loaded of x serves R rows, R sums hide each other's latency, and memory
//                sees R sequential streams in R pages. Neighbouring rows side by side would lie in one page, where the
//                prefetcher of the CPU follows one of them: half the bandwidth
//
// linear_dots.h has the products by kind of weights. More rows of x than kTile pass the weights of a strip again, from
// L2.

#include <numeric>

#include "linear_dots.h"
#include "parallel.h"

namespace qvl::cpu {
namespace {

constexpr std::int64_t kChunk = 32;  // outputs of a stream whose sums are finished together, at most
constexpr int kMostSums = 64;        // rows of x times streams

// Rows of x whose sums are registers together. With AVX-512 and int4 twice as many, which share what it takes to widen
// weights, if x has at most kShort numbers: more would not fit L1. Of int8, which has two sets of sums, and of floats,
// whose x is float32, eight took longer.
constexpr int kTile = 4;
constexpr std::int64_t kShort = 3072;
template <class W>
constexpr bool kTallTile = Vec<float>::N == 16 && std::is_same_v<W, std::uint8_t>;

constexpr float kLimit = 32767.0f, kRoundedLimit = 127.0f;

// Where things lie in scratch, in floats. `stride` is what a row of x has of each group.
struct Layout {
  std::int64_t width, groups, stride;
  std::int64_t x, step, sum, size;

  explicit Layout(const PackedLinearParams& p) {
    const std::int64_t rows = p.x.size[0], k = p.x.size[1];
    Pieces pieces;
    width = round_up(k, kBlock), groups = is_quantized(p) ? p.scale.size[1] : 0, stride = round_up(groups, 16);
    x = pieces.take(rows * width);
    step = pieces.take(rows * stride);
    sum = pieces.take(rows * stride);
    size = pieces.size();
  }
};

// to[i * kChunk] is the sum of acc[i]. Whatever N is, a sum is taken in the same order: an output is the same however
// many are computed together, and with it for every number of threads.
template <int N>
[[gnu::always_inline]] inline void store_sums(const Vec<float> (&acc)[N], float* to) {
#pragma GCC unroll 4
  for (int i = 0; i < N; i += 4) {
    float four[4];
    four_sums(acc[i], acc[i + 1 < N ? i + 1 : i], acc[i + 2 < N ? i + 2 : i], acc[i + 3 < N ? i + 3 : i], four);
    for (int j = 0; j < 4 && i + j < N; ++j) to[(i + j) * kChunk] = four[j];
  }
}

// The products with one kind of weights; X is what quantised ones are multiplied with.
template <class W, bool kVnni, class X = std::int16_t>
struct Product {
  static constexpr bool kFloats = std::is_same_v<W, float> || std::is_same_v<W, bf16>;
  static constexpr bool kMinima = std::is_same_v<W, std::uint8_t>;
  // Whether two rows of weights are read side by side for every number of rows of x (of x in 16 bits, for 1 four are).
  static constexpr bool kTwoStreams = kFloats || std::is_same_v<X, std::int8_t> || (Vec<float>::N == 16 && !kMinima);
  const PackedLinearParams& p;
  const Layout& at;

  // The scales of R rows of weights, from group g on, times the steps of M rows of x; with minima their product
  // with x's sums is added to acc. Whole vectors have a loop without branches: it is a fifth of int4's work.
  template <int M, int R>
  void scale_groups(const Streams& w, std::int64_t g, std::int64_t row, float (&scaled)[R * M][kScales],
                    Vec<float> (&acc)[R * M]) const {
    using V = Vec<float>;
    const std::int64_t count = std::min(kScales, at.groups - g), from = w.n * at.groups + g,
                       apart = w.apart * at.groups;
    const float* const memory = p.scratch.as<float>() + row * at.stride + g;
    const auto step = [&](std::int64_t i, auto loaded) __attribute__((always_inline)) {
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) {
        const V scales = loaded(p.scale.as<bf16>() + from + r * apart + i);
#pragma GCC unroll 8
        for (int m = 0; m < M; ++m) store(scaled[r * M + m] + i, scales * load(memory + at.step + m * at.stride + i));
        if constexpr (kMinima) {
          const V minima = loaded(p.minimum.as<bf16>() + from + r * apart + i);
#pragma GCC unroll 8
          for (int m = 0; m < M; ++m)
            acc[r * M + m] = fma(minima, load(memory + at.sum + m * at.stride + i), acc[r * M + m]);
        }
      }
    };
    std::int64_t i = 0;
    for (; i + V::N <= count; i += V::N)
      step(i, [](const bf16* from) __attribute__((always_inline)) { return load(from); });
    if (i < count) step(i, [&](const bf16* from) { return load(from, static_cast<int>(count - i)); });
  }
  // sums[(r * M + m) * kChunk] = x[row + m] . W[w.n + r * w.apart]
  template <int M, int R>
  void outputs(const Streams& w, std::int64_t row, float* sums) const {
    Vec<float> acc[R * M];
    clear(acc);
    if constexpr (kFloats) {
      dot_floats<W, M, R>(w, p.x.size[1], p.scratch.as<float>() + at.x + row * at.width, at.width, acc);
    } else {
      const X* const x = reinterpret_cast<const X*>(p.scratch.as<float>() + at.x);
      constexpr std::int64_t kBytes = std::is_same_v<W, std::int8_t> ? kBlock : 16;  // of a group
      for (int r = 0; r < R; ++r) {
        const std::int64_t next = (w.n + r * w.apart + 1) * at.groups;
        prefetch(p.scale.as<bf16>() + next, at.groups * 2);
        if (kMinima) prefetch(p.minimum.as<bf16>() + next, at.groups * 2);
      }
      alignas(64) float scaled[R * M][kScales];
      for (std::int64_t g = 0; g < at.groups; g += kScales) {
        scale_groups<M, R>(w, g, row, scaled, acc);
        const Piece<X> piece{g * kBytes, std::min(g + kScales, at.groups) * kBytes, x + row * at.width, at.width};
        if constexpr (std::is_same_v<W, std::int8_t>)
          dot_int8<M, R, kVnni>(w, piece, scaled, acc);
        else
          dot_int4<M, R, kVnni>(w, piece, scaled, acc);
      }
    }
    store_sums(acc, sums);
  }
  // M rows of x for all weights of a strip, so that they stay in L1; the weights then come from L2.
  template <int M, int R>
  void tile(std::int64_t first, std::int64_t apart, std::int64_t count, std::int64_t row, float* sums) const {
    const std::int64_t bytes = p.weight.size[1] * static_cast<std::int64_t>(sizeof(W));
    for (std::int64_t i = 0; i < count; ++i)
      outputs<M, R>({first + i, apart, p.weight.as<char>() + (first + i) * bytes, bytes}, row, sums + i);
  }
  // Calls f(first row, rows) for each tile of x.
  template <class F>
  void for_tiles(const F& f) const {
    const std::int64_t all = p.x.size[0], tall = kTallTile<W> && p.x.size[1] <= kShort ? 2 * kTile : kTile;
    for (std::int64_t row = 0, rows; row < all; row += rows) {
      rows = all - row >= tall ? tall : std::min<std::int64_t>(kTile, all - row);
      f(row, rows);
    }
  }

  // sums[(m * R + r) * kChunk + i] = x[m] . W[first + r * apart + i], but that r comes before m among the m of a tile
  template <int R>
  void tiles(std::int64_t first, std::int64_t apart, std::int64_t count, float* sums) const {
    for_tiles([&](std::int64_t row, std::int64_t rows) {
      float* const to = sums + row * R * kChunk;
      if (rows == 1) tile<1, R>(first, apart, count, row, to);
      if constexpr (R <= 2) {
        if (rows == 2) tile<2, R>(first, apart, count, row, to);
        if (rows == 3) tile<3, R>(first, apart, count, row, to);
        if (rows == kTile) tile<kTile, R>(first, apart, count, row, to);
        if constexpr (kTallTile<W>)
          if (rows == 2 * kTile) tile<2 * kTile, R>(first, apart, count, row, to);
      }
    });
  }
  // Outputs first + r * apart + i, i < count <= kChunk, in R streams.
  template <int R, class T>
  void strip(std::int64_t first, std::int64_t apart, std::int64_t count) const {
    alignas(64) float sums[kMostSums * kChunk], up[kMostSums * kChunk];
    tiles<R>(first, apart, count, sums);
    if (p.activation == Activation::swiglu) tiles<R>(p.y.size[1] + first, apart, count, up);
    for_tiles([&](std::int64_t row, std::int64_t rows) {
      for (int r = 0; r < R; ++r)
        for (std::int64_t m = 0; m < rows; ++m) {
          const std::int64_t at = (row * R + r * rows + m) * kChunk;
          finish<T>(p, row + m, first + r * apart, count, sums + at, up + at);
        }
    });
  }
  // Outputs [first, last): R streams as far apart as can be, then what is left.
  template <int R, class T>
  void streams(std::int64_t first, std::int64_t last) const {
    constexpr std::int64_t kCount = R == 1 ? kChunk : kChunk / 2;
    const std::int64_t apart = (last - first) / R / kCount * kCount;
    for (std::int64_t i = 0; i < apart; i += kCount) strip<R, T>(first + i, apart, kCount);
    const std::int64_t rest = first + R * apart, each = (last - rest) / R;
    if (each > 0) strip<R, T>(rest, each, each);
    if (rest + R * each < last) strip<1, T>(rest + R * each, 0, last - rest - R * each);
  }
  template <class T>
  void run(std::int64_t first, std::int64_t last) const {
    const std::int64_t all = p.x.size[0];
    if (all == 1 && !std::is_same_v<X, std::int8_t>) return streams<4, T>(first, last);
    if (kTwoStreams || all == 2) return streams<2, T>(first, last);
    streams<1, T>(first, last);
  }
};

// A block of x in the order of int4's parts (vec_nibbles.h), and what its groups need.
void order_as_nibbles(const std::int16_t* q, float step, std::int16_t* to, float* steps, float* sums) {
  constexpr int kTogether = Words::N / 16;  // blocks of 64 that are multiplied at once
  for (int block = 0; block < kBlock / 64; ++block, q += 64) {
    std::int16_t* const parts = to + block / kTogether * 64 * kTogether + block % kTogether * 16;
    for (int part = 0; part < 4; ++part)
      for (int i = 0; i < 16; ++i) parts[part * Words::N + i] = q[nibble_at(part, i)];
    for (int high = 0; high < 2; ++high) {
      const std::int32_t total = std::accumulate(q + high * 32, q + (high + 1) * 32, 0);
      steps[2 * block + high] = high ? step / 16.0f : step;
      sums[2 * block + high] = step * static_cast<float>(total);
    }
  }
}

// A block of x in 8 bits, in the order of int4's bytes, and the same.
void round_to_nibble_bytes(const float* x, std::int8_t* to, float* steps, float* sums) {
  constexpr int kTogether = IntVec::N / 8;  // blocks of 64 that are multiplied at once
  const float high = has_vnni() ? 1.0f / 16.0f : 1.0f;
  for (int block = 0; block < kBlock / 64; ++block) {
    std::int16_t q[64];
    for (int group = 2 * block; group < 2 * block + 2; ++group) {
      std::int16_t* const of_group = q + group % 2 * 32;
      const float step = quantize(x + group * 32, 32, kRoundedLimit, of_group);
      steps[group] = group % 2 == 1 ? step * high : step;
      sums[group] = step * static_cast<float>(std::accumulate(of_group, of_group + 32, 0));
    }
    std::int8_t* const parts = to + block / kTogether * 64 * kTogether + block % kTogether * 32;
    order_as_nibble_bytes(q, parts, parts + 32 * kTogether);
  }
}

// x as the dot products read it.
template <class T>
void load_x(const PackedLinearParams& p, const Layout& at, std::int64_t row) {
  const std::int64_t k = p.x.size[1];
  float* const memory = p.scratch.as<float>();
  if (!is_quantized(p)) return widen(p.x.as<T>() + row * p.x.stride[0], k, at.width, memory + at.x + row * at.width);
  std::int16_t* const to = reinterpret_cast<std::int16_t*>(memory + at.x) + row * at.width;
  std::int8_t* const to_bytes = reinterpret_cast<std::int8_t*>(memory + at.x) + row * at.width;
  float *const steps = memory + at.step + row * at.stride, *const sums = memory + at.sum + row * at.stride;
  std::fill_n(steps, at.stride, 0.0f);
  std::fill_n(sums, at.stride, 0.0f);
  for (std::int64_t b = 0; b < at.width; b += kBlock) {
    float wide[kBlock];
    std::int16_t q[kBlock];
    widen_x<T>(p, row, b, wide);
    if (p.minimum.data == nullptr)
      steps[b / kBlock] = quantize_block(wide, kLimit, to + b);
    else if (p.rounded)
      round_to_nibble_bytes(wide, to_bytes + b, steps + b / 32, sums + b / 32);
    else
      order_as_nibbles(q, quantize_block(wide, kLimit, q), to + b, steps + b / 32, sums + b / 32);
  }
}

// Calls f with the product of these weights.
template <class F>
void with_product(const PackedLinearParams& p, const Layout& at, const F& f) {
  if (p.weight.dtype == DType::f32) return f(Product<float, false>{p, at});
  if (p.weight.dtype == DType::bf16) return f(Product<bf16, false>{p, at});
  const auto quantized = [&](auto vnni) {
    if (p.minimum.data == nullptr)
      f(Product<std::int8_t, decltype(vnni)::value>{p, at});
    else
      f(Product<std::uint8_t, decltype(vnni)::value>{p, at});
  };
  if (p.minimum.data != nullptr && p.rounded)
    return has_vnni() ? f(Product<std::uint8_t, true, std::int8_t>{p, at})
                      : f(Product<std::uint8_t, false, std::int8_t>{p, at});
  if constexpr (IntVec::N == 16)
    if (has_vnni()) return quantized(std::true_type{});
  quantized(std::false_type{});
}

template <class T>
void run(const PackedLinearParams& p, std::int64_t threads) {
  const Layout at(p);
  const std::int64_t rows = p.x.size[0], outputs = p.y.size[1], chunks = (outputs + kChunk - 1) / kChunk;
  for (std::int64_t row = 0; row < rows; ++row) load_x<T>(p, at, row);
  const std::int64_t workers = std::min(threads, chunks);
  with_product(p, at, [&](const auto& product) {
    parallel_for(workers, outputs * at.width * rows, [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t worker = begin; worker < end; ++worker)
        product.template run<T>(chunks * worker / workers * kChunk,
                                std::min(outputs, chunks * (worker + 1) / workers * kChunk));
    });
  });
}

}  // namespace

// Without VNNI a product of integers takes two instructions here as in linear.cpp, which has to bring the weights into
// panels: measured, that takes longer up to these numbers of rows. Beyond kShort numbers kTile rows of x do not fit L1.
bool is_linear_decode(const PackedLinearParams& p) {
  std::int64_t rows = kDecodeRows;
  if (!has_vnni() && p.weight.dtype == DType::i8 && p.x.size[1] <= kShort) rows = 32;
  if (!has_vnni() && p.weight.dtype == DType::u8 && !p.rounded) rows = 48;
  return p.x.size[0] <= rows;
}

std::int64_t linear_decode_scratch_bytes(const PackedLinearParams& p) {
  return Layout(p).size * static_cast<std::int64_t>(sizeof(float));
}

void linear_decode(const PackedLinearParams& p, std::int64_t threads) {
  with_x_type(p.x.dtype, [&](auto t) { run<decltype(t)>(p, threads); });
}

}  // namespace qvl::cpu
