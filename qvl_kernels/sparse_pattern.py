"""Which keys each query of sparse attention sees: full and partial blocks, and the usual ways to choose them."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import _block_lists
from ._block_lists import BLOCKS, EMPTY, FULL, LOOK, BlockLists
from .reference import sparse_attention as reference

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class SparsePattern:
    """Who sees whom, (H or 1, Lq, Lk), kept as lists of blocks of `block` x `block` pairs: blocks that are seen in
    full, and partial ones with a mask. Make one with a class method, once for many calls.

    Query i stands at position p = Lk - Lq + i (bottom-right aligned, as in `attention`); "a window of 4" is the keys
    p - 3 to p. A query may see nothing: its output and gradients are zeros.

    Args:
        lists: the blocks, `qvl_kernels._block_lists.BlockLists`.
        len_q: Lq, the number of queries; it need not be a multiple of `block`.
        len_k: Lk, the number of keys.
        block: 32, 64, 128 or 256. Only listed blocks cost time, whatever part of them is seen.

    Raises:
        ValueError: the block size is none of these, or the lists do not fit the lengths, are out of range or unsorted.

    >>> SparsePattern.sliding_window(256, 256, window=64)
    SparsePattern(heads=1, len_q=256, len_k=256, block=64, density=0.2192, full=0, partial=7, masks=2)
    """

    def __init__(self, lists: BlockLists, len_q: int, len_k: int, block: int) -> None:
        _sizes(len_q, len_k, block)
        _block_lists.check("SparsePattern", lists, len_q, len_k, block)
        self.lists, self.len_q, self.len_k, self.block = lists, len_q, len_k, block
        self.heads = lists.full_offsets.shape[0]
        self.same_heads = _block_lists.same_heads(lists)  # so many heads in a row see the same

    @classmethod
    def sliding_window(
        cls, len_q: int, len_k: int, window: int, sinks: int = 0, block: int = 64, causal: bool = True
    ) -> SparsePattern:
        """The `window` last keys up to a query's own position p, itself included, and the first `sinks` keys:
        p - window < j <= p, or j < sinks and j <= p. Without `causal`: |p - j| < window, or j < sinks.

        Raises:
            ValueError: window or sinks is negative.

        Source: Beltagy et al., Longformer, 2020, section 3.1; sinks: Xiao et al., Efficient streaming language models
        with attention sinks, 2023, section 3.2.

        >>> SparsePattern.sliding_window(3, 5, window=2, sinks=1).to_dense()[0].int().tolist()
        [[1, 1, 1, 0, 0], [1, 0, 1, 1, 0], [1, 0, 0, 1, 1]]
        """
        _sizes(len_q, len_k, block)
        if window < 0 or sinks < 0:
            raise ValueError(f"SparsePattern: window and sinks must not be negative, got {window} and {sinks}")
        shift, ahead = len_k - len_q, 0 if causal else window - 1

        def sees(_head: int, query: Tensor, key: Tensor) -> Tensor:
            back = query + shift - key
            return (back < window) & (back >= -ahead) | (key < sinks) & ((back >= 0) | (not causal))

        first_q, last_q, first_k, last_k = _corners(len_q, len_k, block)
        low, high = first_q + shift - last_k, last_q + shift - first_k  # the range of p - j in each block
        past_some, past_all = ((high >= 0) | (not causal), (low >= 0) | (not causal))
        some = (low < window) & (high >= -ahead) | (first_k < sinks) & past_some
        full = (high < window) & (low >= -ahead) | (last_k < sinks) & past_all
        states = some.int() + (some & full).int()
        return cls(_block_lists.build(states[None], len_q, len_k, block, sees), len_q, len_k, block)

    @classmethod
    def strided(cls, len_q: int, len_k: int, stride: int, local: int = 1, block: int = 64) -> SparsePattern:
        """Of the key blocks up to a query's own the last `local` and every `stride`-th: with
        c = p // block - j // block key j <= p is seen where c < local or c % stride = 0.

        Raises:
            ValueError: stride is below 1 or local negative.

        Source: Child et al., Generating long sequences with sparse transformers, 2019, section 4.2, by blocks.

        >>> pattern = SparsePattern.strided(1024, 1024, stride=4)
        >>> pattern.to_dense()[0, -1].view(16, 64).any(1).int().tolist()  # blocks that the last query sees
        [0, 0, 0, 1, 0, 0, 0, 1, 0, 0, 0, 1, 0, 0, 0, 1]
        """
        _sizes(len_q, len_k, block)
        if stride < 1 or local < 0:
            raise ValueError(f"SparsePattern: stride must be at least 1 and local at least 0, got {stride} and {local}")
        seen = torch.arange(-(-len_k // block) + 1)
        return _by_distance(((seen < local) | (seen % stride == 0))[None], None, len_q, len_k, block)

    @classmethod
    def big_bird(
        cls,
        len_q: int,
        len_k: int,
        *,
        window: int = 3,
        global_blocks: int = 1,
        random_blocks: int = 3,
        heads: int = 1,
        seed: int = 0,
        block: int = 64,
    ) -> SparsePattern:
        """Blocks, in both directions: a band `window` wide, the first `global_blocks` as keys of all and as queries of
        all, and for each query block `random_blocks` of the others, drawn for each head by `seed`.

        Query block i stands beside key block i + (key blocks - query blocks).

        Raises:
            ValueError: a count is negative, or there is no head.

        Source: Zaheer et al., Big Bird: transformers for longer sequences, 2020, section 2 and appendix D.

        >>> SparsePattern.big_bird(1024, 1024, heads=2).density()
        0.46484375
        """
        _sizes(len_q, len_k, block)
        if min(window, global_blocks, random_blocks) < 0 or heads < 1:
            raise ValueError(
                "SparsePattern: window, global_blocks and random_blocks must not be negative and heads at least 1, got "
                f"{window}, {global_blocks}, {random_blocks} and {heads}"
            )
        rows, columns = -(-len_q // block), -(-len_k // block)
        row, column = torch.arange(rows).unsqueeze(1) + columns - rows, torch.arange(columns)
        fixed = ((row - column).abs() <= (window - 1) // 2) & (window > 0)
        fixed = fixed | (column < global_blocks) | (row < global_blocks)
        generator = torch.Generator().manual_seed(seed)
        order = torch.rand(heads, rows, columns, generator=generator).masked_fill(fixed, 2.0)
        drawn = torch.zeros(heads, rows, columns, dtype=torch.bool)
        drawn.scatter_(2, order.topk(min(random_blocks, columns), largest=False).indices, True)
        return cls(_block_lists.build((drawn | fixed).int() * FULL, len_q, len_k, block), len_q, len_k, block)

    @classmethod
    def vertical_slash(
        cls,
        query: Tensor,
        key: Tensor,
        *,
        vertical: int = 8,
        slash: int = 8,
        last: int = 64,
        scale: float | None = None,
        block: int = 64,
    ) -> SparsePattern:
        """Causal, chosen from the data for each head: the columns and diagonals, one block wide, that hold the most of
        the last queries' attention. With c = p // block - j // block key j <= p is seen where block j // block is one
        of the `vertical` best, or c one of the `slash` best or 0.

        Args:
            query: (B, Hq, Lq, D), floating; one pattern serves the batch.
            key: (B, Hkv, Lk, D).
            vertical: columns to keep, in blocks.
            slash: diagonals to keep, in blocks.
            last: how many of the last queries are looked at.
            scale: of the scores; None is 1 / sqrt(D).
            block: the width.

        Raises:
            ValueError: the shapes do not fit, or a count is negative.

        Source: Jiang et al., MInference 1.0, 2024, section 3.2 and algorithm 2. There a column is one key wide; here it
        is as wide as what a kernel skips.

        >>> q, k = torch.randn(1, 4, 512, 16), torch.randn(1, 2, 512, 16)
        >>> SparsePattern.vertical_slash(q, k, vertical=2, slash=2).heads
        4
        """
        if query.ndim != 4 or key.ndim != 4 or query.shape[1] % max(key.shape[1], 1) or query.shape[3] != key.shape[3]:
            raise ValueError(
                "SparsePattern: query and key must have shapes (B, Hq, Lq, D) and (B, Hkv, Lk, D), got "
                f"{tuple(query.shape)} and {tuple(key.shape)}"
            )
        if min(vertical, slash) < 0 or last < 1:
            raise ValueError(
                "SparsePattern: vertical and slash must not be negative and last at least 1, got "
                f"{vertical}, {slash} and {last}"
            )
        len_q, len_k = query.shape[2], key.shape[2]
        _sizes(len_q, len_k, block)
        by_column, by_diagonal = _attention_mass(query[:, :, -last:], key, scale, block)
        best = torch.zeros_like(by_column, dtype=torch.bool)
        best.scatter_(1, by_column.topk(min(vertical, best.shape[1])).indices, True)
        near = torch.zeros_like(by_diagonal, dtype=torch.bool)
        near.scatter_(1, by_diagonal.topk(min(slash, near.shape[1])).indices, True)
        near[:, :1] = True
        return _by_distance(near, best, len_q, len_k, block)

    @classmethod
    def from_layout(
        cls, layout: Tensor, block: int, len_q: int | None = None, len_k: int | None = None
    ) -> SparsePattern:
        """DeepSpeed's layout: (H, blocks of queries, blocks of keys), nonzero where a block is seen.

        Args:
            layout: any dtype; (blocks, blocks) means one head.
            block: 32, 64, 128 or 256, or 8 or 16, which become parts of blocks of 64.
            len_q: Lq where the last block is not whole; None is blocks times block.
            len_k: likewise.

        Raises:
            ValueError: the layout is not of blocks, or does not fit the lengths.

        Source: DeepSpeed's sparse attention, `SparsityConfig.make_layout`.

        >>> SparsePattern.from_layout(torch.eye(4), block=32).density()
        0.25
        """
        layout = layout[None] if layout.ndim == 2 else layout
        if layout.ndim != 3:
            raise ValueError(f"SparsePattern: layout must have shape (H, blocks, blocks), got {tuple(layout.shape)}")
        _, rows, columns = layout.shape
        len_q, len_k = rows * block if len_q is None else len_q, columns * block if len_k is None else len_k
        small = block in (8, 16)
        _sizes(len_q, len_k, 64 if small else block)
        if (rows, columns) != (-(-len_q // block), -(-len_k // block)):
            raise ValueError(
                f"SparsePattern: layout must have {-(-len_q // block)} x {-(-len_k // block)} blocks of {block} for "
                f"{len_q} queries and {len_k} keys, got {rows} x {columns}"
            )
        listed = layout != 0
        if not small:
            return cls(_block_lists.build(listed.int() * FULL, len_q, len_k, block), len_q, len_k, block)
        states = _any_by_blocks(listed, 64 // block).int() * LOOK
        lists = _block_lists.build(states, len_q, len_k, 64, lambda h, q, k: listed[h, q // block, k // block])
        return cls(lists, len_q, len_k, 64)

    @classmethod
    def from_mask(cls, mask: Tensor, block: int = 64) -> SparsePattern:
        """Any mask: (Lq, Lk) or (H, Lq, Lk) bool, True where a query sees a key.

        Raises:
            TypeError: the mask is not bool.
            ValueError: it has another shape.

        >>> SparsePattern.from_mask(torch.ones(100, 100).tril().bool(), block=32).density()
        0.505
        """
        if mask.dtype != torch.bool:
            raise TypeError(f"SparsePattern: mask must be bool, got {mask.dtype}")
        mask = mask[None] if mask.ndim == 2 else mask
        if mask.ndim != 3:
            raise ValueError(f"SparsePattern: mask must have shape (H, Lq, Lk) or (Lq, Lk), got {tuple(mask.shape)}")
        mask = mask.cpu()
        _, len_q, len_k = mask.shape
        _sizes(len_q, len_k, block)
        some = _any_by_blocks(mask, block)
        states = some.int() + (some & ~_any_by_blocks(~mask, block)).int()
        return cls(_block_lists.build(states, len_q, len_k, block, lambda h, q, k: mask[h, q, k]), len_q, len_k, block)

    @classmethod
    def from_block_mask(cls, block_mask: Any) -> SparsePattern:
        """torch's `BlockMask` (`torch.nn.attention.flex_attention.create_block_mask`): its full blocks stay full, its
        partial ones are looked at through its `mask_mod`.

        Raises:
            ValueError: it differs over the batch, or its block sizes have no common part that is supported.

        >>> from torch.nn.attention.flex_attention import create_block_mask
        >>> mask = create_block_mask(lambda b, h, q, k: q >= k, None, None, 256, 256, device="cpu")
        >>> SparsePattern.from_block_mask(mask)
        SparsePattern(heads=1, len_q=256, len_k=256, block=128, density=0.502, full=1, partial=2, masks=1)
        """
        counts, indices = block_mask.kv_num_blocks, block_mask.kv_indices
        if counts.shape[0] != 1:
            raise ValueError(f"SparsePattern: block_mask must be the same for the batch (B = 1), got {len(counts)}")
        (size_q, size_k), (len_q, len_k) = block_mask.BLOCK_SIZE, block_mask.seq_lengths
        block = max((size for size in BLOCKS if size_q % size == 0 == size_k % size), default=0)
        _sizes(len_q, len_k, block or math.gcd(size_q, size_k))
        rows, columns = -(-len_q // block), -(-len_k // block)
        states = torch.zeros(counts.shape[1], rows, columns, dtype=torch.int32)
        full = block_mask.full_kv_num_blocks, block_mask.full_kv_indices
        for state, number, listed in ((LOOK, counts, indices), (FULL, *full)):
            if number is None:
                continue
            number, listed = number[0].cpu(), listed[0].cpu()
            there = torch.zeros(*listed.shape[:2], -(-len_k // size_k) + 1, dtype=torch.bool)
            used = torch.arange(listed.shape[2]) < number.unsqueeze(2)
            there.scatter_(2, torch.where(used, listed, there.shape[2] - 1).long(), True)
            finer = there[:, :, :-1].repeat_interleave(size_q // block, 1).repeat_interleave(size_k // block, 2)
            states[finer[:, :rows, :columns]] = state
        modified = _elementwise(block_mask.mask_mod, counts.device)
        return cls(_block_lists.build(states, len_q, len_k, block, modified), len_q, len_k, block)

    def to_dense(self) -> Tensor:
        """(H, Lq, Lk) bool, True where a query sees a key."""
        return reference.dense(self.lists, self.block, self.len_q, self.len_k)

    def density(self) -> float:
        """The share of the pairs that are seen, of all heads together."""
        pairs = self.heads * self.len_q * self.len_k
        full_rows = _row_of(self.lists.full_offsets)
        whole = (self.len_q - full_rows * self.block).clamp(max=self.block)
        seen = (whole * (self.len_k - self.lists.full.long() * self.block).clamp(max=self.block)).sum()
        ones = (self.lists.bits.unsqueeze(-1) >> torch.arange(8, dtype=torch.uint8) & 1).flatten(1).sum(1)
        return (int(seen) + int(ones[self.lists.masks.long()].sum())) / pairs if pairs else 0.0

    def plot(self) -> Figure:
        """A matplotlib figure of the blocks, a panel for each head that differs from the one before: white is not seen,
        light in part, dark in full. Needs matplotlib."""
        from matplotlib.figure import Figure

        heads = range(0, self.heads, self.same_heads)
        figure = Figure(figsize=(3.2 * min(len(heads), 4), 3.2 * -(-len(heads) // 4)), layout="constrained")
        for axes, head in zip(figure.subplots(-(-len(heads) // 4), min(len(heads), 4), squeeze=False).flat, heads):
            axes.imshow(self._states()[head], cmap="Blues", vmin=EMPTY, vmax=1.2 * FULL, extent=self._extent())
            axes.set(xlabel="key", ylabel="query", title=f"head {head}" if len(heads) > 1 else "")
        return figure

    def _extent(self) -> tuple[int, int, int, int]:
        return 0, -(-self.len_k // self.block) * self.block, -(-self.len_q // self.block) * self.block, 0

    def _states(self) -> Tensor:
        rows = self.lists.full_offsets.shape[1] - 1
        states = torch.zeros(self.heads * rows, -(-self.len_k // self.block), dtype=torch.int32)
        for state, offsets, blocks in (
            (LOOK, self.lists.partial_offsets, self.lists.partial),
            (FULL, self.lists.full_offsets, self.lists.full),
        ):
            counts = offsets.diff().flatten().long()
            states[torch.arange(len(counts)).repeat_interleave(counts), blocks.long()] = state
        return states.view(self.heads, rows, -1)

    def __repr__(self) -> str:
        return (
            f"SparsePattern(heads={self.heads}, len_q={self.len_q}, len_k={self.len_k}, block={self.block}, "
            f"density={self.density():.4g}, full={len(self.lists.full)}, partial={len(self.lists.partial)}, "
            f"masks={len(self.lists.bits)})"
        )


def _sizes(len_q: int, len_k: int, block: int) -> None:
    if block not in BLOCKS:
        raise ValueError(f"SparsePattern: block must be one of {', '.join(map(str, BLOCKS))}, got {block}")
    if len_q < 0 or len_k < 0:
        raise ValueError(f"SparsePattern: len_q and len_k must not be negative, got {len_q} and {len_k}")


def _corners(len_q: int, len_k: int, block: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """First and last query of each block of queries, (n, 1), first and last key of each block of keys."""
    query, key = torch.arange(0, len_q, block).unsqueeze(1), torch.arange(0, len_k, block)
    return query, (query + block - 1).clamp(max=len_q - 1), key, (key + block - 1).clamp(max=len_k - 1)


def _by_distance(near: Tensor, best: Tensor | None, len_q: int, len_k: int, block: int) -> SparsePattern:
    """Causal: with c = p // block - j // block key j <= p is seen where near[head, c] or best[head, j // block]."""
    shift = len_k - len_q

    def sees(head: int, query: Tensor, key: Tensor) -> Tensor:
        position, column = query + shift, key // block
        distance = position.clamp(min=0) // block - column
        kept = near[head, distance.clamp(min=0)]
        if best is not None:
            kept = kept | best[head, column]
        return kept & (key <= position)

    first_q, last_q, first_k, last_k = _corners(len_q, len_k, block)
    low, high = ((x + shift).clamp(min=0) // block - first_k // block for x in (first_q, last_q))
    at_low, at_high = near[:, low.clamp(min=0)], near[:, high.clamp(min=0)]
    if best is not None:
        at_low, at_high = at_low | best.unsqueeze(1), at_high | best.unsqueeze(1)
    some = (at_low | at_high) & (first_k <= last_q + shift)
    states = some.int() + (some & at_low & at_high & (last_k <= first_q + shift)).int()
    return SparsePattern(_block_lists.build(states, len_q, len_k, block, sees), len_q, len_k, block)


def _attention_mass(query: Tensor, key: Tensor, scale: float | None, block: int) -> tuple[Tensor, Tensor]:
    """What the queries, the last ones, give to each block of keys and to each distance in blocks, (H, blocks)."""
    scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    position = key.shape[2] - query.shape[2] + torch.arange(query.shape[2]).unsqueeze(1)
    column = torch.arange(key.shape[2])
    wide = key.detach().float().cpu().repeat_interleave(query.shape[1] // key.shape[1], 1)
    scores = query.detach().float().cpu() * scale @ wide.transpose(-1, -2)
    weights = torch.softmax(scores.masked_fill(column > position, -torch.inf), -1).nan_to_num(0.0).sum(0)
    sums = torch.zeros(query.shape[1], -(-key.shape[2] // block))
    distance = (position // block - column // block).clamp(min=0)
    by_diagonal = sums.clone().index_add_(1, distance.flatten(), weights.flatten(1))
    return sums.index_add_(1, column // block, weights.sum(1)), by_diagonal


def _any_by_blocks(mask: Tensor, block: int) -> Tensor:
    """(H, n, m) bool to (H, blocks, blocks): whether any element of a block is true."""
    _, rows, columns = mask.shape
    padded = torch.nn.functional.pad(mask, (0, -columns % block, 0, -rows % block))
    return padded.unflatten(2, (-1, block)).any(3).unflatten(1, (-1, block)).any(2)


def _row_of(offsets: Tensor) -> Tensor:
    """For every listed block its query block."""
    counts = offsets.diff()
    return torch.arange(counts.shape[1]).repeat(counts.shape[0]).repeat_interleave(counts.flatten().long())


def _elementwise(mask_mod: Callable[..., Tensor], device: torch.device) -> _block_lists.Sees:
    """A function of one query and one key to one of blocks of them, by vmap as torch's own create_block_mask does."""
    over_keys = torch.vmap(mask_mod, in_dims=(None, None, None, 0))
    over_queries = torch.vmap(over_keys, in_dims=(None, None, 0, None))
    over_blocks = torch.vmap(over_queries, in_dims=(None, None, 0, 0))

    def sees(head: int, query: Tensor, key: Tensor) -> Tensor:
        batch, head_index = torch.tensor(0, device=device), torch.tensor(head, device=device)
        return over_blocks(batch, head_index, query[:, :, 0].to(device), key[:, 0].to(device)).cpu()

    return sees
