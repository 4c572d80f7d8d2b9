"""rms_norm's CUDA kernels: the shipped PTX, launched as planned, on the interpreter; and on a GPU if there is one."""

from __future__ import annotations

import ptx
import pytest
import torch
from cuda_images import cuda_module, interpret, kernel_report
from torch import Tensor
from utils import assert_close

from qvl_kernels import _backends
from qvl_kernels.reference import rms_norm as reference

_cuda = cuda_module()
DTYPES = [torch.float32, torch.float16]
ROWS = [0, 1, 3, 17]
CHANNELS = [1, 31, 64, 111, 128, 1000, 2048]
EPS = 1e-6

ON_GPU = _backends.unavailable("cuda") is None
PLACES = ["interpreter", pytest.param("gpu", marks=pytest.mark.skipif(not ON_GPU, reason="no GPU runs the kernels"))]


def forward(place: str, x: Tensor, weight: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor | None, Tensor]:
    """(y, h, rstd) of the kernels. Outputs start as NaN (conftest.py)."""
    if place == "gpu":
        x, weight, residual = (None if t is None else to_gpu(t) for t in (x, weight, residual))
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    hidden = None if residual is None else torch.empty_like(y)
    rstd = torch.empty(x.shape[:-1], device=x.device)
    arguments = x, residual, weight, y, hidden, rstd, EPS
    if place == "gpu":
        _cuda.rms_norm(*arguments, torch.cuda.current_stream().cuda_stream)
    else:
        inputs = {"x": x, "residual": residual, "weight": weight}
        interpret([_cuda.plan_rms_norm(*arguments)], inputs, {"y": y, "hidden": hidden, "rstd": rstd})
    return y, hidden, rstd


def to_gpu(t: Tensor) -> Tensor:
    """A copy with the same strides and the same alignment."""
    storage = torch.empty(t.untyped_storage().nbytes() // t.element_size(), dtype=t.dtype, device="cuda")
    storage.copy_(torch.empty(0, dtype=t.dtype).set_(t.untyped_storage()))
    return storage.as_strided(t.shape, t.stride(), t.storage_offset())


def check_forward(place: str, x: Tensor, weight: Tensor, residual: Tensor | None = None) -> None:
    y, hidden, rstd = forward(place, x, weight, residual)
    if residual is None:
        hidden = x
    else:
        assert torch.equal(hidden.cpu(), x + residual), "h must be x + residual, rounded once"
        hidden = hidden.cpu()
    exact, _, exact_rstd = reference.forward(hidden.double(), weight.double(), EPS)
    plain = hidden * torch.rsqrt(hidden.square().mean(-1, keepdim=True) + EPS) * weight
    assert_close("y", y, exact, plain, x.shape[-1])
    assert_close("rstd", rstd, exact_rstd, exact_rstd.float(), x.shape[-1])


@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("channels", CHANNELS)
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("place", PLACES)
def test_forward(place, rows, channels, dtype, with_residual):
    x = torch.randn(rows, channels, dtype=dtype)
    check_forward(place, x, torch.randn(channels, dtype=dtype), torch.randn_like(x) if with_residual else None)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("channels", [4096, 4104, 5000, 9001])
@pytest.mark.parametrize("place", PLACES)
def test_rows_that_registers_do_not_hold(place, channels, dtype):
    x = torch.randn(2, channels, dtype=dtype)
    weight = torch.randn(channels, dtype=dtype)
    check_forward(place, x, weight)
    check_forward(place, x, weight, torch.randn_like(x))
    check_backward(place, x, weight, chunks=2)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("place", PLACES)
def test_strided_expanded_and_misaligned_inputs(place, dtype):
    base = torch.randn(4, 6, 136, dtype=dtype)
    weight = torch.randn(64, dtype=dtype)
    contiguous = torch.randn(4, 6, 64, dtype=dtype)
    views = {
        "aligned rows": base[:, :, 8:72],
        "off alignment": base[:, :, 1:65],
        "transposed": base[:, :, :64].reshape(6, 4, 64).transpose(0, 1),
        "every second row": base[:, :, :64].repeat(2, 1, 1)[::2],
        "expanded": base[1:2, :, 3:67].expand(4, 6, 64),
    }
    for x in views.values():
        check_forward(place, x, weight, contiguous)
        check_forward(place, contiguous, weight, x)
    five_dims = torch.randn(3, 2, 2, 3, 2, 72, dtype=dtype).permute(3, 1, 4, 0, 2, 5)[..., :64]
    check_forward(place, five_dims, weight)
    check_forward(place, contiguous, torch.randn(65, dtype=dtype)[1:])


@pytest.mark.parametrize("place", PLACES)
def test_outliers_zeros_and_non_finite_rows(place):
    x = torch.randn(4, 128)
    x[0, 5] = 1e4
    x[1] = 0
    x[2] *= 1e-20
    weight = torch.ones(128)
    check_forward(place, x, weight)
    x[3, 7] = torch.inf
    y = forward(place, x, weight, None)[0]
    assert y[:3].isfinite().all()
    assert y[3, 7].isnan(), "inf / inf is not a number, in one row only"


def backward(place: str, grad_y: Tensor, grad_hidden: Tensor | None, hidden: Tensor, weight: Tensor, chunks: int):
    """(grad_x, grad_weight) of the kernels."""
    rstd = reference.forward(hidden, weight, EPS)[2]
    if place == "gpu":
        grad_y, hidden, weight, rstd = map(to_gpu, (grad_y, hidden, weight, rstd))
        grad_hidden = None if grad_hidden is None else to_gpu(grad_hidden)
    grad_x = torch.empty(hidden.shape, dtype=hidden.dtype, device=hidden.device)
    grad_weight = torch.empty_like(weight)
    partial = torch.empty(chunks, weight.shape[0], device=hidden.device)
    arguments = grad_y, grad_hidden, hidden, weight, rstd, grad_x, grad_weight, partial
    if place == "gpu":
        _cuda.rms_norm_backward(*arguments, torch.cuda.current_stream().cuda_stream)
    else:
        inputs = {"grad_y": grad_y, "grad_hidden": grad_hidden, "hidden": hidden, "weight": weight, "rstd": rstd}
        outputs = {"grad_x": grad_x, "grad_weight": grad_weight, "partial": partial}
        interpret(_cuda.plan_rms_norm_backward(*arguments), inputs, outputs)
    return grad_x, grad_weight


def gradients(dtype: torch.dtype, grad_y: Tensor, grad_hidden: Tensor | None, hidden: Tensor, weight: Tensor):
    """(grad_x, grad_weight) by autograd, in dtype."""
    h, w = (t.detach().to(dtype).requires_grad_() for t in (hidden, weight))
    y = h * torch.rsqrt(h.square().mean(-1, keepdim=True) + EPS) * w
    y.backward(grad_y.to(dtype))
    return h.grad if grad_hidden is None else h.grad + grad_hidden.to(dtype), w.grad


def check_backward(place: str, hidden: Tensor, weight: Tensor, chunks: int) -> None:
    for with_residual in (False, True):
        grad_y = torch.randn(hidden.shape, dtype=hidden.dtype)
        grad_hidden = torch.randn_like(grad_y) if with_residual else None
        grad_x, grad_weight = backward(place, grad_y, grad_hidden, hidden, weight, chunks)
        (exact_x, exact_w), (plain_x, plain_w) = (
            gradients(dtype, grad_y, grad_hidden, hidden, weight) for dtype in (torch.float64, hidden.dtype)
        )
        rstd = torch.rsqrt(hidden.double().square().mean(-1, keepdim=True) + EPS)
        term_x = largest(grad_y.double() * weight.double() * rstd)  # what cancels in grad_x, fully so for C = 1
        term_w = largest(grad_y.double() * hidden.double() * rstd)
        rows = hidden.numel() // hidden.shape[-1]
        assert_close("grad_x", grad_x, exact_x, plain_x, hidden.shape[-1], largest=term_x)
        assert_close("grad_weight", grad_weight, exact_w, plain_w, rows, largest=term_w)


def largest(terms: Tensor) -> float:
    return terms.abs().max().item() if terms.numel() else 0.0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("channels", CHANNELS)
@pytest.mark.parametrize(("rows", "chunks"), [(0, 1), (1, 1), (3, 2), (17, 5), (17, 17), (2, 6)])
@pytest.mark.parametrize("place", PLACES)
def test_backward(place, rows, chunks, channels, dtype):
    check_backward(place, torch.randn(rows, channels, dtype=dtype), torch.randn(channels, dtype=dtype), chunks)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("place", PLACES)
def test_backward_of_strided_and_misaligned_inputs(place, dtype):
    base = torch.randn(4, 6, 136, dtype=dtype)
    weight = torch.randn(64, dtype=dtype)
    for hidden in (base[:, :, 8:72], base[:, :, 1:65], base[:, :, :64].reshape(6, 4, 64).transpose(0, 1)):
        check_backward(place, hidden, weight, chunks=5)


@pytest.mark.parametrize("place", PLACES)
def test_backward_gives_the_same_bits_every_time(place):
    hidden, weight = torch.randn(40, 128), torch.randn(128)
    grad_y = torch.randn_like(hidden)
    first, second = (backward(place, grad_y, None, hidden, weight, chunks=7) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second))


def test_accesses_are_wide_where_they_can_be_and_only_there():
    def kernel(x: Tensor, weight: Tensor) -> str:
        return _cuda.plan_rms_norm(x, None, weight, torch.empty(x.shape, dtype=x.dtype), None, None, EPS).kernel

    for dtype, wide, narrow in (
        (torch.float32, "rms_norm_f32x4", "rms_norm_f32x1"),
        (torch.float16, "rms_norm_f16x8", "rms_norm_f16x1"),
    ):
        x, weight = torch.empty(6, 136, dtype=dtype), torch.empty(64, dtype=dtype)
        assert kernel(x[:, :64], weight) == wide
        assert kernel(x[:, 1:65], weight) == narrow, "the pointer is off alignment"
        assert kernel(torch.empty(6, 137, dtype=dtype)[:, :64], weight) == narrow, "the stride is"
        assert kernel(x[:, :63], weight[:63]) == narrow, "the length is"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("channels", [0, *CHANNELS, 4096, 100_000])
def test_launch_plans_fit_pascal(channels, dtype):
    x = torch.empty(3, channels, dtype=dtype)
    weight, rstd = torch.empty(channels, dtype=dtype), torch.empty(3)
    partial = torch.empty(_cuda.rms_norm_backward_chunks(3, channels), channels)
    plans = [
        _cuda.plan_rms_norm(x, None, weight, x, None, rstd, EPS),
        *_cuda.plan_rms_norm_backward(x, None, x, weight, rstd, x, weight, partial),
    ]
    for plan in plans:
        resources = kernel_report(plan.image)[plan.kernel]
        threads = plan.block[0] * plan.block[1] * plan.block[2]
        assert threads <= 1024
        assert threads % 32 == 0
        assert threads * resources["registers"] <= 65536
        assert resources["shared_bytes"] + plan.shared_bytes <= 48 * 1024
        assert resources["spill_bytes"] == 0
        assert (plan.grid[0] == 0) == (channels == 0)
        expected = [parameter["size"] for parameter in resources["parameters"]]
        assert [len(value) if kind == "bytes" else 8 if kind == "pointer" else 4 for _, kind, value in plan.args] == (
            expected
        )


def test_chunks_grow_with_rows_up_to_a_bound():
    assert _cuda.rms_norm_backward_chunks(0, 128) == 1
    assert _cuda.rms_norm_backward_chunks(16, 128) == 2
    assert _cuda.rms_norm_backward_chunks(10**6, 2048) == 168


def test_traffic_is_what_the_comment_above_the_kernel_says():
    rows, channels = 32, 2048
    x, residual, weight = torch.randn(rows, channels), torch.randn(rows, channels), torch.randn(channels)
    y, hidden, rstd = torch.empty_like(x), torch.empty_like(x), torch.empty(rows)
    plan = _cuda.plan_rms_norm(x, residual, weight, y, hidden, rstd, EPS)
    inputs, outputs = {"x": x, "residual": residual, "weight": weight}, {"y": y, "hidden": hidden, "rstd": rstd}
    counts = interpret([plan], inputs, outputs)
    assert counts.loaded_bytes == 4 * channels * 3 * rows, "x, residual and the weight once a row"
    assert counts.stored_bytes == 4 * channels * 2 * rows + 4 * rows, "h, y and rstd"
    sectors = 4 * channels // 32
    # A sector that two buffers share counts for both, so a few more than the exact number may be seen.
    assert counts.distinct_loaded_sectors - sectors * (2 * rows + 1) in range(4)
    assert counts.bank_conflicts == 0
    assert counts.barriers == rows, "one barrier a row"


def test_the_interpreter_sees_a_wrong_plan():
    x, weight = torch.randn(4, 128), torch.randn(128)
    y = torch.empty_like(x)
    plan = _cuda.plan_rms_norm(x, None, weight, y, None, None, EPS)
    with pytest.raises(ptx.PtxError, match="out of bounds"):
        interpret([plan], {"x": x[:3], "weight": weight}, {"y": y})
    with pytest.raises(ptx.PtxError, match="store to y, which is an input"):
        interpret([plan], {"x": x, "weight": weight, "y": y}, {})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": torch.empty(7)}, "weight"),
        ({"y": torch.empty(2, 8, dtype=torch.float16)}, "y"),
        ({"x": torch.empty(2, 8, dtype=torch.bfloat16)}, "dtype"),
        ({"residual": torch.empty(2, 8)}, "residual needs hidden"),
        ({"rstd": torch.empty(3)}, "rstd"),
    ],
)
def test_what_memory_safety_needs_is_checked(change, message):
    arguments = {"x": torch.empty(2, 8), "residual": None, "weight": torch.empty(8), "y": torch.empty(2, 8)}
    arguments |= {"hidden": None, "rstd": None} | change
    with pytest.raises(ValueError, match=message):
        _cuda.plan_rms_norm(*arguments.values(), EPS)


def test_tensors_on_the_cpu_are_not_launched():
    x = torch.empty(2, 8)
    with pytest.raises(ValueError, match="needs tensors on a GPU"):
        _cuda.rms_norm(x, None, x[0], torch.empty_like(x), None, None, EPS, 0)
