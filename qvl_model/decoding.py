"""The next token's logits for each row of a cache: where it can, a step is recorded once and replayed without Python.

Around the 200 products and attentions of a step, Python takes 10 ms and more: each of its small pieces is cold again
after megabytes of weights went through the caches. A recorded step (`qvl_kernels.Recording`) reads from a few buffers
what changes from token to token: the token's embedding, the cos and sin of its position, and the cache's lengths.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qvl_kernels import PackedLinear, Recording

from .attention import Fused, Step
from .cache import KVCache
from .model import Qwen3VL
from .positions import rope_frequencies
from .text import TextAttention


class Decoder:
    """Logits (B, V) of one more token in each row; they are valid until the next call.

    Args:
        model: runs without gradients.
        cache: holds the prompts. After rows of it were dropped (`KVCache.select`), a new Decoder is needed.
    """

    def __init__(self, model: Qwen3VL, cache: KVCache) -> None:
        self.model, self.cache = model, cache
        self.recorded = _Recorded(model, cache) if can_be_recorded(model, cache) else None

    def __call__(self, tokens: Tensor) -> Tensor:
        """tokens (B,) -> logits (B, V); the cache holds them afterwards.

        Raises:
            ValueError: the cache is full.
        """
        if self.recorded is None:
            inputs = self.model.embed_inputs(tokens[:, None], cache=self.cache)
            hidden = self.model.hidden_states(inputs, self.cache)
            return self.model.lm_head(hidden[:, -1])
        self.cache.begin(1)
        logits = self.recorded(tokens)
        self.cache.advance(torch.ones(len(tokens), dtype=torch.long))
        return logits


def can_be_recorded(model: Qwen3VL, cache: KVCache) -> bool:
    """Whether all that a step computes are kernels: packed matrices, fused attention, on a CPU that has them."""
    text = model.model.language_model
    linears = [module for module in text.modules() if isinstance(module, torch.nn.Linear)]
    kinds = [module.kind for module in text.modules() if isinstance(module, TextAttention)]
    return (
        Recording.is_possible()
        and not model.paged
        and model.dtype == torch.float32
        and model.device.type == "cpu"
        and cache.dtype in (torch.float32, torch.bfloat16, torch.float16, torch.int8)
        and isinstance(model.lm_head, PackedLinear)
        and not linears
        and all(isinstance(kind, Fused) for kind in kinds)
    )


class _Recorded:
    """The step's buffers, and its recording once it has run."""

    def __init__(self, model: Qwen3VL, cache: KVCache) -> None:
        config = model.config.text
        self.model, self.cache = model, cache
        self.embeds = torch.zeros(cache.batch, 1, config.hidden_size)
        self.frequencies = rope_frequencies(config).repeat(2)
        self.cos, self.sin = torch.zeros(2, cache.batch, 1, 1, config.head_dim)
        self.ends = torch.zeros(cache.batch, dtype=torch.long)
        self.recording: Recording | None = None
        self.logits = torch.empty(0)

    def __call__(self, tokens: Tensor) -> Tensor:
        cache, text = self.cache, self.model.model.language_model
        self.embeds[:, 0] = text.embed_tokens.weight[tokens]
        angles = (cache.lengths + cache.rope_deltas)[:, None, None, None].float() * self.frequencies
        torch.cos(angles, out=self.cos)
        torch.sin(angles, out=self.sin)
        torch.add(cache.lengths, 1, out=self.ends)
        if self.recording is not None:
            self.recording.replay()
            return self.logits
        with Recording() as recording:
            hidden = text(self.embeds, Step((self.cos, self.sin), cache, self.ends, recorded=True))
            self.logits = self.model.lm_head(hidden[:, -1])
        self.recording = recording
        return self.logits
