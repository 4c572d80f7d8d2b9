"""Checkpoints on disk: what is loaded is what was saved, mapped and not copied; saving is atomic."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from checkpoints import write_checkpoint
from tiny import prompt

from qvl_model import Qwen3VL, Qwen3VLConfig, planning
from qvl_model.memory import available_memory, parse_bytes, pick_device
from qvl_model.weights import list_tensors, save_pretrained


def assert_same_parameters(loaded: Qwen3VL, written: Qwen3VL) -> None:
    ours, theirs = loaded.state_dict(), written.state_dict()
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert torch.equal(tensor.float(), theirs[name].float()), name


def mapped_ranges(file: Path) -> list[tuple[int, int]]:
    """The address ranges of this process that are pages of `file`."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    ranges = [line.split()[0].split("-") for line in lines if line.endswith(str(file))]
    return [(int(start, 16), int(end, 16)) for start, end in ranges]


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("shards", [1, 3])
def test_a_checkpoint_loads_complete(tmp_path, tied, shards):
    written = write_checkpoint(tmp_path, tied=tied, shards=shards)
    model = Qwen3VL.from_pretrained(tmp_path)
    assert_same_parameters(model, written)
    assert not model.training
    assert (model.lm_head.weight is model.model.language_model.embed_tokens.weight) == tied
    assert model.processor_source == str(tmp_path)


def test_a_tied_head_may_be_stored_alone_or_twice(tmp_path):
    from safetensors.torch import load_file, save_file

    written = write_checkpoint(tmp_path)
    file = tmp_path / "model.safetensors"
    embedding = "model.language_model.embed_tokens.weight"
    tensors = load_file(file)
    save_file({**tensors, "lm_head.weight": tensors[embedding].clone()}, file)
    assert_same_parameters(Qwen3VL.from_pretrained(tmp_path), written)
    tensors["lm_head.weight"] = tensors.pop(embedding)
    save_file(tensors, file)
    assert_same_parameters(Qwen3VL.from_pretrained(tmp_path), written)


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs Linux' /proc")
def test_parameters_are_the_pages_of_the_file(tmp_path):
    write_checkpoint(tmp_path)
    file = (tmp_path / "model.safetensors").resolve()
    before = file.read_bytes()
    model = Qwen3VL.from_pretrained(tmp_path)
    ranges = mapped_ranges(file)
    for name, parameter in model.named_parameters():
        start, end = parameter.data_ptr(), parameter.data_ptr() + parameter.nbytes
        assert any(low <= start and end <= high for low, high in ranges), f"{name} was copied"
    with torch.no_grad():
        model.lm_head.weight.zero_()
    assert file.read_bytes() == before, "the mapping must be private: training must not change the checkpoint"


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs Linux' /proc")
def test_converted_parameters_leave_nothing_of_the_file_in_memory(tmp_path):
    write_checkpoint(tmp_path, dtype=torch.bfloat16)
    model = Qwen3VL.from_pretrained(tmp_path, weights="fp32")
    assert mapped_ranges((tmp_path / "model.safetensors").resolve()) == []
    assert model.dtype == torch.float32


@pytest.mark.parametrize(
    ("stored", "weights", "loaded"),
    [
        (torch.float32, "auto", torch.float32),
        (torch.bfloat16, "auto", torch.bfloat16),
        (torch.float32, "bf16", torch.bfloat16),
        (torch.bfloat16, "fp32", torch.float32),
    ],
)
def test_dtypes(tmp_path, stored, weights, loaded):
    written = write_checkpoint(tmp_path, dtype=stored)
    model = Qwen3VL.from_pretrained(tmp_path, weights=weights)
    text = model.model.language_model
    matrices = text.embed_tokens.weight, text.layers[0].mlp.down_proj.weight, model.lm_head.weight
    assert {matrix.dtype for matrix in matrices} == {loaded}
    assert model.dtype == torch.float32, "activations"
    packed = loaded == torch.bfloat16  # matrices and table; what is small keeps its digits
    for name, tensor in model.state_dict().items():
        expected = written.state_dict()[name]
        rounded = not packed or tensor.dtype == torch.bfloat16
        assert torch.equal(tensor.float(), (expected.to(loaded) if rounded else expected).float()), name


def test_auto_takes_bf16_where_fp32_does_not_fit(tmp_path):
    write_checkpoint(tmp_path)
    config, stored = Qwen3VLConfig.from_json(tmp_path / "config.json"), list_tensors(tmp_path)
    fp32 = min(plan.nbytes for plan in planning._plans(config, stored, "fp32", planning.Use()))
    for budget, dtype in ((fp32, torch.float32), (fp32 - 1, torch.bfloat16)):
        assert Qwen3VL.from_pretrained(tmp_path, max_memory=budget).lm_head.weight.dtype == dtype
    with pytest.raises(MemoryError, match="weights='bf16' takes"):
        Qwen3VL.from_pretrained(tmp_path, weights="fp32", max_memory=fp32 - 1)


def test_both_sides_load_the_same_checkpoint(tmp_path):
    from transformers import Qwen3VLForConditionalGeneration

    write_checkpoint(tmp_path, shards=2)
    theirs = Qwen3VLForConditionalGeneration.from_pretrained(tmp_path).eval()
    ours = Qwen3VL.from_pretrained(tmp_path)
    ids = torch.tensor([prompt(20)])
    with torch.no_grad():
        expected = theirs(input_ids=ids).logits
        assert (ours(ids).logits - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_saved_and_read_back(tmp_path):
    source, target = tmp_path / "source", tmp_path / "a" / "target"
    written = write_checkpoint(source, dtype=torch.bfloat16)
    save_pretrained(written, target)
    again = Qwen3VL.from_pretrained(target)
    assert again.config == written.config
    assert_same_parameters(again, written)
    assert sorted(path.name for path in target.iterdir()) == ["config.json", "model.safetensors"]
    save_pretrained(Qwen3VL.from_pretrained(target, weights="fp32"), target)  # over the very file that may be mapped
    assert json.loads((target / "config.json").read_text())["dtype"] == "float32"
    assert_same_parameters(Qwen3VL.from_pretrained(target), written.float())


def test_a_saved_checkpoint_is_as_readable_as_any_new_file(tmp_path):
    save_pretrained(write_checkpoint(tmp_path / "source"), tmp_path / "saved")
    (tmp_path / "new").touch()
    expected = (tmp_path / "new").stat().st_mode
    assert {path.stat().st_mode for path in (tmp_path / "saved").iterdir()} == {expected}


def test_a_save_that_fails_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    written = write_checkpoint(tmp_path)

    def full_disk(tensors, file, metadata):
        Path(file).write_bytes(b"half of it")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("qvl_model.weights.save_file", full_disk)
    files = sorted(path.name for path in tmp_path.iterdir())
    with pytest.raises(OSError, match=r"the checkpoint cannot be written here \(No space left on device\)"):
        save_pretrained(written, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == files
    assert_same_parameters(Qwen3VL.from_pretrained(tmp_path), written)


@pytest.mark.parametrize(
    ("text", "expected"),
    [(7, 7), ("7", 7), ("900MB", 900_000_000), ("1.5GiB", 3 << 29), ("2 kb", 2000), ("3B", 3), ("1T", 10**12)],
)
def test_sizes(text, expected):
    assert parse_bytes(text) == expected


@pytest.mark.parametrize("text", ["", "GB", "-1", 0, "1.5.2MB", "12 apples"])
def test_sizes_that_are_none(text):
    with pytest.raises(ValueError, match="max_memory: expected bytes or a size"):
        parse_bytes(text)


def test_devices():
    assert pick_device("cpu", 0) == torch.device("cpu")
    assert 0 < available_memory(torch.device("cpu")) < 1 << 50
    if not torch.cuda.is_available():
        assert pick_device("auto", 0) == torch.device("cpu")
        with pytest.raises(RuntimeError, match="device='cuda:0': torch finds no CUDA device here"):
            pick_device("cuda:0", 0)
