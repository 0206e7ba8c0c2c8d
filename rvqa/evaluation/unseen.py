"""Which cells a tokenizer was fitted on, and which it never saw."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from rvqa.data import splits
from rvqa.data.alignment import FLOOR, match_columns
from rvqa.data.cells import Cells
from rvqa.errors import InputError, quoted
from rvqa.evaluation import tokenizer_measures as measures

SAME_CELL = 20
"""Genes with counts that two cells must have in common, all with the same counts, to be taken for the same cell."""


def fitted_and_unseen(
    studies: Sequence[Cells], split: pd.DataFrame, rng: np.random.Generator, reasons: dict[str, str] | None = None
) -> tuple[list[Cells], list[Cells]]:
    """Cells that were fitted, and those no fit has seen that are measured, of the files with any.

    A cell that has the counts of a cell of the fit is seen, whatever file it is in.

    Parameters
    ----------
    studies
        Files of the fit, and others.
    split
        Which cells were fitted.
    rng
        Draws the cells of large studies.
    reasons
        Gets a sentence for each file outside the fit with too few unseen cells.

    Raises
    ------
    rvqa.errors.InputError
        No file of the fit among the studies, or no unseen cell.
    """
    reasons = {} if reasons is None else reasons
    fitted = [study.take(splits.rows_of(split, study, splits.FIT)) for study in studies]
    watched = [study.take(splits.rows_of(split, study, splits.VALIDATION)) for study in studies]
    fitted = [study for study in fitted if len(study)]
    seen = fitted + [study for study in watched if len(study)]
    unseen = []
    for study in studies:
        unseen_N = splits.unseen_rows(split, study)
        unseen_N[unseen_N] = ~same_cells(study.take(unseen_N), seen)
        if unseen_N.sum() >= measures.MIN_CELLS:
            unseen.append(study.take(measures.some(unseen_N, rng)))
        elif study.name not in set(split["file"]):
            reasons[f"cells: {study.name}"] = (
                f"{unseen_N.sum():,} of its {len(study):,} cells are unseen, the others are cells of the fit or of its "
                f"donors; {measures.MIN_CELLS} are needed."
            )
    if not fitted or not unseen:
        missing = "file of the fit" if not fitted else f"file with {measures.MIN_CELLS} unseen cells"
        of = set(split["file"])
        named = f" The fit was of {quoted(sorted(of))}." if not fitted else ""
        why = "".join(f" {name.removeprefix('cells: ')}: {each}" for name, each in reasons.items())
        raise InputError(
            f"Among {', '.join(study.name for study in studies) or 'the files'} is no {missing}. Give one more file."
            f"{named}{why}"
        )
    return fitted, unseen


def same_cells(study: Cells, seen: Sequence[Cells]) -> np.ndarray:
    """Cells with the counts of a seen cell in all genes that both files measure, bool [N].

    A cell is told by a weighted sum of its counts with random whole weights, exact in float64. Cells with counts in
    fewer than `SAME_CELL` of these genes, and files with fewer than `FLOOR` genes in common, tell nothing.
    """
    same_N = np.zeros(len(study), dtype=bool)
    axis = study.axis
    here = match_columns(study.var, axis)
    weight_G = np.random.default_rng(0).integers(1, 2**30, len(axis)).astype(np.float64)
    for other in seen:
        there = match_columns(other.var, axis)
        shared_G = np.isin(np.arange(len(axis)), there)
        if shared_G.sum() < FLOOR:
            continue
        own = np.where((here >= 0) & shared_G[here], weight_G[here], 0.0)
        others = np.where(there >= 0, weight_G[there], 0.0)
        enough_N = (study.counts > 0) @ (own > 0).astype(np.float64) >= SAME_CELL
        same_N |= enough_N & np.isin(study.counts @ own, other.counts @ others)
    return same_N


def recorded(path: Path, split: str | Path | None, references: dict[str, int]) -> pd.DataFrame | None:
    """Split of a directory, or the one given for it; None where its references must do.

    Raises
    ------
    InputError
        No record at all, two, or a split that names fewer fitted cells than there were.
    """
    own = path / "split.parquet"
    if split is None and own.is_file():
        return splits.read_split(own)
    if split is None and references:
        return None
    if split is None:
        raise InputError(
            f"{path} does not say which cells it was fitted on (split.parquet), so none can be called unseen. Give a "
            "directory that `rvqa fit-tokenizer` or `rvqa fit` wrote, or such a table with --split."
        )
    if own.is_file():
        raise InputError(f"{own} records which cells were fitted, so --split {split} cannot. Leave --split away.")
    found = splits.read_split(Path(split))
    used = int(found["role"].isin([splits.FIT, splits.VALIDATION]).sum())
    if used < sum(references.values()):
        raise InputError(
            f"{split} names {used:,} cells as fitted or for validation, but {path} was fitted on "
            f"{sum(references.values()):,} ({quoted(references)}). Give the split of that fit."
        )
    return found


def files_of_the_fit(path: Path, references: dict[str, int], studies: Sequence[Cells]) -> list[Cells]:
    """Studies that are the references of a model, all of them."""
    named = {study.name: study for study in studies}
    found = []
    for name, cells in references.items():
        study = named.get(name, named.get(Path(name).stem))
        if study is None or len(study) != cells:
            seen = "is not among the files" if study is None else f"has {len(study):,} cells among the files"
            raise InputError(
                f"{path} was fitted on {name} with {cells:,} cells, which {seen}. Without it no cell can be called "
                "unseen: give that file with --data, or a table of the fitted cells with --split."
            )
        found.append(study)
    return found
