"""Which files were given, and where the counts of each are."""

import glob
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from anndata import AnnData

from rvqa.data.counts import AUTO
from rvqa.errors import InputError, nearest
from rvqa.io.files import HDF5_SUFFIXES

Given: TypeAlias = str | Path | AnnData


@dataclass(frozen=True)
class Layers:
    """Where the counts of each of several files are.

    Attributes
    ----------
    default
        As `layer` of `rvqa.encode`.
    by_file
        Path of a file, and its own.
    """

    default: str | None = None
    by_file: tuple[tuple[str, str], ...] = ()

    @classmethod
    def of(cls, given: Sequence[str], files: Sequence[Given]) -> "Layers":
        """Read the words of an option: NAME for all files, NAME=FILE for one; none of them is "auto".

        Raises
        ------
        rvqa.errors.InputError
            Two names for all files, or for one.
        """
        paths = [Path(each) for each in files if not isinstance(each, AnnData)]
        default: list[str] = []
        by_file: dict[str, str] = {}
        for word in given:
            name, sign, file = word.partition("=")
            meant = [path for path in paths if os.path.realpath(path) == os.path.realpath(file)]
            meant = meant or [path for path in paths if path.name == file]
            if sign and len(meant) == 1:
                place = os.path.realpath(meant[0])
                if by_file.setdefault(place, name) != name:
                    raise InputError(f"Two layers are named for {file}: {by_file[place]!r} and {name!r}. Name one.")
            elif sign and (len(meant) > 1 or Path(file).suffix in (*HDF5_SUFFIXES, ".zarr", ".mtx")):
                which = "several of the files" if meant else "none of the files"
                raise InputError(f"--layer {word}: {file} is {which}. {nearest(file, map(str, paths))}")
            elif word not in default:
                default.append(word)
        if len(default) > 1:
            raise InputError(
                f"Two layers are named for all files: {default[0]!r} and {default[1]!r}. Name one, or NAME=FILE for "
                f"that of one file, of {', '.join(map(str, paths))}."
            )
        return cls(default[0] if default else AUTO, tuple(sorted(by_file.items())))

    def layer(self, given: Given) -> str | None:
        """The layer of one file."""
        place = "" if isinstance(given, AnnData) else os.path.realpath(given)
        return dict(self.by_file).get(place, self.default)


def layer_of(layer: str | Layers | None, given: Given) -> str | None:
    """The layer of one file, of one for all or of `Layers`."""
    return layer.layer(given) if isinstance(layer, Layers) else layer


def expand(given: Given | Sequence[Given]) -> list[Given]:
    """Files of a path, a pattern with `*`, or a list of these; an AnnData stays as it is.

    Raises
    ------
    rvqa.errors.InputError
        A pattern that no file matches, or the same file twice.
    """
    files: list[Given] = []
    for each in given if isinstance(given, list | tuple) else [given]:
        if isinstance(each, AnnData):
            files.append(each)
            continue
        text = str(each)
        found = sorted(glob.glob(text)) if glob.has_magic(text) and not Path(text).exists() else [text]
        if not found:
            raise InputError(f"No file matches {text!r}. Check the pattern.")
        files += [Path(name) for name in found]
    paths = [os.path.realpath(path) for path in files if isinstance(path, Path)]
    if repeated := [path for at, path in enumerate(paths) if path in paths[:at]]:
        raise InputError(f"{repeated[0]} is given twice. Give each file once.")
    if not files:
        raise InputError("No file was given. Give one or more .h5ad files or .zarr stores.")
    return files
