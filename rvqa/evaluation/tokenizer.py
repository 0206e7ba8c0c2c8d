"""`rvqa evaluate tokenizer`: what a tokenizer keeps of cells that no fit has seen, in figures and tables.

The cells of the fit teach probes and readouts, unseen cells are measured; `tokenizer_measures.py` has each measure.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from rvqa.checkpoint import read_json
from rvqa.errors import InputError
from rvqa.evaluation import splits
from rvqa.evaluation import tokenizer_measures as measures
from rvqa.evaluation.studies import Study, label_table, read_study, study_files
from rvqa.tokenizer import CellTokenizer


def evaluate_tokenizer(
    tokenizer: CellTokenizer,
    studies: Sequence[Study],
    split: pd.DataFrame,
    *,
    continuous: CellTokenizer | None = None,
    seed: int = 0,
    say: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Measure a tokenizer on cells that no fit has seen.

    Parameters
    ----------
    tokenizer
        Fitted.
    studies
        Files of the fit, and others.
    split
        Which cells were fitted (`rvqa.evaluation.splits`).
    continuous
        The same recipe fitted without codebooks, for the share of variance that codes keep.
    seed
        Of draws: cells of large studies, thinning, counts, intervals.
    say
        Told what is done next.

    Returns
    -------
    dict
        `figures`: the headline numbers by name; `codes`, `variance`, `probes`, `levels`, `depth`, `panels`,
        `populations`, `clusters`, `odd_cells`: tables behind them, by study.

    Raises
    ------
    rvqa.errors.InputError
        No file of the fit among the studies, or no unseen cell.
    """
    rng = np.random.default_rng(seed)
    studies = [study.at_depth(tokenizer.shares) for study in studies]
    fitted, unseen = fitted_and_unseen(studies, split, rng)
    say(f"encoding {sum(map(len, fitted)):,} fitted and {sum(map(len, unseen)):,} unseen cells")
    taught = [measures.Coded.of(tokenizer, study) for study in fitted]
    tests = [measures.Coded.of(tokenizer, study) for study in unseen]
    result: dict[str, Any] = {"codes": measures.code_use(tests, tokenizer.config.entries)}
    say("explained variance")
    known = [test for test in tests if splits.related(split, test.study)]
    result["variance"] = measures.explained_variance(tokenizer, continuous, taught, known or tests, seed)
    say("probes")
    labelled = [each for each in taught if (each.study.label_N != "").any()]
    entries = tokenizer.config.entries
    result["probes"] = {
        test.study.name: measures.probe(labelled, test, entries, rng)
        for test in tests
        if measures.can_probe(labelled, test)
    }
    say("levels")
    result["levels"] = {
        test.study.name: [
            measures.probe_codes(labelled, test, entries, levels) for levels in range(1, len(test.codes_NM[0]) + 1)
        ]
        for test in tests
        if measures.can_probe(labelled, test)
    }
    say("half depth")
    result["depth"] = {test.study.name: measures.half_depth(tokenizer, taught, test, rng) for test in tests}
    say("panels")
    result["panels"] = measures.panels(tokenizer, labelled, tests, studies, entries)
    say("populations")
    taught_types = {name for each in taught for name in each.study.label_N} - {""}
    result["populations"] = {
        test.study.name: measures.populations(tokenizer, test, taught_types, rng) for test in tests
    }
    say("clusters")
    result["clusters"] = {
        test.study.name: measures.clusters(test, seed) for test in tests if measures.n_types(test.study) > 1
    }
    say("odd cells")
    result["odd_cells"] = {
        test.study.name: measures.odd_cells(tokenizer, test, rng) for test in tests if measures.n_types(test.study) > 1
    }
    result["figures"] = figures(result, [test.study.name for test in tests if not splits.related(split, test.study)])
    return result


def fitted_and_unseen(
    studies: Sequence[Study], split: pd.DataFrame, rng: np.random.Generator
) -> tuple[list[Study], list[Study]]:
    """Cells that were fitted, and those no fit has seen that are measured, of the files with any.

    Raises
    ------
    rvqa.errors.InputError
        No file of the fit among the studies, or no unseen cell.
    """
    fitted = [study.take(splits.rows_of(split, study, splits.FIT)) for study in studies]
    fitted = [study for study in fitted if len(study)]
    unseen = [study.take(measures.some(splits.unseen_rows(split, study), rng)) for study in studies]
    unseen = [study for study in unseen if len(study) >= measures.MIN_CELLS]
    if not fitted or not unseen:
        missing = "file of the fit" if not fitted else f"file with {measures.MIN_CELLS} unseen cells"
        raise InputError(f"Among {', '.join(study.name for study in studies)} is no {missing}. Give one more file.")
    return fitted, unseen


def evaluate_directory(
    model: str | Path,
    data: Sequence[str | Path],
    *,
    continuous: str | Path | None = None,
    labels: str = "cell_type",
    donor: str = "donor",
    layer: str | None = None,
    seed: int = 0,
    say: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """`evaluate_tokenizer` for a directory that `rvqa fit-tokenizer` wrote, on files or folders of files.

    Raises
    ------
    rvqa.errors.InputError
        As `evaluate_tokenizer`; or a directory without a record of the cells it was fitted on.
    """
    path = Path(model)
    tokenizer = CellTokenizer.from_pretrained(path)
    if not (path / "split.parquet").is_file():
        raise InputError(
            f"{path} does not say which cells it was fitted on (split.parquet), so none can be called unseen. Give a "
            "directory that `rvqa fit-tokenizer` wrote."
        )
    split = splits.read_split(path / "split.parquet")
    alone = None if continuous is None else CellTokenizer.from_pretrained(continuous)
    table = label_table()
    studies = [read_study(file, labels=labels, donor=donor, layer=layer, table=table) for file in study_files(data)]
    result = evaluate_tokenizer(tokenizer, studies, split, continuous=alone, seed=seed, say=say)
    if (path / "fit.json").is_file():
        result["fit"] = read_json(path / "fit.json")
        result["figures"]["fit_seconds"] = result["fit"].get("fit_seconds", float("nan"))
    return result


def text(result: dict[str, Any]) -> str:
    """Tables of a result, as plain text."""
    lines = ["figures"]
    lines += [f"  {name:34s} {value:10.3f}" for name, value in result["figures"].items()]
    codes = result["codes"]
    lines += ["", "perplexity of the codes by level (32 = all used alike)"]
    for name, row in {"all unseen cells": codes["perplexity"], **codes["by_study"]}.items():
        lines.append(f"  {name:40s}" + " ".join(f"{value:5.1f}" for value in row))
    lines += ["", "accuracy of probes taught on the cells of the fit         expression    latent     codes     cells"]
    for name, row in result["probes"].items():
        values = "".join(f"{row[each]['accuracy']:10.3f}" for each in ("expression", "latent", "codes"))
        lines.append(f"  {name:54s}{values}{row['cells']:10,d}")
    lines += ["", "accuracy of the probe on codes by number of levels"]
    lines += [f"  {name:40s}" + " ".join(f"{value:5.3f}" for value in row) for name, row in result["levels"].items()]
    for title, key in (
        ("share of the variance of log1p expression that a linear readout explains", "variance"),
        ("share of cells that keep their codes at half depth", "depth"),
        ("types in the latent", "clusters"),
        ("area under the ROC curve of the reconstruction error", "odd_cells"),
        ("decoded populations", "populations"),
        ("codes of cells cut to the panel of another study", "panels"),
    ):
        lines += ["", title]
        for name, row in result[key].items():
            lines.append(f"  {name}")
            lines += [f"    {each:40s} {_shown(value)}" for each, value in row.items()]
    return "\n".join(lines)


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        return "  ".join(f"{name} {_shown(each)}" for name, each in value.items())
    return f"{value:.3f}" if isinstance(value, float) else str(value)


def figures(result: dict[str, Any], new: Sequence[str]) -> dict[str, float]:
    """Headline numbers; `new` names the studies that share no cell or donor with the fit (all, where there is none)."""
    probes = {name: row for name, row in result["probes"].items() if name in new} or result["probes"]
    gaps = [row["codes"]["accuracy"] - row["expression"]["accuracy"] for row in probes.values()]
    latent = [row["latent"]["accuracy"] - row["expression"]["accuracy"] for row in probes.values()]
    coarse = [row[1] / row[-1] for row in result["levels"].values()]
    drops = [each["drop_points"] for rows in result["panels"].values() for each in rows.values()]
    decoded = [row for row in result["populations"].values() if np.isfinite(row["mean_pearson_centered"])]
    means = [row["mean_pearson_centered"] for row in decoded]
    spreads = [row["variance_pearson"] for row in decoded]
    return {
        "perplexity_level1": result["codes"]["perplexity"][0],
        "perplexity_min_2_8": min(result["codes"]["perplexity"][1:], default=np.nan),
        "dead_codes": result["codes"]["dead"],
        "explained_variance_ratio": measures.mean_of([row["ratio"] for row in result["variance"].values()]),
        "lr_codes_minus_expression_mean": measures.mean_of(gaps),
        "lr_codes_minus_expression_min": min(gaps, default=np.nan),
        "lr_latent_minus_expression_mean": measures.mean_of(latent),
        "coarse_share_two_levels": min(coarse, default=np.nan),
        "first_code_kept_half_depth": measures.mean_of([row["first_code_kept"] for row in result["depth"].values()]),
        "panel_drop_points": max(drops, default=np.nan),
        "mean_pearson_centered": measures.mean_of(means),
        "variance_pearson": measures.mean_of(spreads),
    }
