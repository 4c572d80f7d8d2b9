"""append_kv against slices of the cache, on every backend by name."""

import pytest
import torch
from utils import DTYPES, backends_of, device_of, on

from qvl_kernels import append_kv, quantize_kv

BACKENDS = backends_of("append_kv")
PAIRS = [(a, b) for a in DTYPES for b in (*DTYPES, torch.int8)] + [(torch.float64, torch.float64)]


def caches(batch, heads, capacity, dim, dim_v, dtype, device):
    """Keys, values and for int8 their scales, filled with 7, which nothing writes."""
    sizes = [(batch, heads, capacity, dim), (batch, heads, capacity, dim_v)]
    made = [torch.full(size, 7, dtype=dtype, device=device) for size in sizes]
    scales = [torch.full(size[:3], 7.0, device=device) for size in sizes] if dtype == torch.int8 else []
    return made, scales


@pytest.mark.parametrize(("dtype", "stored"), PAIRS, ids=str)
@pytest.mark.parametrize(("tokens", "dim", "dim_v"), [(1, 128, 128), (5, 72, 80), (3, 1, 7), (2, 65, 33)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_every_row_behind_its_own_length_and_nothing_else(backend, tokens, dim, dim_v, dtype, stored):
    device = device_of(backend)
    key, value = (torch.randn(2, tokens, 3, d, dtype=dtype, device=device).transpose(1, 2) * 3 for d in (dim, dim_v))
    (keys, values), scales = caches(2, 3, 9, dim, dim_v, stored, device)
    lengths = torch.tensor([0, 4], device=device)
    with on(backend):
        append_kv(key, value, keys, values, lengths, **dict(zip(("key_scale", "value_scale"), scales)))
    for number, (x, cache) in enumerate(((key, keys), (value, values))):
        expected = torch.full_like(cache, 7)
        new = x.to(stored) if stored != torch.int8 else quantize_kv(x)[0]
        for row, start in enumerate(lengths.tolist()):
            expected[row, :, start : start + tokens] = new[row]
        assert torch.equal(cache, expected)
        if scales:
            expected_scale = torch.full_like(scales[number], 7)
            for row, start in enumerate(lengths.tolist()):
                expected_scale[row, :, start : start + tokens] = quantize_kv(x)[1][row]
            assert torch.equal(scales[number], expected_scale)


@pytest.mark.parametrize("stored", [torch.float32, torch.int8], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_tokens_beyond_the_capacity_are_not_written(backend, stored):
    (keys, values), scales = caches(1, 2, 4, 8, 8, stored, device_of(backend))
    key = torch.ones(1, 2, 3, 8, device=device_of(backend))
    named = dict(zip(("key_scale", "value_scale"), scales))
    with on(backend):
        append_kv(key, key, keys, values, torch.tensor([3], device=key.device), **named)
        append_kv(key, key, keys, values, torch.tensor([40], device=key.device), **named)
    assert (keys[:, :, :3] == 7).all()
    assert (keys[:, :, 3] == (1 if stored == torch.float32 else 127)).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_view_of_a_cache_and_rows_of_zeros(backend):
    device = device_of(backend)
    memory = torch.full((2, 6, 3, 16), 7, dtype=torch.int8, device=device)
    keys, values = memory[0].transpose(0, 1)[None], memory[1].transpose(0, 1)[None]
    scale = torch.full((2, 1, 3, 6), 7.0, device=device)
    key = torch.zeros(1, 3, 2, 16, device=device)
    with on(backend):
        append_kv(key, key, keys, values, torch.tensor([1], device=device), key_scale=scale[0], value_scale=scale[1])
    assert (memory[:, 1:3] == 0).all()
    assert (memory[:, 3:] == 7).all()
    assert (scale[..., 1:3] == 0).all()


def test_gradients_take_the_reference():
    key = torch.randn(1, 1, 1, 4, requires_grad=True)
    cache = torch.zeros(1, 1, 2, 4)
    append_kv(key, key.detach(), cache, cache.clone(), torch.tensor([1]))
    cache.sum().backward()
    assert torch.equal(key.grad, torch.ones_like(key))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"value": torch.ones(1, 2, 2, 8)}, ValueError, "value must have shape"),
        ({"key_cache": torch.ones(1, 2, 4, 7)}, ValueError, "key_cache must have shape"),
        ({"value_cache": torch.ones(1, 2, 5, 8)}, ValueError, "value_cache must have shape"),
        ({"value_cache": torch.ones(1, 2, 4, 8).half()}, TypeError, "value_cache must be one of"),
        ({"lengths": torch.tensor([1, 2])}, ValueError, r"lengths must have shape \(B,\) = \(1,\)"),
        ({"lengths": torch.tensor([1.0])}, TypeError, "lengths must be int64"),
        ({"key_scale": torch.ones(1, 2, 4)}, ValueError, "int8 caches need key_scale and value_scale"),
        ({"key": torch.ones(1, 2, 1, 8).double(), "value": torch.ones(1, 2, 1, 8).double()}, TypeError, "for torch.fl"),
    ],
)
def test_bad_arguments_are_named(change, error, message):
    cache, x = torch.ones(1, 2, 4, 8), torch.ones(1, 2, 1, 8)
    arguments = {"key": x, "value": x, "key_cache": cache, "value_cache": cache, "lengths": torch.tensor([0])}
    with pytest.raises(error, match=message):
        append_kv(**arguments | change)
