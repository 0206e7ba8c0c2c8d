"""Figures and text of an evaluation of a tokenizer."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from rvqa.evaluation import tokenizer_measures as measures

UNDEFINED = {
    "types": f"No type has {measures.MIN_CELLS} unseen cells; name the column of cell types with --labels",
    "mean_pearson_centered": (
        f"No type with {measures.MIN_CELLS} unseen cells is one that the fit has seen; give files with such types, and "
        "name their column with --labels"
    ),
    "new_types": f"No type with {measures.MIN_CELLS} unseen cells is new to the fit; files of other types have some",
    "variance_pearson": "Too few genes have enough counts, or their variances do not differ",
    "gene_correlation_top_200": "Fewer than three genes vary",
    "ratio": "The latent before quantization explains nothing",
    "empty": f"Fewer than {measures.MIN_CELLS} typed cells have more than {measures.EMPTY} counts",
}
"""Why a single number of a measure is undefined."""

BEHIND = {
    "explained_variance_ratio": "variance",
    "lr_codes_minus_expression_mean": "probes",
    "lr_codes_minus_expression_min": "probes",
    "lr_latent_minus_expression_mean": "probes",
    "coarse_share_two_levels": "levels",
    "first_code_kept_half_depth": "depth",
    "panel_drop_points": "panels",
    "mean_pearson_centered": "populations",
    "variance_pearson": "populations",
}
"""Table behind a figure."""


def grouped(reasons: dict[str, str]) -> list[str]:
    """Each reason once, after the names that it is given for."""
    names: dict[str, list[str]] = {}
    for name, sentence in reasons.items():
        names.setdefault(sentence, []).append(name)
    return [f"{', '.join(named)}: {sentence}" for sentence, named in names.items()]


def text(result: dict[str, Any]) -> str:
    """Tables of a result, as plain text."""
    lines = missing(result, "cells")
    lines += [""] * bool(lines) + ["figures"]
    for name, value in result["figures"].items():
        lines.append(f"  {name:34s} {'not measured' if value is None else f'{value:10.3f}'}")
    lines += [f"  {sentence}" for sentence in missing(result, "figures")]
    codes = result["codes"]
    lines += ["", "perplexity of the codes by level (32 = all used alike)"]
    for name, row in {"all unseen cells": codes["perplexity"], **codes["by_study"]}.items():
        lines.append(f"  {name:40s}" + " ".join(f"{value:5.1f}" for value in row))
    lines += ["", "accuracy of probes taught on the cells of the fit         expression    latent     codes     cells"]
    for name, row in measured(result, "probes").items():
        values = "".join(f"{row[each]['accuracy']:10.3f}" for each in ("expression", "latent", "codes"))
        lines.append(f"  {name:54s}{values}{row['cells']:10,d}")
    lines += [f"  {sentence}" for sentence in missing(result, "probes")]
    lines += ["", "accuracy of the probe on codes by number of levels"]
    for name, row in measured(result, "levels").items():
        lines.append(f"  {name:40s}" + " ".join(f"{value:5.3f}" for value in row))
    lines += [f"  {sentence}" for sentence in missing(result, "levels")]
    for title, key in (
        ("share of the variance of log1p expression that a linear readout explains", "variance"),
        ("share of cells that keep their codes at half depth", "depth"),
        ("types in the latent", "clusters"),
        ("area under the ROC curve of the reconstruction error", "odd_cells"),
        ("decoded populations", "populations"),
        ("codes of cells cut to the panel of another study", "panels"),
    ):
        lines += ["", title]
        for name, row in measured(result, key).items():
            lines.append(f"  {name}")
            lines += [f"    {each:40s} {_shown(value)}" for each, value in row.items()]
        lines += [f"  {sentence}" for sentence in missing(result, key)]
    return "\n".join(lines)


def measured(result: Mapping[str, Any], table: str) -> dict[str, Any]:
    """Rows of a table of the studies that could be measured."""
    return {name: row for name, row in (result[table] or {}).items() if row is not None}


def missing(result: Mapping[str, Any], part: str) -> list[str]:
    """Sentences on what a table lacks, on the "figures" that are not measured, or on "cells" that are not."""
    reasons = result["reasons"]
    if part == "figures":
        lacking = {name: reasons[name] for name, value in result["figures"].items() if value is None}
        return grouped(lacking)
    whole = [reasons[name] for name in ("split" if part == "cells" else part,) if name in reasons]
    inside = {name.removeprefix(f"{part}: "): why for name, why in reasons.items() if name.startswith(f"{part}: ")}
    return whole + grouped(inside)


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        return "  ".join(f"{name} {_shown(each)}" for name, each in value.items())
    return "not measured" if value is None else f"{value:.3f}" if isinstance(value, float) else str(value)


def figures(result: dict[str, Any], new: Sequence[str], reasons: dict[str, str]) -> dict[str, float | None]:
    """Headline numbers; `new` names the studies that share no cell or donor with the fit (all, where there is none).

    What cannot be measured is None and has a reason.
    """
    taken = {name: list(measured(result, name).values()) for name in set(BEHIND.values())}
    probes = [row for name, row in measured(result, "probes").items() if name in new] or taken["probes"]
    gaps = [row["codes"]["accuracy"] - row["expression"]["accuracy"] for row in probes]
    latent = [row["latent"]["accuracy"] - row["expression"]["accuracy"] for row in probes]
    coarse = [row[1] / row[-1] for row in taken["levels"] if len(row) > 1 and row[-1] > 0]
    drops = [each["drop_points"] for rows in taken["panels"] for each in rows.values()]
    decoded = [row for row in taken["populations"] if row["mean_pearson_centered"] is not None]
    found = {
        "perplexity_level1": result["codes"]["perplexity"][0],
        "perplexity_min_2_8": min(result["codes"]["perplexity"][1:], default=None),
        "dead_codes": result["codes"]["dead"],
        "explained_variance_ratio": _mean([row["ratio"] for row in taken["variance"]]),
        "lr_codes_minus_expression_mean": _mean(gaps),
        "lr_codes_minus_expression_min": min(gaps, default=None),
        "lr_latent_minus_expression_mean": _mean(latent),
        "coarse_share_two_levels": min(coarse, default=None),
        "first_code_kept_half_depth": _mean([row["first_code_kept"] for row in taken["depth"]]),
        "panel_drop_points": max(drops, default=None),
        "mean_pearson_centered": _mean([row["mean_pearson_centered"] for row in decoded]),
        "variance_pearson": _mean([row["variance_pearson"] for row in decoded or taken["populations"]]),
    }
    for name, value in found.items():
        if value is None:
            leaf = "ratio" if name == "explained_variance_ratio" else name
            undefined = UNDEFINED.get(leaf, "The tokenizer has too few levels") + "."
            reasons[name] = reasons.get(BEHIND.get(name, ""), undefined)
    return found


def _mean(values: Sequence[float | None]) -> float | None:
    kept = [value for value in values if value is not None]
    return float(np.mean(kept)) if kept else None
