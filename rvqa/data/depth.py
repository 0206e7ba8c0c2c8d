"""Depth: how many counts a cell has over all genes, also where a file holds only some of them.

Expression is a gene's share of all counts of a cell. A file that was cut to a panel, say its 4,000 most variable genes,
has lost most of the counts; normalised by what is left, every gene would look several times too high, in every cell,
and the cells would be told by their panel. What is left is therefore divided by the share of all counts that the genes
of the panel take in the cells a tokenizer was fitted on. Of a file with all genes that share is 1.

Shapes: F files, G genes known to the fit, whether on the tokenizer's axis or not.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import scipy.sparse as sp

from rvqa.data.columns import cell_names, total_counts
from rvqa.data.genes import GeneAxis
from rvqa.errors import InputError, quoted

if TYPE_CHECKING:
    from anndata import AnnData


_ROUNDS = 1000


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

    def depth_of(self, total_N: np.ndarray, known: np.ndarray) -> np.ndarray:
        """Counts over all genes, float64 [N], from those of the genes that the fit knows.

        Parameters
        ----------
        total_N
            Counts of every cell in known genes.
        known
            What `match_columns` says of the file's table.

        Raises
        ------
        InputError
            Cells without a count in any known gene.
        """
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
    ) -> GeneShares:
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


TARGET_SUM = 1e4  # expression is log1p of counts per 10,000, everywhere
_LOG_ROWS = 1024


def empty_cells(counts: sp.csr_matrix) -> np.ndarray:
    """Return the indices, int64 [n_empty], of the cells of a canonical count matrix that have no counts at all."""
    return np.flatnonzero(np.diff(counts.indptr) == 0)


def library_size(adata: AnnData, counts: sp.csr_matrix, *, key: str | None = None) -> np.ndarray:
    """Return the total counts of each cell: the depth that normalisation divides by.

    Parameters
    ----------
    adata
        Where `obs` and the names of cells are read.
    counts
        From `rvqa.data.counts.read_counts`, over all stored genes: mapping onto a model's axis comes later and leaves
        depth alone.
    key
        Column of `adata.obs` with the total over all sequenced genes, for files that were cut to some genes.

    Returns
    -------
    numpy.ndarray, float64 [n_cells]
        In counts, > 0.

    Raises
    ------
    InputError
        Cells without counts (also with `key`: where nothing was seen a code would say nothing), an unknown column, or
        totals that are not finite numbers > 0, or are below the counts that are stored.
    """
    n_cells = counts.shape[0]
    if adata.n_obs != n_cells:
        seen = f"The counts have {n_cells:,} cells, the AnnData {adata.n_obs:,}"
        raise InputError(f"{seen}: pass the counts of this AnnData.")
    if (empty := empty_cells(counts)).size:
        raise InputError(
            f"{empty.size:,} of {n_cells:,} cells have no counts in any stored gene ({cell_names(adata, empty)}). "
            "Remove them first: sc.pp.filter_cells(adata, min_counts=1)."
        )
    # A float64 vector makes scipy accumulate in float64: exact for counts.
    stored = np.asarray(counts @ np.ones(counts.shape[1], dtype=np.float64))
    return stored if key is None else total_counts(adata, key, stored)


def log1p_normalise(
    counts: sp.csr_matrix, library_size: np.ndarray, *, target_sum: float = TARGET_SUM
) -> sp.csr_matrix:
    """Logarithm of counts per `target_sum`: ln(1 + count / library_size * target_sum).

    Parameters
    ----------
    counts
        [n_cells, n_genes], any dtype, not changed; genes may already be mapped onto an axis.
    library_size
        [n_cells] from the function of that name; finite and > 0 wherever a cell has counts, else an `InputError`.
    target_sum
        Total that every cell is scaled to before the logarithm.

    Returns
    -------
    scipy.sparse.csr_matrix, float32 [n_cells, n_genes]
        Computed in float64 and rounded once; the sparsity pattern of `counts`, in memory of its own.
    """
    depth, stored = np.asarray(library_size, dtype=np.float64), np.diff(counts.indptr)
    if depth.shape != stored.shape:
        raise InputError(f"Expected one library size for each of {stored.size:,} cells, got shape {depth.shape}.")
    usable = np.isfinite(depth) & (depth > 0)
    if n_bad := np.count_nonzero(~usable & (stored > 0)):
        raise InputError(f"{n_bad:,} cells with counts have a library size that is not finite and positive.")
    scale = np.divide(target_sum, depth, out=np.zeros_like(depth), where=usable)
    values = np.empty(counts.nnz, dtype=np.float32)
    for start in range(0, stored.size, _LOG_ROWS):
        rows = slice(start, min(start + _LOG_ROWS, stored.size))
        span = slice(counts.indptr[rows.start], counts.indptr[rows.stop])
        values[span] = np.log1p(counts.data[span] * np.repeat(scale[rows], stored[rows]))
    return sp.csr_matrix((values, counts.indices[: counts.nnz].copy(), counts.indptr.copy()), shape=counts.shape)
