"""The element-wise operations around the products, plain PyTorch so far.

    operation   FLOPs         bytes                        torch
    layer_norm  8 n           2 n s                        F.layer_norm
    rotary      3 n           2 n s + cos, sin             the same arithmetic in place of ours
    swiglu      5 n           3 n s                        F.silu(gate) * up
    gelu_tanh   12 n          2 n s                        F.gelu(approximate="tanh")

for n elements of s bytes. Shapes: 512 tokens of Qwen3-VL-2B's text model, 1,024 patches of its vision tower.
"""

import torch
import torch.nn.functional as F
from timing import Case

from qvl_kernels import gelu_tanh, layer_norm, rotary, swiglu
from qvl_kernels.reference import gelu_tanh as gelu_tanh_reference
from qvl_kernels.reference import layer_norm as layer_norm_reference
from qvl_kernels.reference import rotary as rotary_reference
from qvl_kernels.reference import swiglu as swiglu_reference


def bench_layer_norm(compare):
    x, weight, bias = torch.randn(1024, 1024), torch.randn(1024), torch.randn(1024)
    compare(
        Case("layer_norm", "1024 x 1024 fp32", 8 * x.numel(), 2 * x.nbytes),
        lambda: layer_norm(x, weight, bias, 1e-6),
        lambda: layer_norm_reference.forward(x, weight, bias, 1e-6),
        lambda: F.layer_norm(x, (1024,), weight, bias, 1e-6),
        1e-5,
    )


def bench_rotary(compare):
    q, k = torch.randn(1, 16, 512, 128), torch.randn(1, 8, 512, 128)
    angle = torch.rand(1, 1, 512, 64).repeat(1, 1, 1, 2)
    cos, sin = angle.cos(), angle.sin()

    def own():
        return tuple(x * cos + torch.cat((-x[..., 64:], x[..., :64]), -1) * sin for x in (q, k))

    n = q.numel() + k.numel()
    compare(
        Case("rotary", "16 + 8 heads, 512 x 128 fp32", 3 * n, 8 * n + 2 * cos.nbytes),
        lambda: rotary(q, k, cos, sin),
        lambda: (rotary_reference.forward(q, cos, sin), rotary_reference.forward(k, cos, sin)),
        own,
        1e-5,
    )


def bench_swiglu(compare):
    gate, up = torch.randn(2, 512, 6144)
    compare(
        Case("swiglu", "512 x 6144 fp32", 5 * gate.numel(), 3 * gate.nbytes),
        lambda: swiglu(gate, up),
        lambda: swiglu_reference.forward(gate, up),
        lambda: F.silu(gate) * up,
        1e-5,
    )


def bench_gelu_tanh(compare):
    x = torch.randn(1024, 4096)
    compare(
        Case("gelu_tanh", "1024 x 4096 fp32", 12 * x.numel(), 2 * x.nbytes),
        lambda: gelu_tanh(x),
        lambda: gelu_tanh_reference.forward(x),
        lambda: F.gelu(x, approximate="tanh"),
        1e-5,
    )
