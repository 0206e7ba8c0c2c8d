"""Depth: how many counts a cell has over all genes, also where a file holds only some of them.

Expression is a gene's share of all counts of a cell. A file that was cut to a panel, say its 4,000 most variable genes,
has lost most of the counts; normalised by what is left, every gene would look several times too high, in every cell,
and the cells would be told by their panel. What is left is therefore divided by the share of all counts that the genes
of the panel take in the cells a tokenizer was fitted on. Of a file with all genes that share is 1.

Shapes: F files, G genes known to the fit, whether on the tokenizer's axis or not.
"""

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import pandas as pd
import scipy.sparse as sp

from rvqa.data.genes import GeneAxis, match_columns
from rvqa.errors import InputError, quoted

_ROUNDS = 1000


class Cells(Protocol):
    """Cells of one file: `rvqa.data.counts.CellCounts`, and what training and evaluation make of it."""

    @property
    def counts(self) -> sp.csr_matrix:
        """Raw counts, [N, genes of the file]."""

    @property
    def var(self) -> pd.DataFrame:
        """Table of the genes of the file."""

    @property
    def library_size(self) -> np.ndarray:
        """Total counts, float64 [N]."""

    @property
    def given(self) -> bool:
        """Whether the file says the total over all genes; else it is the sum of the stored counts."""


@dataclass(frozen=True, eq=False)
class GeneShares:
    """Share of all counts that each gene takes.

    Attributes
    ----------
    axis
        All genes that a fit knows.
    share_G
        float64 [G], > 0; sums to 1.
    """

    axis: GeneAxis
    share_G: np.ndarray

    def depth(self, cells: Cells) -> np.ndarray:
        """Counts of every cell over all genes, float64 [N]: as given, else those of known genes over their share.

        Raises
        ------
        InputError
            Cells without a count in any known gene.
        """
        if cells.given:
            return cells.library_size
        known = match_columns(cells.var, self.axis)
        return self.depth_of(np.asarray(cells.counts @ (known >= 0).astype(np.float64)), known)

    def depth_of(self, total_N: np.ndarray, known: np.ndarray) -> np.ndarray:
        """`depth` from the counts of the known genes; `known` is what `match_columns` says of the file's table."""
        if (without := np.flatnonzero(total_N == 0)).size:
            raise InputError(
                f"{without.size:,} of {len(total_N):,} cells have no counts in any of the file's "
                f"{np.count_nonzero(known >= 0):,} genes that the model knows (rows {quoted(without[:3].tolist())}). "
                "Remove these cells first."
            )
        return total_N / self.panel(known)

    def panel(self, column_map: np.ndarray) -> float:
        """Share of all counts that the genes of a panel take, from `match_columns` of its table."""
        return float(self.share_G[np.unique(column_map[column_map >= 0])].sum() / self.share_G.sum())

    @classmethod
    def estimate(
        cls, axis: GeneAxis, totals_FG: np.ndarray, measured_FG: np.ndarray, depth_F: np.ndarray
    ) -> "GeneShares":
        """Shares from files that measured different genes.

        The counts of a gene are compared with the depth of the files that measured it, and the depth of a file is what
        it has over the share of its genes, in turn, until both agree.

        Parameters
        ----------
        axis
            All genes of the files.
        totals_FG
            Counts of each gene over the cells of a file, 0 where unmeasured.
        measured_FG
            bool.
        depth_F
            Counts of a file over all genes where the file says so, else NaN.
        """
        given = np.isfinite(depth_F)
        stored_F = totals_FG.sum(1)
        total_G = totals_FG.sum(0) + 0.5
        depth = np.where(given, depth_F, stored_F)
        share_G = np.zeros(len(axis))
        for _ in range(_ROUNDS):
            before = share_G
            share_G = total_G / (depth @ measured_FG)
            share_G /= share_G.sum()
            if np.abs(share_G - before).max() < 1e-12:
                break
            depth = np.where(given, depth_F, stored_F / (measured_FG @ share_G))
        return cls(axis, share_G)
