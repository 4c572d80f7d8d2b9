"""`attn_implementation="qvl"` for the models of transformers (version 5)."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ..attention import attention

NAME = "qvl"


def register() -> None:
    """Adds "qvl" to transformers' attention implementations: attention function and mask function.

    Then `AutoModel.from_pretrained(..., attn_implementation="qvl")` or `model.set_attn_implementation("qvl")`. Grouped
    heads stay grouped, masks are read in place. Registering twice is harmless.

    Raises:
        ImportError: transformers is not installed, or too old to have `AttentionInterface`.
    """
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(NAME, _forward)
    AttentionMaskInterface.register(NAME, sdpa_mask)  # without one the mask would silently be None


def _forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """query (B, Hq, L, D), key and value (B, Hkv, Lk, D) -> (B, L, Hq, D) and no weights.

    Without a mask a decoder is causal, but for a single query, which sees all that the cache holds.
    """
    if dropout > 0:
        raise ValueError('attn_implementation="qvl" has no attention dropout; set attention_dropout to 0 or use eval()')
    if is_causal is None:
        is_causal = getattr(module, "is_causal", False)
    causal = bool(is_causal) and attention_mask is None and query.shape[2] > 1
    out = attention(query, key, value, causal=causal, scale=scaling, mask=attention_mask)
    return out.transpose(1, 2), None
