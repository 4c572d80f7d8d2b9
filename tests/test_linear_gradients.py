"""The gradient of packed_linear with respect to x, and what torch.library sees."""

import pytest
import torch
from utils import DTYPES, assert_close, backends_of, on

from qvl_kernels import PackedLinear, pack_linear, packed_linear

BACKENDS = backends_of("packed_linear")
FORMATS = ["fp32", "bf16", "int8", "int4"]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_gradient_of_x(backend, format, dtype):
    """grad_x = grad_y W, from the dequantised weights: no integers in the gradient."""
    for rows, k, n in [(1, 1, 1), (1, 65, 17), (7, 129, 300), (50, 300, 33), (3, 128, 0), (0, 8, 4)]:
        packed = pack_linear(torch.randn(n, k) / 8, torch.randn(n), format=format)
        x = torch.randn(rows, k, dtype=dtype, requires_grad=True)
        with on(backend):
            y = packed_linear(x, packed)
            grad = torch.randn_like(y)
            y.backward(grad)
        dense = packed.dequantize()
        exact, plain = grad.double() @ dense.double(), grad @ dense.to(dtype)
        largest = 0.0
        if dtype == torch.float32 and exact.numel() * n:
            largest = (grad.double().norm(dim=-1).max() * dense.double().norm(dim=0).max()).item()
        assert_close("grad_x", x.grad, exact, plain, max(n, 1), largest=largest)


@pytest.mark.parametrize("activation", [None, "gelu_tanh", "swiglu"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_through_the_epilogue(backend, activation):
    packed = pack_linear(torch.randn(24, 40) / 6, torch.randn(24), format="bf16")
    x = torch.randn(3, 40, requires_grad=True)
    residual = torch.randn(3, 12 if activation == "swiglu" else 24, requires_grad=True)
    with on(backend):
        y = packed_linear(x, packed, activation=activation, residual=residual)
        grad = torch.randn_like(y)
        ours = torch.autograd.grad(y, (x, residual), grad)
        with torch.no_grad():
            torch.testing.assert_close(packed_linear(x, packed, activation=activation, residual=residual), y)
    wide, wide_residual = x.detach().double().requires_grad_(), residual.detach().double().requires_grad_()
    with on("reference"):
        exact = packed_linear(wide, packed, activation=activation, residual=wide_residual)
    expected = torch.autograd.grad(exact, (wide, wide_residual), grad.double())
    for a, b in zip(ours, expected):
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-5)


def test_gradcheck_in_float64():
    packed = pack_linear(torch.randn(4, 5), torch.randn(4), format="int4")
    x = torch.randn(2, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: packed_linear(x, packed), (x,))


@pytest.mark.parametrize("format", FORMATS)
def test_registration(format):
    packed = pack_linear(torch.randn(6, 40), torch.randn(6), format=format)
    x = torch.randn(2, 3, 40, requires_grad=True)
    operands = packed.weight, packed.scale, packed.minimum
    torch.library.opcheck(torch.ops.qvl.packed_linear.default, (x, *operands, packed.bias, None, None, "medium"))
    grad = torch.randn(2, 3, 6)
    torch.library.opcheck(torch.ops.qvl.packed_linear_backward.default, (grad, *operands, 40))
    residual = torch.randn(2, 3, 3)
    fused = x.detach(), *operands, packed.bias, "swiglu", residual, "highest"
    torch.library.opcheck(torch.ops.qvl.packed_linear.default, fused)


def test_the_fused_operation_has_no_gradient_of_its_own():
    packed = pack_linear(torch.randn(6, 4), format="fp32")
    x = torch.randn(2, 4, requires_grad=True)
    y = torch.ops.qvl.packed_linear(x, packed.weight, None, None, None, "gelu_tanh", None, "highest")
    with pytest.raises(RuntimeError, match="use packed_linear"):
        y.sum().backward()


@pytest.mark.parametrize("format", ["bf16", "int4"])
def test_torch_compile_sees_one_graph(format):
    layer = PackedLinear(pack_linear(torch.randn(8, 40), torch.randn(8), format=format))

    def step(x):
        return layer(torch.relu(x), activation="swiglu").sum() + layer(x, residual=torch.ones(2, 8)).sum()

    x = torch.randn(2, 40, requires_grad=True)
    expected = step(x)
    (grad,) = torch.autograd.grad(expected, x)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    y = compiled(x)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(torch.autograd.grad(y, x)[0], grad)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x.detach()), expected)
