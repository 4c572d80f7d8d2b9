"""linear_attention's gradients and registration, on every backend by name."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from linear_attention_cases import definition, exponent_size, feature_map, weights_of
from torch import Tensor
from utils import DTYPES, assert_close, backends_of, device_of, on, qkv

from qvl_kernels import linear_attention, linear_attention_varlen
from qvl_kernels._linear_attention import Options

BACKENDS = backends_of("linear_attention")
NATIVE = [parameter for parameter in BACKENDS if parameter.values[0].startswith("cpu")]


def gradients(function, inputs, grad, map_, **options) -> tuple[Tensor, ...]:
    leaves = [x.detach().requires_grad_() for x in inputs]
    return torch.autograd.grad(function(*leaves, map_, **options), leaves, grad.to(leaves[0].dtype))


def ours_of(q, k, v, map_, **options):
    return linear_attention(q, k, v, feature_map=map_, **options)


def plain_gradients(inputs, grad, map_, **options) -> tuple[Tensor, ...]:
    """Plain PyTorch's. With 16-bit inputs in float32, rounded once, from an output that was rounded as a saved one is:
    with out + e in place of out, dO . e times the gradient of log of the denominator comes off."""
    if inputs[0].element_size() > 2:
        return gradients(definition, inputs, grad, map_, **options)
    dtype = inputs[0].dtype
    leaves = [x.float().requires_grad_() for x in inputs]
    out = definition(*leaves, map_, **options)
    _, total = weights_of(*leaves[:2], map_, **options)
    wrong = ((out.to(dtype).float() - out) * grad.float()).sum(-1, keepdim=True).detach()
    made = torch.autograd.grad((out, total.log()), leaves, (grad.float(), -wrong))
    return tuple(x.to(dtype) for x in made)


def sizes(q, k, v, grad, map_, **options) -> list[float]:
    """For each gradient what float32's roundings are relative to: the largest sum of magnitudes of the terms that make
    it (dO v and dO O cancel in it), times the largest exponent."""
    if not grad.numel():
        return [0.0] * 3
    dtype, terms = q.dtype, k.shape[2] + q.shape[-1]
    q, k, v, grad = (x.double() for x in (q, k, v, grad))
    exponent = exponent_size(q, k, map_)
    out = definition(q, k, v, map_, **options)
    largest = grad.abs().sum(-1).max().item() * max(v.abs().max().item(), out.abs().max().item())
    leaves = [x.detach().requires_grad_() for x in (q, k)]
    ones = v.new_ones(*v.shape[:3], 1)
    slopes = []
    for columns in (ones, ones * torch.linspace(-1, 1, v.shape[2]).view(-1, 1).to(v)):
        made = definition(*leaves, columns, map_, **options)
        slopes += [x.abs().max().item() for x in torch.autograd.grad(made.sum(), leaves)]
    found = [exponent * largest * max(1.0, *slopes)] * 2 + [exponent * grad.abs().sum(2).max().item()]
    if dtype.itemsize == 2:  # the arithmetic is in float32: its bound, as a part of half a rounding
        part = 2 * torch.finfo(torch.float32).eps * (terms**0.5 + 2) / torch.finfo(dtype).eps
        found = [part * x for x in found]
    return found


def check(backend: str, q: Tensor, k: Tensor, v: Tensor, map_, **options) -> None:
    grad = torch.randn(*q.shape[:3], v.shape[-1], device=q.device).to(q.dtype)
    with on(backend):
        ours = gradients(ours_of, (q, k, v), grad, map_, **options)
    exact = gradients(definition, (q.double(), k.double(), v.double()), grad, map_, **options)
    plain = plain_gradients((q, k, v), grad, map_, **options)
    for name, got, wanted, other, size in zip(
        ("query", "key", "value"), ours, exact, plain, sizes(q, k, v, grad, map_, **options)
    ):
        assert_close(name, got, wanted, other, k.shape[2] + q.shape[-1], largest=size)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("heads_q", "heads_kv"), [(2, 2), (8, 1)])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("name", ["favor", "elu", "squares"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_maps_heads_and_dtypes(backend, name, causal, heads_q, heads_kv, dtype):
    q, k, v = qkv(2, heads_q, heads_kv, 7, 13, 16, 8, dtype, device_of(backend))
    check(backend, q * 0.5, k * 0.5, v, feature_map(name, 16), causal=causal)


@pytest.mark.parametrize(("len_q", "len_k"), [(1, 1), (5, 3), (17, 111), (111, 17), (0, 4), (97, 96), (200, 310)])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_lengths(backend, causal, len_q, len_k):
    q, k, v = qkv(1, 2, 1, len_q, len_k, 8, device=device_of(backend))
    check(backend, q * 0.5, k * 0.5, v, feature_map("favor", 8), causal=causal)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    ("dim", "dim_v", "features"), [(64, 64, 256), (72, 40, 31), (128, 128, 64), (33, 7, 300), (256, 256, 16), (1, 1, 1)]
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_dimensions(backend, dim, dim_v, features, causal, dtype):
    q, k, v = qkv(1, 2, 1, 110, 120, dim, dim_v, dtype, device_of(backend))
    check(backend, q * 0.5, k * 0.5, v, feature_map("favor", dim, features), causal=causal)


@pytest.mark.parametrize("name", ["favor", "elu"])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_masked_keys_and_rows_without_a_key_have_no_gradient(backend, causal, name):
    q, k, v = qkv(2, 2, 1, 130, 130, 8, device=device_of(backend))
    keep = torch.rand(2, 130, device=q.device) < 0.5
    keep[1] = False
    map_ = feature_map(name, 8)
    check(backend, q * 0.5, k * 0.5, v, map_, causal=causal, key_mask=keep)
    hidden = ~keep[:, None, :, None]
    k, v = k.masked_fill(hidden, torch.nan if backend != "reference" else 0.0), v.masked_fill(hidden, 0.0)
    with on(backend):
        grads = gradients(ours_of, (q, k, v), torch.ones_like(q), map_, causal=causal, key_mask=keep)
    assert all(torch.equal(g[1], torch.zeros_like(g[1])) for g in grads)
    assert all(torch.equal(g.masked_select(hidden), torch.zeros_like(g.masked_select(hidden))) for g in grads[1:])
    assert all(g.isfinite().all() for g in grads)


@pytest.mark.parametrize(
    "options", [{}, {"causal": True}, {"key_mask": torch.tensor([[1, 0, 1, 1, 0, 1]]) > 0}], ids=str
)
@pytest.mark.parametrize("name", ["favor", "elu", "squares"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_gradcheck_in_float64(backend, name, options):
    map_ = feature_map(name, 4, 5).double()
    inputs = tuple(x.requires_grad_() for x in qkv(1, 4, 2, 5, 6, 4, 3, torch.float64, device_of(backend)))
    parameters = tuple(map_.parameters())
    with on(backend):
        assert torch.autograd.gradcheck(lambda *x: ours_of(*x[:3], map_, **options), inputs + parameters)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_gradcheck_over_several_chunks(backend, causal):
    favor = feature_map("favor", 2, 3).double()
    inputs = tuple(x.requires_grad_() for x in qkv(1, 2, 1, 110, 101, 2, 1, torch.float64, device_of(backend)))
    with on(backend):
        assert torch.autograd.gradcheck(lambda *x: ours_of(*x, favor, causal=causal), inputs, fast_mode=True)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_pass_through_states(backend):
    """By plain PyTorch, so a native backend that is forced says so."""
    q, k, v = (x.requires_grad_() for x in qkv(1, 2, 1, 6, 6, 4, 3, torch.float64, device_of(backend)))
    favor = feature_map("favor", 4, 5).double()

    def cut(q, k, v):
        first, second = ([x[:, :, part] for x in (q, k, v)] for part in (slice(0, 4), slice(4, 6)))
        a, state = linear_attention(*first, feature_map=favor, causal=True, return_state=True)
        return torch.cat([a, linear_attention(*second, feature_map=favor, causal=True, state=state)], 2)

    if backend == "reference":
        with on(backend):
            assert torch.autograd.gradcheck(cut, (q, k, v))
    else:
        with on(backend), pytest.raises(RuntimeError, match="a gradient passes through the state"):
            cut(q, k, v)
        assert torch.autograd.gradcheck(cut, (q, k, v))


@pytest.mark.parametrize("heads", [1, 4])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("backend", NATIVE)
def test_results_do_not_depend_on_the_number_of_threads(backend, causal, heads):
    q, k, v = qkv(1, heads, heads, 1700, 1700, 16)
    favor, threads, results = feature_map("favor", 16), torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            with on(backend):
                results.append(gradients(ours_of, (q, k, v), torch.ones_like(q), favor, causal=causal))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other))


@settings(max_examples=40, deadline=None)
@given(
    heads=st.sampled_from([(1, 1), (2, 1), (6, 2)]),
    len_q=st.integers(1, 130),
    len_k=st.integers(1, 230),
    dims=st.sampled_from([(64, 64, 64), (5, 33, 40), (17, 2, 100), (8, 8, 3)]),
    name=st.sampled_from(["favor", "elu", "squares"]),
    causal=st.booleans(),
    masked=st.booleans(),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 99),
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_random_cases(backend, heads, len_q, len_k, dims, name, causal, masked, dtype, seed):
    torch.manual_seed(seed)
    q, k, v = qkv(2, *heads, len_q, len_k, *dims[:2], dtype=dtype, device=device_of(backend))
    mask = torch.rand(2, len_k, device=q.device) < 0.6 if masked else None
    check(backend, q * 0.5, k * 0.5, v, feature_map(name, dims[0], dims[2]), causal=causal, key_mask=mask)


@pytest.mark.parametrize("backend", NATIVE)
def test_opcheck(backend):
    q, k, v = qkv(1, 4, 2, 5, 6, 4, 3)
    favor, keep = feature_map("favor", 4, 5), torch.tensor([[True, False, True, True, True, True]])
    offsets = torch.tensor([0, 2, 5]), torch.tensor([0, 3, 6])
    state = torch.rand(1, 2, 5, 3), torch.rand(1, 2, 5), torch.zeros(1, 2)
    with on(backend):
        for options in (
            Options(favor.projection, 0, True, keep),
            Options(None, 1, False),
            Options(None, 2, True, None, None, None, None, False, *offsets),
        ):
            call = (*(x.clone().requires_grad_() for x in (q.abs(), k.abs(), v)), *options)
            torch.library.opcheck(torch.ops.qvl.linear_attention.default, call)
            with torch.no_grad():
                out, normalizer, *_ = torch.ops.qvl.linear_attention(*call)
            saved = [x.detach() for x in call[:3]]
            grad = torch.randn_like(out)
            backward = (grad, *saved, out, normalizer, *options)
            torch.library.opcheck(torch.ops.qvl.linear_attention_backward.default, backward)
        torch.library.opcheck(
            torch.ops.qvl.linear_attention.default, (q, k, v, *Options(favor.projection, 0, True, None, *state, True))
        )


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiles_into_one_graph_with_gradients(backend):
    q, k, v = qkv(1, 4, 2, 5, 6, 4, 3, device=device_of(backend))
    offsets = torch.tensor([0, 2, 5]), torch.tensor([0, 3, 6])
    favor = feature_map("favor", 4, 5)

    def dense(q, k, v, map_):
        return linear_attention(q, k, v, feature_map=map_, causal=True)

    def packed(q, k, v, map_):
        q, k, v = (x[0].transpose(0, 1) for x in (q, k, v))
        return linear_attention_varlen(q, k, v, *offsets, feature_map=map_).transpose(0, 1)[None]

    grad = torch.randn(1, 4, 5, 3, device=q.device)
    for function in (dense, packed):
        if backend == "reference" and function is packed:
            continue  # its loop over the segments needs their lengths
        with on(backend):
            compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
            torch.testing.assert_close(compiled(q, k, v, favor), function(q, k, v, favor))
            for got, wanted in zip(
                gradients(compiled, (q, k, v), grad, favor), gradients(function, (q, k, v), grad, favor)
            ):
                torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize("backend", NATIVE)
def test_a_decode_step_compiles_into_one_graph(backend):
    favor = feature_map("favor", 4, 5)

    def step(q, k, v, state):
        return linear_attention(q, k, v, feature_map=favor, causal=True, state=state, return_state=True)

    q, k, v = qkv(1, 4, 2, 7, 7, 4, 3)
    with on(backend):
        _, state = step(*(x[:, :, :6] for x in (q, k, v)), None)
        token = [x[:, :, 6:] for x in (q, k, v)]
        compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(*token, state), step(*token, state))
