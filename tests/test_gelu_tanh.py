"""gelu_tanh against torch's in float64, on every backend by name."""

import math

import pytest
import torch
import torch.nn.functional as F
from utils import DTYPES, LENGTHS, assert_close, backends_of, device_of, on, refuses_gradients, ulps

from qvl_kernels import gelu_tanh

BACKENDS = backends_of("gelu_tanh")


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize(
    "shape", [(), (0,), (2, 0, 3), (3, 17), (2, 3, 64), (1, 9000), *((n,) for n in LENGTHS)], ids=str
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_forward(backend, shape, dtype):
    x = torch.randn(shape, dtype=dtype, device=device_of(backend)) * 3
    with on(backend):
        ours = gelu_tanh(x)
    plain = 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x * x * x)))
    assert_close("y", ours, F.gelu(x.double(), approximate="tanh"), plain, 1)


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_size_of_input(backend):
    """No error above 2 eps |x| for 4,000,000 inputs; kernels, whose form does not cancel, keep their digits too: their
    exponent has four roundings (x^2, a constant, the sum, the product), each of eps / 2 <= 1 ULP of the result for each
    unit of the exponent, and what follows it 4 ULPs."""
    x = torch.linspace(-9.5, 9.5, 4_000_000)
    wide = x.double()
    exponent = 2 * math.sqrt(2 / math.pi) * (wide + 0.044715 * wide**3)
    exact = wide / (1 + torch.exp(-exponent))
    with on(backend):
        y = gelu_tanh(x)
    assert ((y.double() - exact).abs() <= 2 * torch.finfo(torch.float32).eps * wide.abs()).all()
    if backend != "reference":
        assert (ulps(y, exact) <= 4 + 4 * exponent.abs()).all()
        assert ulps(y, exact)[x > 0].max() < 3


@pytest.mark.parametrize("backend", BACKENDS)
def test_infinities_nan_and_large_inputs_are_torchs(backend):
    x = torch.tensor([-torch.inf, torch.inf, torch.nan, -1e4, 1e4, -3e38, 3e38, 1e-40, -1e-40, 0.0, -0.0])
    with on(backend):
        y = gelu_tanh(x)
    torch.testing.assert_close(y, F.gelu(x, approximate="tanh"), rtol=0, atol=1e-45, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_strided_inputs(backend, dtype):
    base = torch.randn(4, 6, 70, dtype=dtype)
    for x in (base[..., 1:34], base.transpose(0, 1)[..., 3:], base[:, :1, :33].expand(4, 6, 33), base[..., ::2]):
        plain = 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x * x * x)))
        with on(backend):
            assert_close("y", gelu_tanh(x), F.gelu(x.double(), approximate="tanh"), plain, 1)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients(backend):
    """Gradients are the reference's; kernels refuse the call."""
    x = torch.randn(7, dtype=torch.float64, requires_grad=True)
    if not refuses_gradients(backend, lambda: gelu_tanh(x)):
        assert torch.autograd.gradcheck(gelu_tanh, (x,))


def test_compiles_into_one_graph():
    x = torch.randn(4, 8)
    compiled = torch.compile(lambda x: gelu_tanh(x * 2) + 1, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), gelu_tanh(x * 2) + 1)


def test_integers_are_refused():
    with pytest.raises(TypeError, match="gelu_tanh: x must be float32, bfloat16, float16 or float64, got int64"):
        gelu_tanh(torch.arange(3))
