"""Splits of cells: by donor, never by cell alone where donors are known."""

from collections.abc import Sequence

import numpy as np
from anndata import AnnData

from rvqa.obs import labels_of, require_known


def by_donor(adata: AnnData, key: str, held_out: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Rows of training and of held-out cells, two masks bool [N]; a cell without a donor is in neither.

    Parameters
    ----------
    adata
        With donors in `obs[key]`.
    key
        Column of `obs`.
    held_out
        Donors whose cells enter no fit.

    Raises
    ------
    rvqa.errors.InputError
        No such column, or no cell of a held-out donor.
    """
    donors = labels_of(adata, key)
    require_known("donor", held_out, donors)
    outside = np.isin(donors, list(held_out))
    return (donors != "") & ~outside, outside
