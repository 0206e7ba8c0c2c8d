"""Columns of `adata.obs` and choices by name, with errors that offer what is there."""

from collections.abc import Iterable
from difflib import get_close_matches

import numpy as np
from anndata import AnnData

from rvqa.errors import InputError

UNLABELLED = frozenset({"", "nan", "NaN", "None", "NA", "<NA>", "unlabeled", "unlabelled"})
"""Values that mean "no label"; "Unknown" is not among them, some studies use it as a class."""


def nearest(name: str, known: Iterable[str]) -> str:
    """Sentence that offers what is known, the names most like the given one first."""
    names = [str(each) for each in known]
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
    for name in sorted(set(names) - set(known)):
        raise InputError(f"Unknown {kind} {name!r}. {nearest(name, known)}")


def column(adata: AnnData, key: str) -> np.ndarray:
    """Column of `adata.obs` as an object array of strings [N].

    Raises
    ------
    InputError
        No such column.
    """
    if key not in adata.obs:
        raise InputError(f"adata.obs has no column {key!r}. {nearest(key, adata.obs.columns)}")
    return adata.obs[key].astype(str).to_numpy(dtype=object)


def labels_of(adata: AnnData, key: str) -> np.ndarray:
    """Labels of cells, object [N]; "" for missing ones."""
    values = column(adata, key)
    return np.where(np.isin(values, list(UNLABELLED)), "", values)
