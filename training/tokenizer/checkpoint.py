"""Checkpoints of a tokenizer fit: a folder holds its state, and a check makes sure that the same fit continues.

`checkpoint.json` says what is fitted, how far the fit is and which file has the tensors. It is renamed into place last.
So it never points to half a file, even if the process is killed.
"""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors.torch import save_file
from torch import Tensor

from rvqa.data.cells import Cells
from rvqa.data.genes import GeneAxis
from rvqa.errors import InputError
from rvqa.io.files import require_folder, whole_file, writing
from rvqa.io.json_text import differences
from rvqa.io.tensors import read_json, read_tensors
from rvqa.training.tokenizer.settings import TokenizerSettings

FORMAT_VERSION = 1
_INDEX = "checkpoint.json"
_MARK = {"made_by": "rvqa checkpoint"}
"""Metadata that marks a tensor file as part of a checkpoint."""


class State(NamedTuple):
    """Everything a run needs to continue."""

    values: dict[str, Any]
    """Values that JSON can hold."""
    tensors: dict[str, Tensor]
    """Tensors on the CPU."""


def identity(
    references: Sequence[Cells],
    validation: Sequence[Cells],
    axis: GeneAxis,
    settings: TokenizerSettings,
    **more: object,
) -> dict[str, Any]:
    """Return what must stay the same for a fit to continue: settings, cells by file, genes, and `more`."""
    told = asdict(settings)
    del told["checkpoint_steps"]
    return {
        "settings": told,
        "references": [_fingerprint(each) for each in references],
        "validation": [_fingerprint(each) for each in validation],
        "axis": _hash([*axis.symbols, *axis.ensembl_ids]),
        **more,
    }


def _fingerprint(reference: Cells) -> dict[str, Any]:
    return {
        "name": reference.name,
        "cells": len(reference),
        "genes": len(reference.var),
        "counts": float(np.sum(reference.library_size)),
        "labels": _hash(reference.label_N),
    }


def _hash(texts: Sequence[str] | np.ndarray) -> str:
    return hashlib.sha256("\0".join(map(str, texts)).encode()).hexdigest()[:16]


class CheckpointFolder:
    """The folder of one fit's latest state.

    Parameters
    ----------
    path
        Folder; it is made if it does not exist.
    same
        Result of `identity`: what must stay the same for the fit to continue.

    Raises
    ------
    rvqa.errors.InputError
        The path is a file, holds foreign files, or cannot be written.
    """

    def __init__(self, path: Path, same: Mapping[str, Any]) -> None:
        self.path, self.same = path, json.loads(json.dumps(same))
        if path.exists() and not path.is_dir():
            raise InputError(f"The checkpoint {path} is a file. Give the path of a folder.")
        with writing(path):
            self._made = [each for each in (path, *path.parents) if not each.exists()]
            path.mkdir(parents=True, exist_ok=True)
        require_folder(path)
        if foreign := [each.name for each in self._tensors() if not _is_ours(each)]:
            raise InputError(f"The checkpoint {path} holds {foreign[0]}, which no fit wrote. Give another folder.")

    def read(self) -> State | None:
        """Return the state to continue from, or None if the folder has none.

        Raises
        ------
        rvqa.errors.InputError
            The checkpoint is of another fit, or damaged.
        """
        if not (self.path / _INDEX).exists():
            return None
        index = read_json(self.path / _INDEX, {"format_version": int, "same": dict, "values": dict, "tensors": str})
        differing = differences(index["same"], self.same)
        if index["format_version"] != FORMAT_VERSION:
            differing = [f"format version {index['format_version']} there, {FORMAT_VERSION} here"]
        if differing:
            raise InputError(
                f"{self.path} has the checkpoint of another fit: {'; '.join(differing[:5])}. Remove that folder, or "
                "give another one."
            )
        return State(index["values"], read_tensors(self.path / Path(index["tensors"]).name))

    def write(self, state: State) -> None:
        """Replace the state in the folder; if this fails, the old state stays.

        Raises
        ------
        rvqa.errors.InputError
            There is no permission or no space to write.
        """
        name = f"step-{state.values['step']}.safetensors"
        index = {"format_version": FORMAT_VERSION, "same": self.same, "values": state.values, "tensors": name}
        try:
            with whole_file(self.path / name, output=False) as scratch:
                save_file({key: tensor.contiguous() for key, tensor in state.tensors.items()}, scratch, _MARK)
                _to_disk(scratch)
            with whole_file(self.path / _INDEX, output=False) as scratch:
                scratch.write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")
                _to_disk(scratch)
        finally:
            self._clear()

    def _clear(self) -> None:
        """Remove tensors that the index does not name, and folders made for a checkpoint that could not be written."""
        for old in self._tensors():
            if _is_ours(old):
                old.unlink()
        for folder in [] if (self.path / _INDEX).exists() else self._made:
            if not any(folder.iterdir()):
                folder.rmdir()

    def _tensors(self) -> list[Path]:
        """Files of tensors that the index does not name."""
        named = read_json(self.path / _INDEX).get("tensors") if (self.path / _INDEX).exists() else None
        return [path for path in sorted(self.path.glob("step-*.safetensors")) if path.name != named]


def _is_ours(path: Path) -> bool:
    """Whether a file has the tensors of a checkpoint."""
    with path.open("rb") as file:
        return json.dumps(_MARK, separators=(",", ":")).encode() in file.read(4096)


def _to_disk(path: Path) -> None:
    """Flush the bytes of a file to the disk, so that it can be renamed safely."""
    with path.open("rb+") as file:
        os.fsync(file.fileno())
