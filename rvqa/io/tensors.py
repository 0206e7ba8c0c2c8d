"""Files of a model, read with a clear word on what is wrong: JSON of known keys, tensors that must be there."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from rvqa.errors import InputError
from rvqa.io.json_text import kind, object_in, shown

REPAIR = "Copy the model again, or fit a new one."
"""Next step for a model that is damaged."""

OTHER_VERSION = "Fit the model again, or install the rvqa it was made with."
"""Next step for a model of another format."""

LONGEST_NAME = 1000
"""Characters of a name in a model's files: of a cell type, a perturbation, an ontology id."""

LARGEST_VALUE = 1e6
"""Largest absolute value in a cell tokenizer: sums of products of such values stay finite in float32."""


def read_json(path: Path, keys: Mapping[str, type] | None = None) -> dict[str, Any]:
    """Read a JSON object from a file.

    Parameters
    ----------
    path
        The file.
    keys
        Keys that it must have, with the type of their values.

    Raises
    ------
    InputError
        No such file, no JSON, no object, a missing key or a value of another type; see `rvqa.io.json_text`.
    """
    return object_in(path, REPAIR, keys)


def require_names(path: Path, key: str, values: Iterable[Any], *, once: bool = True) -> None:
    """Reject what is not a name among the values of a key: text of 1 to `LONGEST_NAME` characters, each `once`."""
    seen = set()
    for value in values:
        if not isinstance(value, str):
            raise InputError(f"{path}: {key!r} holds {kind(value)}; expected text alone. {REPAIR}")
        if not 1 <= len(value) <= LONGEST_NAME:
            raise InputError(
                f"{path}: {key!r} holds a text of {len(value):,} characters; expected 1 to {LONGEST_NAME:,}. {REPAIR}"
            )
        if once and value in seen:
            raise InputError(f"{path}: {key!r} holds {value[:80]!r} twice. {REPAIR}")
        seen.add(value)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read a `.safetensors` file; nothing else is ever read as tensors, least of all a pickle.

    Raises
    ------
    InputError
        The file is of another format, or damaged.
    """
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path} is damaged or holds no safetensors ({str(error)[:120]}). {REPAIR}") from error


def dtypes(path: Path) -> dict[str, torch.dtype]:
    """Names and types of the tensors of a `.safetensors` file; one at a time in memory."""
    with safe_open(path, framework="pt") as file:
        return {name: file.get_slice(name)[:0].dtype for name in file.keys()}  # noqa: SIM118


def shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors of a `.safetensors` file, without reading their values."""
    try:
        with safe_open(path, framework="pt") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path} is damaged or holds no safetensors ({str(error)[:120]}). {REPAIR}") from error


def require_same_tensors(path: Path, found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Reject tensors that are missing, extra, of another shape or type, or not finite.

    Parameters
    ----------
    path
        Where they were read, for the message.
    found
        By name.
    expected
        By name; the values do not matter and may be on the meta device.
    """
    for name in sorted(set(found) ^ set(expected)):
        seen = (
            f"lacks the tensor {shown(name)}"
            if name in expected
            else f"holds a tensor {shown(name)} that does not belong"
        )
        raise InputError(f"{path} {seen}. {REPAIR}")
    for name, wanted in expected.items():
        given = found[name]
        if given.shape != wanted.shape:
            raise InputError(
                f"{path}: {shown(name)} has shape {list(given.shape)} and does not fit its config, which makes it "
                f"{list(wanted.shape)}. {REPAIR}"
            )
        if given.dtype != wanted.dtype:
            raise InputError(f"{path}: {shown(name)} holds {_dtype(given)}; expected {_dtype(wanted)}. {REPAIR}")
    require_finite(path, found)


def require_finite(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Reject NaN and infinity."""
    for name, tensor in tensors.items():
        if n_broken := tensor.numel() - int(torch.isfinite(tensor).sum()):
            raise InputError(
                f"{path}: {shown(name)} holds NaN or infinite values ({n_broken:,} of {tensor.numel():,}). {REPAIR}"
            )


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
