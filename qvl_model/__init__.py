"""The complete Qwen3-VL on `qvl_kernels`: configuration, model, cache, processor, and the command `qvl`."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .cache import KVCache
    from .config import Qwen3VLConfig
    from .model import Qwen3VL
    from .processor import Processor

__all__ = ["KVCache", "Processor", "Qwen3VL", "Qwen3VLConfig"]

_MODULES = {"KVCache": "cache", "Processor": "processor", "Qwen3VL": "model", "Qwen3VLConfig": "config"}


def __getattr__(name: str) -> Any:
    # On first use: `qvl --help` does not wait for torch, a model alone not for tokenizers, jinja2 and pillow.
    if name in _MODULES:
        return getattr(import_module(f".{_MODULES[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
