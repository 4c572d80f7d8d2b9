"""rotary against a rotation of complex numbers in float64, on every backend by name."""

import pytest
import torch
from utils import DTYPES, assert_close, backends_of, device_of, on, refuses_gradients

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
@pytest.mark.parametrize("dim", [2, 8, 30, 32, 34, 64, 72, 128, 256])
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
def test_strides_and_broadcasts(backend):
    base = torch.randn(2, 7, 5, 3, 40, dtype=torch.float64)  # (B, L, heads, 3, D) as of a fused product
    angle = torch.rand(2, 1, 7, 8, dtype=torch.float64).repeat(1, 1, 1, 2)
    q, k = base[:, :, :4, 0, 3:19].transpose(1, 2), base[:, :, :2, 1, 5:21].transpose(1, 2)
    for query, key, cos, sin in (
        (q, k, angle.cos(), angle.sin()),
        (q, k, angle.cos()[:1], angle.sin()[:1, 0]),
        (q, k[:, :1].expand(-1, 3, -1, -1), angle.cos(), angle.sin()),
        (q, k.transpose(0, 3).contiguous().transpose(0, 3), angle.cos(), angle.sin()),
        (q[:, :, :1], k[:, :, :1], angle.cos()[:, :, 2:3], angle.sin()[:, :, 2:3]),
        (q[:, :, :0], k[:, :, :0], angle.cos()[:, :, :0], angle.sin()[:, :, :0]),
        (q[0, 0], k[0, 0], angle.cos()[0, 0], angle.sin()[0, 0]),
        (q[0, 0, 0], k[0, 0, 0], angle.cos()[0, 0, 0], angle.sin()[0, 0, 0]),
    ):
        with on(backend):
            ours = rotary(query, key, cos, sin)
        for x, y in zip((query, key), ours):
            half = torch.cat((-x[..., 8:], x[..., :8]), -1)
            torch.testing.assert_close(y, x * cos + half * sin)


@pytest.mark.parametrize("backend", BACKENDS)
def test_tokens_memory_stays_tokens_memory(backend):
    q, k = torch.randn(2, 7, 4, 16).transpose(1, 2), torch.randn(2, 7, 2, 16).transpose(1, 2)
    with on(backend):
        for y in rotary(q, k, angles(7, 16).cos(), angles(7, 16).sin()):
            assert y.transpose(1, 2).is_contiguous()


def test_a_kernel_says_which_angles_it_does_not_take():
    q = torch.randn(1, 2, 3, 8)
    for name in (b.values[0] for b in BACKENDS if b.values[0].startswith("cpu") and not b.marks):
        with (
            on(name),
            pytest.raises(RuntimeError, match=r"cos and sin are torch.float64 and torch.float64, not torch.fl"),
        ):
            rotary(q, q, torch.ones(3, 8).double(), torch.ones(3, 8).double())
        with on(name), pytest.raises(RuntimeError, match="cos or sin is broadcast over the last dimension"):
            rotary(q, q, torch.ones(3, 1), torch.ones(3, 8))
    assert torch.equal(rotary(q, q, torch.ones(3, 1), torch.zeros(3, 8))[0], q)


def test_compiles_into_one_graph():
    q, cos = torch.randn(1, 2, 3, 8), torch.randn(3, 8)
    compiled = torch.compile(lambda q: rotary(q * 2, q, cos, cos)[0] + 1, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(q), rotary(q * 2, q, cos, cos)[0] + 1)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients(backend):
    """Gradients are the reference's; kernels refuse the call."""
    q, k = (torch.randn(1, heads, 3, 4, dtype=torch.float64, requires_grad=True) for heads in (2, 1))
    angle = angles(3, 4).double()
    if not refuses_gradients(backend, lambda: rotary(q, k, angle.cos(), angle.sin())):
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
