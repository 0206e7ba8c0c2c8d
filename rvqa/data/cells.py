"""`Cells`: the type of a file's cells. Every reader returns it, every part of rvqa that needs counts takes it.

Readers: `rvqa.data.counts.read_counts` (an AnnData), `rvqa.data.studies.read_study` and `open_study` (a file, read or
left on disk, with labels and donors), `rvqa.training.references.read_reference` (checked for a fit).

N cells, G genes of an axis.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pandas as pd
import scipy.sparse as sp

from rvqa.data.alignment import GeneAlignment, align, map_columns, match_columns
from rvqa.data.columns import as_text
from rvqa.data.depth import GeneShares, log1p_normalise
from rvqa.data.genes import GeneAxis
from rvqa.errors import about

ROWS = 4096
"""Cells of a block. What a fit learns from all cells it adds up over blocks, wherever the cells are."""

COLUMNS = ("label_N", "truth_N", "donor_N", "condition_N", "cell_N")
"""What a file says of its cells beside their counts."""


@dataclass(frozen=True, eq=False)
class Cells:
    """Cells of one file: raw counts, what they are counts of and out of how many, and what the file says of each cell.

    Attributes
    ----------
    counts
        `scipy.sparse.csr_matrix` [N, genes of the file], canonical, floats as float32 (exact); features that are not
        genes are left out. It may share memory with what it was read from: do not write into it. Where counts stay on
        disk, `rvqa.data.files.stored.Stored`.
    var
        Table of their genes: of `adata.var`, or of `adata.raw.var` for layer="raw".
    total_N
        Total counts, float64 [N]. None until stored counts are read; `library_size` reads them.
    given
        Whether the file says the totals, in a column or by what its values were normalised with; else they are sums of
        the stored counts, of which a file cut to a panel has lost most (`rvqa.data.depth`).
    label_N
        Cell type, object [N]; "" where unlabelled.
    truth_N
        The same, "" also where the label was made by a model: what predictions are compared with.
    donor_N
        Donor, object [N]; "" where unknown.
    condition_N
        Condition, object [N]; "" where the file has no such column and, once control cells are named, for these; None
        where the file has the column but does not say.
    cell_N
        Barcode, object [N].
    name
        Of the file, for messages.
    place
        Where the counts were: "X", "raw.X" or "layers['...']".
    left_out
        Number of features of each kind that are not genes.
    ontology_ids
        Cell Ontology id of a label, where the file gives one.
    """

    counts: Any
    var: pd.DataFrame
    total_N: np.ndarray | None
    given: bool
    label_N: np.ndarray
    truth_N: np.ndarray
    donor_N: np.ndarray
    condition_N: np.ndarray
    cell_N: np.ndarray
    name: str = ""
    place: str = "X"
    left_out: Mapping[str, int] = field(default_factory=dict)
    ontology_ids: Mapping[str, str] = field(default_factory=dict)

    def __len__(self) -> int:
        return self.counts.shape[0]

    @property
    def library_size(self) -> np.ndarray:
        """Total counts, float64 [N]."""
        return self.counts.totals[0] if self.total_N is None else self.total_N

    @property
    def axis(self) -> GeneAxis:
        """Genes of the file."""
        from anndata import AnnData

        with about(self.name):
            return GeneAxis.from_adata(AnnData(var=self.var))

    def alignment(self, axis: GeneAxis) -> GeneAlignment:
        """How the genes of the file meet an axis."""
        with about(self.name):
            return align(self.var, axis, left_out=self.left_out)

    def depth(self, shares: GeneShares) -> np.ndarray:
        """Counts of every cell over all genes, float64 [N]: as given, else those of known genes over their share.

        Raises
        ------
        rvqa.errors.InputError
            Cells without a count in any known gene.
        """
        if self.given:
            return self.library_size
        known = match_columns(self.var, shares.axis)
        total_N = self.library_size
        if (known < 0).any():
            keep_G = (known >= 0).astype(np.float64)
            total_N = np.concatenate([np.asarray(block @ keep_G) for block in self.blocks()])
        return shares.depth_of(total_N, known)

    def at_depth(self, shares: GeneShares) -> "Cells":
        """The same with `library_size` over all genes, as a tokenizer reads it."""
        with about(self.name):
            return replace(self, total_N=self.depth(shares))

    def log1p(self, axis: GeneAxis) -> sp.csr_matrix:
        """log1p of counts per 10,000 on an axis, float32 CSR [N, G]; not of stored counts."""
        return log1p_normalise(map_columns(self.counts, self.alignment(axis)), self.library_size)

    def take(self, rows: np.ndarray) -> "Cells":
        """Some of the cells: a mask or, ascending where counts are stored, indices."""
        counts = self.counts[rows]
        columns = {name: getattr(self, name)[rows] for name in COLUMNS}
        return replace(
            self,
            counts=counts.tocsr() if sp.issparse(counts) else counts,
            total_N=None if self.total_N is None else self.total_N[rows],
            **columns,
        )

    def cut(self, columns: np.ndarray) -> "Cells":
        """Some of the genes, by index; library sizes stay those of all genes. Not of stored counts."""
        return replace(self, counts=self.counts[:, columns].tocsr(), var=self.var.iloc[columns])

    def with_control(self, names: Sequence[str]) -> "Cells":
        """The same, with "" for the conditions that mean none."""
        control = [as_text(name) for name in names]
        return replace(self, condition_N=np.where(np.isin(self.condition_N, control), "", self.condition_N))

    def gene_totals(self) -> np.ndarray:
        """Counts of every gene of the file over these cells, float64 [genes]."""
        return self.counts.T @ np.ones(len(self)) if sp.issparse(self.counts) else self.counts.totals[1]

    def blocks(self) -> Iterator[sp.csr_matrix]:
        """Raw counts, canonical CSR, `ROWS` cells at a time, in order."""
        return in_blocks([self.counts] if sp.issparse(self.counts) else self.counts.parts())

    def on_axis(self, axis: GeneAxis) -> Iterator[tuple[slice, sp.csr_matrix]]:
        """Blocks of counts on an axis, float32 CSR [B, G], with their rows.

        Raises
        ------
        rvqa.errors.InputError
            Too few genes of the axis.
        """
        start = 0
        with about(self.name):
            alignment = align(self.var, axis)
            for block in self.blocks():
                yield slice(start, start + block.shape[0]), map_columns(block, alignment)
                start += block.shape[0]


def unknown(n: int) -> dict[str, Any]:
    """`COLUMNS` of `n` cells of which nothing is known."""
    return {name: np.full(n, "", dtype=object) for name in COLUMNS}


def in_blocks(parts: Iterable[sp.csr_matrix]) -> Iterator[sp.csr_matrix]:
    """Consecutive rows, cut or joined to `ROWS` at a time."""
    waiting: list[sp.csr_matrix] = []
    n = 0
    for part in parts:
        first = 0
        while n + part.shape[0] - first >= ROWS:
            last = first + ROWS - n
            yield sp.vstack([*waiting, part[first:last]], format="csr")
            waiting, n, first = [], 0, last
        waiting.append(part[first:])
        n += part.shape[0] - first
    if n:
        yield sp.vstack(waiting, format="csr")
