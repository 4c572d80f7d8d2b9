"""linear_attention and linear_attention_varlen with FAVOR+ features: forward over the length, backward, decode.

FLOPs: 2 M D for the features of each query row and key, 2 M Dv for each key's part of the state and each row's reading
of it: 2 M (D + Dv) (Hq Lq + Hkv Lk) B. The masked products inside a causal chunk are not counted, though everyone has
to do them: they depend on the chunk. Backward 5 times a row's and a key's 2 M (D + Dv) / 2 (features, d phi, the other
state, d x; for keys also d v). Bytes: q, k, v and out once; decode: W, the state in and out.
torch: for the causal form `by_chunk`, a loop over chunks of 128 tokens whose features stay in the cache, the fastest
plain PyTorch we found; "all at once" names the usual other one, `at_once`: features of the whole sequence by one
matmul, the chunks' states by a batched product and a cumsum. "exact" is F.scaled_dot_product_attention on the same
tensors: another function, so only the times are compared.

Decode "against 1 token after 256" is ours on both sides: 1.00 says that the time does not depend on the tokens before.
"""

import math

import pytest
import torch
import torch.nn.functional as F
from timing import Case

from qvl_kernels import FavorFeatures, linear_attention, linear_attention_varlen
from qvl_kernels._linear_attention import Options, Reference

FEATURES = 256
HEADS = 8
CHUNK = 128
LENGTHS = (1024, 256, 4096, pytest.param(32768, marks=pytest.mark.long))


def raise_(x, top):
    """exp(x - top), in place."""
    return x.sub_(top).exp_()


def exponents(q, k, projection):
    """W q' and W k' - |k'|^2 / 2, by one matmul each."""
    scale = q.shape[-1] ** -0.25
    weight = (projection * scale).T
    return q @ weight, (k @ weight).sub_((k * scale).square().sum(-1, keepdim=True), alpha=0.5)


def bidirectional(q, k, v, projection):
    phi_q, phi_k = exponents(q, k, projection)
    phi_q, phi_k = raise_(phi_q, phi_q.amax(-1, keepdim=True)), raise_(phi_k, phi_k.amax((-1, -2), keepdim=True))
    return (phi_q @ (phi_k.transpose(-1, -2) @ v)).div_(phi_q @ phi_k.sum(-2).unsqueeze(-1))


def at_once(q, k, v, projection):
    """Causal: batched products over all chunks, their states added up by a cumsum. Its stabiliser sees the future."""
    batch, heads, length, _ = q.shape
    chunks = length // CHUNK
    phi_q, phi_k = exponents(q, k, projection)
    phi_q, phi_k = raise_(phi_q, phi_q.amax(-1, keepdim=True)), raise_(phi_k, phi_k.amax((-1, -2), keepdim=True))
    phi_q, phi_k, values = (x.reshape(batch * heads * chunks, CHUNK, -1) for x in (phi_q, phi_k, v))

    def earlier(sums):
        before = sums.view(batch * heads, chunks, -1).cumsum(1).roll(1, 1)
        before[:, 0] = 0
        return before.view_as(sums)

    state = earlier(torch.bmm(phi_k.transpose(-1, -2), values))
    total = earlier(phi_k.sum(-2, keepdim=True)).transpose(-1, -2)
    weights = torch.bmm(phi_q, phi_k.transpose(-1, -2)).tril_()
    sums = torch.bmm(phi_q, state).baddbmm_(weights, values)
    return sums.div_(torch.bmm(phi_q, total) + weights.sum(-1, keepdim=True)).view(batch, heads, length, -1)


def by_chunk(q, k, v, projection):
    """Causal: chunk after chunk, all heads together, with a running maximum."""
    out, heads = torch.empty_like(v), q.shape[0] * q.shape[1]
    state, total = q.new_zeros(heads, projection.shape[0], v.shape[-1]), q.new_zeros(heads, projection.shape[0], 1)
    top = q.new_full((heads, 1, 1), -math.inf)
    flat_q, flat_k, flat_v, flat_out = (x.view(heads, -1, x.shape[-1]) for x in (q, k, v, out))
    for i in range(0, q.shape[2], CHUNK):
        part = slice(i, i + CHUNK)
        values = flat_v[:, part]
        phi_q, phi_k = exponents(flat_q[:, part], flat_k[:, part], projection)
        now = torch.maximum(top, phi_k.amax((-1, -2), keepdim=True))
        phi_q, phi_k = raise_(phi_q, phi_q.amax(-1, keepdim=True)), raise_(phi_k, now)
        kept, top = (top - now).exp_(), now
        state, total = state.mul_(kept), total.mul_(kept)
        weights = torch.bmm(phi_q, phi_k.transpose(-1, -2)).tril_()
        sums = torch.bmm(phi_q, state).baddbmm_(weights, values)
        torch.div(sums, torch.bmm(phi_q, total) + weights.sum(-1, keepdim=True), out=flat_out[:, part])
        state.baddbmm_(phi_k.transpose(-1, -2), values)
        total += phi_k.sum(-2).unsqueeze(-1)
    return out


def exact(q, k, v, causal):
    return F.scaled_dot_product_attention(q, k, v, is_causal=causal)


def flops_of(rows, keys, dim):
    return 2 * FEATURES * 2 * dim * (rows + keys)


@pytest.mark.parametrize("against", ["chunks", "exact", pytest.param("all at once", marks=pytest.mark.long)])
@pytest.mark.parametrize("causal", [False, True], ids=["bidirectional", "causal"])
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("length", LENGTHS)
def bench_forward(compare, length, dim, causal, against):
    if against == "all at once" and not causal:
        pytest.skip("the bidirectional form has no chunks")
    if length == 32768 and (against == "all at once" or (against == "exact" and dim == 64)):
        pytest.skip("takes minutes")
    q, k, v = torch.randn(3, 1, HEADS, length, dim)
    favor = FavorFeatures(dim, FEATURES, seed=0)
    own = {
        "chunks": lambda: (by_chunk if causal else bidirectional)(q, k, v, favor.projection),
        "all at once": lambda: at_once(q, k, v, favor.projection),
        "exact": lambda: exact(q, k, v, causal),
    }[against]
    kind = "causal" if causal else "bidirectional"
    name = f"{length} {kind} {HEADS} x {dim}, M = {FEATURES}, against {against}"
    case = Case("linear_attention", name, flops_of(HEADS * length, HEADS * length, dim), 4 * q.nbytes)
    ours = lambda: linear_attention(q, k, v, feature_map=favor, causal=causal)  # noqa: E731
    options = Options(favor.projection, 0, causal)
    plain = (lambda: Reference().run(q, k, v, options)[0]) if length <= 4096 else None
    tolerance = math.inf if against == "exact" else 1e-3
    compare(case, ours, plain if against == "chunks" else None, own, tolerance)


@pytest.mark.parametrize("causal", [False, True], ids=["bidirectional", "causal"])
@pytest.mark.parametrize("dim", [64, 128])
def bench_backward(compare, dim, causal):
    """torch: its autograd through the whole-sequence form."""
    length = 2048
    q, k, v = (x.requires_grad_() for x in torch.randn(3, 1, HEADS, length, dim).unbind())
    favor = FavorFeatures(dim, FEATURES, seed=0)
    grad = torch.randn(1, HEADS, length, dim)

    def plain():
        out, _ = Reference().run(q, k, v, Options(favor.projection, 0, causal))
        return out

    with torch.enable_grad():
        ours, own = linear_attention(q, k, v, feature_map=favor, causal=causal), plain()
    back = lambda out: torch.autograd.grad(out, (q, k, v), grad, retain_graph=True)  # noqa: E731
    kind = "causal" if causal else "bidirectional"
    name = f"{length} {kind} {HEADS} x {dim}, M = {FEATURES}, backward"
    flops = 2.5 * flops_of(HEADS * length, HEADS * length, dim)
    case = Case("linear_attention", name, flops, 8 * q.nbytes)
    compare(case, lambda: back(ours), None, lambda: back(own), 1e-2)


def decode_inputs(dim, *lengths):
    """A token's query and key, W, and for each length the cache of so many tokens before, with their state."""
    favor = FavorFeatures(dim, FEATURES, seed=0)
    caches = [torch.randn(1, 8, length, dim) for length in lengths]
    states = [
        linear_attention(
            torch.randn(1, 16, cache.shape[2], dim), cache, cache, feature_map=favor, causal=True, return_state=True
        )[1]
        for cache in caches
    ]
    return torch.randn(1, 16, 1, dim), torch.randn(1, 8, 1, dim), favor, caches, states


def decode_case(name, dim, favor, state):
    nbytes = favor.projection.nbytes + 2 * sum(x.nbytes for x in state)
    return Case("linear_attention", f"1 token after {name}", flops_of(16, 8, dim), nbytes)


@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("length", [256, 32768])
def bench_decode(compare, length, dim):
    """One token after `length` others, 16 / 8 heads; torch: exact attention over a cache of them."""
    q, k, favor, (cache,), (state,) = decode_inputs(dim, length)

    def ours():
        return linear_attention(q, k, k, feature_map=favor, causal=True, state=state, return_state=True)[0]

    own = lambda: F.scaled_dot_product_attention(q, cache, cache, enable_gqa=True)  # noqa: E731
    case = decode_case(f"{length}, 16/8 x {dim}, M = {FEATURES}, against exact", dim, favor, state)
    compare(case, ours, None, own, math.inf)


@pytest.mark.parametrize("dim", [64, 128])
def bench_decode_after(compare, dim):
    """One token after 32768 others against one token after 256: both ours."""
    q, k, favor, _, (short, long) = decode_inputs(dim, 256, 32768)

    def after(state):
        return linear_attention(q, k, k, feature_map=favor, causal=True, state=state, return_state=True)[0]

    case = decode_case(f"32768, 16/8 x {dim}, M = {FEATURES}, against 1 token after 256", dim, favor, long)
    compare(case, lambda: after(long), None, lambda: after(short), math.inf)


def bench_varlen(compare):
    """torch: one call a segment."""
    lengths = (256, 784, 400, 1024, 144, 576, 900, 324)
    q, k, v = torch.randn(3, sum(lengths), HEADS, 64)
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    favor = FavorFeatures(64, FEATURES, seed=0)

    def own():
        parts = zip(*(x.split(lengths) for x in (q, k, v)))
        outs = (bidirectional(*(x.transpose(0, 1)[None] for x in part), favor.projection) for part in parts)
        return torch.cat([out[0].transpose(0, 1) for out in outs])

    name = f"{'+'.join(map(str, lengths))} {HEADS} x 64, M = {FEATURES}"
    flops = flops_of(HEADS * sum(lengths), HEADS * sum(lengths), 64)
    case = Case("linear_attention_varlen", name, flops, 4 * q.nbytes)
    ours = lambda: linear_attention_varlen(q, k, v, offsets, offsets, feature_map=favor)  # noqa: E731
    compare(case, ours, None, own, 1e-3)
