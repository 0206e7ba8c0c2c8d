"""Reference cells to learn from: counts, labels and conditions of one file, checked before anything is fitted."""

import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import pandas as pd
import scipy.sparse as sp
from anndata import AnnData

from rvqa.data.columns import column, conditions_of, labels_of, split_names
from rvqa.data.counts import read_counts
from rvqa.data.depth import GeneShares
from rvqa.data.genes import GeneAxis
from rvqa.errors import InputError, InputWarning, about, nearest, quoted
from rvqa.training.tokenizer.cells import in_blocks

ONTOLOGY_COLUMN = "cell_type_ontology_term_id"
"""Where CELLxGENE keeps Cell Ontology ids; taken over into the model when it is there."""


@dataclass(frozen=True)
class Reference:
    """Cells of one file, as training uses them."""

    name: str
    adata: AnnData
    var: pd.DataFrame
    """Table of genes of the counts: that of `adata`, or of its `raw`."""
    counts: sp.csr_matrix
    """Raw counts over the genes of the file, [N, genes of the file]."""
    library_size: np.ndarray
    """Total counts, float64 [N]."""
    given: bool
    """Whether the file gives them; else they are sums of the stored counts."""
    labels: np.ndarray
    """Cell type, object [N]; "" where unlabelled."""
    conditions: np.ndarray
    """Perturbation, object [N]; "" for control cells, None where the file does not say."""
    ontology_ids: dict[str, str]
    """Cell Ontology id of a label, where the file gives one."""
    place: str = "X"
    """Where in the file the counts were."""
    left_out: Mapping[str, int] = field(default_factory=dict)
    """Number of features of each kind that are not genes."""

    @property
    def axis(self) -> GeneAxis:
        """Genes of the file."""
        with about(self.name):
            return GeneAxis.from_adata(AnnData(var=self.var))

    def at_depth(self, shares: GeneShares) -> "Reference":
        """The same with `library_size` over all genes, as a tokenizer reads it."""
        with about(self.name):
            return replace(self, library_size=shares.depth(self))

    def gene_totals(self) -> np.ndarray:
        """Counts of every gene of the file over these cells, float64 [genes]."""
        return self.counts.T @ np.ones(self.counts.shape[0])

    def blocks(self) -> Iterator[sp.csr_matrix]:
        """Raw counts, `ROWS` cells at a time, in order."""
        return in_blocks([self.counts])


def read_reference(
    adata: AnnData,
    *,
    name: str = "reference",
    labels: str | None = None,
    condition: str | None = None,
    control: str | Sequence[str] | None = None,
    layer: str | None = None,
    library_size_key: str | None = None,
    recover: bool = False,
) -> Reference:
    """Check one labelled AnnData and take from it what training needs.

    Parameters
    ----------
    adata
        Raw counts in `X` or `layer`, cells by genes.
    name
        Used in messages.
    labels
        Column of `adata.obs` with cell types; missing, "" and "unlabeled" are unlabelled cells.
    condition, control
        Column of `adata.obs` with perturbations, and its value or values for control cells. Without a column, or where
        it is absent from this file, all cells are control cells; a cell without a value is neither.
    layer, library_size_key, recover
        As in `rvqa.encode`.

    Raises
    ------
    rvqa.errors.InputError
        No raw counts, empty cells, an unknown column, or no cell with the control value.
    """
    with about(name):
        return _read(adata, name, labels, condition, control, layer, library_size_key, recover=recover)


def _read(
    adata: AnnData,
    name: str,
    labels: str | None,
    condition: str | None,
    control: str | Sequence[str] | None,
    layer: str | None,
    library_size_key: str | None,
    *,
    recover: bool,
) -> Reference:
    cells = read_counts(adata, layer=layer, library_size_key=library_size_key, recover=recover)
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
    return Reference(
        name,
        adata,
        cells.var,
        cells.counts,
        cells.library_size,
        cells.given,
        label_N,
        condition_N,
        ontology,
        cells.place,
        cells.left_out,
    )
