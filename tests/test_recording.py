"""Recording: replayed calls give what the calls give, on whatever the buffers hold by then."""

import gc
import threading

import pytest
import torch

import qvl_kernels
from qvl_kernels import Recording, append_kv, attention, norm_rotary, pack_linear, packed_linear, rms_norm, swiglu

NATIVE = [name for name in qvl_kernels.available_backends() if name.startswith("cpu")]
pytestmark = pytest.mark.skipif(not NATIVE, reason="no CPU kernels run here")


def layer(x, cos, lengths, state):
    """A decoder's layer, all of it kernels."""
    packed, weight, cache = state
    y = rms_norm(x, weight, 1e-6)
    query, key, value = packed_linear(y, packed).view(2, 1, 4, 3, 8).permute(0, 3, 2, 1, 4).unbind(1)
    query, key = norm_rotary(query, key, torch.ones(8), torch.ones(8), 1e-6, cos, cos)
    append_kv(key, value, *cache, lengths)
    out = attention(query, *cache, causal=True, key_lengths=lengths)
    return swiglu(out.transpose(1, 2).flatten(2), x)


def make():
    packed = pack_linear(torch.randn(96, 32), format="int8")
    cache = torch.zeros(2, 4, 10, 8, dtype=torch.bfloat16), torch.zeros(2, 4, 10, 8, dtype=torch.bfloat16)
    return packed, torch.randn(32), cache


@pytest.mark.parametrize("backend", NATIVE)
def test_replays_are_the_calls_on_new_inputs(backend):
    state = make()
    x, cos, lengths = torch.zeros(2, 1, 32), torch.zeros(2, 1, 1, 8), torch.ones(2, dtype=torch.long)
    with qvl_kernels.use_backend(backend):
        with torch.no_grad(), Recording() as recording:
            y = layer(x, cos, lengths, state)
        assert len(recording) == 6
        for step in range(4):
            x.normal_(), cos.normal_(), lengths.copy_(torch.tensor([step, step + 3]))
            recording.replay()
            memory = [cache.clone() for cache in state[2]]
            with torch.no_grad():
                expected = layer(x, cos, lengths, state)
            assert torch.equal(y, expected)
            assert all(torch.equal(a, b) for a, b in zip(memory, state[2]))


def test_what_a_recording_reads_lives_as_long_as_it():
    x = torch.randn(3, 1000)
    with torch.no_grad(), Recording() as recording:
        y = rms_norm(rms_norm(x * 1, torch.full((1000,), 2.0), 1e-6), torch.full((1000,), 3.0), 1e-6)
    expected = y.clone()
    gc.collect()
    garbage = [torch.full((3, 1000), float(i)) for i in range(50)]
    garbage += [torch.full((1000,), float(i)) for i in range(50)]
    y.zero_()
    recording.replay()
    assert torch.equal(y, expected)
    del garbage


def test_the_threads_may_change_in_between():
    x, packed = torch.randn(1, 512), pack_linear(torch.randn(2048, 512), format="int4")
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        with torch.no_grad(), Recording() as recording:
            y = packed_linear(x, packed)
        expected = y.clone()
        for count in (1, 3, 2):
            torch.set_num_threads(count)
            y.zero_()
            recording.replay()
            assert torch.equal(y, expected)
    finally:
        torch.set_num_threads(threads)


def test_a_call_that_another_backend_would_run_is_refused_and_ends_the_recording():
    x, weight = torch.randn(2, 8), torch.ones(8)
    message = "Recording: swiglu would run on 'reference', which is not recorded"
    with pytest.raises(RuntimeError, match=message), Recording():
        swiglu(x.requires_grad_(), x)
    with torch.no_grad(), Recording() as recording:
        rms_norm(x, weight, 1e-6)
    assert len(recording) == 1


def test_recordings_do_not_nest_nor_replay_inside():
    with Recording() as recording:
        with pytest.raises(RuntimeError, match="this thread records already"):
            Recording().__enter__()
        with pytest.raises(RuntimeError, match="it cannot replay"):
            recording.replay()
    assert len(recording) == 0


def test_other_threads_are_not_recorded():
    x, weight = torch.randn(2, 8), torch.ones(8)
    with torch.no_grad(), Recording() as recording:
        thread = threading.Thread(target=lambda: rms_norm(x, weight, 1e-6))
        thread.start()
        thread.join()
    assert len(recording) == 0


def test_without_kernels_it_says_so():
    with qvl_kernels.use_backend("reference"):
        assert not Recording.is_possible()
    assert Recording.is_possible()
