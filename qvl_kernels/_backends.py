"""Which implementation of an operation runs: the only place that decides.

Backends, best first: "cpu_avx512", "cpu_avx2" (native, by `torch.backends.cpu.get_cpu_capability()`), "triton" (GPUs
from sm_70), "cuda" (sm_61 and newer, through the driver), "reference" (plain PyTorch, everywhere). An operation lists
the ones it has; each answers a call with `None` (it can) or one sentence (why not). Nothing here imports a kernel
before a call needs it.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import json
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

import torch

BACKENDS = ("cpu_avx512", "cpu_avx2", "triton", "cuda", "reference")
_EXTENSIONS = {"cpu_avx512": "_cpu_avx512", "cpu_avx2": "_cpu_avx2", "cuda": "_cuda"}
_CPU_CAPABILITIES = {"cpu_avx512": ("AVX512",), "cpu_avx2": ("AVX2", "AVX512")}

_recording = threading.local()  # .active, while qvl_kernels.Recording records calls of this thread
_forced: str | None = os.environ.get("QVL_BACKEND") or None
_operations: dict[str, Operation] = {}


class Implementation(Protocol):
    """One backend of one operation. Beside `supports` it has the methods that the operation calls: `forward`, often
    `backward`."""

    def supports(self, *arguments: Any) -> str | None:
        """None where it can run a call with these arguments, else one sentence that says why not."""


class Operation:
    """The implementations of one operation, best first, and the choice among them."""

    def __init__(self, name: str, implementations: Mapping[str, Any]) -> None:
        self.name = name
        self.implementations = {backend: implementations[backend] for backend in BACKENDS if backend in implementations}
        self.last_refusal: str | None = None
        self._usable = tuple(entry for backend, entry in self.implementations.items() if unavailable(backend) is None)
        self._quick = {name: entry for name, entry in self.implementations.items() if hasattr(entry, "run_unchecked")}
        self._quick = {name: entry for name, entry in self._quick.items() if entry in self._usable}
        self._quickest = next(iter(self._quick.values()), None)
        _operations[name] = self

    def quick(self) -> Any:
        """The CPU backend whose `run_unchecked` a plain eager call may try before any check in Python, or None.

        At a decode step the checks cost more than the kernel. The binding checks what it gets again, raises TypeError
        or ValueError before it writes anything, and the call goes the usual way: checks, which say what is wrong, and
        `choose`.
        """
        return self._quickest if _forced is None else self._quick.get(_forced)

    def choose(self, *arguments: Any) -> Any:
        """The first implementation that takes these arguments, or the forced one.

        Raises:
            RuntimeError: a backend is forced and cannot run this call; the sentence says why.
        """
        if _forced is not None:
            return self._recordable(self._forced_implementation(_known(_forced), *arguments))
        for implementation in self._usable:
            refusal = implementation.supports(*arguments)
            if refusal is None:
                return self._recordable(implementation)
            self.last_refusal = refusal
        raise RuntimeError(f"{self.name}: no backend runs this call: {self.refusals(*arguments)}")

    def preferred(self) -> Any:
        """The implementation that `choose` asks first, or None where it would raise."""
        if _forced is None:
            return self._usable[0]
        forced = self.implementations.get(_forced)
        return forced if forced in self._usable else None

    def _recordable(self, implementation: Any) -> Any:
        if getattr(_recording, "active", False):
            name = next(name for name, entry in self.implementations.items() if entry is implementation)
            if not name.startswith("cpu"):
                why = f", since {self.last_refusal}" if self.last_refusal else ""
                raise RuntimeError(f"Recording: {self.name} would run on {name!r}, which is not recorded{why}")
        return implementation

    def _forced_implementation(self, backend: str, *arguments: Any) -> Any:
        if backend not in self.implementations:
            having = ", ".join(self.implementations)
            raise RuntimeError(f"{self.name}: backend {backend!r} is forced, but this operation has only {having}")
        implementation = self.implementations[backend]
        refusal = None if implementation in self._usable else unavailable(backend)
        refusal = refusal or implementation.supports(*arguments)
        if refusal is not None:
            raise RuntimeError(f"{self.name}: backend {backend!r} is forced, but {refusal}")
        return implementation

    def refusals(self, *arguments: Any) -> dict[str, str | None]:
        """For each backend of this operation, None where it would run this call, else the reason why not."""
        return {name: unavailable(name) or entry.supports(*arguments) for name, entry in self.implementations.items()}


@dataclass(frozen=True)
class Reference:
    """Plain PyTorch: takes every call that passed the checks; autograd differentiates it."""

    forward: Callable[..., Any]

    def supports(self, *arguments: Any) -> str | None:
        return None


def _known(name: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"unknown backend {name!r}; there are {', '.join(BACKENDS)}")
    return name


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Inside, every operation of this process runs on backend `name`, or raises RuntimeError with the reason why it
    cannot.

    >>> import torch, qvl_kernels
    >>> with qvl_kernels.use_backend("reference"):
    ...     y = qvl_kernels.rms_norm(torch.ones(2, 8), torch.ones(8), 1e-6)

    Raises:
        ValueError: no backend has this name.
        RuntimeError: the backend cannot run on this machine.
    """
    global _forced
    refusal = unavailable(_known(name))
    if refusal is not None:
        raise RuntimeError(f"use_backend: {name!r} cannot run here: {refusal}")
    previous, _forced = _forced, name
    try:
        yield
    finally:
        _forced = previous


@functools.cache
def module(backend: str, operation: str) -> ModuleType:
    """The compiled module of a native backend, or the operation's Triton module. Raises ImportError where it is
    missing."""
    name = f"triton.{operation}" if backend == "triton" else _EXTENSIONS[backend]
    return importlib.import_module(f"qvl_kernels.{name}")


def stream(backend: str, x: torch.Tensor) -> tuple[int, ...]:
    """What the "cuda" backend's functions take after their own arguments: torch's current stream. Empty for the
    others."""
    return (torch.cuda.current_stream(x.device).cuda_stream,) if backend == "cuda" else ()


def interprets(backend: str) -> bool:
    """Whether the backend runs on CPU tensors because Triton's interpreter stands in for a GPU."""
    return backend == "triton" and os.environ.get("TRITON_INTERPRET") == "1"


@functools.cache
def unavailable(backend: str) -> str | None:
    """None where the backend can run on this machine, else the reason why not. Asked once per process."""
    if backend == "reference":
        return None
    if backend == "triton":
        return _triton_unavailable()
    if backend in _CPU_CAPABILITIES:  # before its module is loaded: that alone runs the ISA's instructions
        capability = torch.backends.cpu.get_cpu_capability()
        if capability not in _CPU_CAPABILITIES[backend]:
            return f"the CPU capability is {capability}, not {' or '.join(_CPU_CAPABILITIES[backend])}"
    try:
        native = module(backend, "")
    except ImportError as error:
        return build_report().get(_EXTENSIONS[backend]) or f"its compiled module does not load: {error}"
    if backend == "cuda":
        return _gpu_unavailable((6, 1)) or build_report().get("cuda_images") or native.driver_status()
    return None


@functools.cache
def build_report() -> dict[str, str | None]:
    """For each native part, None where the build made it, else the reason why it is missing (written by setup.py)."""
    path = Path(__file__).with_name("build_report.json")
    return json.loads(path.read_text()) if path.exists() else dict.fromkeys(_EXTENSIONS.values(), "it was not built")


def _gpu_unavailable(capability: tuple[int, int]) -> str | None:
    if not torch.cuda.is_available():
        return "torch finds no NVIDIA GPU"
    if torch.cuda.get_device_capability() < capability:
        return f"the GPU is older than sm_{capability[0]}{capability[1]}"
    return None


def _triton_unavailable() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed (pip install qvl[triton])"
    return None if interprets("triton") else _gpu_unavailable((7, 0))


def available_backends() -> tuple[str, ...]:
    """Names of the backends that can run on this machine, best first.

    >>> "reference" in available_backends()
    True
    """
    return tuple(name for name in BACKENDS if unavailable(name) is None)


@dataclass(frozen=True)
class Explanation:
    """What `explain` found; `str()` of it is a table for people.

    Attributes:
        backends: for each backend None (it runs), or the reason why not.
        operations: for each operation the backends it has on this machine, best first.
        fallbacks: for each operation whose best backend refused a call, the reason it gave last.
    """

    backends: dict[str, str | None]
    operations: dict[str, tuple[str, ...]]
    fallbacks: dict[str, str]

    def __str__(self) -> str:
        lines = [
            f"{name:<12} {'runs' if why is None else 'does not run: ' + why}" for name, why in self.backends.items()
        ]
        width = max(len(name) for name in self.operations)
        lines += ["", *(f"{name:<{width}} {', '.join(having)}" for name, having in self.operations.items())]
        lines += [f"{name}: fell back, since {why}" for name, why in self.fallbacks.items()]
        return "\n".join(lines)


def explain() -> Explanation:
    """Which backends run here, why each other does not, and which of them every operation has.

    >>> explain().backends["reference"] is None
    True
    """
    backends = {name: unavailable(name) for name in BACKENDS}
    operations = {
        name: tuple(backend for backend in operation.implementations if backends[backend] is None)
        for name, operation in sorted(_operations.items())
    }
    fallbacks = {name: operation.last_refusal for name, operation in _operations.items() if operation.last_refusal}
    return Explanation(backends, operations, fallbacks)
