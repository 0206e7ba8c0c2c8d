"""What an output says of itself: made by `rvqa.atlas.run`, checked here before anything relies on it.

cells, levels, entries      N, M, K
inputs                      name and cells of each file, in order; the cells add up to N
settings                    obs: columns that were carried along; cells: rows of a task
model, compute              what made the codes
"""

from pathlib import Path
from typing import Any

from rvqa.errors import InputError
from rvqa.io.cell_tables import LARGEST_TASK, REPAIR
from rvqa.io.json_text import require_keys, shown

_KEYS = {
    **{"cells": int, "levels": int, "entries": int},
    **{"inputs": list, "settings": dict, "model": str, "compute": dict},
}


def require_manifest(manifest: dict[str, Any], path: Path) -> None:
    """Reject a manifest that no run of `rvqa encode` can have written.

    Raises
    ------
    rvqa.errors.InputError
        A key that is missing or of another type, or numbers that cannot be or do not fit each other.
    """
    if absent := [key for key in _KEYS if key not in manifest]:
        raise InputError(f"{path} is not of a whole run: its manifest has no {absent[0]!r}. {REPAIR}")
    name = f"The manifest of {path}"
    require_keys(manifest, name, REPAIR, _KEYS)
    require_sizes(manifest["levels"], manifest["entries"], path)
    cells, settings = manifest["cells"], manifest["settings"]
    if not 0 <= cells < 2**62:
        raise InputError(f"{name} has {shown(cells)} cells. {REPAIR}")
    require_keys(settings, f"{name}, 'settings'", REPAIR, {"obs": list, "cells": int})
    columns = settings["obs"]
    if not all(isinstance(each, str) for each in columns) or len(set(columns)) < len(columns):
        raise InputError(f"{name} has the columns {shown(columns)}; expected a list of different names. {REPAIR}")
    if not 1 <= settings["cells"] <= LARGEST_TASK:
        raise InputError(
            f"{name} has tasks of {shown(settings['cells'])} cells; expected 1 to {LARGEST_TASK:,}. {REPAIR}"
        )
    for each in manifest["inputs"]:
        if not isinstance(each, dict):
            raise InputError(f"{name} has {shown(each)} among its inputs; expected an object for each. {REPAIR}")
        require_keys(each, f"{name}, 'inputs'", REPAIR, {"name": str, "cells": int})
        if not 0 <= each["cells"] <= cells:
            raise InputError(f"{name} has {shown(each['cells'])} of {cells:,} cells in one of its inputs. {REPAIR}")
    if (total := sum(each["cells"] for each in manifest["inputs"])) != cells:
        raise InputError(f"{name} has {total:,} cells in its inputs and {cells:,} in all. {REPAIR}")


def require_sizes(levels: int, entries: int, path: Path) -> None:
    """Reject levels and codewords a level that no codes uint8 of up to 8 bytes a cell can have."""
    if not (1 <= levels <= 64 and 1 <= entries <= 256):
        raise InputError(
            f"{path} has {shown(levels)} levels of {shown(entries)} codes; expected 1 to 64 levels of 1 to 256. "
            f"{REPAIR}"
        )
