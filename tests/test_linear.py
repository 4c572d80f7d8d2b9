"""pack_linear, packed_linear and PackedLinear against the float64 product, on every backend by name."""

import pytest
import torch
from torch import nn
from utils import DTYPES, assert_close, backends_of, device_of, on

from qvl_kernels import PackedLinear, pack_linear, packed_linear

BACKENDS = backends_of("packed_linear")
STORED = {"fp32": torch.float32, "bf16": torch.bfloat16}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("format", STORED)
@pytest.mark.parametrize(("rows", "k", "n"), [(1, 1, 1), (1, 64, 48), (2, 65, 17), (9, 128, 31), (0, 8, 4), (3, 8, 0)])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_product(backend, bias, rows, k, n, format, dtype):
    device = device_of(backend)
    x, weight = torch.randn(rows, k, dtype=dtype, device=device), torch.randn(n, k, device=device)
    b = torch.randn(n, device=device) if bias else None
    with on(backend):
        ours = packed_linear(x, pack_linear(weight, b, format=format))
    stored = weight.to(STORED[format])
    exact = x.double() @ stored.double().T + (0 if b is None else b.double())
    plain = x @ stored.to(dtype).T + (0 if b is None else b.to(dtype))
    largest = (x.double().norm(dim=-1).max() * weight.double().norm(dim=-1).max()).item() if x.numel() * n else 0.0
    assert_close("y", ours, exact, plain, k, largest=largest if dtype == torch.float32 else 0.0)


def test_packing_shares_what_needs_no_conversion():
    weight = torch.randn(4, 8)
    assert pack_linear(weight, format="fp32").weight.data_ptr() == weight.data_ptr()
    half = weight.bfloat16()
    assert pack_linear(half, format="bf16").weight.data_ptr() == half.data_ptr()
    assert pack_linear(half, format="fp32").weight.dtype == torch.float32


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
    weight = torch.ones(3, 4)
    with pytest.raises(ValueError, match="pack_linear: format must be one of fp32, bf16, got 'int3'"):
        pack_linear(weight, format="int3")
    with pytest.raises(ValueError, match=r"pack_linear: bias must have shape \(out_features,\) = \(3,\), got \(4,\)"):
        pack_linear(weight, torch.ones(4), format="fp32")
    with pytest.raises(ValueError, match="packed_linear: x's last dimension must be in_features = 4"):
        packed_linear(torch.ones(2, 3), pack_linear(weight, format="fp32"))
