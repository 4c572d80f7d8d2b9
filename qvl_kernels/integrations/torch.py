"""Ours in place of `torch.nn.functional.scaled_dot_product_attention`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch.nn.functional as F

from ..scaled_dot_product_attention import scaled_dot_product_attention


@contextmanager
def patch_sdpa() -> Iterator[None]:
    """Inside, `torch.nn.functional.scaled_dot_product_attention` of this process runs ours, and torch's where ours does
    not
    take the call: the results are the same function's.

    It reaches what looks the function up when it calls it: `nn.MultiheadAttention`, transformers' "sdpa" attention,
    diffusers, timm. It does not reach `from torch.nn.functional import scaled_dot_product_attention` made before, nor
    the fused inference path of `nn.TransformerEncoderLayer`, which calls no Python function
    (`torch.backends.mha.set_fastpath_enabled(False)` turns that path off).

    >>> with patch_sdpa():
    ...     F.scaled_dot_product_attention.__module__
    'qvl_kernels.scaled_dot_product_attention'
    """
    before = F.scaled_dot_product_attention
    F.scaled_dot_product_attention = scaled_dot_product_attention
    try:
        yield
    finally:
        F.scaled_dot_product_attention = before
