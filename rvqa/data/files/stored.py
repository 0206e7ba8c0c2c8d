"""Counts that stay in a file: read in blocks of rows, once a pass, and checked as they are read first."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import pandas as pd
import scipy.sparse as sp

from rvqa.data.cells import Cells
from rvqa.data.counts import read_counts
from rvqa.data.files.source import Source, anndata_of
from rvqa.data.files.sources import read_cells
from rvqa.data.kinds import canonical_csr
from rvqa.data.reading import Reading
from rvqa.errors import InputError, about


@dataclass(frozen=True, eq=False)
class Stored:
    """Rows of counts of an open file, as `rvqa.data.cells.Cells` holds them.

    Attributes
    ----------
    source
        The open file.
    obs
        Column of totals, where the file has one; the index names the cells.
    rows
        Rows of the file, ascending int64 [N].
    reading
        How the file was opened.
    """

    source: Source
    obs: pd.DataFrame
    rows: np.ndarray
    reading: Reading

    @property
    def shape(self) -> tuple[int, int]:
        """Cells and genes."""
        return len(self.rows), self.source.matrix.shape[1]

    def __getitem__(self, rows: np.ndarray) -> "Stored":
        """Some of the rows, by a mask or by ascending indices."""
        return replace(self, rows=self.rows[rows])

    def parts(self) -> Iterator[sp.csr_matrix]:
        """All rows in order, canonical CSR, in parts of any size."""
        return (counts for _, counts in self._parts())

    @cached_property
    def totals(self) -> tuple[np.ndarray, np.ndarray]:
        """Total counts of cells and of genes, from a first pass in which every value is checked."""
        library, total_G = [], np.zeros(self.shape[1])
        for rows, counts in self._parts():
            checked = self._checked(rows, counts)
            library.append(checked.library_size)
            total_G += checked.gene_totals()
        return np.concatenate(library), total_G

    def _parts(self) -> Iterator[tuple[np.ndarray, sp.csr_matrix]]:
        """Rows in the file and their counts, as the file is read."""
        matrix = self.source.matrix
        with about(self.source.name):
            for start, stop in matrix.blocks(0, matrix.shape[0]):
                first, last = np.searchsorted(self.rows, [start, stop])
                if first == last:
                    continue
                rows = matrix.rows(start, stop)
                csr = sp.csr_matrix((rows.data, rows.indices, rows.indptr), shape=(stop - start, matrix.shape[1]))
                wanted = self.rows[first:last]
                yield wanted, canonical_csr(csr[wanted - start])

    def _checked(self, rows: np.ndarray, counts: sp.csr_matrix) -> Cells:
        path = self.source.path
        with about(self.source.name):
            try:
                block = anndata_of(X=counts, obs=self.obs.iloc[rows], var=self.source.var)
                return read_counts(block, replace(self.reading, layer=None), part=True)
            except InputError:
                if path is not None and self.source.small:  # having seen all of it, more can be said
                    own = self.reading.of(path)
                    read_counts(read_cells(path, layer=own.layer_of(path), whole=True), own)
                raise
