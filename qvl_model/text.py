"""The language model: token embeddings through decoder layers to normalised hidden states.

Shapes: B rows, L tokens, C hidden channels, Hq query heads, Hkv key and value heads, D head dimension.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from qvl_kernels import norm_rotary

from .attention import Kind, Step
from .config import TextConfig
from .fusion import DeepStack
from .layers import RMSNorm, SwiGLU, embedding


class TextAttention(nn.Module):
    """Causal grouped-query attention of one kind, with RMSNorm over each head's query and key, then M-RoPE."""

    def __init__(self, config: TextConfig, layer: int, kind: Kind) -> None:
        super().__init__()
        self.layer, self.kind = layer, kind
        self.head_dim = config.head_dim
        queries, keys = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
        self.widths = (queries, keys, keys)
        self.qkv_proj: nn.Module | None = None  # in place of the three, where the weights are packed
        self.q_proj = nn.Linear(config.hidden_size, queries, bias=config.attention_bias)
        self.k_proj = nn.Linear(config.hidden_size, keys, bias=config.attention_bias)
        self.v_proj = nn.Linear(config.hidden_size, keys, bias=config.attention_bias)
        self.o_proj = nn.Linear(queries, config.hidden_size, bias=config.attention_bias)
        self.q_norm = RMSNorm(config.head_dim, config.rms_norm_eps)
        self.k_norm = RMSNorm(config.head_dim, config.rms_norm_eps)

    def forward(self, x: Tensor, step: Step) -> Tensor:
        heads = (*x.shape[:2], -1, self.head_dim)
        query, key, value = (y.view(heads).transpose(1, 2) for y in self._project(x))
        weights = self.q_norm.weight, self.k_norm.weight
        query, key = norm_rotary(query, key, *weights, self.q_norm.eps, *step.rope)
        if step.parts is None:
            out = self.kind.text(self.layer, query, key, value, step)
        else:
            outs = []
            for part in step.parts:
                q, k, v = (x[:, :, part.start : part.stop] for x in (query, key, value))
                outs.append(self.kind.text(self.layer, q, k, v, Step(step.rope, part.cache, None)))
            out = torch.cat(outs, 2) if len(outs) > 1 else outs[0]
        return self.o_proj(out.transpose(1, 2).flatten(2).to(x.dtype))

    def _project(self, x: Tensor) -> tuple[Tensor, ...]:
        if self.qkv_proj is None:
            return self.q_proj(x), self.k_proj(x), self.v_proj(x)
        return self.qkv_proj(x).split(self.widths, -1)


class TextLayer(nn.Module):
    """h += attention(norm(h)), h += mlp(norm(h)); the additions are fused into the norms that follow them.

    So a layer takes and gives a pair (x, residual) whose sum is the hidden state h.
    """

    def __init__(self, config: TextConfig, layer: int, kind: Kind) -> None:
        super().__init__()
        self.self_attn = TextAttention(config, layer, kind)
        self.mlp = SwiGLU(config.hidden_size, config.intermediate_size)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x: Tensor, residual: Tensor | None, step: Step) -> tuple[Tensor, Tensor]:
        if residual is None:
            y, residual = self.input_layernorm(x), x
        else:
            y, residual = self.input_layernorm(x, residual)
        y, residual = self.post_attention_layernorm(self.self_attn(y, step), residual)
        return self.mlp(y), residual


class TextModel(nn.Module):
    """Embeddings (B, L, C) to the last layer's normalised hidden states (B, L, C).

    Source: Yang et al., Qwen3 technical report, 2025, section 2; Bai et al., Qwen3-VL technical report, 2025, section
    2.
    """

    def __init__(self, config: TextConfig, kinds: Sequence[Kind]) -> None:
        super().__init__()
        self.gradient_checkpointing = False
        self.embed_tokens = embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(TextLayer(config, layer, kind) for layer, kind in enumerate(kinds))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, embeds: Tensor, step: Step, deepstack: DeepStack | None = None) -> Tensor:
        x, residual = embeds, None
        for number, layer in enumerate(self.layers):
            if self.gradient_checkpointing and self.training:
                x, residual = checkpoint(layer, x, residual, step, use_reentrant=False)
            else:
                x, residual = layer(x, residual, step)
            if deepstack is not None:
                residual = deepstack.inject(residual, number)
        return self.norm(x, residual)[0] if residual is not None else self.norm(x)
