"""The gradients of attention and attention_varlen, and their registration, on every backend by name."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.utils.checkpoint
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from utils import DTYPES, assert_close, backends_of, device_of, on, qkv

import qvl_kernels
from qvl_kernels import attention, attention_varlen, scaled_dot_product_attention
from qvl_kernels._attention import Options
from qvl_kernels.reference import attention as reference

BACKENDS = backends_of("attention")
NATIVE = [parameter for parameter in BACKENDS if parameter.values[0].startswith("cpu")]
CPU = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
AMX = "amx_bf16" in CPU and os.environ.get("QVL_AMX") != "0"


def visible_of(q, k, causal=False, window=None, key_lengths=None, **_):
    left, right = window or (-1, -1)
    return reference.visible_keys(q.shape[2], k.shape[2], causal, left, right, key_lengths, q.device)


def softmax_attention(q: Tensor, k: Tensor, v: Tensor, mask=None, **options) -> Tensor:
    """Plain PyTorch in the inputs' dtype: repeated heads, torch.softmax, two matrix products."""
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
    if mask is not None and mask.dtype != torch.bool:
        scores = scores + mask.to(scores.dtype)
        mask = None
    for seen in (mask, visible_of(q, k, **options)):
        scores = scores if seen is None else scores.masked_fill(~seen, -torch.inf)
    blind = (scores == -torch.inf).all(-1, keepdim=True)
    return torch.softmax(scores.masked_fill(blind, 0.0), -1).masked_fill(blind, 0.0) @ v


def gradients(function, inputs, grad, **options) -> tuple[Tensor, ...]:
    leaves = [x.detach().requires_grad_() for x in inputs]
    return torch.autograd.grad(function(*leaves, **options), leaves, grad.to(leaves[0].dtype))


def sums_of_magnitudes(q: Tensor, k: Tensor, v: Tensor, grad: Tensor, **options) -> tuple[float, float, float]:
    """For each gradient the largest sum of the magnitudes of what is rounded on the way.

    In float32 these are all terms, times the largest score (the exponential makes its absolute error a relative one).
    In a 16-bit dtype it is the output, which comes back rounded: delta = sum of dO O has one rounding of every product.
    """
    dtype = q.dtype
    q, k, v, grad = (x.double() for x in (q, k, v, grad))
    mask, visible = options.get("mask"), visible_of(q, k, **options)
    mask = mask.double() if mask is not None and mask.is_floating_point() else mask
    scale = 1 / math.sqrt(q.shape[-1])
    scores = reference.scores(q, k, scale, visible, mask)
    out, lse = reference.forward(q, k, v, scale, visible, mask)
    weights = torch.exp(scores - lse.masked_fill(lse == -torch.inf, 0.0).unsqueeze(-1))
    group = q.shape[1] // k.shape[1]
    wide_k, wide_v = (x.repeat_interleave(group, 1) for x in (k, v))
    delta = (grad * out).abs().sum(-1, keepdim=True)
    factor = 1.0
    if dtype == torch.float32:
        delta = delta + grad.abs() @ wide_v.abs().transpose(-1, -2)
        seen = scores[scores.isfinite()]
        factor = max(1.0, seen.abs().max().item() if seen.numel() else 0.0)
    else:
        grad = torch.zeros_like(grad)
    grad_scores = weights * delta * scale
    by_key = (
        (w.transpose(-1, -2) @ x.abs()).unflatten(1, (-1, group)).sum(2) for w, x in ((grad_scores, q), (weights, grad))
    )
    largest = ((grad_scores @ wide_k.abs()), *by_key)
    return tuple(factor * x.max().item() if x.numel() else 0.0 for x in largest)


def check(backend: str, q: Tensor, k: Tensor, v: Tensor, **options) -> None:
    grad = torch.randn(*q.shape[:3], v.shape[-1], dtype=q.dtype, device=q.device)
    with on(backend):
        ours = gradients(attention, (q, k, v), grad, **options)
    exact = gradients(softmax_attention, (q.double(), k.double(), v.double()), grad, **options)
    plain = gradients(softmax_attention, (q, k, v), grad, **options)
    terms = q.shape[2] * (q.shape[1] // k.shape[1]) + k.shape[2] + q.shape[3] + v.shape[3]
    largest = sums_of_magnitudes(q, k, v, grad, **options)
    for name, *got, bound in zip(("grad_query", "grad_key", "grad_value"), ours, exact, plain, largest):
        assert_close(name, *got, terms, largest=bound)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("heads_q", "heads_kv"), [(2, 2), (4, 2), (8, 1)])
@pytest.mark.parametrize(
    "options", [{}, {"causal": True}, {"window": (3, 2)}, {"causal": True, "window": (4, -1)}], ids=str
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_heads_and_windows(backend, options, heads_q, heads_kv, dtype):
    check(backend, *qkv(2, heads_q, heads_kv, 7, 13, 16, 8, dtype, device_of(backend)), **options)


@pytest.mark.parametrize(("len_q", "len_k"), [(1, 1), (1, 64), (5, 3), (63, 63), (17, 111), (95, 97), (49, 193)])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_lengths(backend, causal, len_q, len_k):
    check(backend, *qkv(1, 2, 1, len_q, len_k, 8, device=device_of(backend)), causal=causal)


@pytest.mark.parametrize("backend", BACKENDS)
def test_masks_and_ragged_lengths(backend):
    q, k, v = qkv(2, 4, 2, 5, 9, 8, device=device_of(backend))
    keep = torch.rand(2, 1, 5, 9, device=q.device) < 0.5
    keep[0, 0, 2] = False
    check(backend, q, k, v, mask=keep)
    check(backend, q, k, v, mask=torch.randn(4, 5, 9, device=q.device), causal=True)
    check(backend, q, k, v, key_lengths=torch.tensor([9, 4], device=q.device), causal=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("causal", "window"), [(False, None), (True, None), (True, (130, -1))])
@pytest.mark.parametrize(("dim", "dim_v"), [(64, 64), (72, 40), (128, 128), (33, 7), (256, 256), (1, 1)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_many_tiles_and_head_dimensions(backend, dim, dim_v, causal, window, dtype):
    check(backend, *qkv(1, 2, 1, 283, 300, dim, dim_v, dtype, device_of(backend)), causal=causal, window=window)


@pytest.mark.parametrize("options", [{}, {"causal": True}, {"key_lengths": torch.tensor([601, 205])}], ids=str)
@pytest.mark.parametrize("backend", NATIVE)
def test_several_chunks(backend, options):
    check(backend, *qkv(2, 2, 1, 400, 610, 16), **options)


@pytest.mark.parametrize(
    "options",
    [
        {"causal": True},
        {"window": (200, 40)},
        {"key_lengths": torch.tensor([1030, 411]), "causal": True},
        {"mask": torch.rand(2, 1, 600, 1030).mul(4).bool() & (torch.arange(600) % 50 != 7)[:, None]},
        {"mask": torch.randn(1, 600, 1030)},
    ],
    ids=["causal", "window", "lengths", "bool", "float"],
)
@pytest.mark.parametrize("backend", NATIVE)
def test_bfloat16_in_several_chunks(backend, options):
    check(backend, *qkv(2, 2, 1, 600, 1030, 40, dtype=torch.bfloat16), **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", NATIVE)
def test_results_do_not_depend_on_the_number_of_threads(backend, dtype):
    q, k, v = qkv(2, 2, 1, 600, 600, 32, dtype=dtype)
    grad = torch.randn_like(q)
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            with on(backend):
                results.append(gradients(attention, (q, k, v), grad, causal=True))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other))


@pytest.mark.parametrize("backend", BACKENDS)
def test_strided_inputs_and_expanded_gradients(backend):
    x = torch.randn(2, 9, 3, 4, 16, device=device_of(backend))
    q, k, v = (part.transpose(1, 2) for part in x.unbind(2))
    with on(backend):
        ours = gradients(attention, (q, k, v), torch.ones(1, device=q.device).expand_as(q), causal=True)
    exact = gradients(softmax_attention, (q.double(), k.double(), v.double()), torch.ones_like(q), causal=True)
    for got, wanted in zip(ours, exact):
        torch.testing.assert_close(got.double(), wanted, rtol=1e-5, atol=1e-5)


@settings(max_examples=60, deadline=None)
@given(
    batch=st.integers(1, 2),
    heads_kv=st.integers(1, 2),
    group=st.integers(1, 3),
    len_q=st.integers(1, 70),
    len_k=st.integers(1, 120),
    dim=st.sampled_from([1, 3, 8, 16]),
    causal=st.booleans(),
    window=st.none() | st.tuples(st.integers(-1, 40), st.integers(-1, 40)),
    ragged=st.booleans(),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 9),
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_random_cases(backend, batch, heads_kv, group, len_q, len_k, dim, causal, window, ragged, dtype, seed):
    torch.manual_seed(seed)
    q, k, v = qkv(batch, heads_kv * group, heads_kv, len_q, len_k, dim, dtype=dtype, device=device_of(backend))
    lengths = torch.randint(0, len_k + 1, (batch,), device=q.device) if ragged else None
    check(backend, q, k, v, causal=causal, window=window, key_lengths=lengths)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"causal": True},
        {"window": (2, 1)},
        {"mask": torch.randn(5, 6).double()},
        {"key_lengths": torch.tensor([6, 2])},
    ],
    ids=str,
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_gradcheck_in_float64(backend, options):
    inputs = tuple(x.requires_grad_() for x in qkv(2, 4, 2, 5, 6, 4, 3, torch.float64, device_of(backend)))
    with on(backend):
        assert torch.autograd.gradcheck(lambda q, k, v: attention(q, k, v, **options), inputs)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_query_that_sees_no_key_has_no_gradient(backend):
    q, k, v = (x.requires_grad_() for x in qkv(2, 4, 2, 3, 5, 4, device=device_of(backend)))
    with on(backend):
        attention(q, k, v, key_lengths=torch.tensor([5, 0], device=q.device)).sum().backward()
    assert torch.equal(q.grad[1], torch.zeros_like(q.grad[1]))
    assert torch.equal(v.grad[1], torch.zeros_like(v.grad[1]))
    assert all(x.grad.isfinite().all() for x in (q, k, v))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_packed_segments(backend, dtype):
    lengths_q, lengths_k = [3, 0, 70, 5], [4, 2, 130, 0]
    offsets_q, offsets_k = (torch.tensor([0, *lengths]).cumsum(0) for lengths in (lengths_q, lengths_k))
    q = torch.randn(78, 4, 40, device=device_of(backend), dtype=dtype)
    k, v = torch.randn(2, 136, 2, 40, device=q.device, dtype=dtype)
    grad = torch.randn_like(q)
    with on(backend):
        ours = gradients(
            lambda *x: attention_varlen(*x, offsets_q.to(q.device), offsets_k.to(q.device), causal=True),
            (q, k, v),
            grad,
        )

    def one_by_one(q, k, v):
        segments = zip(q.split(lengths_q), k.split(lengths_k), v.split(lengths_k))
        parts = [softmax_attention(*(x.transpose(0, 1)[None] for x in qkv), causal=True) for qkv in segments]
        return torch.cat([part[0].transpose(0, 1) for part in parts])

    for got, wanted in zip(ours, gradients(one_by_one, (q.double(), k.double(), v.double()), grad)):
        tolerance = 2e-5 if dtype == torch.float32 else 2e-2
        torch.testing.assert_close(got.double(), wanted, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("backend", backends_of("scaled_dot_product_attention"))
def test_torchs_function_has_the_same_gradients(backend):
    inputs = qkv(2, 4, 4, 9, 12, 8)
    grad = torch.randn_like(inputs[0])
    with on(backend):
        ours = gradients(scaled_dot_product_attention, inputs, grad, is_causal=True)
    torchs = gradients(torch.nn.functional.scaled_dot_product_attention, inputs, grad, is_causal=True)
    for got, wanted in zip(ours, torchs):
        torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck(backend):
    q, k, v = (x.requires_grad_() for x in qkv(2, 4, 2, 3, 5, 8, 6, device=device_of(backend)))
    lengths = torch.tensor([5, 2], device=q.device)
    packed = tuple(torch.randn(1, 2, 6, 8, device=q.device, requires_grad=True) for _ in range(3))
    offsets = torch.tensor([0, 2, 6], device=q.device)
    with on(backend):
        calls = [
            (q, k, v, *Options(0.3, True, key_lengths=lengths)),
            (q, k, v, *Options(0.3, mask=torch.randn(3, 5, device=q.device))),
            (*packed, *Options(0.3, offsets_q=offsets, offsets_k=offsets)),
        ]
        for call in calls:
            torch.library.opcheck(torch.ops.qvl.attention.default, call)
            saved = [x.detach() for x in call[:3]]
            out, lse = torch.ops.qvl.attention(*saved, *call[3:])
            grad = torch.randn_like(out)
            torch.library.opcheck(torch.ops.qvl.attention_backward.default, (grad, *saved, out, lse, *call[3:]))


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiles_into_one_graph_with_gradients(backend):
    q, k, v = qkv(1, 2, 1, 6, 6, 8, device=device_of(backend))
    offsets = torch.tensor([0, 2, 6], device=q.device)

    def dense(q, k, v):
        return attention(q * 2, k, v, causal=True) + 1

    def packed(q, k, v):
        return attention_varlen(*(x[0].transpose(0, 1) for x in (q, k, v)), offsets, offsets)

    with on(backend):
        for function in (dense, packed) if backend != "reference" else (dense,):  # the reference reads the offsets
            compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
            grad = torch.randn_like(function(q, k, v))
            for got, wanted in zip(gradients(compiled, (q, k, v), grad), gradients(function, (q, k, v), grad)):
                torch.testing.assert_close(got, wanted)


def test_transforms_and_second_derivatives_run_the_reference():
    q, k, v = (x.double() for x in qkv(3, 1, 1, 2, 3, 4))
    torch.testing.assert_close(torch.vmap(attention)(*(x[:, None] for x in (q, k, v)))[:, 0], attention(q, k, v))
    with qvl_kernels.use_backend("reference"):
        inputs = tuple(x[:1].requires_grad_() for x in (q, k, v))
        assert torch.autograd.gradgradcheck(attention, inputs)


def test_meta_tensors_have_shapes():
    q, k = torch.empty(2, 4, 5, 8, device="meta"), torch.empty(2, 2, 7, 8, device="meta")
    assert attention(q, k, k, causal=True).shape == (2, 4, 5, 8)


@pytest.mark.parametrize("backend", NATIVE)
def test_activation_checkpointing(backend):
    """Saved tensors may be looked at once only: each look recomputes."""
    inputs = qkv(1, 2, 1, 6, 6, 8)
    grad = torch.randn_like(inputs[0])

    def checkpointed(*x):
        return torch.utils.checkpoint.checkpoint(attention, *x, use_reentrant=False)

    with on(backend):
        for got, wanted in zip(gradients(checkpointed, inputs, grad), gradients(attention, inputs, grad)):
            assert torch.equal(got, wanted)


@pytest.mark.skipif(not AMX, reason="needs a CPU with AMX")
def test_without_amx():
    """The AVX-512 module as on a CPU without AMX: the tests of bfloat16 in a process that has none."""
    run = [sys.executable, "-m", "pytest", __file__, "-q", "-p", "no:cacheprovider", "-k", "cpu_avx512 and bfloat16"]
    done = subprocess.run(run, env={**os.environ, "QVL_AMX": "0"}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:]
