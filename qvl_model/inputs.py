"""Prompts ready for the text model."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from . import fusion as fusions
from .fusion import DeepStack


@dataclass(frozen=True)
class Inputs:
    """A prompt ready for the text model, every row's tokens in its first places, padding behind them.

    Attributes:
        embeds: (B, L, C).
        position_ids: (3, B, L).
        rope_deltas: (B,) the token after n tokens of a row stands at position n + delta.
        lengths: (B,) tokens of each row.
        deepstack: visual features for the first text layers, or None.
        order: (B, L) the column of the original `input_ids` that each place came from, or None where nothing moved.
        identity: (B, L) integers: where two rows have the same ones, so they have the same inputs; or None.
    """

    embeds: Tensor
    position_ids: Tensor
    rope_deltas: Tensor
    lengths: Tensor
    deepstack: DeepStack | None = None
    order: Tensor | None = None
    identity: Tensor | None = None

    def slice(self, start: int, stop: int) -> Inputs:
        """The places start to stop of every row, for a prompt that is computed in chunks."""
        stop = min(stop, self.embeds.shape[1])
        return Inputs(
            self.embeds[:, start:stop],
            self.position_ids[:, :, start:stop],
            self.rope_deltas,
            (self.lengths - start).clamp(0, stop - start),
            fusions.slice_features(self.deepstack, start, stop),
        )


def left_aligned(
    input_ids: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
    """Moves every row's tokens to its first places, so that padding is behind them and causality hides it.

    Returns ids, positions, lengths (B,) and the order (B, L) that was applied, None where nothing moved.
    """
    batch, tokens = input_ids.shape
    if position_ids is not None and tuple(position_ids.shape) != (3, batch, tokens):
        raise ValueError(f"position_ids must have shape {(3, batch, tokens)}, got {tuple(position_ids.shape)}")
    if attention_mask is not None:
        shape = tuple(attention_mask.shape)
        if len(shape) != 2 or shape[0] != batch or shape[1] < tokens:
            raise ValueError(f"attention_mask must have shape {(batch, tokens)}, got {shape}")
    if attention_mask is None or bool(attention_mask[:, -tokens:].all()):
        return input_ids, position_ids, torch.full((batch,), tokens, device=input_ids.device), None
    mask = attention_mask[:, -tokens:].bool()
    lengths = mask.sum(1)
    if not lengths.all():
        raise ValueError(f"attention_mask hides every token of row {int(lengths.argmin())}")
    order = (~mask).to(torch.int8).argsort(dim=1, stable=True)
    ids = input_ids.gather(1, order)
    if position_ids is not None:
        position_ids = position_ids.gather(2, order.expand(3, -1, -1))
    return ids, position_ids, lengths, order
