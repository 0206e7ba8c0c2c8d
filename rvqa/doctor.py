"""What `rvqa doctor` says: versions, kernels that are live or why they are not, threads, data folders."""

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

PACKAGES = ("torch", "transformers", "anndata", "deepspeed", "scanpy", "vllm")


def report() -> dict[str, Any]:
    """Facts about this installation, JSON-serialisable; a backend maps to None where it is live, else to the reason."""
    import torch

    import rvqa
    from rvqa.kernels.registry import backends

    installed: dict[str, str | None] = {}
    for package in PACKAGES:
        try:
            installed[package] = version(package)
        except PackageNotFoundError:
            installed[package] = None
    return {
        "rvqa": rvqa.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "packages": installed,
        "backends": backends(),
        "threads": torch.get_num_threads(),
        "cuda": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "RVQA_DATA_DIR": os.environ.get("RVQA_DATA_DIR"),
        "RVQA_BACKEND": os.environ.get("RVQA_BACKEND"),
    }


def text(facts: dict[str, Any]) -> str:
    """Lines a person reads."""
    lines = [f"rvqa {facts['rvqa']} on Python {facts['python']}, {facts['machine']}, {facts['threads']} threads"]
    lines += [f"  {name:14s}{number or 'not installed'}" for name, number in facts["packages"].items()]
    lines.append("kernels")
    lines += [f"  {name:14s}{'live' if reason is None else reason}" for name, reason in facts["backends"].items()]
    lines.append(f"GPU             {facts['cuda'] or 'none that torch can use'}")
    lines.append(f"RVQA_DATA_DIR   {facts['RVQA_DATA_DIR'] or 'not set'}")
    return "\n".join(lines)
