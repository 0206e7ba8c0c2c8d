"""What a report says about predicted cells: their shift, gene by gene, beside the measured one where there is one.

A profile is the mean over cells of log1p of counts per 10,000; a shift is the difference to the control's profile.
N cells, G genes that the control file measures.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from anndata import AnnData

from rvqa.data.alignment import map_columns
from rvqa.data.columns import conditions_of, labels_of
from rvqa.data.depth import log1p_normalise
from rvqa.encoding import cell_codes, cells_on_axis
from rvqa.errors import InputError
from rvqa.evaluation.metrics import ShiftTruth
from rvqa.evaluation.profiles import log1p_on_axis
from rvqa.language.model import Model
from rvqa.report.annotation import code_colouring, drawn_text
from rvqa.report.figures import (
    Colouring,
    bar,
    cells_figure,
    codebook_figure,
    coordinates,
    drawn_cells,
    genes_figure,
    note,
    tiles,
)
from rvqa.report.page import DASH, Html, Report, el, number, table

FEWEST = 5
"""Measured cells of a type below which its shift says too little to compare with."""

_BARS = 30


@dataclass(frozen=True)
class Shift:
    """Change of the profile, predicted and, where cells were measured, true."""

    genes: Sequence[str]
    predicted_G: np.ndarray
    true_G: np.ndarray | None = None
    top: np.ndarray | None = None
    """Genes to mark; with `true_G`."""
    top_are: str = "differ most by Welch's t between measured and control cells"


def add_perturbation(
    report: Report,
    shift: Shift,
    groups: Mapping[str, AnnData],
    model: Model,
    *,
    heading: str,
    perturbation: str,
    cell_type_key: str,
    methods: Mapping[str, Mapping[str, float]] | None = None,
    by_type: Html | None = None,
    remark: str = "",
    **reading: Any,
) -> None:
    """Add a section on predicted cells.

    Parameters
    ----------
    report
        Grows by one section.
    shift
        What is compared.
    groups
        Cells to draw: "control", "predicted" (from `rvqa.perturb`) and, where there are any, "measured".
    model
        That predicted.
    heading, perturbation
        What was predicted.
    cell_type_key
        Column of `obs` with types.
    methods
        `ShiftTruth.scores` of rvqa (first) and other methods, by name.
    by_type
        Table of the types.
    remark
        One more sentence under the figure.
    **reading
        As for `rvqa.encode`: how counts are read.
    """
    figures = {f"{name} cells": f"{cells.n_obs:,}" for name, cells in groups.items()}
    figures["genes compared"] = f"{len(shift.genes):,}"
    blocks: list[Html] = []
    if shift.true_G is not None and shift.top is not None:
        pearson = _pearson(shift.predicted_G, shift.true_G)
        figures["Pearson of shift"] = number(pearson)
        caption = (
            f"Each mark is a gene: change of its mean log1p counts per 10,000 against control cells. Marked: the "
            f"{len(shift.top)} genes that {shift.top_are}. On the dashed line prediction and measurement agree. "
            f"Pearson over all genes {pearson:.3f}. {remark}"
        )
        blocks.append(genes_figure(report, shift.genes, shift.predicted_G, shift.true_G, shift.top, caption=caption))
    else:
        blocks += [
            el("h3", "Predicted shift"),
            note(f"There were no measured cells to compare with: this is the prediction alone. {remark}"),
            _strongest(shift),
        ]
    if methods:
        blocks += [el("h3", "Beside simple baselines"), methods_table(methods)]
    if by_type is not None:
        blocks += [el("h3", "Cell types"), by_type]
    if shift.true_G is not None:
        blocks = [
            el("h3", "Predicted against true shift"),
            el("div", blocks[0], el("div", *blocks[1:]), class_="beside"),
        ]
    codes = {
        name: np.asarray(cells.obsm["rvqa_codes"])
        if name == "predicted"
        else cell_codes(cells, model.cell_tokenizer, **reading)[0]
        for name, cells in groups.items()
    }
    blocks += [el("h3", "Cells"), _cells(report, codes, groups, model, cell_type_key)]
    blocks += [el("h3", "Codebook use of the predicted cells"), codebook_figure(codes["predicted"])]
    report.add(heading, note(f"Cells predicted under {perturbation} are not measured cells."), tiles(figures), *blocks)


def _cells(
    report: Report, codes: Mapping[str, np.ndarray], groups: Mapping[str, AnnData], model: Model, key: str
) -> Html:
    codes_NM = np.concatenate(list(codes.values()))
    group_N = np.repeat(list(codes), [len(each) for each in codes.values()])
    types_N = np.concatenate([labels_of(cells, key) for cells in groups.values()])
    rows = drawn_cells(len(codes_NM))
    positions_N2, how = coordinates(model.cell_tokenizer.quantized_latent(codes_NM[rows]))
    colourings = [Colouring.of("origin", group_N[rows], list(codes)), code_colouring(codes_NM[rows, 0])]
    if len(set(types_N)) > 1:
        colourings.append(Colouring.of("cell type", types_N[rows], sorted(set(types_N))))
    caption = f"{drawn_text(len(codes_NM))} Positions: {how}."
    return cells_figure(report, positions_N2, colourings, caption=caption)


def methods_table(methods: Mapping[str, Mapping[str, float]]) -> Html:
    """Errors and correlation of methods; the first row is rvqa's."""
    rows = []
    for name, row in methods.items():
        pearson = row["pearson_shift"]
        rows.append([name, number(row["mse_top"]), number(row["mse"], 4), number(pearson), bar(max(pearson, 0), 1)])
    caption = "On profiles. Lower errors and a higher correlation are better; no change has no correlation."
    return table(
        ["method", "MSE, top 50 genes", "MSE, all genes", "Pearson of shift", ""], rows, caption=caption, strong=0
    )


def _pearson(one_G: np.ndarray, other_G: np.ndarray) -> float:
    if min(np.ptp(one_G), np.ptp(other_G)) == 0:
        return float("nan")
    return float(np.corrcoef(one_G, other_G)[0, 1])


def _strongest(shift: Shift) -> Html:
    """Genes that are predicted to rise and to fall most, as tables with bars."""
    order = np.argsort(-shift.predicted_G, kind="stable")
    most = float(np.abs(shift.predicted_G).max()) or 1.0
    halves = []
    for word, rows in (("rise", order[:_BARS]), ("fall", order[::-1][:_BARS])):
        chosen = [at for at in rows if (shift.predicted_G[at] > 0) == (word == "rise") and shift.predicted_G[at]]
        body = [
            [shift.genes[at], f"{shift.predicted_G[at]:+.2f}", bar(float(shift.predicted_G[at]), most, signed=True)]
            for at in chosen
        ]
        caption = f"The {len(body)} genes predicted to {word} most: change of mean log1p counts per 10,000."
        halves.append(table(["gene", "shift", ""], body, caption=caption))
    return el("div", *halves, class_="halves")


@dataclass(frozen=True)
class Compared:
    """Predicted cells against what a file measured."""

    shift: Shift
    groups: dict[str, AnnData]
    by_type: Html
    remark: str


def compare(
    adata: AnnData,
    predicted: AnnData,
    model: Model,
    *,
    perturbation: str,
    cell_type_key: str,
    control_key: str | None,
    control_value: str | None,
    **reading: Any,
) -> Compared:
    """Compare what `rvqa.perturb` predicted with the file it started from; parameters as there."""
    condition_N = None if control_key is None else conditions_of(adata, control_key, [str(control_value)])
    control = adata if condition_N is None else adata[condition_N == ""]
    control_types_N = labels_of(control, cell_type_key)
    axis = model.cell_tokenizer.axis
    cells, alignment, depth_N = cells_on_axis(control, model.cell_tokenizer, **reading)
    measured_G = alignment.measured
    samples = predicted.n_obs // control.n_obs
    control_NG = log1p_normalise(map_columns(cells.counts, alignment), depth_N)[:, measured_G]
    predicted_NG = log1p_normalise(predicted.X, np.repeat(depth_N, samples))[:, measured_G]
    predicted_types_N = np.repeat(control_types_N, samples)

    measured, remark, measured_NG, types_N = None, "", None, np.zeros(0, dtype=object)
    if condition_N is not None:
        types_N = labels_of(adata, cell_type_key)
        inside_N = (condition_N == perturbation) & np.isin(types_N, control_types_N)
        try:
            if inside_N.any():
                measured, types_N = adata[inside_N], types_N[inside_N]
                measured_NG = log1p_on_axis(measured, axis, shares=model.cell_tokenizer.shares, **reading)[
                    :, measured_G
                ]
        except InputError as error:
            measured, remark = None, f"Measured cells under {perturbation} cannot be read: {error}"

    total_G, true_G, weight = np.zeros(measured_G.sum()), np.zeros(measured_G.sum()), 0
    predicted_alone_G = np.zeros(measured_G.sum())
    rows: list[list[Any]] = []
    top, left_out = np.zeros(0, dtype=np.int64), []
    for name in sorted(set(control_types_N)):
        before_NG = control_NG[control_types_N == name]
        after_G = _mean(predicted_NG[predicted_types_N == name])
        shift_G = after_G - _mean(before_NG)
        n = before_NG.shape[0]
        predicted_alone_G += n * shift_G / len(control_types_N)
        row = [name, f"{n:,}", f"{n * samples:,}"]
        n_measured = int((types_N == name).sum()) if measured_NG is not None else 0
        if measured_NG is not None and n_measured >= FEWEST:
            truth = ShiftTruth.of(before_NG, measured_NG[types_N == name])
            scores = truth.scores(after_G)
            total_G += n * shift_G
            true_G += n * (truth.perturbed_G - truth.control_G)
            weight, top = weight + n, truth.top
            row += [f"{n_measured:,}", number(scores["mse_top"]), number(scores["mse"], 4)]
            row += [number(scores["pearson_shift"])]
        else:
            left_out += [name] if n_measured else []
            row += [f"{n_measured:,}", DASH, DASH, DASH]
        rows.append(row)
    header = ["type", "control", "predicted", "measured", "MSE, top 50 genes", "MSE, all genes", "Pearson of shift"]
    by_type = table(
        header, rows, caption="Cells of each type, and how its predicted profile compares with the measured."
    )
    if left_out:
        remark += f" Types with fewer than {FEWEST} measured cells are left out: {', '.join(left_out)}."
    genes = [str(symbol) for symbol, used in zip(axis.symbols, measured_G, strict=True) if used]
    groups = {"control": control, "predicted": predicted}
    if not weight or measured is None:
        return Compared(Shift(genes, predicted_alone_G), groups, by_type, remark)
    groups["measured"] = measured
    compared = [row for row in rows if row[-2] != DASH]
    if len(compared) == 1:
        shift = Shift(genes, total_G / weight, true_G / weight, top)
    else:
        strongest = np.argsort(-np.abs(true_G), kind="stable")[:50]
        shift = Shift(genes, total_G / weight, true_G / weight, strongest, "move most in the measured cells")
        remark += f" The mean of {len(compared)} types, weighted by their control cells."
    return Compared(shift, groups, by_type, remark)


def _mean(cells_NG: Any) -> np.ndarray:
    return np.asarray(cells_NG.mean(0, dtype=np.float64)).ravel()
