"""Keys and values of the tokens seen so far, in memory allocated once."""

from __future__ import annotations

import torch
from torch import Tensor

from .config import TextConfig


class KVCache:
    """Room for `capacity` tokens in each of `batch` rows; every row has its own length.

    A step first asks `begin(tokens)` for the key lengths that attention needs, then calls `append` once per layer, then
    `advance` with the number of tokens that count in each row. Tokens that do not count (padding on the right of a
    shorter row) are written too and overwritten by the next step.

    Memory: 2 layers B Hkv capacity D elements; of the 2B model in bfloat16 112 KiB a token.

    >>> cache = KVCache(TextConfig(num_hidden_layers=2, head_dim=4, mrope_section=(1, 1, 0)), batch=1, capacity=8)
    >>> cache.keys[0].shape
    torch.Size([1, 8, 8, 4])
    """

    def __init__(
        self,
        config: TextConfig,
        batch: int,
        capacity: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        # Zeros and not garbage: a key that is masked still meets a weight of zero, and 0 * NaN is NaN.
        shape = (batch, config.num_key_value_heads, capacity, config.head_dim)
        self.keys = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(config.num_hidden_layers)]
        self.values = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(config.num_hidden_layers)]
        self.capacity = capacity
        self.reset()

    @property
    def batch(self) -> int:
        return self.keys[0].shape[0]

    @property
    def lengths(self) -> Tensor:
        """(B,) tokens that count in each row."""
        return torch.tensor(self._lengths)

    @property
    def nbytes(self) -> int:
        return 2 * sum(keys.nbytes for keys in self.keys)

    def reset(self) -> None:
        """Forgets everything; the memory stays."""
        self._lengths = [0] * self.keys[0].shape[0]
        self.rope_deltas = torch.zeros(self.keys[0].shape[0], dtype=torch.long)

    def begin(self, tokens: int) -> Tensor | None:
        """The (B,) key lengths of a step of `tokens` tokens in every row, or None where all rows are equally long.

        Raises:
            ValueError: they do not fit; the message says how many were needed.
        """
        needed = max(self._lengths) + tokens
        if needed > self.capacity:
            raise ValueError(f"the cache has room for {self.capacity} tokens, {needed} are needed")
        if len(set(self._lengths)) == 1:
            return None
        return torch.tensor([length + tokens for length in self._lengths], device=self.keys[0].device)

    def append(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Writes (B, Hkv, L, D) keys and values behind each row's tokens; returns (B, Hkv, Lk, D) views of all so
        far."""
        keys, values = self.keys[layer], self.values[layer]
        tokens = key.shape[2]
        if len(set(self._lengths)) == 1:
            rows = slice(self._lengths[0], self._lengths[0] + tokens)
            keys[:, :, rows] = key
            values[:, :, rows] = value
        else:
            for row, start in enumerate(self._lengths):
                keys[row, :, start : start + tokens] = key[row]
                values[row, :, start : start + tokens] = value[row]
        end = max(self._lengths) + tokens
        return keys[:, :, :end], values[:, :, :end]

    def advance(self, tokens: Tensor) -> None:
        """Counts (B,) tokens of the step just appended."""
        self._lengths = [length + new for length, new in zip(self._lengths, tokens.tolist())]

    def truncate(self, lengths: Tensor) -> None:
        """Keeps the first (B,) tokens of each row, for example a shared prompt."""
        if any(new > old for new, old in zip(lengths.tolist(), self._lengths)):
            raise ValueError(f"cannot truncate lengths {self._lengths} to {lengths.tolist()}")
        self._lengths = lengths.tolist()

    def select(self, rows: list[int]) -> None:
        """Keeps these rows, in this order: finished ones leave, and one may be repeated."""
        index = torch.tensor(rows, device=self.keys[0].device, dtype=torch.long)
        self.keys = [keys.index_select(0, index) for keys in self.keys]
        self.values = [values.index_select(0, index) for values in self.values]
        self._lengths = [self._lengths[row] for row in rows]
        self.rope_deltas = self.rope_deltas[index.cpu()]
