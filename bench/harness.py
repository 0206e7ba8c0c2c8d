"""Code that all benches share: interleaved timing, facts of the machine, and the report.

A bench makes its input, checks that all contenders agree, times them in turns, and passes rows to `report`. With
--json the last line of standard output is one JSON object, and everything else goes to standard error:

    {"name", "machine": {...}, "versions": {...},
     "rows": [{"case", "contender", "value", "unit", "spread", "floor_share"}], "figures": {name: number}}
"""

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import torch

from rvqa.kernels import registry


class Timing(NamedTuple):
    """Seconds of one call, over repeats."""

    median: float
    spread: float
    """(slowest - fastest) / median."""


class Row(NamedTuple):
    """One measured contender in one case; floor_share is 1 for the best that the machine could do, None if unknown."""

    case: str
    contender: str
    value: float
    unit: str
    spread: float
    floor_share: float | None


def parser(description: str) -> argparse.ArgumentParser:
    """Return the command line of a bench with --json, --repeats and --threads; the bench adds its own sizes."""
    arguments = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--json", action="store_true", help="print one JSON object as the last line of stdout")
    arguments.add_argument("--repeats", type=int, default=7, help="timed calls of each contender (default 7)")
    arguments.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads")
    return arguments


def interleave(contenders: dict[str, Callable[[], Any]], repeats: int) -> dict[str, Timing]:
    """Time contenders in turns, so that a change of the machine's speed affects all; each has one warm-up call.

    OpenMP keeps the threads of a call spinning for a while; a pause before the next call lets them go to sleep.
    """
    for call in contenders.values():
        call()
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(repeats):
        for name, call in contenders.items():
            time.sleep(0.02)
            start = time.perf_counter()
            call()
            seconds[name].append(time.perf_counter() - start)
    return {name: _summary(values) for name, values in seconds.items()}


def matmul_rate(size: int = 1024, repeats: int = 7) -> float:
    """Measure float32 FLOP/s of a large matrix product with the current threads, a peak that shares refer to."""
    a, b = torch.randn(size, size), torch.randn(size, size)
    return 2 * size**3 / interleave({"matmul": lambda: a @ b}, repeats)["matmul"].median


def fma_rate(repeats: int = 7) -> float:
    """Measure float32 FLOP/s of multiply-adds in registers with the current threads, a peak that shares refer to."""
    threads, rounds = torch.get_num_threads(), 4_000_000
    native = import_module("rvqa._native")
    seconds = interleave({"fma": lambda: native.multiply_add(rounds, threads)}, repeats)["fma"].median
    return native.multiply_add(1, threads) * rounds / seconds


def copy_rate(repeats: int = 7, size: int = 1 << 28) -> float:
    """Measure bytes per second, read and written, of a large copy with the current threads."""
    source = torch.empty(size, dtype=torch.uint8).fill_(1)
    target = torch.empty_like(source)
    return 2 * size / interleave({"copy": lambda: target.copy_(source)}, repeats)["copy"].median


def machine() -> dict[str, Any]:
    """Return the processor, cores, threads in use, and the GPU if there is one."""
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        model = names[0] if names else model
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    live = registry.backends()["cpu"] is None
    isa = registry.function("cpu", "isa")() if live else None
    return {"cpu": model, "cores": os.cpu_count(), "threads": torch.get_num_threads(), "isa": isa, "gpu": gpu}


def versions() -> dict[str, str]:
    """Return versions of the packages that decide speed."""
    names = ("rvqa", "torch", "numpy", "scipy", "faiss-cpu", "vector-quantize-pytorch", "scikit-learn", "scvi-tools")
    installed = {name for name in names if find_distribution(name)}
    return {"python": platform.python_version(), **{name: version(name) for name in names if name in installed}}


def find_distribution(name: str) -> bool:
    """Whether a distribution is installed."""
    try:
        version(name)
    except PackageNotFoundError:
        return False
    return True


def report(name: str, rows: list[Row], figures: dict[str, float], *, as_json: bool) -> None:
    """Print the table, and with `as_json` the JSON object."""
    table = sys.stderr if as_json else sys.stdout
    here = machine()
    print(
        f"{name}: {here['cpu']}, {here['threads']} of {here['cores']} cores, {here['isa']}, GPU {here['gpu']}",
        file=table,
    )
    a, b = (max([least, *(len(str(row[at])) + 1 for row in rows)]) for at, least in ((0, 24), (1, 16)))
    print(f"{'case':<{a}}{'contender':<{b}}{'value':>12} {'unit':<10}{'spread':>8}{'of floor':>10}", file=table)
    for row in rows:
        share = "" if row.floor_share is None else f"{row.floor_share:.1%}"
        print(
            f"{row.case:<{a}}{row.contender:<{b}}{row.value:>12.4g} {row.unit:<10}{row.spread:>8.0%}{share:>10}",
            file=table,
        )
    if as_json:
        result = {
            "name": name,
            "machine": here,
            "versions": versions(),
            "rows": [row._asdict() for row in rows],
            "figures": figures,
        }
        print(json.dumps(result))


def _summary(seconds: list[float]) -> Timing:
    median = statistics.median(seconds)
    return Timing(median, (max(seconds) - min(seconds)) / median)
