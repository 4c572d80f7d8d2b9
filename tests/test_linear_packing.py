"""pack_linear: the bytes, the error against rounding to nearest, and what a state dict keeps."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from qvl_kernels import PackedLinear, pack_linear

FORMATS = ["fp32", "bf16", "int8", "int4"]


def nearest_int4(weight):
    """The squared error of each group of 32 when its range is divided into 15 steps, parameters rounded as stored."""
    groups = weight.unflatten(1, (-1, 32))
    low, high = groups.amin(-1, keepdim=True).bfloat16(), groups.amax(-1, keepdim=True)
    scale = ((high - groups.amin(-1, keepdim=True)) / 15).bfloat16().float()
    quants = ((groups - low.float()) / scale).round().clamp(0, 15)
    return (quants * scale + low.float() - groups).double().square().sum(-1)


@pytest.mark.parametrize("kind", ["normal", "uniform", "outliers", "shifted"])
def test_int4_is_nowhere_worse_than_nearest_and_better_in_sum(kind):
    weight = torch.rand(40, 512) if kind == "uniform" else torch.randn(40, 512)
    if kind == "outliers":
        weight[:, ::37] *= 10
    if kind == "shifted":
        weight = weight + 3
    error = pack_linear(weight, format="int4").dequantize().sub(weight).double().square().unflatten(1, (-1, 32)).sum(-1)
    nearest = nearest_int4(weight)
    assert (error <= nearest * (1 + 1e-5)).all()
    assert error.sum() < 0.97 * nearest.sum()


def test_int8_rounds_to_multiples_of_a_scale_for_128():
    weight = torch.randn(7, 300)
    packed = pack_linear(weight, format="int8")
    assert packed.weight.shape == (7, 384)
    assert (packed.weight[:, 300:] == 0).all()
    scale = packed.scale.float().repeat_interleave(128, 1)[:, :300]
    # half a step, and 127 times the scale's own rounding for the largest, which may be clipped
    assert ((packed.dequantize() - weight).abs() <= scale * (0.5 + 127 * 2**-9)).all()


def test_the_order_of_int4_in_a_block():
    """Byte i of a block holds weight i low and weight 32 + i high; what pads a row is zero."""
    packed = pack_linear(torch.randn(2, 100), format="int4")
    scale, minimum = (t.float().repeat_interleave(32, 1) for t in (packed.scale, packed.minimum))
    for k in (0, 31, 32, 63, 64, 99):
        byte = packed.weight[:, k // 64 * 32 + k % 32].int()
        quant = byte >> 4 if k % 64 >= 32 else byte & 15
        torch.testing.assert_close(packed.dequantize()[:, k], quant * scale[:, k] + minimum[:, k], rtol=0, atol=1e-6)
    assert (packed.weight[:, 36:] >> 4 == 0).all()  # the high half of the last block has four weights, then padding


@pytest.mark.parametrize("format", ["int8", "int4"])
@pytest.mark.parametrize("k", [1, 31, 32, 33, 127, 128, 129, 200])
def test_constant_rows_and_short_groups(format, k):
    weight = torch.tensor([0.0, 1.0, -2.0]).unsqueeze(1).expand(3, k).contiguous()
    torch.testing.assert_close(pack_linear(weight, format=format).dequantize(), weight, rtol=2**-8, atol=0)


@pytest.mark.parametrize("k", [5, 33, 70])
def test_padding_does_not_widen_a_groups_range(k):
    weight = 10 + torch.rand(4, k)
    error = (pack_linear(weight, format="int4").dequantize() - weight).abs().max()
    assert error <= 1 / 15 / 2 + 11 * 2**-8  # half a step, and the bfloat16 minimum's rounding


def test_packing_shares_what_needs_no_conversion():
    weight = torch.randn(4, 8)
    assert pack_linear(weight, format="fp32").weight.data_ptr() == weight.data_ptr()
    half = weight.bfloat16()
    assert pack_linear(half, format="bf16").weight.data_ptr() == half.data_ptr()
    assert pack_linear(half, format="fp32").weight.dtype == torch.float32
    assert torch.equal(pack_linear(half, format="bf16").dequantize(), half.float())


@pytest.mark.parametrize("format", FORMATS)
def test_rows_can_be_concatenated_and_sliced(format):
    """Row-major formats: packing [a; b] is packing a and packing b."""
    a, b = torch.randn(3, 200), torch.randn(5, 200)
    both = pack_linear(torch.cat((a, b)), format=format)
    for name in ("weight", "scale", "minimum"):
        tensor = getattr(both, name)
        parts = [getattr(pack_linear(w, format=format), name) for w in (a, b)]
        assert (tensor is None and parts == [None, None]) or torch.equal(tensor, torch.cat(parts))


@pytest.mark.parametrize("format", FORMATS)
def test_a_module_is_built_from_a_mapped_file(format, tmp_path):
    made = PackedLinear.from_linear(nn.Linear(200, 30), format=format)
    save_file(made.state_dict(), tmp_path / "layer.safetensors")
    state = load_file(tmp_path / "layer.safetensors")
    empty = PackedLinear.empty(200, 30, format=format, device="meta")
    empty.load_state_dict(state, assign=True)
    assert empty.weight.data_ptr() == state["weight"].data_ptr()
    x = torch.randn(2, 200)
    assert torch.equal(empty(x), made(x))
    copied = PackedLinear.empty(200, 30, format=format)
    copied.load_state_dict(made.state_dict())
    assert torch.equal(copied.packed.dequantize(), made.packed.dequantize())
    assert copied.packed.nbytes == sum(t.nbytes for t in state.values())


def test_bytes_of_the_formats():
    bits = {f: pack_linear(torch.randn(8, 2048), format=f).nbytes * 8 / (8 * 2048) for f in FORMATS}
    assert bits == {"fp32": 32, "bf16": 16, "int8": 8.125, "int4": 5}


def test_bad_arguments_are_named():
    weight = torch.ones(3, 4)
    with pytest.raises(ValueError, match="pack_linear: format must be one of fp32, bf16, int8, int4, got 'int3'"):
        pack_linear(weight, format="int3")
    with pytest.raises(ValueError, match=r"PackedLinear\.empty: format must be one of"):
        PackedLinear.empty(3, 4, format="int3")
    with pytest.raises(ValueError, match=r"pack_linear: bias must have shape \(out_features,\) = \(3,\), got \(4,\)"):
        pack_linear(weight, torch.ones(4), format="fp32")
    with pytest.raises(ValueError, match=r"pack_linear: weight must have shape \(out_features, in_features\)"):
        pack_linear(torch.ones(3), format="int8")
