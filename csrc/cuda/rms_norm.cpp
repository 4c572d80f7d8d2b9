// Chooses the kernel and the launch geometry of rms_norm.

#include "rms_norm.h"

#include <algorithm>
#include <climits>

#include "rms_norm_sizes.h"
#include "rows.h"

namespace qvl::cuda {
namespace {

constexpr int kWarp = 32;

constexpr std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

std::int32_t to_int32(std::int64_t n, const char* what) {
  if (n > INT_MAX) throw std::invalid_argument(what);
  return static_cast<std::int32_t>(n);
}

// As many threads as hold the row in registers, in whole warps; where one warp does, four rows share a block, because
// 32 blocks an SM (Pascal's limit) of one warp would leave half of its 64 warps empty.
Dim3 team(std::int64_t channels) {
  const std::int64_t warps = std::clamp<std::int64_t>(ceil_div(channels, kHeld * kWarp), 1, kMaxThreads / kWarp);
  return {static_cast<std::uint32_t>(warps * kWarp), warps == 1 ? 4u : 1u, 1};
}

const char* choose(DType dtype, bool wide, const std::array<const char*, 4>& names) {
  return names[(dtype == DType::f16 ? 2 : 0) + (wide ? 0 : 1)];
}

}  // namespace

Plan plan_rms_norm(const RmsNormParams& p) {
  const std::int64_t channels = p.weight.size[0], rows = channels ? p.x.numel() / channels : 0;
  bool wide = true;
  for (const TensorView* t : {&p.x, &p.residual, &p.weight, &p.y, &p.hidden}) wide = wide && in_16_byte_units(*t);
  Plan plan;
  plan.image = "rms_norm";
  plan.kernel = choose(p.x.dtype, wide, {"rms_norm_f32x4", "rms_norm_f32x1", "rms_norm_f16x8", "rms_norm_f16x1"});
  plan.block = team(channels);
  plan.grid.x = static_cast<std::uint32_t>(ceil_div(rows, plan.block.y));
  plan.add("x", p.x.data).add("residual", p.residual.data).add("weight", p.weight.data);
  plan.add("y", p.y.data).add("hidden", p.hidden.data).add("rstd", p.rstd.data);
  plan.add("x_rows", row_layout(p.x)).add("residual_rows", row_layout(p.residual));
  plan.add("rows", to_int32(rows, "rms_norm: x has more than 2^31 - 1 rows"));
  plan.add("channels", to_int32(channels, "rms_norm: x has more than 2^31 - 1 channels"));
  plan.add("eps", static_cast<float>(p.eps));
  return plan;
}

std::array<Plan, 2> plan_rms_norm_backward(const RmsNormBackwardParams& p) {
  const std::int64_t channels = p.weight.size[0], rows = channels ? p.hidden.numel() / channels : 0;
  const std::int32_t chunks = to_int32(p.partial.size[0], "rms_norm_backward: partial has more than 2^31 - 1 chunks");
  const std::int32_t rows32 = to_int32(rows, "rms_norm_backward: hidden has more than 2^31 - 1 rows");
  const std::int32_t channels32 = to_int32(channels, "rms_norm_backward: hidden has more than 2^31 - 1 channels");
  bool wide = true;
  for (const TensorView* t : {&p.grad_y, &p.grad_hidden, &p.hidden, &p.weight, &p.grad_x, &p.partial})
    wide = wide && in_16_byte_units(*t);

  Plan rows_plan;
  rows_plan.image = "rms_norm";
  rows_plan.kernel = choose(
      p.hidden.dtype, wide,
      {"rms_norm_backward_f32x4", "rms_norm_backward_f32x1", "rms_norm_backward_f16x8", "rms_norm_backward_f16x1"});
  rows_plan.block = team(channels);
  rows_plan.grid.x = channels ? static_cast<std::uint32_t>(ceil_div(chunks, rows_plan.block.y)) : 0;
  rows_plan.add("grad_y", p.grad_y.data).add("grad_hidden", p.grad_hidden.data).add("hidden", p.hidden.data);
  rows_plan.add("weight", p.weight.data).add("rstd", p.rstd.data).add("grad_x", p.grad_x.data);
  rows_plan.add("partial", p.partial.data).add("grad_y_rows", row_layout(p.grad_y));
  rows_plan.add("grad_hidden_rows", row_layout(p.grad_hidden)).add("hidden_rows", row_layout(p.hidden));
  rows_plan.add("rows", rows32).add("channels", channels32).add("chunks", chunks);
  rows_plan.add("rows_per_chunk", static_cast<std::int32_t>(ceil_div(rows, chunks)));

  Plan sum_plan;
  sum_plan.image = "rms_norm";
  sum_plan.kernel = p.hidden.dtype == DType::f16 ? "rms_norm_backward_sum_f16" : "rms_norm_backward_sum_f32";
  sum_plan.block = {kWarp, static_cast<std::uint32_t>(std::min(chunks, kSumWarps)), 1};
  sum_plan.grid.x = static_cast<std::uint32_t>(ceil_div(channels, kWarp));
  sum_plan.add("partial", p.partial.data).add("grad_weight", p.grad_weight.data);
  sum_plan.add("channels", channels32).add("chunks", chunks);
  return {rows_plan, sum_plan};
}

// A chunk of 8 rows or more keeps the traffic of partial (8 C bytes a chunk) below a tenth of the rows' own. At 80
// registers a thread the 28 SMs of a 1080 Ti hold 84 blocks of 256 threads, or 672 teams of one warp: two waves of the
// former, one of the latter.
std::int64_t rms_norm_backward_chunks(std::int64_t rows, std::int64_t channels) {
  const std::int64_t most = team(channels).y == 1 ? 168 : 672;
  return std::clamp<std::int64_t>(ceil_div(rows, 8), 1, most);
}

}  // namespace qvl::cuda
