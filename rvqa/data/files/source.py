"""The cells of one open file."""

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pandas as pd
from anndata import AnnData
from anndata.io import read_elem

from rvqa.data.counts import require_counted
from rvqa.data.files import matrices
from rvqa.data.files.frames import Frame
from rvqa.data.kinds import MatrixKind, inspect_matrix
from rvqa.errors import InputError, InputWarning, about
from rvqa.io.files import DIAGNOSED, UNREADABLE


@dataclass(frozen=True, eq=False)
class Source:
    """Cells of one file.

    Attributes
    ----------
    name
        For messages and the manifest.
    matrix
        Raw counts, cells by genes; features that are not genes are left out.
    var
        Table of the genes of the matrix.
    obs
        Table of the cells.
    identity
        What a resumed run compares: another file, or a changed one, differs in it.
    path
        Of the file, or None.
    place
        Where in the file the counts are: "X", "raw.X" or "layers['...']".
    left_out
        Number of features of each kind that are not genes.
    unfiltered
        Whether it looks like a matrix of all barcodes, most of them of no cell.
    places
        Matrices that there are by place, each as a function that opens it and the table of its features, those that are
        not genes among them.
    """

    name: str
    matrix: matrices.Matrix
    var: pd.DataFrame
    obs: Frame
    identity: dict[str, Any]
    path: Path | None
    place: str = "X"
    left_out: Mapping[str, int] = field(default_factory=dict)
    unfiltered: bool = False
    places: Mapping[str, Callable[[], tuple[matrices.Matrix, pd.DataFrame]]] = field(default_factory=dict)
    root: Any = None
    """Where in the open file the AnnData is, or None."""

    @property
    def n_cells(self) -> int:
        """Number of cells."""
        return self.matrix.shape[0]

    def column(self, key: str | None, start: int, stop: int) -> np.ndarray:
        """Values of a column of `obs`, or for None the names of the cells, from start to stop; see `Frame.column`."""
        return self.obs.index(start, stop) if key is None else self.obs.column(key, start, stop)

    @property
    def small(self) -> bool:
        """Whether the counts fit in memory several times over."""
        stored = getattr(self.matrix, "data", None)
        entries = self.matrix.shape[0] * self.matrix.shape[1] / 2 if stored is None else len(stored)
        return 8 * entries <= DIAGNOSED

    def in_memory(self, *, whole: bool = False) -> AnnData:
        """The cells as an AnnData: their counts where they are in the file, all columns of `obs` that can be read.

        `whole` adds all else that can be read.
        """
        obs, lost = self.obs.readable()
        if lost:
            warnings.warn(
                f"{self.name}: the columns {', '.join(lost)} of obs cannot be read and are left out.",
                InputWarning,
                stacklevel=3,
            )
        adata = anndata_of(obs=obs)
        read = {}
        for place in self.places if whole else (self.place,):
            try:
                matrix, var = self.places[place]()
                read[place] = (matrices.whole(matrix), var)
            except UNREADABLE:
                if place == self.place:
                    raise
        layers = {place[8:-2]: csr for place, (csr, _) in read.items() if place.startswith("layers")}
        var = next((var for place, (_, var) in read.items() if place != "raw.X"), None)
        x = read["X"][0] if "X" in read else None
        adata = anndata_of(X=x, obs=obs, var=var, layers=layers) if var is not None else adata
        if "raw.X" in read:
            csr, var = read["raw.X"]
            adata.raw = anndata_of(X=csr, obs=obs[[]], var=var)
        if whole and self.root is not None:
            add_rest(adata, self.root, PARTS)
        return adata

    def require_counts(self) -> None:
        """Look at the source as a whole, before any work: is there a cell, and are its integers counts.

        Raises
        ------
        rvqa.errors.InputError
            No cells, or integers that were certainly never counted.

        Warns
        -----
        rvqa.errors.InputWarning
            Integers that probably are not counts.
        """
        with about(self.name):
            if 0 in self.matrix.shape:
                cells, genes = self.matrix.shape
                raise InputError(
                    f"{self.place} has no {'genes' if cells else 'cells'} ({cells:,} cells x {genes:,} genes). Check "
                    "what filtered or sliced it."
                )
            sample = matrices.sample(self.matrix)
            if inspect_matrix(sample).kind is MatrixKind.COUNTS:
                require_counted(sample, self.place)


def anndata_of(**parts: Any) -> AnnData:
    """An AnnData, without its word on names that repeat."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".* names are not unique", UserWarning)
        warnings.filterwarnings("ignore", "Transforming to str index", UserWarning)
        return AnnData(**parts)


PARTS = ("obsm", "varm", "obsp", "varp", "uns")
"""Parts of an AnnData beside its matrices and tables."""


def add_rest(adata: AnnData, root: Any, parts: Sequence[str]) -> None:
    """Add what can be read of some parts of a file to an AnnData of its cells."""
    for part in parts:
        stored = root.get(part, {})
        for name in stored if not isinstance(stored, h5py.Dataset) else ():
            try:
                getattr(adata, part)[name] = read_elem(stored[name])
            except UNREADABLE:
                continue  # of no use to us; in a copy of the file it stays
