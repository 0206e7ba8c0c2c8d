"""Columns of `adata.obs`: labels, conditions, totals; and names that an option gives."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from rvqa.errors import InputError, nearest, quoted

if TYPE_CHECKING:
    from anndata import AnnData


_MOST_COUNTS = 2.0**53
"""Up to here float64, and with it the kernels, know every whole number."""

MISSING = frozenset({"", "nan", "NaN", "NAN", "None", "NA", "<NA>", "N/A", "n/a", "#N/A", "NaT", "null", "NULL"})
"""Texts that stand for a missing value, as writers of tables leave them."""

UNLABELLED = MISSING | {"unlabeled", "unlabelled", "missing", "unassigned", "not available", "none", "na"}
"""Values that mean "no label", in any case; "Unknown" is not among them, some studies use it as a class."""

_UNLABELLED = frozenset(word.casefold() for word in UNLABELLED)
_INVISIBLE = re.compile("[\u200b\u2060\ufeff]")
_WHOLE = re.compile(r"([+-]?\d+)\.0+")


def as_text(value: Any) -> str:
    """One value of a table as the text that names its category: "" where it is missing.

    A whole number is written without a point, whether it is stored as an integer, as a float (as pandas does beside a
    missing value) or as the text of one. Blanks around a text do not count, several in it, of whatever kind, are one;
    letters are those of Unicode's composed form.
    """
    if isinstance(value, bytes):
        value = value.decode(errors="replace")
    if not isinstance(value, str):
        if pd.api.types.is_scalar(value) and pd.isna(value):
            return ""
        if isinstance(value, float | np.floating):
            number = float(value)
            if number.is_integer() and abs(number) < _MOST_COUNTS:
                return str(int(number))
    text = str(value)
    if not text.isascii():
        text = _INVISIBLE.sub("", unicodedata.normalize("NFC", text))
    text = " ".join(text.split())
    whole = _WHOLE.fullmatch(text)
    return whole[1] if whole else text


def texts(values: Any, *, missing: Iterable[str] = MISSING) -> np.ndarray:
    """The one reader of categorical values: labels, conditions, donors, whatever type a file stores them as.

    Parameters
    ----------
    values
        pandas Series or Categorical, or an array: texts, bytes, numbers, bool or categories, with missing values.
    missing
        Texts that stand for a missing value, too.

    Returns
    -------
    numpy.ndarray
        object [N] of `as_text`; "" where a value is missing.
    """
    series = pd.Series(values, copy=False)
    if isinstance(series.dtype, pd.CategoricalDtype):
        codes, kinds = series.cat.codes.to_numpy(), series.cat.categories.to_numpy(dtype=object)
    elif series.dtype.kind in "iufb" and isinstance(series.dtype, np.dtype):
        kinds, codes = np.unique(series.to_numpy(), return_inverse=True)
    else:
        codes, kinds = np.arange(len(series)), series.to_numpy(dtype=object)
    absent = frozenset(missing)
    known: dict[Any, str] = {}

    def named(kind: Any) -> str:
        if not isinstance(kind, str | bytes):
            return as_text(kind)
        if kind not in known:
            known[kind] = as_text(kind)
        return known[kind]

    table = np.array([*(named(kind) for kind in kinds), ""], dtype=object)
    table[[name in absent for name in table]] = ""
    return table[codes]  # -1, for a missing category, is the last


def split_names(given: Iterable[str], known: Iterable[str] = ()) -> list[str]:
    """Names of an option that may be repeated; commas separate names as well, where no known name has one.

    Parameters
    ----------
    given
        What was given: a name each, or several with commas between them.
    known
        Names that there are. One that is given as it is, is never split.

    Returns
    -------
    list
        Names in the order in which they were given, each once.

    Raises
    ------
    InputError
        Nothing but blanks and commas, as of a variable that is not set.
    """
    there = set(known)
    commas = any("," in name for name in there)
    names: list[str] = []
    for each in given:
        name = each if each in there else each.strip()
        parts = [part.strip() for part in name.split(",") if part.strip()]
        if not parts:
            raise InputError(f"An option was given {each!r}, which names nothing. Name one, or leave the option out.")
        whole = name in there or (commas and not there.issuperset(parts))
        names += [name] if whole else parts
    return list(dict.fromkeys(names))


def column(adata: AnnData, key: str, *, missing: Iterable[str] = MISSING) -> np.ndarray:
    """Column of `adata.obs` as `texts`, object [N].

    Raises
    ------
    InputError
        No such column, or several.
    """
    if key not in adata.obs:
        raise InputError(f"adata.obs has no column {key!r}. {nearest(key, adata.obs.columns)}")
    if adata.obs[key].ndim > 1:
        raise InputError(f"adata.obs has several columns {key!r}: rename or drop all but one.")
    return texts(adata.obs[key], missing=missing)


def labels_of(adata: AnnData, key: str) -> np.ndarray:
    """Labels of cells, object [N]; "" for missing ones."""
    labels = column(adata, key)
    words = {label for label in set(labels) if label.casefold() in _UNLABELLED}
    labels[np.isin(labels, list(words))] = ""
    return labels


def conditions_of(adata: AnnData, key: str, control: Sequence[str]) -> np.ndarray:
    """Perturbations of cells, object [N]: "" for a control cell, None where the column says nothing.

    Parameters
    ----------
    adata
        Where `obs` is read.
    key
        Its column of conditions.
    control
        Values for control cells; one of them may be a text that elsewhere means a missing value, such as "None".

    Raises
    ------
    InputError
        No such column, or several.
    """
    names = {as_text(each) for each in control}
    values = column(adata, key, missing=MISSING - names)
    if (names & MISSING) and not np.isin(values, list(names - {""})).any() and (n := int((values == "").sum())):
        raise InputError(
            f"{n:,} of {len(values):,} cells have no value in obs[{key!r}], and a missing value is not a control. If "
            f"they are, fill them in first: adata.obs[{key!r}] = adata.obs[{key!r}].astype(object).fillna('control')."
        )
    values[values == ""] = None  # an array of its own
    values[np.isin(values, list(names))] = ""
    return values


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
    if values is not None and values.ndim == 1 and values.dtype.kind == "O":
        values = _as_numbers(values)
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


def _as_numbers(values: pd.Series) -> pd.Series:
    """Numbers that are stored as categories or as texts; other values as they are."""
    try:
        return pd.to_numeric(pd.Series(texts(values), index=values.index).replace("", np.nan))
    except (ValueError, TypeError):
        return values


def cell_names(adata: AnnData, cells: np.ndarray) -> str:
    """Names of the first three of some cells, given by index."""
    return ("first: " if cells.size > 3 else "") + quoted(adata.obs_names[cells[:3]])
