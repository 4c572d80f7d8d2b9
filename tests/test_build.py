"""Installing where nothing native can be built: it succeeds, says what is missing, and the fallbacks run."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
IGNORED = shutil.ignore_patterns(
    ".*", "build", "*.so", "cuda_images", "*.egg-info", "__pycache__", "tests", "*.safetensors"
)


@pytest.fixture(scope="module")
def without_a_compiler(tmp_path_factory):
    """The folder of an installation made with no compiler on the PATH, and what pip said."""
    source, target = tmp_path_factory.mktemp("source") / "qvl", tmp_path_factory.mktemp("target")
    shutil.copytree(ROOT, source, ignore=IGNORED)
    environment = {name: value for name, value in os.environ.items() if name not in ("CXX", "QVL_REQUIRE_NATIVE")}
    environment["PATH"] = str(tmp_path_factory.mktemp("empty"))
    command = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "-v",
        "--no-build-isolation",
        "--no-deps",
        "--target",
        target,
        source,
    ]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    return target, result


def test_the_installation_succeeds_and_says_what_is_missing(without_a_compiler):
    target, result = without_a_compiler
    assert result.returncode == 0, result.stdout + result.stderr
    assert "qvl: _cpu_avx2 was not built: no C++ compiler was found" in result.stdout + result.stderr
    report = json.loads((target / "qvl_kernels" / "build_report.json").read_text())
    assert set(report) == {"_cpu_avx2", "_cpu_avx512", "_cuda", "cuda_images"}
    assert all("no C++ compiler was found" in why for why in report.values())


def test_the_fallbacks_run_and_explain_tells_why(without_a_compiler):
    target, _ = without_a_compiler
    code = (
        "import torch, qvl_kernels as k; assert k.available_backends()[-1] == 'reference', k.available_backends();"
        "print(k.__file__); print(k.rms_norm(torch.ones(1, 2), torch.ones(2), 0.0)); print(k.explain())"
    )
    # -S: an editable installation of the tests' own environment would find the modules that are missing in `target`.
    paths = os.pathsep.join([str(target), sysconfig.get_path("purelib"), sysconfig.get_path("platlib")])
    environment = {**os.environ, "PYTHONPATH": paths, "TRITON_INTERPRET": "0"}
    result = subprocess.run(
        [sys.executable, "-S", "-c", code], env=environment, cwd=target, capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stderr
    assert str(target) in result.stdout
    assert "cpu_avx2     does not run: no C++ compiler was found" in result.stdout
    assert "tensor([[1., 1.]])" in result.stdout


def test_a_required_native_part_that_is_missing_is_an_error(tmp_path):
    shutil.copytree(ROOT, tmp_path / "qvl", ignore=IGNORED)
    environment = {**os.environ, "PATH": str(tmp_path), "QVL_REQUIRE_NATIVE": "1"}
    environment.pop("CXX", None)
    result = subprocess.run(
        [sys.executable, "setup.py", "build_ext", "--build-lib", str(tmp_path / "lib")],
        env=environment,
        cwd=tmp_path / "qvl",
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode != 0
    assert "QVL_REQUIRE_NATIVE=1 is set and a native part is missing" in result.stderr
