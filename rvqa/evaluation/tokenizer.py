"""`rvqa evaluate tokenizer`: what a tokenizer keeps of cells that no fit has seen, in figures and tables.

The cells of the fit teach probes and readouts, unseen cells are measured; `tokenizer_measures.py` and
`tokenizer_probes.py` have each measure. What cannot be measured is None in the result, and `reasons` says why.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from rvqa.data import splits
from rvqa.data.cells import Cells
from rvqa.data.reading import Layers
from rvqa.data.studies import label_table, read_study, study_files
from rvqa.errors import InputError, quoted
from rvqa.evaluation import tokenizer_measures as measures
from rvqa.evaluation import tokenizer_probes as probes
from rvqa.evaluation.tokenizer_figures import UNDEFINED, figures, grouped
from rvqa.evaluation.tokenizer_measures import Coded, Comparison, NotMeasured
from rvqa.evaluation.unseen import files_of_the_fit, fitted_and_unseen, recorded
from rvqa.io.tensors import read_json
from rvqa.language.model import load_tokenizer
from rvqa.tokenizer.model import CellTokenizer


def evaluate_tokenizer(
    tokenizer: CellTokenizer,
    studies: Sequence[Cells],
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
        Which cells were fitted (`rvqa.data.splits`).
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
        return probes.half_depth(tokenizer, found, test, rng)

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
    table("probes", "probes", lambda test, found: probes.probe(found, test, entries, rng), by_type)
    table(
        "levels",
        "levels",
        lambda test, found: [probes.probe_codes(found, test, entries, first + 1) for first in range(levels)],
        by_type,
    )
    table("depth", "half depth", half_depth, lambda test: _or_none(on_axis, test))
    table("panels", "panels", lambda test, found: probes.panels(tokenizer, found, test, studies), by_type)
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


def _defined(value: Any, name: str, reasons: dict[str, str]) -> Any:
    """The same with None in place of NaN, and a reason for each."""
    if isinstance(value, dict) and value:
        return {key: _defined(each, f"{name}: {key}", reasons) for key, each in value.items()}
    if value == {} or (isinstance(value, float) and not np.isfinite(value)):
        reasons[name] = UNDEFINED.get(name.rsplit(": ", 1)[-1], "It is not defined for these cells") + "."
        return None
    return value


def _encodable(tokenizer: CellTokenizer, studies: Sequence[Cells], reasons: dict[str, str]) -> list[Cells]:
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
    given = recorded(path, split, references)
    table = label_table()
    studies = [read_study(file, labels=labels, donor=donor, layer=layer, table=table) for file in study_files(data)]
    reasons: dict[str, str] = {}
    if given is None:
        given = splits.make_split(files_of_the_fit(path, references, studies))
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
