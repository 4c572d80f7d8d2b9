"""What `qvl info` prints: versions, the machine, the kernels that run here, and the sizes of a model."""

from __future__ import annotations

import importlib.metadata
import math
import os
import platform
import sys
from collections.abc import Iterable
from pathlib import Path

import torch

import qvl_kernels

from .config import Qwen3VLConfig
from .memory import available_memory
from .planning import FORMATS, Plan, Use, choose, plan_for
from .weights import CONFIG_NAME, INDEX_NAME, WEIGHTS_NAME, list_tensors

_LIBRARIES = ("torch", "numpy", "safetensors", "tokenizers", "huggingface_hub", "jinja2", "pillow", "av", "triton")


def describe_versions() -> str:
    """qvl, Python and the libraries that it stands on, on one line."""
    entries = [f"qvl {version('qvl')}", f"Python {platform.python_version()}"]
    entries += [f"{name} {version(name)}" for name in _LIBRARIES]
    return ", ".join(entries)


def version(distribution: str) -> str:
    """The installed version of a distribution."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def describe_machine() -> list[tuple[str, str]]:
    """(name, value) of the processor, its instruction set as torch sees it, threads, memory and GPUs."""
    capability = torch.backends.cpu.get_cpu_capability()
    cpu = torch.device("cpu")
    return [
        ("processor", f"{_processor_name()}, {os.cpu_count()} logical cores"),
        ("instructions", f"{capability} (what torch and these kernels use; ATEN_CPU_CAPABILITY can lower it)"),
        ("threads", f"{torch.get_num_threads()} (OMP_NUM_THREADS, --threads)"),
        ("free memory", size(available_memory(cpu))),
        ("GPU", _gpus()),
    ]


def _processor_name() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as stream:
            return next(line.split(":", 1)[1].strip() for line in stream if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _gpus() -> str:
    if not torch.cuda.is_available():
        return "none that torch can use"
    found = [torch.cuda.get_device_properties(number) for number in range(torch.cuda.device_count())]
    return ", ".join(f"{gpu.name} (sm_{gpu.major}{gpu.minor}, {size(gpu.total_memory)})" for gpu in found)


def describe_model(folder: Path) -> list[tuple[str, str]]:
    """(name, value) of a checkpoint: its shape, and what it takes in memory. Reads headers only, no weights."""
    config = Qwen3VLConfig.from_json(folder / CONFIG_NAME)
    text, vision = config.text, config.vision
    count = config.num_parameters()
    token = 2 * text.num_hidden_layers * text.num_key_value_heads * text.head_dim
    return [
        ("model", str(folder)),
        ("parameters", f"{count:,}"),
        ("on disk", _on_disk(folder)),
        (
            "cache",
            f"{size(4 * token)} fp32, {size(2 * token)} bf16, {size(token + 4 * token // text.head_dim)} int8 a token",
        ),
        (
            "text",
            f"{text.num_hidden_layers} layers, {text.num_attention_heads} query and {text.num_key_value_heads} KV "
            f"heads of {text.head_dim}, hidden {text.hidden_size}, vocabulary {text.vocab_size:,}, "
            f"{text.max_position_embeddings:,} positions",
        ),
        (
            "vision",
            f"{vision.depth} blocks, {vision.num_heads} heads, hidden {vision.hidden_size}, patches of "
            f"{vision.patch_size} pixels, DeepStack from blocks {list(vision.deepstack_visual_indexes)}",
        ),
    ]


def describe_plans(folder: Path, budget: int, use: Use) -> str:
    """What each format of the weights takes, and the plan that `from_pretrained` would choose for `budget` bytes."""
    config = Qwen3VLConfig.from_json(folder / CONFIG_NAME)
    there = any((folder / name).is_file() for name in (WEIGHTS_NAME, INDEX_NAME))
    stored = list_tensors(folder) if there else {}
    formats = (config.weights,) if config.weights else FORMATS
    plans = [plan_for(config, stored, name, use) for name in formats]
    try:
        chosen = choose(config, stored, "auto", budget, use)
        how = f"weights {chosen.weights}, cache {chosen.cache}, {chosen.prefill_chunk} tokens of a prompt and "
        how += f"{chosen.image_rows} patches of a picture at a time"
        if chosen.resident is not None:
            how += f", {size(chosen.resident)} of the weights in memory, the others read again for every token"
        plans += [chosen] if chosen not in plans else []
    except MemoryError as error:
        how = str(error)
    side = math.isqrt(use.patches) * config.vision.patch_size
    return (
        f"predicted peak of the process for {use.tokens:,} tokens and a picture of {side} x {side} pixels\n"
        f"{_plan_table(plans)}\n{size(budget)} may be used: {how}"
    )


def _plan_table(plans: Iterable[Plan]) -> str:
    rows: list[tuple[str, ...]] = [("weights", "", "cache", "", "prompt", "picture", "Python and torch", "peak")]
    for plan in plans:
        in_memory = plan.weight_bytes if plan.resident is None else plan.resident
        parts = (in_memory, plan.cache_bytes, plan.prompt_bytes, plan.picture_bytes, plan.peak - plan.nbytes, plan.peak)
        texts = [size(part) for part in parts]
        rows.append((plan.weights, texts[0], plan.cache, *texts[1:]))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join("  ".join(f"{text:<{width}}" for text, width in zip(row, widths)).rstrip() for row in rows)


def _on_disk(folder: Path) -> str:
    if not any((folder / name).is_file() for name in (WEIGHTS_NAME, INDEX_NAME)):
        return "the weights are not here"
    stored = list_tensors(folder).values()
    return f"{size(sum(tensor.nbytes for tensor in stored))}, {', '.join(sorted({t.dtype for t in stored}))}"


def describe_kernels() -> str:
    """Which backends run here, and why each other does not."""
    return str(qvl_kernels.explain())


def peak_memory() -> int:
    """The most bytes that this process had in memory at any time; 0 where the system does not tell.

    Linux says so of the program that runs in `/proc`; its `ru_maxrss` is at least what the process that started it had.
    """
    status = Path("/proc/self/status")
    if status.is_file():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return 1024 * int(line.split()[1])
    try:
        import resource
    except ImportError:
        return 0
    largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return largest if sys.platform == "darwin" else 1024 * largest


def size(nbytes: int) -> str:
    """1536 -> "1.5 KiB"."""
    amount, units = float(nbytes), ("B", "KiB", "MiB", "GiB", "TiB")
    for unit in units[:-1]:
        if amount < 1024:
            return f"{amount:.0f} {unit}" if unit == "B" else f"{amount:.1f} {unit}"
        amount /= 1024
    return f"{amount:.1f} {units[-1]}"


def aligned(rows: Iterable[tuple[str, str]]) -> str:
    """Two columns."""
    rows = list(rows)
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)
