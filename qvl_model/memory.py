"""Where a model's weights can go: free memory, sizes as people write them, and the device that has room."""

from __future__ import annotations

import ctypes
import os
import re
import sys

import torch


def available_memory(device: torch.device) -> int:
    """Bytes that new tensors on `device` may take: free GPU memory, or what the system can give without swapping."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        with open("/proc/meminfo", encoding="ascii") as stream:
            fields = dict(line.split(":", 1) for line in stream)
        return int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):  # not Linux: the physical memory is the best there is without a dependency
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def give_back_freed() -> None:
    """Gives the system what was freed and what the C library keeps for the next time: after a long prompt or a large
    picture some 50 MB, in a few milliseconds. Elsewhere than on Linux with glibc nothing happens."""
    if sys.platform.startswith("linux") and hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)


def parse_bytes(amount: int | str) -> int:
    """12, "12", "900MB", "12GB", "1.5GiB" -> bytes."""
    if isinstance(amount, int) and amount > 0:
        return amount
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(?:([KMGT])(i?)B?|B)?\s*", str(amount), re.IGNORECASE)
    if not match or float(match[1]) <= 0:
        raise ValueError(f"max_memory: expected bytes or a size such as '12GB', got {amount!r}")
    power = " KMGT".index(match[2].upper()) if match[2] else 0
    return int(float(match[1]) * (1024 if match[3] else 1000) ** power)


def pick_device(device: str | torch.device, nbytes: int) -> torch.device:
    """The device named; for "auto" a GPU that this torch can run on and that has room for `nbytes`, else the CPU."""
    if str(device) != "auto":
        chosen = torch.device(device)
        if chosen.type == "cuda" and (problem := _cuda_problem(chosen)):
            raise RuntimeError(f"device={str(device)!r}: {problem}")
        return chosen
    cuda = torch.device("cuda")
    if torch.cuda.is_available() and _cuda_problem(cuda) is None and available_memory(cuda) > nbytes:
        return cuda
    return torch.device("cpu")


def _cuda_problem(device: torch.device) -> str | None:
    if not torch.cuda.is_available():
        return "torch finds no CUDA device here"
    try:
        torch.zeros(1, device=device).add_(1)
    except RuntimeError as error:
        # Wheels after torch 2.7 dropped Pascal: is_available() is true there and the first kernel fails.
        if "no kernel image" in str(error):
            major, minor = torch.cuda.get_device_capability(device)
            return f"this torch has no code for compute capability {major}.{minor}; install a cu126 build of torch"
        return str(error).split("\n")[0]
    return None
