"""attention and attention_varlen.

FLOPs: 2 Lq Lk (D + Dv) B Hq, half of it where causal (Lq = Lk). Bytes: q, k, v and out once.
torch: F.scaled_dot_product_attention; for packed segments one call a segment.
Shapes: prompts and decode steps of Qwen3-VL-2B's text model (16 / 8 heads of 128), images of its vision tower (16 heads
of 64).
"""

import pytest
import torch
import torch.nn.functional as F
from timing import Case

from qvl_kernels import attention, attention_varlen, scaled_dot_product_attention
from qvl_kernels.reference import attention as reference
from qvl_kernels.reference import attention_varlen as varlen_reference


@pytest.mark.parametrize(("len_q", "len_k"), [(256, 256), (1024, 1024), (1, 4096)])
def bench_causal(compare, len_q, len_k):
    q, k, v = torch.randn(1, 16, len_q, 128), torch.randn(1, 8, len_k, 128), torch.randn(1, 8, len_k, 128)
    flops = 2 * len_q * len_k * 256 * 16 / (2 if len_q > 1 else 1)
    case = Case("attention", f"{len_q} x {len_k} causal 16/8 x 128", flops, 2 * q.nbytes + k.nbytes + v.nbytes)
    ours = lambda: attention(q, k, v, causal=True)  # noqa: E731
    visible = reference.visible_keys(len_q, len_k, True, -1, -1, None, q.device)
    plain = lambda: reference.forward(q, k, v, 128**-0.5, visible, None)[0]  # noqa: E731
    own = lambda: F.scaled_dot_product_attention(q, k, v, is_causal=len_q > 1, enable_gqa=True)  # noqa: E731
    compare(case, ours, plain, own, 1e-4)


@pytest.mark.parametrize("lengths", [(784,), (256, 784, 400, 1024)], ids=str)
def bench_varlen(compare, lengths):
    q, k, v = torch.randn(3, sum(lengths), 16, 64)
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    flops = sum(2 * n * n * 128 * 16 for n in lengths)
    case = Case("attention_varlen", f"{'+'.join(map(str, lengths))} 16 x 64", flops, 4 * q.nbytes)

    def own():
        parts = (x.split(lengths) for x in (q, k, v))
        return torch.cat(
            [
                F.scaled_dot_product_attention(*(x.transpose(0, 1)[None] for x in qkv))[0].transpose(0, 1)
                for qkv in zip(*parts)
            ]
        )

    starts = offsets.tolist()
    ours = lambda: attention_varlen(q, k, v, offsets, offsets)  # noqa: E731
    packed = [x.transpose(0, 1)[None] for x in (q, k, v)]

    def plain():
        out, _ = varlen_reference.forward(*packed, starts, starts, 64**-0.5, False, -1, -1)
        return out[0].transpose(0, 1)

    compare(case, ours, plain, own, 1e-4)


@pytest.mark.parametrize("length", [512, 64])
def bench_scaled_dot_product_attention(compare, length):
    q, k, v = torch.randn(3, 1, 16, length, 64)
    ours = lambda: scaled_dot_product_attention(q, k, v)  # noqa: E731
    plain = lambda: reference.forward(q, k, v, 64**-0.5, None, None)[0]  # noqa: E731
    own = lambda: F.scaled_dot_product_attention(q, k, v)  # noqa: E731
    case = Case("scaled_dot_product_attention", f"{length} 16 x 64", 2 * length**2 * 128 * 16, 4 * q.nbytes)
    compare(case, ours, plain, own, 1e-4)
