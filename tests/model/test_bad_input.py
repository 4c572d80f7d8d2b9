"""What cannot work is one clear sentence that names the file or the argument, and leaves nothing behind.

Covered here: damaged and dishonest weights, missing shards, names, shapes, configurations, prompts, caches, outputs.
Images that are none, or too small, too long, too large: `test_bad_images.py`.
"""

from __future__ import annotations

import json
import re
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import rewrite_header, write_checkpoint
from tiny import IMAGE, images, padded, prompt, tiny_config, tiny_model

from qvl_model import KVCache, Qwen3VL
from qvl_model.config import ConfigError
from qvl_model.files import check_writable, write_then_rename
from qvl_model.generation import make_options
from qvl_model.weights import CheckpointError, save_pretrained

EMBEDDING = "model.language_model.embed_tokens.weight"
NORM = "model.language_model.norm.weight"
WEIGHTS = "model.safetensors"


@pytest.fixture
def folder(tmp_path) -> Path:
    write_checkpoint(tmp_path)
    return tmp_path


def refusal(folder: Path | str, error: type[Exception] = CheckpointError, **options: Any) -> str:
    with pytest.raises(error) as caught:
        Qwen3VL.from_pretrained(folder, **options)
    message = str(caught.value)
    assert "\n" not in message
    return message


def change_entry(name: str, **values: Any):
    """A header with other values in the entry of one tensor."""
    return lambda header: {**header, name: {**header[name], **values}}


@pytest.mark.parametrize("kept", [0, 5, 8, 200])
def test_a_file_cut_within_its_header(folder, kept):
    file = folder / WEIGHTS
    file.write_bytes(file.read_bytes()[:kept])
    message = refusal(folder)
    assert message.startswith(f"{file}: ")
    assert "truncated" in message


def test_a_file_cut_within_its_data(folder):
    file = folder / WEIGHTS
    file.write_bytes(file.read_bytes()[:-1])
    assert re.fullmatch(
        re.escape(f"{file}: tensor ") + r"'[\w.]+': lies at bytes \d+:\d+ of the data but the file has \d+: truncated",
        refusal(folder),
    )


@pytest.mark.parametrize("length", [2**63, 10**9, 3])
def test_a_header_length_that_lies(folder, length):
    file = folder / WEIGHTS
    file.write_bytes(struct.pack("<Q", length) + file.read_bytes()[8:])
    message = refusal(folder)
    assert message.startswith(f"{file}: the ")
    assert "truncated, or not a safetensors file" in message or "not valid JSON" in message


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (change_entry(NORM, shape=[33]), rf"tensor '{NORM}': shape \(33,\) in F32 takes 132 bytes, .* gives it 128"),
        (change_entry(NORM, dtype="F64"), rf"tensor '{NORM}': shape \(32,\) in F64 takes 256 bytes, .* gives it 128"),
        (change_entry(NORM, dtype="F33"), rf"tensor '{NORM}': unknown dtype 'F33'"),
        (change_entry(NORM, dtype=["F32"]), rf"tensor '{NORM}': unknown dtype \['F32'\]"),
        (change_entry(NORM, shape=[-32]), rf"tensor '{NORM}': shape and data_offsets must be whole numbers >= 0"),
        (change_entry(NORM, shape="32"), rf"tensor '{NORM}': shape and data_offsets must be whole numbers >= 0"),
        (change_entry(NORM, data_offsets=[10**9, 10**9 + 128]), rf"tensor '{NORM}': lies at bytes 1000000000:"),
        (change_entry(NORM, data_offsets=[128, 0]), rf"tensor '{NORM}': shape .* the header gives it -128"),
        (change_entry(NORM, data_offsets=[0]), rf"tensor '{NORM}': the header must give dtype, shape and two data_off"),
        (lambda header: {**header, NORM: 7}, rf"tensor '{NORM}': the header must give dtype, shape"),
        (lambda header: {**header, NORM: {}}, rf"tensor '{NORM}': the header must give dtype, shape"),
        (lambda header: [1], "the safetensors header is not a JSON object"),
    ],
)
def test_a_header_that_lies(folder, change, expected):
    rewrite_header(folder / WEIGHTS, change)
    message = refusal(folder)
    assert re.match(re.escape(f"{folder / WEIGHTS}: ") + expected, message), message


def test_two_tensors_in_the_same_bytes(folder):
    """Each entry for itself is sound; only the library that maps the file sees that they overlap."""
    other = "model.visual.merger.norm.weight"
    rewrite_header(folder / WEIGHTS, lambda h: {**h, NORM: {**h[NORM], "data_offsets": h[other]["data_offsets"]}})
    assert refusal(folder).startswith(f"{folder / WEIGHTS}: ")


def test_a_missing_shard(tmp_path):
    write_checkpoint(tmp_path, shards=3)
    shard = tmp_path / "model-00002-of-00003.safetensors"
    shard.unlink()
    expected = f"{shard}: missing shard, named by model.safetensors.index.json"
    assert refusal(tmp_path, FileNotFoundError) == expected


def test_a_damaged_shard(tmp_path):
    write_checkpoint(tmp_path, shards=3)
    shard = tmp_path / "model-00003-of-00003.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1])
    assert refusal(tmp_path).startswith(f"{shard}: tensor ")


@pytest.mark.parametrize(
    ("index", "expected"),
    [
        ("{", "must be a JSON object with a weight_map"),
        ("[]", "must be a JSON object with a weight_map"),
        ('{"weight_map": [1]}', "must be a JSON object with a weight_map"),
        ('{"weight_map": {"a": 1}}', "must be a JSON object with a weight_map"),
        ('{"weight_map": {"a": "../model.safetensors"}}', "a shard must lie in the checkpoint's folder, got '../model"),
    ],
)
def test_a_bad_index(tmp_path, index, expected):
    write_checkpoint(tmp_path, shards=2)
    file = tmp_path / "model.safetensors.index.json"
    file.write_text(index)
    assert refusal(tmp_path).startswith(f"{file}: {expected}")


def test_an_index_that_promises_too_much(tmp_path):
    write_checkpoint(tmp_path, shards=2)
    file = tmp_path / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    index["weight_map"]["model.extra"] = "model-00001-of-00002.safetensors"
    file.write_text(json.dumps(index))
    expected = "tensor 'model.extra' is missing, model.safetensors.index.json says it is here"
    assert refusal(tmp_path) == f"{tmp_path / 'model-00001-of-00002.safetensors'}: {expected}"


def rewrite(file: Path, change) -> None:
    """Another, well-formed, set of tensors."""
    from safetensors.torch import load_file, save_file

    save_file(change({name: tensor.clone() for name, tensor in load_file(file).items()}), file)


def test_a_missing_tensor(folder):
    rewrite(folder / WEIGHTS, lambda tensors: {name: x for name, x in tensors.items() if name != NORM})
    assert refusal(folder) == f"{folder}: tensor '{NORM}' is missing from the checkpoint; config.json asks for it"


def test_neither_name_of_a_tied_head(folder):
    rewrite(folder / WEIGHTS, lambda tensors: {name: x for name, x in tensors.items() if name != EMBEDDING})
    assert f"tensor '{EMBEDDING}' is missing" in refusal(folder)


def test_an_unexpected_tensor(folder):
    rewrite(folder / WEIGHTS, lambda tensors: {**tensors, "model.extra": torch.zeros(2)})
    expected = "tensor 'model.extra' is not expected: the model of config.json has none of that name"
    assert refusal(folder) == f"{folder / WEIGHTS}: {expected}"


def test_a_shape_that_does_not_fit(folder):
    rewrite(folder / WEIGHTS, lambda tensors: {**tensors, NORM: torch.zeros(31)})
    assert refusal(folder) == f"{folder / WEIGHTS}: tensor '{NORM}' has shape (31,), config.json asks for (32,)"


def test_a_dtype_that_is_none_for_weights(folder):
    rewrite(folder / WEIGHTS, lambda tensors: {**tensors, NORM: torch.zeros(32, dtype=torch.int8)})
    assert f"tensor '{NORM}' is stored as I8; float32, bfloat16, float16 can be read" in refusal(folder)


def test_no_weights_at_all(folder):
    (folder / WEIGHTS).rename(folder / "pytorch_model.bin")
    message = refusal(folder, FileNotFoundError)
    assert message.startswith(f"{folder}: holds neither model.safetensors nor model.safetensors.index.json")
    assert "pytorch_model.bin is not safetensors" in message


def change_config(folder: Path, **values: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def test_an_unknown_model_type(folder):
    change_config(folder, model_type="llama")
    message = refusal(folder, ConfigError)
    assert message == f"{folder / 'config.json'}: model_type must be 'qwen3_vl', got 'llama'"


def test_a_folder_without_a_configuration(folder):
    (folder / "config.json").unlink()
    assert refusal(folder, FileNotFoundError) == f"{folder / 'config.json'}: no such file"


def test_a_checkpoint_that_is_nowhere(tmp_path):
    missing = tmp_path / "nothing"
    assert refusal(missing, FileNotFoundError).startswith(f"{missing}: no such folder")
    assert refusal("nobody/has-this", FileNotFoundError).startswith("nobody/has-this: no such folder here, nor on the")


def test_formats_and_choices_that_do_not_exist(folder):
    expected = "weights='fp8' is no weight format; there are auto, fp32, bf16, int8, int4"
    assert refusal(folder, ValueError, weights="fp8") == expected
    assert "attention must be one of" in refusal(folder, ValueError, attention="magic")
    assert "fusion must be" in refusal(folder, ValueError, fusion="magic")
    assert "max_memory: expected bytes or a size" in refusal(folder, ValueError, max_memory="lots")


def test_a_failed_load_lets_go_of_the_file(folder):
    file = (folder / WEIGHTS).resolve()
    rewrite(file, lambda tensors: {**tensors, NORM: torch.zeros(31)})
    refusal(folder)
    maps = Path("/proc/self/maps")
    assert not maps.exists() or str(file) not in maps.read_text()


@pytest.mark.parametrize("shape", [(1, 0), (0, 3), (3,)])
def test_an_empty_prompt(shape):
    with pytest.raises(ValueError, match=r"generate: the prompt is empty; input_ids must be \(B, L\), got"):
        tiny_model().generate(torch.zeros(shape, dtype=torch.long))


def test_an_empty_question(folder):
    with pytest.raises(ValueError, match="the user's content is empty"):
        Qwen3VL.from_pretrained(folder).chat("  ")


def test_a_row_of_nothing_but_padding():
    with pytest.raises(ValueError, match="attention_mask hides every token of row 1"):
        tiny_model().generate(torch.ones(2, 3, dtype=torch.long), attention_mask=torch.tensor([[1, 1, 1], [0, 0, 0]]))


@pytest.mark.parametrize("shape", [(1, 2), (1, 4), (2, 3), (3,)])
def test_a_mask_of_another_shape(shape):
    with pytest.raises(ValueError, match=r"generate: attention_mask must have shape \(1, 3\), got"):
        tiny_model().generate(torch.ones(1, 3, dtype=torch.long), attention_mask=torch.ones(shape))


@pytest.mark.parametrize(
    ("parts", "grids", "message"),
    [
        ((3, ("image", 1, 4, 4)), [], "input_ids has 4 image placeholders, but no image is given"),
        ((3, ("image", 1, 4, 4)), [(1, 4, 6)], "4 image .*6"),
        ((3,), [(1, 4, 4)], "0 image .*4"),
    ],
)
def test_placeholders_that_do_not_match(parts, grids, message):
    model = tiny_model()
    media = dict(zip(("pixel_values", "image_grid_thw"), images(model.config, grids))) if grids else {}
    with pytest.raises(ValueError, match=message):
        model.generate(torch.tensor([prompt(*parts)]), **media)


def test_a_token_outside_the_vocabulary():
    with pytest.raises(ValueError, match=r"input_ids must lie in \[0, 96\), got 1 to 96"):
        tiny_model().generate(torch.tensor([[1, 96]]))


def test_a_prompt_longer_than_the_positions():
    model = tiny_model(tiny_config(text={"max_position_embeddings": 10}))
    ids, mask = padded([prompt(11), prompt(2)], "left")
    with pytest.raises(ValueError, match="generate: the prompt has 11 tokens, the model has 10 positions"):
        model.generate(ids, attention_mask=mask)
    with pytest.raises(ValueError, match="the prompt has 11 tokens, the model has 10 positions"):
        model(ids, attention_mask=mask)


def test_a_cache_that_is_too_small():
    model = tiny_model()
    ids = torch.tensor([prompt(6)])
    with pytest.raises(ValueError, match="the cache has room for 5 tokens, 6 are needed"):
        model(ids, cache=KVCache(model.config.text, 1, 5))
    cache = model.new_cache(1, 6)
    with torch.no_grad():
        model(ids, cache=cache)
        with pytest.raises(ValueError, match="the cache has room for 6 tokens, 7 are needed"):
            model(ids[:, :1], cache=cache)
        assert cache.lengths.tolist() == [6], "a refused step must leave the cache as it was"
        with pytest.raises(ValueError, match="the cache has 1 rows, the input has 2"):
            model(torch.tensor([[1], [2]]), cache=model.new_cache(1, 6))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": 0}, "generate: max_new_tokens must be at least 1, got 0"),
        ({"prefill_chunk": 0}, "generate: prefill_chunk must be at least 1, got 0"),
        ({"stop": ["a", ""]}, "generate: a stop string must not be empty"),
        ({"do_sample": True, "top_p": 2}, r"sampling: top_p must lie in \(0, 1\], got 2"),
    ],
)
def test_options_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        make_options(tiny_model(), **options)


def test_stop_strings_without_a_tokenizer():
    with pytest.raises(ValueError, match="this model has no tokenizer: load it with from_pretrained"):
        tiny_model().generate(torch.tensor([[1, IMAGE - 1]]), stop="x")


# Also root, whom no permission stops, cannot write into these.
@pytest.mark.parametrize("place", ["missing folder", "file as folder", "folder as file"])
def test_an_output_that_cannot_be_written(tmp_path, place):
    file = tmp_path / "file"
    file.write_text("kept")
    target = {"missing folder": tmp_path / "no" / "x", "file as folder": file / "x", "folder as file": tmp_path}[place]
    with pytest.raises(OSError, match=f"^{re.escape(str(target))}: "):
        check_writable(target)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    if place == "file as folder":
        with pytest.raises(OSError, match=f"^{re.escape(str(target))}: the checkpoint cannot be written here"):
            save_pretrained(tiny_model(), target)


def test_a_write_that_fails_keeps_the_old_file(tmp_path):
    file = tmp_path / "result.json"
    file.write_text("old")
    with pytest.raises(RuntimeError, match="half way"):
        write_then_rename(file, lambda path: (path.write_text("new"), (_ for _ in ()).throw(RuntimeError("half way"))))
    assert file.read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["result.json"]
