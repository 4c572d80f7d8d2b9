"""linear_attention's forward against its definition in float64, on every backend by name."""

from __future__ import annotations

import importlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from linear_attention_cases import bound_size, definition, feature_map
from torch import Tensor
from utils import DTYPES, assert_close, backends_of, device_of, on, qkv

import qvl_kernels
from qvl_kernels import EluFeatures, FavorFeatures, LinearAttentionState, linear_attention
from qvl_kernels.reference import linear_attention as reference

BACKENDS = backends_of("linear_attention")
NATIVE = [parameter for parameter in BACKENDS if parameter.values[0].startswith("cpu")]
MAPS = ["favor", "elu", "squares"]


def check(backend: str, q: Tensor, k: Tensor, v: Tensor, map_, **options) -> None:
    with on(backend), torch.no_grad():
        ours = linear_attention(q, k, v, feature_map=map_, **options)
    with torch.no_grad():
        exact = definition(q.double(), k.double(), v.double(), map_, **options)
        plain = definition(q, k, v, map_, **options)
    assert_close("out", ours, exact, plain, k.shape[2] + q.shape[-1], largest=bound_size(q, k, v, map_))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("heads_q", "heads_kv"), [(2, 2), (4, 2), (8, 1)])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("name", MAPS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_maps_heads_and_dtypes(backend, name, causal, heads_q, heads_kv, dtype):
    q, k, v = qkv(2, heads_q, heads_kv, 7, 13, 16, 8, dtype, device_of(backend))
    check(backend, q, k, v, feature_map(name, 16), causal=causal)


@pytest.mark.parametrize(
    ("len_q", "len_k"),
    [
        (1, 1),
        (1, 64),
        (5, 3),
        (63, 63),
        (17, 111),
        (111, 17),
        (0, 4),
        (4, 0),
        (95, 95),
        (96, 97),
        (97, 96),
        (300, 1000),
    ],
)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_lengths(backend, causal, len_q, len_k):
    q, k, v = qkv(1, 2, 1, len_q, len_k, 8, device=device_of(backend))
    check(backend, q, k, v, feature_map("favor", 8), causal=causal)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    ("dim", "dim_v", "features"),
    [(64, 64, 256), (72, 40, 31), (128, 128, 64), (33, 7, 300), (256, 256, 16), (1, 1, 1), (8, 16, 17), (16, 96, 33)],
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_dimensions(backend, dim, dim_v, features, causal, dtype):
    q, k, v = qkv(1, 2, 1, 210, 220, dim, dim_v, dtype, device_of(backend))
    check(backend, q, k, v, feature_map("favor", dim, features), causal=causal)


@pytest.mark.parametrize("name", MAPS)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_masked_keys_count_neither_above_nor_below(backend, causal, name):
    q, k, v = qkv(3, 4, 2, 150, 150, 8, device=device_of(backend))
    keep = torch.rand(3, 150, device=q.device) < 0.5
    keep[0, :110], keep[1] = False, False
    map_ = feature_map(name, 8)
    check(backend, q, k, v, map_, causal=causal, key_mask=keep)
    with on(backend), torch.no_grad():
        before = linear_attention(q, k, v, feature_map=map_, causal=causal, key_mask=keep)
        assert torch.equal(before[1], torch.zeros_like(before[1])), "a query that sees no key"
        k, v = k.masked_fill(~keep[:, None, :, None], torch.nan), v.masked_fill(~keep[:, None, :, None], torch.inf)
        if name != "squares":  # a user's map sees the keys
            assert torch.equal(before, linear_attention(q, k, v, feature_map=map_, causal=causal, key_mask=keep))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_strided_inputs(backend, causal):
    q, k, v = (x.transpose(1, 2) for x in qkv(2, 6, 9, 4, 4, 16, device=device_of(backend)))
    q = q.contiguous()[:, :, :6]
    check(backend, q, k[:, :, ::3], v[:, :, ::3], feature_map("favor", 16), causal=causal)
    x = torch.randn(2, 2, 16, 40, device=q.device).transpose(-1, -2)  # last stride is not 1
    check(backend, x, x[:, :1], x[:1, :1].expand(2, -1, -1, -1), feature_map("elu", 16), causal=causal)


@pytest.mark.parametrize("backend", BACKENDS)
def test_misaligned_rows(backend):
    q, k, v = (torch.randn(1, 2, 50, 17, device=device_of(backend))[..., 1:] for _ in range(3))
    check(backend, q, k, v, feature_map("favor", 16), causal=True)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_keys_whose_features_grow_by_hundreds_of_powers_of_two(backend, causal):
    """exp(W k' - |k'|^2 / 2) from 1e-30 to 1e30 and back within a chunk; a shift by the whole sequence's largest would
    make the early rows 0 / 0."""
    favor = FavorFeatures(4, 16, seed=0)
    with torch.no_grad():
        favor.projection.copy_(torch.eye(4).repeat(4, 1) * 12)
    q, k, v = qkv(1, 1, 1, 250, 250, 4, device=device_of(backend))
    k = k * 0.1 + torch.linspace(-8, 8, 250, device=k.device).sin().mul(9).view(-1, 1)
    check(backend, q * 0.1, k, v, favor, causal=causal)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_outliers_stay_finite(backend, causal):
    q, k, v = qkv(1, 2, 1, 100, 100, 16, device=device_of(backend))
    q[..., 0] *= 1000
    k[:, :, 50] *= 1000
    with on(backend):
        assert linear_attention(q, k, v, feature_map=feature_map("favor", 16), causal=causal).isfinite().all()


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_non_finite_values_are_not_hidden(backend, causal):
    q, k, v = qkv(1, 2, 2, 40, 40, 8, device=device_of(backend))
    q[0, 0, 1, 3], k[0, 1, 7, 2] = torch.nan, torch.nan
    with on(backend):
        out = linear_attention(q, k, v, feature_map=feature_map("favor", 8), causal=causal)
    assert out[0, 0, 1].isnan().all()
    assert out[0, 0, [0, 2, 39]].isfinite().all()
    assert out[0, 1, 7:].isnan().all()
    assert out[0, 1, :7].isfinite().all() == causal


def whole_and_pieces(q: Tensor, k: Tensor, v: Tensor, map_, ends: list[int]) -> tuple:
    whole = linear_attention(q, k, v, feature_map=map_, causal=True, return_state=True)
    state, outs, begin = None, [], 0
    for end in ends:
        part = (x[:, :, begin:end] for x in (q, k, v))
        out, state = linear_attention(*part, feature_map=map_, causal=True, state=state, return_state=True)
        outs.append(out)
        begin = end
    return *whole, torch.cat(outs, 2), state


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("ends", [[199, 200], [1, 2, 3, 200], [96, 130, 200], [0, 77, 77, 200]], ids=str)
@pytest.mark.parametrize("name", MAPS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_streaming_in_any_split_is_the_whole(backend, name, ends, dtype):
    q, k, v = qkv(2, 4, 2, 200, 200, 16, 24, dtype, device_of(backend))
    map_ = feature_map(name, 16)
    with on(backend), torch.no_grad():
        whole, after, pieces, state = whole_and_pieces(q, k, v, map_, ends)
        exact = definition(q.double(), k.double(), v.double(), map_, causal=True)
        plain = definition(q, k, v, map_, causal=True)
    largest = bound_size(q, k, v, map_)
    for out in (whole, pieces):
        assert_close("out", out, exact, plain, 216, largest=largest)
    for got, wanted in zip(state[:2], after[:2]):
        torch.testing.assert_close(got, wanted, rtol=3e-5, atol=3e-5 * wanted.abs().max().item())
    torch.testing.assert_close(state.top, after.top, rtol=0, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_decoded_sequence_is_the_whole(backend):
    q, k, v = qkv(1, 4, 2, 130, 130, 16, device=device_of(backend))
    favor = feature_map("favor", 16, 40)
    with on(backend):
        whole, _, pieces, _ = whole_and_pieces(q, k, v, favor, list(range(1, 131)))
    exact = definition(q.double(), k.double(), v.double(), favor, causal=True)
    largest = bound_size(q, k, v, favor)
    for out in (whole, pieces):
        assert_close("out", out, exact, out, 146, largest=largest)


@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_later_moves_an_earlier_row(backend):
    q, k, v = qkv(1, 2, 1, 300, 300, 16, device=device_of(backend))
    favor = feature_map("favor", 16)
    with on(backend):
        before = linear_attention(q, k, v, feature_map=favor, causal=True)
        k[:, :, 150:] *= 3
        v[:, :, 150:] = 1e6
        after = linear_attention(q, k, v, feature_map=favor, causal=True)
    assert torch.equal(before[:, :, :150], after[:, :, :150])


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("name", MAPS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_state_is_the_sum_of_its_definition(backend, name, causal):
    q, k, v = qkv(2, 2, 2, 3, 150, 8, 5, device=device_of(backend))
    keep = torch.rand(2, 150, device=q.device) < 0.7
    keep[1] = False
    map_ = feature_map(name, 8)
    with on(backend), torch.no_grad():
        _, state = linear_attention(q, k, v, feature_map=map_, causal=causal, key_mask=keep, return_state=True)
        phi, shift = reference.features(
            k.double() if name != "squares" else map_(k).double(),
            {"squares": "features"}.get(name, name),
            getattr(map_, "projection", None),
        )
    phi = (phi * shift.exp2().unsqueeze(-1)).masked_fill(~keep[:, None, :, None], 0.0)
    scale = torch.where(state.top == -torch.inf, 0.0, state.top.double().exp2())
    assert (state.top[1] == -torch.inf).all()
    assert (state.top[0] == 0).all() or name == "favor"
    torch.testing.assert_close(
        state.S * scale[..., None, None], phi.transpose(-1, -2) @ v.double(), rtol=1e-4, atol=1e-5
    )
    torch.testing.assert_close(state.z * scale[..., None], phi.sum(-2), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", NATIVE)
def test_states_pass_between_backends(backend):
    q, k, v = qkv(1, 2, 1, 120, 120, 8)
    favor = feature_map("favor", 8)
    cut = [x[:, :, :70] for x in (q, k, v)]
    rest = [x[:, :, 70:] for x in (q, k, v)]
    exact = definition(q.double(), k.double(), v.double(), favor, causal=True)[:, :, 70:]
    for first, second in ((backend, "reference"), ("reference", backend)):
        with on(first):
            _, state = linear_attention(*cut, feature_map=favor, causal=True, return_state=True)
        with on(second):
            out = linear_attention(*rest, feature_map=favor, causal=True, state=state)
        assert_close("out", out, exact, out, 128, largest=bound_size(q, k, v, favor))


@pytest.mark.parametrize("heads", [1, 3, 8])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("backend", NATIVE)
def test_results_do_not_depend_on_the_number_of_threads(backend, causal, heads):
    q, k, v = qkv(1, heads, heads, 1700, 1700, 16)
    favor, threads, results = feature_map("favor", 16), torch.get_num_threads(), []
    try:
        for count in (1, 2, 3, 5):
            torch.set_num_threads(count)
            with on(backend):
                out, state = linear_attention(q, k, v, feature_map=favor, causal=causal, return_state=True)
                results.append((out, *state))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("backend", NATIVE)
def test_long_sequences(backend, causal):
    q, k, v = qkv(1, 2, 1, 2500, 2500, 16, 8)
    check(backend, q, k, v, feature_map("favor", 16, 20), causal=causal)


@settings(max_examples=60, deadline=None)
@given(
    heads=st.sampled_from([(1, 1), (2, 1), (3, 3), (6, 2)]),
    len_q=st.integers(0, 230),
    len_k=st.integers(0, 330),
    dims=st.sampled_from([(64, 64, 64), (5, 33, 40), (17, 2, 100), (8, 8, 3)]),
    name=st.sampled_from(MAPS),
    causal=st.booleans(),
    masked=st.booleans(),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 99),
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_random_cases(backend, heads, len_q, len_k, dims, name, causal, masked, dtype, seed):
    torch.manual_seed(seed)
    q, k, v = qkv(2, *heads, len_q, len_k, *dims[:2], dtype=dtype, device=device_of(backend))
    mask = torch.rand(2, len_k, device=q.device) < 0.6 if masked else None
    check(backend, q, k, v, feature_map(name, dims[0], dims[2]), causal=causal, key_mask=mask)


X = torch.randn(1, 2, 3, 4)
STATE = LinearAttentionState(torch.zeros(1, 2, 4, 4), torch.zeros(1, 2, 4), torch.zeros(1, 2))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"query": X[0]}, ValueError, r"query must have shape \(B, Hq, Lq, D\)"),
        (
            {"key": X[..., :3]},
            ValueError,
            r"key must have shape \(B, Hkv, Lk, D\) = \(1, \*, \*, 4\), got \(1, 2, 3, 3\)",
        ),
        ({"value": X[:, :, :2]}, ValueError, r"value must have shape \(B, Hkv, Lk, Dv\) = \(1, 2, 3, \*\)"),
        ({"key": X[:, :0], "value": X[:, :0]}, ValueError, "query's 2 heads must be a multiple of key's 0"),
        ({"key": X.double()}, TypeError, "key must have query's dtype float32, got float64"),
        ({"query": X.long()}, TypeError, "query must be float32"),
        (
            {"feature_map": FavorFeatures(8, 4, seed=0)},
            ValueError,
            "feature_map's head_dim must be query's D = 4, got 8",
        ),
        ({"feature_map": "favor"}, TypeError, "feature_map must be a callable, got str"),
        ({"feature_map": lambda x: x[0]}, ValueError, r"feature_map\(query\) must have shape \(B, H, L, M\)"),
        ({"feature_map": lambda x: None}, TypeError, r"feature_map\(query\) must be a torch.Tensor, got NoneType"),
        ({"key_mask": torch.ones(1, 3)}, TypeError, "key_mask must be bool, got torch.float32"),
        (
            {"key_mask": torch.ones(1, 4, dtype=torch.bool)},
            ValueError,
            r"key_mask must have shape \(B, Lk\) = \(1, 3\)",
        ),
        ({"state": 3}, TypeError, "state must be a LinearAttentionState, got int"),
        (
            {"state": STATE._replace(S=torch.zeros(1, 2, 5, 4))},
            ValueError,
            r"state.S must have shape \(B, Hkv, M, Dv\)",
        ),
        (
            {"state": STATE._replace(z=torch.zeros(1, 2))},
            ValueError,
            r"state.z must have shape \(B, Hkv, M\) = \(1, 2, 4\)",
        ),
        ({"state": STATE._replace(top=torch.zeros(2))}, ValueError, r"state.top must have shape \(B, Hkv\) = \(1, 2\)"),
        (
            {"state": STATE._replace(z=torch.zeros(1, 2, 4).half())},
            TypeError,
            "state.z must be torch.float32, got torch.float16",
        ),
    ],
)
def test_bad_arguments_are_named(changes, error, message):
    arguments = {"query": X, "key": X, "value": X, "feature_map": EluFeatures(), "causal": True} | changes
    with pytest.raises(error, match="^linear_attention: " + message):
        linear_attention(**arguments)


def test_a_projection_that_is_not_finite_is_refused():
    favor = FavorFeatures(4, 8, seed=0)
    linear_attention(X, X, X, feature_map=favor)
    with torch.no_grad():
        favor.projection[3, 1] = torch.inf
    with pytest.raises(ValueError, match="FavorFeatures: projection must be finite"):
        linear_attention(X, X, X, feature_map=favor)


@pytest.mark.parametrize("causal", [False, True])
def test_sizes_of_zero(causal):
    for shapes in (((1, 2, 3, 0), (1, 2, 3, 4)), ((1, 2, 3, 4), (1, 2, 3, 0)), ((0, 2, 3, 4), (0, 2, 3, 4))):
        x, v = (torch.randn(shape) for shape in shapes)
        out = linear_attention(x, x, v, feature_map=EluFeatures(), causal=causal)
        assert torch.equal(out, torch.zeros(shapes[1]))


def test_much_scratch_memory_is_not_kept(monkeypatch):
    module = importlib.import_module("qvl_kernels._linear_attention")
    q, k, v = qkv(1, 2, 2, 1700, 1700, 16)
    for native in (b.values[0] for b in NATIVE if not b.marks):
        implementation = module.NATIVE[native]
        implementation._memory.buffer = torch.empty(0, dtype=torch.uint8)
        monkeypatch.setattr(module, "_KEPT_BYTES", 1000)
        with on(native):
            linear_attention(q, k, v, feature_map=EluFeatures())
        assert implementation._memory.buffer.numel() == 0


def test_public_names():
    assert {"FavorFeatures", "EluFeatures", "LinearAttentionState"} <= set(qvl_kernels.__all__)
