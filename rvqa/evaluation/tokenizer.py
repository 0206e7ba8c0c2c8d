"""`rvqa evaluate tokenizer`: what a tokenizer keeps of cells that no fit has seen, in figures and tables.

The cells of the fit teach probes and readouts, unseen cells are measured; `tokenizer_measures.py` has each measure.
What cannot be measured is None in the result, and `reasons` says why.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from rvqa.data.files.sources import Layers
from rvqa.data.genes import FLOOR, match_columns
from rvqa.data.studies import Study, label_table, read_study, study_files
from rvqa.errors import InputError, quoted
from rvqa.evaluation import splits
from rvqa.evaluation import tokenizer_measures as measures
from rvqa.evaluation.tokenizer_measures import Coded, Comparison, NotMeasured
from rvqa.io.tensors import read_json
from rvqa.language.model import load_tokenizer
from rvqa.tokenizer.model import CellTokenizer

SAME_CELL = 20
"""Genes with counts that two cells must have in common, all with the same counts, to be taken for the same cell."""

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


def evaluate_tokenizer(
    tokenizer: CellTokenizer,
    studies: Sequence[Study],
    split: pd.DataFrame,
    *,
    continuous: CellTokenizer | None = None,
    labels: str = "cell_type",
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
    labels
        Column of obs that the types of the studies were read from, for the reasons.
    seed
        Of draws: cells of large studies, thinning, counts, intervals.
    say
        Told what is done next.

    Returns
    -------
    dict
        `figures`: the headline numbers by name; `codes`, `variance`, `probes`, `levels`, `depth`, `panels`,
        `populations`, `clusters`, `odd_cells`: tables behind them, by study; `reasons`: a sentence for each figure,
        table, study of a table ("probes: STUDY") or number of a study ("populations: STUDY: new_types") that is None,
        for files left out of one comparison, and for cells that are not measured at all ("cells: STUDY").

    Raises
    ------
    rvqa.errors.InputError
        No file of the fit among the studies, or no unseen cell.
    """
    rng = np.random.default_rng(seed)
    reasons: dict[str, str] = {}
    studies = _encodable(tokenizer, studies, reasons)
    fitted, unseen = fitted_and_unseen(studies, split, rng, reasons)
    say(f"encoding {sum(map(len, fitted)):,} fitted and {sum(map(len, unseen)):,} unseen cells")
    taught = [Coded.of(tokenizer, study) for study in fitted]
    tests = [Coded.of(tokenizer, study) for study in unseen]
    entries, levels = tokenizer.config.entries, tokenizer.config.levels
    taught_types = {name for each in taught for name in each.study.label_N} - {""}
    result: dict[str, Any] = {"codes": measures.code_use(tests, entries)}

    def on_axis(test: Coded) -> Comparison:
        return Comparison.of(taught, test.study, tokenizer.axis)

    def by_type(test: Coded) -> Comparison:
        return measures.comparable(taught, test, labels)

    def half_depth(test: Coded, found: Comparison | None) -> dict[str, float]:
        return measures.half_depth(tokenizer, found, test, rng)

    def table(
        name: str,
        title: str,
        measure: Callable[[Coded, Any], Any],
        compare: Callable[[Coded], Any] = lambda test: None,
        of: Sequence[Coded] = tests,
    ) -> None:
        say(title)
        result[name] = _table(name, of, measure, compare, reasons)

    known = [test for test in tests if splits.related(split, test.study)]
    table(
        "variance",
        "explained variance",
        lambda test, found: measures.explained_variance(tokenizer, continuous, found, test, seed),
        on_axis,
        known or tests,
    )
    table("probes", "probes", lambda test, found: measures.probe(found, test, entries, rng), by_type)
    table(
        "levels",
        "levels",
        lambda test, found: [measures.probe_codes(found, test, entries, first + 1) for first in range(levels)],
        by_type,
    )
    table("depth", "half depth", half_depth, lambda test: _or_none(on_axis, test))
    table("panels", "panels", lambda test, found: measures.panels(tokenizer, found, test, studies), by_type)
    table("populations", "populations", lambda test, found: measures.populations(tokenizer, test, taught_types, rng))
    table("clusters", "clusters", lambda test, found: measures.clusters(test, seed, labels))
    table("odd_cells", "odd cells", lambda test, found: measures.odd_cells(tokenizer, test, rng, labels))
    new = [test.study.name for test in tests if not splits.related(split, test.study)]
    result["figures"] = figures(result, new, reasons)
    result["reasons"] = reasons
    return result


def _or_none(compare: Callable[[Coded], Comparison], test: Coded) -> Comparison | None:
    try:
        return compare(test)
    except NotMeasured:
        return None


def _table(
    name: str,
    tests: Sequence[Coded],
    measure: Callable[[Coded, Any], Any],
    compare: Callable[[Coded], Any],
    reasons: dict[str, str],
) -> dict[str, Any] | None:
    """Take a measure of every study: by study, None where it cannot be taken; None alone where it can of none."""
    rows: dict[str, Any] = {}
    missing: dict[str, str] = {}
    for test in tests:
        study = test.study.name
        try:
            found = compare(test)
            rows[study] = _defined(measure(test, found), f"{name}: {study}", reasons)
        except NotMeasured as error:
            rows[study], missing[study] = None, str(error)
            continue
        if found is not None and found.left_out:
            reasons[f"{name}: {study}"] = (
                f"Compared without the cells of {quoted(found.left_out)}, where too few of its genes are measured."
            )
    if len(missing) < len(rows):
        reasons |= {f"{name}: {study}": sentence for study, sentence in missing.items()}
        return rows
    same = set(missing.values())
    reasons[name] = same.pop() if len(same) == 1 < len(missing) else " ".join(grouped(missing))
    return None


def grouped(reasons: dict[str, str]) -> list[str]:
    """Each reason once, after the names that it is given for."""
    names: dict[str, list[str]] = {}
    for name, sentence in reasons.items():
        names.setdefault(sentence, []).append(name)
    return [f"{', '.join(named)}: {sentence}" for sentence, named in names.items()]


def _defined(value: Any, name: str, reasons: dict[str, str]) -> Any:
    """The same with None in place of NaN, and a reason for each."""
    if isinstance(value, dict) and value:
        return {key: _defined(each, f"{name}: {key}", reasons) for key, each in value.items()}
    if value == {} or (isinstance(value, float) and not np.isfinite(value)):
        reasons[name] = UNDEFINED.get(name.rsplit(": ", 1)[-1], "It is not defined for these cells") + "."
        return None
    return value


def _encodable(tokenizer: CellTokenizer, studies: Sequence[Study], reasons: dict[str, str]) -> list[Study]:
    """Studies and cells that the tokenizer can read, at its depth; reasons name the others."""
    kept = []
    for study in studies:
        try:
            study.alignment(tokenizer.axis)
        except InputError as error:
            reasons[f"cells: {study.name}"] = f"It cannot be encoded. {error}"
            continue
        if not (readable_N := measures.readable(tokenizer, study)).all():
            reasons[f"cells: {study.name}"] = (
                f"{(~readable_N).sum():,} of its {len(study):,} cells have no counts in any gene that the tokenizer "
                "knows, and are left out."
            )
            study = study.take(readable_N)
        if len(study):
            kept.append(study.at_depth(tokenizer.shares))
    return kept


def fitted_and_unseen(
    studies: Sequence[Study], split: pd.DataFrame, rng: np.random.Generator, reasons: dict[str, str] | None = None
) -> tuple[list[Study], list[Study]]:
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


def same_cells(study: Study, seen: Sequence[Study]) -> np.ndarray:
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


def evaluate_directory(
    model: str | Path,
    data: Sequence[str | Path],
    *,
    split: str | Path | None = None,
    continuous: str | Path | None = None,
    labels: str = "cell_type",
    donor: str = "donor",
    layer: str | Layers | None = None,
    seed: int = 0,
    say: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """`evaluate_tokenizer` for a directory that `rvqa fit-tokenizer` or `rvqa fit` wrote, on files or folders of files.

    `rvqa fit-tokenizer` records every cell of the fit. `rvqa fit` records the names and sizes of its files alone: all
    of these must be among the data, all of their cells count as fitted, and so do the cells of their donors in other
    files. In either case a cell with the counts of a fitted one is seen.

    Parameters
    ----------
    model
        The directory.
    data
        Files or folders of files, those of the fit among them.
    split
        Table of cells and roles (.parquet, as `rvqa fit-tokenizer` writes it) for a directory without one.
    continuous, seed, say
        As for `evaluate_tokenizer`; `continuous` is a directory.
    labels, donor, layer
        Where types, donors and counts are in the files.

    Raises
    ------
    rvqa.errors.InputError
        As `evaluate_tokenizer`; or a directory without a record of what it was fitted on, or one that does not fit the
        split or the data.
    """
    path = Path(model)
    tokenizer = load_tokenizer(path)
    alone = None if continuous is None else load_tokenizer(continuous)
    references = _references(path)
    given = _recorded(path, split, references)
    table = label_table()
    studies = [read_study(file, labels=labels, donor=donor, layer=layer, table=table) for file in study_files(data)]
    reasons: dict[str, str] = {}
    if given is None:
        given = splits.make_split(_files_of_the_fit(path, references, studies))
        reasons["split"] = (
            f"{path} does not record which cells it was fitted on: all cells of {quoted(references)} count as fitted, "
            "and cells of their donors in other files as seen. Give --split if some of them were held out."
        )
        say(reasons["split"])
    result = evaluate_tokenizer(tokenizer, studies, given, continuous=alone, labels=labels, seed=seed, say=say)
    result["reasons"] = reasons | result["reasons"]
    if (path / "fit.json").is_file():
        result["fit"] = read_json(path / "fit.json")
    elif references:
        result["fit"] = {
            "files": {name: {"cells": cells} for name, cells in references.items()},
            "genes": len(tokenizer.axis),
        }
    result["figures"]["fit_seconds"] = result.get("fit", {}).get("fit_seconds")
    if result["figures"]["fit_seconds"] is None:
        result["reasons"]["fit_seconds"] = f"{path} does not record how long its fit took; `rvqa fit-tokenizer` does."
    return result


def _references(path: Path) -> dict[str, int]:
    """Cells of each file of the fit, by name, of a directory that `rvqa fit` wrote; {} for another directory."""
    if not (path / "rvqa.json").is_file():
        return {}
    listed = read_json(path / "rvqa.json", {"training": dict})["training"].get("references", [])
    try:
        return {str(each["name"]): int(each["cells"]) for each in listed}
    except (TypeError, KeyError, ValueError):
        return {}


def _recorded(path: Path, split: str | Path | None, references: dict[str, int]) -> pd.DataFrame | None:
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


def _files_of_the_fit(path: Path, references: dict[str, int], studies: Sequence[Study]) -> list[Study]:
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
