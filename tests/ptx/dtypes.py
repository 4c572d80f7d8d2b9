"""PTX types and how numpy holds them: a register is an array of its bits, one element per thread."""

from __future__ import annotations

import numpy as np

# Bytes of each type. A predicate is a numpy bool.
SIZES = {f"{kind}{bits}": bits // 8 for kind in "bsuf" for bits in (8, 16, 32, 64) if (kind, bits) != ("f", 8)}
SIZES |= {"f16x2": 4, "pred": 1}

_KINDS = {"b": "u", "u": "u", "s": "i", "f": "f"}


class PtxError(Exception):
    """The interpreter does not understand the PTX, or the PTX did what no GPU would forgive."""


def numpy_type(ptx_type: str) -> np.dtype:
    """The numpy type in which values of this PTX type are computed."""
    if ptx_type == "pred":
        return np.dtype(bool)
    if ptx_type == "f16x2":
        return np.dtype(np.uint32)
    return np.dtype(f"{_KINDS[ptx_type[0]]}{SIZES[ptx_type]}")


def bits_type(ptx_type: str) -> np.dtype:
    """The numpy type in which a register of this PTX type is stored."""
    return np.dtype(bool) if ptx_type == "pred" else np.dtype(f"u{SIZES[ptx_type]}")
