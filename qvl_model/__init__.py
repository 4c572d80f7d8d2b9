"""The complete Qwen3-VL on the kernels of `qvl_kernels`: configuration, model, cache, processor, and the command
`qvl`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .cache import KVCache
from .config import Qwen3VLConfig
from .model import Qwen3VL

if TYPE_CHECKING:
    from .processor import Processor

__all__ = ["KVCache", "Processor", "Qwen3VL", "Qwen3VLConfig"]


def __getattr__(name: str) -> Any:
    if name == "Processor":  # with it come tokenizers, jinja2 and pillow, which a model alone does not need
        from .processor import Processor

        return Processor
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
