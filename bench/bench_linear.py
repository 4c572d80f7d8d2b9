"""packed_linear: y = x W^T, M rows, K -> N.

FLOPs: 2 M K N. Bytes: the packed weight once, x and y once. M = 1 and 8 take another copy of the weight with every
call, from 400 MB of copies, as a model's layers follow each other: no cache holds it by chance. The roof of int8 and
int4 is that of the int8 instructions (`int8_loop` in `csrc/cpu/roof.cpp`: `vpmaddubsw`, `vpmaddwd` and `vpaddd`, or
`vpdpbusd` where AVX-512 has VNNI). torch: F.linear in float32, over copies too; for "bf16" and "medium" on bfloat16 x
and W where the CPU has an instruction for it and AVX-512 is not ruled out. "medium" is `precision`; where the CPU
multiplies no faster that way it computes the same as without. "bf16" with it is related to the roof of bfloat16
products, with AMX all formats are; without instructions for them to the FMA roof, which integers pass.
"""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch
import torch.nn.functional as F
from timing import Case

from qvl_kernels import PackedWeight, pack_linear, packed_linear
from qvl_kernels.reference import linear as reference

COPIES_BYTES = 400 << 20
SHAPES = [(2048, 6144), *(pytest.param(*shape, marks=pytest.mark.long) for shape in ((6144, 2048), (1024, 4096)))]
# What rounding x to integers may change, relative to the largest output (tests/test_linear.py derives the bounds).
TOLERANCE = {"fp32": 1e-4, "bf16": 1e-4, "int8": 1e-3, "int4": 2e-3}


def copies_of(packed: PackedWeight, rows: int) -> itertools.cycle[PackedWeight]:
    count = 1 if rows > 64 else max(2, COPIES_BYTES // packed.nbytes)
    names = ("weight", "scale", "minimum")
    tensors = {name: getattr(packed, name) for name in names if getattr(packed, name) is not None}
    return itertools.cycle(
        [dataclasses.replace(packed, **{name: t.clone() for name, t in tensors.items()}) for _ in range(count)]
    )


@pytest.mark.parametrize("format", ["fp32", "bf16", "int8", "int4"])
@pytest.mark.parametrize("rows", [1, 8, 512])
@pytest.mark.parametrize(("k", "n"), SHAPES)
def bench_product(compare, k, n, rows, format):
    product(compare, k, n, rows, format, "highest")


@pytest.mark.parametrize(("rows", "format"), [(1, "int4"), (8, "int4"), (512, "bf16"), (512, "int8"), (512, "int4")])
@pytest.mark.parametrize(("k", "n"), SHAPES)
def bench_rounded_product(compare, k, n, rows, format):
    product(compare, k, n, rows, format, "medium")


def product(compare, k, n, rows, format, precision):
    x, packed = torch.randn(rows, k), pack_linear(torch.randn(n, k), format=format)
    dense, copies = packed.dequantize(), copies_of(packed, rows)
    native = torch.backends.cpu.get_cpu_capability() == "AVX512" and torch.cpu._is_avx512_bf16_supported()
    half = native and (format == "bf16" or precision == "medium")
    peers = copies_of(pack_linear(dense, format="bf16" if half else "fp32"), rows)
    cast = x.to(torch.bfloat16 if half else torch.float32)
    bytes_ = packed.nbytes + 4 * rows * (k + n)
    roof = "int8" if format in ("int8", "int4") else "fma"
    if rows > 16 and precision == "medium" and (format == "bf16" or (native and torch.cpu._is_amx_tile_supported())):
        roof = "bf16"
    name = f"M = {rows}, {k} -> {n}, {format}" + (", medium" if precision == "medium" else "")
    compare(
        Case("packed_linear", name, 2 * rows * k * n, bytes_, roof=roof),
        lambda: packed_linear(x, next(copies), precision=precision),
        lambda: reference.forward(x, dense, None),
        lambda: F.linear(cast, next(peers).weight),
        2e-2 if half or precision == "medium" else TOLERANCE[format],
    )
