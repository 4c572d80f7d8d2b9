"""The choice of a backend, how to force one, and what explain() says."""

import os
import subprocess
import sys

import pytest
import torch

import qvl_kernels
from qvl_kernels import _backends, available_backends, explain, use_backend


def run(code: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **environment}, capture_output=True, text=True, timeout=120
    )


def test_the_reference_is_always_there_and_last():
    assert available_backends()[-1] == "reference"


@pytest.mark.parametrize(("capability", "expected"), [("avx2", "cpu_avx2"), ("default", "reference")])
def test_the_cpu_capability_rules_the_choice(capability, expected):
    if expected == "cpu_avx2" and _backends.unavailable("cpu_avx2") is not None:
        pytest.skip(str(_backends.unavailable("cpu_avx2")))
    code = (
        "import torch, qvl_kernels as k; from qvl_kernels import _backends as b;"
        "i = b._operations['rms_norm'].choose(torch.ones(1, 1)); print(getattr(i, 'backend', 'reference'))"
    )
    assert run(code, ATEN_CPU_CAPABILITY=capability, TRITON_INTERPRET="0").stdout.strip() == expected


@pytest.mark.parametrize(("capability", "missing"), [("avx2", {"avx512"}), ("default", {"avx512", "avx2"})])
def test_no_module_is_loaded_whose_instructions_the_cpu_may_lack(capability, missing):
    code = "import sys, qvl_kernels as k; k.explain(); print(*sys.modules)"
    loaded = run(code, ATEN_CPU_CAPABILITY=capability).stdout.split()
    assert "qvl_kernels.rms_norm" in loaded
    assert not {f"qvl_kernels._cpu_{isa}" for isa in missing} & set(loaded)


def test_the_environment_forces_a_backend():
    code = "import torch, qvl_kernels as k; k.rms_norm(torch.ones(1, 2), torch.ones(2), 1e-6)"
    assert run(code, QVL_BACKEND="reference").returncode == 0
    refused = run(code, QVL_BACKEND="cuda")
    if not torch.cuda.is_available():
        assert "rms_norm: backend 'cuda' is forced, but" in refused.stderr
    assert "unknown backend 'fast'; there are cpu_avx512" in run(code, QVL_BACKEND="fast").stderr


def test_a_forced_backend_does_not_fall_back():
    native = [name for name in available_backends() if name.startswith("cpu")]
    if not native:
        pytest.skip("no native CPU backend runs here")
    gate = torch.ones(2, requires_grad=True)
    with use_backend(native[0]), pytest.raises(RuntimeError, match=f"{native[0]}' is forced, but a gradient is needed"):
        qvl_kernels.swiglu(gate, torch.ones(2))


def test_an_operation_says_which_backends_it_has(monkeypatch):
    monkeypatch.setattr(_backends, "_forced", "cuda")
    with pytest.raises(RuntimeError, match="this operation has only cpu_avx512, cpu_avx2, reference"):
        qvl_kernels.swiglu(torch.ones(2), torch.ones(2))


@pytest.mark.parametrize("name", [name for name in available_backends() if name.startswith("cpu")])
def test_tensors_are_read_alike_through_dlpack_and_through_their_attributes(name):
    """A subclass is not DLPack's, nor is any tensor of a torch before 2.10: those go the slow way."""
    module = _backends.module(name, "")
    x = torch.randn(6, 40)[::2, 3:35]
    results = []
    for wrap in (torch.Tensor.detach, lambda t: t.as_subclass(type("Other", (torch.Tensor,), {})), torch.nn.Parameter):
        y = torch.full((3, 32), torch.nan)
        module.gelu_tanh(wrap(x), wrap(y) if wrap is torch.Tensor.detach else y)
        results.append(y)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])
    with pytest.raises(TypeError):
        module.gelu_tanh([1.0], results[0])
    with pytest.raises(ValueError, match="gelu_tanh: y"):
        module.gelu_tanh(x, results[0].double())
    with pytest.raises(ValueError, match=r"unsupported dtype torch\.complex64"):
        module.gelu_tanh(torch.ones(2, dtype=torch.complex64), results[0])


def test_use_backend_names_what_is_wrong():
    with pytest.raises(ValueError, match="unknown backend 'fast'"), use_backend("fast"):
        pass
    if not torch.cuda.is_available():
        with pytest.raises(RuntimeError, match="use_backend: 'cuda' cannot run here: "), use_backend("cuda"):
            pass


def test_use_backend_restores_what_was_forced_before():
    with use_backend("reference"):
        with pytest.raises(ZeroDivisionError), use_backend("reference"):
            raise ZeroDivisionError
        assert _backends._forced == "reference"
    assert _backends._forced is None


def test_explain_has_a_reason_for_every_backend_and_a_line_for_every_operation():
    explanation = explain()
    assert set(explanation.backends) == set(_backends.BACKENDS)
    assert all(why is None or len(why) > 8 for why in explanation.backends.values())
    operations = {
        "attention",
        "attention_varlen",
        "layer_norm",
        "rms_norm",
        "rotary",
        "norm_rotary",
        "swiglu",
        "gelu_tanh",
        "packed_linear",
    }
    assert operations <= set(explanation.operations)
    for name in operations:
        assert name in str(explanation)


def test_eager_calls_without_gradients_skip_the_dispatcher(monkeypatch):
    from qvl_kernels import _library

    x = torch.ones(2)
    assert not _library.needs_dispatcher(x)
    assert _library.needs_dispatcher(x.clone().requires_grad_())
    with torch.no_grad():
        assert not _library.needs_dispatcher(torch.nn.Parameter(x))
    with torch._subclasses.FakeTensorMode() as mode:
        assert _library.needs_dispatcher(mode.from_tensor(x))
    with torch.autograd.forward_ad.dual_level():
        assert _library.needs_dispatcher(x)
    seen = []
    torch.func.vmap(lambda y: seen.append(_library.needs_dispatcher(y)) or y)(torch.ones(2, 2))
    assert seen == [True]


@pytest.mark.parametrize("first", ["torch", "sklearn"])
def test_one_openmp_runtime_rules_torch_and_the_kernels(first):
    if not any(name.startswith("cpu") for name in available_backends()):
        pytest.skip("no native CPU backend runs here")
    code = f"""
import {first}, torch, qvl_kernels, re
from qvl_kernels import _backends
name = next(b for b in qvl_kernels.available_backends() if b.startswith("cpu"))
module = _backends.module(name, "")
torch.set_num_threads(3)
assert module.max_threads() == 3, module.max_threads()
with qvl_kernels.use_backend(name):
    qvl_kernels.rms_norm(torch.ones(512, 512), torch.ones(512), 1e-6)
mapped = set(re.findall(r"/\\S*lib(?:gomp|omp|iomp5)\\S*", open("/proc/self/maps").read()))
assert module.openmp_library() in mapped, (module.openmp_library(), mapped)
if "{first}" == "torch":
    assert len(mapped) == 1, mapped
"""
    result = run(code)
    assert result.returncode == 0, result.stderr
