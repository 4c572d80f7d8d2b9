"""attn_implementation="qvl" in transformers' own models, from random weights."""

from __future__ import annotations

import pytest
import torch
from test_scaled_dot_product_attention import count_calls

import qvl_kernels
from qvl_kernels.integrations.transformers import register


@pytest.fixture(autouse=True)
def _registered():
    register()
    register()  # twice is harmless
    with torch.no_grad():
        yield


@pytest.fixture
def calls(monkeypatch):
    if not any(name.startswith("cpu") for name in qvl_kernels.available_backends()):
        pytest.skip("no native CPU backend runs here")
    return count_calls(monkeypatch)


def llama():
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=64,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=64,
        )
    ).eval()


def test_llama_logits_padding_and_generation(calls):
    model = llama()
    ids = torch.randint(1, 64, (2, 9))
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    expected = model(ids, attention_mask=mask).logits[mask.bool()]
    tokens = model.generate(ids, attention_mask=mask, max_new_tokens=8, do_sample=False, pad_token_id=0)
    model.set_attn_implementation("qvl")
    torch.testing.assert_close(model(ids, attention_mask=mask).logits[mask.bool()], expected)
    assert len(calls) == 2
    assert torch.equal(
        model.generate(ids, attention_mask=mask, max_new_tokens=8, do_sample=False, pad_token_id=0), tokens
    )
    unpadded = model(ids).logits
    model.set_attn_implementation("sdpa")
    torch.testing.assert_close(unpadded, model(ids).logits)


def test_bert_with_padding(calls):
    from transformers import BertConfig, BertModel

    model = BertModel(
        BertConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48)
    ).eval()
    ids = torch.randint(1, 64, (2, 9))
    mask = torch.ones_like(ids)
    mask[1, 5:] = 0
    expected = model(ids, attention_mask=mask).last_hidden_state[mask.bool()]
    model.set_attn_implementation("qvl")
    torch.testing.assert_close(model(ids, attention_mask=mask).last_hidden_state[mask.bool()], expected)
    assert len(calls) == 2


def test_qwen3_vl_text_and_vision(calls):
    import sys
    from pathlib import Path

    sys.path.insert(0, str(Path(__file__).parent / "model"))
    from tiny import IMAGE, images, oracle, prompt, tiny_config, tiny_model

    config = tiny_config()
    model = oracle(tiny_model(config))
    pixels, grids = images(config, [(1, 4, 6), (1, 2, 4)])
    ids = torch.tensor([prompt(2, ("image", 1, 4, 6), 3, ("image", 1, 2, 4), 2)])
    inputs = {
        "input_ids": ids,
        "pixel_values": pixels,
        "image_grid_thw": grids,
        "mm_token_type_ids": (ids == IMAGE).int(),
    }
    expected = model(**inputs).logits
    model.set_attn_implementation("qvl")
    ours = model(**inputs).logits
    assert len(calls) == config.text.num_hidden_layers + 2 * config.vision.depth
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)


def test_dropout_is_refused_by_name():
    model = llama()
    model.config.attention_dropout = 0.1
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.1
    model.set_attn_implementation("qvl")
    with pytest.raises(ValueError, match='attn_implementation="qvl" has no attention dropout'):
        model.train()(torch.tensor([[1, 2, 3]]))
