"""optimize: other people's models say the same afterwards, and the report says what happened."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from qvl_kernels import PackedLinear, optimize
from qvl_kernels.optimize import FusedRMSNorm


@pytest.fixture(autouse=True)
def _no_gradients():
    with torch.no_grad():
        yield


def llama(**changes):
    from transformers import LlamaConfig, LlamaForCausalLM

    numbers = {"vocab_size": 64, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(**{**numbers, **heads, **changes})).eval()


def qwen2():
    from transformers import Qwen2Config, Qwen2ForCausalLM

    numbers = {"vocab_size": 64, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2}
    return Qwen2ForCausalLM(Qwen2Config(**numbers, num_attention_heads=4, num_key_value_heads=2)).eval()


def vit():
    from transformers import ViTConfig, ViTModel

    numbers = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    return ViTModel(ViTConfig(**numbers, image_size=32, patch_size=8)).eval()


def relative(ours, expected):
    return (ours.float() - expected.float()).norm() / expected.float().norm()


LOSS = {"fp32": 1e-5, "bf16": 1e-2, "int8": 2e-2, "int4": 0.25}  # int4: 7 % of every matrix, FORMATS in the README


@pytest.mark.parametrize("weights", LOSS)
@pytest.mark.parametrize("make", [llama, qwen2], ids=["llama", "qwen2"])
def test_text_models_of_transformers(make, weights):
    torch.manual_seed(0)
    model = make()
    ids = torch.randint(0, 64, (2, 20))
    mask = torch.ones_like(ids)
    mask[1, :5] = 0
    expected = model(ids, attention_mask=mask).logits[mask.bool()]
    assert optimize(model, weights=weights) is model
    assert relative(model(ids, attention_mask=mask).logits[mask.bool()], expected) < LOSS[weights]
    kinds = list(model.qvl_report.changed.values())
    assert kinds.count(f"PackedLinear {weights}") == 2 * 7 + 1
    assert kinds.count("FusedRMSNorm") == 5
    assert 'attention: attn_implementation="qvl"' in kinds
    out = model.generate(ids, attention_mask=mask, max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert out.shape == (2, 24)


@pytest.mark.parametrize("weights", ["fp32", "int8"])
def test_vit(weights):
    torch.manual_seed(0)
    model, pixels = vit(), torch.randn(2, 3, 32, 32)
    expected = model(pixels).last_hidden_state
    optimize(model, weights=weights)
    assert relative(model(pixels).last_hidden_state, expected) < LOSS[weights]


def test_qwen3_vl():
    import sys
    from pathlib import Path

    sys.path.insert(0, str(Path(__file__).parent / "model"))
    from tiny import IMAGE, images, oracle, prompt, tiny_config, tiny_model

    model = oracle(tiny_model(tiny_config()))
    pixels, grids = images(tiny_config(), [(1, 4, 6)])
    ids = torch.tensor([prompt(2, ("image", 1, 4, 6), 3)])
    inputs = {"input_ids": ids, "pixel_values": pixels, "image_grid_thw": grids}
    inputs["mm_token_type_ids"] = (ids == IMAGE).int()
    expected = model(**inputs).logits
    optimize(model, weights="fp32")
    assert relative(model(**inputs).logits, expected) < 1e-5
    assert not any(type(module) is nn.Linear for module in model.modules())


def test_torchs_own_layers_keep_what_they_read_themselves():
    torch.manual_seed(0)
    model = nn.Sequential(nn.TransformerEncoderLayer(32, 4, 64, batch_first=True), nn.Linear(32, 8)).eval()
    x = torch.randn(2, 5, 32)
    expected = model(x)
    optimize(model, weights="int8")
    assert relative(model(x), expected) < LOSS["int8"]
    assert isinstance(model[1], PackedLinear)
    assert model.qvl_report.left["0.linear1"] == "TransformerEncoderLayer reads its weight itself"
    assert "NonDynamicallyQuantizableLinear" in model.qvl_report.left["0.self_attn.out_proj"]


def test_an_rms_norm_by_name_only_is_left():
    class OffsetRMSNorm(nn.Module):  # as Gemma's: 1 + weight
        def __init__(self):
            super().__init__()
            self.weight, self.eps = nn.Parameter(torch.zeros(8)), 1e-6

        def forward(self, x):
            return nn.functional.rms_norm(x, (8,), 1 + self.weight, self.eps)

    model = optimize(nn.Sequential(OffsetRMSNorm(), nn.RMSNorm(8), nn.LayerNorm(8)))
    assert model.qvl_report.left == {"0": "OffsetRMSNorm is another function than RMSNorm"}
    assert isinstance(model[1], FusedRMSNorm)


def test_what_is_left_has_its_reason():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4, dtype=torch.bfloat16))
    model[1].register_forward_hook(lambda *_: None)
    optimize(model, attention=False)
    assert model.qvl_report.left == {
        "0": "torch.float32 weights stay unless `weights` names a format",
        "1": "a linear layer has hooks",
    }
    assert model.qvl_report.changed == {"2": "PackedLinear bf16"}
    assert str(model.qvl_report).splitlines()[0] == "    1 x PackedLinear bf16"
    with pytest.raises(ValueError, match="format must be one of"):
        optimize(nn.Sequential(nn.Linear(4, 4)), weights="int3")


def test_a_second_time_changes_nothing():
    model = optimize(nn.Sequential(nn.Linear(4, 4), nn.RMSNorm(4)), weights="int8")
    before = [type(module) for module in model.modules()]
    optimize(model, weights="int4", attention=False)
    assert [type(module) for module in model.modules()] == before
    assert model.qvl_report.changed == {}
