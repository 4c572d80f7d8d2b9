// y = x W^T for many rows of x on AMX: products of bfloat16, or of bytes where weights are narrow and x may be rounded
// (linear_amx_products.h).
//
// Regime: as linear.cpp, prompts and images. 2 M N K FLOPs, of which a thread does 1024 a cycle, or 2048 of bytes; so
// what feeds them decides, and W, which is read once, is not transposed: its rows are the rows of a register.
//
//   strip   32 rows of x as words of 32 bits along K, transposed, made once for all outputs; 32 strips (16 of x in
//           three parts) times kDepth of K are 512 (768) KiB of L2, which has 2 MiB, that all panels pass; bytes half
//   panel   32 rows of W times kDepth of K, [unit of K][2][16 outputs][64 bytes], 16 KiB, or 8 of bytes. With a strip's
//           part as large and 4 KiB of sums it stays in L1
//   tile    2 x 2 registers of sums, (outputs, rows): a step of 64 bytes of K loads four registers for four products
//   task    kOutputs outputs of all strips: their sums, [16 outputs][16 rows] at a time, stay in L2 over all of K, are
//           then transposed, and finish as in linear.cpp
//
// On a shared host there are phases of seconds, probably those of work on the core's other thread, in which a load of a
// register takes 32 cycles instead of 8 and a product 42 instead of 16, one after the other (measured); then their
// number decides, of which bytes need half.
#pragma once

#include "linear.h"

namespace qvl::cpu {

// Whether the CPU, the format and what the caller lets round allow it.
bool is_linear_amx(const PackedLinearParams& p);
std::int64_t linear_amx_scratch_bytes(const PackedLinearParams& p, std::int64_t threads);
void linear_amx(const PackedLinearParams& p, std::int64_t threads);

}  // namespace qvl::cpu
