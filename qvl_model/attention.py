"""Which attention each layer uses: the names, what a layer of that name keeps in a cache, and what it computes.

    name                                        computes                            keeps
    fused                                     softmax attention, exactly           all keys and values
    linear[:features=256,seed=0], linear:elu  FAVOR+ or elu + 1 features           a state of constant size
    sparse:sliding_window=1024[,sinks=64]     the last keys and the first ones     only those
    sparse:strided=4[,local=1]                every fourth block of keys           all keys and values
    sparse:big_bird=3[,random_blocks=3]       a band, global and random blocks     all keys and values
    sparse:vertical_slash=8[,slash=8]         columns and diagonals that matter    all keys and values

In text layers all are causal; in vision blocks each frame attends to itself in both directions. Every name of `sparse:`
takes `block` (64), the size of what is skipped.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from qvl_kernels import (
    EluFeatures,
    FavorFeatures,
    SparsePattern,
    attention,
    attention_varlen,
    linear_attention,
    linear_attention_varlen,
    sparse_attention,
)

from .stores import FullStore, StateStore, Store, WindowStore

if TYPE_CHECKING:
    from .cache import KVCache

Shape = tuple[int, int, int, int]


@dataclass(frozen=True)
class Part:
    """The tokens start to stop of a packed row (1, T), which are the next of a cache of one row."""

    cache: KVCache
    start: int
    stop: int


@dataclass(frozen=True)
class Step:
    """One pass of tokens through the text model.

    Attributes:
        rope: cos and sin, (B, 1, L, D).
        cache: where keys and values go, or None.
        key_lengths: (B,) keys of each row of a ragged cache, or None.
        counts: (B,) tokens of this pass that count in each row, padding behind them; None where all do.
        parts: of packed tokens, where each row's lie; `cache` is then None.
        recorded: the step is recorded, to be replayed when the cache has grown: views of it must be of all of it.
    """

    rope: tuple[Tensor, Tensor]
    cache: KVCache | None
    key_lengths: Tensor | None
    counts: Tensor | None = None
    parts: Sequence[Part] | None = None
    recorded: bool = False


class Kind(Protocol):
    """What a name stands for. `text` and `vision` compute (B, Hq, L, D), packed (T, H, D) for vision."""

    def store(self, shape: Shape, dtype: torch.dtype, device: torch.device | str) -> Store:
        """What a text layer keeps, with room for (B, Hkv, capacity, D)."""

    def text(self, layer: int, query: Tensor, key: Tensor, value: Tensor, step: Step) -> Tensor: ...

    def vision(self, layer: int, query: Tensor, key: Tensor, value: Tensor, offsets: Tensor) -> Tensor: ...


_HALVES = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Fused:
    """Softmax attention over all keys; `precision` is that of `qvl_kernels.attention`, for more than a few tokens."""

    precision: str = "highest"

    def store(self, shape: Shape, dtype: torch.dtype, device: torch.device | str) -> Store:
        return FullStore(shape, dtype, device)

    def text(self, layer: int, query: Tensor, key: Tensor, value: Tensor, step: Step) -> Tensor:
        if step.cache is None:
            return attention(query, key, value, causal=True, precision=self.precision)
        store = step.cache.stores[layer]
        assert isinstance(store, FullStore)
        store.append(step.cache.lengths, key, value)
        key, value, *scales = store.view(None if step.recorded else max(step.cache.starts) + query.shape[2])
        quantized: dict[str, Any] = dict(zip(("key_scale", "value_scale"), scales))
        dtype, stored = query.dtype, key.dtype
        if stored.is_floating_point and not (dtype == torch.float32 and stored in _HALVES):
            query = query.to(stored)
        precision = self.precision if query.shape[2] > 16 else "highest"
        return attention(query, key, value, causal=True, key_lengths=step.key_lengths, precision=precision, **quantized)

    def vision(self, layer: int, query: Tensor, key: Tensor, value: Tensor, offsets: Tensor) -> Tensor:
        return attention_varlen(query, key, value, offsets, offsets, precision=self.precision)


@dataclass(frozen=True)
class Linear:
    """phi(q) (phi(k)^T v) / phi(q) (phi(k)^T 1). Every layer has its own projection, drawn from `seed` + layer."""

    features: int = 256
    seed: int = 0
    elu: bool = False

    def feature_map(self, layer: int, head_dim: int, device: torch.device) -> nn.Module:
        return _elu() if self.elu else _favor(head_dim, self.features, self.seed + layer, device)

    def store(self, shape: Shape, dtype: torch.dtype, device: torch.device | str) -> Store:
        return StateStore()

    def text(self, layer: int, query: Tensor, key: Tensor, value: Tensor, step: Step) -> Tensor:
        features = self.feature_map(layer, query.shape[-1], query.device)
        if step.cache is None:
            return linear_attention(query, key, value, feature_map=features, causal=True)
        store = step.cache.stores[layer]
        assert isinstance(store, StateStore)
        mask = None
        if step.counts is not None:
            mask = torch.arange(query.shape[2], device=query.device) < step.counts.to(query.device)[:, None]
        out, store.state = linear_attention(
            query, key, value, feature_map=features, causal=True, key_mask=mask, state=store.state, return_state=True
        )
        return out

    def vision(self, layer: int, query: Tensor, key: Tensor, value: Tensor, offsets: Tensor) -> Tensor:
        features = self.feature_map(layer, query.shape[-1], query.device)
        return linear_attention_varlen(query, key, value, offsets, offsets, feature_map=features)


@dataclass(frozen=True)
class SlidingWindow:
    """Softmax attention over the last `window` keys, a query's own among them, and the first `sinks` of all.

    Its cache holds those and no more (`WindowStore`), so memory and time of a token do not grow with the text.
    """

    window: int
    sinks: int = 0
    block: int = 64

    def store(self, shape: Shape, dtype: torch.dtype, device: torch.device | str) -> Store:
        _no_int8(dtype, "sparse:sliding_window")
        return WindowStore(shape, self.window, self.sinks, dtype, device)

    def pattern(self, len_q: int, len_k: int, causal: bool = True) -> SparsePattern:
        return _made("sliding_window", len_q, len_k, causal=causal, **vars(self))

    def text(self, layer: int, query: Tensor, key: Tensor, value: Tensor, step: Step) -> Tensor:
        tokens = query.shape[2]
        if step.cache is None:
            return sparse_attention(query, key, value, self.pattern(tokens, tokens), causal=True)
        store, starts = step.cache.stores[layer], step.cache.starts
        assert isinstance(store, WindowStore)
        query, key, value = (x.to(step.cache.dtype) for x in (query, key, value))
        if tokens == 1 and step.counts is None:
            used = store.write_one(starts, key, value)
            if len(set(starts)) == 1:
                slots = int(used[0])
                return attention(query, store.keys[:, :, :slots], store.values[:, :, :slots])
            return attention(query, store.keys, store.values, key_lengths=used)
        counts = [tokens] * len(starts) if step.counts is None else step.counts.tolist()
        outs = []
        for row, (start, count) in enumerate(zip(starts, counts)):
            one = slice(row, row + 1)
            earlier_key, earlier_value = store.seen(row, start)
            keys, values = torch.cat((earlier_key, key[one]), 2), torch.cat((earlier_value, value[one]), 2)
            pattern = self.pattern(tokens, keys.shape[2])
            outs.append(sparse_attention(query[one], keys, values, pattern, causal=True))
            store.write(row, start, key[row, :, :count], value[row, :, :count])
        return torch.cat(outs)

    def vision(self, layer: int, query: Tensor, key: Tensor, value: Tensor, offsets: Tensor) -> Tensor:
        return _frame_by_frame(query, key, value, offsets, lambda q, k: self.pattern(q.shape[2], k.shape[2], False))


class _Blocks:
    """Softmax attention over the blocks of a pattern that is made for the lengths, or from queries and keys.

    A step of one token sees the whole cache: its row of the pattern is a matter of reading, which costs little.
    """

    in_vision = False

    def pattern(self, query: Tensor, key: Tensor) -> SparsePattern:
        raise NotImplementedError

    def store(self, shape: Shape, dtype: torch.dtype, device: torch.device | str) -> Store:
        _no_int8(dtype, "sparse")
        return FullStore(shape, dtype, device)

    def text(self, layer: int, query: Tensor, key: Tensor, value: Tensor, step: Step) -> Tensor:
        if step.cache is None:
            return sparse_attention(query, key, value, self.pattern(query, key), causal=True)
        store = step.cache.stores[layer]
        assert isinstance(store, FullStore)
        store.append(step.cache.lengths, key, value)
        key, value = store.view(max(step.cache.starts) + query.shape[2])
        query = query.to(key.dtype)
        if query.shape[2] == 1:
            return attention(query, key, value, causal=True, key_lengths=step.key_lengths)
        outs = []
        for row, start in enumerate(step.cache.starts):
            end = start + query.shape[2]
            q, k, v = query[row : row + 1], key[row : row + 1, :, :end], value[row : row + 1, :, :end]
            outs.append(sparse_attention(q, k, v, self.pattern(q, k), causal=True))
        return torch.cat(outs)

    def vision(self, layer: int, query: Tensor, key: Tensor, value: Tensor, offsets: Tensor) -> Tensor:
        if not self.in_vision:
            raise ValueError(f"attention {self}: this pattern is causal and not for vision blocks")
        return _frame_by_frame(query, key, value, offsets, self.pattern)


@dataclass(frozen=True)
class Strided(_Blocks):
    """The last `local` blocks of keys and every `stride`-th before."""

    stride: int
    local: int = 1
    block: int = 64

    def pattern(self, query: Tensor, key: Tensor) -> SparsePattern:
        return _made("strided", query.shape[2], key.shape[2], stride=self.stride, local=self.local, block=self.block)


@dataclass(frozen=True)
class BigBird(_Blocks):
    """A band of `window` blocks, global blocks, and random ones, which depend on the lengths of a call."""

    window: int
    global_blocks: int = 1
    random_blocks: int = 3
    seed: int = 0
    block: int = 64
    in_vision = True

    def pattern(self, query: Tensor, key: Tensor) -> SparsePattern:
        return _made("big_bird", query.shape[2], key.shape[2], **vars(self))


@dataclass(frozen=True)
class VerticalSlash(_Blocks):
    """The columns and diagonals, of a block's width, where the last queries of a prompt look most."""

    vertical: int
    slash: int = 8
    block: int = 64

    def pattern(self, query: Tensor, key: Tensor) -> SparsePattern:
        return SparsePattern.vertical_slash(query, key, **vars(self))


def _no_int8(dtype: torch.dtype, name: str) -> None:
    if dtype == torch.int8:
        raise ValueError(f"attention {name!r} keeps keys in the model's dtype; an int8 cache needs 'fused'")


def _frame_by_frame(
    query: Tensor, key: Tensor, value: Tensor, offsets: Tensor, make: Callable[[Tensor, Tensor], SparsePattern]
) -> Tensor:
    """Packed (T, H, D); neighbouring frames of one size are a batch."""
    outs, start = [], 0
    for size, frames in itertools.groupby(offsets.diff().tolist()):
        count = len(list(frames))
        part = slice(start, start + count * size)
        q, k, v = (x[part].unflatten(0, (count, size)).transpose(1, 2) for x in (query, key, value))
        outs.append(sparse_attention(q, k, v, make(q, k)).transpose(1, 2).flatten(0, 1))
        start = part.stop
    return torch.cat(outs)


@functools.lru_cache(maxsize=32)  # all layers of a step use the same
def _made(pattern: str, len_q: int, len_k: int, **options: int) -> SparsePattern:
    made: SparsePattern = getattr(SparsePattern, pattern)(len_q, len_k, **options)
    return made


@functools.lru_cache(maxsize=256)
def _favor(head_dim: int, features: int, seed: int, device: torch.device) -> FavorFeatures:
    return FavorFeatures(head_dim, features, seed=seed).to(device)


@functools.cache
def _elu() -> EluFeatures:
    return EluFeatures()


PATTERNS = {
    "sliding_window": SlidingWindow,
    "strided": Strided,
    "big_bird": BigBird,
    "vertical_slash": VerticalSlash,
}
KINDS = ("fused", "linear", "linear:elu", *(f"sparse:{pattern}=..." for pattern in PATTERNS))


def names_of_layers(attention: str | Sequence[str], layers: int) -> tuple[str, ...]:
    """One name for all layers, or one for each; none at all is "fused".

    Raises:
        ValueError: the number of names is not the number of layers.
    """
    names = (attention,) * layers if isinstance(attention, str) else tuple(attention) or ("fused",) * layers
    if len(names) != layers:
        raise ValueError(f"attention must be one name or {layers} names, got {len(names)}")
    return names


def kinds_of_layers(names: Sequence[str]) -> list[Kind]:
    """What each name stands for; errors as in `parse`."""
    kinds = {name: parse(name) for name in dict.fromkeys(names)}
    return [kinds[name] for name in names]


def _options(name: str, text: str) -> dict[str, int | bool]:
    """ "window=4,sinks=2,elu" -> {"window": 4, "sinks": 2, "elu": True}"""
    values: dict[str, int | bool] = {}
    for part in filter(None, text.split(",")):
        key, equals, value = part.partition("=")
        if equals and not value.isdecimal():
            raise ValueError(f"attention {name!r}: {key} must be a whole number, got {value!r}")
        values[key] = int(value) if equals else True
    return values


def _built(name: str, kind: Callable[..., Kind], options: dict[str, int | bool]) -> Kind:
    """The kind with these options; every number but `sinks` and `seed` is above 0."""
    known = {field.name: field.default for field in fields(kind)}  # type: ignore[arg-type]
    for key, value in options.items():
        if key not in known:
            raise ValueError(f"attention {name!r}: unknown option {key}; there are {', '.join(known)}")
        if isinstance(known[key], bool) != isinstance(value, bool) or (value == 0 and key not in ("sinks", "seed")):
            wanted = "without a value" if isinstance(known[key], bool) else "a whole number above 0"
            raise ValueError(f"attention {name!r}: {key} must be {wanted}")
    return kind(**options)


def parse(name: str) -> Kind:
    """The kind of a name; the table on top of this file has them all.

    Raises:
        ValueError: the name, or one of its options, is unknown or out of range; the message says which there are.

    >>> parse("sparse:sliding_window=1024,sinks=64")
    SlidingWindow(window=1024, sinks=64, block=64)
    """
    if name == "fused":
        return Fused()
    family, _, rest = name.partition(":")
    options = _options(name, rest)
    if family == "linear":
        return _built(name, Linear, options)
    pattern = next(iter(options), None)
    if family == "sparse" and pattern in PATTERNS:
        kind = PATTERNS[pattern]
        return _built(name, kind, {fields(kind)[0].name: options.pop(pattern), **options})
    raise ValueError(f"attention must be one of {', '.join(KINDS)}, got {name!r}")
