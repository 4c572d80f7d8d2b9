"""Builds the native modules with ninja, without torch and without a CUDA toolkit.

    _cpu_avx2, _cpu_avx512   csrc/bindings*.cpp + csrc/cpu/*.cpp, the same sources once per instruction set
    _cuda                    csrc/cuda/*.cpp: the driver side, opens libcuda at run time
    cuda_images/             csrc/cuda/*.cu through NVRTC: sm_61 cubin and compute_61 PTX

Where a part cannot be built the installation goes on, and `qvl_kernels/build_report.json` says what is missing and why
(`qvl info` prints it). QVL_REQUIRE_NATIVE=1 turns that into an error. QVL_CXXFLAGS adds flags, for example a
sanitizer's.
"""

import json
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
CXX_FLAGS = (
    "-std=c++17 -O3 -ffp-contract=fast -fPIC -fvisibility=hidden -Wall -Wextra"
    " -Wno-missing-field-initializers"
    " -Wno-uninitialized -Wno-maybe-uninitialized"  # gcc 12 warns about its own intrinsics
)
ISA_FLAGS = {
    "_cpu_avx2": "-mavx2 -mfma -mf16c",
    "_cpu_avx512": "-mavx512f -mavx512dq -mavx512bw -mavx512vl -mavx2 -mfma -mf16c",
}
RULES = """\
rule cxx
  command = $cxx $flags $isa -MMD -MF $out.d -c $in -o $out
  depfile = $out.d
  deps = gcc
rule link
  command = $cxx -shared $ldflags $in -o $out -ldl
rule nvrtc
  command = $python csrc/cuda/compile.py $in $folder --depfile $depfile
  depfile = $depfile
  deps = gcc
"""


class BuildNative(build_ext):
    """Writes build.ninja, runs it, and reports per part whether it is there."""

    def run(self):
        package = ROOT / "qvl_kernels" if self.inplace else Path(self.build_lib).resolve() / "qvl_kernels"
        package.mkdir(parents=True, exist_ok=True)
        report = build(package)
        (package / "build_report.json").write_text(json.dumps(report, indent=1) + "\n")
        missing = {part: why for part, why in report.items() if why is not None}
        for part, why in missing.items():
            print(f"qvl: {part} was not built: {why}", file=sys.stderr)
        if missing and os.environ.get("QVL_REQUIRE_NATIVE") == "1":
            raise SystemExit("qvl: QVL_REQUIRE_NATIVE=1 is set and a native part is missing")

    def get_outputs(self):
        return []

    def get_output_mapping(self):
        return {}


def build(package):
    """Builds into `package`; returns {part: None, or the reason why it is missing}."""
    refusal = cannot_build()
    if refusal is not None:
        return dict.fromkeys((*ISA_FLAGS, "_cuda", "cuda_images"), refusal)
    folder = ROOT / "build" / "native"
    folder.mkdir(parents=True, exist_ok=True)
    text, parts = ninja_file(package, folder)
    (folder / "build.ninja").write_text(text)
    subprocess.run([ninja(), "-k", "0", "-f", str(folder / "build.ninja")], cwd=ROOT)  # outputs tell what failed
    failed = "its compilation failed; the log of `pip install -v .` shows the error"
    return {part: None if all(out.exists() for out in outputs) else failed for part, outputs in parts.items()}


def cannot_build():
    if platform.system() != "Linux" or platform.machine() != "x86_64":
        return f"native code is for Linux on x86-64, this is {platform.system()} on {platform.machine()}"
    if compiler() is None:
        return "no C++ compiler was found (install g++ or clang++, or set CXX)"
    if not Path(sysconfig.get_path("include"), "Python.h").exists():
        return "Python.h is missing (install python3-dev)"
    return "the ninja package is missing" if ninja() is None else None


def compiler():
    return os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")


def ninja():
    try:
        from ninja import BIN_DIR
    except ImportError:
        return shutil.which("ninja")
    return str(Path(BIN_DIR, "ninja"))


def ninja_file(package, folder):
    """The text of build.ninja, and for every part the files it consists of."""
    import pybind11

    includes = [pybind11.get_include(), sysconfig.get_path("include")]
    flags = " ".join(
        [CXX_FLAGS, os.environ.get("QVL_CXXFLAGS", ""), *(f"-isystem {escape(path)}" for path in includes)]
    )
    lines = [
        f"cxx = {compiler()}",
        f"python = {escape(sys.executable)}",
        f"flags = {flags}",
        f"ldflags = {os.environ.get('QVL_CXXFLAGS', '')}",
        f"builddir = {escape(folder)}",
        RULES,
    ]
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    parts = {}
    cpu_sources = [*sources("csrc/bindings*.cpp"), *sources("csrc/cpu/*.cpp")]
    for module, sources_, isa in [
        *((name, cpu_sources, isa) for name, isa in ISA_FLAGS.items()),
        ("_cuda", sources("csrc/cuda/*.cpp"), ""),
    ]:
        objects = []
        for source in sources_:
            objects.append(escape(folder / module / source).removesuffix(".cpp") + ".o")
            lines += [f"build {objects[-1]}: cxx {source}", f"  isa = {isa} -DQVL_MODULE={module}"]
        library = package / (module + suffix)
        lines.append(f"build {escape(library)}: link {' '.join(objects)}")
        parts[module] = [library]
    images = package / "cuda_images"
    parts["cuda_images"] = []
    for source in sources("csrc/cuda/*.cu"):
        made = [images / (Path(source).stem + end) for end in (".sm_61.cubin", ".compute_61.ptx", ".json")]
        parts["cuda_images"] += made
        lines += [
            f"build {' '.join(map(escape, made))}: nvrtc {source} | csrc/cuda/compile.py",
            f"  folder = {escape(images)}",
            f"  depfile = {escape(folder / (Path(source).stem + '.cu.d'))}",
        ]
    return "\n".join(lines) + "\n", parts


def sources(pattern):
    return sorted(path.relative_to(ROOT).as_posix() for path in ROOT.glob(pattern))


def escape(path):
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


setup(ext_modules=[Extension("qvl_kernels._native", [])], cmdclass={"build_ext": BuildNative})
