"""gelu_tanh against torch's in float64, on every backend by name."""

import math

import pytest
import torch
import torch.nn.functional as F
from utils import DTYPES, assert_close, backends_of, device_of, on

from qvl_kernels import gelu_tanh

BACKENDS = backends_of("gelu_tanh")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(0,), (1,), (3, 17), (2, 3, 64)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_forward(backend, shape, dtype):
    x = torch.randn(shape, dtype=dtype, device=device_of(backend)) * 3
    with on(backend):
        ours = gelu_tanh(x)
    plain = 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x * x * x)))
    assert_close("y", ours, F.gelu(x.double(), approximate="tanh"), plain, 1)


@pytest.mark.parametrize("backend", BACKENDS)
def test_large_inputs_and_gradients(backend):
    with on(backend):
        assert gelu_tanh(torch.tensor([-1e4, 1e4], device=device_of(backend))).tolist() == [0, 1e4]
        x = torch.randn(7, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(gelu_tanh, (x,))


def test_integers_are_refused():
    with pytest.raises(TypeError, match="gelu_tanh: x must be float32, bfloat16, float16 or float64, got int64"):
        gelu_tanh(torch.arange(3))
