// What linear_amx.cpp's strips and panels hold, and how AMX multiplies them.
//
//   AmxHalves   bfloat16. x rounded to it, or as the sum of three bfloat16 numbers, its 24 bits: then nothing of a
//               product is lost, at three products for one (kParts)
//   AmxBytes    8 bits, twice as many products an instruction. int8 weights as they are, int4 weights and x rounded,
//               with a step for each 128; so after 128 the sums, 32-bit integers, are stored, scaled and added to float
//               sums. The vector units do that with the last unit while AMX multiplies the next: 8 products and 8 loads
//               of AMX beside 64 vectors of 16 sums
//
// A unit is what a kind multiplies at a time, of a strip and of a panel: kUnit numbers along K, one or more registers
// of each 16 rows. In a strip they lie in words of 32 bits along K, transposed: [register][part][2][16 words][16 rows].
#pragma once

#include "linear.h"
#include "vec_amx.h"

namespace qvl::cpu {

#if defined(__AVX512F__)

constexpr std::int64_t kTileFloats = kTileRows * kTileBytes / 4;
constexpr std::int64_t kPairFloats = 2 * kTileFloats;  // two registers

// Where the sums of two times 16 outputs and two times 16 rows lie: (outputs, rows).
using Sums = float* [2][2];

template <int kParts>
struct AmxHalves {
  static constexpr std::int64_t kDepth = 256, kUnit = kTileHalves;  // along K: of a panel, of a unit
  static constexpr std::int64_t kStrips = kParts == 1 ? 32 : 16;    // of a block, at most
  static constexpr std::int64_t kStripFloats = kParts * kPairFloats, kPanelFloats = kPairFloats, kOwnFloats = 0;

  explicit AmxHalves(float*) {}

  // `count` numbers as bfloat16, rounded, or in three parts, and zeros up to a whole register.
  template <int kOf, class T>
  static void to_halves(const T* from, std::int64_t count, bf16 (*to)[kDepth]) {
    using V = Vec<float>;
    const std::int64_t padded = round_up(count, kTileHalves);
    if constexpr (kOf == 1 && std::is_same_v<T, bf16>) {
      std::int64_t i = 0;
      for (; i + kTileHalves <= count; i += kTileHalves) std::memcpy(*to + i, from + i, kTileBytes);
      std::copy(from + i, from + count, *to + i);
      std::fill(*to + count, *to + padded, bf16{0});
      return;
    }
    alignas(64) float wide[kDepth];
    widen(from, count, padded, wide);
    for (std::int64_t i = 0; i < padded; i += kTileHalves) {
      V a[3] = {load(wide + i)}, b[3] = {load(wide + i + V::N)};
      if constexpr (kOf == 3) split_three(load(wide + i), a), split_three(load(wide + i + V::N), b);
      for (int part = 0; part < kOf; ++part) store_halves(to[part] + i, a[part], b[part]);
    }
  }

  // Rows from `first` on, of which the last is repeated, `depth` numbers from k on.
  template <class T>
  static void fill_strip(const PackedLinearParams& p, std::int64_t first, std::int64_t k, std::int64_t depth,
                         float* strip) {
    alignas(64) bf16 rows[kTileRows][kParts][kDepth];
    for (int half = 0; half < 2; ++half) {
      for (int r = 0; r < kTileRows; ++r) {
        const std::int64_t row = std::min(first + half * kTileRows + r, p.x.size[0] - 1);
        to_halves<kParts>(p.x.as<T>() + row * p.x.stride[0] + k, depth, rows[r]);
      }
      for (std::int64_t i = 0; i * kUnit < depth; ++i)
        for (int part = 0; part < kParts; ++part) {
          const float* words[kTileRows];
          for (int r = 0; r < kTileRows; ++r)
            words[r] = reinterpret_cast<const float*>(rows[r][part] + i * kTileHalves);
          store_transposed(strip + (i * kParts + part) * kPairFloats + half * kTileFloats, words);
        }
    }
  }

  // Row n of W from k on as row j of a panel.
  static void fill_row(const PackedLinearParams& p, std::int64_t n, std::int64_t k, std::int64_t units, std::int64_t j,
                       float* panel) {
    const std::int64_t width = p.weight.size[1], whole = std::min(units, (width - k) / kTileHalves);
    const bf16* const w = p.weight.as<bf16>() + n * width + k;
    const auto place = [&](std::int64_t i) { return panel + i * kPairFloats + j * kTileBytes / 4; };
    for (std::int64_t i = 0; i < whole; ++i) std::memcpy(place(i), w + i * kTileHalves, kTileBytes);
    if (whole == units) return;
    bf16 last[1][kDepth];
    to_halves<1>(w + whole * kTileHalves, width - k - whole * kTileHalves, last);
    std::memcpy(place(whole), last, kTileBytes);
  }

  // sums += panel strip over so many units; the first time they are written. Without the second half of a strip its
  // sums are left alone.
  void add(const float* panel, const float* strip, std::int64_t units, bool first, bool whole, const Sums& sums) {
    whole ? multiply<true>(panel, strip, units, first, sums) : multiply<false>(panel, strip, units, first, sums);
  }
  template <bool kWhole>
  [[gnu::noinline]] static void multiply(const float* panel, const float* strip, std::int64_t units, bool first,
                                         const Sums& sums) {
    if (first) {
      clear_sums();
    } else {
      load_tile_register<0>(sums[0][0]), load_tile_register<2>(sums[1][0]);
      if constexpr (kWhole) load_tile_register<1>(sums[0][1]), load_tile_register<3>(sums[1][1]);
    }
    for (std::int64_t i = 0; i < units; ++i, panel += kPairFloats) {
      load_tile_register<4>(panel), load_tile_register<5>(panel + kTileFloats);
#pragma GCC unroll 3
      for (int part = 0; part < kParts; ++part, strip += kPairFloats) {
        load_tile_register<6>(strip);
        if constexpr (kWhole) load_tile_register<7>(strip + kTileFloats);
        dot_halves<0, 4, 6>();
        if constexpr (kWhole) dot_halves<1, 4, 7>();
        dot_halves<2, 5, 6>();
        if constexpr (kWhole) dot_halves<3, 5, 7>();
      }
    }
    store_tile_register<0>(sums[0][0]), store_tile_register<2>(sums[1][0]);
    if constexpr (kWhole) store_tile_register<1>(sums[0][1]), store_tile_register<3>(sums[1][1]);
  }
  void finish() {}
};

class AmxBytes {
 public:
  static constexpr std::int64_t kDepth = 256, kUnit = kBlock, kSteps = kUnit / kTileBytes, kStrips = 32;
  static constexpr std::int64_t kScales = kSteps * kPairFloats;  // of a unit: where those of its 32 rows are
  static constexpr std::int64_t kStripFloats = kScales + 2 * kTileRows, kPanelFloats = kStripFloats;
  static constexpr std::int64_t kOwnFloats = 8 * kTileFloats;  // integer sums of two units

  explicit AmxBytes(float* memory) : ints_(memory) {}

  template <class T>
  static void fill_strip(const PackedLinearParams& p, std::int64_t first, std::int64_t k, std::int64_t depth,
                         float* strip) {
    alignas(64) std::int8_t rows[kTileRows][kUnit];
    std::int16_t integers[kUnit];
    for (std::int64_t i = 0; i < depth; i += kUnit, strip += kStripFloats)
      for (int half = 0; half < 2; ++half) {
        for (int r = 0; r < kTileRows; ++r) {
          strip[kScales + half * kTileRows + r] =
              quantize_x<T>(p, first + half * kTileRows + r, k + i, 127.0f, integers);
          narrow(integers, kUnit, rows[r]);
        }
        for (int step = 0; step < kSteps; ++step) {
          const float* words[kTileRows];
          for (int r = 0; r < kTileRows; ++r) words[r] = reinterpret_cast<const float*>(rows[r] + step * kTileBytes);
          store_transposed(strip + step * kPairFloats + half * kTileFloats, words);
        }
      }
  }

  static void fill_row(const PackedLinearParams& p, std::int64_t n, std::int64_t k, std::int64_t units, std::int64_t j,
                       float* panel) {
    for (std::int64_t i = 0; i < units; ++i, panel += kPanelFloats) {
      std::int8_t* const to = reinterpret_cast<std::int8_t*>(panel + j * kTileBytes / 4);
      panel[kScales + j] = bytes_of_row(p, n, k + i * kUnit, to, to + kPairFloats * 4);
    }
  }

  // sums += panel strip over so many units, the last of them when the next one or `finish` follows.
  void add(const float* panel, const float* strip, std::int64_t units, bool first, bool whole, const Sums& sums) {
    if (!whole) finish();
    for (std::int64_t i = 0; i < units; ++i, panel += kPanelFloats, strip += kStripFloats) {
      const Unit unit = {ints_ + turn_ * 4 * kTileFloats,
                         panel + kScales,
                         strip + kScales,
                         {{sums[0][0], sums[0][1]}, {sums[1][0], sums[1][1]}},
                         first && i == 0 ? 0 : Vec<float>::N};
      if (!whole)
        multiply<false, false>(panel, strip, unit, unit), scale<false>(unit);
      else if (waits_)
        multiply<true, true>(panel, strip, unit, last_);
      else
        multiply<true, false>(panel, strip, unit, unit);
      last_ = unit, waits_ = whole, turn_ ^= 1;
    }
  }
  void finish() {
    if (waits_) scale<true>(last_);
    waits_ = false;
  }

 private:
  struct Unit {
    float* ints;  // [outputs][rows][16 outputs][16 rows], as Sums
    const float *of_outputs, *of_rows;
    float* sums[2][2];
    int kept;  // lanes of sums that are there already
  };

  // The unit's products, and between them, with kScale, `last` to its sums.
  template <bool kWhole, bool kScale>
  [[gnu::noinline]] static void multiply(const float* panel, const float* strip, const Unit& unit, const Unit& before) {
    const Unit last = before;  // in registers: the compiler takes what `before` refers to for changed by each store
    float* const ints = unit.ints;
    const auto scale_in = [&](auto slot) __attribute__((always_inline)) {
      if constexpr (kScale) scale_rows<kWhole, 4 * slot, 4>(last);
    };
    const auto step = [&](auto at, auto&& after) __attribute__((always_inline)) {
      const float *const w = panel + at * kPairFloats, *const x = strip + at * kPairFloats;
      constexpr int slot = 4 * at;
      load_tile_register<4>(w), load_tile_register<6>(x);
      dot_bytes<0, 4, 6>();
      scale_in(Number<slot>{});
      if constexpr (kWhole) load_tile_register<7>(x + kTileFloats), dot_bytes<1, 4, 7>();
      after(Number<0>{});
      scale_in(Number<slot + 1>{});
      load_tile_register<5>(w + kTileFloats), dot_bytes<2, 5, 6>();
      after(Number<1>{});
      scale_in(Number<slot + 2>{});
      if constexpr (kWhole) dot_bytes<3, 5, 7>();
      after(Number<2>{});
      scale_in(Number<slot + 3>{});
    };
    clear_sums();
    step(Number<0>{}, [](auto) {});
    step(Number<1>{}, [&](auto tile) __attribute__((always_inline)) {
      if constexpr (kWhole || tile % 2 == 0) store_tile_register<tile>(ints + tile * kTileFloats);
    });
    if constexpr (kWhole) store_tile_register<3>(ints + 3 * kTileFloats);
  }
  template <int kNumber>
  using Number = std::integral_constant<int, kNumber>;

  template <bool kWhole>
  [[gnu::noinline]] static void scale(const Unit& of) {
    const Unit unit = of;
    scale_rows<kWhole, 0, 2 * kTileRows>(unit);
  }
  // Outputs kFirst and on of the unit's 32.
  template <bool kWhole, int kFirst, int kCount>
  [[gnu::always_inline]] static void scale_rows(const Unit& unit) {
    using V = Vec<float>;
    constexpr int o = kFirst / kTileRows;
    if constexpr (kFirst % kTileRows + kCount > kTileRows) {
      scale_rows<kWhole, kFirst, kTileRows>(unit), scale_rows<kWhole, kFirst + kTileRows, kCount - kTileRows>(unit);
    } else {
#pragma GCC unroll 2
      for (int r = 0; r < (kWhole ? 2 : 1); ++r) {
        const V of_rows = load(unit.of_rows + r * kTileRows);
        const float* const ints = unit.ints + (2 * o + r) * kTileFloats;
        float* const sums = unit.sums[o][r];
#pragma GCC unroll 16
        for (int i = kFirst % kTileRows; i < kFirst % kTileRows + kCount; ++i) {
          const V y = to_float(load_pairs(ints + i * kTileRows)) * of_rows;
          store(sums + i * kTileRows,
                fma(y, V(unit.of_outputs[o * kTileRows + i]), load(sums + i * kTileRows, unit.kept)));
        }
      }
    }
  }

  float* ints_;
  Unit last_ = {};
  bool waits_ = false;
  int turn_ = 0;
};

#endif

}  // namespace qvl::cpu
