"""swiglu against its equation in float64, on every backend by name."""

import pytest
import torch
import torch.nn.functional as F
from utils import DTYPES, LENGTHS, assert_close, backends_of, device_of, on, refuses_gradients, ulps

from qvl_kernels import swiglu

BACKENDS = backends_of("swiglu")


def equation(gate, up):
    return gate / (1 + torch.exp(-gate)) * up


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize(
    "shape", [(), (0,), (2, 0, 3), (3, 17), (2, 3, 64), (1, 9000), *((n,) for n in LENGTHS)], ids=str
)
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
def test_every_size_of_gate_is_within_three_ulps(backend):
    """4,000,000 gates over all that float32's sigmoid can tell from 0 and 1: as good as torch's own (2.2)."""
    gate = torch.linspace(-88.3, 88.3, 4_000_000)
    with on(backend):
        y = swiglu(gate, torch.ones(1).expand(gate.shape).contiguous())
    assert ulps(y, equation(gate.double(), 1.0)).max() < 3


@pytest.mark.parametrize("backend", BACKENDS)
def test_infinities_and_nan_are_torchs(backend):
    gate = torch.tensor([-torch.inf, torch.inf, torch.nan, 1.0, 1.0, -89.0, 3e38, -3e38])
    up = torch.tensor([1.0, 1.0, 1.0, torch.nan, -torch.inf, 1.0, 2.0, 2.0])
    with on(backend):
        y = swiglu(gate, up)
    torch.testing.assert_close(y, F.silu(gate) * up, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_strided_inputs(backend, dtype):
    both = torch.randn(4, 6, 2 * 33, dtype=dtype)
    for gate, up in (
        both.chunk(2, -1),
        both.transpose(0, 1).chunk(2, -1),
        (both[..., 1:34], both[..., 33:].transpose(0, 1).contiguous().transpose(0, 1)),
        (both[:1, :, :33].expand(4, 6, 33), both[:, :1, 3:36].expand(4, 6, 33)),
        (both[..., ::2], both.transpose(0, 2)[:33].permute(2, 1, 0)),
        (both[:, :, :1], both[:, :, 7:8]),
    ):
        with on(backend):
            ours = swiglu(gate, up)
        assert_close("y", ours, equation(gate.double(), up.double()), equation(gate, up), 1)


@pytest.mark.parametrize("backend", [b for b in BACKENDS if b.values[0].startswith("cpu")])
def test_results_do_not_depend_on_the_number_of_threads(backend):
    gate, up = torch.randn(2, 77, 1000)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            with on(backend):
                results += [torch.stack((swiglu(gate, up), swiglu(gate.view(-1, 8), up.view(-1, 8)).view(77, 1000)))]
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])
    assert torch.equal(results[0][0], results[0][1])


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_of_halves_of_one_product(backend):
    """Gradients are the reference's; kernels refuse the call."""
    both = torch.randn(4, 10, dtype=torch.float64, requires_grad=True)
    if not refuses_gradients(backend, lambda: swiglu(*both.chunk(2, -1))):
        assert torch.autograd.gradcheck(lambda x: swiglu(*x.chunk(2, -1)), (both,))


def test_gradients_without_a_forced_backend_and_compilation_run_the_reference():
    gate, up = torch.randn(2, 3, 8, requires_grad=True).unbind(0)
    assert swiglu(gate, up).requires_grad
    compiled = torch.compile(lambda g, u: swiglu(g * 2, u) + 1, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(gate, up), swiglu(gate * 2, up) + 1)
        each = torch.func.vmap(swiglu)(gate, up)
        torch.testing.assert_close(each, swiglu(gate, up))


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match=r"swiglu: up must have shape gate's = \(2, 3\), got \(3,\)"):
        swiglu(torch.ones(2, 3), torch.ones(3))
