"""norm_rotary against RMSNorm and a rotation in float64, on every backend by name."""

import pytest
import torch
from utils import DTYPES, assert_close, backends_of, on, refuses_gradients

from qvl_kernels import norm_rotary, rms_norm, rotary
from qvl_kernels.reference import norm_rotary as reference

BACKENDS = backends_of("norm_rotary")


def arguments(batch=2, heads=(4, 2), length=9, dim=128, dtype=torch.float32):
    """query and key as views of (B, L, H, D) memory, their weights, cos and sin (B, 1, L, D)."""
    q, k = (torch.randn(batch, length, h, dim, dtype=dtype).transpose(1, 2) for h in heads)
    angle = (torch.rand(batch, 1, length, dim // 2) * 100).repeat(1, 1, 1, 2)
    weights = torch.randn(2, dim, dtype=dtype).unbind(0)
    if dtype == torch.float64:
        angle = angle.double()
    return q, k, *weights, 1e-6, angle.cos(), angle.sin()


def check(backend, q, k, q_weight, k_weight, eps, cos, sin, key_out=None):
    with on(backend):
        results = norm_rotary(q, k, q_weight, k_weight, eps, cos, sin, key_out=key_out)
    for x, weight, ours in ((q, q_weight, results[0]), (k, k_weight, results[1])):
        exact = reference.forward(x.double(), weight.double(), eps, cos.double(), sin.double())
        normed = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight
        first, second = normed.chunk(2, -1)
        plain = normed * cos.to(x.dtype) + torch.cat((-second, first), -1) * sin.to(x.dtype)
        largest = normed.abs().amax().item() if normed.numel() else 0.0  # the two terms of a rotation may cancel
        assert_close("normed and rotated", ours, exact, plain, x.shape[-1], largest=largest)
    return results


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("dim", [2, 8, 30, 32, 34, 64, 72, 128, 256])
@pytest.mark.parametrize("backend", BACKENDS)
def test_forward(backend, dim, dtype):
    check(backend, *arguments(dim=dim, dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("length", [0, 1, 5])
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_key_goes_into_a_cache_and_nowhere_else(backend, length, dtype):
    cache = torch.full((2, 2, 12, 128), 7.0, dtype=dtype)
    call = arguments(length=length, dtype=dtype)
    view = cache[:, :, 3 : 3 + length]
    query, key = check(backend, *call, key_out=view)
    assert key is view
    assert query.shape == (2, 4, length, 128)
    with on(backend):
        assert torch.equal(norm_rotary(*call)[1], view)
    assert (cache[:, :, :3] == 7).all()
    assert (cache[:, :, 3 + length :] == 7).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_strides_and_broadcasts(backend):
    q, k, q_weight, k_weight, eps, cos, sin = arguments(dim=32)
    product = torch.randn(2, 9, 8 * 32 + 1)[..., 1:].view(2, 9, 8, 32).transpose(1, 2)
    check(backend, product[:, :4], product[:, 4:6], q_weight, k_weight, eps, cos, sin)
    check(backend, q, k, q_weight, k_weight, eps, cos[:1], sin[1:])
    check(backend, q, k[:, :1].expand(2, 3, 9, 32), q_weight, k_weight, eps, cos, sin)
    check(backend, q.contiguous(), k.transpose(0, 3).contiguous().transpose(0, 3), q_weight, k_weight, eps, cos, sin)
    check(backend, q, k, *torch.randn(32, 2).unbind(1), eps, cos.double().float(), sin.transpose(2, 3).contiguous().mT)


@pytest.mark.parametrize("backend", BACKENDS)
def test_outliers_zeros_and_non_finite_heads(backend):
    q, k, *rest = arguments(length=3)
    q[0, 0, 0, 5] = 1e4
    q[0, 1] = 0
    k *= 1e-10
    check(backend, q, k, *rest)
    q[1, 2, 1, 7] = torch.inf
    with on(backend):
        y = norm_rotary(q, k, *rest)[0]
    bad = y.isnan().any(-1)
    assert bad[1, 2, 1]
    assert bad.sum() == 1


@pytest.mark.parametrize("backend", [b for b in BACKENDS if b.values[0].startswith("cpu")])
def test_results_do_not_depend_on_the_number_of_threads(backend):
    call = arguments(heads=(16, 8), length=50)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            with on(backend):
                results.append(norm_rotary(*call))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other))


@pytest.mark.parametrize("with_cache", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients(backend, with_cache):
    """Gradients are those of rms_norm and rotary, one after the other; kernels refuse the call."""
    q, k, q_weight, k_weight, eps, cos, sin = arguments(1, (2, 1), 3, 4, torch.float64)
    leaves = [x.detach().requires_grad_() for x in (q, k, q_weight, k_weight)]

    def call(q, k, q_weight, k_weight):
        key_out = torch.zeros_like(k) if with_cache else None
        return norm_rotary(q, k, q_weight, k_weight, eps, cos, sin, key_out=key_out)

    if not refuses_gradients(backend, lambda: call(*leaves)):
        assert torch.autograd.gradcheck(call, leaves)


def test_is_rms_norm_and_then_rotary_where_autograd_looks():
    q, k, q_weight, k_weight, eps, cos, sin = arguments()
    leaf = q.detach().requires_grad_()
    ours = norm_rotary(leaf, k, q_weight, k_weight, eps, cos, sin)
    theirs = rotary(rms_norm(leaf, q_weight, eps), rms_norm(k, k_weight, eps), cos, sin)
    assert torch.equal(ours[0], theirs[0])
    assert torch.equal(ours[1], theirs[1])
    assert ours[0].requires_grad


def test_compiles_into_one_graph():
    call = arguments()
    compiled = torch.compile(lambda q, *rest: norm_rotary(q * 2, *rest)[0] + 1, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*call), norm_rotary(call[0] * 2, *call[1:])[0] + 1)


@pytest.mark.parametrize(
    ("position", "shape", "message"),
    [
        (0, (2, 4, 128), r"query must have shape \(B, Hq, L, D\) = \(\*, \*, \*, \*\), got \(2, 4, 128\)"),
        (0, (2, 4, 9, 7), "query's last dimension must be even, got 7"),
        (1, (2, 2, 8, 128), r"key must have shape \(B, Hkv, L, D\) = \(2, \*, 9, 128\), got \(2, 2, 8, 128\)"),
        (2, (64,), r"query_weight must have shape \(D,\) = \(128,\), got \(64,\)"),
        (3, (64,), r"key_weight must have shape \(D,\) = \(128,\), got \(64,\)"),
        (5, (2, 4, 9, 128), r"cos must have shape \(B, 1, L, D\) = \(2, 1, 9, 128\), got \(2, 4, 9, 128\)"),
        (6, (9, 128), r"sin must have shape \(B, 1, L, D\) = \(2, 1, 9, 128\), got \(9, 128\)"),
    ],
)
def test_bad_arguments_are_named(position, shape, message):
    call = list(arguments())
    call[position] = torch.ones(shape)
    with pytest.raises(ValueError, match="norm_rotary: " + message):
        norm_rotary(*call)


def test_a_bad_key_out_is_named():
    call = arguments()
    with pytest.raises(ValueError, match=r"key_out must have shape key's = \(2, 2, 9, 128\), got \(2, 2, 8, 128\)"):
        norm_rotary(*call, key_out=torch.zeros(2, 2, 8, 128))
    with pytest.raises(TypeError, match="norm_rotary: key_out must have query's dtype float32, got bfloat16"):
        norm_rotary(*call, key_out=torch.zeros(2, 2, 9, 128).bfloat16())
    with pytest.raises(ValueError, match=r"key_out's last stride must be 1, got strides"):
        norm_rotary(*call, key_out=torch.zeros(2, 2, 9, 256)[..., ::2])
