"""Expression on the genes that files share: what baselines are fitted on and profiles are measured on."""

from typing import Any

import numpy as np
import scipy.sparse as sp
from anndata import AnnData

from rvqa.data.alignment import align, map_columns
from rvqa.data.counts import read_counts
from rvqa.data.depth import GeneShares, log1p_normalise
from rvqa.data.genes import GeneAxis


def log1p_on_axis(adata: AnnData, axis: GeneAxis, *, shares: GeneShares | None = None, **reading: Any) -> sp.csr_matrix:
    """log1p of counts per 10,000 on an axis, float32 CSR [N, G]; `reading` as for `read_counts`.

    Normalised by stored or given totals, or with `shares` by depth as a tokenizer reads it.
    """
    cells = read_counts(adata, **reading)
    depth_N = cells.library_size if shares is None else shares.depth(cells)
    return log1p_normalise(map_columns(cells.counts, align(cells.var, axis)), depth_N)


def shared_log1p(
    references: list[AnnData], test: AnnData, library_size_key: str | None
) -> tuple[sp.csr_matrix, sp.csr_matrix]:
    """log1p of counts per 10,000 over the genes that all references and the test file measure."""
    axis = GeneAxis.from_adata(test)
    for reference in references:
        axis = axis.subset(np.flatnonzero(align(reference, axis).measured))
    blocks = [log1p_on_axis(adata, axis, library_size_key=library_size_key) for adata in [*references, test]]
    return sp.vstack(blocks[:-1], format="csr"), blocks[-1]
