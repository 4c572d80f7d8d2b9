"""packed_linear and PackedLinear against the float64 product of what was packed, on every backend by name.

The kernels sum in float32, so for x in float32 the bound is that of a sum of K terms, relative to |x| |W|. With "int8"
and "int4" weights they also round the factors to integers, with one scale for each 128 along K. The error of one
product is then at most, with dx and dw half the steps (`rounding_of_factors`):

    sum_k |W[n, k]| dx + |x[m, k]| dw      dx = max|x| / 65534, dw = 0           "int8", and "int4" for few rows
                                           dx = max|x| / 16382, dw = max|W| / 4094    "int4" for many rows

With precision="medium" and many rows, of "int4" any: dx = max|x| / 8190, dw = max|W| / 8190 with "fp32" and "bf16", or
dx = |x| / 256 and dw = 0 with "bf16" on AMD with AVX512_BF16 or with AMX; dx = max|x| / 254 and dw = 0 with "int8" and
"int4", but with "int8" without VNNI dx = (max x - min x) / 254, where zeros fill up the last 128, and with "int4" and
AMX, or VNNI and more than 128 rows, dw = max|W| / 254, the maximum being of what the 128 could be.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from utils import DTYPES, assert_close, backends_of, device_of, on

from qvl_kernels import PackedLinear, PackedWeight, _backends, gelu_tanh, pack_linear, packed_linear, swiglu

BACKENDS = backends_of("packed_linear")
FORMATS = ["fp32", "bf16", "int8", "int4"]
FEW_ROWS = 16
CPU = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
AMX = "amx_bf16" in CPU and os.environ.get("QVL_AMX") != "0"
# (M, K, N): M = 1 with every remainder of K and N that a kernel can have, the borders between its regimes, and tiles.
SHAPES = [
    *((1, k, 5) for k in (1, 2, 7, 8, 9, 15, 16, 17, 31, 33, 63, 65, 111, 127, 128, 129, 255, 257, 300, 640)),
    *((1, 130, n) for n in (1, 2, 3, 4, 6, 7, 8, 9, 31, 33, 63, 64, 65)),
    *((m, 129, 37) for m in (2, 3, 4, 5, 6, 7, 8, 9, 12, 15, 16, 17, 23, 24, 25, 31, 32, 33, 47, 48, 49)),
    *((m, 129, 37) for m in (64, 65, 67, 71)),
    *((70, k, 33) for k in (1, 3, 8, 31, 129, 255, 256, 257, 511, 513, 700)),
    *((70, 130, n) for n in (1, 7, 8, 15, 16, 17, 31, 32, 63, 65, 127, 129, 160, 300)),
    (1, 2177, 300), (2, 2177, 140), (5, 2300, 70), (1, 8333, 70), (3, 8200, 5), (16, 130, 150),
    (0, 8, 4), (3, 8, 0), (3, 0, 4), (530, 70, 20), (140, 300, 70), (177, 513, 40), (1050, 140, 20),
]  # fmt: skip


def group_maximum(t):
    """For each element of (..., K) the largest magnitude among its 128 along K."""
    width = t.shape[-1]
    padded = torch.nn.functional.pad(t.double().abs(), (0, -width % 128)).unflatten(-1, (-1, 128))
    return padded.amax(-1, keepdim=True).expand_as(padded).flatten(-2)[..., :width]


def group_range(t):
    """For each element of (..., K) the largest minus the smallest among its 128 along K, and among what fills them."""
    width = t.shape[-1]
    padded = torch.nn.functional.pad(t.double(), (0, -width % 128)).unflatten(-1, (-1, 128))
    low, high = padded.aminmax(dim=-1, keepdim=True)
    return (high - low).expand_as(padded).flatten(-2)[..., :width]


def backend_in_use():
    return getattr(_backends._operations["packed_linear"].preferred(), "backend", "reference")


def has_bf16_dots():
    """Whether the backend in use multiplies bfloat16 numbers as they are."""
    return "AuthenticAMD" in CPU and "avx512_bf16" in CPU and backend_in_use() == "cpu_avx512"


def has_vnni():
    """Whether the backend in use multiplies bytes without saturating: with x in 8 bits instead of 7."""
    if backend_in_use() == "cpu_avx512":
        return "avx512_vnni" in CPU
    return "avx_vnni" in CPU and ("avx512f" not in CPU or "QVL_AVX_VNNI" in os.environ)


def has_amx():
    """Whether the backend in use multiplies registers of bfloat16 numbers and bytes."""
    return AMX and backend_in_use() == "cpu_avx512"


def largest_of_int4(packed):
    """For each weight the largest magnitude that any of its 128 could have, by scales and minima of their groups."""
    scale, minimum = packed.scale.double(), packed.minimum.double()
    most = torch.maximum(minimum.abs(), (minimum + 15 * scale).abs()).unflatten(-1, (-1, 4)).amax(-1)
    return most.repeat_interleave(128, -1)[:, : packed.in_features]


def rounding_of_factors(x, packed, precision):
    """The bound of the docstring, (M, N)."""
    x, weight, format = x.double(), packed.dequantize().double(), packed.format
    few = x.shape[0] <= FEW_ROWS
    medium = precision == "medium" and (not few or (format == "int4" and backend_in_use() != "reference"))
    if medium and format == "bf16" and (has_bf16_dots() or has_amx()):
        return (x.abs() / 256) @ weight.abs().T
    if (format in ("fp32", "bf16") and not medium) or not x.numel() or not weight.numel():
        return torch.zeros(x.shape[0], weight.shape[0], dtype=torch.float64)
    x_step, w_step = (1 / 16382, 1 / 4094) if format == "int4" and x.shape[0] > FEW_ROWS else (1 / 65534, 0.0)
    if medium:
        x_step, w_step = (1 / 254, 0.0) if format in ("int8", "int4") else (1 / 8190, 1 / 8190)
    ranged = medium and format == "int8" and not has_vnni()
    dx, dw = (group_range(x) if ranged else group_maximum(x)) * x_step, group_maximum(weight) * w_step
    if medium and not few and format == "int4" and (has_amx() or (has_vnni() and x.shape[0] > 128)):
        dw = largest_of_int4(packed) / 254
    return dx @ weight.abs().T + (x.abs() + dx) @ dw.T


def check(x, packed, ours, bias=None, precision="highest"):
    """Against the float64 product; for float32 the sum's bound, else flash-attention's rule, plus the factors'."""
    dense = packed.dequantize()
    exact = x.double() @ dense.double().T + (0 if bias is None else bias.double())
    plain = x @ dense.to(x.dtype).T + (0 if bias is None else bias.to(x.dtype))
    allowed = rounding_of_factors(x, packed, precision)
    within = exact + (ours.double() - exact).clamp(-allowed, allowed)  # the closest value that rounding explains
    largest = (x.double().norm(dim=-1).max() * dense.double().norm(dim=-1).max()).item() if exact.numel() else 0.0
    assert_close("y", ours, within, plain, x.shape[-1], largest=largest if x.dtype == torch.float32 else 0.0)


@pytest.mark.parametrize("precision", ["highest", "medium"])
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_product(backend, format, precision):
    device = device_of(backend)
    for i, (rows, k, n) in enumerate(SHAPES):
        x, weight = torch.randn(rows, k, device=device), torch.randn(n, k, device=device) + 0.3
        bias = torch.randn(n, device=device) if i % 2 else None
        packed = pack_linear(weight, bias, format=format)
        with on(backend):
            check(x, packed, packed_linear(x, packed, precision=precision), bias, precision)


@pytest.mark.parametrize("precision", ["highest", "medium"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_dtypes_of_x(backend, format, dtype, precision):
    for rows, k, n in [(1, 64, 48), (2, 65, 17), (9, 128, 31), (1, 1, 1), (40, 200, 70), (70, 200, 70)]:
        x, weight, bias = torch.randn(rows, k, dtype=dtype), torch.randn(n, k), torch.randn(n)
        packed = pack_linear(weight, bias, format=format)
        with on(backend):
            check(x, packed, packed_linear(x, packed, precision=precision), bias, precision)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("rows", [1, 5, 40, 70])
@pytest.mark.parametrize("backend", BACKENDS)
def test_strided_and_misaligned_x(backend, rows, format):
    packed = pack_linear(torch.randn(20, 140), format=format)
    odd = torch.randn(rows * 150 + 1)[1:].view(rows, 150)[:, 3:143]  # rows 150 apart, 4 bytes off any alignment
    columns = torch.randn(140, rows).T  # last stride not 1
    expanded = torch.randn(1, 140).expand(rows, 140)
    folded = torch.randn(2, 3, rows, 140).transpose(0, 2)
    for x in (odd, columns, expanded, folded):
        with on(backend):
            ours = packed_linear(x, packed)
        assert ours.shape == (*x.shape[:-1], 20)
        check(x.reshape(-1, 140), packed, ours.reshape(-1, 20))


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_weight_at_an_odd_address(backend, format):
    packed = pack_linear(torch.randn(9, 200), format=format)
    moved = torch.empty(packed.weight.numel() + 1, dtype=packed.weight.dtype)[1:].view(packed.weight.shape)
    moved.copy_(packed.weight)
    elsewhere = PackedWeight(moved, None, format, 200, packed.scale, packed.minimum)
    for x in (torch.randn(rows, 200) for rows in (1, 20, 70)):
        for precision in ("highest", "medium"):
            with on(backend):
                ours = packed_linear(x, elsewhere, precision=precision)
                check(x, packed, ours, precision=precision)
                # torch's sums may depend on the address
                assert backend == "reference" or torch.equal(ours, packed_linear(x, packed, precision=precision))


@pytest.mark.parametrize("backend", BACKENDS)
def test_medium_is_highest_where_nothing_is_gained(backend):
    """Few rows but for int4, and the reference."""
    for format, rows in [("fp32", 1), ("bf16", 16), ("int8", 16)]:
        x, packed = torch.randn(rows, 200), pack_linear(torch.randn(30, 200), format=format)
        with on(backend):
            assert torch.equal(packed_linear(x, packed, precision="medium"), packed_linear(x, packed))
    if backend == "reference":
        for format in FORMATS:
            x, packed = torch.randn(40, 200), pack_linear(torch.randn(30, 200), format=format)
            with on(backend):
                assert torch.equal(packed_linear(x, packed, precision="medium"), packed_linear(x, packed))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("format", ["int8", "int4"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_medium_on_x_of_one_sign(backend, format, dtype):
    """What a step of the range of x, where the CPU has no VNNI, gains: after an activation, far from zero, constant.

    Rows that are constant lose nothing, whichever remainder of a tile they are in.
    """
    generator = torch.Generator().manual_seed(0)
    normal = torch.randn(45, 384, generator=generator)
    packed = pack_linear(torch.randn(37, 384, generator=generator) + 0.1, format=format)
    spike, constant = torch.zeros(45, 384), torch.linspace(-3, 3, 45).unsqueeze(1).expand(45, 384)
    spike[:, 129] = torch.linspace(-1e3, 1e3, 45)
    for x in (torch.nn.functional.gelu(normal), normal.abs(), -normal.exp(), normal + 100, spike, constant):
        x = x.to(dtype)
        with on(backend):
            check(x, packed, packed_linear(x, packed, precision="medium"), precision="medium")


@pytest.mark.parametrize("precision", ["highest", "medium"])
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("rows", [1, 3, 40, 70])
@pytest.mark.parametrize("backend", BACKENDS)
def test_outliers_and_zeros(backend, rows, format, precision):
    """One huge activation costs precision only among its 128; rows of zeros stay zero."""
    x, weight = torch.randn(rows, 384), torch.randn(21, 384)
    x[0, 5], weight[3, 200], weight[4] = 1e4, -50.0, 0.0
    packed = pack_linear(weight, format=format)
    with on(backend):
        ours = packed_linear(x, packed, precision=precision)
        check(x, packed, ours, precision=precision)
        assert (ours[:, 4] == 0).all()
        assert (packed_linear(torch.zeros_like(x), packed, precision=precision) == 0).all()


@pytest.mark.parametrize("precision", ["highest", "medium"])
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("rows", [1, 6, 40, 70])
@pytest.mark.parametrize("backend", BACKENDS)
def test_extremes_do_not_overflow(backend, rows, format, precision):
    """Every product of the largest magnitude and one sign: what the integer sums have to hold. With one zero among 128
    equal numbers these are the whole range above or below it.
    """
    x, weight = torch.full((rows, 1024), 3.0), torch.full((17, 1024), 2.0)
    weight[:, ::32] = -2.0
    packed = pack_linear(weight, format=format)
    but_one = x.clone()
    but_one[:, 5::128] = 0.0
    for factor in (x, -x, but_one, -but_one):
        with on(backend):
            check(factor, packed, packed_linear(factor, packed, precision=precision), precision=precision)


@pytest.mark.parametrize("backend", BACKENDS)
def test_integers_are_multiplied_exactly(backend):
    """x and W that are integers already, 127 the largest of each 128: y is exact.

    Each 16 outputs have one sum of four weights that is the largest that can be multiplied by 127 in 16 bits, 258, or
    the next, or the largest of all, of either sign: what `vpmaddubsw` and additions in 16 bits must get right.
    """
    generator = torch.Generator().manual_seed(0)
    fours = [(127, 127, 4, 0), (127, 126, 4, 2), (127, 127, 127, 127), (127, 0, 127, 4), (0, 127, 127, 5)]
    weight = torch.randint(-40, 41, (32 * len(fours), 256), generator=generator).float()
    weight[:, 2::128] = 127.0
    for i, four in enumerate(fours):
        for j, sign in enumerate((1, -1)):
            weight[32 * i + 16 * j + 3, torch.tensor([24, 25, 28, 29])] = sign * torch.tensor(four).float()
    x = torch.randint(0, 128, (47, 256), generator=generator).float()
    x[15:] = 127.0
    x[:, 6::128], x[:, 7::128] = 127.0, 0.0
    packed = pack_linear(weight, format="int8")
    with on(backend):
        assert torch.equal(packed_linear(x, packed, precision="medium").double(), x.double() @ weight.double().T)


@pytest.mark.parametrize("precision", ["highest", "medium"])
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("rows", [1, 5, 40, 70])
@pytest.mark.parametrize("backend", BACKENDS)
def test_not_a_number_stays_in_its_row(backend, rows, format, precision):
    x, packed = torch.randn(rows, 256), pack_linear(torch.randn(12, 256), format=format)
    x[-1, 7] = torch.nan
    with on(backend):
        ours = packed_linear(x, packed, precision=precision)
    assert ours[-1].isnan().all()
    assert not ours[:-1].isnan().any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("rows", [1, 5, 40, 70])
@pytest.mark.parametrize("backend", BACKENDS)
def test_epilogue(backend, rows, format, dtype):
    """Activation and residual after the product, rounded once: as close to the three steps as one rounding of each."""
    x, weight, bias = torch.randn(rows, 96, dtype=dtype), torch.randn(170, 96) / 10, torch.randn(170)
    packed = pack_linear(weight, bias, format=format)
    with on(backend):
        product = packed_linear(x.float(), packed)
        for activation, made in (
            (None, product),
            ("gelu_tanh", gelu_tanh_of(product)),
            ("swiglu", swiglu_of(product)),
        ):
            residual = torch.randn(made.shape, dtype=dtype)
            ours = packed_linear(x, packed, activation=activation, residual=residual)
            expected = made.double() + residual.double()
            # float32: the product's own error, of which the activations keep at most a factor 1.2; else one rounding
            # of the result, and one of the product where the backend is plain PyTorch in the dtype.
            bound = 3e-6 if dtype == torch.float32 else 4 * torch.finfo(dtype).eps
            bound *= (1 + product.abs().max().item()) * max(1.0, made.abs().max().item())
            assert ours.dtype == dtype
            assert (ours.double() - expected).abs().max() <= bound


def gelu_tanh_of(product):
    with on("reference"):
        return gelu_tanh(product.double())


def swiglu_of(product):
    with on("reference"):
        return swiglu(*product.double().chunk(2, dim=-1))


@given(
    rows=st.integers(0, 80), k=st.integers(0, 300), n=st.integers(0, 80), format=st.sampled_from(FORMATS),
    scale=st.sampled_from([1e-20, 1e-3, 1.0, 1e6]), precision=st.sampled_from(["highest", "medium"]),
    seed=st.integers(0, 99),
)  # fmt: skip
@settings(max_examples=100, deadline=None)
def test_any_size(rows, k, n, format, scale, precision, seed):
    generator = torch.Generator().manual_seed(seed)
    x, weight = torch.randn(rows, k, generator=generator) * scale, torch.randn(n, k, generator=generator)
    packed = pack_linear(weight, format=format)
    check(x, packed, packed_linear(x, packed, precision=precision), precision=precision)


def test_results_do_not_depend_on_the_number_of_threads():
    threads = torch.get_num_threads()
    for format in FORMATS:
        packed = pack_linear(torch.randn(300, 512), format=format)
        for rows in (1, 2, 5, 100):
            x = torch.randn(rows, 512)
            for precision in ("highest", "medium"):
                torch.set_num_threads(1)
                alone = packed_linear(x, packed, precision=precision)
                torch.set_num_threads(3)
                assert torch.equal(packed_linear(x, packed, precision=precision), alone)
                torch.set_num_threads(threads)


@pytest.mark.skipif("avx512f" not in CPU or "avx_vnni" not in CPU, reason="needs a CPU with AVX-VNNI and AVX-512")
def test_avx_vnni():
    """The AVX2 module on a CPU with AVX-VNNI and no AVX-512: the tests above, in a process that takes this for one."""
    run = [sys.executable, "-m", "pytest", __file__, "-q", "-p", "no:cacheprovider", "-k", "cpu_avx2"]
    done = subprocess.run(run, env={**os.environ, "QVL_AVX_VNNI": "1"}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:]  # 5 if no test was chosen


@pytest.mark.skipif(not AMX, reason="needs a CPU with AMX")
def test_avx512_without_amx():
    """The tests above on the same CPU with AMX ruled out."""
    run = [sys.executable, "-m", "pytest", __file__, "-q", "-p", "no:cacheprovider", "-k", "cpu_avx512"]
    done = subprocess.run(run, env={**os.environ, "QVL_AMX": "0"}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:]  # 5 if no test was chosen


@pytest.mark.skipif(not AMX, reason="needs a CPU with AMX")
def test_amx_beside_torch():
    """torch's products configure and use the same registers on the same threads."""
    x, weight = torch.randn(70, 300), torch.randn(130, 300)
    packed = pack_linear(weight, format="bf16")
    alone, own = packed_linear(x, packed), x.bfloat16() @ weight.bfloat16().T
    for _ in range(3):
        assert torch.equal(x.bfloat16() @ weight.bfloat16().T, own)
        assert torch.equal(packed_linear(x, packed), alone)


@pytest.mark.parametrize("rows", [9, 40])
@pytest.mark.parametrize("backend", BACKENDS)
def test_infinite_activations(backend, rows):
    """An infinity stays one, whatever parts a number is cut into."""
    x, packed = torch.randn(rows, 64), pack_linear(torch.rand(12, 64) + 0.5, format="bf16")
    x[0, 3], x[1, 5], x[2, 7] = torch.inf, -torch.inf, torch.finfo(torch.float32).max / 64
    with on(backend):
        ours = packed_linear(x, packed)
    assert (ours[0] == torch.inf).all()
    assert (ours[1] == -torch.inf).all()
    assert ours[2:].isfinite().all()


def test_module_replaces_a_linear_layer():
    linear = nn.Linear(6, 5)
    packed = PackedLinear.from_linear(linear, format="fp32")
    x = torch.randn(2, 3, 6, requires_grad=True)
    torch.testing.assert_close(packed(x), linear(x))
    packed(x).sum().backward()
    torch.testing.assert_close(x.grad, linear.weight.sum(0).expand(2, 3, 6))
    assert list(packed.parameters()) == []
    assert set(packed.state_dict()) == {"weight", "bias"}
    assert repr(packed) == "PackedLinear(6, 5, bias=True, format='fp32')"


def test_bad_arguments_are_named():
    packed = pack_linear(torch.ones(3, 4), format="fp32")
    with pytest.raises(ValueError, match="packed_linear: x's last dimension must be in_features = 4"):
        packed_linear(torch.ones(2, 3), packed)
    with pytest.raises(TypeError, match="packed_linear: x must be float32, bfloat16, float16 or float64, got int32"):
        packed_linear(torch.ones(2, 4, dtype=torch.int32), packed)
    with pytest.raises(ValueError, match="activation must be None, 'gelu_tanh' or 'swiglu', got 'relu'"):
        packed_linear(torch.ones(2, 4), packed, activation="relu")
    with pytest.raises(ValueError, match="precision must be 'highest' or 'medium', got 'low'"):
        packed_linear(torch.ones(2, 4), packed, precision="low")
    with pytest.raises(ValueError, match="swiglu needs gate and up of one size, got 3 output features"):
        packed_linear(torch.ones(2, 4), packed, activation="swiglu")
    with pytest.raises(ValueError, match=r"residual must have shape y's = \(2, 3\), got \(2, 4\)"):
        packed_linear(torch.ones(2, 4), packed, residual=torch.ones(2, 4))
    with pytest.raises(TypeError, match="residual must have x's dtype float32, got float64"):
        packed_linear(torch.ones(2, 4), packed, residual=torch.ones(2, 3).double())
