"""layer_norm against torch's in float64, on every backend by name."""

import pytest
import torch
import torch.nn.functional as F
from utils import DTYPES, LENGTHS, assert_close, backends_of, device_of, on

from qvl_kernels import layer_norm

BACKENDS = backends_of("layer_norm")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("channels", LENGTHS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_forward(backend, channels, dtype):
    x = torch.randn(3, 4, channels, dtype=dtype, device=device_of(backend)) + 3
    weight, bias = torch.randn_like(x[0, 0]), torch.randn_like(x[0, 0])
    with on(backend):
        ours = layer_norm(x, weight, bias, 1e-6)
    exact = F.layer_norm(x.double(), (channels,), weight.double(), bias.double(), 1e-6)
    centred = x - x.mean(-1, keepdim=True)
    plain = centred * torch.rsqrt(centred.square().mean(-1, keepdim=True) + 1e-6) * weight + bias
    # With one channel x - mean(x) cancels to (almost) nothing, which 1 / sqrt(eps) = 1000 then magnifies.
    magnified = (x.abs().max() * torch.rsqrt(x.double().var(-1, correction=0) + 1e-6).max() * weight.abs().max()).item()
    assert_close("y", ours, exact, plain, channels, largest=magnified)


@pytest.mark.parametrize("shape", [(0, 8), (8,), (2, 0, 8)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_shapes(backend, shape):
    with on(backend):
        assert layer_norm(torch.randn(shape), torch.ones(8), torch.zeros(8), 1e-5).shape == shape


@pytest.mark.parametrize("backend", BACKENDS)
def test_strided_inputs(backend):
    x = torch.randn(4, 40, dtype=torch.float64)[:, 1::2]
    weight, bias = torch.randn(2, 20, dtype=torch.float64)
    with on(backend):
        torch.testing.assert_close(layer_norm(x, weight, bias, 1e-6), F.layer_norm(x, (20,), weight, bias, 1e-6))


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients(backend):
    x, weight, bias = (torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((5, 6), (6,), (6,)))
    with on(backend):
        assert torch.autograd.gradcheck(lambda *a: layer_norm(*a, 1e-5), (x, weight, bias))


def test_bad_arguments_are_named():
    x = torch.ones(2, 4)
    with pytest.raises(ValueError, match=r"layer_norm: bias must have shape \(C,\) = \(4,\), got \(3,\)"):
        layer_norm(x, torch.ones(4), torch.ones(3), 1e-6)
    with pytest.raises(TypeError, match="layer_norm: weight must have x's dtype float32, got float64"):
        layer_norm(x, torch.ones(4).double(), torch.ones(4), 1e-6)
