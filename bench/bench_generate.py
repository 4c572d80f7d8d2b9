"""Whole models: prompts, generation, pictures, time to load, peak memory; ours in each format, transformers, and
llama.cpp on a GGUF file of the same shape.

    python bench/bench_generate.py --folder DIR [--engine qvl:int8 ...] [--llama-python PYTHON] [--json OUT]

DIR is filled on the first run: a checkpoint of the released 2B model's shape with random weights (4.3 GB), packed
copies of it (2.6 and 2.1 GB), and GGUF files of its text model, where PYTHON has llama-cpp-python and gguf. Each engine
runs in a process of its own, so that its peak memory is its own, one after the other, and the roofs (FMA, reads) are
measured in each process of ours. Tests are named as in `qvl_model/benchmark.py`. transformers and llama.cpp compute the
same prompts; behind a long text transformers' cache is filled with random numbers as ours is, llama.cpp computes it.

As a bench of `pytest bench`: the shipped model's prompt and picture, ours beside transformers where it is installed.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
from generate_workers import TESTS

WORKERS = Path(__file__).with_name("generate_workers.py")
ENGINES = (
    "qvl:bf16",
    "qvl:int8",
    "qvl:int4",
    "transformers:fp32",
    "transformers:bf16",
    "llama.cpp:BF16",
    "llama.cpp:Q8_0",
    "llama.cpp:Q4_0",
    "llama.cpp:Q4_K_M",
)


def make_checkpoint(folder: Path) -> Path:
    """Random weights of the released shape, as the released files are: bfloat16 safetensors and a configuration."""
    import torch

    from qvl_model import Qwen3VL, Qwen3VLConfig
    from qvl_model.weights import save_pretrained

    to = folder / "2b"
    if not (to / "config.json").is_file():
        torch.manual_seed(0)
        with torch.device("meta"):
            model = Qwen3VL(Qwen3VLConfig.qwen3_vl_2b(), dtype=torch.bfloat16)
        model.to_empty(device="cpu")
        model.tie_weights()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                drawn = torch.empty(parameter.shape).normal_(std=0.02) if parameter.ndim > 1 else None
                parameter.copy_(drawn if drawn is not None else torch.full_like(parameter, float("bias" not in name)))
        save_pretrained(model, to)
    return to


def prepare(folder: Path, engine: str, llama_python: str) -> None:
    """Makes the files that an engine reads."""
    kind, _, format = engine.partition(":")
    checkpoint = make_checkpoint(folder)
    if kind == "qvl" and not (folder / format / "config.json").is_file():
        from qvl_model.pack_file import pack_checkpoint

        start = time.perf_counter()
        pack_checkpoint(checkpoint, folder / format, format)
        print(f"{engine}: packed in {time.perf_counter() - start:.0f} s", file=sys.stderr)
    if kind == "llama.cpp" and not (folder / f"{format}.gguf").is_file():
        subprocess.run([llama_python, WORKERS, folder, f"gguf:{format}"], check=True)


def generation_table(results: dict[str, dict]) -> str:
    """Markdown: one row for each engine."""
    lines = [
        "| engine | pp512 | tg32 | tg32 @ d4096 | image 448 | image 1024 | load | peak memory |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for engine, found in results.items():
        speeds = [f"{found[name]:.1f}" if name in found else "-" for name in TESTS if not name.startswith("image")]
        pictures = [f"{found[name]:.2f} s" if name in found else "-" for name in TESTS if name.startswith("image")]
        memory = f"{found['peak_bytes'] / 2**30:.2f} GiB"
        lines.append("| " + " | ".join([engine, *speeds, *pictures, f"{found['load_s']:.2f} s", memory]) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--folder", type=Path, required=True, help="where the models are made (10 to 25 GB)")
    parser.add_argument("--engine", action="append", help=f"one of {', '.join(ENGINES)}; repeatable; default all")
    parser.add_argument("--llama-python", default=sys.executable, help="a Python with llama-cpp-python and gguf")
    parser.add_argument("--json", type=Path, help="write the results here")
    arguments = parser.parse_args()
    results: dict[str, dict] = {}
    for engine in arguments.engine or ENGINES:
        prepare(arguments.folder, engine, arguments.llama_python)
        python = arguments.llama_python if engine.startswith("llama") else sys.executable
        run = subprocess.run([python, WORKERS, arguments.folder, engine], stdout=subprocess.PIPE, text=True)
        if run.returncode:
            print(f"{engine}: failed with {run.returncode}", file=sys.stderr)
            continue
        results[engine] = json.loads(run.stdout.splitlines()[-1])
        print(f"{engine}: {results[engine]}", file=sys.stderr)
        if arguments.json:
            arguments.json.write_text(json.dumps(results, indent=1) + "\n")
    print(generation_table(results))


@pytest.mark.parametrize("what", ["prompt of 256 tokens", "picture of 348 x 348"])
def bench_shipped_model(compare, what):
    """The shipped model in float32, ours beside transformers' on the same weights."""
    import torch
    from timing import Case

    from qvl_model import Qwen3VL
    from qvl_model.cli import SHIPPED_MODEL

    transformers = pytest.importorskip("transformers")
    ours = Qwen3VL.from_pretrained(SHIPPED_MODEL, weights="fp32")
    peer = transformers.Qwen3VLForConditionalGeneration.from_pretrained(SHIPPED_MODEL, dtype=torch.float32).eval()
    if what.startswith("prompt"):
        rows, layers = 256, ours.model.language_model.layers
        ids = torch.arange(rows)[None] % 17 + 300  # none of them special
        runs = lambda: ours(ids, logits_to_keep=1).logits, lambda: peer(input_ids=ids, logits_to_keep=1).logits
    else:
        side = 348 // ours.config.vision.patch_size // 2 * 2
        rows, layers = side * side, ours.model.visual.blocks
        pixels, grid = torch.randn(rows, ours.config.vision.patch_dim), torch.tensor([[1, side, side]])
        runs = (
            lambda: ours.model.visual(pixels, grid)[0],
            lambda: peer.model.visual(pixels, grid_thw=grid).pooler_output,
        )
    matrices = sum(parameter.numel() for parameter in layers.parameters() if parameter.ndim > 1)
    case = Case("qvl_model", f"shipped, {what}", 2 * rows * matrices, 4 * matrices)
    compare(case, runs[0], None, runs[1], 1e-4)


if __name__ == "__main__":
    main()
