"""rms_norm: R rows of C channels, s bytes an element.

Bytes: 2 R C s + C s, with a residual 4 R C s + C s; backward 3 R C s. FLOPs: 4 R C (5 R C with a residual, 10 R C
backward).
torch: F.rms_norm, and an addition before it where there is a residual; autograd of the same for the backward.
Shapes: a decode step, a prompt and a large prompt of Qwen3-VL-2B, and the heads of its Q/K-norm.
"""

import pytest
import torch
import torch.nn.functional as F
from timing import Case

from qvl_kernels import rms_norm
from qvl_kernels.reference import rms_norm as reference

SHAPES = [(64, 2048), (1, 2048), (512, 2048), (4096, 2048), (512 * 16, 128)]
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(("rows", "channels"), SHAPES)
def bench_forward(compare, rows, channels, dtype):
    x, weight = torch.randn(rows, channels, dtype=dtype), torch.randn(channels, dtype=dtype)
    case = Case("rms_norm", f"{rows} x {channels} {_name(dtype)}", 4 * x.numel(), 2 * x.nbytes + weight.nbytes)
    compare(
        case,
        lambda: rms_norm(x, weight, 1e-6),
        lambda: reference.forward(x, weight, 1e-6)[0],
        lambda: F.rms_norm(x, (channels,), weight, 1e-6),
        TOLERANCE[dtype],
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(("rows", "channels"), SHAPES[:4])
def bench_residual(compare, rows, channels, dtype):
    x, residual = torch.randn(2, rows, channels, dtype=dtype)
    weight = torch.randn(channels, dtype=dtype)

    def torch_own():
        hidden = x + residual
        return F.rms_norm(hidden, (channels,), weight, 1e-6), hidden

    case = Case("rms_norm", f"{rows} x {channels} {_name(dtype)} residual", 5 * x.numel(), 4 * x.nbytes + weight.nbytes)
    compare(
        case,
        lambda: rms_norm(x, weight, 1e-6, residual),
        lambda: reference.forward(x, weight, 1e-6, residual)[:2],
        torch_own,
        TOLERANCE[dtype],
    )


@pytest.mark.parametrize(("rows", "channels"), [(512, 2048), (4096, 2048)])
def bench_backward(compare, rows, channels):
    x, grad = torch.randn(2, rows, channels)
    weight = torch.randn(channels)
    rstd = torch.rsqrt(x.square().mean(-1) + 1e-6)
    leaves = x.clone().requires_grad_(), weight.clone().requires_grad_()
    with torch.enable_grad():
        y = F.rms_norm(leaves[0], (channels,), leaves[1], 1e-6)
    case = Case("rms_norm", f"{rows} x {channels} fp32 backward", 10 * x.numel(), 3 * x.nbytes)
    compare(
        case,
        lambda: torch.ops.qvl.rms_norm_backward(grad, None, x, weight, rstd),
        lambda: reference.backward(grad, None, x, weight, rstd),
        lambda: torch.autograd.grad(y, leaves, grad, retain_graph=True),
        1e-4,
    )


def _name(dtype: torch.dtype) -> str:
    return {torch.float32: "fp32", torch.bfloat16: "bf16"}[dtype]
