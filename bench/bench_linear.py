"""packed_linear: y = x W^T with M rows, K = 2048, N = 6144, plain PyTorch so far.

FLOPs: 2 M K N. Bytes: the packed weight once, x and y once. torch: F.linear on the weight in x's dtype.
"""

import pytest
import torch
import torch.nn.functional as F
from timing import Case

from qvl_kernels import pack_linear, packed_linear
from qvl_kernels.reference import linear as reference

K, N = 2048, 6144


@pytest.mark.parametrize("format", ["fp32", "bf16"])
@pytest.mark.parametrize("rows", [1, 8, 512])
def bench_product(compare, rows, format):
    x, packed = torch.randn(rows, K), pack_linear(torch.randn(N, K), format=format)
    weight = packed.weight.float()
    bytes_ = packed.weight.nbytes + 4 * rows * (K + N)
    compare(
        Case("packed_linear", f"M = {rows}, {K} -> {N}, {format}", 2 * rows * K * N, bytes_),
        lambda: packed_linear(x, packed),
        lambda: reference.forward(x, packed.weight, None),
        lambda: F.linear(x, weight),
        1e-4,
    )
