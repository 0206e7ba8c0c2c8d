"""What a report says about predicted cells: their shift, gene by gene, beside the measured one where there is one.

A profile is the mean over cells of log1p of counts per 10,000; a shift is the difference to the control's profile.
N cells, G genes that the control file measures.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from anndata import AnnData

from rvqa.data.columns import labels_of
from rvqa.data.reading import Reading
from rvqa.encoding import cell_codes
from rvqa.evaluation.perturbation import Shift, TypeScores
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

_BARS = 30


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
    reading: Reading | None = None,
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
    reading
        How the counts of measured cells are read. Defaults to raw counts in `X`.
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
            f"Pearson over all genes {number(pearson)}. {remark}"
        )
        blocks.append(genes_figure(report, shift.genes, shift.predicted_G, shift.true_G, shift.top, caption=caption))
    else:
        blocks += [
            el("h3", "Predicted shift"),
            note(f"No measured cells were compared: this is the prediction alone. {remark}"),
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
        else cell_codes(cells, model.cell_tokenizer, reading)[0]
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


def types_table(by_type: Sequence[TypeScores]) -> Html:
    """Cells of each type, and how its predicted profile compares with the measured one."""
    rows: list[list[Any]] = []
    for each in by_type:
        row = [each.name, f"{each.n_control:,}", f"{each.n_predicted:,}", f"{each.n_measured:,}"]
        if (scores := each.scores) is None:
            rows.append([*row, DASH, DASH, DASH])
        else:
            rows.append([*row, number(scores["mse_top"]), number(scores["mse"], 4), number(scores["pearson_shift"])])
    header = ["type", "control", "predicted", "measured", "MSE, top 50 genes", "MSE, all genes", "Pearson of shift"]
    return table(header, rows, caption="Cells of each type, and how its predicted profile compares with the measured.")
