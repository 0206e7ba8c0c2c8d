"""Cells on which other libraries' metrics were computed."""

from collections.abc import Callable

import numpy as np
import pytest


@pytest.fixture(scope="session")
def kang(read: Callable) -> Callable:
    """`kang(cell_type, condition)`: log1p of counts per 10,000 of every 30th gene of Kang 2018, float64 [N, 301]."""
    adata = read("kang2018_ifnb_pbmc_2k")
    counts = adata.X.toarray().astype(np.float64)
    cells = np.log1p(counts / counts.sum(1, keepdims=True) * 1e4)[:, ::30]
    types, conditions = (adata.obs[key].to_numpy(str) for key in ("cell_type", "condition"))
    return lambda cell_type, condition: cells[(types == cell_type) & (conditions == condition)]
