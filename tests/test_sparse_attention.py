"""sparse_attention and its gradients against dense attention under the pattern's mask, on every backend by name."""

from __future__ import annotations

import math

import pytest
import torch
import torch.utils.checkpoint
from hypothesis import given, settings
from hypothesis import strategies as st
from test_attention_gradients import gradients, softmax_attention, sums_of_magnitudes
from torch import Tensor
from utils import DTYPES, assert_close, backends_of, device_of, on, qkv

import qvl_kernels
from qvl_kernels import SparsePattern, attention, sparse_attention
from qvl_kernels.reference import attention as dense_reference

BACKENDS = backends_of("sparse_attention")
NATIVE = [parameter for parameter in BACKENDS if parameter.values[0].startswith("cpu")]


def check(backend: str, q: Tensor, k: Tensor, v: Tensor, pattern: SparsePattern, causal: bool = False) -> None:
    """Output and gradients, by the error rule."""
    mask = pattern.to_dense().to(q.device)
    options = {"mask": mask, "causal": causal}
    grad = torch.randn(*q.shape[:3], v.shape[-1], dtype=q.dtype, device=q.device)
    with on(backend):
        ours = sparse_attention(q, k, v, pattern, causal=causal)
        ours_back = gradients(sparse_attention, (q, k, v), grad, pattern=pattern, causal=causal)
    wide = [x.double() for x in (q, k, v)]
    exact, plain = softmax_attention(*wide, **options), softmax_attention(q, k, v, **options)
    group, scale = q.shape[1] // k.shape[1], 1 / math.sqrt(q.shape[-1])
    score = (wide[0] @ wide[1].repeat_interleave(group, 1).mT).abs().max().item() * scale
    terms = k.shape[2] + q.shape[-1]
    assert_close("out", ours, exact, plain, terms, largest=max(1.0, score) * v.abs().max().item())
    exact_back = gradients(softmax_attention, wide, grad, **options)
    plain_back = gradients(softmax_attention, (q, k, v), grad, **options)
    largest = sums_of_magnitudes(q, k, v, grad, **options)
    terms = q.shape[2] * group + k.shape[2] + q.shape[3] + v.shape[3]
    for name, *got, bound in zip(("grad_query", "grad_key", "grad_value"), ours_back, exact_back, plain_back, largest):
        assert_close(name, *got, terms, largest=bound)


def random_pattern(heads: int, len_q: int, len_k: int, block: int, seed: int = 0) -> SparsePattern:
    """A third of the blocks full, a third partial, of these some with a few pairs only."""
    generator = torch.Generator().manual_seed(seed)
    rows, columns = -(-len_q // block), -(-len_k // block)
    kind = torch.randint(0, 3, (heads, rows, columns), generator=generator)
    share = torch.tensor([0.0, 0.3, 1.0])[kind]
    share[kind == 1] *= torch.rand(int((kind == 1).sum()), generator=generator)
    share = share.repeat_interleave(block, 1).repeat_interleave(block, 2)[:, :len_q, :len_k]
    return SparsePattern.from_mask(torch.rand(share.shape, generator=generator) < share, block)


PATTERNS = {
    "window": lambda n, m: SparsePattern.sliding_window(n, m, 50, sinks=3),
    "both ways": lambda n, m: SparsePattern.sliding_window(n, m, 70, block=32, causal=False),
    "strided": lambda n, m: SparsePattern.strided(n, m, 2, block=32),
    "big bird": lambda n, m: SparsePattern.big_bird(n, m, random_blocks=1, heads=4, block=32),
    "random": lambda n, m: random_pattern(1, n, m, 64),
    "per head": lambda n, m: random_pattern(4, n, m, 64),
    "everything": lambda n, m: SparsePattern.from_mask(torch.ones(n, m, dtype=torch.bool)),
    "nothing": lambda n, m: SparsePattern.from_mask(torch.zeros(n, m, dtype=torch.bool)),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("heads_kv", [4, 2])
@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_patterns(backend, pattern, heads_kv, causal, dtype):
    inputs = qkv(2, 4, heads_kv, 150, 170, 16, 24, dtype, device_of(backend))
    check(backend, *inputs, PATTERNS[pattern](150, 170), causal)


@pytest.mark.parametrize("heads", [(1, 1), (8, 1)])
@pytest.mark.parametrize("block", [32, 64, 128, 256])
@pytest.mark.parametrize(
    ("len_q", "len_k"),
    [(1, 1), (1, 300), (5, 3), (63, 63), (64, 64), (65, 65), (111, 65), (17, 333), (300, 129)],
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_lengths_and_blocks(backend, len_q, len_k, block, heads):
    inputs = qkv(1, *heads, len_q, len_k, 8, device=device_of(backend))
    check(backend, *inputs, random_pattern(1, len_q, len_k, block), causal=True)
    check(backend, *inputs, random_pattern(heads[0], len_q, len_k, block))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize(("dim", "dim_v"), [(64, 64), (72, 40), (128, 128), (33, 7), (256, 256), (1, 1)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_head_dimensions(backend, dim, dim_v, dtype):
    inputs = qkv(1, 2, 1, 200, 400, dim, dim_v, dtype, device_of(backend))
    check(backend, *inputs, random_pattern(2, 200, 400, 64), causal=True)


@pytest.mark.parametrize("backend", BACKENDS)
def test_groups_with_and_without_a_common_pattern(backend):
    inputs = qkv(2, 8, 2, 100, 100, 16, device=device_of(backend))
    mask = random_pattern(8, 100, 100, 32).to_dense()
    check(backend, *inputs, SparsePattern.from_mask(mask[:2].repeat_interleave(4, 0), 32))
    check(backend, *inputs, SparsePattern.from_mask(mask, 32))


@pytest.mark.parametrize("backend", BACKENDS)
def test_equals_attention_and_takes_its_scale(backend):
    q, k, v = qkv(1, 4, 2, 130, 130, 16, device=device_of(backend))
    pattern = random_pattern(4, 130, 130, 32)
    with on(backend):
        for options in ({}, {"causal": True}, {"scale": 0.7}):
            expected = attention(q, k, v, mask=pattern.to_dense().to(q.device), **options)
            torch.testing.assert_close(sparse_attention(q, k, v, pattern, **options), expected)
        pattern = SparsePattern.sliding_window(130, 130, 20)
        torch.testing.assert_close(sparse_attention(q, k, v, pattern), attention(q, k, v, causal=True, window=(19, -1)))


@pytest.mark.parametrize("backend", BACKENDS)
def test_strided_inputs_and_expanded_gradients(backend):
    x = torch.randn(2, 90, 3, 4, 16, device=device_of(backend))
    q, k, v = (part.transpose(1, 2) for part in x.unbind(2))
    pattern = random_pattern(1, 90, 90, 32)
    check(backend, q, k, v, pattern)
    check(backend, q[..., ::2], k[..., ::2], v[:, :, :, 1:], pattern)
    with on(backend):
        ours = gradients(sparse_attention, (q, k, v), torch.ones(1, device=q.device).expand_as(q), pattern=pattern)
    mask = pattern.to_dense().to(q.device)
    exact = gradients(softmax_attention, (q.double(), k.double(), v.double()), torch.ones_like(q), mask=mask)
    for got, wanted in zip(ours, exact):
        torch.testing.assert_close(got.double(), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_keys_of_blocks_that_are_not_listed_are_never_read(backend):
    q, k, v = qkv(1, 2, 2, 128, 256, 8, device=device_of(backend))
    layout = torch.tensor([[1, 0, 1, 0], [0, 0, 1, 0]])
    pattern = SparsePattern.from_layout(layout, 64)
    if backend == "reference":
        pytest.skip("the reference multiplies zeros with them")
    with on(backend):
        before = sparse_attention(q, k, v, pattern)
        grads = gradients(sparse_attention, (q, k, v), torch.ones_like(q), pattern=pattern)
        for hidden in (k, v):
            hidden[:, :, 64:128], hidden[:, :, 192:] = torch.nan, torch.inf
        assert torch.equal(before, sparse_attention(q, k, v, pattern))
        again = gradients(sparse_attention, (q, k, v), torch.ones_like(q), pattern=pattern)
        assert all(torch.equal(a, b) for a, b in zip(grads, again))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_scores_that_rise_from_tile_to_tile(backend, dtype):
    """The largest score of the first tile does not serve as the shift of the exponentials: later ones are far above."""
    q, k, v = qkv(1, 2, 1, 40, 900, 16, dtype=dtype, device=device_of(backend))
    k *= torch.logspace(-1, 1.5, 900, dtype=dtype, device=k.device).view(-1, 1)
    for pattern in (random_pattern(1, 40, 900, 32), random_pattern(2, 40, 900, 128)):
        with on(backend):
            ours = sparse_attention(q, k, v, pattern)
        mask = pattern.to_dense().to(q.device)
        exact = dense_reference.forward(q.double(), k.double(), v.double(), 0.25, None, mask)[0]
        score = (q.double() @ k.double().transpose(-1, -2) / 4).abs().max().item()
        assert_close("out", ours, exact, ours, 16 + 900, largest=score * v.abs().max().item())


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_query_that_sees_no_key_gives_zeros_and_no_gradient(backend):
    q, k, v = (x.requires_grad_() for x in qkv(2, 4, 2, 70, 90, 8, device=device_of(backend)))
    mask = torch.rand(4, 70, 90) < 0.2
    mask[:, 3:50] = False
    mask[1] = False
    with on(backend):
        out = sparse_attention(q, k, v, SparsePattern.from_mask(mask, 32))
        out.sum().backward()
    blind = (~mask.any(-1)).to(q.device)
    assert torch.equal(out[:, blind], torch.zeros_like(out[:, blind]))
    assert torch.equal(q.grad[:, blind], torch.zeros_like(q.grad[:, blind]))
    assert all(x.grad.isfinite().all() for x in (q, k, v))


@pytest.mark.parametrize(("len_q", "len_k", "dim"), [(0, 5, 8), (5, 0, 8), (5, 5, 0)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_empty_tensors(backend, len_q, len_k, dim):
    q, k, v = (torch.randn(1, 2, n, d, requires_grad=True) for n, d in ((len_q, dim), (len_k, dim), (len_k, 8)))
    pattern = SparsePattern.from_mask(torch.ones(len_q, len_k, dtype=torch.bool))
    with on(backend):
        out = sparse_attention(q, k, v, pattern)
        if len_k:
            out.sum().backward()
            assert all(x.grad.shape == x.shape and x.grad.isfinite().all() for x in (q, k, v))
    torch.testing.assert_close(out, v.mean(2, True).nan_to_num().expand(1, 2, len_q, 8))


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("backend", NATIVE)
def test_results_do_not_depend_on_the_number_of_threads(backend, shared):
    q, k, v = qkv(2, 4, 2, 500, 600, 32)
    pattern = random_pattern(1 if shared else 4, 500, 600, 64)
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            with on(backend):
                out = sparse_attention(q, k, v, pattern)
                results.append((out, *gradients(sparse_attention, (q, k, v), torch.cos(out), pattern=pattern)))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other))


@pytest.mark.parametrize("backend", NATIVE)
def test_the_result_is_laid_out_for_what_follows(backend):
    q, k, v = qkv(2, 4, 2, 5, 9, 8)
    with on(backend):
        assert sparse_attention(q, k, v, random_pattern(1, 5, 9, 32)).transpose(1, 2).is_contiguous()


@settings(max_examples=120, deadline=None)
@given(
    heads=st.sampled_from([(1, 1), (2, 1), (3, 3), (6, 2), (8, 1)]),
    per_head=st.booleans(),
    len_q=st.integers(1, 200),
    len_k=st.integers(1, 300),
    block=st.sampled_from([32, 64, 128]),
    dims=st.sampled_from([(16, 16), (8, 40), (5, 33), (64, 64), (17, 2)]),
    causal=st.booleans(),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 999),
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_random_masks(backend, heads, per_head, len_q, len_k, block, dims, causal, dtype, seed):
    torch.manual_seed(seed)
    inputs = qkv(1, *heads, len_q, len_k, *dims, dtype=dtype, device=device_of(backend))
    check(backend, *inputs, random_pattern(heads[0] if per_head else 1, len_q, len_k, block, seed), causal)


@pytest.mark.parametrize("backend", BACKENDS)
def test_several_steps_of_the_backward(backend):
    check(backend, *qkv(1, 2, 1, 1100, 1300, 8, device=device_of(backend)), random_pattern(1, 1100, 1300, 32))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_gradcheck_in_float64(backend, causal):
    inputs = tuple(x.requires_grad_() for x in qkv(2, 4, 2, 5, 40, 4, 3, torch.float64, device_of(backend)))
    pattern = random_pattern(4, 5, 40, 32)
    with on(backend):
        assert torch.autograd.gradcheck(lambda q, k, v: sparse_attention(q, k, v, pattern, causal=causal), inputs)


def blocks_of(pattern: SparsePattern) -> tuple:
    return *pattern.lists, pattern.block, pattern.heads == 1, 0.3, True


@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck(backend):
    q, k, v = (x.requires_grad_() for x in qkv(2, 4, 2, 40, 70, 8, 6, device=device_of(backend)))
    with on(backend):
        for pattern in (random_pattern(1, 40, 70, 32), random_pattern(4, 40, 70, 32)):
            blocks = blocks_of(pattern)
            torch.library.opcheck(torch.ops.qvl.sparse_attention.default, (q, k, v, *blocks))
            saved = [x.detach() for x in (q, k, v)]
            out, lse = torch.ops.qvl.sparse_attention(*saved, *blocks)
            call = torch.randn_like(out), *saved, out, lse, *blocks
            torch.library.opcheck(torch.ops.qvl.sparse_attention_backward.default, call)


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiles_into_one_graph_with_gradients(backend):
    q, k, v = qkv(1, 2, 1, 40, 70, 8, device=device_of(backend))
    pattern = random_pattern(2, 40, 70, 32)

    def function(q, k, v):
        return sparse_attention(q * 2, k, v, pattern, causal=True) + 1

    with on(backend):
        compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
        grad = torch.randn_like(function(q, k, v))
        for got, wanted in zip(gradients(compiled, (q, k, v), grad), gradients(function, (q, k, v), grad)):
            torch.testing.assert_close(got, wanted)


def test_transforms_run_the_reference():
    q, k, v = (x.double() for x in qkv(3, 1, 1, 2, 3, 4))
    pattern = SparsePattern.sliding_window(2, 3, 2)
    expected = sparse_attention(q, k, v, pattern)
    mapped = torch.vmap(lambda *x: sparse_attention(*x, pattern))(*(x[:, None] for x in (q, k, v)))
    torch.testing.assert_close(mapped[:, 0], expected)


def test_meta_tensors_have_shapes():
    q, k = torch.empty(2, 4, 5, 8, device="meta"), torch.empty(2, 2, 7, 8, device="meta")
    out, lse = torch.ops.qvl.sparse_attention(q, k, k, *blocks_of(random_pattern(1, 5, 7, 32)))
    assert (out.shape, lse.shape) == ((2, 4, 5, 8), (2, 4, 5))


@pytest.mark.parametrize("backend", NATIVE)
def test_activation_checkpointing(backend):
    """Saved tensors may be looked at once only: each look recomputes."""
    inputs = qkv(1, 2, 1, 6, 6, 8)
    grad, pattern = torch.randn_like(inputs[0]), random_pattern(1, 6, 6, 32)

    def checkpointed(*x):
        return torch.utils.checkpoint.checkpoint(sparse_attention, *x, pattern, use_reentrant=False)

    with on(backend):
        for got, wanted in zip(
            gradients(checkpointed, inputs, grad), gradients(sparse_attention, inputs, grad, pattern=pattern)
        ):
            assert torch.equal(got, wanted)


@pytest.mark.parametrize("backend", NATIVE)
def test_the_binding_refuses_lists_out_of_range(backend):
    """What the operator is handed without a SparsePattern is looked at before any memory is."""
    q, k, v = qkv(1, 2, 2, 40, 70, 8)
    blocks = list(blocks_of(random_pattern(1, 40, 70, 32)))
    for index, bad in (
        (0, blocks[0] + 1),
        (1, blocks[1] + 3),
        (2, -blocks[2]),
        (3, blocks[3] - 3),
        (4, blocks[4] + 99),
    ):
        call = [*blocks[:index], bad.contiguous(), *blocks[index + 1 :]]
        with on(backend), pytest.raises(ValueError, match="sparse_attention: "):
            torch.ops.qvl.sparse_attention(q, k, v, *call)


Q, PATTERN = torch.zeros(2, 4, 3, 8), SparsePattern.sliding_window(3, 3, 2)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((Q, Q[:, :3], Q[:, :3], PATTERN), ValueError, "query's 4 heads must be a multiple of key's 3"),
        ((Q, Q, Q[:, :, :2], PATTERN), ValueError, r"value must have shape \(B, Hkv, Lk, Dv\) = \(2, 4, 3, \*\)"),
        ((Q, Q.half(), Q, PATTERN), TypeError, "key must have query's dtype float32, got float16"),
        ((Q[0], Q, Q, PATTERN), ValueError, r"query must have shape \(B, Hq, Lq, D\)"),
        ((Q, Q, Q, torch.ones(3, 3)), TypeError, "pattern must be a SparsePattern, got Tensor"),
        (
            (Q, Q, Q, SparsePattern.sliding_window(3, 4, 2)),
            ValueError,
            r"pattern must be of \(Lq, Lk\) = \(3, 3\), got \(3, 4\)",
        ),
        (
            (Q, Q, Q, SparsePattern.from_mask(torch.ones(2, 3, 3).bool())),
            ValueError,
            "pattern must have 1 head or query's 4, got 2",
        ),
    ],
)
def test_bad_arguments_are_named(arguments, error, message):
    with pytest.raises(error, match="sparse_attention: " + message):
        sparse_attention(*arguments)
    assert qvl_kernels.sparse_attention(Q, Q, Q, PATTERN).shape == Q.shape
