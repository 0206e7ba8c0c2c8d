"""Expression on the genes that files share: what baselines are fitted on and profiles are measured on."""

import numpy as np
import scipy.sparse as sp
from anndata import AnnData

from rvqa.data.alignment import align
from rvqa.data.counts import read_counts
from rvqa.data.depth import GeneShares
from rvqa.data.genes import GeneAxis
from rvqa.data.reading import Reading


def log1p_on_axis(
    adata: AnnData, axis: GeneAxis, reading: Reading | None = None, *, shares: GeneShares | None = None
) -> sp.csr_matrix:
    """log1p of counts per 10,000 on an axis, float32 CSR [N, G]; read as `read_counts` does.

    Normalised by stored or given totals, or with `shares` by depth as a tokenizer reads it.
    """
    cells = read_counts(adata, reading)
    return (cells if shares is None else cells.at_depth(shares)).log1p(axis)


def shared_log1p(
    references: list[AnnData], test: AnnData, library_size_key: str | None
) -> tuple[sp.csr_matrix, sp.csr_matrix]:
    """log1p of counts per 10,000 over the genes that all references and the test file measure."""
    axis = GeneAxis.from_adata(test)
    for reference in references:
        axis = axis.subset(np.flatnonzero(align(reference, axis).measured))
    blocks = [log1p_on_axis(adata, axis, Reading(library_size_key=library_size_key)) for adata in [*references, test]]
    return sp.vstack(blocks[:-1], format="csr"), blocks[-1]
