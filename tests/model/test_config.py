"""The configuration: presets, the released format in both its forms, and errors that name the file and the field."""

from __future__ import annotations

import json

import pytest
import torch
from tiny import tiny_config

from qvl_model import Qwen3VL, Qwen3VLConfig
from qvl_model.config import ConfigError


def parameters_on_meta(config: Qwen3VLConfig) -> int:
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in Qwen3VL(config).parameters())


@pytest.mark.parametrize(
    ("config", "count"),
    [
        (Qwen3VLConfig.qwen3_vl_2b(), 2_127_532_032),
        (Qwen3VLConfig.full_capacity_2b(), 2_597_311_488),
        (Qwen3VLConfig.qwen3_vl_4b(), 4_437_815_808),
        (Qwen3VLConfig.qwen3_vl_8b(), 8_767_123_696),
    ],
)
def test_presets_have_their_number_of_parameters(config, count):
    assert config.num_parameters() == count == parameters_on_meta(config)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("text", [{}, {"attention_bias": True}])
def test_the_computed_number_of_parameters_is_the_modules(tied, text):
    config = tiny_config(tied=tied, text=text)
    assert config.num_parameters() == parameters_on_meta(config)


def test_full_capacity_is_the_documents_shape():
    text = Qwen3VLConfig.full_capacity_2b().text
    assert (text.num_hidden_layers, text.num_attention_heads, text.num_key_value_heads, text.head_dim) == (
        32,
        32,
        8,
        128,
    )


@pytest.mark.parametrize("config", [Qwen3VLConfig.qwen3_vl_2b(), Qwen3VLConfig.digits(), tiny_config()])
def test_round_trip_through_the_released_format(config, tmp_path):
    config.to_json(tmp_path / "config.json")
    assert Qwen3VLConfig.from_json(tmp_path) == config
    assert Qwen3VLConfig.from_json(tmp_path / "config.json") == config
    assert Qwen3VLConfig.from_json(config.to_dict()) == config


def test_what_transformers_writes_is_read_and_the_other_way_round(tmp_path):
    from transformers import Qwen3VLConfig as Theirs

    config = tiny_config(tied=True)
    theirs = Theirs(**config.to_dict())
    theirs.save_pretrained(tmp_path)
    read = Qwen3VLConfig.from_json(tmp_path)
    assert (read.text, read.vision, read.tie_word_embeddings) == (config.text, config.vision, True)
    assert theirs.text_config.rope_parameters["rope_theta"] == config.text.rope_theta
    assert theirs.vision_config.deepstack_visual_indexes == list(config.vision.deepstack_visual_indexes)


def test_unknown_fields_are_ignored():
    content = tiny_config().to_dict()
    content["text_config"]["use_cache"] = True
    content["transformers_version"] = "9.0"
    assert Qwen3VLConfig.from_json(content) == tiny_config()


def changed(path: str, value) -> dict:
    content = json.loads(json.dumps(tiny_config().to_dict()))
    *folders, name = path.split(".")
    place = content
    for folder in folders:
        place = place[folder]
    if value is None:
        del place[name]
    else:
        place[name] = value
    return content


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("model_type", "llama", "model_type must be 'qwen3_vl', got 'llama'"),
        ("model_type", None, "model_type must be 'qwen3_vl', got None"),
        ("image_token_id", "x", "image_token_id must be a non-negative integer, got 'x'"),
        ("image_token_id", 96, r"image_token_id \(96\) must be below text_config.vocab_size \(96\)"),
        ("tie_word_embeddings", "no", "tie_word_embeddings must be true or false, got 'no'"),
        ("dtype", "int7", "dtype must be one of float32, bfloat16, float16, got 'int7'"),
        ("text_config", None, "text_config is missing"),
        ("text_config", [], r"text_config must be an object, got \[\]"),
        ("text_config.hidden_size", None, "text_config.hidden_size is missing"),
        ("text_config.hidden_size", "32", "text_config.hidden_size must be a non-negative integer, got '32'"),
        ("text_config.rms_norm_eps", -1, "text_config.rms_norm_eps must be a positive number"),
        ("text_config.rms_norm_eps", float("inf"), "text_config.rms_norm_eps must be a positive number"),
        ("text_config.attention_bias", 1, "text_config.attention_bias must be true or false, got 1"),
        ("text_config.vocab_size", 10**30, "text_config.vocab_size must be from 1 to"),
        ("text_config.rope_theta", None, "text_config.rope_theta is missing"),
        (
            "text_config.num_key_value_heads",
            3,
            r"num_attention_heads \(4\) must be a multiple of num_key_value_heads \(3\)",
        ),
        ("text_config.num_key_value_heads", 0, "text_config.num_key_value_heads must be from 1 to .*, got 0"),
        ("text_config.head_dim", 32, r"mrope_section \[4, 2, 2\] must be three numbers whose sum is half of head_dim"),
        ("text_config.rope_scaling", [1], r"text_config.rope_scaling must be an object, got \[1\]"),
        ("text_config.rope_scaling.mrope_section", 3, "mrope_section must be a list of integers, got 3"),
        ("text_config.rope_scaling.rope_type", "yarn", "rope_type must be 'default', got 'yarn'"),
        ("text_config.rope_scaling.mrope_interleaved", False, "mrope_interleaved must be true"),
        ("text_config.hidden_act", "gelu", "hidden_act must be 'silu', got 'gelu'"),
        ("vision_config.num_position_embeddings", 35, "must be a square"),
        ("vision_config.patch_size", 0, "vision_config.patch_size must be from 1 to .*, got 0"),
        ("vision_config.num_heads", 3, "must be a multiple of 4 num_heads"),
        ("vision_config.out_hidden_size", 64, r"out_hidden_size \(64\) must be text_config.hidden_size \(32\)"),
        ("vision_config.deepstack_visual_indexes", [1, 1], "must be different blocks below depth"),
        ("vision_config.deepstack_visual_indexes", [3], "must be different blocks below depth"),
        ("vision_config.deepstack_visual_indexes", 3, "must be a list of integers, got 3"),
    ],
)
def test_errors_name_the_file_and_the_field(path, value, message, tmp_path):
    file = tmp_path / "config.json"
    file.write_text(json.dumps(changed(path, value)))
    with pytest.raises(ConfigError, match=message) as error:
        Qwen3VLConfig.from_json(file)
    assert str(error.value).startswith(str(file))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("content", "message"), [("{", "not valid JSON"), ("[1]", "must be a JSON object, got list")])
def test_files_that_are_not_configurations(content, message, tmp_path):
    file = tmp_path / "config.json"
    file.write_text(content)
    with pytest.raises(ConfigError, match=message):
        Qwen3VLConfig.from_json(file)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"config\.json: no such file"):
        Qwen3VLConfig.from_json(tmp_path)


def test_attention_and_fusion_names_are_checked():
    with pytest.raises(ValueError, match=r"attention must be one of fused, linear, .*, got 'fast'"):
        Qwen3VL(tiny_config(), attention="fast")
    with pytest.raises(ValueError, match="attention must be one name or 3 names, got 2"):
        Qwen3VL(tiny_config(), attention=["fused", "fused"])
    with pytest.raises(ValueError, match="fusion must be one of deepstack, got 'early'"):
        Qwen3VL(tiny_config(), fusion="early")
