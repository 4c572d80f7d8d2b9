"""scaled_dot_product_attention against torch's function, and in other people's modules."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from utils import DTYPES, assert_close, backends_of, on

import qvl_kernels
from qvl_kernels import scaled_dot_product_attention
from qvl_kernels.integrations.torch import patch_sdpa

BACKENDS = backends_of("scaled_dot_product_attention")
TOP_LEFT = torch.ones(7, 12, dtype=torch.bool).tril()


def qkv(heads_q=4, heads_kv=4, len_q=7, len_k=12, dtype=torch.float32):
    return (torch.randn(2, h, n, 8, dtype=dtype) for h, n in ((heads_q, len_q), (heads_kv, len_k), (heads_kv, len_k)))


def check(backend: str, q, k, v, **options) -> None:
    with on(backend):
        ours = scaled_dot_product_attention(q, k, v, **options)
    wide = {n: x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for n, x in options.items()}
    exact = F.scaled_dot_product_attention(q.double(), k.double(), v.double(), **wide)
    plain = F.scaled_dot_product_attention(q, k, v, **options)
    assert_close("out", ours, exact, plain, 20, largest=8 * v.abs().max().item())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"is_causal": True},
        {"scale": 0.7},
        {"attn_mask": TOP_LEFT},
        {"attn_mask": torch.rand(2, 1, 7, 12) < 0.6},
        {"attn_mask": torch.randn(4, 7, 12)},
    ],
    ids=str,
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_options(backend, options, dtype):
    mask = options.get("attn_mask")
    if mask is not None and mask.is_floating_point():
        options = {"attn_mask": mask.to(dtype)}
    check(backend, *qkv(dtype=dtype), **options)


@pytest.mark.parametrize("backend", BACKENDS)
def test_causal_is_aligned_top_left(backend):
    q, k, v = qkv()
    with on(backend):
        ours = scaled_dot_product_attention(q, k, v, is_causal=True)
        torch.testing.assert_close(ours, scaled_dot_product_attention(q, k, v, attn_mask=TOP_LEFT))


@pytest.mark.parametrize("backend", BACKENDS)
def test_grouped_heads_need_the_flag(backend):
    check(backend, *qkv(8, 2), enable_gqa=True)
    with pytest.raises(RuntimeError), on(backend):
        scaled_dot_product_attention(*qkv(8, 2))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_query_that_sees_no_key(backend):
    q, k, v = qkv()
    mask = torch.ones(7, 12, dtype=torch.bool)
    mask[3] = False
    with on(backend):
        ours = scaled_dot_product_attention(q, k, v, attn_mask=mask)
    torch.testing.assert_close(ours, F.scaled_dot_product_attention(q, k, v, attn_mask=mask))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"dropout_p": 0.5}, "dropout_p is above 0"),
        ({"three dimensions": True}, "four dimensions"),
        ({"attn_mask": torch.zeros(7, 12, requires_grad=True)}, "mask needs a gradient"),
        ({"more queries": True, "is_causal": True}, "with more queries than keys"),
    ],
)
def test_what_the_kernels_do_not_take_runs_torchs_own_and_says_why(change, reason):
    if not any(name.startswith("cpu") for name in qvl_kernels.available_backends()):
        pytest.skip("no native CPU backend runs here")
    q, k, v = qkv(len_q=13) if change.pop("more queries", False) else qkv()
    if change.pop("three dimensions", False):
        q, k, v = q[0], k[0], v[0]
    torch.manual_seed(1)
    ours = scaled_dot_product_attention(q, k, v, **change)
    torch.manual_seed(1)
    assert torch.equal(ours, F.scaled_dot_product_attention(q, k, v, **change))
    assert reason in qvl_kernels.explain().fallbacks["scaled_dot_product_attention"]


def count_calls(monkeypatch) -> list[int]:
    """Grows by one with every call that a kernel runs."""
    from qvl_kernels._attention import Native

    calls: list[int] = []

    def counting(original):
        def run(self, *arguments):
            out = original(self, *arguments)
            if out is not None:
                calls.append(1)
            return out

        return run

    for name in ("plain", "forward"):
        monkeypatch.setattr(Native, name, counting(getattr(Native, name)))
    return calls


@pytest.fixture
def calls(monkeypatch):
    if not any(name.startswith("cpu") for name in qvl_kernels.available_backends()):
        pytest.skip("no native CPU backend runs here")
    return count_calls(monkeypatch)


@torch.no_grad()
def test_multihead_attention_runs_ours_inside_patch_sdpa(calls):
    module = nn.MultiheadAttention(32, 4, batch_first=True)
    x = torch.randn(2, 9, 32)
    expected = module(x, x, x, need_weights=False)[0]
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with patch_sdpa():
            ours = module(x, x, x, need_weights=False)[0]
    finally:
        torch.backends.mha.set_fastpath_enabled(True)
    assert len(calls) == 1
    torch.testing.assert_close(ours, expected)


@torch.no_grad()
def test_transformer_encoder_layer_runs_ours_inside_patch_sdpa(calls):
    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True).eval()
    x = torch.randn(2, 9, 32)
    padding = torch.zeros(2, 9, dtype=torch.bool)
    padding[1, 6:] = True
    expected = layer(x, src_key_padding_mask=padding)
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with patch_sdpa():
            ours = layer(x, src_key_padding_mask=padding)
    finally:
        torch.backends.mha.set_fastpath_enabled(True)
    assert len(calls) == 1
    torch.testing.assert_close(ours[~padding], expected[~padding])


def test_patch_sdpa_is_undone_after_an_error():
    before = F.scaled_dot_product_attention
    with pytest.raises(ZeroDivisionError), patch_sdpa():
        raise ZeroDivisionError
    assert F.scaled_dot_product_attention is before
