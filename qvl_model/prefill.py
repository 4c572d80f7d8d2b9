"""A batch of prompts into a cache: the tokens of all rows packed behind each other, so that no padding is computed,
chunk by chunk, and what several rows begin with (the same image, the same instructions) once.

    rows        a b c d e          packed      a b c            the shared beginning, then copied
                a b c f                        d e f g          the rest of all rows
                a b c g
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from .attention import Part
from .cache import KVCache
from .fusion import DeepStack
from .inputs import Inputs
from .memory import give_back_freed
from .model import Qwen3VL

_LONG = 256  # tokens whose memory is worth giving back afterwards, and what was freed before them
_WORTH_SHARING = 16  # tokens; below, a copy and another pass cost more than they save


@dataclass(frozen=True)
class Piece:
    """The tokens start to stop of a row."""

    row: int
    start: int
    stop: int


def prefill(
    model: Qwen3VL, inputs: Inputs, cache: KVCache, chunk: int, advance: Callable[[int], object] = lambda tokens: None
) -> Tensor:
    """The hidden state (B, C) of each row's last token; `cache`, empty before, holds the prompts afterwards.

    Args:
        chunk: tokens computed at a time.
        advance: is told the number of tokens after each chunk, for a progress bar.
    """
    rows = [cache.row(row) for row in range(cache.batch)]
    last = inputs.embeds.new_empty(len(rows), inputs.embeds.shape[-1])
    lengths = inputs.lengths.tolist()
    long = sum(lengths) >= _LONG
    if long:
        give_back_freed()
    groups = shared_beginnings(inputs)
    beginnings = [Piece(owner, 0, shared) for owner, (shared, _) in groups.items() if shared]
    begun = {row: shared for owner, (shared, others) in groups.items() for row in (owner, *others)}
    rest = [Piece(row, begun[row], length) for row, length in enumerate(lengths)]
    for pieces in (beginnings, rest):
        for packed in packs(pieces, chunk):
            hidden = model.hidden_of_parts(*pack(inputs, packed, rows))[0]
            stops = torch.tensor([piece.stop - piece.start for piece in packed]).cumsum(0) - 1
            for piece, at in zip(packed, stops.tolist()):
                if piece.stop == lengths[piece.row]:
                    last[piece.row] = hidden[at]
            advance(len(hidden))
        if pieces is beginnings:
            for owner, (shared, others) in groups.items():
                for row in others:
                    rows[row].copy_beginning(rows[owner], shared)
                advance(shared * len(others))
    cache.join(rows)
    cache.rope_deltas = inputs.rope_deltas.cpu()
    if long:
        give_back_freed()
    return last


def shared_beginnings(inputs: Inputs) -> dict[int, tuple[int, list[int]]]:
    """Rows that begin alike: for the first of each group the tokens that they share, and the others.

    A row's last token is never shared: what follows it is asked of every row.
    """
    groups: dict[int, tuple[int, list[int]]] = {}
    for row, length in enumerate(inputs.lengths.tolist()):
        owners = list(groups)
        if inputs.identity is not None and owners:
            same = (inputs.identity[owners, : length - 1] == inputs.identity[row, : length - 1]).int().cumprod(1).sum(1)
            common = torch.minimum(same, inputs.lengths[owners].to(same.device) - 1)
            owner, tokens = owners[int(common.argmax())], int(common.max())
            shared, others = groups[owner]
            if tokens >= max(_WORTH_SHARING, shared // 2):  # not at the cost of what the group shares already
                groups[owner] = min(shared, tokens) if others else tokens, [*others, row]
                continue
        groups[row] = 0, []
    return groups


def packs(pieces: list[Piece], chunk: int) -> Iterator[list[Piece]]:
    """The pieces, one after the other, cut into lists of `chunk` tokens."""
    packed: list[Piece] = []
    room = chunk
    for piece in pieces:
        start = piece.start
        while start < piece.stop:
            stop = min(piece.stop, start + room)
            packed.append(Piece(piece.row, start, stop))
            room -= stop - start
            start = stop
            if room == 0:
                yield packed
                packed, room = [], chunk
    if packed:
        yield packed


def pack(inputs: Inputs, pieces: list[Piece], rows: list[KVCache]) -> tuple[Inputs, list[Part]]:
    """The pieces as one row (1, T), and where each lies in it."""
    width = inputs.embeds.shape[1]
    index = torch.cat([torch.arange(piece.start, piece.stop) + piece.row * width for piece in pieces])
    index = index.to(inputs.embeds.device)
    parts, start = [], 0
    for piece in pieces:
        stop = start + piece.stop - piece.start
        parts.append(Part(rows[piece.row], start, stop))
        start = stop
    packed = Inputs(
        inputs.embeds.flatten(0, 1)[index][None],
        inputs.position_ids.flatten(1)[:, index][:, None],
        inputs.rope_deltas[:1],
        torch.tensor([len(index)], device=index.device),
        _pack_features(inputs.deepstack, index),
    )
    return packed, parts


def _pack_features(deepstack: DeepStack | None, index: Tensor) -> DeepStack | None:
    if deepstack is None:
        return None
    mask = deepstack.visual_mask.flatten()
    visual = mask[index]
    place = (mask.cumsum(0) - 1)[index][visual]
    return DeepStack(visual[None], tuple(features[place] for features in deepstack.features))
