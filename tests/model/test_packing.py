"""Packed models: what they say is what their dequantised matrices say, on disk and in memory."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from checkpoints import write_checkpoint
from tiny import IMAGE, images, prompt, tiny_config, tiny_model
from torch import nn

from qvl_kernels import PackedLinear
from qvl_model import Qwen3VL, Qwen3VLConfig, planning
from qvl_model.pack_file import CHECKSUMS_NAME, pack_checkpoint, verify
from qvl_model.text import TextAttention
from qvl_model.vision import VisionAttention
from qvl_model.weights import CheckpointError, list_tensors, read_header, save_pretrained

FORMATS = ["bf16", "int8", "int4"]


@pytest.fixture(autouse=True)
def _no_gradients():
    with torch.no_grad():
        yield


def inputs(model):
    pixels, grids = images(model.config, [(1, 4, 6)])
    ids = torch.tensor([prompt(2, ("image", 1, 4, 6), 9)])
    return {
        "input_ids": ids.where(ids != IMAGE, model.config.image_token_id),
        "pixel_values": pixels,
        "image_grid_thw": grids,
    }


def unpacked(model: Qwen3VL, folder: Path) -> Qwen3VL:
    """The released modules with the very numbers of a packed model's matrices."""
    plain = Qwen3VL.from_pretrained(folder, weights="fp32")
    state = {}
    for name, module in model.named_modules():
        if isinstance(module, PackedLinear):
            dense = module.packed.dequantize()
            parent, _, leaf = name.rpartition(".")
            parts = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}.get(
                leaf, [leaf]
            )
            sizes = [plain.get_submodule(f"{parent}.{part}".lstrip(".")).out_features for part in parts]
            for part, rows in zip(parts, dense.split(sizes)):
                state[f"{parent}.{part}.weight".lstrip(".")] = rows
    table = plain.model.language_model.embed_tokens
    plain.lm_head = nn.Linear(*reversed(plain.lm_head.weight.shape), bias=False)  # its own numbers, where it was tied
    plain.lm_head.weight = nn.Parameter(table.weight.clone())
    _, unexpected = plain.load_state_dict(state, strict=False)
    assert not unexpected
    return plain


@pytest.mark.parametrize("precision", ["highest", "medium"])
@pytest.mark.parametrize("weights", FORMATS)
@pytest.mark.parametrize("tied", [True, False])
def test_a_packed_model_is_the_model_of_its_matrices(tmp_path, weights, tied, precision):
    write_checkpoint(tmp_path, tied=tied, dtype=torch.bfloat16)
    packed = Qwen3VL.from_pretrained(tmp_path, weights=weights, precision=precision)
    assert not any(type(module) is nn.Linear for module in packed.modules())
    assert packed.dtype == torch.float32
    plain = unpacked(packed, tmp_path)
    expected, ours = (model(**inputs(model)).logits for model in (plain, packed))
    # The integer kernels round both factors to steps of this part of the largest; a text goes through every matrix.
    step = {"bf16": 2.0**-23, "int8": 1 / 65534, "int4": 1 / 4094}[weights]
    if precision == "medium":
        step = {"bf16": 1 / 512, "int8": 1 / 254, "int4": 1 / 127}[weights]
    matrices = sum(isinstance(module, PackedLinear) for module in packed.modules())
    assert (ours - expected).norm() <= matrices * step * expected.norm()
    if weights == "bf16" and precision == "highest":
        exact = Qwen3VL.from_pretrained(tmp_path, weights="fp32")
        assert (ours - exact(**inputs(exact)).logits).norm() <= 1e-5 * expected.norm()


@pytest.mark.parametrize("weights", FORMATS)
@pytest.mark.parametrize("tied", [True, False])
def test_packed_on_disk_is_packed_in_memory(tmp_path, weights, tied):
    source, out = tmp_path / "source", tmp_path / "out"
    write_checkpoint(source, tied=tied, dtype=torch.bfloat16)
    written: list[str] = []
    assert pack_checkpoint(source, out, weights, written.append) == out
    # Not "medium": bf16 in memory keeps the checkpoint's matrices apart, and a last bit of theirs can move a rounded x.
    again = Qwen3VL.from_pretrained(out, precision="highest")
    direct = Qwen3VL.from_pretrained(source, weights=weights, precision="highest")
    assert again.config.weights == weights
    for name, tensor in again.state_dict().items():
        if name in direct.state_dict():
            assert torch.equal(tensor, direct.state_dict()[name]), name
    assert (again(**inputs(again)).logits - direct(**inputs(direct)).logits).abs().max() <= 1e-5
    assert verify(out) == len(set(written)) == len(written)
    assert sorted(path.name for path in out.iterdir() if "part" in path.name) == []
    with pytest.raises(ValueError, match=f"is packed as {weights}"):
        Qwen3VL.from_pretrained(out, weights="fp32")
    with pytest.raises(ValueError, match="is packed already"):
        pack_checkpoint(out, tmp_path / "twice", "int8")


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs Linux' /proc")
def test_a_packed_file_is_mapped_aligned_and_in_order(tmp_path):
    source, out = tmp_path / "source", tmp_path / "out"
    write_checkpoint(source, dtype=torch.bfloat16)
    pack_checkpoint(source, out, "int8")
    file = (out / "model.safetensors").resolve()
    model = Qwen3VL.from_pretrained(out)
    lines = Path("/proc/self/maps").read_text().splitlines()
    ranges = [[int(x, 16) for x in line.split()[0].split("-")] for line in lines if line.endswith(str(file))]
    places = []
    for name, tensor in model.state_dict().items():
        start = tensor.data_ptr()
        assert any(low <= start and start + tensor.nbytes <= high for low, high in ranges), f"{name} was copied"
        assert start % 64 == 0, name
        places.append(start)
    assert places == sorted(places)


def test_an_interrupted_run_goes_on(tmp_path):
    source, out, fresh = tmp_path / "source", tmp_path / "out", tmp_path / "fresh"
    write_checkpoint(source, dtype=torch.bfloat16)
    pack_checkpoint(source, fresh, "int8")
    names: list[str] = []

    def stop_at_20(name: str) -> None:
        names.append(name)
        if len(names) == 20:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pack_checkpoint(source, out, "int8", stop_at_20)
    assert not (out / "model.safetensors").exists()
    with pytest.raises(FileNotFoundError):
        Qwen3VL.from_pretrained(out)
    more: list[str] = []
    pack_checkpoint(source, out, "int8", more.append)
    assert 0 < len(more) < len(read_header(fresh / "model.safetensors"))
    assert set(names[:10]).isdisjoint(more), "what was done is not done again"
    assert (out / "model.safetensors").read_bytes() == (fresh / "model.safetensors").read_bytes()
    assert json.loads((out / CHECKSUMS_NAME).read_text()) == json.loads((fresh / CHECKSUMS_NAME).read_text())


def test_damage_is_found(tmp_path):
    source, out = tmp_path / "source", tmp_path / "out"
    write_checkpoint(source, dtype=torch.bfloat16)
    pack_checkpoint(source, out, "int4")
    file = out / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-70] ^= 1
    file.write_bytes(data)
    with pytest.raises(CheckpointError, match="does not have its checksum"):
        verify(out)
    (out / CHECKSUMS_NAME).unlink()
    with pytest.raises(FileNotFoundError, match="`qvl pack` writes it"):
        verify(out)


def test_auto_takes_what_fits(tmp_path):
    text, vision = {"hidden_size": 256, "intermediate_size": 512}, {"out_hidden_size": 256}
    save_pretrained(tiny_model(tiny_config(tied=True, text=text, vision=vision)).bfloat16(), tmp_path)
    least = {name: smallest(tmp_path, name) for name in ("bf16", "int8", "int4")}
    for budget, format in ((least["bf16"], "bf16"), (least["bf16"] - 1, "int8"), (least["int4"], "int4")):
        model = Qwen3VL.from_pretrained(tmp_path, max_memory=budget)
        assert model.plan.weights == format
        assert model.model.language_model.layers[0].mlp.down_proj.format == format
    with pytest.raises(MemoryError, match="may be used"):
        Qwen3VL.from_pretrained(tmp_path, max_memory=least["int4"] - 1)
    with pytest.raises(MemoryError, match="weights='int8' takes"):
        Qwen3VL.from_pretrained(tmp_path, weights="bf16", max_memory=least["bf16"] - 1)


def smallest(folder, weights):
    """Bytes of the smallest plan with these weights."""
    config, stored = Qwen3VLConfig.from_json(folder / "config.json"), list_tensors(folder)
    return min(plan.nbytes for plan in planning._plans(config, stored, weights, planning.Use()))


def test_gradients_pass_through_packed_matrices(tmp_path):
    write_checkpoint(tmp_path, dtype=torch.bfloat16)
    model = Qwen3VL.from_pretrained(tmp_path, weights="int8")
    embeds = model.embed_inputs(torch.tensor([prompt(5)])).embeds.clone().requires_grad_()
    with torch.enable_grad():
        from dataclasses import replace

        prepared = replace(model.embed_inputs(torch.tensor([prompt(5)])), embeds=embeds)
        model.forward_embeds(prepared).logits.square().mean().backward()
    assert embeds.grad is not None
    assert embeds.grad.abs().sum() > 0


def test_a_packed_model_cannot_be_saved_as_a_released_one(tmp_path):
    write_checkpoint(tmp_path / "source", dtype=torch.bfloat16)
    model = Qwen3VL.from_pretrained(tmp_path / "source", weights="int8")
    save_pretrained(model, tmp_path / "saved")
    again = Qwen3VL.from_pretrained(tmp_path / "saved")
    assert torch.equal(again(**inputs(again)).logits, model(**inputs(model)).logits)


@pytest.mark.parametrize("weights", ["fp32", "bf16", "int8"])
def test_precision_is_that_of_products_and_of_attention(tmp_path, weights):
    """A prompt of more keys than attention leaves exact: apart by what integers are off, and by nothing in float32."""
    write_checkpoint(tmp_path, dtype=torch.bfloat16)
    ids = torch.tensor([prompt(512)])
    medium, highest = (
        Qwen3VL.from_pretrained(tmp_path, weights=weights, precision=precision) for precision in ("medium", "highest")
    )
    kinds = {
        module.kind.precision for module in medium.modules() if isinstance(module, (TextAttention, VisionAttention))
    }
    assert kinds == {"highest" if weights == "fp32" else "medium"}
    rounded, exact = medium(ids).logits, highest(ids).logits
    assert (rounded - exact).norm() <= (0 if weights == "fp32" else 0.05) * exact.norm()
    if weights == "bf16" and torch.backends.cpu.get_cpu_capability() == "AVX2":
        assert not torch.equal(rounded, exact)
