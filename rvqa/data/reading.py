"""How counts are read: which layer of a file, which column of totals, and whether log1p values are turned back."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias, Union

from rvqa.errors import InputError, nearest

if TYPE_CHECKING:
    from anndata import AnnData

Given: TypeAlias = Union[str, Path, "AnnData"]
"""A file, or cells in memory."""

AUTO = "auto"
"""The layer that stands for X or, where X holds no raw counts, the place that does."""


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
        from rvqa.io.files import HDF5_SUFFIXES  # opens anndata, which counts and genes do without

        paths = [Path(each) for each in files if isinstance(each, str | Path)]
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
        place = os.path.realpath(given) if isinstance(given, str | Path) else ""
        return dict(self.by_file).get(place, self.default)


@dataclass(frozen=True)
class Reading:
    """How the counts of cells are read. The defaults are those of `rvqa.encode`.

    Attributes
    ----------
    layer
        None or "X" for `X`, a key of `adata.layers`, "raw" for `adata.raw.X` (unless a layer is itself called so), or
        "auto": `X`, or where that holds no raw counts the place that does. `Layers` gives each of several files its
        own; `of` picks it.
    library_size_key
        Column of `obs` with the total over all sequenced genes.
    recover
        Whether log1p-normalised values are turned back into counts where `rvqa.data.recovery` proves them. None where
        the caller has no such choice, so that no message offers it.
    """

    layer: str | Layers | None = None
    library_size_key: str | None = None
    recover: bool | None = False

    def of(self, given: Given) -> "Reading":
        """How one of several files is read."""
        return replace(self, layer=self.layer_of(given))

    def layer_of(self, given: Given) -> str | None:
        """The layer of one file."""
        return layer_of(self.layer, given)


def layer_of(layer: str | Layers | None, given: Given) -> str | None:
    """The layer of one file, of one for all or of `Layers`."""
    return layer.layer(given) if isinstance(layer, Layers) else layer
