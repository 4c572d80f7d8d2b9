// y = x W^T for many rows of x on AMX: products of bfloat16, whatever the weights' format.
//
// Regime: as linear.cpp, prompts and images. 2 M N K FLOPs, of which a thread does 1024 a cycle; so what feeds them
// decides, and W, which is read once, is not transposed: its rows are the rows of a register.
//
//   parts   x rounded to bfloat16, where it may be, or as the sum of three bfloat16 numbers, its 24 bits: then nothing
//           of a product is lost, at three products for one
//   strip   32 rows of x as pairs along K, [32 of K][part][2][16 pairs][16 rows], made once for all outputs; 32 strips
//   (16
//           of three parts) times kDepth of K are 512 (768) KiB of L2, which has 2 MiB, that all panels pass
//   panel   32 rows of W times kDepth of K as bfloat16, [32 of K][2][16 outputs][32], 16 KiB. With a strip's 16 KiB and
//           4 KiB of sums it stays in L1
//   tile    2 x 2 registers of sums, (outputs, rows): a step of 32 of K loads four registers for four products
//   task    kOutputs outputs of all strips: their sums, [16 outputs][16 rows] at a time, stay in L2 over all of K, are
//           then transposed, and finish as in linear.cpp
//
// bfloat16 weights are what they are. int8 and int4 weights are rounded, by 2^-8 of each at most, where int8 has lost
// 2^-8 of the largest of 128: only where the caller lets them.
#pragma once

#include "linear.h"

namespace qvl::cpu {

// Whether the CPU, the format and what the caller lets round allow it.
bool is_linear_amx(const PackedLinearParams& p);
std::int64_t linear_amx_scratch_bytes(const PackedLinearParams& p, std::int64_t threads);
void linear_amx(const PackedLinearParams& p, std::int64_t threads);

}  // namespace qvl::cpu
