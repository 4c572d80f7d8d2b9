"""attention, attention_varlen and scaled_dot_product_attention: forward, backward and decode.

FLOPs: 2 Lq Lk (D + Dv) B Hq, half of it where causal (Lq = Lk); backward 2.5 times that. Bytes: q, k, v and out once.
torch: F.scaled_dot_product_attention; for packed segments one call a segment; for int8 caches it after a conversion to
float32. The reference is left out where it takes seconds. "medium" is `precision`: integers in both products, or
bfloat16 with AMX, which pass the FMA roof; where the CPU multiplies no faster that way it computes the same as without.
Shapes: prompts and decode steps of Qwen3-VL-2B's text model (16 / 8 heads of 128), images of its vision tower (16 heads
of 64); 16384 tokens with a quarter of the heads.
"""

import pytest
import torch
import torch.nn.functional as F
from timing import Case

from qvl_kernels import attention, attention_varlen, quantize_kv, scaled_dot_product_attention
from qvl_kernels.reference import attention as reference
from qvl_kernels.reference import attention_varlen as varlen_reference

SHORT = {torch.float32: "fp32", torch.bfloat16: "bf16"}
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2}
LENGTHS = (256, 64, 512, 1024, 2048, 4096)


def qkv(batch, heads_q, heads_kv, len_q, len_k, dim, dtype):
    shapes = (batch, heads_q, len_q, dim), (batch, heads_kv, len_k, dim), (batch, heads_kv, len_k, dim)
    return [torch.randn(shape).to(dtype) for shape in shapes]


def plain(q, k, v, causal):
    visible = reference.visible_keys(q.shape[2], k.shape[2], causal, -1, -1, None, q.device)
    return reference.forward(q, k, v, q.shape[-1] ** -0.5, visible, None)[0]


@pytest.mark.parametrize(
    ("batch", "length", "heads", "dtype"),
    [
        *((1, n, (16, 8), torch.float32) for n in LENGTHS),
        *((1, n, (16, 8), torch.bfloat16) for n in LENGTHS),
        (1, 16, (16, 8), torch.float32),
        (8, 256, (16, 8), torch.float32),
        (1, 16384, (4, 2), torch.float32),
        (1, 16384, (4, 2), torch.bfloat16),
    ],
)
def bench_causal(compare, batch, length, heads, dtype):
    q, k, v = qkv(batch, *heads, length, length, 128, dtype)
    flops = 2 * length**2 * 256 * heads[0] * batch / 2
    series = f"causal {heads[0]}/{heads[1]} x 128, {SHORT[dtype]}" if batch == 1 else ""
    name = f"{batch} x {length} causal {heads[0]}/{heads[1]} x 128, {SHORT[dtype]}"
    case = Case("attention", name, flops, 2 * q.nbytes + 2 * k.nbytes, series, length)
    ours = lambda: attention(q, k, v, causal=True)  # noqa: E731
    own = lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)  # noqa: E731
    compare(case, ours, (lambda: plain(q, k, v, True)) if length <= 1024 else None, own, TOLERANCE[dtype])


@pytest.mark.parametrize(
    ("length", "heads", "dim", "causal"),
    [*((n, (16, 8), 128, True) for n in (512, 1024, 4096)), *((n, (16, 16), 64, False) for n in (784, 4096))],
)
def bench_rounded(compare, length, heads, dim, causal):
    q, k, v = qkv(1, *heads, length, length, dim, torch.float32)
    flops = 4 * length**2 * dim * heads[0] / (2 if causal else 1)
    shape = f"{heads[0]}/{heads[1]} x {dim}, fp32, medium"
    case = Case("attention", f"1 x {length} {'causal ' * causal}{shape}", flops, 2 * q.nbytes + 2 * k.nbytes)
    ours = lambda: attention(q, k, v, causal=causal, precision="medium")  # noqa: E731
    own = lambda: F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True)  # noqa: E731
    halves = torch.equal(ours().bfloat16(), attention(*(x.bfloat16() for x in (q, k, v)), causal=causal))
    compare(case, ours, None, own, TOLERANCE[torch.bfloat16] if halves else 2e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("length", [256, 64, 784, 4096])
def bench_scaled_dot_product_attention(compare, length, dtype):
    q, k, v = qkv(1, 16, 16, length, length, 64, dtype)
    flops = 2 * length**2 * 128 * 16
    name, series = (f"{n}16 x 64, {SHORT[dtype]}" for n in (f"{length} ", ""))
    case = Case("scaled_dot_product_attention", name, flops, 4 * q.nbytes, series, length)
    ours = lambda: scaled_dot_product_attention(q, k, v)  # noqa: E731
    own = lambda: F.scaled_dot_product_attention(q, k, v)  # noqa: E731
    compare(case, ours, (lambda: plain(q, k, v, False)) if length <= 1024 else None, own, TOLERANCE[dtype])


@pytest.mark.parametrize(
    ("batch", "len_k", "dtype"),
    [
        (1, 4096, torch.float32),
        (1, 4096, torch.bfloat16),
        (1, 4096, torch.int8),
        (8, 1024, torch.float32),
        (1, 32768, torch.float32),
        (1, 32768, torch.bfloat16),
        (1, 32768, torch.int8),
    ],
    ids=str,
)
def bench_decode(compare, batch, len_k, dtype):
    wide = torch.float32 if dtype == torch.int8 else dtype
    q, k, v = qkv(batch, 16, 8, 1, len_k, 128, wide)
    flops = 2 * len_k * 256 * 16 * batch
    own = lambda: F.scaled_dot_product_attention(q, k, v, enable_gqa=True)  # noqa: E731
    ours = lambda: attention(q, k, v)  # noqa: E731
    nbytes = k.nbytes + v.nbytes
    if dtype == torch.int8:
        (k8, ks), (v8, vs) = quantize_kv(k), quantize_kv(v)
        nbytes = k8.nbytes + v8.nbytes + ks.nbytes + vs.nbytes
        ours = lambda: attention(q, k8, v8, key_scale=ks, value_scale=vs)  # noqa: E731

        def own():
            wide_k, wide_v = k8.float() * ks[..., None], v8.float() * vs[..., None]
            return F.scaled_dot_product_attention(q, wide_k, wide_v, enable_gqa=True)

    name = f"{batch} x 1 query, {len_k} keys 16/8 x 128, {'int8' if dtype == torch.int8 else SHORT[dtype]}"
    compare(Case("attention", name, flops, nbytes), ours, None, own, TOLERANCE[wide])


@pytest.mark.parametrize("precision", ["highest", "medium"])
@pytest.mark.parametrize("lengths", [(784,), (256, 784, 400, 1024, 144, 576, 900, 324)], ids=str)
def bench_varlen(compare, lengths, precision):
    q, k, v = torch.randn(3, sum(lengths), 16, 64)
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    flops = sum(2 * n * n * 128 * 16 for n in lengths)
    name = f"{'+'.join(map(str, lengths))} 16 x 64, fp32" + (", medium" if precision == "medium" else "")
    case = Case("attention_varlen", name, flops, 4 * q.nbytes)

    def own():
        parts = (x.split(lengths) for x in (q, k, v))
        return torch.cat(
            [
                F.scaled_dot_product_attention(*(x.transpose(0, 1)[None] for x in qkv))[0].transpose(0, 1)
                for qkv in zip(*parts)
            ]
        )

    starts = offsets.tolist()
    packed = [x.transpose(0, 1)[None] for x in (q, k, v)]

    def one_by_one():
        out, _ = varlen_reference.forward(*packed, starts, starts, 64**-0.5, False, -1, -1)
        return out[0].transpose(0, 1)

    ours = lambda: attention_varlen(q, k, v, offsets, offsets, precision=precision)  # noqa: E731
    compare(case, ours, one_by_one, own, TOLERANCE[torch.bfloat16] if precision == "medium" else 1e-4)


@pytest.mark.parametrize(
    ("length", "dtype"),
    [(256, torch.float32), (1024, torch.float32), (4096, torch.float32), (1024, torch.bfloat16)],
    ids=str,
)
def bench_backward(compare, length, dtype):
    q, k, v = (x.requires_grad_() for x in qkv(1, 16, 8, length, length, 128, dtype))
    grad = torch.randn(1, 16, length, 128).to(dtype)
    with torch.enable_grad():
        ours = attention(q, k, v, causal=True)
        own = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    back = lambda out: torch.autograd.grad(out, (q, k, v), grad, retain_graph=True)  # noqa: E731
    flops = 2.5 * 2 * length**2 * 256 * 16 / 2
    name = f"1 x {length} causal 16/8 x 128, {SHORT[dtype]}, backward"
    case = Case("attention", name, flops, 5 * q.nbytes + 4 * k.nbytes)
    compare(case, lambda: back(ours), None, lambda: back(own), 3 * TOLERANCE[dtype])
