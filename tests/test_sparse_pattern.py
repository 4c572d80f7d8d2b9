"""Every way to make a SparsePattern against its definition, pair by pair, and the lists that come out."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.attention.flex_attention import and_masks, create_block_mask, create_mask, or_masks

from qvl_kernels import SparsePattern
from qvl_kernels._block_lists import BlockLists, pack_bits

LENGTHS = [(1, 1), (63, 63), (64, 64), (65, 65), (111, 300), (300, 111), (1, 200), (130, 128), (0, 70), (70, 0)]


def pairwise(len_q: int, len_k: int, sees) -> Tensor:
    """(Lq, Lk) bool of sees(p, j), p the position Lk - Lq + i of query i."""
    rows = [[bool(sees(len_k - len_q + i, j)) for j in range(len_k)] for i in range(len_q)]
    return torch.tensor(rows, dtype=torch.bool).view(len_q, len_k)


def check(pattern: SparsePattern, expected: Tensor) -> None:
    """The pattern is this mask, its full blocks are those that show everything, and its masks are kept once."""
    expected = expected[None] if expected.ndim == 2 else expected
    assert torch.equal(pattern.to_dense(), expected)
    assert pattern.density() == pytest.approx(expected.double().mean().item() if expected.numel() else 0.0)
    lists, block = pattern.lists, pattern.block
    for head in range(pattern.heads):
        for i in range(-(-pattern.len_q // block)):
            full = lists.full[lists.full_offsets[head, i] : lists.full_offsets[head, i + 1]].tolist()
            partial = lists.partial[lists.partial_offsets[head, i] : lists.partial_offsets[head, i + 1]].tolist()
            rows = expected[head, i * block : (i + 1) * block]
            parts = [rows[:, j : j + block] for j in range(0, pattern.len_k, block)]
            assert full == [j for j, part in enumerate(parts) if part.all()]
            assert partial == [j for j, part in enumerate(parts) if part.any() and not part.all()]
    assert len(lists.bits.flatten(1).unique(dim=0)) == len(lists.bits)


@pytest.mark.parametrize(("len_q", "len_k"), LENGTHS)
@pytest.mark.parametrize("block", [32, 64])
@pytest.mark.parametrize(("window", "sinks"), [(1, 0), (5, 3), (64, 64), (100, 70), (0, 2), (500, 0), (0, 0)])
def test_sliding_window(window, sinks, block, len_q, len_k):
    pattern = SparsePattern.sliding_window(len_q, len_k, window, sinks, block)
    check(pattern, pairwise(len_q, len_k, lambda p, j: p - window < j <= p or (j < sinks and j <= p)))
    pattern = SparsePattern.sliding_window(len_q, len_k, window, sinks, block, causal=False)
    check(pattern, pairwise(len_q, len_k, lambda p, j: abs(p - j) < window or j < sinks))


@pytest.mark.parametrize(("len_q", "len_k"), LENGTHS)
@pytest.mark.parametrize(("stride", "local"), [(1, 0), (2, 1), (3, 2)])
def test_strided(stride, local, len_q, len_k):
    def sees(p, j):
        c = p // 32 - j // 32
        return j <= p and (c < local or c % stride == 0)

    check(SparsePattern.strided(len_q, len_k, stride, local, block=32), pairwise(len_q, len_k, sees))


@pytest.mark.parametrize(("len_q", "len_k"), [(640, 640), (600, 630), (320, 640)])
def test_big_bird(len_q, len_k):
    options = {"window": 3, "global_blocks": 2, "random_blocks": 2, "heads": 3, "block": 32}
    pattern = SparsePattern.big_bird(len_q, len_k, seed=5, **options)
    blocks = pattern.to_dense()[:, ::32, ::32]
    heads, rows, columns = blocks.shape
    whole = blocks.repeat_interleave(32, 1).repeat_interleave(32, 2)[:, :len_q, :len_k]
    check(pattern, whole)
    for head in range(heads):
        for i in range(rows):
            place = i + columns - rows
            fixed = {j for j in range(columns) if abs(place - j) <= 1 or j < 2 or place < 2}
            listed = set(blocks[head, i].nonzero().flatten().tolist())
            assert fixed <= listed
            assert len(listed - fixed) == min(2, columns - len(fixed))
    again, other = (SparsePattern.big_bird(len_q, len_k, seed=seed, **options) for seed in (5, 6))
    assert torch.equal(again.to_dense(), pattern.to_dense())
    assert not torch.equal(other.to_dense(), pattern.to_dense())
    assert not torch.equal(blocks[0], blocks[1])


def planted(len_q: int, len_k: int, columns: list[int], distances: list[int]) -> tuple[Tensor, Tensor]:
    """A query and key of two heads whose scores are high where j // 32 is one of the columns (head 0), or the distance
    p // 32 - j // 32 one of the given (head 1)."""
    position, key = torch.arange(len_q) + len_k - len_q, torch.arange(len_k)
    scores = torch.zeros(2, len_q, len_k)
    for column in columns:
        scores[0, :, key // 32 == column] = 9.0
    for distance in distances:
        scores[1][position[:, None] // 32 - key // 32 == distance] = 9.0
    return torch.eye(len_q).expand(1, 2, -1, -1), torch.nn.functional.pad(scores, (0, 0)).transpose(1, 2)[None]


@pytest.mark.parametrize(("len_q", "len_k"), [(256, 256), (100, 256), (90, 243)])
def test_vertical_slash(len_q, len_k):
    query, key = planted(len_q, len_k, [1, 4], [0, 2, 5])
    pattern = SparsePattern.vertical_slash(query, key, vertical=2, slash=0, last=32, scale=1.0, block=32)
    in_columns = pairwise(len_q, len_k, lambda p, j: j <= p and (j // 32 in (1, 4) or p // 32 == j // 32))
    assert torch.equal(pattern.to_dense()[0], in_columns)
    pattern = SparsePattern.vertical_slash(query, key, vertical=0, slash=3, last=32, scale=1.0, block=32)
    check(pattern, pattern.to_dense())
    on_diagonals = pairwise(len_q, len_k, lambda p, j: j <= p and p // 32 - j // 32 in (0, 2, 5))
    assert torch.equal(pattern.to_dense()[1], on_diagonals)


def test_vertical_slash_shares_keys_in_groups_and_takes_short_and_low_precision_input():
    q, k = torch.randn(2, 4, 20, 8).bfloat16(), torch.randn(2, 2, 50, 8).bfloat16()
    pattern = SparsePattern.vertical_slash(q, k, vertical=1, slash=1, block=32)
    assert (pattern.heads, pattern.len_q, pattern.len_k) == (4, 20, 50)
    causal = pairwise(20, 50, lambda p, j: j <= p)
    assert not (pattern.to_dense() & ~causal).any()
    assert pattern.to_dense().any(2).all()


@pytest.mark.parametrize("block", [8, 16, 32, 64])
def test_from_layout(block):
    layout = (torch.rand(2, 5, 7) < 0.4).long()
    whole = layout.bool().repeat_interleave(block, 1).repeat_interleave(block, 2)
    check(SparsePattern.from_layout(layout, block), whole)
    ragged = SparsePattern.from_layout(layout, block, 5 * block - 3, 7 * block - 5)
    check(ragged, whole[:, :-3, :-5])
    assert SparsePattern.from_layout(layout[0], block).heads == 1


@settings(max_examples=60, deadline=None)
@given(
    heads=st.sampled_from([None, 1, 3]),
    len_q=st.integers(0, 150),
    len_k=st.integers(0, 150),
    block=st.sampled_from([32, 64, 128]),
    density=st.sampled_from([0.0, 0.001, 0.5, 1.0]),
    blocky=st.booleans(),
    seed=st.integers(0, 99),
)
def test_from_mask(heads, len_q, len_k, block, density, blocky, seed):
    torch.manual_seed(seed)
    shape = (len_q, len_k) if heads is None else (heads, len_q, len_k)
    mask = torch.rand(shape) < density
    if blocky:
        whole = torch.rand(*shape[:-2], 10, 10) < 0.5
        mask |= whole.repeat_interleave(32, -1).repeat_interleave(32, -2)[..., :len_q, :len_k]
    check(SparsePattern.from_mask(mask, block), mask)


def causal(b, h, q, k):
    return q >= k


def window(b, h, q, k):
    return q - k < 50


def by_head(b, h, q, k):
    return (k % 3 == h) | (q // 64 == k // 64)


TABLE = torch.rand(400) < 0.3


def from_a_table(b, h, q, k):
    return TABLE[k]


@pytest.mark.parametrize(
    ("mask_mod", "heads"),
    [
        (causal, None),
        (and_masks(causal, window), None),
        (by_head, 3),
        (or_masks(from_a_table, window), 1),
        (lambda b, h, q, k: q + k < 0, None),
    ],
)
@pytest.mark.parametrize("sizes", [128, 64, (128, 64), (32, 128)], ids=str)
@pytest.mark.parametrize(("len_q", "len_k"), [(256, 256), (200, 391), (391, 100)])
def test_from_block_mask(mask_mod, heads, sizes, len_q, len_k):
    block_mask = create_block_mask(mask_mod, None, heads, len_q, len_k, device="cpu", BLOCK_SIZE=sizes)
    expected = create_mask(mask_mod, 1, heads or 1, len_q, len_k, device="cpu")[0]
    pattern = SparsePattern.from_block_mask(block_mask)
    check(pattern, expected)
    assert pattern.block == (sizes if isinstance(sizes, int) else min(sizes))


def test_block_masks_without_full_blocks():
    from torch.nn.attention.flex_attention import BlockMask

    whole = create_block_mask(causal, None, None, 256, 256, device="cpu")
    counts, indices = torch.tensor([[[1, 2]]], dtype=torch.int32), torch.tensor([[[[0, 1], [1, 0]]]], dtype=torch.int32)
    unsorted = BlockMask.from_kv_blocks(counts, indices, BLOCK_SIZE=128, mask_mod=causal)
    assert torch.equal(
        SparsePattern.from_block_mask(unsorted).to_dense(), SparsePattern.from_block_mask(whole).to_dense()
    )


def test_heads_that_see_the_same_are_noticed():
    mask = torch.rand(3, 100, 100) < 0.5
    assert SparsePattern.from_mask(mask[[0, 0, 1, 1]]).same_heads == 2
    assert SparsePattern.from_mask(mask[[0, 0, 0, 0]]).same_heads == 4
    assert SparsePattern.from_mask(mask[[0, 0, 1]]).same_heads == 1
    blocks = torch.eye(3)[None].repeat(4, 1, 1)
    blocks[2:, 0, 2] = 1
    assert SparsePattern.from_layout(blocks, 32).same_heads == 2


def test_the_lists_are_compact():
    pattern = SparsePattern.sliding_window(16384, 16384, 1000, sinks=100)
    assert len(pattern.lists.bits) == 5  # the diagonal, the window's end in two blocks, the sinks' with and without it
    assert sum(x.nbytes for x in pattern.lists) < 64 << 10
    for tensor, dtype in zip(pattern.lists, (torch.int32,) * 5 + (torch.uint8,)):
        assert tensor.dtype == dtype
    assert repr(pattern) == (
        f"SparsePattern(heads=1, len_q=16384, len_k=16384, block=64, density={pattern.density():.4g}, "
        f"full={len(pattern.lists.full)}, partial={len(pattern.lists.partial)}, masks={len(pattern.lists.bits)})"
    )


@pytest.mark.parametrize("heads", [1, 2, 5])
def test_plot(heads):
    pytest.importorskip("matplotlib")
    figure = SparsePattern.big_bird(500, 500, heads=heads).plot()
    images = [axes.images[0] for axes in figure.axes if axes.images]
    assert len(images) == heads
    assert images[0].get_array().shape == (8, 8)
    figure.canvas.draw()


def test_pack_bits_has_the_first_column_lowest():
    mask = torch.zeros(2, 16, dtype=torch.bool)
    mask[0, 0] = mask[0, 9] = mask[1, 7] = True
    assert pack_bits(mask).tolist() == [[1, 2], [128, 0]]


def lists_of(rows: list[list[int]], **changes) -> BlockLists:
    """One head's lists of full blocks, one list a query block, and changes to them."""
    ends = torch.tensor([0, *map(len, rows)]).cumsum(0).int()[None]
    blocks = torch.tensor([b for row in rows for b in row], dtype=torch.int32)
    none = torch.empty(0, dtype=torch.int32)
    lists = BlockLists(ends, blocks, torch.zeros_like(ends), none, none, torch.empty(0, 32, 4, dtype=torch.uint8))
    return lists._replace(**changes)


ONE = torch.zeros(1, dtype=torch.int32)
ONE_PARTIAL = {"partial_offsets": torch.tensor([[0, 1, 1]]).int(), "partial": ONE, "masks": ONE}
MASK = torch.zeros(1, 32, 4, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("lists", "message"),
    [
        (lists_of([[0, 2], [1]]), "full lists key block 2, but 64 keys make 2 blocks of 32"),
        (lists_of([[0, -1], [1]]), "full lists key block -1"),
        (lists_of([[1, 0], [1]]), "full must list the key blocks of a query block in rising order, each once"),
        (lists_of([[1, 1], [1]]), "in rising order, each once"),
        (lists_of([[0]]), r"full_offsets must have shape \(H, blocks of queries \+ 1\) = \(1, 3\), got \(1, 2\)"),
        (lists_of([[0], [1]], full=ONE), "full_offsets must rise from 0 to the 1 full blocks"),
        (
            lists_of([[0], [1]], full=torch.zeros(2)),
            "full must be contiguous torch.int32 on the CPU, got torch.float32",
        ),
        (lists_of([[0], [1]], **ONE_PARTIAL, bits=MASK), "must be full or partial, not both"),
        (lists_of([[], [1]], **ONE_PARTIAL), "masks must be indices of the 0 masks in bits"),
        (
            lists_of([[], [1]], **{**ONE_PARTIAL, "masks": ONE[:0]}, bits=MASK),
            "masks must have one entry for each of 1",
        ),
        (lists_of([[0], [1]], bits=MASK[:, :16].contiguous()), r"bits must have shape \(U, 32, 4\), got \(1, 16, 4\)"),
    ],
)
def test_bad_lists_are_named(lists, message):
    with pytest.raises(ValueError, match="SparsePattern: .*" + message):
        SparsePattern(lists, 64, 64, 32)
    assert SparsePattern(lists_of([[0, 1], []]), 64, 64, 32).density() == 0.5


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: SparsePattern.sliding_window(8, 8, 4, block=48), ValueError, "block must be one of 32, 64, 128, 256"),
        (lambda: SparsePattern.sliding_window(-1, 8, 4), ValueError, "len_q and len_k must not be negative, got -1"),
        (lambda: SparsePattern.sliding_window(8, 8, -4), ValueError, "window and sinks must not be negative, got -4"),
        (lambda: SparsePattern.strided(8, 8, 0), ValueError, "stride must be at least 1"),
        (lambda: SparsePattern.big_bird(8, 8, heads=0), ValueError, "window, .* heads at least 1"),
        (lambda: SparsePattern.from_mask(torch.zeros(4, 4)), TypeError, "mask must be bool, got torch.float32"),
        (lambda: SparsePattern.from_mask(torch.zeros(4).bool()), ValueError, r"mask must have shape \(H, Lq, Lk\)"),
        (lambda: SparsePattern.from_layout(torch.zeros(4), 64), ValueError, r"layout must have shape \(H, blocks"),
        (
            lambda: SparsePattern.from_layout(torch.zeros(2, 3), 64, 128, 200),
            ValueError,
            "layout must have 2 x 4 blocks of 64 for 128 queries and 200 keys, got 2 x 3",
        ),
        (
            lambda: SparsePattern.vertical_slash(torch.zeros(1, 3, 4, 8), torch.zeros(1, 2, 4, 8)),
            ValueError,
            r"query and key must have shapes \(B, Hq, Lq, D\) and \(B, Hkv, Lk, D\), got \(1, 3, 4, 8\)",
        ),
        (
            lambda: SparsePattern.from_block_mask(create_block_mask(causal, 2, None, 256, 256, device="cpu")),
            ValueError,
            r"block_mask must be the same for the batch \(B = 1\), got 2",
        ),
        (
            lambda: SparsePattern.from_block_mask(
                create_block_mask(causal, None, None, 96, 96, device="cpu", BLOCK_SIZE=48)
            ),
            ValueError,
            "block must be one of 32, 64, 128, 256, got 48",
        ),
    ],
)
def test_bad_arguments_are_named(make, error, message):
    with pytest.raises(error, match="SparsePattern: " + message):
        make()
