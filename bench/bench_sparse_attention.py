"""sparse_attention, forward and backward: its time over density, beside our own dense kernel on the same shape and
torch's function with the same mask.

FLOPs: 2 Lq Lk (D + Dv) B Hq times the pattern's density; backward 2.5 times that. Bytes: q, k, v and out once. "of
1 / density" is the speed-up over dense as a share of what the density promises. torch:
F.scaled_dot_product_attention with attn_mask.
Patterns: random full blocks of 64, as many for each query, another draw for each length; a causal sliding window, of
which every query block has two partial blocks.
"""

import pytest
import torch
import torch.nn.functional as F
from timing import Case

from qvl_kernels import SparsePattern, attention, sparse_attention

DENSITIES = (1 / 16, 1 / 8, 1 / 4, 1 / 2, 1)
SHAPES = {4096: (4, 4), 16384: (1, 1)}  # Hq, Hkv


def random_blocks(length: int, density: float) -> SparsePattern:
    """Blocks of 64, density times of a row's blocks in each row."""
    rows = length // 64
    order = torch.rand(rows, rows, generator=torch.Generator().manual_seed(length))
    chosen = order.topk(max(1, round(rows * density))).indices
    return SparsePattern.from_layout(torch.zeros(rows, rows).scatter_(1, chosen, 1.0), 64)


def window(length: int, density: float) -> SparsePattern:
    """As wide as density times the length; the first rows see less, so that the density is a little lower."""
    return SparsePattern.sliding_window(length, length, round(length * density))


CASES = [
    pytest.param(length, kind, density, marks=[pytest.mark.long] * (length > 4096 or density in (1 / 8, 1 / 2)))
    for length in SHAPES
    for density in DENSITIES
    for kind in (random_blocks, window)
    if kind is random_blocks or density < 1
]


def case_of(length, pattern, kind, density, flops, suffix=""):
    heads = "{}/{}".format(*SHAPES[length])
    name = f"{length} {kind.__name__.replace('_', ' ')} 1/{round(1 / density)}, {heads} x 128, fp32{suffix}"
    flops *= 2 * length**2 * 256 * SHAPES[length][0] * pattern.density()
    return Case("sparse_attention", name, flops, 4 * 4 * length * 128 * SHAPES[length][0], density=pattern.density())


@pytest.mark.parametrize(("length", "kind", "density"), CASES)
def bench_forward(compare, length, kind, density):
    heads, kv_heads = SHAPES[length]
    q, k, v = (torch.randn(1, n, length, 128) for n in (heads, kv_heads, kv_heads))
    pattern = kind(length, density)
    mask = pattern.to_dense()
    own = lambda: F.scaled_dot_product_attention(q, k, v, attn_mask=mask)  # noqa: E731
    compare(
        case_of(length, pattern, kind, density, 1.0),
        lambda: sparse_attention(q, k, v, pattern),
        None,
        own,
        1e-4,
        dense=lambda: attention(q, k, v),
    )


@pytest.mark.parametrize(("length", "kind", "density"), [case for case in CASES if case.values[0] == 4096])
def bench_backward(compare, length, kind, density):
    heads, kv_heads = SHAPES[length]
    q, k, v = (torch.randn(1, n, length, 128, requires_grad=True) for n in (heads, kv_heads, kv_heads))
    pattern = kind(length, density)
    grad = torch.randn(1, heads, length, 128)
    with torch.enable_grad():
        ours, dense = sparse_attention(q, k, v, pattern), attention(q, k, v)
        own = F.scaled_dot_product_attention(q, k, v, attn_mask=pattern.to_dense())
    back = lambda out: torch.autograd.grad(out, (q, k, v), grad, retain_graph=True)  # noqa: E731
    case = case_of(length, pattern, kind, density, 2.5, ", backward")
    compare(case, lambda: back(ours), None, lambda: back(own), 3e-4, dense=lambda: back(dense))
