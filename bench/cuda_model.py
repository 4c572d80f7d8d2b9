"""A roofline estimate of CUDA kernels on Pascal GPUs from what the PTX interpreter counted: a model, not a measurement.

    python bench/cuda_model.py rms_norm

    time = launch + max(DRAM bytes / bandwidth, L2 bytes / bandwidth, issue cycles / clock, shared passes / clock)

* DRAM bytes: distinct 32-byte sectors, each moved once. L2 bytes: the sectors of each warp's access.
* Issue cycles: an SM of compute capability 6.1 has 4 schedulers. Each issues one warp instruction a cycle at best, to
  32 lanes of fp32 or int; special functions have 8 lanes a scheduler, fp16 arithmetic 1/2, fp64 1.
* What is not full costs: blocks go to SMs in waves (the last may be part empty), and DRAM needs bytes in flight
  (Little's law): resident warps, each with one load under way, must cover latency x bandwidth, or the bandwidth scales
  down; the bound is then called latency. Kernels with several loads under way do better.

PTX is not machine code: the assembler removes moves and folds addresses, so issue cycles are an upper estimate.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import torch  # noqa: E402
from cuda_images import cuda_module, interpret, kernel_report  # noqa: E402
from ptx import Counts  # noqa: E402


@dataclass(frozen=True)
class Gpu:
    """What the model knows of a GPU. Latency is that of DRAM; L2 bandwidth is 32 bytes a cycle and SM."""

    name: str
    sms: int
    tflops: float  # fp32, an FMA counted twice
    dram: float  # GB/s
    latency: float = 450e-9

    @property
    def clock(self) -> float:
        """Hz at which the SMs reach `tflops`: 128 FMA a cycle each."""
        return self.tflops * 1e12 / (256 * self.sms)

    @property
    def l2(self) -> float:
        """Bytes a second."""
        return 32 * self.sms * self.clock


GPUS = (Gpu("MX250", 3, 1.2, 48), Gpu("GTX 1080 Ti", 28, 11.3, 484), Gpu("P40", 30, 11.8, 347))
LAUNCH = 3e-6  # s: from one kernel of a stream to the next

# An SM of compute capability 6.1.
REGISTERS, WARPS, BLOCKS, SHARED_BYTES = 65536, 64, 32, 96 * 1024
WARP_REGISTER_UNIT, SHARED_UNIT = 256, 256
CYCLES = {"special": 4, "fp16": 64, "fp64": 32}  # of a scheduler for a warp instruction; 1 for the rest
FREE = ("param",)  # constant-bank operands of other instructions


def resident_blocks(threads: int, registers: int, shared_bytes: int) -> int:
    """Blocks that one SM holds at once."""
    warps = -(-threads // 32)
    by_registers = REGISTERS // (-(-registers * 32 // WARP_REGISTER_UNIT) * WARP_REGISTER_UNIT) // warps
    shared = -(-shared_bytes // SHARED_UNIT) * SHARED_UNIT
    by_shared = SHARED_BYTES // shared if shared else BLOCKS
    return min(BLOCKS, WARPS // warps, by_registers, by_shared)


@dataclass(frozen=True)
class Estimate:
    """Seconds, what bounds them, the share of warps resident, and the share of DRAM's bandwidth that is used."""

    seconds: float
    bound: str
    occupancy: float
    dram_share: float


def estimate(gpu: Gpu, plan: Any, counts: Counts) -> Estimate:
    """The time of one launch."""
    resources = kernel_report(plan.image)[plan.kernel]
    threads, blocks = math.prod(plan.block), math.prod(plan.grid)
    resident = resident_blocks(threads, resources["registers"], resources["shared_bytes"] + plan.shared_bytes)
    warps = -(-threads // 32)
    # Balance of whole blocks over SMs: the fullest one decides.
    fullest = -(-blocks // gpu.sms)
    balance = blocks / (fullest * gpu.sms)

    requests = counts.warp_instructions["load_global"]
    in_flight = min(resident, fullest) * balance * warps * gpu.sms * (counts.loaded_sectors * 32 / max(1, requests))
    filled = min(1.0, in_flight / (gpu.latency * gpu.dram * 1e9))
    dram_bytes = 32 * (counts.distinct_loaded_sectors + counts.distinct_stored_sectors)
    l2_bytes = 32 * (counts.loaded_sectors + counts.stored_sectors)
    issue = sum(CYCLES.get(kind, 1) * n for kind, n in counts.warp_instructions.items() if kind not in FREE)
    times = {
        "DRAM" if filled == 1 else "latency": dram_bytes / (gpu.dram * 1e9 * filled),
        "L2": l2_bytes / (gpu.l2 * balance),
        "issue": issue / (4 * gpu.sms * gpu.clock * balance),
        "shared": (counts.shared_accesses + counts.bank_conflicts) / (gpu.sms * gpu.clock * balance),
    }
    bound = max(times, key=times.__getitem__)
    seconds = LAUNCH + times[bound]
    return Estimate(seconds, bound, resident * warps / WARPS, dram_bytes / (gpu.dram * 1e9) / seconds)


Case = tuple[str, list[tuple[Any, Counts]]]


def rms_norm_cases() -> list[Case]:
    """The shapes of Qwen3-VL-2B: hidden states (C = 2048), query norms (C = 128)."""
    cuda = cuda_module()
    cases = []
    for label, rows, channels, dtype in (
        ("hidden, 1 token", 1, 2048, torch.float16),
        ("hidden, 512 tokens", 512, 2048, torch.float16),
        ("hidden, 512 tokens", 512, 2048, torch.float32),
        ("query norm, 512 tokens", 512 * 16, 128, torch.float16),
    ):
        x, residual = torch.randn(rows, channels).to(dtype), torch.randn(rows, channels).to(dtype)
        weight, y, hidden, rstd = torch.ones(channels, dtype=dtype), torch.empty_like(x), torch.empty_like(x), None
        plan = cuda.plan_rms_norm(x, residual, weight, y, hidden, rstd, 1e-6)
        inputs = {"x": x, "residual": residual, "weight": weight}
        label = f"{label}, {str(dtype).removeprefix('torch.')}"
        cases.append((label, [(plan, interpret([plan], inputs, {"y": y, "hidden": hidden}))]))

        rstd, partial = torch.ones(rows), torch.empty(cuda.rms_norm_backward_chunks(rows, channels), channels)
        grad_weight = torch.empty_like(weight)
        inputs = {"grad_y": x, "grad_hidden": residual, "weight": weight, "rstd": rstd}
        outputs = {"grad_x": y, "grad_weight": grad_weight, "partial": partial}
        plans = cuda.plan_rms_norm_backward(x, residual, x, weight, rstd, y, grad_weight, partial)
        cases.append((f"{label}, backward", [(plan, interpret([plan], inputs, outputs)) for plan in plans]))
    return cases


CASES: dict[str, Callable[[], list[Case]]] = {"rms_norm": rms_norm_cases}


def main(operation: str) -> None:
    print(f"{operation}: a model from interpreted PTX, not a measurement")
    print(f"{'case':<42} {'GPU':<12} {'time':>9} {'bound':>7} {'occupancy':>9} {'of DRAM':>8}")
    for label, launches in CASES[operation]():
        for gpu in GPUS:
            estimates = [estimate(gpu, plan, counts) for plan, counts in launches]
            total = sum(e.seconds for e in estimates)
            longest = max(estimates, key=lambda e: e.seconds)
            share = sum(e.dram_share * e.seconds for e in estimates) / total
            print(
                f"{label:<42} {gpu.name:<12} {total * 1e6:>6.1f} us {longest.bound:>7} "
                f"{longest.occupancy:>9.0%} {share:>8.0%}"
            )


if __name__ == "__main__":
    if len(sys.argv) != 2 or sys.argv[1] not in CASES:
        raise SystemExit(f"usage: python bench/cuda_model.py {{{','.join(CASES)}}}")
    main(sys.argv[1])
