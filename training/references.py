"""Reference cells to learn from: counts, labels and conditions of one file, checked before anything is fitted."""

import warnings
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from anndata import AnnData

from rvqa.data.cells import Cells
from rvqa.data.columns import column, conditions_of, labels_of, split_names
from rvqa.data.counts import read_counts
from rvqa.data.reading import Reading
from rvqa.errors import InputError, InputWarning, about, nearest, quoted

ONTOLOGY_COLUMN = "cell_type_ontology_term_id"
"""Column of obs where CELLxGENE keeps Cell Ontology ids; the model takes them over if it exists."""


def read_reference(
    adata: AnnData,
    *,
    name: str = "reference",
    labels: str | None = None,
    condition: str | None = None,
    control: str | Sequence[str] | None = None,
    reading: Reading | None = None,
) -> Cells:
    """Check one labelled AnnData and read what training needs.

    Parameters
    ----------
    adata
        Raw counts, cells by genes.
    name
        Name of the file in messages.
    labels
        Column of `adata.obs` with cell types. A cell with a missing value, "" or "unlabeled" is unlabelled.
    condition, control
        Column of `adata.obs` with perturbations, and its value or values for control cells. If no column is named, or
        this file lacks it, all cells are control cells. A cell without a value is neither control nor perturbed.
    reading
        Layer, column of totals, and whether to recover counts. Defaults to raw counts in `X`.

    Raises
    ------
    rvqa.errors.InputError
        The file has no raw counts, has empty cells, lacks a named column, or has no cell with the control value.
    """
    with about(name):
        return _read(adata, name, labels, condition, control, reading)


def _read(
    adata: AnnData,
    name: str,
    labels: str | None,
    condition: str | None,
    control: str | Sequence[str] | None,
    reading: Reading | None,
) -> Cells:
    cells = read_counts(adata, reading, name=name)
    if (condition is None) != (control is None):
        raise InputError(
            f"condition={condition!r} and control={control!r} go together: name the column and its value for control "
            "cells, or neither (--condition, --control)."
        )
    label_N = np.full(adata.n_obs, "", dtype=object)
    ontology: dict[str, str] = {}
    if labels is not None:
        label_N = labels_of(adata, labels)
        if not (label_N != "").any():
            raise InputError(f"obs[{labels!r}] labels no cell. Name the column that holds the cell types.")
        if ONTOLOGY_COLUMN in adata.obs:
            for label, term in zip(label_N, column(adata, ONTOLOGY_COLUMN), strict=True):
                if label and term.startswith("CL:"):
                    ontology.setdefault(label, term)
    condition_N = np.full(adata.n_obs, "", dtype=object)
    if condition is not None and condition in adata.obs:
        values = list(column(adata, condition, missing=()))
        names = split_names([control] if isinstance(control, str) else control or (), values)
        condition_N = conditions_of(adata, condition, names)
        if not (condition_N == "").any():
            offered = nearest(names[0] if names else "", {each for each in condition_N if each})
            raise InputError(
                f"obs[{condition!r}] has no {quoted(names)}, so no control cells. {offered} Give the control's."
            )
        if unknown := sum(each is None for each in condition_N):
            message = f"{name}: {unknown:,} of {adata.n_obs:,} cells have no value in obs[{condition!r}]"
            warnings.warn(f"{message}; they count neither as control nor as perturbed.", InputWarning, stacklevel=4)
    return replace(cells, label_N=label_N, truth_N=label_N, condition_N=condition_N, ontology_ids=ontology)
