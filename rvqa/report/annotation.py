"""What a report says about annotated cells."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from anndata import AnnData

from rvqa.data.columns import labels_of
from rvqa.evaluation.label_names import ComparedLabels, compare_labels
from rvqa.evaluation.metrics import classification, confusion, per_class
from rvqa.report.figures import (
    MAX_POINTS,
    Colouring,
    bar,
    cell_positions,
    cells_figure,
    codebook_figure,
    confusion_figure,
    drawn_cells,
    note,
    tiles,
)
from rvqa.report.page import DASH, Html, Report, el, number, table

UNSURE = 0.5
"""Confidence below which a cell is counted as unsure."""

CODE_COLOURS = "first code"


def coverage_text(coverage: Mapping[str, Any]) -> str:
    """Say how many of the model's genes a file measures, from `uns["rvqa"]["coverage"]`."""
    if not {"n_measured", "n_axis", "coverage"} <= set(coverage):
        return "not recorded"
    measured, axis = int(coverage["n_measured"]), int(coverage["n_axis"])
    return f"{measured:,} of {axis:,} ({float(coverage['coverage']):.1%})"


def add_annotation(
    report: Report,
    adata: AnnData,
    *,
    heading: str,
    truth: str | None = None,
    label_map: str | Path | None = None,
    key_added: str = "rvqa",
    methods: Mapping[str, Mapping[str, float]] | None = None,
) -> None:
    """Add a section on cells that `rvqa.annotate` annotated.

    Parameters
    ----------
    report
        Grows by one section.
    adata
        Annotated cells.
    heading
        What the cells are.
    truth
        Column of `adata.obs` with known types; cells without one are left out of the comparison.
    label_map
        File of names by which known and predicted types are compared; see `rvqa.evaluation.label_names`. Where most
        known types have no counterpart among the model's labels, no accuracy is shown.
    key_added
        Prefix that `rvqa.annotate` wrote under.
    methods
        `classification` of other methods on the same cells, by name; the first is rvqa's.
    """
    predicted_N = adata.obs[f"{key_added}_cell_type"].astype(str).to_numpy(dtype=object)
    confidence_N = adata.obs[f"{key_added}_confidence"].to_numpy(dtype=np.float64)
    truth_N = None if truth is None else labels_of(adata, truth)
    labels = [str(label) for label in adata.uns[key_added]["labels"]]
    codes_NM = np.asarray(adata.obsm[f"{key_added}_codes"])
    if not adata.n_obs:
        report.add(heading, note("There are no cells."))
        return

    figures = {"cells": f"{adata.n_obs:,}", "coverage of the model's genes": "", "median confidence": ""}
    figures["median confidence"] = number(float(np.median(confidence_N)), 2)
    share = adata.uns[key_added].get("coverage", {}).get("coverage")
    figures["coverage of the model's genes"] = DASH if share is None else f"{float(share):.1%}"
    compared = None if truth_N is None else compare_labels(truth_N, predicted_N, labels, label_map=label_map)
    blocks = []
    if compared is not None and compared.sensible and compared.can_N.any():
        known_N = compared.truth_N != ""
        scores = classification(compared.truth_N[known_N], compared.predicted_N[known_N])
        figures |= {"accuracy": number(scores["accuracy"]), "macro-F1": number(scores["macro_f1"])}
    blocks += [tiles(figures), _cells(report, adata, predicted_N, confidence_N, truth_N, labels, key_added)]
    if methods:
        blocks += [el("h3", "Beside simple baselines"), methods_table(methods)]
    blocks += [el("h3", "Cell types"), _types(predicted_N, confidence_N, labels, compared)]
    if compared is not None:
        blocks += [el("h3", "Predicted against known types"), *_confusion(compared, truth)]
    blocks += [el("h3", "Codebook use"), codebook_figure(codes_NM)]
    report.add(heading, *blocks)


def _cells(
    report: Report,
    adata: AnnData,
    predicted_N: np.ndarray,
    confidence_N: np.ndarray,
    truth_N: np.ndarray | None,
    labels: Sequence[str],
    key_added: str,
) -> Html:
    rows = drawn_cells(adata.n_obs)
    positions_N2, how = cell_positions(adata, rows, key_added)
    first_N = np.asarray(adata.obsm[f"{key_added}_codes"])[rows, 0]
    known_N = np.where(truth_N == "", "no label", truth_N)[rows] if truth_N is not None else predicted_N[:0]
    present = set(predicted_N[rows]) | set(known_N)
    names = [name for name in labels if name in present] + sorted(present - set(labels))
    colourings = [Colouring.of("predicted type", predicted_N[rows], names), code_colouring(first_N)]
    if truth_N is not None:
        colourings.append(Colouring.of("known type", known_N, names))
    caption = f"{drawn_text(adata.n_obs)} Positions: {how}. Point at a cell for its type, first code and confidence."
    return cells_figure(report, positions_N2, colourings, caption=caption, confidence_N=confidence_N[rows])


def code_colouring(first_N: np.ndarray) -> Colouring:
    """Cells by their first code; a code keeps its marker from figure to figure."""
    return Colouring(CODE_COLOURS, [str(code) for code in range(int(first_N.max()) + 1)], first_N.astype(np.uint16))


def drawn_text(n_cells: int) -> str:
    """Say how many cells are drawn."""
    if n_cells <= MAX_POINTS:
        return f"All {n_cells:,} cells."
    return f"{MAX_POINTS:,} of {n_cells:,} cells, drawn at random (seed 0)."


def methods_table(methods: Mapping[str, Mapping[str, float]]) -> Html:
    """Accuracy and macro-F1 of methods; the first row is rvqa's."""
    rows = [
        [name, number(row["accuracy"]), bar(row["accuracy"], 1), number(row["macro_f1"]), bar(row["macro_f1"], 1)]
        for name, row in methods.items()
    ]
    caption = "Baselines are fitted on the same reference cells, over the genes that reference and test file share."
    return table(["method", "accuracy", "", "macro-F1", ""], rows, caption=caption, strong=0)


def _types(
    predicted_N: np.ndarray, confidence_N: np.ndarray, labels: Sequence[str], compared: ComparedLabels | None
) -> Html:
    """One row a type; beside known types, where an accuracy says anything, under the names that are compared."""
    truth_N = known_N = np.empty(0, dtype=object)
    if scored := compared is not None and compared.sensible:
        truth_N, predicted_N, labels = compared.truth_N, compared.predicted_N, compared.labels
        known_N = truth_N != ""
        truth_N = truth_N[known_N]
    named = set(predicted_N) | set(truth_N)
    types = [label for label in labels if label in named] + sorted(named - set(labels))
    header = ["type", "cells", "share", "", "median confidence", f"below {UNSURE:g}"]
    scores: dict[str, np.ndarray] = {}
    if scored:
        header += ["known cells", "precision", "recall", "F1"]
        scores = per_class(truth_N, predicted_N[known_N], types)
    sizes = {name: int((predicted_N == name).sum()) for name in types}
    most = max(sizes.values())
    rows = []
    for at, name in enumerate(types):
        inside = confidence_N[predicted_N == name]
        row: list[Any] = [name, f"{sizes[name]:,}", f"{sizes[name] / len(predicted_N):.1%}", bar(sizes[name], most)]
        row += [number(float(np.median(inside)), 2) if len(inside) else DASH, f"{int((inside < UNSURE).sum()):,}"]
        if scored:
            known = int((truth_N == name).sum())
            given = int((predicted_N[known_N] == name).sum())
            defined = {"precision": given, "recall": known, "f1": given + known}
            shown = [number(float(scores[score][at]), 2) if of else DASH for score, of in defined.items()]
            row += [f"{known:,}", *shown]
        rows.append(row)
    caption = "Cells by predicted type. Confidence is the probability of the type among the labels."
    if scored:
        caption += f" Precision, recall and F1 over the {len(truth_N):,} cells of known type."
    return table(header, rows, caption=caption)


def _confusion(compared: ComparedLabels, key: str | None) -> list[Html]:
    known_N = compared.truth_N != ""
    if not known_N.any():
        return [note(f"No cell has a label in obs[{key!r}].")]
    truth_N, predicted_N, can_N = compared.truth_N[known_N], compared.predicted_N[known_N], compared.can_N[known_N]
    named = set(truth_N) | set(predicted_N)
    columns = [label for label in compared.labels if label in named]
    rows = [label for label in compared.labels if label in set(truth_N)]
    foreign = sorted(set(truth_N) - set(compared.labels))
    counts_RC = confusion(truth_N, predicted_N, rows + foreign, columns)
    sentence = (
        "No accuracy is shown: most known types, or most of their cells, have no label of the model as counterpart."
    )
    if compared.sensible:
        scores = classification(truth_N, predicted_N)
        sentence = f"Accuracy {scores['accuracy']:.3f}, macro-F1 {scores['macro_f1']:.3f} over {len(truth_N):,} cells."
    if len(known_N) > len(truth_N):
        sentence += f" {len(known_N) - len(truth_N):,} cells without a label are left out."
    if foreign:
        inner = f", among the others {np.mean(truth_N[can_N] == predicted_N[can_N]):.3f}" if can_N.any() else ""
        counted = f" and count as wrong{inner}" if compared.sensible else ""
        sentence += f" {int((~can_N).sum()):,} cells have a label the model cannot give (†){counted}."
    caption = f"Rows: obs[{key!r}]; columns: predicted. Counts, shaded by their share of the row."
    return [
        el("p", f"{sentence} {compared.sentence}"),
        confusion_figure(counts_RC, rows + [f"{name} †" for name in foreign], columns, caption=caption),
    ]
