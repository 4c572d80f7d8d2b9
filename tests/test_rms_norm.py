"""rms_norm against its float64 definition, on every backend by name."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from utils import DTYPES, LENGTHS, assert_close, backends_of, device_of, on

from qvl_kernels import _backends, rms_norm
from qvl_kernels.reference import rms_norm as reference

BACKENDS = backends_of("rms_norm")
NATIVE = [parameter for parameter in BACKENDS if parameter.values[0] != "reference"]


def takes(backend: str, dtype: torch.dtype) -> bool:
    x = torch.empty(1, 1, dtype=dtype, device=device_of(backend))
    return _backends._operations["rms_norm"].implementations[backend].supports(x) is None


def check_forward(backend: str, x: Tensor, weight: Tensor, residual: Tensor | None, eps: float = 1e-6) -> None:
    if not takes(backend, x.dtype):
        pytest.skip(f"{backend} does not take {x.dtype}")
    with on(backend):
        got = rms_norm(x, weight, eps) if residual is None else rms_norm(x, weight, eps, residual)
    y, hidden = (got, x) if residual is None else got
    if residual is not None:
        assert torch.equal(hidden, x + residual), "h must be x + residual, rounded once"
    exact = reference.forward(hidden.double(), weight.double(), eps)[0]
    plain = hidden * torch.rsqrt(hidden.square().mean(-1, keepdim=True) + eps) * weight
    assert_close("y", y, exact, plain, x.shape[-1])


@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("channels", LENGTHS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_forward(backend, channels, dtype, with_residual):
    x = torch.randn(3, 5, channels, dtype=dtype, device=device_of(backend))
    check_forward(backend, x, torch.randn_like(x[0, 0]), torch.randn_like(x) if with_residual else None)


@pytest.mark.parametrize("shape", [(0, 8), (3, 0), (0, 0), (2, 0, 5), (8,), (1, 1, 1)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_empty_and_small_shapes(backend, shape):
    x = torch.randn(shape, device=device_of(backend), requires_grad=True)
    weight = torch.ones(shape[-1], device=x.device, requires_grad=True)
    with on(backend):
        y, hidden = rms_norm(x, weight, 1e-6, residual=x.detach())
        assert y.shape == hidden.shape == x.shape
        (y.sum() + hidden.sum()).backward()
    assert x.grad.shape == x.shape
    if 0 in shape:
        assert torch.equal(weight.grad, torch.zeros_like(weight)), "a sum over no rows is zero"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_strided_expanded_and_misaligned_inputs(backend, dtype):
    device = device_of(backend)
    base = torch.randn(4, 6, 130, dtype=dtype, device=device)
    weight = torch.randn(64, dtype=dtype, device=device)
    residual = torch.randn(4, 6, 64, dtype=dtype, device=device)
    for x in (
        base[:, :, 1:65],  # rows start off alignment
        base[:, :, :64].transpose(0, 1).transpose(0, 1)[::2].repeat(2, 1, 1),
        base[1:2, :, 3:67].expand(4, 6, 64),
        base[:, :, ::2][:, :, :64],  # the last stride is 2
        base.transpose(0, 2)[:64].permute(2, 1, 0),  # the last stride is the largest
    ):
        check_forward(backend, x, weight, residual)
        check_forward(backend, residual, weight, x)
    check_forward(backend, residual, torch.randn(129, dtype=dtype, device=device)[1::2], None)


@pytest.mark.parametrize("backend", BACKENDS)
def test_outliers_zeros_and_non_finite_rows(backend):
    x = torch.randn(4, 128, device=device_of(backend))
    x[0, 5] = 1e4
    x[1] = 0
    x[2] *= 1e-20
    weight = torch.ones(128, device=x.device)
    check_forward(backend, x, weight, None)
    x[3, 7] = torch.inf
    with on(backend):
        y = rms_norm(x, weight, 1e-6)
    assert y[:3].isfinite().all()
    assert y[3, 7].isnan(), "inf / inf is not a number, in one row only"


def check_backward(backend: str, x: Tensor, weight: Tensor, residual: Tensor | None) -> None:
    if not takes(backend, x.dtype):
        pytest.skip(f"{backend} does not take {x.dtype}")
    grad_y, grad_hidden = torch.randn_like(x), torch.randn_like(x)

    def gradients(run, dtype: torch.dtype) -> list[Tensor]:
        leaves = [t.detach().to(dtype).requires_grad_() for t in (x, weight, residual) if t is not None]
        results = run(*leaves)
        grads = [grad_y.to(dtype), grad_hidden.to(dtype)][: len(results)]
        torch.autograd.backward(results, grads)
        return [leaf.grad for leaf in leaves]

    def plain(x: Tensor, weight: Tensor, residual: Tensor | None = None) -> tuple[Tensor, ...]:
        hidden = x if residual is None else x + residual
        y = hidden * torch.rsqrt(hidden.square().mean(-1, keepdim=True) + 1e-6) * weight
        return (y,) if residual is None else (y, hidden)

    def ours(x: Tensor, weight: Tensor, residual: Tensor | None = None) -> tuple[Tensor, ...]:
        with on(backend):
            return (rms_norm(x, weight, 1e-6),) if residual is None else rms_norm(x, weight, 1e-6, residual)

    with on(backend):
        got = gradients(ours, x.dtype)
    rows = max(1, x.numel() // x.shape[-1])
    exact, low = gradients(plain, torch.float64), gradients(plain, x.dtype)
    hidden = (x if residual is None else x + residual).double()
    rstd = torch.rsqrt(hidden.square().mean(-1, keepdim=True) + 1e-6)
    term = (grad_y.double() * weight.double() * rstd).abs().max().item()  # what cancels in grad_x, fully so for C = 1
    assert_close("grad_x", got[0], exact[0], low[0], x.shape[-1], largest=term)
    assert_close("grad_weight", got[1], exact[1], low[1], rows)
    if residual is not None:
        assert torch.equal(got[0], got[2]), "x and residual enter by their sum"


@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "channels"), [(1, 1), (1, 129), (3, 64), (17, 65), (40, 1000)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_backward(backend, rows, channels, dtype, with_residual):
    x = torch.randn(rows, channels, dtype=dtype, device=device_of(backend))
    check_backward(backend, x, torch.randn_like(x[0]), torch.randn_like(x) if with_residual else None)


@pytest.mark.parametrize("backend", [b for b in BACKENDS if b.values[0] not in ("cuda", "triton")])
def test_gradcheck_in_float64(backend):
    x, residual, weight = (torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((5, 9), (5, 9), (9,)))
    with on(backend):
        assert torch.autograd.gradcheck(lambda x, w: rms_norm(x, w, 1e-6), (x, weight))
        assert torch.autograd.gradcheck(lambda x, w, r: rms_norm(x, w, 1e-6, r), (x, weight, residual))


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_output_may_go_unused(backend):
    x = torch.randn(4, 8, device=device_of(backend), requires_grad=True)
    weight = torch.ones(8, device=x.device, requires_grad=True)
    with on(backend):
        rms_norm(x, weight, 1e-6, residual=x.detach())[1].sum().backward()
    assert torch.equal(x.grad, torch.ones_like(x))
    assert weight.grad is None


@pytest.mark.parametrize("backend", [b for b in BACKENDS if b.values[0].startswith("cpu")])
def test_results_do_not_depend_on_the_number_of_threads(backend):
    x, weight = torch.randn(200, 512), torch.randn(512)
    grad, rstd = torch.randn(200, 512), torch.rand(200)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            with on(backend):
                results.append(
                    (rms_norm(x, weight, 1e-6), *torch.ops.qvl.rms_norm_backward(grad, None, x, weight, rstd))
                )
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other))


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(0, 20),
    channels=st.integers(1, 300),
    offset=st.integers(0, 9),
    scale=st.sampled_from([1e-3, 1.0, 1e3]),
    dtype=st.sampled_from(DTYPES),
    with_residual=st.booleans(),
)
@pytest.mark.parametrize("backend", [b for b in NATIVE if b.values[0].startswith("cpu")])
def test_random_shapes_and_alignments(backend, rows, channels, offset, scale, dtype, with_residual):
    buffer = torch.randn(rows, channels + offset) * scale
    x = buffer.to(dtype)[:, offset:]
    check_forward(backend, x, torch.randn(channels).to(dtype), torch.randn_like(x) if with_residual else None)


@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck(backend):
    device = device_of(backend)
    x, residual = (torch.randn(2, 3, 8, device=device, requires_grad=True) for _ in range(2))
    weight = torch.randn(8, device=device, requires_grad=True)
    with on(backend):
        torch.library.opcheck(torch.ops.qvl.rms_norm.default, (x, weight, 1e-6))
        torch.library.opcheck(torch.ops.qvl.add_rms_norm.default, (x, residual, weight, 1e-6))
        torch.library.opcheck(
            torch.ops.qvl.rms_norm_backward.default,
            tuple(t.detach() for t in (x, residual, x, weight)) + (torch.rand(2, 3, device=device),),
        )


def test_compiles_into_one_graph():
    x, weight = torch.randn(4, 32), torch.randn(32)
    compiled = torch.compile(lambda x, w: rms_norm(x * 2, w, 1e-6, x)[0] + 1, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, weight), rms_norm(x * 2, weight, 1e-6, x)[0] + 1)


def test_meta_tensors_have_shapes():
    x, weight = torch.empty(2, 5, 8, device="meta"), torch.empty(8, device="meta")
    y, hidden = rms_norm(x, weight, 1e-6, residual=x)
    assert y.shape == hidden.shape == (2, 5, 8)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (([1.0], torch.ones(1)), TypeError, "rms_norm: x must be a torch.Tensor, got list"),
        (
            (torch.ones(2, 4), torch.ones(3)),
            ValueError,
            r"rms_norm: weight must have shape \(C,\) = \(4,\), got \(3,\)",
        ),
        (
            (torch.ones(2, 4), torch.ones(4).half()),
            TypeError,
            "rms_norm: weight must have x's dtype float32, got float16",
        ),
        ((torch.ones(2, 4).int(), torch.ones(4).int()), TypeError, "rms_norm: x must be float32, bfloat16"),
        ((torch.ones(()), torch.ones(1)), ValueError, r"rms_norm: x must have shape \(\.\.\., C\), got \(\)"),
        ((torch.ones(2, 4), torch.ones(4, device="meta")), ValueError, "rms_norm: weight must be on x's device cpu"),
    ],
)
def test_bad_arguments_are_named(arguments, error, message):
    with pytest.raises(error, match=message):
        rms_norm(*arguments, 1e-6)


def test_residual_of_another_shape_is_named():
    with pytest.raises(ValueError, match=r"rms_norm: residual must have shape x's = \(2, 4\), got \(2, 5\)"):
        rms_norm(torch.ones(2, 4), torch.ones(4), 1e-6, residual=torch.ones(2, 5))
