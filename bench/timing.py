"""How every bench measures: check first, then interleaved runs, then the relation to the roofs of this machine.

A case times ours, the reference, torch's own and the roofs in turn, round after round, so that a change of the
machine's clock or load meets all of them; a figure is the median over the rounds. The roofs are loops of the native
module (`csrc/cpu/roof.cpp`) on the same threads: fused multiply-adds from registers, products of 8-bit integers and of
bfloat16 numbers, and one pass over 256 MiB. Data that fit the caches are read faster than that: more than 100 % of the
roof.
"""

from __future__ import annotations

import functools
import json
import os
import platform
import subprocess
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

import torch

import qvl_kernels
from qvl_kernels import _backends

RESULTS: list[Row] = []


READ_BYTES = 256 << 20
SECONDS_A_CASE = 1.0  # what a case may take, but for three rounds at least


@dataclass(frozen=True)
class Case:
    """One line of a bench's table.

    `flops` and `bytes` are what the operation needs at least; the bench's docstring gives the formulas. Cases of one
    `series` that differ in `length` are a line of the plot.
    """

    operation: str
    name: str
    flops: float
    bytes: float
    series: str = ""
    length: int = 0
    density: float = 0.0
    roof: str = "fma"  # or "int8", or "bf16", which is "fma" without instructions for it: the roof of its FLOPs


@dataclass(frozen=True)
class Row:
    """What was measured. Times in microseconds, each the median over interleaved rounds; reference_us is 0 where the
    reference is too slow to run."""

    operation: str
    name: str
    ours_us: float
    reference_us: float
    torch_us: float
    gflops: float
    gbytes: float
    percent_of_roof: float
    ratio_to_torch: float
    backend: str
    threads: int
    fma_gflops: float
    read_gbytes: float
    series: str
    length: int
    flops: float
    density: float = 0.0  # of sparse attention's pattern, with the time of our own dense kernel on the same shape
    dense_us: float = 0.0
    int8_gops: float = 0.0
    bf16_gflops: float = 0.0  # 0 where the CPU has no instructions for it


def measure(runs: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median seconds per call of each run, interleaved over at most `rounds` rounds of at least 2 ms each. Before a run
    of many calls a quarter as many are not counted: the run before has filled the caches with its own, and a mean of
    cold and warm calls would depend on who that was."""
    calls, total = {}, 0.0
    for name, run in runs.items():
        run()
        once = seconds_of(run)
        calls[name] = max(1, int(2e-3 / (once + 1e-9)))
        total += once * calls[name]
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(min(rounds, max(3, int(SECONDS_A_CASE / total)))):
        for name, run in runs.items():
            for _ in range(calls[name] // 4):
                run()
            start = time.perf_counter()
            for _ in range(calls[name]):
                run()
            times[name].append((time.perf_counter() - start) / calls[name])
    return {name: median(values) for name, values in times.items()}


def record(case: Case, seconds: dict[str, float], backend: str) -> Row:
    """Relates the times to the roof: the larger of flops / FMA peak and bytes / read bandwidth is 100 %."""
    ours = seconds["ours"]
    fma, read = roofs().fma_flops / seconds["fma"], READ_BYTES / seconds["read"]
    int8, bf16 = roofs().int8_ops / seconds["int8"], roofs().bf16_flops / seconds["bf16"]
    peak = {"fma": fma, "int8": int8, "bf16": bf16 or fma}[case.roof]
    row = Row(
        case.operation,
        case.name,
        ours * 1e6,
        seconds.get("reference", 0.0) * 1e6,
        seconds["torch"] * 1e6,
        case.flops / ours / 1e9,
        case.bytes / ours / 1e9,
        100 * max(case.flops / peak, case.bytes / read) / ours,
        seconds["torch"] / ours,
        backend,
        torch.get_num_threads(),
        fma / 1e9,
        read / 1e9,
        case.series,
        case.length,
        case.flops,
        case.density,
        seconds.get("dense", 0.0) * 1e6,
        int8 / 1e9,
        bf16 / 1e9,
    )
    RESULTS.append(row)
    return row


@dataclass(frozen=True)
class Roofs:
    """The loops, and what the arithmetic ones do in a call; the second reads READ_BYTES."""

    fma: Callable[[], object]
    fma_flops: float
    read: Callable[[], object]
    int8: Callable[[], object]
    int8_ops: float
    bf16: Callable[[], object]
    bf16_flops: float

    def runs(self) -> dict[str, Callable[[], object]]:
        return {"fma": self.fma, "read": self.read, "int8": self.int8, "bf16": self.bf16}


@functools.cache
def roofs() -> Roofs:
    """The native module's loops; without one, torch's matrix product and sum, which come close."""
    data = torch.ones(READ_BYTES // 4)
    native = [name for name in qvl_kernels.available_backends() if name.startswith("cpu")]
    if not native:
        a, b = torch.randn(2, 768, 768)
        return Roofs(lambda: a @ b, 2.0 * 768**3, data.sum, lambda: a @ b, 2.0 * 768**3, lambda: None, 0.0)
    module, sink = _backends.module(native[0], "roof"), torch.empty(256)
    return Roofs(
        lambda: module.fma_loop(50_000, sink),
        module.fma_loop(1, sink) * 50_000,
        lambda: module.read_loop(data, sink),
        lambda: module.int8_loop(50_000, sink),
        module.int8_loop(1, sink) * 50_000,
        lambda: module.bf16_loop(20_000, sink),
        module.bf16_loop(1, sink) * 20_000,
    )


def seconds_of(run: Callable[[], object]) -> float:
    """One call."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def table(rows: list[Row]) -> str:
    """The columns of all benches, as Markdown."""
    lines = [
        "| operation | case | backend | time | GFLOP/s | GB/s | % of roof | x torch | x reference |",
        "| --- | --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    lines += [
        f"| {r.operation} | {r.name} | {r.backend} | {r.ours_us:.1f} us | {r.gflops:.1f} | {r.gbytes:.1f} "
        f"| {r.percent_of_roof:.0f} | {r.ratio_to_torch:.2f} | {_times(r.reference_us / r.ours_us)} |"
        for r in rows
    ]
    return "\n".join(lines)


def density_table(rows: list[Row]) -> str:
    """Sparse attention beside dense: how many times faster than our own dense kernel, and how much of 1 / density that
    is; empty without such rows."""
    rows = [row for row in rows if row.dense_us]
    if not rows:
        return ""
    lines = [
        "| sparse_attention | density | time | x own dense | of 1 / density | x torch with the mask |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    lines += [
        f"| {r.name} | {r.density:.4f} | {r.ours_us / 1e3:.2f} ms | {r.dense_us / r.ours_us:.2f} "
        f"| {100 * r.dense_us / r.ours_us * r.density:.0f} % | {r.ratio_to_torch:.2f} |"
        for r in rows
    ]
    return "\n".join(lines)


def _times(ratio: float) -> str:
    return f"{ratio:.2f}" if ratio else "-"


def facts() -> dict[str, object]:
    """What the figures depend on."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=_here())
    return {
        "cpu": _cpu_name(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "commit": commit.stdout.strip() or "unknown",
        "backends": qvl_kernels.available_backends(),
    }


def machine() -> dict[str, object]:
    """The facts, and the roofs measured between the rows."""
    return facts() | {
        "read_gbytes": round(median(row.read_gbytes for row in RESULTS), 1),
        "fma_gflops": round(median(row.fma_gflops for row in RESULTS), 1),
        "int8_gops": round(median(row.int8_gops for row in RESULTS), 1),
        "bf16_gflops": round(median(row.bf16_gflops for row in RESULTS), 1),
    }


def _cpu_name() -> str:
    """Virtual machines often say no more than the brand: family and model tell which core it is."""
    try:
        lines = [line.split(":", 1) for line in Path("/proc/cpuinfo").read_text().splitlines() if ":" in line]
        said = {name.strip(): value.strip() for name, value in reversed(lines)}
        return f"{said['model name']} (family {said['cpu family']}, model {said['model']})"
    except (OSError, KeyError):
        return platform.processor()


def _here() -> Path:
    return Path(__file__).resolve().parent


def write_json(path: str | os.PathLike[str]) -> None:
    """All rows so far with the machine and the commit."""
    content = {"machine": machine(), "rows": [asdict(row) for row in RESULTS]}
    Path(path).write_text(json.dumps(content, indent=1) + "\n")


def write_in(document: str, name: str, content: str) -> None:
    """Replaces what the document has between `<!-- name: begin -->` and `<!-- name: end -->`."""
    path, begin, end = _here().parent / document, f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    text = path.read_text()
    before, after = text.split(begin)[0], text.split(end)[1]
    path.write_text(f"{before}{begin}\n{content}\n{end}{after}")
