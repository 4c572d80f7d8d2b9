// What rms_norm's kernels and its plans agree on. Includes nothing: NVRTC reads it too.
#pragma once

namespace qvl::cuda {

// Elements of a row that one thread keeps in registers. 8 fill one 16-byte access of fp16 or two of fp32, so that the
// loads of a row are in flight together. A team of 512 holds rows of 4096; what is longer is read a second time.
constexpr int kHeld = 8;
constexpr int kMaxThreads = 512;

// Most warps of a block that share the sum over chunks. C = 128 has 4 blocks only, so a block may have all there can
// be.
constexpr int kSumWarps = 32;

}  // namespace qvl::cuda
