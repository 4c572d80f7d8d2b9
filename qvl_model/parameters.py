"""How many parameters a configuration has, from its numbers alone."""

from __future__ import annotations

from .config import Qwen3VLConfig, VisionConfig


def count(config: Qwen3VLConfig) -> int:
    """Of the complete model; a tied head counts once."""
    return _text(config) + _vision(config.vision)


def _text(config: Qwen3VLConfig) -> int:
    c = config.text
    queries, keys = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
    attention = c.hidden_size * (2 * queries + 2 * keys) + 2 * c.head_dim
    if c.attention_bias:
        attention += queries + 2 * keys + c.hidden_size
    layer = attention + 3 * c.hidden_size * c.intermediate_size + 2 * c.hidden_size
    embeddings = c.vocab_size * c.hidden_size * (1 if config.tie_word_embeddings else 2)
    return embeddings + c.num_hidden_layers * layer + c.hidden_size


def _vision(c: VisionConfig) -> int:
    block = 4 * c.hidden_size * (c.hidden_size + 1) + 4 * c.hidden_size
    block += 2 * c.hidden_size * c.intermediate_size + c.intermediate_size + c.hidden_size
    merged = c.hidden_size * c.spatial_merge_size**2
    products = merged * (merged + 1) + (merged + 1) * c.out_hidden_size
    mergers = products + 2 * c.hidden_size + len(c.deepstack_visual_indexes) * (products + 2 * merged)
    embeddings = c.hidden_size * (c.patch_dim + 1) + c.num_position_embeddings * c.hidden_size
    return embeddings + c.depth * block + mergers
