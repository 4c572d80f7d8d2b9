"""Runs the plans of `qvl_kernels._cuda` on the PTX that the build shipped, without a GPU."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType
from typing import Any

import ptx
import pytest
from torch import Tensor

import qvl_kernels

PACKAGE = Path(qvl_kernels.__file__).parent
FOLDER = PACKAGE / "cuda_images"


def cuda_module() -> ModuleType:
    """`qvl_kernels._cuda`; the calling test file is skipped only where the build reports that there is none."""
    report = json.loads((PACKAGE / "build_report.json").read_text()) if (PACKAGE / "build_report.json").exists() else {}
    for part in ("_cuda", "cuda_images"):
        if report.get(part) is not None:
            pytest.skip(f"the build left out {part}: {report[part]}", allow_module_level=True)
    from qvl_kernels import _cuda

    return _cuda


def kernel_report(image: str) -> dict[str, dict[str, Any]]:
    """{kernel: registers, shared_bytes, local_bytes, spill_bytes, parameters} of an image."""
    return json.loads((FOLDER / f"{image}.json").read_text())


def interpret(plans: Iterable[Any], inputs: dict[str, Tensor | None], outputs: dict[str, Tensor | None]) -> ptx.Counts:
    """Executes the plans one after the other on CPU tensors; only these may be touched, inputs only read.

    Raises ptx.PtxError for an access out of bounds, a race, a load of shared memory that nobody wrote, and the like.
    """
    memory = ptx.GlobalMemory()
    for name, tensor in inputs.items():
        memory.add_tensor(name, tensor, writable=False)
    for name, tensor in outputs.items():
        memory.add_tensor(name, tensor)
    counts = ptx.Counts()
    for plan in plans:
        counts += ptx.run_plan(ptx.load(FOLDER / f"{plan.image}.compute_61.ptx"), plan, memory)
    return counts
