"""swiglu against its equation in float64, on every backend by name."""

import pytest
import torch
from utils import DTYPES, assert_close, backends_of, device_of, on

from qvl_kernels import swiglu

BACKENDS = backends_of("swiglu")


def equation(gate, up):
    return gate / (1 + torch.exp(-gate)) * up


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(0,), (1,), (3, 17), (2, 3, 64)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_forward(backend, shape, dtype):
    gate, up = (torch.randn(shape, dtype=dtype, device=device_of(backend)) * 4 for _ in range(2))
    with on(backend):
        ours = swiglu(gate, up)
    assert_close("y", ours, equation(gate.double(), up.double()), equation(gate, up), 1)


@pytest.mark.parametrize("backend", BACKENDS)
def test_large_gates_do_not_overflow(backend):
    gate = torch.tensor([-1e4, -100.0, 0.0, 100.0, 1e4], device=device_of(backend))
    with on(backend):
        y = swiglu(gate, torch.ones_like(gate)).tolist()
    assert y[0] == 0
    assert abs(y[1]) < 1e-40
    assert y[2:] == [0, 100.0, 1e4]


@pytest.mark.parametrize("backend", BACKENDS)
def test_halves_of_one_product_and_gradients(backend):
    both = torch.randn(4, 10, dtype=torch.float64, requires_grad=True)
    with on(backend):
        assert torch.autograd.gradcheck(lambda x: swiglu(*x.chunk(2, -1)), (both,))


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match=r"swiglu: up must have shape gate's = \(2, 3\), got \(3,\)"):
        swiglu(torch.ones(2, 3), torch.ones(3))
