// Plans of csrc/cuda/rms_norm.cu.
#pragma once

#include <array>

#include "../params.h"
#include "plan.h"

namespace qvl::cuda {

Plan plan_rms_norm(const RmsNormParams& p);

// Two launches: chunks of rows, then the sum over chunks. partial (chunks, C) may have any number of chunks.
std::array<Plan, 2> plan_rms_norm_backward(const RmsNormBackwardParams& p);

// The number of chunks that fills a GPU.
std::int64_t rms_norm_backward_chunks(std::int64_t rows, std::int64_t channels);

}  // namespace qvl::cuda
