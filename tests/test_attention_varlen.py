"""attention_varlen against attention on each segment alone, on every backend by name."""

from __future__ import annotations

import pytest
import torch
from utils import DTYPES, assert_close, backends_of, device_of, on

from qvl_kernels import attention, attention_varlen

BACKENDS = backends_of("attention_varlen")


def offsets_of(lengths, device="cpu", dtype=torch.int32):
    return torch.tensor([0, *lengths], device=device).cumsum(0).to(dtype)


def one_by_one(q, k, v, lengths_q, lengths_k, **options):
    segments = zip(q.split(lengths_q), k.split(lengths_k), v.split(lengths_k))
    return torch.cat(
        [attention(*(x.transpose(0, 1)[None] for x in qkv), **options)[0].transpose(0, 1) for qkv in segments]
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", [{}, {"causal": True}, {"window": (2, 1), "scale": 0.3}], ids=str)
@pytest.mark.parametrize(
    ("lengths_q", "lengths_k"),
    [([5], [5]), ([3, 0, 7, 1], [3, 0, 7, 1]), ([1, 2, 3], [9, 0, 64]), ([0], [0]), ([16, 63, 64], [16, 63, 64])],
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_segments_are_independent(backend, lengths_q, lengths_k, options, dtype):
    device = device_of(backend)
    q = torch.randn(sum(lengths_q), 4, 8, dtype=dtype, device=device)
    k, v = (torch.randn(sum(lengths_k), 2, dim, dtype=dtype, device=device) for dim in (8, 6))
    with on(backend):
        ours = attention_varlen(q, k, v, offsets_of(lengths_q, device), offsets_of(lengths_k, device), **options)
    exact = one_by_one(q.double(), k.double(), v.double(), lengths_q, lengths_k, **options)
    plain = one_by_one(q, k, v, lengths_q, lengths_k, **options)
    largest = v.abs().max().item() * 8 if v.numel() else 0.0
    assert_close("out", ours, exact, plain, max(lengths_k) + 8, largest=largest)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients(backend):
    q, k, v = (torch.randn(7, h, 4, dtype=torch.float64, requires_grad=True) for h in (2, 1, 1))
    offsets = offsets_of([3, 4], dtype=torch.int64)
    with on(backend):
        assert torch.autograd.gradcheck(lambda *x: attention_varlen(*x, offsets, offsets, causal=True), (q, k, v))


X = torch.zeros(6, 2, 8)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((X, X, X, [0, 6], [0, 5]), ValueError, r"cu_seqlens_k must ascend from 0 to 6, got \[0, 5\]"),
        ((X, X, X, [0, 4, 3, 6], [0, 6]), ValueError, "cu_seqlens_q must ascend from 0 to 6"),
        ((X, X, X, [0, 3, 6], [0, 6]), ValueError, "cu_seqlens_k must have cu_seqlens_q's 2 segments, got 1"),
        ((X, X, X, [], [0, 6]), ValueError, "cu_seqlens_q must ascend"),
        ((X, X[:, :, :4], X, [0, 6], [0, 6]), ValueError, r"key must have shape \(Tk, Hkv, D\) = \(\*, \*, 8\)"),
        ((X, X, X[:5], [0, 6], [0, 6]), ValueError, r"value must have shape \(Tk, Hkv, Dv\) = \(6, 2, \*\)"),
    ],
)
def test_bad_arguments_are_named(arguments, error, message):
    q, k, v, offsets_q, offsets_k = arguments
    offsets = (torch.tensor(o, dtype=torch.int32) for o in (offsets_q, offsets_k))
    with pytest.raises(error, match="attention_varlen: " + message):
        attention_varlen(q, k, v, *offsets)


def test_offsets_must_be_integers():
    with pytest.raises(TypeError, match="cu_seqlens_q must be int32 or int64"):
        attention_varlen(X, X, X, torch.tensor([0.0, 6.0]), torch.tensor([0, 6]))
