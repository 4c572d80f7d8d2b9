"""attention against its definition, written out row by row in float64, on every backend by name."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from utils import DTYPES, assert_close, backends_of, device_of, on, qkv

from qvl_kernels import attention, quantize_kv
from qvl_kernels.reference import attention as reference

BACKENDS = backends_of("attention")
NATIVE = [parameter for parameter in BACKENDS if parameter.values[0].startswith("cpu")]


def seen(i: int, len_q: int, length: int, causal: bool, window: tuple[int, int] | None) -> list[int]:
    """The keys that query i sees, from the sentence in the docstring."""
    position = length - len_q + i
    left, right = window or (-1, -1)
    return [
        j
        for j in range(length)
        if (not causal or j <= position) and (left < 0 or j >= position - left) and (right < 0 or j <= position + right)
    ]


def definition(q: Tensor, k: Tensor, v: Tensor, *, causal=False, scale=None, window=None, mask=None, key_lengths=None):
    """softmax(scale q k^T + mask) v, one query at a time, in q's dtype."""
    batch, heads, len_q, dim = q.shape
    len_k = k.shape[2]
    scale = 1 / math.sqrt(dim) if scale is None else scale
    mask = None if mask is None else mask.expand(batch, heads, len_q, len_k)
    out = q.new_zeros(batch, heads, len_q, v.shape[-1])
    for b in range(batch):
        length = len_k if key_lengths is None else int(key_lengths[b])
        for h in range(heads):
            kv = h // (heads // k.shape[1])
            for i in range(len_q):
                keys = seen(i, len_q, length, causal, window)
                if mask is not None and mask.dtype == torch.bool:
                    keys = [j for j in keys if mask[b, h, i, j]]
                if not keys:
                    continue
                scores = scale * (k[b, kv, keys] @ q[b, h, i])
                if mask is not None and mask.dtype != torch.bool:
                    scores = scores + mask[b, h, i, keys]
                out[b, h, i] = torch.softmax(scores, 0) @ v[b, kv, keys]
    return out


def check(backend: str, q: Tensor, k: Tensor, v: Tensor, **options) -> None:
    with on(backend):
        ours = attention(q, k, v, **options)
    wide = {n: x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for n, x in options.items()}
    exact = definition(q.double(), k.double(), v.double(), **wide)
    plain = definition(
        q, k, v, **{n: x.to(q.dtype) if n == "mask" and x.is_floating_point() else x for n, x in options.items()}
    )
    # The exponential turns a score's absolute error into a relative one of the result: it grows with the largest score.
    score = q.double().square().sum(-1).max().sqrt().item() if q.numel() else 0.0
    score *= k.double().square().sum(-1).max().sqrt().item() if k.numel() else 0.0
    largest = max(1.0, score / math.sqrt(q.shape[-1])) * (v.abs().max().item() if v.numel() else 0.0)
    assert_close("out", ours, exact, plain, k.shape[2] + q.shape[-1], largest=largest)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("heads_q", "heads_kv"), [(2, 2), (4, 2), (8, 1)])
@pytest.mark.parametrize(
    "options", [{}, {"causal": True}, {"window": (3, 2)}, {"causal": True, "window": (4, -1)}], ids=str
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_heads_and_windows(backend, options, heads_q, heads_kv, dtype):
    check(backend, *qkv(2, heads_q, heads_kv, 7, 13, 16, 8, dtype, device_of(backend)), **options)


@pytest.mark.parametrize(("len_q", "len_k"), [(1, 1), (1, 64), (5, 3), (63, 63), (17, 111), (0, 4), (4, 0)])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_lengths(backend, causal, len_q, len_k):
    check(backend, *qkv(1, 2, 1, len_q, len_k, 8, device=device_of(backend)), causal=causal)


@pytest.mark.parametrize("backend", BACKENDS)
def test_masks(backend):
    q, k, v = qkv(2, 4, 2, 5, 9, 8, device=device_of(backend))
    keep = torch.rand(2, 1, 5, 9, device=q.device) < 0.5
    keep[0, 0, 2] = False
    check(backend, q, k, v, mask=keep)
    check(backend, q, k, v, mask=torch.randn(4, 5, 9, device=q.device), causal=True)
    check(backend, q, k, v, mask=torch.zeros(5, 9, device=q.device).masked_fill(~keep[1, 0], -torch.inf))
    with on(backend):
        assert torch.equal(attention(q, k, v, mask=keep)[0, :, 2], q.new_zeros(4, 8)), "a query that sees no key"


@pytest.mark.parametrize("options", [{}, {"causal": True}, {"causal": True, "window": (2, 0)}], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_ragged_lengths(backend, options):
    q, k, v = qkv(4, 2, 2, 3, 10, 8, device=device_of(backend))
    check(backend, q, k, v, key_lengths=torch.tensor([10, 1, 0, 7], device=q.device), **options)


@pytest.mark.parametrize("backend", BACKENDS)
def test_keys_beyond_the_length_are_never_read_into_the_result(backend):
    q, k, v = qkv(1, 2, 2, 3, 10, 8, device=device_of(backend))
    lengths = torch.tensor([6], device=q.device)
    with on(backend):
        before = attention(q, k, v, causal=True, key_lengths=lengths)
        k[:, :, 6:], v[:, :, 6:] = 1e30, 1e30
        assert torch.equal(before, attention(q, k, v, causal=True, key_lengths=lengths))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("len_q", "len_k", "dim"), [(1, 1, 8), (1, 2300, 64), (3, 130, 33), (40, 250, 72)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_int8_keys_and_values(backend, len_q, len_k, dim, dtype):
    q, k, v = qkv(2, 4, 2, len_q, len_k, dim, dtype=dtype, device=device_of(backend))
    v[:, :, 0] = 0.0
    (k, key_scale), (v, value_scale) = quantize_kv(k), quantize_kv(v)
    lengths = torch.tensor([len_k, len_k // 2], device=q.device)
    with on(backend):
        ours = attention(q, k, v, causal=True, key_lengths=lengths, key_scale=key_scale, value_scale=value_scale)
    k, v = k * key_scale[..., None].double(), v * value_scale[..., None].double()
    visible = reference.visible_keys(len_q, len_k, True, -1, -1, lengths, q.device)
    exact = reference.forward(q.double(), k, v, 1 / math.sqrt(dim), visible, None)[0]
    plain = reference.forward(q, k.to(dtype), v.to(dtype), 1 / math.sqrt(dim), visible, None)[0]
    score = (q.double() @ k.double().repeat_interleave(2, 1).transpose(-1, -2)).abs().max().item() / math.sqrt(dim)
    largest = v.abs().max().item()
    method = 0.0
    if backend.startswith("cpu") and 2 * len_q <= 16:  # queries and weights of 15 bits, as the docstring says
        shift = q.abs().max().item() * k.abs().sum(-1).max().item() / math.sqrt(dim) / 65534
        method = math.expm1(2 * shift) * largest + 64 / 65534 * 128 * value_scale.max().item()
    assert_close("out", ours, exact, plain, len_k + dim, largest=max(1.0, score) * largest, method=method)


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("len_q", "len_k", "dim"), [(1, 1, 8), (1, 2300, 64), (3, 130, 33), (40, 250, 72)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_cache_of_half_the_size_for_float32_queries(backend, len_q, len_k, dim, stored):
    """No error but float32's: the stored numbers are what is meant."""
    q, k, v = qkv(2, 4, 2, len_q, len_k, dim, device=device_of(backend))
    k, v = k.to(stored), v.to(stored)
    for lengths in (torch.tensor([len_k, len_k // 2], device=q.device), None):
        with on(backend):
            ours = attention(q, k, v, causal=True, key_lengths=lengths)
        visible = reference.visible_keys(len_q, len_k, True, -1, -1, lengths, q.device)
        wide = q.double(), k.double(), v.double()
        exact = reference.forward(*wide, 1 / math.sqrt(dim), visible, None)[0]
        plain = reference.forward(q, k.float(), v.float(), 1 / math.sqrt(dim), visible, None)[0]
        score = (wide[0] @ wide[1].repeat_interleave(2, 1).transpose(-1, -2)).abs().max().item() / math.sqrt(dim)
        largest = max(1.0, score) * v.double().abs().max().item()
        assert_close("out", ours, exact, plain, len_k + dim, largest=largest)


def test_a_cache_of_half_the_size_passes_gradients_on():
    q, k, v = qkv(1, 4, 2, 3, 5, 8)
    q.requires_grad_(), v.requires_grad_()
    attention(q, k.bfloat16(), v.bfloat16(), causal=True).square().sum().backward()
    grads = q.grad, v.grad
    q.grad = v.grad = None
    attention(q, k.bfloat16().float(), v.bfloat16().float(), causal=True).square().sum().backward()
    torch.testing.assert_close(grads[0], q.grad)
    torch.testing.assert_close(grads[1], v.grad, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("backend", NATIVE)
def test_int8_keys_meet_queries_that_are_not_finite_or_all_zero(backend):
    q, k, v = qkv(1, 2, 2, 1, 70, 40)
    (k, key_scale), (v, value_scale) = quantize_kv(k), quantize_kv(v)
    q[0, 0] = 0.0
    q[0, 1, 0, 3] = torch.inf
    with on(backend):
        out = attention(q, k, v, key_scale=key_scale, value_scale=value_scale)
    torch.testing.assert_close(out[0, 0, 0], (v[0, 0] * value_scale[0, 0, :, None]).mean(0))
    assert out[0, 1].isnan().all()


def test_quantize_kv_halves_a_step_at_most():
    x = torch.randn(2, 3, 50, 64) * torch.logspace(-20, 20, 50).view(-1, 1)
    x[0, 1, 7] = 0.0
    q, s = quantize_kv(x)
    assert q.dtype == torch.int8
    assert ((q.double() * s.double()[..., None] - x).abs() <= s.double()[..., None] * 0.5000001).all()
    assert s[0, 1, 7] == 0
    with pytest.raises(TypeError, match="quantize_kv: x must be float32"):
        quantize_kv(q)


@pytest.mark.parametrize("backend", BACKENDS)
def test_strided_inputs_and_outliers(backend):
    q, k, v = (x.transpose(1, 2) for x in qkv(2, 6, 9, 4, 4, 16, device=device_of(backend)))
    q = q.contiguous()[:, :, :6]
    check(backend, q, k[:, :, ::3].expand(-1, -1, -1, -1), v[:, :, ::3])
    q[..., 0] *= 50
    check(backend, q, k, v)


def tiled(q: Tensor, k: Tensor, v: Tensor, **options) -> Tensor:
    """The definition as matrices, for sizes that the loops above are too slow for; itself checked against them."""
    visible = reference.visible_keys(q.shape[2], k.shape[2], options.get("causal", False), -1, -1, None, q.device)
    return reference.forward(q, k, v, 1 / math.sqrt(q.shape[-1]), visible, None)[0]


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("dim", "dim_v"), [(64, 64), (72, 72), (80, 96), (128, 128), (33, 7), (256, 256), (1, 1)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_many_tiles_and_head_dimensions(backend, dim, dim_v, causal, dtype):
    q, k, v = qkv(1, 2, 1, 283, 300, dim, dim_v, dtype, device_of(backend))
    with on(backend):
        ours = attention(q, k, v, causal=causal)
    exact = tiled(q.double(), k.double(), v.double(), causal=causal)
    weights = torch.softmax(
        (q @ k.transpose(-1, -2) / math.sqrt(dim)).masked_fill(~visible_mask(q, k, causal), -torch.inf), -1
    )
    score = (q.double() @ k.double().transpose(-1, -2) / math.sqrt(dim)).abs().max().item()
    assert_close("out", ours, exact, weights @ v, 300 + dim, largest=max(1.0, score) * v.abs().max().item())


def visible_mask(q: Tensor, k: Tensor, causal: bool) -> Tensor:
    everything = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device)
    return everything.tril(k.shape[2] - q.shape[2]) if causal else everything


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_scores_that_rise_from_tile_to_tile(backend, dtype):
    """The largest score of the first tile does not serve as the shift of the exponentials: later ones are far above."""
    q, k, v = qkv(1, 2, 1, 40, 900, 16, dtype=dtype, device=device_of(backend))
    k *= torch.logspace(-1, 1.5, 900, dtype=dtype, device=k.device).view(-1, 1)
    mask = torch.zeros(40, 900, dtype=dtype, device=k.device)
    mask[::2, :450] = -1e9  # "hidden" by a finite number
    mask[1::2, :300] = -torch.inf
    for options in ({}, {"mask": mask}):
        with on(backend):
            ours = attention(q, k, v, **options)
        exact = reference.forward(q.double(), k.double(), v.double(), 0.25, None, options.get("mask"))[0]
        plain = reference.forward(q, k, v, 0.25, None, options.get("mask"))[0]
        score = (q.double() @ k.double().transpose(-1, -2) / 4).abs().max().item()
        largest = (score if dtype != torch.bfloat16 else 1.0) * v.abs().max().item()
        assert_close("out", ours, exact, plain, 16 + 900, largest=largest)


@pytest.mark.parametrize("backend", BACKENDS)
def test_non_finite_values_are_not_hidden(backend):
    q, k, v = qkv(1, 2, 2, 4, 40, 8, device=device_of(backend))
    q[0, 0, 1, 3], k[0, 1, 7, 2] = torch.nan, torch.inf
    with on(backend):
        out = attention(q, k, v)
    assert out[0, 0, 1].isnan().all()
    assert out[0, 0, [0, 2, 3]].isfinite().all()
    assert out[0, 1].isnan().any()


@pytest.mark.parametrize("backend", NATIVE)
def test_the_result_is_laid_out_for_what_follows(backend):
    q, k, v = qkv(2, 4, 2, 5, 9, 8)
    with on(backend):
        assert attention(q, k, v).transpose(1, 2).is_contiguous()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", NATIVE)
def test_results_do_not_depend_on_the_number_of_threads(backend, dtype):
    q, k, v = qkv(2, 4, 2, 300, 300, 64, dtype=dtype)
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            with on(backend):
                results.append(attention(q, k, v, causal=True))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="Linux tells of a program by itself in /proc")
@pytest.mark.parametrize("backend", NATIVE)
def test_memory_does_not_grow_with_the_square_of_the_length(backend):
    """16384 tokens: the scores would be 1 GiB; beside the output there are the threads' tiles, the same as for 512.

    The peak is that of /proc: a child's `ru_maxrss` begins with what pytest has, and would hide what grows.
    """
    script = f"""
import re, torch, qvl_kernels
from qvl_kernels._attention import NATIVE
peak = lambda: int(re.search(r"VmHWM:\\s*(\\d+)", open("/proc/self/status").read())[1]) << 10
scratch = lambda: NATIVE[{backend!r}]._memory.buffer.numel()
torch.set_num_threads(2)
q, k, v = torch.randn(3, 1, 1, 16384, 64)
with qvl_kernels.use_backend({backend!r}):
    qvl_kernels.attention(*(x[:, :, :512] for x in (q, k, v)), causal=True)
    tiles, before = scratch(), peak()
    out = qvl_kernels.attention(q, k, v, causal=True)
    assert scratch() == tiles, (scratch(), tiles)
    grown = peak() - before - out.nbytes
    assert grown < 2 << 20, grown
"""
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("backend", BACKENDS)
def test_long_sequences_give_the_same_in_blocks(backend, monkeypatch):
    q, k, v = qkv(1, 4, 2, 96, 96, 16, device=device_of(backend))
    mask = torch.rand(1, 1, 96, 96, device=q.device) < 0.8
    with on(backend):
        whole = attention(q, k, v, causal=True, mask=mask)
        monkeypatch.setattr(sys.modules["qvl_kernels._attention"], "_REFERENCE_SCORE_BYTES", 4 * 4 * 96 * 7)
        torch.testing.assert_close(attention(q, k, v, causal=True, mask=mask), whole)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients(backend):
    q, k, v = (x.double().requires_grad_() for x in qkv(2, 4, 2, 3, 5, 4, 3, device=device_of(backend)))
    lengths = torch.tensor([5, 2], device=q.device)
    with on(backend):
        assert torch.autograd.gradcheck(lambda q, k, v: attention(q, k, v, causal=True, key_lengths=lengths), (q, k, v))
        out = attention(q, k, v, key_lengths=torch.tensor([5, 0], device=q.device))
        out.sum().backward()
    assert torch.equal(q.grad[1], torch.zeros_like(q.grad[1])), "a query that sees no key has no gradient"
    assert all(x.grad.isfinite().all() for x in (q, k, v))


@settings(max_examples=60, deadline=None)
@given(
    batch=st.integers(1, 2),
    heads_kv=st.integers(1, 2),
    group=st.integers(1, 3),
    len_q=st.integers(1, 9),
    len_k=st.integers(1, 20),
    dim=st.sampled_from([1, 3, 8, 16]),
    causal=st.booleans(),
    window=st.none() | st.tuples(st.integers(-1, 6), st.integers(-1, 6)),
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


@settings(max_examples=150, deadline=None)
@given(
    heads=st.sampled_from([(1, 1), (2, 1), (3, 3), (6, 2), (8, 1)]),
    len_q=st.integers(1, 300),
    len_k=st.integers(1, 420),
    dims=st.sampled_from([(64, 64), (72, 72), (80, 96), (128, 128), (5, 33), (17, 2), (256, 200)]),
    causal=st.booleans(),
    window=st.none() | st.tuples(st.integers(-1, 250), st.integers(-1, 250)),
    mask=st.sampled_from([None, "bool", "float"]),
    ragged=st.booleans(),
    strided=st.booleans(),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 99),
)
@pytest.mark.parametrize("backend", NATIVE)
def test_random_cases_of_many_tiles(
    backend, heads, len_q, len_k, dims, causal, window, mask, ragged, strided, dtype, seed
):
    torch.manual_seed(seed)
    q, k, v = qkv(2, *heads, len_q, len_k, *dims, dtype=dtype)
    if strided:
        q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v))
        k = torch.cat((k, k), -1)[..., : dims[0]]
    lengths = torch.randint(0, len_k + 1, (2,)) if ragged else None
    if mask is not None:
        mask = torch.rand(2, 1, len_q, len_k) < 0.7 if mask == "bool" else torch.randn(heads[0], len_q, len_k)
    with on(backend):
        ours = attention(q, k, v, causal=causal, window=window, mask=mask, key_lengths=lengths)
    visible = reference.visible_keys(len_q, len_k, causal, *(window or (-1, -1)), lengths, q.device)
    wide = mask.double() if mask is not None and mask.is_floating_point() else mask
    scale = 1 / math.sqrt(dims[0])
    exact = reference.forward(q.double(), k.double(), v.double(), scale, visible, wide)[0]
    plain = reference.forward(q, k, v, scale, visible, mask)[0]
    score = (q.double() @ k.double().repeat_interleave(heads[0] // heads[1], 1).mT).abs().max().item() * scale
    assert_close("out", ours, exact, plain, len_k + dims[0], largest=max(1.0, score) * v.abs().max().item())


Q = torch.zeros(2, 4, 3, 8)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        (
            (Q, torch.zeros(2, 7, 4, 64), Q),
            {},
            ValueError,
            r"key must have shape \(B, Hkv, Lk, D\) = \(2, \*, \*, 8\), got",
        ),
        ((Q, Q[:, :3], Q[:, :3]), {}, ValueError, "query's 4 heads must be a multiple of key's 3"),
        ((Q, Q, Q[:, :, :2]), {}, ValueError, r"value must have shape \(B, Hkv, Lk, Dv\) = \(2, 4, 3, \*\)"),
        ((Q, Q.double(), Q), {}, TypeError, "key must have query's dtype float32, got float64"),
        ((Q, Q.half(), Q), {}, TypeError, "value must have key's dtype float16, got float32"),
        (
            (Q, Q, Q),
            {"mask": torch.zeros(3, 4)},
            ValueError,
            r"mask must broadcast to \(B, Hq, Lq, Lk\) = \(2, 4, 3, 3\)",
        ),
        ((Q, Q, Q), {"mask": torch.zeros(3, 3).int()}, TypeError, "mask must be bool or floating"),
        ((Q, Q, Q), {"key_lengths": torch.zeros(3).int()}, ValueError, r"key_lengths must have shape \(B,\) = \(2,\)"),
        ((Q, Q, Q), {"key_lengths": torch.zeros(2)}, TypeError, "key_lengths must be integers"),
        ((Q, Q, Q), {"window": (1, 2, 3)}, ValueError, "window must be a pair of integers"),
        ((Q, Q, Q), {"key_scale": Q[..., 0]}, TypeError, "with int8 keys and values key must be torch.int8"),
        (
            (Q, Q.to(torch.int8), Q.to(torch.int8)),
            {"key_scale": Q[..., 0]},
            TypeError,
            "with int8 keys and values value_scale must be torch.float32, got NoneType",
        ),
        ((Q[0], Q, Q), {}, ValueError, r"query must have shape \(B, Hq, Lq, D\)"),
    ],
)
def test_bad_arguments_are_named(arguments, options, error, message):
    with pytest.raises(error, match="attention: " + message):
        attention(*arguments, **options)
