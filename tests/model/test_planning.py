"""Plans: predicted bytes against the tensors there are, what is chosen for little memory, weights that come and go."""

import mmap
import os
import subprocess
import sys

import pytest
import torch
from checkpoints import write_checkpoint
from tiny import prompt, tiny_config, tiny_model
from typer.testing import CliRunner

from qvl_model import Qwen3VL, Qwen3VLConfig, memory, paging, planning
from qvl_model.cli import app
from qvl_model.decoding import Decoder
from qvl_model.pack_file import pack_checkpoint
from qvl_model.packing import pack_model
from qvl_model.planning import Use
from qvl_model.vision import by_rows
from qvl_model.weights import PADDING, list_tensors


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("packed")
    (folder / "released").mkdir()
    write_checkpoint(folder / "released", dtype=torch.bfloat16)
    return pack_checkpoint(folder / "released", folder / "int8", "int8")


def everything(model):
    return sum(tensor.nbytes for tensor in model.state_dict().values())


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("weights", planning.FORMATS)
def test_bytes_of_weights_are_those_of_the_tensors(weights, tied):
    config = tiny_config(tied=tied)
    model = tiny_model(config)
    if weights != "fp32":
        pack_model(model, weights)
    model.tie_weights()
    table = model.model.language_model.embed_tokens.weight
    # The head is the table and counts once, or has its own numbers, and of the table a step reads a row. Only a table
    # that loading converts is in memory as a whole.
    converted = weights == "bf16" and not tied
    expected = everything(model) - (table.nbytes // 2 if converted else table.nbytes)
    if weights == "bf16" and tied:
        expected = everything(model) - table.nbytes  # the head is packed here, and was the table
    assert planning.bytes_of_weights(config, weights, "fp32") == expected


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("weights", ["bf16", "int8", "int4"])
def test_bytes_of_a_packed_checkpoint_need_no_model(tmp_path, weights, tied):
    (tmp_path / "released").mkdir()
    write_checkpoint(tmp_path / "released", tied=tied, dtype=torch.bfloat16)
    folder = pack_checkpoint(tmp_path / "released", tmp_path / "packed", weights)
    config = Qwen3VLConfig.from_json(folder / "config.json")
    found = planning.bytes_of_packed(config, list_tensors(folder))
    padding = sum(tensor.nbytes for name, tensor in list_tensors(folder).items() if name.startswith(PADDING))
    assert found == planning.bytes_of_weights(config, weights, "bf16") + padding


@pytest.mark.parametrize("cache", planning.CACHES)
def test_bytes_of_the_cache_are_its_own(cache):
    model = tiny_model()
    made = model.new_cache(1, 50, planning.CACHES[cache])
    assert planning.bytes_of_cache(model.config, cache, Use(50, 0)) == made.nbytes


def test_the_released_model_in_a_laptops_memory():
    """What is known of it: 4.0 GiB of weights in bfloat16, 112 KiB of cache a token."""
    config = Qwen3VLConfig.qwen3_vl_2b()
    chosen = [planning.choose(config, {}, "auto", int(gib * 2**30)) for gib in (6, 4.4, 4, 2.2)]
    assert [plan.weights for plan in chosen] == ["bf16", "bf16", "int8", "int4"]
    assert chosen[0].weight_bytes == pytest.approx(2 * config.num_parameters(), rel=0.01)
    assert chosen[0].cache_bytes == 4096 * 112 * 1024
    assert [plan.cache for plan in chosen] == ["bf16", "int8", "bf16", "int8"]
    with pytest.raises(MemoryError, match=r"weights='int4' takes 2\.09"):
        planning.choose(config, {}, "auto", 1 << 30)
    with pytest.raises(MemoryError, match="weights='int8' takes 2"):
        planning.choose(config, {}, "bf16", int(2.65 * 2**30))


def test_a_packed_checkpoint_larger_than_the_memory_answers_the_same(packed, monkeypatch):
    advised = []
    whole = Qwen3VL.from_pretrained(packed)
    least = min(plan.nbytes for plan in planning._plans(whole.config, list_tensors(packed), "int8", Use()))
    monkeypatch.setattr(paging, "advise", lambda tensors, advice: advised.append(advice))
    budget = least - whole.plan.weight_bytes // 2
    paged = Qwen3VL.from_pretrained(packed, max_memory=budget)
    assert paged.paged
    assert paged.plan.resident == pytest.approx(whole.plan.weight_bytes / 2, abs=2)
    ids = torch.tensor([prompt(9)])
    assert torch.equal(paged.generate(ids, max_new_tokens=6), whole.generate(ids, max_new_tokens=6, cache="int8"))
    assert advised.count(paging._WILLNEED) == advised.count(paging._PAGEOUT) > 0
    assert Decoder(paged, paged.new_cache(1, 4)).recorded is None
    with pytest.raises(MemoryError, match="may be used"):
        Qwen3VL.from_pretrained(packed, max_memory=least - whole.plan.weight_bytes)


def test_pages_given_back_are_read_again(packed):
    model = Qwen3VL.from_pretrained(packed)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for module in model.modules():
        paging.give_back(module)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("rows", [4, 8, 20, 64])
def test_a_picture_in_rows_is_the_picture(rows, grad):
    model = tiny_model().double()
    grid = torch.tensor([[1, 8, 12], [2, 4, 4], [1, 6, 10]])
    pixels = torch.randn(int(grid.prod(-1).sum()), model.config.vision.patch_dim, dtype=torch.float64)
    with torch.set_grad_enabled(grad):
        whole, deepstack = model.model.visual(pixels, grid)
        model.model.visual.rows = rows
        parts, deepstack_parts = model.model.visual(pixels, grid)
    torch.testing.assert_close(parts, whole)
    for a, b in zip(deepstack_parts, deepstack, strict=True):
        torch.testing.assert_close(a, b)


def test_by_rows_never_sees_more():
    seen = []

    def function(x, y):
        seen.append(len(x))
        return (x + y)[::2], (x - y)[::2]

    x, y = torch.randn(2, 10, 3)
    with torch.no_grad():
        a, b = by_rows(function, 4, x, y)
    assert seen == [4, 4, 2]
    assert torch.equal(a, (x + y)[::2])
    assert torch.equal(b, (x - y)[::2])


def test_the_command_explains_the_plan(packed):
    run = CliRunner().invoke(app, ["info", "--model", str(packed), "--max-memory", "1MB"])
    assert "predicted peak of the process for 4,096 tokens" in run.output
    assert "may be used" in run.output
    assert "int8" in run.output
    run = CliRunner().invoke(app, ["info", "--max-memory", "1GB", "--tokens", "100", "--image-size", "320"])
    assert "for 100 tokens and a picture of 312 x 312 pixels" in run.output
    assert "1.0 GiB may be used" in run.output or "953.7 MiB may be used: weights" in run.output


def test_a_wrong_cache_format_is_named():
    with pytest.raises(ValueError, match="cache must be one of fp32, bf16, fp16, int8, got 'int3'"):
        tiny_model().generate(torch.tensor([[1, 2]]), max_new_tokens=2, cache="int3")


def resident_pages(tensor):
    start, length = memory.whole_pages(tensor)
    with open("/proc/self/pagemap", "rb", buffering=0) as stream:
        stream.seek(start // mmap.PAGESIZE * 8)
        entries = torch.frombuffer(bytearray(stream.read(length // mmap.PAGESIZE * 8)), dtype=torch.int64)
    return int((entries < 0).sum())  # the highest bit


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="pages are Linux's")
def test_pages_that_were_only_read_are_unmapped(tmp_path):
    numbers = torch.arange(200_000)
    path = tmp_path / "table"
    path.write_bytes(numbers.numpy().tobytes())
    table = torch.from_file(str(path), shared=False, size=len(numbers), dtype=torch.int64)
    assert torch.equal(table, numbers)
    assert resident_pages(table) > 100
    memory.unmap_read_pages(table)
    assert resident_pages(table) == 0
    assert torch.equal(table, numbers)
    table[70_000] = -1  # the page is a copy now, that only this process has
    memory.unmap_read_pages(table)
    assert resident_pages(table) > 100
    assert table[70_000] == -1


FAULTS_OF_ALLOCATIONS = """
import resource, torch
from qvl_model import memory
memory.keep_freed()
for turn in range(8):  # glibc finds places for aligned blocks after a few turns
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    blocks = [torch.ones(5 << 20) for _ in range(6)]  # 120 MiB, 30720 pages
    del blocks
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
for give_back in (lambda: None, memory.give_back_freed):
    give_back()
    print(open("/proc/self/statm").read().split()[1])
"""


@pytest.mark.skipif(memory.glibc() is None, reason="glibc's")
def test_freed_memory_is_kept_until_it_is_given_back():
    def faults_and_resident_pages(**environment):
        run = [sys.executable, "-c", FAULTS_OF_ALLOCATIONS]
        done = subprocess.run(run, env=os.environ | environment, capture_output=True, text=True, check=True)
        return [int(number) for number in done.stdout.split()]

    faults, kept, given_back = faults_and_resident_pages()
    assert faults < 1_000
    assert kept - given_back > 30_000
    faults, *_ = faults_and_resident_pages(MALLOC_TRIM_THRESHOLD_="131072")  # what the user says goes before
    assert faults > 20_000


@pytest.mark.parametrize("tensor", [torch.arange(10_000), torch.arange(3), torch.arange(0)])
def test_a_tensor_in_memory_is_not_unmapped(tensor):
    kept = tensor.clone()
    memory.unmap_read_pages(tensor)
    assert torch.equal(tensor, kept)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="pages are Linux's")
def test_a_prompt_leaves_no_pages_of_the_table(packed):
    model = Qwen3VL.from_pretrained(packed)
    table = model.model.language_model.embed_tokens.weight
    ids = torch.tensor([prompt(80)])
    with torch.no_grad():
        model(ids[:, :8])
        assert resident_pages(table) > 0
        first = model(ids).logits
        assert resident_pages(table) == 0
        assert torch.equal(model(ids).logits, first)
