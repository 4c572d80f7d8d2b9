"""Block-sparse attention in plain PyTorch: dense attention under the pattern's mask."""

from collections.abc import Sequence

import torch
from torch import Tensor

from . import attention


def dense(lists: Sequence[Tensor], block: int, len_q: int, len_k: int) -> Tensor:
    """True where a query sees a key, (H, Lq, Lk), from the fields of a SparsePattern's `lists`."""
    full_offsets, full, partial_offsets, partial, masks, bits = lists
    heads, rows = full_offsets.shape[0], full_offsets.shape[1] - 1
    columns = -(-len_k // block)
    cells = torch.zeros(heads * rows, columns, block, block, dtype=torch.bool, device=full.device)
    row = torch.arange(heads * rows, device=full.device)
    unpacked = (bits.unsqueeze(-1) >> torch.arange(8, dtype=torch.uint8, device=bits.device) & 1).bool().flatten(2)
    for offsets, blocks, filling in ((full_offsets, full, True), (partial_offsets, partial, unpacked[masks.long()])):
        counts = offsets.diff().flatten().long()
        cells[row.repeat_interleave(counts, output_size=len(blocks)), blocks.long()] = filling
    cells = cells.view(heads, rows, columns, block, block).transpose(2, 3)
    return cells.reshape(heads, rows * block, columns * block)[:, :len_q, :len_k]


def forward(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float, causal: bool) -> tuple[Tensor, ...]:
    """softmax(scale q k^T) v over the keys that the mask (H or 1, Lq, Lk) shows, and the log-sum-exp."""
    visible = attention.visible_keys(query.shape[2], key.shape[2], causal, -1, -1, None, query.device)
    return attention.forward(query, key, value, scale, visible, mask)


def backward(grad: Tensor, *saved: Tensor, mask: Tensor, scale: float, causal: bool) -> tuple[Tensor, ...]:
    """Of the saved query, key, value, output and log-sum-exp the gradients of the first three."""
    visible = attention.visible_keys(saved[0].shape[2], saved[1].shape[2], causal, -1, -1, None, grad.device)
    query, key, value, out, lse = saved
    return attention.backward(grad, query, key, value, out, lse, scale, visible, mask)
