"""Build of the optional native modules; everything else is in pyproject.toml.

`rvqa._native` is C++ for the CPU; `rvqa._cuda` has the sources in csrc/cuda, if this version has any. `RVQA_BUILD`
decides what is built: `auto` (default) builds what the machine can and installs without the rest, `cpu` requires the
first, `cuda` requires both, `none` skips both. Native code sees only pointers and sizes, so torch is not imported.
"""

import os
import shutil
import subprocess
import sys
import sysconfig
from glob import glob
from pathlib import Path

from pybind11.setup_helpers import ParallelCompile, Pybind11Extension, build_ext
from setuptools import setup
from setuptools.errors import BaseError, CompileError

MODES = ("auto", "none", "cpu", "cuda")
mode = os.environ.get("RVQA_BUILD", "auto")
if mode not in MODES:
    sys.exit(f"RVQA_BUILD={mode!r} is not one of {', '.join(MODES)}")

sanitize = ["-fsanitize=address,undefined", "-g"] if os.environ.get("RVQA_SANITIZE") == "1" else []

native = Pybind11Extension(
    "rvqa._native",
    ["csrc/bindings.cpp", *sorted(glob("csrc/cpu/*.cpp"))],
    include_dirs=["csrc"],
    depends=sorted(glob("csrc/cpu/*.h") + glob("csrc/cpu/*.inl")),
    cxx_std=17,
    # -ffp-contract=off: the exactness proof counts roundings, so the compiler must not fuse or split them on its own.
    # Each instruction set has its own file, which sets its target, so -march is not given here.
    extra_compile_args=["-O3", "-ffp-contract=off", "-fno-math-errno", "-pthread", *sanitize],
    extra_link_args=["-pthread", *sanitize],
)
extensions = [] if mode == "none" else [native]

named = (os.environ.get("CUDACXX"), os.path.join(os.environ.get("CUDA_HOME", os.sep), "bin", "nvcc"), "nvcc")
nvcc = next(filter(None, map(shutil.which, filter(None, named))), None)
kernels = sorted(glob("csrc/cuda/*.cu"))
if mode == "cuda" and not kernels:
    sys.exit("RVQA_BUILD=cuda: this version of rvqa has no CUDA sources (csrc/cuda/*.cu); use RVQA_BUILD=cpu")
if mode == "cuda" and nvcc is None:
    sys.exit("RVQA_BUILD=cuda: no nvcc was found; set CUDACXX or CUDA_HOME, or put it on PATH")
if mode in ("auto", "cuda") and kernels and nvcc:
    sources = ["csrc/cuda/bindings.cpp", *kernels]
    headers = sorted(glob("csrc/cuda/*.h"))
    extensions.append(Pybind11Extension("rvqa._cuda", sources, include_dirs=["csrc"], depends=headers, cxx_std=17))
for extension in extensions:
    extension.optional = mode == "auto"


class BuildNative(build_ext):
    """Compiles .cu sources with nvcc, and reports a failed optional build in one line instead of stopping."""

    def build_extension(self, ext: Pybind11Extension) -> None:
        """Build one extension; in mode `auto` a failure leaves the package without it."""
        try:
            super().build_extension(ext) if ext is native else self.build_cuda(ext)
        except (BaseError, CompileError, OSError) as error:
            if not ext.optional:
                raise
            print(f"rvqa: {ext.name} not built ({error}); another backend will be used", file=sys.stderr)

    def build_cuda(self, ext: Pybind11Extension) -> None:
        """Compile and link with one call of nvcc, without fused operations, as for the CPU code."""
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        code = ["-gencode=arch=compute_80,code=sm_80", "-gencode=arch=compute_90,code=[sm_90,compute_90]"]
        flags = ["-O3", "-std=c++17", "-fmad=false", "-shared", "--threads=0", *code]
        includes = [f"-I{folder}" for folder in [*ext.include_dirs, sysconfig.get_path("include")]]
        host = "-Xcompiler=-fPIC,-ffp-contract=off,-fvisibility=hidden"
        if subprocess.run([nvcc, *flags, host, *includes, *ext.sources, "-o", target], check=False).returncode:
            raise CompileError("nvcc failed; its output is above")


ParallelCompile("RVQA_BUILD_JOBS").install()
setup(ext_modules=extensions, cmdclass={"build_ext": BuildNative})
