// What each operation is called with. A view whose data is null stands for an argument that was None.
#pragma once

#include "tensor_view.h"

namespace qvl {

// h = x + residual; y = h rstd w, rstd = 1 / sqrt(mean(h^2) + eps). All (..., C) but weight (C) and rstd (...).
struct RmsNormParams {
  TensorView x, residual, weight, y, hidden, rstd;
  double eps;
};

// grad_x = rstd (g - h rstd^2 mean(g h)) + grad_hidden with g = grad_y w; grad_weight = sum over rows of grad_y h rstd.
// partial (chunks, C) is scratch in the compute type: one sum of weight gradients per chunk of rows.
struct RmsNormBackwardParams {
  TensorView grad_y, grad_hidden, hidden, weight, rstd, grad_x, grad_weight, partial;
};

namespace cpu {
void rms_norm(const RmsNormParams& p);
void rms_norm_backward(const RmsNormBackwardParams& p);
}  // namespace cpu

}  // namespace qvl
