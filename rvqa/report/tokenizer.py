"""The page of `rvqa evaluate tokenizer --report`: figures and tables of a result, with bars beside the numbers."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rvqa.evaluation.tokenizer_figures import measured, missing
from rvqa.report.figures import bar, note, tiles
from rvqa.report.page import Html, Report, el, join, number, table

HEADLINES = {
    "perplexity_level1": "perplexity, level 1",
    "perplexity_min_2_8": "least perplexity, levels 2-8",
    "dead_codes": "codes no unseen cell has",
    "explained_variance_ratio": "variance kept, of a continuous latent's",
    "lr_latent_minus_expression_mean": "latents minus expression, accuracy",
    "lr_codes_minus_expression_mean": "codes minus expression, accuracy",
    "first_code_kept_half_depth": "first codes kept at half depth",
    "panel_drop_points": "points lost on another panel, most",
    "mean_pearson_centered": "decoded profiles, centred Pearson",
}


def tokenizer_report(
    result: Mapping[str, Any], path: str | Path, *, title: str, command: str | None = None, force: bool = False
) -> None:
    """Write the page.

    Parameters
    ----------
    result
        What `rvqa.evaluation.tokenizer.evaluate_directory` gives.
    path
        File to write, .html.
    title, command
        Shown on the page.
    force
        Replace a file that exists.

    Raises
    ------
    rvqa.errors.InputError
        A path that cannot be written.
    """
    fit = result.get("fit", {})
    facts = {
        "Fitted on": ", ".join(fit.get("files", {})) or "not recorded",
        "Held-out donors": ", ".join(fit.get("held_out_donors", [])) or "none",
        "Genes of the axis": f"{fit['genes']:,}" if "genes" in fit else "not recorded",
        "Seconds to fit": number(fit["fit_seconds"], 0) if "fit_seconds" in fit else "not recorded",
    }
    report = Report(title, lead="Measured on cells that no fit has seen.", facts=facts, command=command)
    figures = {label: number(result["figures"][name]) for name, label in HEADLINES.items() if name in result["figures"]}
    report.add("Figures", tiles(figures), *_notes(result, "cells"), *_notes(result, "figures"))
    report.add(
        "Codes in use",
        _levels(result["codes"]["by_study"], "Perplexity of the codes by level (32: all used alike)", 32, 1),
    )
    levels = measured(result, "levels")
    report.add(
        "Cell types",
        _probes(measured(result, "probes")),
        *_notes(result, "probes"),
        _levels(levels, "Accuracy by number of levels", 1, 3),
        *_notes(result, "levels"),
    )
    for heading, key, caption in (
        ("Variance of expression", "variance", "Share of it that a linear readout explains"),
        ("Half depth", "depth", "Share of cells that keep their codes, and their cluster of 32 on PCA"),
        ("Odd cells", "odd_cells", "Area under the ROC curve with which the reconstruction error finds them"),
    ):
        report.add(heading, _named(measured(result, key), caption), *_notes(result, key))
    populations = measured(result, "populations")
    totals = {name: {what: row[what] for what in row if what != "types"} for name, row in populations.items()}
    types = {name: row["types"] or {} for name, row in populations.items()}
    report.add(
        "Decoded populations",
        _named(totals, "Drawn counts beside the true ones; the global mean profile scores 0"),
        _named(types, "Mean profile of each type, Pearson after subtracting the global mean"),
        *_notes(result, "populations"),
    )
    clusters = {
        f"{name}, {what}": row for name, rows in measured(result, "clusters").items() for what, row in rows.items()
    }
    report.add("Types in the latent", _named(clusters, "How well known types separate"), *_notes(result, "clusters"))
    cut = {
        name: {panel: row["accuracy"] for panel, row in rows.items()}
        for name, rows in measured(result, "panels").items()
    }
    report.add(
        "Panel of another study",
        _named(cut, "Accuracy of the probe on codes of cells cut to that panel"),
        *_notes(result, "panels"),
    )
    report.write(path, force=force)


def _notes(result: Mapping[str, Any], part: str) -> list[Html]:
    """Why something is missing, a paragraph a sentence."""
    return [note(sentence) for sentence in missing(result, part)]


def _levels(rows: Mapping[str, Any], caption: str, most: float, digits: int) -> Html:
    """One row a study, one column a level, with a bar in each; nothing without rows."""
    if not rows:
        return join([])
    depth = max((len(row) for row in rows.values()), default=0)
    head = ["study", *(f"{level}" for level in range(1, depth + 1))]
    body = [
        [name, *(el("span", number(value, digits), bar(value, most)) for value in row)] for name, row in rows.items()
    ]
    return table(head, body, caption=caption)


def _probes(rows: Mapping[str, Any]) -> Html:
    if not rows:
        return join([])
    head = ["unseen cells", "cells", "expression", "quantized latents", "one-hot codes", "majority"]
    body = []
    for name, row in rows.items():
        cells = []
        for method in ("expression", "latent", "codes", "majority"):
            low_high = row[method].get("interval")
            spread = f" ({number(low_high[0])} to {number(low_high[1])})" if low_high else ""
            cells.append(el("span", number(row[method]["accuracy"]) + spread, bar(row[method]["accuracy"], 1)))
        body.append([name, f"{row['cells']:,}", *cells])
    return table(head, body, caption="Accuracy of logistic regressions taught on the cells of the fit, 95 % interval")


def _named(rows: Mapping[str, Mapping[str, Any]], caption: str) -> Html:
    """One row a study and quantity, with its bar from -1 to 1; nothing without rows."""
    body = [
        [f"{name}: {what}", number(value), "" if value is None else bar(value, 1.0, signed=True)]
        for name, row in rows.items()
        for what, value in row.items()
    ]
    if not body:
        return join([])
    return table(["study and quantity", "value", "-1 to 1"], body, caption=caption)
