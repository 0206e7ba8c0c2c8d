"""The CUDA sources compiled for a CPU, once per process, if there is a C++ compiler."""

import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from functools import cache
from importlib.machinery import ExtensionFileLoader
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path
from types import ModuleType

import pybind11
import pytest

from rvqa.kernels import registry

ROOT = Path(__file__).parents[2]
SOURCES = sorted((ROOT / "csrc/cuda").glob("*.cu"))


def compiled(target: Path, *sources: Path, flags: tuple[str, ...] = ()) -> Path:
    """Compile an extension module from sources that see tests/cuda/emulation.h instead of CUDA."""
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler is None:
        pytest.skip("there is no C++ compiler to build the emulation with")
    folders = [ROOT / "csrc", ROOT / "tests/cuda", pybind11.get_include(), sysconfig.get_path("include")]
    options = [
        "-O2",
        "-std=c++17",
        "-fPIC",
        "-shared",
        "-ffp-contract=off",
        "-Wall",
        "-Wextra",
        "-Werror",
        "-Wno-unknown-pragmas",
        *flags,
    ]
    command = [compiler, *options, "-DRVQA_EMULATE", *(f"-I{folder}" for folder in folders), "-x", "c++", *sources]
    subprocess.run([*map(str, command), "-o", str(target)], check=True)
    return target


@cache
def library() -> Path:
    """Return the kernels, built here or named by RVQA_CUDA_EMULATED."""
    if given := os.environ.get("RVQA_CUDA_EMULATED"):
        return Path(given)
    target = Path(tempfile.mkdtemp(prefix="rvqa-emulated-")) / "_cuda_emulated.so"
    bindings = ROOT / "csrc/cuda/bindings.cpp"
    return compiled(target, *SOURCES, bindings, flags=("-DRVQA_MODULE=_cuda_emulated",))


def load(name: str, path: Path) -> ModuleType:
    """Open an extension module."""
    loader = ExtensionFileLoader(name, str(path))
    spec = spec_from_loader(name, loader)
    assert spec is not None
    module = module_from_spec(spec)
    loader.exec_module(module)
    return module


def require() -> None:
    """Run the backend `cuda` under the emulation in this process; skip if it cannot be built.

    A process loads the module once, so RVQA_CUDA_EMULATED stays set.
    """
    if "rvqa.kernels.cuda.backend" not in sys.modules:
        os.environ["RVQA_CUDA_EMULATED"] = str(library())
        registry.reason_absent.cache_clear()
    assert registry.reason_absent("cuda") is None, registry.reason_absent("cuda")
