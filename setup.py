"""Build of the optional native module `rvqa._native`; everything else is in pyproject.toml.

`RVQA_BUILD` decides: `auto` (default) builds it when a C++ compiler works and installs without it otherwise, `cpu`
insists on it, `none` skips it. torch is never imported here: the native code sees pointers and sizes only.
"""

import os
import sys

from pybind11.setup_helpers import ParallelCompile, Pybind11Extension, build_ext
from setuptools import setup
from setuptools.errors import BaseError

MODES = ("auto", "none", "cpu")
mode = os.environ.get("RVQA_BUILD", "auto")
if mode not in MODES:
    sys.exit(f"RVQA_BUILD={mode!r} is not one of {', '.join(MODES)}")

native = Pybind11Extension(
    "rvqa._native",
    ["csrc/bindings.cpp", "csrc/cpu/residual_quantize.cpp", "csrc/cpu/csr_project.cpp"],
    include_dirs=["csrc"],
    depends=["csrc/cpu/exact.h", "csrc/cpu/residual_quantize.h", "csrc/cpu/csr_project.h"],
    cxx_std=17,
    # -ffp-contract=off: the exactness proof counts roundings, so the compiler must not fuse or split them on its own.
    extra_compile_args=["-O3", "-ffp-contract=off", "-pthread"],
    extra_link_args=["-pthread"],
)
native.optional = mode == "auto"


class BuildNative(build_ext):
    """Reports a failed optional build in one line instead of stopping the installation."""

    def build_extension(self, ext: Pybind11Extension) -> None:
        """Build one extension; in mode `auto` a failure leaves the package without it."""
        try:
            super().build_extension(ext)
        except (BaseError, OSError) as error:
            if not ext.optional:
                raise
            print(f"rvqa: native module not built ({error}); the reference backend will be used", file=sys.stderr)


ParallelCompile("RVQA_BUILD_JOBS").install()
setup(ext_modules=[] if mode == "none" else [native], cmdclass={"build_ext": BuildNative})
