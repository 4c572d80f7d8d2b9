"""How every bench measures: check first, then interleaved runs, then the relation to the roofs of this machine.

A case times ours, the reference and torch's own in turn, round after round, so that a change of the machine's clock or
load meets all of them; the figure is the median over the rounds. The roofs (read bandwidth, FMA peak of torch's matrix
product) are measured in the same process.
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

RESULTS: list[Row] = []


@dataclass(frozen=True)
class Case:
    """One line of a bench's table.

    `flops` and `bytes` are what the operation needs at least; the bench's docstring gives the formulas.
    """

    operation: str
    name: str
    flops: float
    bytes: float


@dataclass(frozen=True)
class Row:
    """What was measured. Times in microseconds, each the median over interleaved rounds."""

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


def measure(case: Case, runs: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median seconds per call of each run, interleaved over `rounds` rounds of at least 2 ms each."""
    calls = {}
    for name, run in runs.items():
        start = time.perf_counter()
        run()
        calls[name] = max(1, int(2e-3 / (time.perf_counter() - start + 1e-9)))
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            start = time.perf_counter()
            for _ in range(calls[name]):
                run()
            times[name].append((time.perf_counter() - start) / calls[name])
    return {name: median(values) for name, values in times.items()}


def record(case: Case, seconds: dict[str, float], backend: str) -> Row:
    """Relates the times to the roof: the larger of flops / FMA peak and bytes / read bandwidth is 100 %."""
    ours = seconds["ours"]
    floor = max(case.flops / fma_peak(), case.bytes / read_bandwidth())
    row = Row(
        case.operation,
        case.name,
        ours * 1e6,
        seconds["reference"] * 1e6,
        seconds["torch"] * 1e6,
        case.flops / ours / 1e9,
        case.bytes / ours / 1e9,
        100 * floor / ours,
        seconds["torch"] / ours,
        backend,
        torch.get_num_threads(),
    )
    RESULTS.append(row)
    return row


@functools.cache
def read_bandwidth() -> float:
    """Bytes a second that all threads read from memory: the sum over 256 MiB, far more than the caches hold."""
    data = torch.ones(64 << 20)
    return data.nbytes / min(_seconds(data.sum) for _ in range(5))


@functools.cache
def fma_peak() -> float:
    """FLOP/s of torch's float32 matrix product of 1536 x 1536: 2 n^3 / time, the best of five."""
    a, b = torch.randn(2, 1536, 1536)
    return 2 * 1536**3 / min(_seconds(lambda: a @ b) for _ in range(5))


def _seconds(run: Callable[[], object]) -> float:
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
        f"| {r.percent_of_roof:.0f} | {r.ratio_to_torch:.2f} | {r.reference_us / r.ours_us:.2f} |"
        for r in rows
    ]
    return "\n".join(lines)


def machine() -> dict[str, object]:
    """What the figures depend on."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=_here())
    return {
        "cpu": _cpu_name(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "commit": commit.stdout.strip() or "unknown",
        "backends": qvl_kernels.available_backends(),
        "read_gbytes": round(read_bandwidth() / 1e9, 1),
        "fma_gflops": round(fma_peak() / 1e9, 1),
    }


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()


def _here() -> Path:
    return Path(__file__).resolve().parent


def write_json(path: str | os.PathLike[str]) -> None:
    """All rows so far with the machine and the commit."""
    content = {"machine": machine(), "rows": [asdict(row) for row in RESULTS]}
    Path(path).write_text(json.dumps(content, indent=1) + "\n")
