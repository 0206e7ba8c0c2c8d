"""Cells of files that need not fit in memory, as a fit of the tokenizer reads them: blocks of rows, once a pass.

What a file says of its cells is read whole; counts stay where they are, and are checked as they are read first.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import pandas as pd
import scipy.sparse as sp
from anndata import AnnData

from rvqa.data.alignment import match_columns
from rvqa.data.columns import as_text
from rvqa.data.counts import CellCounts, read_counts
from rvqa.data.depth import GeneShares
from rvqa.data.files.layers import Layers, layer_of
from rvqa.data.files.source import Source, anndata_of
from rvqa.data.files.sources import open_source, read_cells
from rvqa.data.genes import GeneAxis
from rvqa.data.kinds import canonical_csr
from rvqa.data.studies import CellTable, depth_column, table_columns
from rvqa.errors import InputError, about
from rvqa.io.files import warn_of_repeated
from rvqa.training.tokenizer.cells import in_blocks


@dataclass(frozen=True, eq=False)
class CellFile:
    """A file of raw counts, opened.

    Attributes
    ----------
    source
        Its rows of counts.
    obs
        Columns that tell depth; the index names the cells.
    cells
        Labels, donors, conditions and barcodes.
    layer
        Where its counts are, for messages.
    """

    source: Source
    obs: pd.DataFrame
    cells: CellTable
    layer: str | Layers | None = None

    @classmethod
    def open(
        cls,
        path: Path,
        *,
        scratch: Path,
        labels: str,
        donor: str,
        condition: str,
        layer: str | Layers | None = None,
        table: Mapping[str, str] | None = None,
    ) -> "CellFile":
        """Open an `.h5ad` file or `.zarr` store; its counts are not read.

        Parameters
        ----------
        path
            The file.
        scratch
            Folder for rows of a file that is stored by genes (CSC).
        labels, donor, condition, layer, table
            As for `rvqa.data.studies.read_study`.

        Raises
        ------
        rvqa.errors.InputError
            No such file, or not one of AnnData.
        """
        source = open_source(path, layer=layer, scratch=scratch)
        with about(path):
            obs = source.obs.table(table_columns(labels, donor, condition))
            columns = {"labels": labels, "donor": donor, "condition": condition}
            told = CellTable.of(anndata_of(obs=obs), path.stem, table=table, **columns)
        source.require_counts()
        warn_of_repeated(path, obs.index)
        key = depth_column(obs)
        return cls(source, obs[[] if key is None else [key]], told, layer)

    def take(self, rows_N: np.ndarray, control: Sequence[str]) -> "FileCells":
        """Cells of a mask; conditions that mean none are named by `control`."""
        controls = [as_text(each) for each in control]
        condition_N = np.where(np.isin(self.cells.condition_N, controls), "", self.cells.condition_N)
        return FileCells(self, np.flatnonzero(rows_N), self.cells.label_N[rows_N], condition_N[rows_N])


@dataclass(frozen=True, eq=False)
class FileCells:
    """Some cells of a file; see `rvqa.training.tokenizer.cells.Cells` for what all files have."""

    file: CellFile
    rows: np.ndarray
    """Rows of the file, ascending int64 [N]."""
    labels: np.ndarray
    conditions: np.ndarray
    depth: np.ndarray | None = None

    @property
    def name(self) -> str:
        """Of the file."""
        return self.file.cells.name

    @property
    def var(self) -> pd.DataFrame:
        """Table of the genes of the file."""
        return self.file.source.var

    @property
    def axis(self) -> GeneAxis:
        """Genes of the file."""
        with about(self.name):
            return GeneAxis.from_adata(AnnData(var=self.var))

    @property
    def given(self) -> bool:
        """Whether the file tells depth."""
        return len(self.file.obs.columns) > 0

    @property
    def library_size(self) -> np.ndarray:
        """Total counts, float64 [N]."""
        return self._totals[0] if self.depth is None else self.depth

    def gene_totals(self) -> np.ndarray:
        """Counts of every gene of the file over these cells, float64 [genes]."""
        return self._totals[1]

    def blocks(self) -> Iterator[sp.csr_matrix]:
        """Raw counts, `ROWS` cells at a time, in order."""
        return in_blocks(csr for _, csr in self._parts())

    def at_depth(self, shares: GeneShares) -> "FileCells":
        """The same with `library_size` over all genes, as a tokenizer reads it."""
        if self.given:
            return self
        known = match_columns(self.var, shares.axis)
        total_N = self.library_size
        if (known < 0).any():
            keep_G = (known >= 0).astype(np.float64)
            total_N = np.concatenate([np.asarray(block @ keep_G) for block in self.blocks()])
        with about(self.name):
            return replace(self, depth=shares.depth_of(total_N, known))

    @cached_property
    def _totals(self) -> tuple[np.ndarray, np.ndarray]:
        """Total counts of cells and of genes, from a first pass in which every value is checked."""
        library, total_G = [], np.zeros(len(self.var))
        for rows, counts in self._parts():
            checked = self._checked(rows, counts)
            library.append(checked.library_size)
            total_G += checked.counts.T @ np.ones(len(rows))
        return np.concatenate(library), total_G

    def _parts(self) -> Iterator[tuple[np.ndarray, sp.csr_matrix]]:
        """Rows of these cells in the file and their counts, as the file is read."""
        matrix = self.file.source.matrix
        with about(self.name):
            for start, stop in matrix.blocks(0, matrix.shape[0]):
                first, last = np.searchsorted(self.rows, [start, stop])
                if first == last:
                    continue
                rows = matrix.rows(start, stop)
                csr = sp.csr_matrix((rows.data, rows.indices, rows.indptr), shape=(stop - start, matrix.shape[1]))
                wanted = self.rows[first:last]
                yield wanted, canonical_csr(csr[wanted - start])

    def _checked(self, rows: np.ndarray, counts: sp.csr_matrix) -> CellCounts:
        key, path = depth_column(self.file.obs), self.file.source.path
        with about(self.file.source.name):
            try:
                block = anndata_of(X=counts, obs=self.file.obs.iloc[rows], var=self.var)
                return read_counts(block, library_size_key=key, recover=None, part=True)
            except InputError:
                if path is not None and self.file.source.small:  # having seen all of it, more can be said
                    layer = layer_of(self.file.layer, path)
                    whole = read_cells(path, layer=layer, whole=True)
                    read_counts(whole, layer=layer, library_size_key=key, recover=None)
                raise
