"""Compiles one .cu file with NVRTC: no CUDA toolkit, no GPU.

    python csrc/cuda/compile.py SOURCE.cu OUT_DIR [--depfile PATH]

writes into OUT_DIR
    <stem>.sm_61.cubin       machine code for Pascal (6.1)
    <stem>.compute_61.ptx    the PTX it was made of, which the driver compiles for newer GPUs
    <stem>.json              per kernel: registers, shared and local memory, spills, parameters
and into --depfile the project's headers that it read, as a make rule. The same input gives the same bytes.

NVRTC 12.9 is the last that targets sm_61. It comes with the wheel nvidia-cuda-nvrtc-cu12, its headers (cuda_fp16.h)
with nvidia-cuda-runtime-cu12.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib.util
import json
import os
import re
import sys
from pathlib import Path

ARCHITECTURE = "61"
OPTIONS = ("--std=c++17", f"--gpu-architecture=sm_{ARCHITECTURE}", "--ptxas-options=-v")
INCLUDE = re.compile(r'^\s*#\s*include\s*"([^"]+)"', re.MULTILINE)


class CompileError(Exception):
    """What stands between a source and its images, in one message."""


def wheel_folder(package: str, wheel: str) -> Path:
    """The folder that the wheel installs as `nvidia.<package>`."""
    try:
        spec = importlib.util.find_spec(f"nvidia.{package}")
    except ModuleNotFoundError:
        spec = None
    if spec is None or not spec.submodule_search_locations:
        raise CompileError(f"nvidia.{package} is not installed (pip install '{wheel}==12.9.*')")
    return Path(next(iter(spec.submodule_search_locations)))


class Nvrtc:
    """The few NVRTC functions that a compilation needs."""

    def __init__(self) -> None:
        path = wheel_folder("cuda_nvrtc", "nvidia-cuda-nvrtc-cu12") / "lib" / "libnvrtc.so.12"
        try:
            self.library = ctypes.CDLL(str(path))
        except OSError as error:
            raise CompileError(f"NVRTC does not load: {error}") from None
        self.library.nvrtcGetErrorString.restype = ctypes.c_char_p
        major, minor = ctypes.c_int(), ctypes.c_int()
        self.library.nvrtcVersion(ctypes.byref(major), ctypes.byref(minor))
        if major.value != 12:
            raise CompileError(f"NVRTC {major.value}.{minor.value} cannot target sm_{ARCHITECTURE}: 12.9 is needed")

    def compile(self, source: str, name: str, options: list[str]) -> tuple[bytes, bytes, str]:
        """(cubin, PTX, log) of a translation unit."""
        program = ctypes.c_void_p()
        self._check(
            self.library.nvrtcCreateProgram(ctypes.byref(program), source.encode(), name.encode(), 0, None, None)
        )
        try:
            arguments = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
            status = self.library.nvrtcCompileProgram(program, len(options), arguments)
            log = self._get(program, "ProgramLog").rstrip(b"\0").decode()
            if status != 0:
                raise CompileError(f"{name} does not compile:\n{log}")
            return self._get(program, "CUBIN"), self._get(program, "PTX").rstrip(b"\0"), log
        finally:
            self.library.nvrtcDestroyProgram(ctypes.byref(program))

    def _get(self, program: ctypes.c_void_p, what: str) -> bytes:
        size = ctypes.c_size_t()
        self._check(getattr(self.library, f"nvrtcGet{what}Size")(program, ctypes.byref(size)))
        buffer = ctypes.create_string_buffer(size.value)
        self._check(getattr(self.library, f"nvrtcGet{what}")(program, buffer))
        return buffer.raw

    def _check(self, status: int) -> None:
        if status != 0:
            raise CompileError(f"NVRTC: {self.library.nvrtcGetErrorString(status).decode()}")


def headers_of(source: Path) -> list[Path]:
    """The project's headers that `source` includes with quotes, directly or not."""
    found: list[Path] = []
    pending = [source]
    while pending:
        including = pending.pop()
        for name in INCLUDE.findall(including.read_text()):
            header = including.parent / name
            if not header.exists():
                raise CompileError(f'{including}: #include "{name}" is not there')
            if header not in found:
                found.append(header)
                pending.append(header)
    return sorted(found)


def kernel_report(log: str, ptx: str) -> dict[str, dict]:
    """{kernel: its resources, from the log of ptxas, and its parameters, from the PTX}."""
    report: dict[str, dict] = {}
    for entry in re.split(r"Compiling entry function '", log)[1:]:
        name = entry.split("'")[0]

        def number(pattern: str, text: str = entry) -> int:
            match = re.search(pattern, text)
            return int(match.group(1)) if match else 0

        report[name] = {
            "registers": number(r"Used (\d+) registers"),
            "shared_bytes": number(r"(\d+) bytes smem"),
            "local_bytes": number(r"(\d+) bytes stack frame"),
            "spill_bytes": number(r"(\d+) bytes spill stores") + number(r"(\d+) bytes spill loads"),
            "parameters": parameters(name, ptx),
        }
    return dict(sorted(report.items()))


def parameters(kernel: str, ptx: str) -> list[dict]:
    """Alignment and size of each parameter, in bytes and in order."""
    declared = re.search(rf"\.entry {re.escape(kernel)}\((.*?)\)", ptx, re.DOTALL)
    found = []
    for line in declared.group(1).split(",") if declared else []:
        array = re.search(r"\.align (\d+) \.b8 \w+\[(\d+)\]", line)
        scalar = re.search(r"\.param \.[a-z](\d+)", line)
        if array:
            found.append({"align": int(array.group(1)), "size": int(array.group(2))})
        elif scalar:
            found.append({"align": int(scalar.group(1)) // 8, "size": int(scalar.group(1)) // 8})
    return found


def compile_file(source: Path, folder: Path) -> list[Path]:
    """Writes the images and the report of `source` into `folder`; returns their paths."""
    include = wheel_folder("cuda_runtime", "nvidia-cuda-runtime-cu12") / "include"
    options = [*OPTIONS, f"-I{source.parent}", f"-I{include}"]
    cubin, ptx, log = Nvrtc().compile(source.read_text(), source.name, options)
    report = kernel_report(log, ptx.decode())
    if not report:
        raise CompileError(f"{source} has no kernel")
    folder.mkdir(parents=True, exist_ok=True)
    outputs = {
        f"{source.stem}.sm_{ARCHITECTURE}.cubin": cubin,
        f"{source.stem}.compute_{ARCHITECTURE}.ptx": ptx,
        f"{source.stem}.json": (json.dumps(report, indent=1) + "\n").encode(),
    }
    for name, content in outputs.items():
        temporary = folder / f"{name}.{os.getpid()}"
        temporary.write_bytes(content)
        temporary.replace(folder / name)  # an interrupted build leaves no half a file
    return [folder / name for name in outputs]


def depfile(outputs: list[Path], inputs: list[Path]) -> str:
    def names(paths: list[Path]) -> str:
        return " ".join(str(path).replace(" ", "\\ ") for path in paths)

    return f"{names(outputs)}: {names(inputs)}\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("source", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--depfile", type=Path)
    arguments = parser.parse_args()
    try:
        headers = headers_of(arguments.source)
        outputs = compile_file(arguments.source, arguments.folder)
    except CompileError as error:
        print(f"compile.py: {error}", file=sys.stderr)
        return 1
    if arguments.depfile:
        arguments.depfile.write_text(depfile(outputs, [arguments.source, *headers]))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
