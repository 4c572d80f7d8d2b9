"""Where a model's weights can go: free memory, sizes as people write them, and the device that has room."""

from __future__ import annotations

import ctypes
import mmap
import os
import re
import sys
from collections.abc import Sequence

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


def glibc() -> ctypes.CDLL | None:
    """The C library, where it is glibc."""
    if not sys.platform.startswith("linux"):
        return None
    libc = ctypes.CDLL(None)
    return libc if hasattr(libc, "malloc_trim") else None


def keep_freed() -> None:
    """Lets glibc keep 256 MiB of what is freed, in blocks of up to 32 MiB, for what is allocated next, until
    `give_back_freed`. Left alone, it gives them back to the system after every layer and has to ask for each page anew,
    a tenth of the time that a picture of 1024 x 1024 takes. For the whole process; what the environment says by
    MALLOC_TRIM_THRESHOLD_ or MALLOC_MMAP_THRESHOLD_ goes before. Elsewhere than on Linux with glibc nothing happens."""
    if os.environ.keys() & {"MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_"}:
        return
    if (libc := glibc()) is not None:
        trim_threshold, mmap_threshold = -1, -3  # malloc.h
        libc.mallopt(trim_threshold, 256 << 20)
        libc.mallopt(mmap_threshold, 32 << 20)


def give_back_freed() -> None:
    """Gives the system what was freed and what the C library keeps for the next time: after a long prompt or a large
    picture some 50 MB, after a cache of 4096 tokens 200 MB, in a few milliseconds. Elsewhere than on Linux with glibc
    nothing happens."""
    if (libc := glibc()) is not None:
        libc.malloc_trim(0)


def unmap_read_pages(tensor: torch.Tensor) -> None:
    """Takes the pages of a mapped file that were read out of this process; the system keeps them, and finds them for a
    later read. For a table of which few rows are read: with each row come the 64 KiB around it, 33 MB for a prompt of
    512 tokens. A tensor that is in memory, or that something was written to, is left as it is."""
    if tensor.device.type == "cpu" and _only_read(*whole_pages(tensor)):
        advise([tensor], mmap.MADV_DONTNEED)


def advise(tensors: Sequence[torch.Tensor], advice: int) -> None:
    """Tells the system about the whole pages that these tensors fill; elsewhere than on Linux nothing happens."""
    if not sys.platform.startswith("linux"):
        return
    libc = ctypes.CDLL(None, use_errno=True)
    for tensor in tensors:
        start, length = whole_pages(tensor)
        if length > 0:  # an old kernel that does not know the advice answers with an error, which changes nothing
            libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(length), ctypes.c_int(advice))


def whole_pages(tensor: torch.Tensor) -> tuple[int, int]:
    """Address and length of the whole pages that a contiguous tensor fills; a length below 1 where there are none."""
    start = -(-tensor.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    return start, (tensor.data_ptr() + tensor.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE - start


def _only_read(start: int, length: int) -> bool:
    """Whether all pages that are there belong to a file: of a private mapping a page that was written is a copy, and
    letting it go would lose it."""
    if not sys.platform.startswith("linux") or length <= 0:
        return False
    size = length // mmap.PAGESIZE * 8
    try:
        with open("/proc/self/pagemap", "rb", buffering=0) as stream:
            stream.seek(start // mmap.PAGESIZE * 8)
            pages = stream.read(size)
    except OSError:
        return False
    if len(pages) != size:
        return False
    entries = torch.frombuffer(bytearray(pages), dtype=torch.int64)
    there, of_file = (entries >> 62) & 3 != 0, (entries >> 61) & 1 != 0
    return bool((of_file | ~there).all())


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
