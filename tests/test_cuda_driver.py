"""The driver side of `_cuda` against a libcuda.so.1 of our own that prints what it is asked: no GPU is needed."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from cuda_images import FOLDER, cuda_module

MODULE = cuda_module().__file__
HERE = Path(__file__).resolve().parent

# A Python with no torch in it: the binding only asks for its dtypes, its tensor types and for what a tensor has.
LOAD = f"""
import importlib.util, sys, types
names = "float32 bfloat16 float16 float64 int8 uint8 int32 int64 bool".split()
class Tensor: pass
torch = sys.modules["torch"] = types.SimpleNamespace(**{{name: object() for name in names}}, Tensor=Tensor)
torch.nn = types.SimpleNamespace(Parameter=Tensor)
spec = importlib.util.spec_from_file_location("_cuda", {MODULE!r})
_cuda = importlib.util.module_from_spec(spec)
spec.loader.exec_module(_cuda)
"""
LAUNCH = f"""{LOAD}
class OnGpu:
    def __init__(self, shape, address, gpu):
        self.shape, self.address, self.gpu, self.dtype = shape, address, gpu, torch.float32
    def data_ptr(self): return self.address
    def stride(self): return (self.shape[-1], 1)[-len(self.shape):]
    def get_device(self): return self.gpu

def run(gpu=1, rows=5):
    x, y, weight = OnGpu((rows, 2048), 4096, gpu), OnGpu((rows, 2048), 1 << 20, gpu), OnGpu((2048,), 1 << 30, gpu)
    _cuda.rms_norm(x, None, weight, y, None, None, 1e-6, 77)
"""


@pytest.fixture(scope="module")
def library(tmp_path_factory) -> Path:
    """The folder of a stand-in for the driver."""
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    folder = tmp_path_factory.mktemp("driver")
    command = [compiler, "-shared", "-fPIC", "-o", str(folder / "libcuda.so.1"), str(HERE / "fake_cuda.cpp")]
    subprocess.run(command, check=True)
    return folder


def python(code: str, library: Path | None, **settings: str) -> list[str]:
    """Lines that a fresh Python prints, the driver's among them; a failure's last line instead."""
    environment = os.environ | settings
    if library is not None:
        environment["LD_LIBRARY_PATH"] = str(library)
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    return done.stdout.splitlines() if done.returncode == 0 else done.stderr.splitlines()[-1:]


def test_pascal_gets_the_cubin_once_and_every_launch_its_arguments(library):
    lines = python(LAUNCH + "run(); run()", library)
    call = "launch grid 5 1 1 block 256 1 1 shared 0 stream 77 x 4096 rows 5 channels 2048 eps 1e-06"
    assert lines == [
        "retain 11",
        *("push 11", "load cubin", "function rms_norm_f32x4", "pop"),
        *("push 11", call, "pop"),
        *("push 11", "pop", "push 11", call, "pop"),
    ]


@pytest.mark.parametrize(
    ("capability", "image"), [("60", None), ("61", "cubin"), ("62", "ptx"), ("75", "ptx"), ("90", "ptx")]
)
def test_other_gpus_get_the_ptx(library, capability, image):
    lines = python(LAUNCH + "run()", library, FAKE_CUDA_CAPABILITY=capability)
    if image is None:
        assert lines == ["RuntimeError: GPU 1 has compute capability 6.0; 6.1 or newer is needed"]
    else:
        assert f"load {image}" in lines


def test_images_may_lie_elsewhere(library, tmp_path):
    shutil.copy(FOLDER / "rms_norm.sm_61.cubin", tmp_path)
    lines = python(LAUNCH + f"_cuda.set_image_folder({str(tmp_path)!r}); run()", library)
    assert "load cubin" in lines


def test_nothing_is_launched_for_no_rows(library):
    assert python(LAUNCH + "run(rows=0)", library) == []


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("cuModuleLoadData", "rms_norm.sm_61.cubin: a made-up failure (CUDA driver error 700)"),
        ("cuLaunchKernel", "RuntimeError: launching rms_norm_f32x4: a made-up failure (CUDA driver error 700)"),
        ("cuDevicePrimaryCtxRetain", "RuntimeError: cuDevicePrimaryCtxRetain: a made-up failure"),
    ],
)
def test_a_failure_of_the_driver_is_a_clear_error(library, function, message):
    (line,) = python(LAUNCH + "run()", library, FAKE_CUDA_FAILS=function)
    assert message in line


def test_a_missing_image_is_named(library):
    (line,) = python(LAUNCH + "_cuda.set_image_folder('/nowhere'); run()", library)
    assert line == "RuntimeError: cannot read the CUDA image /nowhere/rms_norm.sm_61.cubin"


def test_status(library, tmp_path):
    status = LOAD + "print(_cuda.driver_status())"
    assert python(status, library) == ["None"]
    assert python(status, library, FAKE_CUDA_DEVICES="0") == ["the NVIDIA driver finds no GPU"]
    assert python(status, library, FAKE_CUDA_FAILS="cuInit") == [
        "the NVIDIA driver does not start (cuInit returned 700)"
    ]
    (tmp_path / "libcuda.so.1").write_bytes(b"no library")
    assert "is not installed (libcuda.so.1 does not load)" in python(status, tmp_path)[0]
