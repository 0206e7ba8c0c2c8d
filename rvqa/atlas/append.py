"""More cells for a finished output: what it holds stands before the parts of the new files, as if made in one run."""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from rvqa.atlas.reader import Codes, open_codes
from rvqa.errors import InputError
from rvqa.io.json_text import shown


@dataclass(frozen=True, eq=False)
class EarlierPart:
    """Cells of a finished output, cut as the tasks that made them; read like `rvq.RvqFile`."""

    whole: Codes
    start: int
    n_cells: int

    def codes(self, rows: slice) -> np.ndarray:
        """Codes uint8 [n, M] of some of the cells."""
        first, last, _ = rows.indices(self.n_cells)
        return self.whole[self.start + first : self.start + last]

    def table(self) -> pa.Table:
        """Names and columns of the cells."""
        return self.whole.table.slice(self.start, self.n_cells)


class Earlier:
    """A finished output that is to be added to.

    Parameters
    ----------
    path
        The output: `.rvq`, `.zarr` or `.parquet`.

    Raises
    ------
    rvqa.errors.InputError
        It cannot be opened.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.codes = path, open_codes(path, verify=True)

    def joined(self, manifest: dict[str, Any]) -> dict[str, Any]:
        """Manifest of all cells, from that of the new ones.

        Raises
        ------
        rvqa.errors.InputError
            Another model, other settings, or a file whose cells are already there.
        """
        there = self.codes.manifest
        for key in ("levels", "entries", "model", "settings", "compute"):
            if there[key] != manifest[key]:
                seen = f"{shown(there[key])} there, {shown(manifest[key])} here"
                raise InputError(
                    f"{self.path} was made with another {key}: {seen}. Append with the same, or choose another output."
                )
        for new in manifest["inputs"]:
            if new in there["inputs"]:
                raise InputError(f"The cells of {new['name']} are already in {self.path}. Give files that are new.")
        return manifest | {
            "cells": there["cells"] + manifest["cells"],
            "inputs": there["inputs"] + manifest["inputs"],
        }

    def fingerprint(self) -> str:
        """What a stopped run compares: the output must not have changed since."""
        return hashlib.sha256(json.dumps(self.codes.manifest, sort_keys=True).encode()).hexdigest()

    def parts(self) -> Iterator[EarlierPart]:
        """Its cells, task by task."""
        step, first = self.codes.manifest["settings"]["cells"], 0
        for each in self.codes.manifest["inputs"]:
            for start in range(0, each["cells"], step):
                yield EarlierPart(self.codes, first + start, min(step, each["cells"] - start))
            first += each["cells"]
