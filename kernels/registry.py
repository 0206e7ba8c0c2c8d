"""Chooses the backend that runs an operation: one dispatch function, one override.

A backend is a module with the functions of `rvqa.kernels.reference`, with the same signatures:

    reference   plain torch, any device, always available
    cpu         the native module `rvqa._native`, CPU tensors
    triton      Triton kernels, CUDA tensors (CPU tensors under TRITON_INTERPRET=1, for tests)
    cuda        CUDA C++ of `rvqa._cuda`, CUDA tensors (CPU tensors under RVQA_CUDA_EMULATED, for tests)

By default CPU tensors go to `cpu` and CUDA tensors to `triton` if these are live, and all else to `reference`. The
environment variable RVQA_BACKEND names one backend for all calls. A call raises an error if that backend cannot run:
nothing falls back silently.
"""

import os
from collections.abc import Callable
from functools import cache
from importlib import import_module
from typing import Any

import torch

from rvqa.errors import InputError

_MODULES = {
    "reference": "rvqa.kernels.reference",
    "cpu": "rvqa.kernels.cpu.backend",
    "triton": "rvqa.kernels.triton.backend",
    "cuda": "rvqa.kernels.cuda.backend",
}


def backends() -> dict[str, str | None]:
    """Return every backend by name, with None if it is live, or the reason why it is not."""
    return {name: reason_absent(name) for name in _MODULES}


def select(device: torch.device) -> str:
    """Return the name of the backend that runs operations on tensors of a device.

    Raises
    ------
    rvqa.errors.InputError
        RVQA_BACKEND names a backend that does not exist, is not live, or cannot run on this device.
    """
    forced = os.environ.get("RVQA_BACKEND", "")
    if not forced:
        wanted = {"cpu": "cpu", "cuda": "triton"}.get(device.type, "reference")
        return wanted if reason_absent(wanted) is None else "reference"
    if forced not in _MODULES:
        raise InputError(f"RVQA_BACKEND={forced!r} is not a backend; choose one of {', '.join(_MODULES)} or unset it")
    reason = reason_absent(forced)
    if reason is not None:
        raise InputError(f"RVQA_BACKEND={forced} cannot be used: {reason}")
    if forced == "cpu" and device.type != "cpu":
        raise InputError(f"RVQA_BACKEND=cpu cannot run on {device} tensors; use .cpu() or unset RVQA_BACKEND")
    on_cpu = {"triton": "INTERPRETED", "cuda": "EMULATED"}.get(forced)
    if on_cpu is not None and device.type != "cuda" and not function(forced, on_cpu):
        raise InputError(f"RVQA_BACKEND={forced} cannot run on {device} tensors; use .cuda() or unset RVQA_BACKEND")
    return forced


def dispatch(operation: str, device: torch.device) -> Callable[..., Any]:
    """Return the function that runs `operation` on tensors of a device; it raises what `select` raises."""
    return _bound(operation, device, os.environ.get("RVQA_BACKEND", ""))


@cache
def _bound(operation: str, device: torch.device, forced: str) -> Callable[..., Any]:
    """Cache `dispatch` for each value of RVQA_BACKEND, because the look-up costs as much as quantizing a row."""
    return function(select(device), operation)


def function(backend: str, operation: str) -> Any:
    """Return the function that runs `operation` on one live backend, for tests and benches that compare them."""
    return getattr(import_module(_MODULES[backend]), operation)


@cache
def reason_absent(backend: str) -> str | None:
    """Return None if a backend is live, else the reason why it is not; import only that backend."""
    try:
        import_module(_MODULES[backend])
    except ImportError as error:
        if backend != "cpu":
            return str(error)
        return (
            f"{error}; the native module was not built, or not for this Python. "
            "Install a C++17 compiler and reinstall rvqa with RVQA_BUILD=cpu to see why"
        )
    return None
