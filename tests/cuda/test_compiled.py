"""Checks of nvcc's output: no warning, no spill, and tensor cores and wide loads where the sources intend them.

They are skipped without nvcc, which users never need; `make test-cuda` reports that.
"""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.cuda.emulated import ROOT, SOURCES

NVCC = shutil.which("nvcc")
pytestmark = pytest.mark.skipif(NVCC is None, reason="NO NVCC ON THIS MACHINE: the CUDA sources were not compiled")

REGISTERS = 65_536
"""Of a multiprocessor, on sm_80 and sm_90."""


def compiled(source: Path, architecture: str, target: Path) -> str:
    command = [
        NVCC, "-std=c++17", "-O3", "-fmad=false", f"-arch={architecture}", "-Werror", "all-warnings", "-Xptxas", "-v",
        f"-I{ROOT / 'csrc'}", "-cubin", source, "-o", target,
    ]  # fmt: skip
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


@pytest.mark.parametrize("architecture", ["sm_80", "sm_90a"])
@pytest.mark.parametrize(
    "source", [each for each in SOURCES if "__global__" in each.read_text()], ids=lambda path: path.stem
)
def test_nothing_spills(source, architecture, tmp_path, record_property):
    said = compiled(source, architecture, tmp_path / "kernel.cubin")
    assert "spill" in said
    assert {(*map(int, each),) for each in re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", said)} == {
        (0, 0)
    }
    used = max(int(each) for each in re.findall(r"Used (\d+) registers", said))
    record_property("registers", used)
    assert used * 128 * 2 <= REGISTERS  # at least two blocks of 128 threads


@pytest.mark.parametrize(
    ("name", "instructions"),
    [
        ("certify", ["HMMA.16816.F32", "LDG.E.128"]),
        ("decode", ["LDG.E.128", "STG.E.128"]),
        ("apply_span_mask", ["STG.E.128"]),
    ],
)
def test_instructions(name, instructions, tmp_path):
    """Products run on tensor cores; rows, codewords and logits move 16 bytes at a time."""
    triton = pytest.importorskip("triton")
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    if not tool.exists():
        pytest.skip("triton brings no cuobjdump here")
    compiled(ROOT / f"csrc/cuda/{name}.cu", "sm_90a", tmp_path / "kernel.cubin")
    code = subprocess.run([tool, "-sass", tmp_path / "kernel.cubin"], capture_output=True, text=True, check=True).stdout
    for instruction in instructions:
        assert instruction in code
