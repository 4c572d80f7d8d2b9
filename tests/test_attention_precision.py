"""attention and attention_varlen with precision="medium": integers in both products, or bfloat16 on a CPU with AMX,
against float64.

The docstring's bounds hold for any input; on normal numbers the error of integers is an eighth of what bfloat16 has,
and that is tested too, since the bound is far above it.
"""

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from utils import DTYPES, backends_of, on

from qvl_kernels import attention, attention_varlen, available_backends, quantize_kv
from qvl_kernels._attention import softmax_attention
from qvl_kernels.reference import attention as reference

BACKENDS = [backend for backend in backends_of("attention") if backend.values[0].startswith("cpu")]
CPU = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""


AMX = "amx_bf16" in CPU and os.environ.get("QVL_AMX") != "0"


def rounds(backend):
    return backend == "cpu_avx2" or "avx512_vnni" in CPU


def multiplies_halves(backend):
    """Whether "medium" means bfloat16."""
    return backend == "cpu_avx512" and AMX


def inputs(heads, kv_heads, len_q, len_k, dim, dim_v, dtype=torch.float32, seed=0, batch=1):
    generator = torch.Generator().manual_seed(seed)
    shapes = (batch, heads, len_q, dim), (batch, kv_heads, len_k, dim), (batch, kv_heads, len_k, dim_v)
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


def exact(query, key, value, scale=None, mask=None, **options):
    """In float64, whatever the call's options are, as a mask."""
    query, key, value = query.double(), key.double(), value.double()
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    window = options.get("window") or (-1, -1)
    visible = reference.visible_keys(
        query.shape[2], key.shape[2], options.get("causal", False), *window, options.get("key_lengths"), query.device
    )
    mask = mask.double() if mask is not None and mask.dtype != torch.bool else mask
    return reference.forward(query, key, value, scale, visible, mask)[0]


def bound(backend, query, key, value, scale=None):
    """Of the docstring; the errors of a query's scores at most."""
    query, key, largest = query.double(), key.double(), value.double().abs().max().item()
    dim = query.shape[-1]
    if multiplies_halves(backend):  # q (1 + u) k (1 + u) with |u| <= 2^-9; then the weights, exponentials, values
        key = key.repeat_interleave(query.shape[1] // key.shape[1], 1)
        sums = (query.abs() @ key.abs().mT).amax(-1) * (dim**-0.5 if scale is None else scale)
        return (torch.expm1(2 * (2**-8 + 2**-18) * sums).unsqueeze(-1) + 2**-8 + 2**-12) * largest
    most = min(32767, math.floor(math.sqrt((2**31 - 1) / dim)))
    query = query.abs() * (dim**-0.5 if scale is None else scale)
    key = key.abs()
    longest = key.sum(-1).max().item(), key.max().item()
    error = (query.amax(-1) * longest[0] + query.sum(-1) * longest[1]) / (2 * most)
    error = error + dim * query.amax(-1) * longest[1] / (4 * most**2)
    return (torch.expm1(2 * error).unsqueeze(-1) + 64 / 32766 + 1 / 4094) * largest


def check(backend, ours, query, key, value, expected, scale=None):
    resolution = {torch.float32: 1e-5, torch.bfloat16: 2**-8, torch.float16: 2**-10}[query.dtype]
    error = (ours.double() - expected).abs()
    assert (error <= bound(backend, query, key, value, scale) + resolution * (expected.abs() + 1e-3)).all()


SHAPES = [
    (4, 2, 300, 300, 64, 64), (2, 2, 257, 640, 128, 128), (3, 1, 40, 513, 80, 80), (2, 1, 65, 1025, 72, 80),
    (1, 1, 97, 300, 1, 1), (2, 2, 50, 259, 5, 7), (1, 1, 100, 258, 256, 250), (2, 1, 200, 767, 33, 130),
]  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_shapes_and_dtypes(backend, shape, dtype):
    query, key, value = inputs(*shape, dtype)
    with on(backend):
        ours = attention(query, key, value, precision="medium")
    assert ours.dtype == dtype
    check(backend, ours, query, key, value, exact(query, key, value))


@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("backend", BACKENDS)
def test_an_eighth_of_what_bfloat16_loses(backend, dim):
    query, key, value = inputs(4, 4, 600, 1200, dim, dim)
    expected = exact(query, key, value)
    halves = F.scaled_dot_product_attention(query.bfloat16(), key.bfloat16(), value.bfloat16())
    with on(backend):
        ours = attention(query, key, value, precision="medium")
        precise = attention(query, key, value)
    norms = [((x.double() - expected).norm() / expected.norm()).item() for x in (ours, halves, precise)]
    if multiplies_halves(backend):
        assert norms[2] * 10 < norms[0] < norms[1]
        return
    assert norms[0] < norms[1] / 6
    if rounds(backend):
        assert norms[2] * 10 < norms[0], "it is integers that are tested"


@pytest.mark.parametrize(
    "options",
    [{"causal": True}, {"window": (100, 40)}, {"causal": True, "window": (300, 0)}, {"scale": 0.3}],
    ids=str,
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_forms(backend, options):
    query, key, value = inputs(4, 2, 700, 800, 64, 64)
    with on(backend):
        ours = attention(query, key, value, precision="medium", **options)
    check(backend, ours, query, key, value, exact(query, key, value, **options), options.get("scale"))


@pytest.mark.parametrize("backend", BACKENDS)
def test_masks_and_lengths(backend):
    query, key, value = inputs(2, 2, 90, 420, 64, 64, batch=2)
    lengths = torch.tensor([420, 301])
    keep = torch.rand(2, 1, 90, 420) < 0.5
    keep[0, 0, 7] = False  # a query that sees nothing
    added = torch.randn(1, 2, 90, 420)
    with on(backend):
        ragged = attention(query, key, value, key_lengths=lengths, precision="medium")
        masked = attention(query, key, value, mask=keep, precision="medium")
        biased = attention(query, key, value, mask=added, precision="medium")
    check(backend, ragged, query, key, value, exact(query, key, value, key_lengths=lengths))
    check(backend, masked, query, key, value, exact(query, key, value, mask=keep))
    check(backend, biased, query, key, value, exact(query, key, value, mask=added))
    assert (masked[0, :, 7] == 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_weights_far_below_the_largest_count(backend):
    """One key takes most; the others' weights, 2^-17 of it each, together half as much: integers of 14 bits relative to
    the row's largest would lose them."""
    length = 1 << 16
    query, key, value = torch.ones(1, 1, 40, 1), torch.zeros(1, 1, length, 1), torch.ones(1, 1, length, 1)
    key[0, 0, 100] = math.log(2.0**17)
    value[0, 0, 100] = 0.0
    with on(backend):
        ours = attention(query, key, value, scale=1.0, precision="medium")
    expected = exact(query, key, value, scale=1.0)
    assert expected.min() > 0.3
    limit = bound(backend, query, key, value, 1.0).max() if multiplies_halves(backend) else 3e-3
    assert (ours.double() - expected).abs().max() < limit


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16, torch.int8])
@pytest.mark.parametrize("backend", BACKENDS)
def test_caches_of_other_types(backend, stored):
    query, key, value = inputs(4, 2, 64, 600, 128, 128)
    if stored == torch.int8:
        (key, key_scale), (value, value_scale) = quantize_kv(key), quantize_kv(value)
        with on(backend):
            ours = attention(
                query, key, value, causal=True, key_scale=key_scale, value_scale=value_scale, precision="medium"
            )
        key, value = key * key_scale.unsqueeze(-1), value * value_scale.unsqueeze(-1)
    else:
        key, value = key.to(stored), value.to(stored)
        with on(backend):
            ours = attention(query, key, value, causal=True, precision="medium")
    check(backend, ours, query, key, value, exact(query, key, value, causal=True))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_segments(backend, causal):
    lengths = [700, 0, 300, 1, 900]
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    query, key, value = (torch.randn(sum(lengths), heads, 64) for heads in (4, 2, 2))
    with on(backend):
        ours = attention_varlen(query, key, value, offsets, offsets, causal=causal, precision="medium")
    for begin, end in zip(offsets.tolist(), offsets[1:].tolist()):
        if begin < end:
            one = [x[begin:end].transpose(0, 1)[None] for x in (query, key, value)]
            check(backend, ours[begin:end].transpose(0, 1)[None], *one, exact(*one, causal=causal))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(4, 2, 333, 500, 72, 72), (16, 8, 512, 512, 128, 128)], ids=str)
def test_strides_and_threads_change_nothing(backend, shape):
    """Eight heads are enough for one thread, whose blocks share packed keys, and not for three."""
    query, key, value = inputs(*shape)
    threads = torch.get_num_threads()
    with on(backend):
        ours = attention(query, key, value, causal=True, precision="medium")
        apart = [torch.cat((x, x), -1)[..., : x.shape[-1]] for x in (query, key, value)]
        assert torch.equal(attention(*apart, causal=True, precision="medium"), ours)
        try:
            for count in (1, 3):
                torch.set_num_threads(count)
                assert torch.equal(attention(query, key, value, causal=True, precision="medium"), ours)
        finally:
            torch.set_num_threads(threads)


@pytest.mark.parametrize("backend", BACKENDS)
def test_numbers_that_are_not_finite(backend):
    """A query's stay in its row, a key's in the rows that see it."""
    query, key, value = inputs(1, 1, 300, 600, 64, 64)
    with on(backend):
        clean = attention(query, key, value, causal=True, precision="medium")
        for wrong in (math.nan, math.inf):
            spoiled = query.clone()
            spoiled[0, 0, 5, 3] = wrong
            ours = attention(spoiled, key, value, causal=True, precision="medium")
            others = torch.arange(300) != 5
            assert torch.equal(ours[0, 0, others], clean[0, 0, others])
            assert ours[0, 0, 5].isnan().all()
            spoiled = key.clone()
            spoiled[0, 0, 400, 3] = wrong
            ours = attention(query, spoiled, value, causal=True, precision="medium")
            assert torch.equal(ours[0, 0, :100], clean[0, 0, :100])
            minus = (query[0, 0, 100:, 3] < 0) & (wrong == math.inf) & multiplies_halves(backend)  # -inf: no weight
            assert (ours[0, 0, 100:].isnan().all(-1) | minus).all()
            spoiled = value.clone()
            spoiled[0, 0, 400, 3] = wrong
            ours = attention(query, key, spoiled, causal=True, precision="medium")
            assert not ours[0, 0, 100:, 3].isfinite().any()
            columns = torch.arange(64) != 3
            assert torch.equal(ours[..., columns], clean[..., columns])


@pytest.mark.parametrize("scale", [1e-20, 1e6])
@pytest.mark.parametrize("backend", BACKENDS)
def test_extremes(backend, scale):
    query, key, value = inputs(1, 1, 100, 300, 64, 64)
    with on(backend):
        ours = attention(query, key, value * scale, precision="medium")
        check(backend, ours, query, key, value * scale, exact(query, key, value * scale))
        check(
            backend,
            attention(query * scale, key / scale, value, precision="medium"),
            query,
            key,
            value,
            exact(query, key, value),
        )
        for shape in ((100, 256), (100, 128)):  # all products as large as they can be
            ones = torch.ones(1, 1, *shape)
            keys = torch.ones(1, 1, 300, shape[1])
            assert (attention(ones, keys, keys, precision="medium") - 1).abs().max() < 1e-3
            assert (attention(ones, -keys, -keys, precision="medium") + 1).abs().max() < 1e-3


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", backends_of("attention"))
def test_few_keys_are_not_rounded(backend, dtype):
    query, key, value = inputs(2, 1, 100, 200, 64, 64, dtype)
    with on(backend):
        assert torch.equal(attention(query, key, value, precision="medium"), attention(query, key, value))
        query, key, value = inputs(2, 1, 1, 1000, 64, 64, dtype)
        assert torch.equal(attention(query, key, value, precision="medium"), attention(query, key, value))


def test_float64_is_not_rounded():
    query, key, value = inputs(2, 1, 100, 400, 64, 64, torch.float64)
    assert torch.equal(attention(query, key, value, precision="medium"), attention(query, key, value))


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_are_those_of_the_exact_function(backend):
    query, key, value = (x.requires_grad_() for x in inputs(2, 1, 300, 600, 64, 64))
    with on(backend):
        grads = [
            torch.autograd.grad(attention(query, key, value, precision=name).square().sum(), (query, key, value))
            for name in ("highest", "medium")
        ]
    for precise, ours in zip(*grads):
        assert (ours - precise).norm() < 3e-3 * precise.norm()


@given(
    len_q=st.integers(1, 80), len_k=st.integers(256, 700), dim=st.integers(1, 130), dim_v=st.integers(1, 130),
    group=st.integers(1, 3), causal=st.booleans(), spread=st.sampled_from([0.1, 1.0, 4.0]), seed=st.integers(0, 99),
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_any_size(len_q, len_k, dim, dim_v, group, causal, spread, seed):
    query, key, value = inputs(group, 1, len_q, len_k, dim, dim_v, seed=seed)
    query, key = query * spread, key * spread
    ours = attention(query, key, value, causal=causal, precision="medium")
    backend = getattr(softmax_attention.preferred(), "backend", "reference")
    check(backend, ours, query, key, value, exact(query, key, value, causal=causal))


def test_bad_precision_is_named():
    query = torch.ones(1, 1, 2, 4)
    with pytest.raises(ValueError, match="attention: precision must be 'highest' or 'medium', got 'low'"):
        attention(query, query, query, precision="low")
    offsets = torch.tensor([0, 2])
    with pytest.raises(ValueError, match="attention_varlen: precision must be 'highest' or 'medium', got 'low'"):
        attention_varlen(query[0], query[0], query[0], offsets, offsets, precision="low")


@pytest.mark.skipif("avx512f" not in CPU or "avx_vnni" not in CPU, reason="needs a CPU with AVX-VNNI and AVX-512")
def test_avx_vnni():
    """The AVX2 module on a CPU with AVX-VNNI and no AVX-512: the tests above, in a process that takes this for one."""
    assert "cpu_avx2" in available_backends()
    run = [sys.executable, "-m", "pytest", __file__, "-q", "-p", "no:cacheprovider", "-k", "cpu_avx2"]
    done = subprocess.run(run, env={**os.environ, "QVL_AVX_VNNI": "1"}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:]


@pytest.mark.skipif(not AMX, reason="needs a CPU with AMX")
@pytest.mark.parametrize("file", [Path(__file__), Path(__file__).with_name("test_attention.py")], ids=lambda f: f.stem)
def test_without_amx(file):
    """The AVX-512 module as on a CPU without AMX: these tests, and those of bfloat16, in a process that has none."""
    chosen = "cpu_avx512 or any_size" if file == Path(__file__) else "cpu_avx512 and bfloat16"
    run = [sys.executable, "-m", "pytest", str(file), "-q", "-p", "no:cacheprovider", "-k", chosen]
    done = subprocess.run(run, env={**os.environ, "QVL_AMX": "0"}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:]


def test_amx_registers_are_shared_with_torch():
    """torch sets up AMX's registers on the same threads and remembers how: neither may spoil the other's."""
    query, key, value = inputs(4, 2, 200, 300, 64, 64, torch.bfloat16)
    x, w = torch.randn(2, 96, 72).bfloat16().unbind()
    alone = attention(query, key, value), x @ w.mT, F.scaled_dot_product_attention(query, key, value, enable_gqa=True)
    for _ in range(20):
        theirs = F.scaled_dot_product_attention(query, key, value, enable_gqa=True)
        ours, product = attention(query, key, value), x @ w.mT
        for got, expected in zip((ours, product, theirs), alone):
            assert torch.equal(got, expected)
