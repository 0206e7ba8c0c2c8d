"""Columns of `adata.obs` and choices by name, with errors that offer what is there."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any

import numpy as np

from rvqa.errors import InputError

if TYPE_CHECKING:
    from anndata import AnnData

_MOST_COUNTS = 2.0**53
"""Up to here float64, and with it the kernels, know every whole number."""

UNLABELLED = frozenset({"", "nan", "NaN", "None", "NA", "<NA>", "unlabeled", "unlabelled"})
"""Values that mean "no label"; "Unknown" is not among them, some studies use it as a class."""


def nearest(name: str, known: Iterable[str]) -> str:
    """Sentence that offers what is known, the names most like the given one first."""
    names = list(dict.fromkeys(str(each) for each in known))
    if not names:
        return "There are none."
    close = get_close_matches(str(name), names, n=3, cutoff=0.5)
    shown = close or sorted(names)[:10]
    more = f" and {len(names) - len(shown)} more" if len(names) > len(shown) else ""
    return f"{'Nearest' if close else 'Known'}: {', '.join(repr(each) for each in shown)}{more}."


def require_known(kind: str, names: Iterable[str], known: Iterable[str]) -> None:
    """Refuse names that are not known, offering the nearest.

    Raises
    ------
    InputError
        Names the first unknown one.
    """
    known = list(known)
    for name in sorted(set(names) - set(known), key=str):
        raise InputError(f"{name!r} is no {kind}. {nearest(name, known)}")


def column(adata: AnnData, key: str) -> np.ndarray:
    """Column of `adata.obs` as an object array of strings [N].

    Raises
    ------
    InputError
        No such column, or several.
    """
    if key not in adata.obs:
        raise InputError(f"adata.obs has no column {key!r}. {nearest(key, adata.obs.columns)}")
    if adata.obs[key].ndim > 1:
        raise InputError(f"adata.obs has several columns {key!r}: rename or drop all but one.")
    return adata.obs[key].astype(str).to_numpy(dtype=object)


def labels_of(adata: AnnData, key: str) -> np.ndarray:
    """Labels of cells, object [N]; "" for missing ones."""
    values = column(adata, key)
    return np.where(np.isin(values, list(UNLABELLED)), "", values)


def total_counts(adata: AnnData, key: str, stored: np.ndarray) -> np.ndarray:
    """Column of `adata.obs` as total counts, float64 [N], in memory of its own.

    Parameters
    ----------
    adata
        Where `obs` and the names of cells are read.
    key
        Name of the column.
    stored
        Sum of the stored counts of every cell, [N]: a total is no less.

    Raises
    ------
    InputError
        No such column, or several; totals that are not finite numbers > 0, below the counts that are stored, or larger
        than any.
    """
    values = adata.obs.get(key)
    if values is None or values.ndim > 1 or values.dtype.kind not in "iuf":
        seen = "does not exist"
        if values is not None:
            seen = f"holds {values.dtype}, not numbers" if values.ndim == 1 else "is the name of several columns"
        raise InputError(f"obs[{key!r}] {seen}: name a column of total counts. {nearest(key, adata.obs.columns)}")
    total = np.array(values.to_numpy(dtype=np.float64, na_value=np.nan))
    advice = "Pass total counts over all sequenced genes, not a logarithm, a size factor or a number of genes."
    if (bad := np.flatnonzero(~(np.isfinite(total) & (total > 0)))).size:
        where = f"{bad.size:,} of {total.size:,} cells ({cell_names(adata, bad)})"
        raise InputError(f"obs[{key!r}] is not finite and positive in {where}. {advice}")
    if (bad := np.flatnonzero(total > _MOST_COUNTS)).size:
        where = f"{total.max():.3g} in {bad.size:,} of {total.size:,} cells ({cell_names(adata, bad)})"
        raise InputError(f"obs[{key!r}] is up to {where}, more than counts can add up to. {advice}")
    if (bad := np.flatnonzero(total < stored * (1 - 1e-6))).size:
        raise InputError(
            f"obs[{key!r}] is below the sum of the stored counts in {bad.size:,} of {total.size:,} cells "
            f"({cell_names(adata, bad)}; {total[bad[0]]:g} against {stored[bad[0]]:g} in the first). {advice}"
        )
    return total


def cell_names(adata: AnnData, cells: np.ndarray) -> str:
    """Names of the first three of some cells, given by index."""
    return ("first: " if cells.size > 3 else "") + quoted(adata.obs_names[cells[:3]])


def quoted(names: Iterable[Any]) -> str:
    """List of names in quotes, at most 20."""
    each = [repr(str(name)) for name in names]
    return ", ".join(each[:20]) + ", ..." * (len(each) > 20)
