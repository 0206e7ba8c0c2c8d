"""Figures: cells on a plane, genes by predicted and true shift, codebook use, confusion, bars.

Scatter plots go to the script as 16-bit positions (65,536 steps a side), so 20,000 cells take a quarter megabyte.
N cells drawn, M levels, K entries of a codebook.
"""

import base64
import importlib.util
import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from anndata import AnnData

from rvqa.evaluation.metrics import perplexity
from rvqa.report import colours
from rvqa.report.page import Html, Report, el, join, number, scroll, table

MAX_POINTS = 20_000
"""Cells that are drawn at most; the rest would hide each other."""

_STEPS = 65_535
_FEWEST_UMAP = 30
_USE = (0.0, 0.25, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0)
"""Lower ends of the shades of codebook use, in parts of even use."""


@dataclass(frozen=True)
class Colouring:
    """One colouring of the drawn cells."""

    title: str
    names: list[str]
    """Of the series."""
    index_N: np.ndarray
    """Series of every cell."""

    @classmethod
    def of(cls, title: str, values: Sequence[str] | np.ndarray, names: Sequence[str]) -> "Colouring":
        """Series by value: the same names give the same markers in every figure."""
        at = {name: place for place, name in enumerate(names)}
        return cls(title, list(names), np.array([at[value] for value in values], dtype=np.uint16))


def drawn_cells(n_cells: int) -> np.ndarray:
    """Cells to draw, in an order that puts no type on top: at most `MAX_POINTS`, always the same."""
    return np.random.default_rng(0).permutation(n_cells)[:MAX_POINTS]


def coordinates(latent_ND: np.ndarray, ready: Any = None) -> tuple[np.ndarray, str]:
    """Positions float64 [N, 2] of cells on a plane, and how they were found.

    Parameters
    ----------
    latent_ND
        Quantized latents.
    ready
        Positions found before, as in `obsm["X_umap"]`; used when they are finite numbers.
    """
    given = np.asarray(ready) if ready is not None else np.zeros((0, 0), dtype=object)
    if given.ndim == 2 and given.shape[1] >= 2 and given.dtype.kind in "iuf" and np.isfinite(given[:, :2]).all():
        return given[:, :2].astype(np.float64), "the file's own UMAP, obsm['X_umap']"
    if len(latent_ND) >= _FEWEST_UMAP and importlib.util.find_spec("umap") is not None:
        try:
            return _umap(latent_ND), "UMAP of the quantized latents, X_rvqa (seed 0)"
        except ImportError:  # installed, but not for this NumPy or numba
            pass
    centred = latent_ND - latent_ND.mean(0, dtype=np.float64)
    left, size, _ = np.linalg.svd(centred, full_matrices=False)
    planar = np.zeros((len(latent_ND), 2))
    width = min(2, len(size))
    planar[:, :width] = left[:, :width] * size[:width]
    return planar, "the first two principal components of the quantized latents, X_rvqa"


def _umap(latent_ND: np.ndarray) -> np.ndarray:
    threads = torch.get_num_threads()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from umap import UMAP

            reducer = UMAP(min_dist=0.4, init="pca", n_epochs=200, random_state=0, n_jobs=1)
            return reducer.fit_transform(latent_ND).astype(np.float64)
    finally:
        torch.set_num_threads(threads)  # numba sets that of OpenMP, which torch shares


def cells_figure(
    report: Report,
    positions_N2: np.ndarray,
    colourings: Sequence[Colouring],
    *,
    caption: str,
    confidence_N: np.ndarray | None = None,
) -> Html:
    """Cells on a plane, once for each colouring, labelled where each series lies."""
    low, high = positions_N2.min(0), positions_N2.max(0)
    unit_N2 = (positions_N2 - low) / np.where(high > low, high - low, 1.0)
    data: dict[str, Any] = {
        "xy": _packed(np.round(unit_N2 * _STEPS), np.uint16),
        "panels": [
            {
                "title": each.title,
                "names": each.names,
                "index": _packed(each.index_N, np.uint16),
                "labels": _medians(unit_N2, each),
            }
            for each in colourings
        ],
    }
    if confidence_N is not None:
        data["confidence"] = _packed(np.round(100 * np.clip(np.nan_to_num(confidence_N), 0, 1)), np.uint8)
    number_ = report.figure(data)
    panels = []
    for at, each in enumerate(colourings):
        sizes = np.bincount(each.index_N, minlength=len(each.names))
        shown = ", ".join(f"{each.names[i]}: {sizes[i]:,}" for i in np.argsort(-sizes, kind="stable")[:12] if sizes[i])
        n_more = np.count_nonzero(sizes) - 12
        more = f" and {n_more} more" if n_more > 0 else ""
        label = f"Scatter plot of {len(positions_N2):,} cells by {each.title}. Cells: {shown}{more}."
        panels.append(
            el(
                "div",
                el("h4", f"By {each.title}"),
                _canvas(number_, at, label, "cells"),
                _legend(number_, at, each.names, sizes),
                class_="panel",
            )
        )
    return el("figure", el("div", *panels, class_="panels"), el("figcaption", caption))


def _medians(unit_N2: np.ndarray, colouring: Colouring) -> list[list[Any]]:
    """Name and place of every series, most cells first: its cell nearest to its median."""
    sizes = np.bincount(colouring.index_N, minlength=len(colouring.names))
    labels = []
    for at in np.argsort(-sizes, kind="stable")[: np.count_nonzero(sizes)]:
        inside = unit_N2[colouring.index_N == at]
        nearest = inside[np.argmin(((inside - np.median(inside, axis=0)) ** 2).sum(1))]
        labels.append([colouring.names[at], *(round(float(value), 4) for value in nearest)])
    return labels


def genes_figure(
    report: Report, genes: Sequence[str], predicted_G: np.ndarray, true_G: np.ndarray, top: np.ndarray, *, caption: str
) -> Html:
    """Predicted against true shift of every gene with the line where they agree; the top genes marked and named."""
    shifts_G2 = np.stack([true_G, predicted_G], axis=1)
    span = max(float(np.ptp(shifts_G2)), 1e-3)
    low, high = float(shifts_G2.min()) - 0.04 * span, float(shifts_G2.max()) + 0.08 * span
    index_G = np.zeros(len(genes), dtype=np.uint16)
    index_G[top] = 1
    order = np.argsort(index_G, kind="stable")  # the top genes are drawn last
    unit_G2 = (shifts_G2 - low) / (high - low)
    series = Colouring("genes", ["other genes", f"{len(top)} top genes"], index_G[order])
    strongest = top[np.argsort(-np.abs(true_G[top]), kind="stable")][:18]
    at = report.figure(
        {
            "xy": _packed(np.round(unit_G2[order] * _STEPS), np.uint16),
            "points": [str(genes[i]) for i in order],
            "axes": {"low": low, "high": high, "ticks": _ticks(low, high), "x": "true shift", "y": "predicted shift"},
            "panels": [
                {
                    "title": "genes",
                    "names": series.names,
                    "index": _packed(series.index_N, np.uint16),
                    "labels": [[str(genes[i]), *(round(float(v), 4) for v in unit_G2[i])] for i in strongest],
                }
            ],
        }
    )
    named = ", ".join(f"{genes[i]} {true_G[i]:+.2f} (predicted {predicted_G[i]:+.2f})" for i in strongest[:8])
    label = (
        f"Scatter plot of the predicted against the true shift of {len(genes):,} genes. Strongest true shifts: {named}."
    )
    sizes = np.bincount(series.index_N, minlength=2)
    return el(
        "figure",
        el("div", _canvas(at, 0, label, "genes"), _legend(at, 0, series.names, sizes), class_="panel single"),
        el("figcaption", caption),
    )


def _ticks(low: float, high: float) -> list[float]:
    """At most seven round numbers between two."""
    decade = 10.0 ** math.floor(math.log10(high - low))
    step = next(decade * part for part in (0.2, 0.5, 1, 2) if (high - low) / (decade * part) <= 6)
    return [float(f"{step * i:.6g}") for i in range(math.ceil(low / step), math.floor(high / step) + 1)]


def _packed(values: np.ndarray, dtype: Any) -> str:
    return base64.b64encode(np.ascontiguousarray(values, dtype=np.dtype(dtype).newbyteorder("<")).tobytes()).decode()


def _canvas(figure: int, panel: int, label: str, kind: str) -> Html:
    canvas = el("canvas", role="img", aria_label=label, data_figure=figure, data_panel=panel)
    return el("div", canvas, el("div", class_="tip", aria_hidden="true", hidden=True), class_=f"plot {kind}")


def _legend(figure: int, panel: int, names: Sequence[str], sizes: np.ndarray) -> Html:
    """Buttons that single out a series: marker, name, number of points."""
    entries = []
    for at, name in enumerate(names):
        if not sizes[at]:
            continue
        entry = el(
            "button",
            marker(at),
            el("span", name),
            el("small", f"{sizes[at]:,}"),
            type="button",
            aria_pressed="false",
            data_figure=figure,
            data_panel=panel,
            data_series=at,
        )
        entries.append(el("li", entry))
    return el("ul", *entries, class_="legend", aria_label="Series; press one to single it out")


def marker(at: int) -> Html:
    """Marker of a series as a small SVG."""
    hue, shape = colours.series(at)
    path = el("path", d=list(colours.SHAPES.values())[shape], class_=f"c{hue}")
    return el("svg", path, viewBox="-1.5 -1.5 3 3", class_="marker", aria_hidden="true")


def codebook_figure(codes_NM: np.ndarray, *, entries: int = 32) -> Html:
    """Use of every level's codes as a strip, beside the perplexity."""
    even = len(codes_NM) / entries
    rows = []
    for level, spread in enumerate(perplexity(codes_NM, entries)):
        counts_K = np.bincount(codes_NM[:, level], minlength=entries)
        shade_K = np.searchsorted(_USE, counts_K / even, side="right")  # 1 to 8
        cells = [
            el(
                "rect",
                el("title", f"code {k}: {counts_K[k]:,} cells"),
                x=k + 0.04,
                y=0.06,
                width=0.92,
                height=0.88,
                class_=f"q{shade_K[k]}" if counts_K[k] else "none",
            )
            for k in range(entries)
        ]
        used, most = int((counts_K > 0).sum()), int(counts_K.argmax())
        label = f"Level {level + 1}: {used} of {entries} codes used, code {most} by {counts_K[most]:,} cells."
        strip = el(
            "svg",
            *cells,
            viewBox=f"0 0 {entries} 1",
            preserveAspectRatio="none",
            class_="strip",
            role="img",
            aria_label=label,
        )
        rows.append([level + 1, strip, f"{used}", number(float(spread), 1)])
    bounds = [f"below {_USE[1]:g}", *(f"{low:g} to {high:g}" for low, high in pairwise(_USE[1:]))]
    bounds.append(f"{_USE[-1]:g} or more")
    keys = [el("li", el("span", class_="swatch none"), "unused")]
    keys += [el("li", el("span", class_=f"swatch q{at + 1}"), bound) for at, bound in enumerate(bounds)]
    caption = f"Each box is a code of the level, 0 at the left. Were all used alike, perplexity would be {entries}."
    strips = table(["level", f"codes 0 to {entries - 1}", "used", "perplexity"], rows, caption=caption)
    key = el("ul", *keys, class_="keys", aria_label="Shades: times as often as in even use")
    return el("div", strips, el("p", "Shade: times as often as in even use", class_="label"), key, class_="codebook")


def confusion_figure(counts_RC: np.ndarray, rows: Sequence[Any], columns: Sequence[str], *, caption: str) -> Html:
    """Confusion matrix as a table: counts as text, shaded by their share of the row."""
    total_R1 = np.maximum(counts_RC.sum(1, keepdims=True), 1)
    shade_RC = np.minimum((counts_RC / total_R1 * len(colours.SEQUENTIAL)).astype(int), len(colours.SEQUENTIAL) - 1)
    head = el(
        "tr",
        el("th", "truth ↓  predicted →", scope="col"),
        *(el("th", el("span", name), scope="col", class_="upright") for name in columns),
        el("th", el("span", "cells"), scope="col", class_="upright"),
    )
    body = []
    for r, name in enumerate(rows):
        cells = [
            el(
                "td",
                f"{count:,}" if count else "·",
                class_=f"q{shade}" if count else "none",
                title=f"{count / total_R1[r, 0]:.1%} of the row",
            )
            for count, shade in zip(counts_RC[r], shade_RC[r], strict=True)
        ]
        body.append(el("tr", el("th", name, scope="row"), *cells, el("td", f"{counts_RC[r].sum():,}", class_="total")))
    matrix = el("table", el("caption", caption), el("thead", head), el("tbody", *body), class_="confusion fit")
    return scroll(matrix, "confusion matrix, scrolls sideways where it is wider than the window")


def bar(value: float, most: float, *, signed: bool = False) -> Html:
    """Small horizontal bar of a number that stands beside it; signed ones grow from the middle."""
    length = min(abs(value) / most, 1.0) if most > 0 and value == value else 0.0
    if signed:
        box = {"x": 50 if value >= 0 else 50 - 50 * length, "width": 50 * length}
    else:
        box = {"x": 0, "width": 100 * length}
    shape = el("rect", x=f"{box['x']:.2f}", y=1, width=f"{box['width']:.2f}", height=8)
    axis = el("path", d="M50 0V10", class_="axis") if signed else join([])
    return el("svg", shape, axis, viewBox="0 0 100 10", preserveAspectRatio="none", class_="bar", aria_hidden="true")


def tiles(figures: dict[str, str]) -> Html:
    """The few figures that matter, large."""
    return el("dl", *(el("div", el("dt", name), el("dd", value)) for name, value in figures.items()), class_="tiles")


def note(*parts: Any) -> Html:
    """Paragraph of small print."""
    return el("p", join(parts), class_="note")


def cell_positions(adata: AnnData, rows: np.ndarray, key_added: str) -> tuple[np.ndarray, str]:
    """`coordinates` of some cells of an encoded file."""
    ready = adata.obsm.get("X_umap")
    return coordinates(
        np.asarray(adata.obsm[f"X_{key_added}"])[rows], None if ready is None else np.asarray(ready)[rows]
    )
