"""Expression on the genes that files share: what baselines are fitted on and profiles are measured on."""

from typing import Any

import numpy as np
import scipy.sparse as sp
from anndata import AnnData

from rvqa.counts import counts_var_and_depth, log1p_normalise
from rvqa.genes import GeneAxis, align, map_columns


def log1p_on_axis(adata: AnnData, axis: GeneAxis, **reading: Any) -> sp.csr_matrix:
    """log1p of counts per 10,000 on an axis, float32 CSR [N, G]; `reading` as for `counts_var_and_depth`."""
    counts, var, depth = counts_var_and_depth(adata, **reading)
    return log1p_normalise(map_columns(counts, align(var, axis)), depth)


def shared_log1p(
    references: list[AnnData], test: AnnData, library_size_key: str | None
) -> tuple[sp.csr_matrix, sp.csr_matrix]:
    """log1p of counts per 10,000 over the genes that all references and the test file measure."""
    axis = GeneAxis.from_adata(test)
    for reference in references:
        axis = axis.subset(np.flatnonzero(align(reference, axis).measured))
    blocks = [log1p_on_axis(adata, axis, library_size_key=library_size_key) for adata in [*references, test]]
    return sp.vstack(blocks[:-1], format="csr"), blocks[-1]
