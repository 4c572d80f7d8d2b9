"""layer_norm against torch's in float64, on every backend by name."""

import pytest
import torch
import torch.nn.functional as F
from utils import DTYPES, LENGTHS, assert_close, backends_of, device_of, on, refuses_gradients

from qvl_kernels import layer_norm

BACKENDS = backends_of("layer_norm")


def check_forward(backend, x, weight, bias, residual=None):
    channels = x.shape[-1]
    with on(backend):
        got = layer_norm(x, weight, bias, 1e-6) if residual is None else layer_norm(x, weight, bias, 1e-6, residual)
    ours, hidden = (got, x) if residual is None else got
    if residual is not None:
        assert torch.equal(hidden, x + residual), "h must be x + residual, rounded once"
    x = hidden
    exact = F.layer_norm(x.double(), (channels,), weight.double(), bias.double(), 1e-6)
    centred = x - x.mean(-1, keepdim=True)
    plain = centred * torch.rsqrt(centred.square().mean(-1, keepdim=True) + 1e-6) * weight + bias
    # With one channel x - mean(x) cancels to (almost) nothing, which 1 / sqrt(eps) = 1000 then magnifies.
    magnified = (x.abs().max() * torch.rsqrt(x.double().var(-1, correction=0) + 1e-6).max() * weight.abs().max()).item()
    assert_close("y", ours, exact, plain, channels, largest=magnified)


@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("channels", LENGTHS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_forward(backend, channels, dtype, with_residual):
    x = torch.randn(3, 4, channels, dtype=dtype, device=device_of(backend)) + 3
    weight, bias = torch.randn_like(x[0, 0]), torch.randn_like(x[0, 0])
    check_forward(backend, x, weight, bias, torch.randn_like(x) if with_residual else None)


@pytest.mark.parametrize("shape", [(0, 8), (8,), (2, 0, 8)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_shapes(backend, shape):
    with on(backend):
        assert layer_norm(torch.randn(shape), torch.ones(8), torch.zeros(8), 1e-5).shape == shape


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_strided_expanded_and_misaligned_inputs(backend, dtype):
    base = torch.randn(4, 6, 130, dtype=dtype)
    weight, bias = torch.randn(2, 64, dtype=dtype)
    residual = torch.randn(4, 6, 64, dtype=dtype)
    for x in (
        base[:, :, 1:65],
        base.transpose(0, 1)[..., :64].contiguous().transpose(0, 1),
        base[1:2, :, 3:67].expand(4, 6, 64),
        base[:, :, ::2][:, :, :64],
        base.transpose(0, 2)[:64].permute(2, 1, 0),
    ):
        check_forward(backend, x, weight, bias)
        check_forward(backend, x, weight, bias, residual)
        check_forward(backend, residual, weight, bias, x)
    check_forward(backend, residual, *torch.randn(64, 2, dtype=dtype).T)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_large_mean_does_not_eat_the_variance(backend):
    """mean(h^2) - mean(h)^2 would be 1e8 - 1e8 in float32: nothing."""
    x = torch.randn(4, 1024) + 1e4
    check_forward(backend, x, torch.ones(1024), torch.zeros(1024))
    with on(backend):
        y = layer_norm(x, torch.ones(1024), torch.zeros(1024), 1e-6)
    torch.testing.assert_close(y.std(-1, correction=0), torch.ones(4), rtol=1e-3, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_zeros_and_non_finite_rows(backend):
    x = torch.randn(3, 128)
    x[0] = 0
    x[2, 7] = torch.inf
    bias = torch.randn(128)
    with on(backend):
        y = layer_norm(x, torch.ones(128), bias, 1e-6)
    assert torch.equal(y[0], bias)
    assert y[1].isfinite().all()
    assert y[2].isnan().all()


@pytest.mark.parametrize("backend", [b for b in BACKENDS if b.values[0].startswith("cpu")])
def test_results_do_not_depend_on_the_number_of_threads(backend):
    x, weight, bias = torch.randn(200, 512), torch.randn(512), torch.randn(512)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            with on(backend):
                results.append(layer_norm(x, weight, bias, 1e-6))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients(backend):
    """Gradients are the reference's; kernels refuse the call."""
    x, weight, bias = (torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((5, 6), (6,), (6,)))
    residual = torch.randn(5, 6, dtype=torch.float64, requires_grad=True)
    if not refuses_gradients(backend, lambda: layer_norm(x, weight, bias, 1e-5)):
        assert torch.autograd.gradcheck(lambda *a: layer_norm(*a, 1e-5), (x, weight, bias))
        assert torch.autograd.gradcheck(lambda *a: layer_norm(*a[:3], 1e-5, a[3]), (x, weight, bias, residual))


def test_compiles_into_one_graph():
    x, weight, bias = torch.randn(4, 8), torch.randn(8), torch.randn(8)
    compiled = torch.compile(lambda x: layer_norm(x * 2, weight, bias, 1e-6, x)[0], fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), layer_norm(x * 2, weight, bias, 1e-6, x)[0])


def test_bad_arguments_are_named():
    x = torch.ones(2, 4)
    with pytest.raises(ValueError, match=r"layer_norm: bias must have shape \(C,\) = \(4,\), got \(3,\)"):
        layer_norm(x, torch.ones(4), torch.ones(3), 1e-6)
    with pytest.raises(ValueError, match=r"layer_norm: residual must have shape x's = \(2, 4\), got \(2, 5\)"):
        layer_norm(x, torch.ones(4), torch.ones(4), 1e-6, torch.ones(2, 5))
    with pytest.raises(TypeError, match="layer_norm: weight must have x's dtype float32, got float64"):
        layer_norm(x, torch.ones(4).double(), torch.ones(4), 1e-6)
