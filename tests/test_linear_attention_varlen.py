"""linear_attention_varlen against linear_attention on each segment alone, on every backend by name."""

from __future__ import annotations

import pytest
import torch
from linear_attention_cases import bound_size, definition, feature_map
from utils import DTYPES, assert_close, backends_of, device_of, on

from qvl_kernels import EluFeatures, linear_attention_varlen

BACKENDS = backends_of("linear_attention_varlen")


def offsets_of(lengths, device="cpu", dtype=torch.int32):
    return torch.tensor([0, *lengths], device=device).cumsum(0).to(dtype)


def one_by_one(q, k, v, lengths_q, lengths_k, map_, causal):
    segments = zip(q.split(lengths_q), k.split(lengths_k), v.split(lengths_k))
    return torch.cat(
        [
            definition(*(x.transpose(0, 1)[None] for x in qkv), map_, causal=causal)[0].transpose(0, 1)
            for qkv in segments
        ]
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("name", ["favor", "elu", "squares"])
@pytest.mark.parametrize(
    ("lengths_q", "lengths_k"),
    [([5], [5]), ([3, 0, 7, 1], [3, 0, 7, 1]), ([1, 2, 130, 3], [9, 0, 120, 64]), ([0], [0]), ([96, 200], [96, 900])],
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_segments_are_independent(backend, lengths_q, lengths_k, name, causal, dtype):
    device, map_ = device_of(backend), feature_map(name, 8)
    q = torch.randn(sum(lengths_q), 4, 8, dtype=dtype, device=device)
    k, v = (torch.randn(sum(lengths_k), 2, dim, dtype=dtype, device=device) for dim in (8, 6))
    offsets = offsets_of(lengths_q, device), offsets_of(lengths_k, device)
    with on(backend), torch.no_grad():
        ours = linear_attention_varlen(q, k, v, *offsets, feature_map=map_, causal=causal)
        exact = one_by_one(q.double(), k.double(), v.double(), lengths_q, lengths_k, map_, causal)
        plain = one_by_one(q, k, v, lengths_q, lengths_k, map_, causal)
    size = bound_size(*(x[None] for x in (q, k, v)), map_)
    assert_close("out", ours, exact, plain, max(lengths_k) + 8, largest=size)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("name", ["favor", "elu"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients(backend, name, causal):
    q, k, v = (torch.randn(7, h, 4, dtype=torch.float64, requires_grad=True) for h in (2, 1, 1))
    offsets, map_ = offsets_of([3, 0, 4], dtype=torch.int64), feature_map(name, 4, 5)

    def run(*x):
        return linear_attention_varlen(*x, offsets, offsets, feature_map=map_, causal=causal)

    with on(backend):
        assert torch.autograd.gradcheck(run, (q, k, v))


X = torch.randn(6, 2, 8)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((X[0], X, X, [0, 6], [0, 6]), ValueError, r"query must have shape \(Tq, Hq, D\)"),
        ((X, X[:, :, :4], X, [0, 6], [0, 6]), ValueError, r"key must have shape \(Tk, Hkv, D\) = \(\*, \*, 8\)"),
        ((X, X, X[:5], [0, 6], [0, 6]), ValueError, r"value must have shape \(Tk, Hkv, Dv\) = \(6, 2, \*\)"),
        ((X, X, X, [0, 4], [0, 6]), ValueError, r"cu_seqlens_q must ascend from 0 to 6, got \[0, 4\]"),
        ((X, X, X, [0, 6], [0, 5, 3, 6]), ValueError, "cu_seqlens_k must ascend"),
        ((X, X, X, [0, 6], [0, 3, 6]), ValueError, "cu_seqlens_k must have cu_seqlens_q's 1 segments, got 2"),
        ((X, X, X, [0.0, 6.0], [0, 6]), TypeError, "cu_seqlens_q must be int32 or int64"),
    ],
)
def test_bad_arguments_are_named(arguments, error, message):
    q, k, v, *offsets = arguments
    with pytest.raises(error, match="^linear_attention_varlen: " + message):
        linear_attention_varlen(q, k, v, *map(torch.tensor, offsets), feature_map=EluFeatures())
