"""JSON that others wrote: read with a clear word on what is wrong, and within bounds."""

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rvqa.errors import InputError

LARGEST = 2**26
"""Bytes of the largest file of JSON that is read: Python takes up to 30 times as much for it."""

_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")

_KINDS = {int: "a whole number", float: "a number", str: "text", list: "a list", dict: "an object"}


def object_of(
    data: bytes | memoryview, name: object, repair: str, keys: Mapping[str, type] | None = None
) -> dict[str, Any]:
    """Read a JSON object.

    Parameters
    ----------
    data
        UTF-8.
    name
        What it is, for messages: a path.
    repair
        Next step where it is damaged, a sentence.
    keys
        Keys that it must have, with the type of their values.

    Raises
    ------
    rvqa.errors.InputError
        No JSON, NaN or infinity in it, text that is not Unicode, no object, a missing key or a value of another type.
    """
    if len(data) > LARGEST:
        raise InputError(f"{name} has {len(data):,} bytes; at most {LARGEST:,} are read. {repair}")
    try:
        values = json.loads(str(data, "utf-8"), parse_constant=_finite, parse_float=_finite)
        if _SURROGATE.search(data):  # one without its other half cannot be written anywhere
            json.dumps(values, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        raise InputError(f"{name} is not valid JSON: {_short(str(error))}. {repair}") from error
    if not isinstance(values, dict):
        raise InputError(f"{name} holds {kind(values)}; expected an object. {repair}")
    require_keys(values, name, repair, keys or {})
    return values


def object_in(path: Path, repair: str, keys: Mapping[str, type] | None = None) -> dict[str, Any]:
    """Read a JSON object from a file; arguments and errors as for `object_of`."""
    if not path.is_file():
        raise InputError(f"{path} is missing. {repair}")
    with path.open("rb") as file:
        return object_of(file.read(LARGEST + 1), path, repair, keys)


def require_keys(values: Mapping[str, Any], name: object, repair: str, keys: Mapping[str, type]) -> None:
    """Reject an object without a key, or with a value of another type under it; a bool is not a number."""
    for key, wanted in keys.items():
        if key not in values:
            raise InputError(f"{name} has no {key!r}. {repair}")
        if not isinstance(values[key], (int, float) if wanted is float else wanted) or isinstance(values[key], bool):
            raise InputError(f"{name}: {key!r} is {kind(values[key])}; expected {_KINDS[wanted]}. {repair}")


def kind(value: object) -> str:
    """What a value of JSON is, in words."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return _KINDS[type(value)]


def differences(there: Any, here: Any, at: str = "") -> list[str]:
    """Each place where two JSON values differ, in words."""
    if isinstance(there, dict) and isinstance(here, dict):
        keys = [*here, *(each for each in there if each not in here)]
        pairs = [(f"{at}.{each}" if at else each, there.get(each), here.get(each)) for each in keys]
    elif isinstance(there, list) and isinstance(here, list):
        if len(there) != len(here):
            return [f"{at} has {len(there)} entries there, {len(here)} here"]
        pairs = [(f"{at}[{i}]", *pair) for i, pair in enumerate(zip(there, here, strict=True))]
    else:
        return [] if there == here else [f"{at} is {shown(there)} there, {shown(here)} here"]
    return [text for name, old, new in pairs for text in differences(old, new, name)]


def shown(value: object) -> str:
    """A value for a message, cut to a length that can be read."""
    return _short(repr(value))


def _short(text: str) -> str:
    return text if len(text) <= 120 else f"{text[:117]}..."


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"it holds {_short(text)}")
    return value
