"""A recorded decode step against the step itself: the same tokens, the same bits."""

import copy

import pytest
import torch
from tiny import tiny_config, tiny_model

import qvl_kernels
from qvl_kernels import Recording
from qvl_model.decoding import Decoder
from qvl_model.packing import pack_model
from qvl_model.prefill import prefill

needs_kernels = pytest.mark.skipif(not Recording.is_possible(), reason="no CPU kernels run here")


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


def started(model, rows, dtype, ragged=False):
    """Two equal caches of the same prompts."""
    ids = torch.randint(0, 80, (rows, 7))
    ends = torch.arange(7, 7 - rows, -1) if ragged else torch.full((rows,), 7)
    mask = (torch.arange(7) < ends[:, None]).long()
    cache = model.new_cache(rows, 20, dtype)
    prefill(model, model.embed_inputs(ids, attention_mask=mask), cache, 1024)
    return cache, copy.deepcopy(cache)


def usual(model, cache):
    """A decoder that records nothing."""
    decoder = Decoder(model, cache)
    decoder.recorded = None
    return decoder


@needs_kernels
@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int8], ids=str)
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("weights", ["bf16", "int8", "int4"])
def test_replayed_steps_are_the_steps(weights, rows, dtype, ragged):
    model = pack_model(tiny_model(), weights).eval()
    mine, theirs = started(model, rows, dtype, ragged)
    mine.rope_deltas, theirs.rope_deltas = (torch.arange(rows) - 2 for _ in range(2))
    recorded, plain = Decoder(model, mine), usual(model, theirs)
    assert recorded.recorded is not None
    for step in range(6):
        tokens = torch.randint(0, 80, (rows,))
        assert torch.equal(recorded(tokens), plain(tokens)), step
        assert mine.starts == theirs.starts == mine.lengths.tolist()
        for a, b in zip(mine.stores, theirs.stores):
            assert all(torch.equal(x, y) for x, y in zip(a.memory, b.memory))


@needs_kernels
def test_a_full_cache_is_refused_and_left_alone():
    model = pack_model(tiny_model(), "int8").eval()
    cache = model.new_cache(1, 3)
    decoder = Decoder(model, cache)
    for token in (4, 5, 6):
        decoder(torch.tensor([token]))
    with pytest.raises(ValueError, match="the cache has room for 3 tokens, 4 are needed"):
        decoder(torch.tensor([7]))
    assert cache.lengths.tolist() == [3]


@needs_kernels
def test_what_is_not_all_kernels_takes_the_usual_way():
    packed = pack_model(tiny_model(), "int8").eval()
    assert Decoder(packed, packed.new_cache(1, 4)).recorded is not None
    with qvl_kernels.use_backend("reference"):
        assert Decoder(packed, packed.new_cache(1, 4)).recorded is None
    plain = tiny_model()
    assert Decoder(plain, plain.new_cache(1, 4)).recorded is None
    config = copy.copy(tiny_config())
    window = type(plain)(config, attention="sparse:sliding_window=4").eval()
    window = pack_model(window, "int8")
    assert Decoder(window, window.new_cache(1, 4)).recorded is None
