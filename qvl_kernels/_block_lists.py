"""The lists of a SparsePattern: which key blocks each query block sees, in full or in part.

A block is `block` x `block` pairs of a query and a key. What part of it is seen is a mask of bits; patterns repeat a
few of them (a window has two), so that each is kept once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

BLOCKS = (32, 64, 128, 256)  # whole register tiles of every ISA

EMPTY, LOOK, FULL = 0, 1, 2  # what is known of a block before its pairs are looked at

# (head, queries (n, block, 1), keys (n, 1, block)) -> who sees whom, broadcastable to (n, block, block)
Sees = Callable[[int, Tensor, Tensor], Tensor]

_PAIRS_AT_ONCE = 1 << 22


class BlockLists(NamedTuple):
    """Query block i of head h sees all of the key blocks full[full_offsets[h, i] : full_offsets[h, i + 1]], and of
    partial[...] what their masks show.

    Attributes:
        full_offsets, partial_offsets: (H, blocks of queries + 1) int32.
        full, partial: int32, rising within one query block.
        masks: int32, for each partial block its mask's index in `bits`.
        bits: (U, block, block / 8) uint8; bit c % 8 of byte c // 8 says whether a query sees key c of the block.
    """

    full_offsets: Tensor
    full: Tensor
    partial_offsets: Tensor
    partial: Tensor
    masks: Tensor
    bits: Tensor


def build(states: Tensor, len_q: int, len_k: int, block: int, sees: Sees | None = None) -> BlockLists:
    """From (H, blocks of queries, blocks of keys) EMPTY, LOOK or FULL; `sees` is asked about the blocks to LOOK at.

    Pairs beyond the lengths do not count: a block that shows all others is full.
    """
    states = states.to(torch.uint8).clone()
    bank: dict[bytes, int] = {}
    masks = []
    span = torch.arange(block)
    for head in range(states.shape[0]):
        at = (states[head] == LOOK).nonzero()
        if sees is None or len(at) == 0:
            continue
        for i, j in (part.unbind(1) for part in at.split(_PAIRS_AT_ONCE // block**2)):
            query, key = (i[:, None] * block + span)[:, :, None], (j[:, None] * block + span)[:, None, :]
            exists = (query < len_q) & (key < len_k)
            seen = sees(head, query.clamp(max=len_q - 1), key.clamp(max=len_k - 1)) & exists
            some, all_ = seen.flatten(1).any(1), (seen | ~exists).flatten(1).all(1)
            states[head, i, j] = torch.where(all_ & some, FULL, torch.where(some, LOOK, EMPTY)).to(torch.uint8)
            for row in pack_bits(seen[some & ~all_]):
                masks.append(bank.setdefault(row.numpy().tobytes(), len(bank)))
    bits = torch.frombuffer(bytearray(b"".join(bank)), dtype=torch.uint8) if bank else torch.empty(0, dtype=torch.uint8)
    return BlockLists(
        *_compressed(states == FULL),
        *_compressed(states == LOOK),
        torch.tensor(masks, dtype=torch.int32),
        bits.view(len(bank), block, block // 8),
    )


def _compressed(listed: Tensor) -> tuple[Tensor, Tensor]:
    """(H, rows, columns) bool to offsets (H, rows + 1) and the columns of every row."""
    heads, rows, _ = listed.shape
    ends = torch.zeros(heads * rows + 1, dtype=torch.int32)
    ends[1:] = listed.sum(2).flatten().cumsum(0)
    starts = torch.arange(heads).unsqueeze(1) * rows + torch.arange(rows + 1)
    return ends[starts], listed.nonzero()[:, 2].to(torch.int32)


def pack_bits(mask: Tensor) -> Tensor:
    """(..., n) bool to (..., n / 8) uint8, the first column in the lowest bit."""
    weights = torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8)
    return (mask.unflatten(-1, (-1, 8)).to(torch.uint8) * weights).sum(-1, dtype=torch.uint8)


def same_heads(lists: BlockLists) -> int:
    """The largest divisor g of H such that heads 0 to g - 1, g to 2 g - 1, ... see the same."""
    heads = lists.full_offsets.shape[0]
    contents = []
    for head in range(heads):
        parts = []
        for offsets, columns in (
            (lists.full_offsets, (lists.full,)),
            (lists.partial_offsets, (lists.partial, lists.masks)),
        ):
            begin, end = int(offsets[head, 0]), int(offsets[head, -1])
            parts += [(offsets[head] - begin).numpy().tobytes(), *(x[begin:end].numpy().tobytes() for x in columns)]
        contents.append(tuple(parts))
    divisors = [g for g in range(heads, 0, -1) if heads % g == 0]
    return next(g for g in divisors if all(contents[h] == contents[h - h % g] for h in range(heads)))


def check(op: str, lists: BlockLists, len_q: int, len_k: int, block: int) -> None:
    """The lists fit the lengths, lie in range and rise.

    Raises:
        ValueError: they do not; the message says what.
    """
    rows, columns = -(-len_q // block), -(-len_k // block)
    for name, tensor in lists._asdict().items():
        dtype = torch.uint8 if name == "bits" else torch.int32
        if tensor.dtype != dtype or tensor.device.type != "cpu" or not tensor.is_contiguous():
            raise ValueError(f"{op}: {name} must be contiguous {dtype} on the CPU, got {tensor.dtype} {tensor.device}")
    heads = lists.full_offsets.shape[0]
    for name, offsets, blocks in (
        ("full", lists.full_offsets, lists.full),
        ("partial", lists.partial_offsets, lists.partial),
    ):
        if offsets.ndim != 2 or tuple(offsets.shape) != (heads, rows + 1) or heads == 0:
            raise ValueError(
                f"{op}: {name}_offsets must have shape (H, blocks of queries + 1) = ({heads or '*'}, {rows + 1}), "
                f"got {tuple(offsets.shape)}"
            )
        ends = torch.cat((offsets[:, :-1].flatten(), offsets[-1, -1:]))
        chained = bool((offsets[1:, 0] == offsets[:-1, -1]).all())
        if int(ends[0]) != 0 or int(ends[-1]) != len(blocks) or not chained or bool((ends.diff() < 0).any()):
            raise ValueError(f"{op}: {name}_offsets must rise from 0 to the {len(blocks)} {name} blocks")
        if len(blocks) and not 0 <= int(blocks.min()) <= int(blocks.max()) < columns:
            worst = next(int(b) for b in blocks if not 0 <= int(b) < columns)
            raise ValueError(f"{op}: {name} lists key block {worst}, but {len_k} keys make {columns} blocks of {block}")
        row = torch.arange(heads * rows).repeat_interleave(ends.diff().long())
        if bool(((row.diff() == 0) & (blocks.diff() <= 0)).any()):
            raise ValueError(f"{op}: {name} must list the key blocks of a query block in rising order, each once")
    twice = torch.cat([_numbers(lists, name, columns) for name in ("full", "partial")])
    if len(twice.unique()) < len(twice):
        raise ValueError(f"{op}: a key block of a query block must be full or partial, not both")
    if tuple(lists.bits.shape[1:]) != (block, block // 8):
        raise ValueError(f"{op}: bits must have shape (U, {block}, {block // 8}), got {tuple(lists.bits.shape)}")
    if lists.masks.shape != lists.partial.shape:
        raise ValueError(f"{op}: masks must have one entry for each of {len(lists.partial)} partial blocks")
    if len(lists.masks) and not 0 <= int(lists.masks.min()) <= int(lists.masks.max()) < len(lists.bits):
        raise ValueError(f"{op}: masks must be indices of the {len(lists.bits)} masks in bits")


def _numbers(lists: BlockLists, name: str, columns: int) -> Tensor:
    """Every listed block's number among all of the pattern's."""
    offsets, blocks = (lists.full_offsets, lists.full) if name == "full" else (lists.partial_offsets, lists.partial)
    counts = offsets.diff().flatten().long()
    return torch.arange(len(counts)).repeat_interleave(counts) * columns + blocks
