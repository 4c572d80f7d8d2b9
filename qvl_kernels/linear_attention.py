"""Linear attention over (B, H, L, D) tensors: contract, checks, choice of the backend."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple, overload

import torch
from torch import Tensor

from . import _checks
from ._linear_attention import KINDS, Options, linear
from ._tensors import compute_dtype
from .favor_features import EluFeatures, FavorFeatures

FeatureMap = Callable[[Tensor], Tensor]


class LinearAttentionState(NamedTuple):
    """All that linear attention keeps of earlier keys: sum of phi(k) v^T = 2^top S and sum of phi(k) = 2^top z.

    Attributes:
        S: (B, Hkv, M, Dv) float32 (float64 for float64 inputs).
        z: (B, Hkv, M), likewise.
        top: (B, Hkv), likewise: the largest power of two among the keys' features (0 where the feature map is not
            FavorFeatures), -inf before the first key.
    """

    S: Tensor
    z: Tensor
    top: Tensor


@overload
def linear_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    feature_map: FeatureMap,
    causal: bool = False,
    key_mask: Tensor | None = None,
    state: LinearAttentionState | None = None,
    return_state: Literal[False] = False,
) -> Tensor: ...


@overload
def linear_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    feature_map: FeatureMap,
    causal: bool = False,
    key_mask: Tensor | None = None,
    state: LinearAttentionState | None = None,
    return_state: Literal[True],
) -> tuple[Tensor, LinearAttentionState]: ...


def linear_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    feature_map: FeatureMap,
    causal: bool = False,
    key_mask: Tensor | None = None,
    state: LinearAttentionState | None = None,
    return_state: bool = False,
) -> Tensor | tuple[Tensor, LinearAttentionState]:
    """out = phi(q) (sum of phi(k) v^T) / phi(q) (sum of phi(k)), the sums over the keys that a query sees: time and
    memory grow with the length, not with its square.

    With `causal` query i of Lq sees key j <= Lk - Lq + i (aligned bottom-right, as in `attention`) and all keys of
    `state`, which came earlier. Nothing later moves its rounding either: exponentials are relative to the largest key
    so far. So a sequence may be cut anywhere::

        out1, state = linear_attention(q1, k1, v1, ..., causal=True, return_state=True)   # a prompt
        out2, state = linear_attention(q2, k2, v2, ..., causal=True, state=state, return_state=True)  # one token

    gives the rows of the whole up to rounding, and a decode step costs the same at any length.

    Args:
        query: (B, Hq, Lq, D). float32, bfloat16, float16 or float64; any strides.
        key: (B, Hkv, Lk, D); Hq is a multiple of Hkv, query head h reads key head h // (Hq / Hkv).
        value: (B, Hkv, Lk, Dv).
        feature_map: phi. FavorFeatures and EluFeatures are computed inside the kernel, a block of tokens at a time. Any
            other callable maps query and key (B, H, L, D) to non-negative features (B, H, L, M) first; gradients flow
            on to its parameters.
        causal: hide later keys.
        key_mask: (B, Lk) bool, True = a key; the others count neither above nor below the line.
        state: of all earlier keys, from `return_state`.
        return_state: also return the state after these keys. Gradients through states are plain PyTorch's.

    Returns:
        (B, Hq, Lq, Dv) in query's dtype, the sums in float32 (float64 for float64); with `return_state` the pair of it
        and a LinearAttentionState. A query that sees no key, or whose denominator is below the smallest normal number,
        gives zeros and zero gradients.

    Raises:
        TypeError, ValueError: an argument has the wrong dtype, device or shape, or a projection is not finite; the
            message names it.

    Source: Katharopoulos et al., Transformers are RNNs, 2020, section 3; Choromanski et al., Rethinking attention with
    Performers, 2021, section 3.

    >>> q, k, v = torch.randn(1, 4, 6, 8), torch.randn(1, 2, 6, 8), torch.randn(1, 2, 6, 3)
    >>> favor = FavorFeatures(8, 32, seed=0)
    >>> whole = linear_attention(q, k, v, feature_map=favor, causal=True)
    >>> head = [x[:, :, :4] for x in (q, k, v)]
    >>> _, state = linear_attention(*head, feature_map=favor, causal=True, return_state=True)
    >>> last = linear_attention(*(x[:, :, 4:] for x in (q, k, v)), feature_map=favor, causal=True, state=state)
    >>> torch.allclose(whole[:, :, 4:], last, atol=1e-5)
    True
    """
    op = "linear_attention"
    _checks.floating(op, query=query, key=key, value=value)
    _checks.shape(op, "query", query, "(B, Hq, Lq, D)", (None, None, None, None))
    batch, heads_q, _, dim = query.shape
    _checks.shape(op, "key", key, "(B, Hkv, Lk, D)", (batch, None, None, dim))
    _checks.shape(op, "value", value, "(B, Hkv, Lk, Dv)", (batch, key.shape[1], key.shape[2], None))
    _checks.head_groups(op, heads_q, key.shape[1])
    if key_mask is not None:
        if not isinstance(key_mask, Tensor) or key_mask.dtype != torch.bool:
            raise TypeError(f"{op}: key_mask must be bool, got {getattr(key_mask, 'dtype', type(key_mask).__name__)}")
        _checks.shape(op, "key_mask", key_mask, "(B, Lk)", (batch, key.shape[2]))
        _same_device(op, "key_mask", key_mask, query)
    dtype = query.dtype
    query, key, value, options = mapped(op, query, key, value, feature_map, causal)
    if state is not None:
        _check_state(op, state, query, key, value, options)
        options = options._replace(S=state[0], z=state[1], top=state[2])
    options = options._replace(key_mask=key_mask, return_state=return_state)
    out, after = linear.choose(query, key, value, options).run(query, key, value, options)
    out = out.to(dtype)
    return (out, LinearAttentionState(*after)) if return_state else out


def mapped(
    op: str, query: Tensor, key: Tensor, value: Tensor, feature_map: FeatureMap, causal: bool
) -> tuple[Tensor, Tensor, Tensor, Options]:
    """The tensors that a kernel gets, and the options that say what they are; all checked."""
    if isinstance(feature_map, FavorFeatures):
        if feature_map.head_dim != query.shape[-1]:
            raise ValueError(
                f"{op}: feature_map's head_dim must be query's D = {query.shape[-1]}, got {feature_map.head_dim}"
            )
        feature_map.check()
        _same_device(op, "feature_map's projection", feature_map.projection, query)
        return query, key, value, Options(feature_map.projection, KINDS.index("favor"), causal)
    if isinstance(feature_map, EluFeatures):
        return query, key, value, Options(None, KINDS.index("elu"), causal)
    if not callable(feature_map):
        raise TypeError(f"{op}: feature_map must be a callable, got {type(feature_map).__name__}")
    features: list[Tensor] = []
    for name, x in (("query", query), ("key", key)):
        phi = feature_map(x)
        if not isinstance(phi, Tensor):
            raise TypeError(f"{op}: feature_map({name}) must be a torch.Tensor, got {type(phi).__name__}")
        _checks.floating(op, **{f"feature_map({name})": phi})
        width = features[0].shape[-1] if features else None
        _checks.shape(op, f"feature_map({name})", phi, "(B, H, L, M)", (*x.shape[:3], width))
        _same_device(op, f"feature_map({name})", phi, query)
        features.append(phi)
    wide = torch.promote_types(torch.promote_types(features[0].dtype, features[1].dtype), value.dtype)
    query, key, value = (x.to(wide) for x in (*features, value))
    return query, key, value, Options(None, KINDS.index("features"), causal)


def _same_device(op: str, name: str, tensor: Tensor, query: Tensor) -> None:
    if tensor.device != query.device:
        raise ValueError(f"{op}: {name} must be on query's device {query.device}, got {tensor.device}")


def _check_state(
    op: str, state: LinearAttentionState, query: Tensor, key: Tensor, value: Tensor, options: Options
) -> None:
    if not isinstance(state, tuple) or len(state) != 3:
        raise TypeError(f"{op}: state must be a LinearAttentionState, got {type(state).__name__}")
    features = query.shape[-1] if options.projection is None else options.projection.shape[0]
    sizes = *key.shape[:2], features
    shapes = ("(B, Hkv, M, Dv)", (*sizes, value.shape[-1])), ("(B, Hkv, M)", sizes), ("(B, Hkv)", sizes[:2])
    for name, tensor, (letters, expected) in zip(LinearAttentionState._fields, state, shapes):
        if not isinstance(tensor, Tensor) or tensor.dtype != compute_dtype(query.dtype):
            got = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
            raise TypeError(f"{op}: state.{name} must be {compute_dtype(query.dtype)}, got {got}")
        _checks.shape(op, f"state.{name}", tensor, letters, expected)
        _same_device(op, f"state.{name}", tensor, query)
