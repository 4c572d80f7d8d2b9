"""The cache of a text model: one store a layer, and how many tokens every row has."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor

from .attention import kinds_of_layers, names_of_layers
from .config import TextConfig
from .stores import FullStore


class KVCache:
    """Room for `capacity` tokens in each of `batch` rows; every row has its own length.

    Attributes:
        lengths: (B,) tokens that count in each row.

    A step first calls `begin`, then each layer's attention uses `stores[layer]`, then `advance` counts the tokens.
    Tokens that do not count (padding on the right of a shorter row) are overwritten by the next step, or never kept.

    Args:
        config: heads and head dimension.
        batch, capacity: rows, and tokens of the longest.
        dtype: of keys and values; int8 keeps one byte an element and a scale for each token and head.
        device: where.
        attention: as for `Qwen3VL`: the name of every layer's attention decides what it keeps.

    Memory of a layer: "fused" 2 B Hkv capacity D elements (of the 2B model's 28 layers in bfloat16 112 KiB a token);
    a sliding window 2 B Hkv (sinks + window) D however long the text; "linear" B Hkv M (D + 1) float32.

    >>> cache = KVCache(TextConfig(num_hidden_layers=2, head_dim=4, mrope_section=(1, 1, 0)), batch=1, capacity=8)
    >>> cache.nbytes
    4096
    """

    def __init__(
        self,
        config: TextConfig,
        batch: int,
        capacity: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        attention: str | Sequence[str] = "fused",
    ) -> None:
        shape = (batch, config.num_key_value_heads, capacity, config.head_dim)
        kinds = kinds_of_layers(names_of_layers(attention, config.num_hidden_layers))
        self.stores = [kind.store(shape, dtype, device) for kind in kinds]
        self.batch, self.capacity, self.dtype, self.device = batch, capacity, dtype, torch.device(device)
        # Twice: kernels read the tensor, which stays the same one while the rows do; Python reads the list.
        self.starts = [0] * batch
        self.lengths = torch.zeros(batch, dtype=torch.long, device=device)
        self.reset()

    @property
    def nbytes(self) -> int:
        return sum(store.nbytes for store in self.stores)

    def reset(self) -> None:
        """Forgets everything; the memory stays."""
        self._count([0] * self.batch)
        self.rope_deltas = torch.zeros(self.batch, dtype=torch.long)
        for store in self.stores:
            store.reset()

    def _count(self, starts: list[int]) -> None:
        self.starts = starts
        self.lengths.copy_(torch.tensor(starts))

    def begin(self, tokens: int) -> Tensor | None:
        """The (B,) key lengths of a step of `tokens` tokens in every row, or None where all rows are equally long.

        Raises:
            ValueError: they do not fit; the message says how many were needed.
        """
        needed = max(self.starts) + tokens
        if needed > self.capacity:
            raise ValueError(f"the cache has room for {self.capacity} tokens, {needed} are needed")
        return None if len(set(self.starts)) == 1 else self.lengths + tokens

    def advance(self, tokens: Tensor) -> None:
        """Counts (B,) tokens of the step that the layers just saw."""
        self._count([start + new for start, new in zip(self.starts, tokens.tolist())])

    def truncate(self, lengths: Tensor) -> None:
        """Keeps the first (B,) tokens of each row, for example a shared prompt.

        Raises:
            ValueError: a row is shorter than that, or a layer's attention has forgotten what it would need.
        """
        wanted = lengths.tolist()
        if any(new > old for new, old in zip(wanted, self.starts)):
            raise ValueError(f"cannot truncate lengths {self.starts} to {wanted}")
        for store in self.stores:
            for old, new in zip(self.starts, wanted):
                if why := store.cannot_truncate(old, new):
                    raise ValueError(f"cannot truncate lengths {self.starts} to {wanted}: {why}")
        self._count(wanted)

    def fill(self, tokens: int) -> None:
        """As after `tokens` tokens in every row, with random keys and values: for measuring what a long text costs.

        Raises:
            ValueError: they do not fit, or a layer keeps something else than keys and values.
        """
        self.reset()
        self.begin(tokens)
        for store in self.stores:
            if not isinstance(store, FullStore):
                raise ValueError("only a cache of 'fused' attention can be filled with random keys and values")
            for memory in store.memory:
                memory.random_(-127, 128) if memory.dtype == torch.int8 else memory.normal_(std=0.01)
        self._count([tokens] * self.batch)

    def row(self, number: int) -> KVCache:
        """One row as a cache of its own, on the same memory; `join` makes what all rows wrote the whole's."""
        view = copy.copy(self)
        view.stores = [store.row(number) for store in self.stores]
        view.batch, view.starts, view.lengths = 1, [self.starts[number]], self.lengths[number : number + 1]
        view.rope_deltas = self.rope_deltas[number : number + 1]
        return view

    def join(self, rows: Sequence[KVCache]) -> None:
        """Takes over every row's lengths and what was written to it."""
        for number, store in enumerate(self.stores):
            store.join([row.stores[number] for row in rows])
        self._count([row.starts[0] for row in rows])

    def copy_beginning(self, other: KVCache, tokens: int) -> None:
        """Of one row to another, which has seen just these `tokens` so far."""
        for mine, theirs in zip(self.stores, other.stores):
            mine.copy_beginning(theirs, tokens)
        self._count([tokens])

    def select(self, rows: list[int]) -> None:
        """Keeps these rows, in this order: finished ones leave, and one may be repeated."""
        index = torch.tensor(rows, device=self.device, dtype=torch.long)
        for store in self.stores:
            store.keep(index)
        self.batch = len(rows)
        self.starts = [self.starts[row] for row in rows]
        self.lengths = self.lengths[index]
        self.rope_deltas = self.rope_deltas[index.cpu()]
