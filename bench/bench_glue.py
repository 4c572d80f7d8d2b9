"""The small operations around the products and attention.

    operation   FLOPs         bytes                        torch
    layer_norm  8 n           2 n s (4 n s with residual)  F.layer_norm, after an addition where there is a residual
    rotary      3 n           2 n s + cos, sin             the same arithmetic in place of ours
    norm_rotary 7 n           2 n s + cos, sin             F.rms_norm and the same arithmetic, the key copied to a cache
    append_kv   0, int8 4 n   n s + n of the cache         slices of the cache, for int8 after quantize_kv
    swiglu      5 n           3 n s                        F.silu(gate) * up
    gelu_tanh   12 n          2 n s                        F.gelu(approximate="tanh")

for n elements of s bytes. Shapes: Qwen3-VL-2B's text model (a decode step, prompts) and vision tower (patches).
"""

import pytest
import torch
import torch.nn.functional as F
from timing import Case

from qvl_kernels import append_kv, gelu_tanh, layer_norm, norm_rotary, rotary, swiglu
from qvl_kernels.reference import append_kv as append_kv_reference
from qvl_kernels.reference import gelu_tanh as gelu_tanh_reference
from qvl_kernels.reference import layer_norm as layer_norm_reference
from qvl_kernels.reference import norm_rotary as norm_rotary_reference
from qvl_kernels.reference import rotary as rotary_reference
from qvl_kernels.reference import swiglu as swiglu_reference

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
ROWS = pytest.mark.parametrize("rows", [1, 512, 1024])


def _name(dtype):
    return {torch.float32: "fp32", torch.bfloat16: "bf16"}[dtype]


@DTYPES
@pytest.mark.parametrize(("rows", "residual"), [(256, False), (1024, False), (1024, True)])
def bench_layer_norm(compare, rows, residual, dtype):
    x, other = torch.randn(2, rows, 1024, dtype=dtype)
    weight, bias = torch.randn(2, 1024, dtype=dtype)
    more = (other,) if residual else ()

    def own():
        hidden = x + other if residual else x
        y = F.layer_norm(hidden, (1024,), weight, bias, 1e-6)
        return (y, hidden) if residual else y

    def plain():
        results = layer_norm_reference.forward(x, weight, bias, 1e-6, *more)
        return results if residual else results[0]

    name = f"{rows} x 1024 {_name(dtype)}" + (" residual" if residual else "")
    case = Case("layer_norm", name, 8 * x.numel(), (4 if residual else 2) * x.nbytes)
    compare(case, lambda: layer_norm(x, weight, bias, 1e-6, *more), plain, own, TOLERANCE[dtype])


def _rotated(x, cos, sin):
    half = x.shape[-1] // 2
    return x * cos + torch.cat((-x[..., half:], x[..., :half]), -1) * sin


def _heads(rows, dtype):
    """query and key as a product leaves them, cos and sin."""
    q, k = (torch.randn(1, rows, heads, 128, dtype=dtype).transpose(1, 2) for heads in (16, 8))
    angle = torch.rand(1, 1, rows, 64).repeat(1, 1, 1, 2)
    return q, k, angle.cos(), angle.sin()


@DTYPES
@ROWS
def bench_rotary(compare, rows, dtype):
    q, k, cos, sin = _heads(rows, dtype)
    n = q.numel() + k.numel()
    compare(
        Case("rotary", f"{rows} x 16 + 8 heads x 128 {_name(dtype)}", 3 * n, 2 * n * q.itemsize + 2 * cos.nbytes),
        lambda: rotary(q, k, cos, sin),
        lambda: (rotary_reference.forward(q, cos, sin), rotary_reference.forward(k, cos, sin)),
        lambda: tuple(_rotated(x, cos.to(dtype), sin.to(dtype)) for x in (q, k)),
        TOLERANCE[dtype],
    )


@DTYPES
@ROWS
def bench_norm_rotary(compare, rows, dtype):
    q, k, cos, sin = _heads(rows, dtype)
    weight = torch.rand(128, dtype=dtype)
    cache = torch.zeros(1, 8, 4096, 128, dtype=dtype)[:, :, 2048 : 2048 + rows]
    n = q.numel() + k.numel()

    def own():
        angles = cos.to(dtype), sin.to(dtype)
        query, key = (_rotated(F.rms_norm(x, (128,), weight, 1e-6), *angles) for x in (q, k))
        return query, cache.copy_(key)

    compare(
        Case("norm_rotary", f"{rows} x 16 + 8 heads x 128 {_name(dtype)}", 7 * n, 2 * n * q.itemsize + 2 * cos.nbytes),
        lambda: norm_rotary(q, k, weight, weight, 1e-6, cos, sin, key_out=cache),
        lambda: tuple(norm_rotary_reference.forward(x, weight, 1e-6, cos, sin) for x in (q, k)),
        own,
        TOLERANCE[dtype],
    )


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.int8], ids=["bf16", "int8"])
@ROWS
def bench_append_kv(compare, rows, stored):
    key, value = torch.randn(2, 1, rows, 8, 128).transpose(2, 3).unbind(0)
    memory = [torch.zeros(1, 8, 4096, 128, dtype=stored) for _ in range(4)]
    scales = [torch.zeros(1, 8, 4096) if stored == torch.int8 else None for _ in range(4)]
    lengths = torch.tensor([2048])

    def ours():
        append_kv(key, value, *memory[:2], lengths, key_scale=scales[0], value_scale=scales[1])
        return memory[0]

    def plain():
        append_kv_reference.forward(key, value, *memory[2:], lengths, *scales[2:])
        return memory[2]

    n = 2 * key.numel()
    case = Case("append_kv", f"{rows} x 8 heads x 128 {str(stored)[6:]}", 4 * n, n * (4 + memory[0].itemsize))
    compare(case, ours, None, plain, 1e-6)


@DTYPES
@ROWS
def bench_swiglu(compare, rows, dtype):
    gate, up = torch.randn(rows, 2 * 6144, dtype=dtype).chunk(2, -1)
    compare(
        Case("swiglu", f"{rows} x 6144, halves, {_name(dtype)}", 5 * gate.numel(), 3 * gate.nbytes),
        lambda: swiglu(gate, up),
        lambda: swiglu_reference.forward(gate, up),
        lambda: F.silu(gate) * up,
        TOLERANCE[dtype],
    )


@DTYPES
@pytest.mark.parametrize("rows", [256, 1024])
def bench_gelu_tanh(compare, rows, dtype):
    x = torch.randn(rows, 4096, dtype=dtype)
    compare(
        Case("gelu_tanh", f"{rows} x 4096 {_name(dtype)}", 12 * x.numel(), 2 * x.nbytes),
        lambda: gelu_tanh(x),
        lambda: gelu_tanh_reference.forward(x),
        lambda: F.gelu(x, approximate="tanh"),
        TOLERANCE[dtype],
    )
