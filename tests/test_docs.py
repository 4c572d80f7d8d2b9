"""The documents say what is: paths exist, every operation has its documentation, test and bench, examples run,
variables are listed."""

from __future__ import annotations

import doctest
import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import qvl_kernels
from qvl_kernels import _backends

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
OPERATIONS = [
    "append_kv",
    "attention",
    "attention_varlen",
    "linear_attention",
    "linear_attention_varlen",
    "rms_norm",
    "scaled_dot_product_attention",
    "sparse_attention",
    "layer_norm",
    "rotary",
    "norm_rotary",
    "swiglu",
    "gelu_tanh",
    "pack_linear",
    "packed_linear",
]
STEMS = {"pack_linear": "linear", "packed_linear": "linear"}


def tree() -> list[str]:
    """The paths named in README's last code block: `folder/  file file ...`, or a path from the root."""
    block = README.split("## Where things are")[1].split("```")[1]
    paths = []
    folder = ""
    for line in block.strip().splitlines():
        words = line.replace(":", " ").split()
        if not line.startswith(" "):  # else the folder above goes on
            folder = words.pop(0)
            paths.append(folder)
        if folder.endswith("/"):
            paths += [folder + word for word in words if re.fullmatch(r"[\w/]+(\.(py|cpp|h|cu|png)|/)", word)]
    return paths


def test_the_tree_is_read():
    assert {"csrc/cpu/vec.h", "qvl_model/generation.py", "bench/timing.py", "examples/digits.png"} <= set(tree())


@pytest.mark.parametrize("path", tree())
def test_paths_of_the_tree_exist(path):
    assert (ROOT / path).exists()


@pytest.mark.parametrize("document", ["README.md", "BENCHMARKS.md", "CONTRIBUTING.md", "examples/digits/README.md"])
def test_files_named_in_the_documents_exist(document):
    text = (ROOT / document).read_text()
    for path in re.findall(r"`((?:csrc|qvl_kernels|qvl_model|tests|bench|examples)/[\w./]+)`", text):
        assert (ROOT / path).exists(), f"{document} names {path}"


def test_every_public_name_is_in_the_readme():
    for name in qvl_kernels.__all__:
        assert re.search(rf"\b{name}\b", README) or name == "PackedWeight", name


@pytest.mark.parametrize("name", OPERATIONS)
def test_every_operation_is_documented_tested_and_benched(name):
    doc = getattr(qvl_kernels, name).__doc__
    for part in ("Args:", "Returns:", "Raises:", ">>>"):
        assert part in doc, f"{name}: {part} is missing"
    if name not in STEMS:
        assert "Source:" in doc
    stem = STEMS.get(name, name)
    if name != "scaled_dot_product_attention":  # its reference is torch's own function
        assert (ROOT / "qvl_kernels" / "reference" / f"{stem}.py").exists()
    assert (ROOT / "tests" / f"test_{stem}.py").exists()
    benches = "".join(path.read_text() for path in (ROOT / "bench").glob("bench_*.py"))
    assert re.search(rf"\b{name}\(", benches)


def test_all_operations_are_known_here():
    registered = set(_backends._operations)
    assert registered == set(OPERATIONS) - {"pack_linear"}


def test_the_readme_lists_the_backends_of_every_operation():
    for name, operation in _backends._operations.items():
        row = next(line for line in README.splitlines() if line.startswith("|") and f"`{name}(" in line)
        assert row.split("|")[-2].strip() == ", ".join(operation.implementations)


def modules() -> list[str]:
    folders = [(ROOT / package, package) for package in ("qvl_kernels", "qvl_model")]
    names = [f"{package}.{path.stem}" for folder, package in folders for path in sorted(folder.glob("*.py"))]
    return [name for name in names if not name.endswith(("__init__", "__main__"))]


@pytest.mark.parametrize("name", modules())
def test_examples_in_docstrings_run(name):
    module = importlib.import_module(name)
    names = {**vars(qvl_kernels), "torch": torch, "nn": torch.nn}
    torch.manual_seed(0)
    result = doctest.testmod(module, extraglobs=names)
    assert result.failed == 0


@pytest.mark.parametrize("name", modules())
def test_every_module_says_what_it_is(name):
    assert importlib.import_module(name).__doc__


def test_every_environment_variable_is_listed():
    used = set()
    for pattern in (
        "qvl_kernels/**/*.py",
        "qvl_model/**/*.py",
        "csrc/**/*.cpp",
        "setup.py",
        "tests/**/*.py",
        "bench/*.py",
    ):
        for path in ROOT.glob(pattern):
            used |= set(re.findall(r"\bQVL_(?!MODULE)[A-Z]+(?:_[A-Z]+)*\b", path.read_text()))
    listed = set(re.findall(r"^\| `(QVL_\w+)`", README, re.MULTILINE))
    assert used - {"QVL_"} == listed


def test_the_python_examples_of_the_readme_that_need_no_download_run():
    block = next(block for block in re.findall(r"```python\n(.*?)```", README, re.DOTALL) if "qvl_kernels" in block)
    if "cpu_avx2" not in qvl_kernels.available_backends():
        block = block.replace('"cpu_avx2"', '"reference"')
    subprocess.run([sys.executable, "-c", block], check=True, capture_output=True, timeout=120)


def test_the_command_of_ci_is_the_readmes():
    command = next(
        line for line in README.splitlines() if line.startswith("python3 -m venv") and "pytest tests" in line
    )
    assert "torch==2.13.0" in command
    assert "README.md" in (ROOT / ".ci" / "run").read_text()


def test_no_file_is_too_long():
    for pattern in (
        "qvl_kernels/**/*.py",
        "qvl_model/*.py",
        "csrc/**/*.cpp",
        "csrc/**/*.h",
        "csrc/**/*.cu",
        "bench/*.py",
    ):
        for path in ROOT.glob(pattern):
            assert len(path.read_text().splitlines()) <= 450, path
