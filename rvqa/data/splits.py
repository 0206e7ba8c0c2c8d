"""Splits of cells: by donor, never by cell alone where donors are known; made once, kept as a file of barcodes."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from anndata import AnnData

from rvqa.data.cells import Cells
from rvqa.data.columns import as_text, labels_of
from rvqa.errors import InputError, require_known

FIT, VALIDATION, HELD_OUT = "fit", "validation", "held out"
COLUMNS = ("file", "cell", "donor", "role")


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
    names = [as_text(each) for each in held_out]
    require_known("donor", names, donors)
    outside = np.isin(donors, names)
    return (donors != "") & ~outside, outside


def make_split(
    studies: Sequence[Cells], *, held_out: Sequence[str] = (), validation: Sequence[str] = ()
) -> pd.DataFrame:
    """Role of every cell of the files of a fit.

    Parameters
    ----------
    studies
        Files of the fit.
    held_out
        Donors whose cells enter nothing.
    validation
        Donors whose cells decide when to stop, and enter nothing else.

    Returns
    -------
    pandas.DataFrame
        One row a cell with the columns `file`, `cell` (barcode), `donor` and `role`: "fit", "validation", "held out",
        or "" for a cell without a donor in a file where donors are held out.

    Raises
    ------
    rvqa.errors.InputError
        A donor that no file has, one that is named twice, or nothing left to fit.
    """
    donors = {str(donor) for study in studies for donor in study.donor_N} - {""}
    held_out, validation = ([as_text(name) for name in names] for names in (held_out, validation))
    require_known("donor", [*held_out, *validation], donors)
    if both := sorted(set(held_out) & set(validation)):
        raise InputError(f"Donor {both[0]!r} is both held out and for validation. Name it once.")
    tables = []
    for study in studies:
        role_N = np.full(len(study), FIT, dtype=object)
        outside_N, valid_N = (np.isin(study.donor_N, list(names)) for names in (held_out, validation))
        if outside_N.any() or valid_N.any():
            role_N[study.donor_N == ""] = ""
        role_N[outside_N], role_N[valid_N] = HELD_OUT, VALIDATION
        columns = (study.name, study.cell_N, study.donor_N, role_N)
        tables.append(pd.DataFrame(dict(zip(COLUMNS, columns, strict=True))))
    split = pd.concat(tables, ignore_index=True)
    if not (split["role"] == FIT).any():
        raise InputError("Every cell is held out; nothing is left to fit. Hold out fewer donors.")
    return split


def write_split(split: pd.DataFrame, path: Path) -> None:
    """Write a split as parquet: `file` and `donor` repeat, so it takes little room."""
    split.astype(str).to_parquet(path, index=False)


def read_split(path: Path) -> pd.DataFrame:
    """Read what `write_split` wrote.

    Raises
    ------
    rvqa.errors.InputError
        Not such a table.
    """
    from pyarrow import ArrowException, parquet

    try:
        split = parquet.read_table(path).to_pandas(ignore_metadata=True)
    except (ArrowException, OSError) as error:
        raise InputError(f"{path} cannot be read as a table of cells and roles: {error}.") from error
    if missing := [name for name in COLUMNS if name not in split]:
        raise InputError(f"{path} has no column {missing[0]!r}; expected {', '.join(COLUMNS)}.")
    return split.astype(str)


def rows_of(split: pd.DataFrame, study: Cells, role: str) -> np.ndarray:
    """Rows of a study that have a role, bool [N]; all False for a file that is not in the split."""
    mine = split[(split["file"] == study.name) & (split["role"] == role)]
    return np.isin(study.cell_N.astype(str), mine["cell"].to_numpy(dtype=str))


def unseen_rows(split: pd.DataFrame, study: Cells) -> np.ndarray:
    """Rows of a study that no fit has seen, bool [N].

    In a file of the split: its held-out cells. In another file: all cells but those of a donor whose cells were fitted
    or decided when to stop, since the same cells may be in several files; where there are such, cells without a donor
    are left out too.
    """
    if study.name in set(split["file"]):
        return rows_of(split, study, HELD_OUT)
    used = set(split.loc[split["role"].isin([FIT, VALIDATION]), "donor"]) - {""}
    seen_N = np.isin(study.donor_N, list(used))
    return ~seen_N & (study.donor_N != "") if seen_N.any() else ~seen_N


def related(split: pd.DataFrame, study: Cells) -> bool:
    """Whether a study is of the fit, or has a donor of it: its unseen cells are of a study that was seen."""
    donors = set(split["donor"]) - {""}
    return study.name in set(split["file"]) or bool(np.isin(study.donor_N, list(donors)).any())
