"""rotary against a rotation of complex numbers in float64, on every backend by name."""

import pytest
import torch
from utils import DTYPES, assert_close, backends_of, device_of, on

from qvl_kernels import rotary

BACKENDS = backends_of("rotary")


def angles(length, dim, device="cpu"):
    """(L, D): the angle of pair i at position p is p / 10000^(2 i / D), the same for both halves."""
    frequency = 10000.0 ** (-torch.arange(0, dim, 2, device=device) / dim)
    return (torch.arange(length, device=device)[:, None] * frequency).repeat(1, 2)


def rotated(x, angle):
    first, second = x.double().chunk(2, -1)
    turned = torch.complex(first, second) * torch.polar(torch.ones_like(angle), angle).chunk(2, -1)[0]
    return torch.cat((turned.real, turned.imag), -1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", [2, 8, 72, 128])
@pytest.mark.parametrize("backend", BACKENDS)
def test_rotates_pairs(backend, dim, dtype):
    device = device_of(backend)
    q, k = (torch.randn(2, heads, 9, dim, dtype=dtype, device=device) for heads in (4, 2))
    angle = angles(9, dim, device)
    cos, sin = angle.cos(), angle.sin()
    with on(backend):
        results = rotary(q, k, cos, sin)
    for x, ours in zip((q, k), results):
        half = torch.cat((-x[..., dim // 2 :], x[..., : dim // 2]), -1)
        plain = x * cos.to(dtype) + half * sin.to(dtype)
        # cos and sin are float32's, whatever the dtype of x.
        assert_close("rotated", ours, rotated(x, angle.double()), plain, 2)


@pytest.mark.parametrize("backend", BACKENDS)
def test_packed_tokens_and_strides(backend):
    q, k = torch.randn(5, 2, 3, 8).double().unbind(1)
    angle = angles(5, 8).double()[:, None]
    with on(backend):
        ours = rotary(q, k, angle.cos(), angle.sin())
    for x, y in zip((q, k), ours):
        torch.testing.assert_close(y, rotated(x, angle))


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients(backend):
    q, k = (torch.randn(1, heads, 3, 4, dtype=torch.float64, requires_grad=True) for heads in (2, 1))
    angle = angles(3, 4).double()
    with on(backend):
        assert torch.autograd.gradcheck(lambda q, k: rotary(q, k, angle.cos(), angle.sin()), (q, k))


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        (((2, 3, 7), (2, 3, 7), (3, 7), (3, 7)), "query's last dimension must be even, got 7"),
        (((2, 3, 8), (2, 3, 6), (3, 8), (3, 8)), "key's last dimension must be query's 8"),
        (((2, 3, 8), (2, 3, 8), (4, 8), (3, 8)), r"cos must broadcast to query's \(2, 3, 8\), got \(4, 8\)"),
        (((2, 3, 8), (2, 3, 8), (3, 8), (3, 4)), r"sin must broadcast to query's \(2, 3, 8\), got \(3, 4\)"),
    ],
)
def test_bad_arguments_are_named(shapes, message):
    with pytest.raises(ValueError, match="rotary: " + message):
        rotary(*(torch.zeros(shape) for shape in shapes))
