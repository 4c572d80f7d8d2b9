"""The error rule and the inputs that every operation's tests share."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import qvl_kernels
from qvl_kernels import _backends

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
LENGTHS = [1, 7, 8, 9, 15, 16, 17, 31, 63, 64, 65, 111, 128, 1000]  # around the lanes of every ISA, unrolled or not


def backends_of(operation: str) -> list:
    """A parameter for each backend of the operation; one that cannot run here is skipped with the reason."""
    parameters = []
    for name in _backends._operations[operation].implementations:
        refusal = _backends.unavailable(name)
        marks = [pytest.mark.skip(reason=f"{name}: {refusal}")] if refusal is not None else []
        parameters.append(pytest.param(name, marks=marks))
    return parameters


def on(backend: str):
    """Forces the backend; nothing falls back."""
    return qvl_kernels.use_backend(backend)


def device_of(backend: str) -> str:
    """Where the backend's tensors live."""
    return "cuda" if backend in ("cuda", "triton") and torch.cuda.is_available() else "cpu"


def qkv(batch, heads_q, heads_kv, len_q, len_k, dim, dim_v=None, dtype=torch.float32, device="cpu"):
    """Random query (B, Hq, Lq, D), key (B, Hkv, Lk, D) and value (B, Hkv, Lk, Dv)."""
    shapes = (batch, heads_q, len_q, dim), (batch, heads_kv, len_k, dim), (batch, heads_kv, len_k, dim_v or dim)
    return tuple(torch.randn(shape, dtype=dtype, device=device) for shape in shapes)


def assert_close(
    name: str, ours: Tensor, exact: Tensor, plain: Tensor, terms: int, largest: float = 0.0, method: float = 0.0
) -> None:
    """flash-attention's rule: max|ours - exact| <= 2 max|plain - exact| + one rounding of the dtype.

    `exact` is the result in float64, `plain` is plain PyTorch's in the dtype under test. For float32 and float64 the
    bound
    comes from the sum instead: eps (sqrt(terms) + 2) max|exact|, a random walk of `terms` roundings and four roundings
    (eps / 2 each) of the arithmetic around it. Where terms cancel, `largest` gives the size of the largest one.
    `method` is the derived error of an approximation that the operation's docstring states, 0 where there is none.
    """
    dtype = plain.dtype
    assert ours.dtype == dtype, f"{name}: dtype {ours.dtype} instead of {dtype}"
    assert ours.shape == exact.shape, f"{name}: shape {tuple(ours.shape)} instead of {tuple(exact.shape)}"
    if exact.numel() == 0:
        return
    ours, exact, plain = (x.detach().cpu().double() for x in (ours, exact, plain))
    error, epsilon = (ours - exact).abs(), torch.finfo(dtype).eps
    largest = max(largest, exact.abs().max().item())
    if dtype in (torch.float32, torch.float64):
        bound = epsilon * (math.sqrt(terms) + 2) * largest
    else:
        bound = 2 * (plain - exact).abs().max().item() + epsilon / 2 * largest
    bound += method + torch.finfo(dtype).smallest_normal
    worst = _where(torch.where(error.isnan(), torch.inf, error))
    assert error[worst] <= bound, (
        f"{name}: {ours[worst].item():.9g} instead of {exact[worst].item():.9g} at {worst}, "
        f"error {error[worst].item():.3g} over the bound {bound:.3g}"
    )


def ulps(ours: Tensor, exact: Tensor) -> Tensor:
    """|ours - exact| in units of the last place of exact, for float32."""
    size = exact.float().abs()
    return (ours.double() - exact).abs() / (torch.nextafter(size, torch.full_like(size, torch.inf)) - size).double()


def refuses_gradients(backend: str, call) -> bool:
    """True where the backend is a kernel without gradients, having checked that it says so instead of losing them."""
    if backend == "reference":
        return False
    with (
        on(backend),
        pytest.raises(RuntimeError, match="a gradient is needed, and autograd takes it from the reference"),
    ):
        call()
    return True


def _where(x: Tensor) -> tuple[int, ...]:
    return tuple(int(i) for i in torch.unravel_index(x.argmax(), x.shape))
