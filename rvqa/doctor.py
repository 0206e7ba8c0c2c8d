"""What `rvqa doctor` says: versions, kernels that are live or why they are not, the machine, data folders, problems.

`report` never raises for what it finds, so that it can be asked where nothing else works.
"""

import os
import platform
import shutil
import subprocess
import sys
import warnings
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import rvqa
from rvqa.errors import InputError

REQUIRED = ("torch", "transformers", "anndata", "numpy", "scipy")
OPTIONAL = ("scanpy", "deepspeed", "vllm", "triton", "numba")

BACKENDS = {
    "reference": "pure torch",
    "cpu": "native C++",
    "triton": "Triton kernels, exact on a GPU",
    "cuda": "CUDA C++, exact on a GPU",
}
"""What a live backend is."""

NATIVE_ADVICE = (
    "The reference backend gives the same codes, more slowly. For the native one: install a C++17 compiler, then "
    "RVQA_BUILD=cpu pip install --force-reinstall --no-deps --no-binary rvqa rvqa"
)

_INSTRUCTIONS = {"avx2": "AVX2", "fma": "FMA", "avx512f": "AVX-512", "asimd": "NEON", "sve": "SVE"}


def report() -> dict[str, Any]:
    """Facts about this installation, JSON-serialisable; the keys below are always there.

    Returns
    -------
    dict
        `rvqa`, `python`, `system`, `machine`: text;
        `packages`: version of each package, None where it is not installed;
        `backends`: None for each kernel backend that is live, else the reason why not; empty without torch;
        `backend`: `RVQA_BACKEND` (text or None), `cpu_tensors` (the backend they go to, or None), `native` (path of the
        native module, or None) and `isa` (instruction set it uses, or None);
        `cpu`: `model`, `instructions` (those relevant), `torch` (what torch uses) and `threads` (of torch), `cores`
        (this process may use), `OMP_NUM_THREADS`;
        `memory_gib`: `total` and `available`, None where unknown;
        `gpus`: `name`, `memory_gib` and `driver` of each that torch can use; `no_gpu`: why there is none, else None;
        `data`: for `RVQA_DATA_DIR` `path`, `exists` and `h5ad` (files there); for `RVQA_REF_DIR` `path`, `exists` and
        `files` (expected ones there); `aliases` (where aliases of gene symbols come from, or None);
        `advice`, `problems`: sentences; rvqa is usable where there is no problem.
    """
    facts: dict[str, Any] = {
        "rvqa": rvqa.__version__,
        "python": platform.python_version(),
        "system": platform.system(),
        "machine": platform.machine(),
        "packages": {name: _version(name) for name in (*REQUIRED, *OPTIONAL)},
        "backends": {},
        "backend": {"RVQA_BACKEND": os.environ.get("RVQA_BACKEND"), "cpu_tensors": None, "native": None, "isa": None},
        "cpu": _cpu(),
        "memory_gib": _memory(),
        "gpus": [],
        "no_gpu": "torch is needed to tell",
        "data": {"RVQA_DATA_DIR": _data(), "RVQA_REF_DIR": _references(), "aliases": None},
        "advice": [],
        "problems": [f"{name} is not installed: pip install rvqa" for name in REQUIRED if _version(name) is None],
    }
    for name, effect in (
        ("RVQA_DATA_DIR", "`rvqa demo` will not run"),
        ("RVQA_REF_DIR", "no aliases of genes are known"),
    ):
        if facts["data"][name]["path"] and not facts["data"][name]["exists"]:
            facts["advice"].append(f"{name} names a folder that does not exist ({effect}): correct it or unset it")
    for find in (_ask_torch, _ask_aliases):
        try:
            find(facts)
        except InputError as error:
            facts["problems"].append(str(error))
        except (ImportError, OSError) as error:  # a broken installation of torch or of what it needs
            facts["problems"].append(f"a package rvqa needs cannot be imported: {error}")
    return facts


def text(facts: dict[str, Any]) -> str:
    """Lines a person reads."""
    backend, cpu, memory, data = facts["backend"], facts["cpu"], facts["memory_gib"], facts["data"]
    forced = f"RVQA_BACKEND={backend['RVQA_BACKEND']}" if backend["RVQA_BACKEND"] else "RVQA_BACKEND is not set"
    size = "unknown" if memory["total"] is None else f"{memory['total']} GiB"
    free = "" if memory["available"] is None else f", {memory['available']} GiB of it free"
    gpus = [f"{gpu['name']}, {gpu['memory_gib']} GiB, driver {gpu['driver'] or 'unknown'}" for gpu in facts["gpus"]]
    sections: dict[str, dict[str, str]] = {
        f"rvqa {facts['rvqa']} on Python {facts['python']}, {facts['system']} {facts['machine']}": {
            name: number or "not installed" for name, number in facts["packages"].items()
        },
        "kernels": {
            **{
                name: f"live: {BACKENDS.get(name, name)}" if reason is None else f"not live: {reason}"
                for name, reason in facts["backends"].items()
            },
            "in use": f"{backend['cpu_tensors'] or 'none'}, for tensors on the CPU ({forced})",
            "native module": f"{backend['isa'] or 'unusable'}, {backend['native']}" if backend["native"] else "none",
        },
        "machine": {
            "CPU": f"{cpu['model']}; {' '.join(cpu['instructions']) or 'no vector instructions known'}"
            f"; torch uses {cpu['torch'] or 'unknown'}",
            "threads": f"{cpu['threads'] or 'unknown'} of torch, {cpu['cores']} cores to use, "
            f"OMP_NUM_THREADS {cpu['OMP_NUM_THREADS'] or 'not set'}",
            "memory": size + free,
            "GPU": "; ".join(gpus) or f"none: {facts['no_gpu']}",
        },
        "data": {
            "RVQA_DATA_DIR": _folder_line(data["RVQA_DATA_DIR"], f"{data['RVQA_DATA_DIR']['h5ad']} .h5ad files"),
            "RVQA_REF_DIR": _folder_line(
                data["RVQA_REF_DIR"], ", ".join(data["RVQA_REF_DIR"]["files"]) or "none of the expected files"
            ),
            "gene aliases": data["aliases"] or "none: symbols and Ensembl ids must match as written",
        },
    }
    lines = []
    for title, rows in sections.items():
        lines += [title, *(f"  {name:14s} {value}" for name, value in rows.items())]
    lines += [f"advice: {sentence}" for sentence in facts["advice"]]
    lines += [f"PROBLEM: {sentence}" for sentence in facts["problems"]] or ["usable: no problem found"]
    return "\n".join(lines)


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _proc(path: str) -> dict[str, str]:
    """Names and values of a file like /proc/cpuinfo (of the last CPU there); empty on other systems."""
    try:
        lines = Path(path).read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return {}
    return {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}


def _cpu() -> dict[str, Any]:
    """What the system says of the CPU; `_ask_torch` adds what torch says."""
    info = _proc("/proc/cpuinfo")
    flags = set(info.get("flags", info.get("Features", "")).split())
    return {
        "model": info.get("model name") or platform.processor() or platform.machine(),
        "instructions": [name for flag, name in _INSTRUCTIONS.items() if flag in flags],
        "torch": None,
        "threads": None,
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS"),
    }


def _memory() -> dict[str, float | None]:
    try:
        total = round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, 1)
    except (AttributeError, OSError, ValueError):
        return {"total": None, "available": None}
    available = _proc("/proc/meminfo").get("MemAvailable", "").removesuffix("kB").strip()
    return {"total": total, "available": round(int(available) / 2**20, 1) if available.isdigit() else None}


def _data() -> dict[str, Any]:
    path = os.environ.get("RVQA_DATA_DIR") or None
    folder = Path(path or "")
    exists = path is not None and folder.is_dir()
    return {"path": path, "exists": exists, "h5ad": len(list(folder.glob("*.h5ad"))) if exists else 0}


def _references() -> dict[str, Any]:
    path = os.environ.get("RVQA_REF_DIR") or None
    folder = Path(path or "")
    expected = ("hgnc_complete_set.txt*", "label_to_cl.json", "cl-basic*.obo")
    files = [found.name for pattern in expected for found in sorted(folder.glob(pattern))] if path else []
    return {"path": path, "exists": path is not None and folder.exists(), "files": files}


def _folder_line(folder: dict[str, Any], content: str) -> str:
    if folder["path"] is None:
        return "not set"
    return f"{folder['path']}: {content if folder['exists'] else 'does not exist'}"


def _ask_aliases(facts: dict[str, Any]) -> None:
    from rvqa.data.aliases import alias_table

    if table := alias_table():
        facts["data"]["aliases"] = f"table of the HGNC in RVQA_REF_DIR, {len(table):,} genes"


def _ask_torch(facts: dict[str, Any]) -> None:
    import torch

    facts["cpu"].update(torch=torch.backends.cpu.get_cpu_capability(), threads=torch.get_num_threads())
    facts["gpus"], facts["no_gpu"] = _gpus()

    from rvqa.kernels.registry import backends, select

    facts["backends"] = dict(backends())
    if facts["backends"]["cpu"] is None:
        facts["backend"]["native"] = sys.modules["rvqa._native"].__file__
        try:
            facts["backend"]["isa"] = sys.modules["rvqa.kernels.cpu.backend"].isa()
        except InputError as error:
            facts["problems"].append(str(error))
    else:
        facts["advice"].append(NATIVE_ADVICE)
    facts["backend"]["cpu_tensors"] = select(torch.device("cpu"))


def _gpus() -> tuple[list[dict[str, Any]], str | None]:
    """The GPUs that torch can use, or the reason why there is none."""
    import torch

    with warnings.catch_warnings(record=True) as caught:  # of a driver that does not fit
        warnings.simplefilter("always")
        usable = torch.cuda.is_available()
    drivers = _drivers()
    if not usable:
        if torch.version.cuda is None:
            there = ", though the driver sees a GPU" if drivers else ""
            return [], f"this torch ({torch.__version__}) is built without CUDA{there}"
        said = f": {caught[-1].message}" if caught else ""
        return [], f"torch finds none that works{said}" if drivers else "no NVIDIA driver answers"
    found = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    driver = drivers[0] if drivers else None
    return [{"name": g.name, "memory_gib": round(g.total_memory / 2**30, 1), "driver": driver} for g in found], None


def _drivers() -> list[str]:
    """Driver version for each NVIDIA GPU of the system; empty where `nvidia-smi` is not there or fails."""
    command = shutil.which("nvidia-smi")
    if command is None:
        return []
    query = [command, "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(query, capture_output=True, text=True, timeout=20, check=True).stdout.split()
    except (OSError, subprocess.SubprocessError):
        return []
