"""Which attention each layer uses, and what all layers of a step share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from .cache import KVCache

KINDS = ("fused",)


@dataclass(frozen=True)
class Step:
    """One pass of tokens through the text model.

    Attributes:
        rope: cos and sin, (B, 1, L, D).
        cache: where keys and values go, or None.
        key_lengths: (B,) keys of each row of a ragged cache, or None.
    """

    rope: tuple[Tensor, Tensor]
    cache: KVCache | None
    key_lengths: Tensor | None


def kinds_of_layers(attention: str | Sequence[str], layers: int) -> tuple[str, ...]:
    """One name for all layers, or one per layer.

    Raises:
        ValueError: a name is unknown, or the number of names is not the number of layers.
    """
    names = (attention,) * layers if isinstance(attention, str) else tuple(attention)
    if len(names) != layers:
        raise ValueError(f"attention must be one name or {layers} names, got {len(names)}")
    for name in names:
        if name not in KINDS:
            raise ValueError(f"attention must be one of {', '.join(KINDS)}, got {name!r}")
    return names
