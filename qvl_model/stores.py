"""What the text layers remember of the tokens seen so far, in memory allocated once: keys and values, all or the last
few of them, or a state whose size does not depend on the length."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from qvl_kernels import LinearAttentionState, append_kv

if TYPE_CHECKING:
    from typing_extensions import Self


class Store(Protocol):
    """What one layer keeps. Its layer's attention (`qvl_model.attention`) reads and writes it."""

    @property
    def nbytes(self) -> int: ...

    def keep(self, rows: Tensor) -> None:
        """These rows, in this order; one may be repeated."""

    def reset(self) -> None:
        """Forgets everything; the memory stays."""

    def row(self, number: int) -> Store:
        """One row; what is written to it is written here, once all rows are joined."""

    def join(self, rows: Sequence[Any]) -> None:
        """Takes over what was written to every `row`."""

    def copy_beginning(self, other: Any, tokens: int) -> None:
        """Takes over the tokens of a store that has seen just these `tokens`."""

    def cannot_truncate(self, old: int, new: int) -> str | None:
        """None where a row of `old` tokens can go back to its first `new`, else the reason why not."""


class _Rows:
    """Tensors (B, ...) of keys and values, allocated once; a row of them is a view."""

    memory: tuple[Tensor, ...]

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.memory)

    def keep(self, rows: Tensor) -> None:
        self.memory = tuple(tensor.index_select(0, rows) for tensor in self.memory)

    def reset(self) -> None:
        pass

    def row(self, number: int) -> Self:
        view = copy.copy(self)
        view.memory = tuple(tensor[number : number + 1] for tensor in self.memory)
        return view

    def join(self, rows: Sequence[Self]) -> None:
        pass


class FullStore(_Rows):
    """Keys and values of every token: (B, Hkv, capacity, D), as int8 with a scale for each token and head if `dtype` is
    int8."""

    def __init__(self, shape: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device | str) -> None:
        # Zeros and not garbage: a key that is masked still meets a weight of zero, and 0 * NaN is NaN.
        self.memory = tuple(torch.zeros(shape, dtype=dtype, device=device) for _ in range(2))
        if dtype == torch.int8:
            self.memory += tuple(torch.zeros(shape[:3], device=device, dtype=torch.float32) for _ in range(2))

    def append(self, lengths: Tensor, key: Tensor, value: Tensor) -> None:
        """Writes (B, Hkv, L, D) keys and values behind each row's first `lengths` tokens, in the cache's dtype."""
        keys, values, *scales = self.memory
        append_kv(key, value, keys, values, lengths, **dict(zip(("key_scale", "value_scale"), scales)))

    def view(self, end: int | None) -> tuple[Tensor, ...]:
        """Keys and values (B, Hkv, end, D) of the first `end` tokens, and for int8 their scales (B, Hkv, end); None is
        the whole capacity."""
        return self.memory if end is None else tuple(memory[:, :, :end] for memory in self.memory)

    def copy_beginning(self, other: FullStore, tokens: int) -> None:
        for mine, theirs in zip(self.memory, other.memory):
            mine[:, :, :tokens] = theirs[:, :, :tokens]

    def cannot_truncate(self, old: int, new: int) -> str | None:
        return None


class WindowStore(_Rows):
    """Keys and values of the first `sinks` tokens and of the last `window` ones: (B, Hkv, sinks + window, D), however
    long the text becomes.

    Token p lies in slot p if p < sinks, else in slot sinks + (p - sinks) mod window. Rotary positions are in the keys
    already, so their order does not matter to a query that sees them all.
    """

    def __init__(
        self,
        shape: tuple[int, int, int, int],
        window: int,
        sinks: int,
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> None:
        batch, heads, capacity, dim = shape
        self.window, self.sinks = window, sinks
        self.slots = min(capacity, sinks + window)
        size = (batch, heads, self.slots, dim)
        self.memory = tuple(torch.zeros(size, dtype=dtype, device=device) for _ in range(2))

    @property
    def keys(self) -> Tensor:
        return self.memory[0]

    @property
    def values(self) -> Tensor:
        return self.memory[1]

    def slot(self, positions: Tensor) -> Tensor:
        """Where tokens at these positions lie."""
        return torch.where(positions < self.sinks, positions, self.sinks + (positions - self.sinks) % self.window)

    def seen(self, row: int, length: int) -> tuple[Tensor, Tensor]:
        """Keys and values (1, Hkv, n, D) that a token behind the first `length` may still see, in order: the sinks,
        then the last window - 1 of the others."""
        positions = torch.arange(length)
        positions = positions[(positions < self.sinks) | (positions > length - self.window)]
        at = self.slot(positions).to(self.keys.device)
        return self.keys[row : row + 1].index_select(2, at), self.values[row : row + 1].index_select(2, at)

    def write(self, row: int, start: int, key: Tensor, value: Tensor) -> None:
        """Keeps of (Hkv, n, D) new keys and values behind the first `start` tokens what later tokens may see."""
        count = key.shape[1]
        first = torch.arange(start, start + count)
        kept = (first < self.sinks) | (first >= start + count - self.window)
        at, chosen = self.slot(first[kept]).to(key.device), kept.to(key.device)
        self.keys[row].index_copy_(1, at, key[:, chosen])
        self.values[row].index_copy_(1, at, value[:, chosen])

    def write_one(self, starts: Sequence[int], key: Tensor, value: Tensor) -> Tensor:
        """One token (B, Hkv, 1, D) for every row; returns the (B,) number of slots in use."""
        positions = torch.tensor(starts, device=key.device)
        rows = torch.arange(len(starts), device=key.device)
        at = self.slot(positions)
        self.keys[rows, :, at], self.values[rows, :, at] = key[:, :, 0], value[:, :, 0]
        return (positions + 1).clamp(max=self.slots)

    def copy_beginning(self, other: WindowStore, tokens: int) -> None:
        self.keys.copy_(other.keys)
        self.values.copy_(other.values)

    def cannot_truncate(self, old: int, new: int) -> str | None:
        if new == old or old <= self.sinks + self.window:
            return None
        return f"a window of {self.window} keys has dropped what the tokens before {new} saw"


class StateStore:
    """The state of linear attention: sums over all keys, one for each row and key head."""

    def __init__(self) -> None:
        self.state: LinearAttentionState | None = None

    @property
    def nbytes(self) -> int:
        return 0 if self.state is None else sum(part.nbytes for part in self.state)

    def keep(self, rows: Tensor) -> None:
        if self.state is not None:
            self.state = LinearAttentionState(*(part.index_select(0, rows) for part in self.state))

    def reset(self) -> None:
        self.state = None

    def row(self, number: int) -> StateStore:
        view = StateStore()
        if self.state is not None:
            view.state = LinearAttentionState(*(part[number : number + 1] for part in self.state))
        return view

    def join(self, rows: Sequence[StateStore]) -> None:
        states = [row.state for row in rows if row.state is not None]
        self.state = LinearAttentionState(*(torch.cat(parts) for parts in zip(*states)))

    def copy_beginning(self, other: StateStore, tokens: int) -> None:
        self.state = other.state  # never written in place

    def cannot_truncate(self, old: int, new: int) -> str | None:
        return None if new == old else "the state of linear attention is a sum that forgets nothing"
