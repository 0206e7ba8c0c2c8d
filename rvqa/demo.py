"""`rvqa demo`: the whole path on real cells, with the baselines beside it.

With `RVQA_DATA_DIR` set: PBMC3k and Kang et al. 2018. Two donors and the interferon-treated
cells of one type are held out of everything: gene choice, scaling, tokenizer, vocabulary, language model. Without it:
the 700 PBMC that scanpy ships, a fifth of the cells held out, and a response that is SIMULATED on them, named so
wherever it is shown.
"""

import json
import os
import sys
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import numpy as np
from anndata import AnnData

from rvqa.annotation import annotate
from rvqa.data import splits
from rvqa.data.alignment import CoverageWarning
from rvqa.data.files.sources import read_cells
from rvqa.data.reading import Reading
from rvqa.data.recovery import recover_counts
from rvqa.encoding import cell_codes
from rvqa.errors import InputError
from rvqa.evaluation import baselines
from rvqa.evaluation.metrics import classification, perplexity
from rvqa.evaluation.perturbation import evaluate_held_out
from rvqa.evaluation.profiles import shared_log1p
from rvqa.evaluation.simulation import simulate_response
from rvqa.io.model_directory import require_new_directory
from rvqa.language.model import Model
from rvqa.language.opening import quiet_transformers
from rvqa.report.annotation import add_annotation
from rvqa.report.page import Report, command_line, is_report
from rvqa.report.perturbation import add_perturbation

HELD_OUT_DONORS = ("1244", "1256")
HELD_OUT_TYPE = "B"
SIMULATED = "SIMULATED response"


@dataclass(frozen=True)
class Case:
    """Cells of one demonstration, split: nothing of `tests` and `perturbed` is seen by any fit."""

    title: str
    references: list[AnnData]
    names: list[str]
    tests: dict[str, AnnData]
    """Cells to annotate, by what they are."""
    control: AnnData
    """Control cells of the held-out type."""
    perturbed: AnnData
    """Perturbed cells of the held-out type, never fitted."""
    contexts: AnnData
    """Cells of the other types, control and perturbed, that the baselines learn from (all in the reference)."""
    held_out_type: str
    perturbation: str
    library_size_key: str | None


def run(output: Path, *, seed: int = 0, progress: bool = True, out: TextIO | None = None) -> dict[str, Any]:
    """Fit, annotate, perturb, compare; print it and return the figures.

    Parameters
    ----------
    output
        Model directory to write; an earlier demo's is replaced.
    seed
        Of everything random. On one thread and one machine type the same seed gives the same numbers. Several threads
        or another machine add up in another order, which the fit amplifies.
    progress
        Show progress bars.
    out
        Where the text goes; standard output by default.
    """
    from rvqa.training.fit import fit_files, settings_for

    out = out or sys.stdout
    require_new_directory(output, force=True)
    page = output.parent / "report.html"
    if page.exists() and not is_report(page):
        raise InputError(f"{page} exists and is not a report of rvqa. Move it, or choose an output in another folder.")
    warnings.simplefilter("once", CoverageWarning)
    started = time.perf_counter()
    folder = data_folder()
    case = shipped_case(seed) if folder is None else real_case(folder)
    print(f"{case.title}\n", file=out)
    model = fit_files(
        case.references,
        names=case.names,
        labels="label",
        condition="condition",
        control="control",
        library_size_key=case.library_size_key,
        settings=settings_for(seed),
        progress=progress,
    )
    model.save_pretrained(output, force=True)
    results: dict[str, Any] = {"case": case.title, "seed": seed, "fit_seconds": time.perf_counter() - started}
    results["tokens"] = show_tokens(model, case, out)
    results["perplexity"] = show_perplexity(model, case, out)
    report = new_report(model, case, output)
    results["annotation"] = show_annotation(model, case, out, report, progress=progress)
    results["perturbation"] = show_perturbation(model, case, out, report, seed=seed, progress=progress)
    report.write(page, force=True)
    print(f"\nWrote {page}: open it in a browser.", file=out)
    results["opened_by_transformers"] = show_reopened(output, out)
    results["seconds"] = time.perf_counter() - started
    print(f"\n{results['seconds']:.0f} s in all, {results['fit_seconds']:.0f} s of them to fit the model.", file=out)
    return results


def data_folder() -> Path | None:
    """Folder of the real data: `RVQA_DATA_DIR`; None where it is not set."""
    named = os.environ.get("RVQA_DATA_DIR")
    if named and not Path(named).is_dir():
        raise InputError(
            f"RVQA_DATA_DIR is {named}, which is not a folder. Set it to the folder of .h5ad files, or unset it."
        )
    return Path(named) if named else None


# ---- cells ---------------------------------------------------------------------------------------------------------


def real_case(folder: Path) -> Case:
    """PBMC3k and Kang: two donors out, and the interferon-treated cells of one type."""
    labels = Path(os.environ.get("RVQA_REF_DIR") or folder / ".." / "ref") / "label_to_cl.json"
    if not labels.is_file():
        raise InputError(f"{labels} does not exist. Set RVQA_REF_DIR to the folder that holds label_to_cl.json.")
    table = json.loads(labels.read_text(encoding="utf-8"))
    pbmc3k, kang, panel = (
        _labelled(read_cells(folder / f"{name}.h5ad"), table)
        for name in ("pbmc3k_10x", "kang2018_ifnb_pbmc_2k", "kang2018_ctrl_pbmc_12k_1287genes")
    )
    pbmc3k.obs["condition"] = "control"
    kang.obs["condition"] = kang.obs["condition"].astype(str).map({"ctrl": "control", "stim": "IFN-beta"})
    train, held_out = splits.by_donor(kang, "donor", HELD_OUT_DONORS)
    stimulated = (kang.obs["condition"] == "IFN-beta").to_numpy()
    of_type = (kang.obs["label"] == HELD_OUT_TYPE).to_numpy()
    donor_known = train | held_out
    reference = kang[train & ~(of_type & stimulated)].copy()
    _, panel_held_out = splits.by_donor(panel, "donor", HELD_OUT_DONORS)
    donors = " and ".join(HELD_OUT_DONORS)
    return Case(
        title=f"PBMC3k + Kang 2018; never seen by any fit: donors {donors}, and every IFN-beta {HELD_OUT_TYPE} cell",
        references=[pbmc3k, reference],
        names=["pbmc3k", "kang2018"],
        tests={
            "Kang control cells of held-out donors": kang[held_out & ~stimulated].copy(),
            "the same donors, 1,287-gene panel": panel[panel_held_out].copy(),
        },
        control=kang[of_type & ~stimulated & donor_known].copy(),
        perturbed=kang[of_type & stimulated & donor_known].copy(),
        contexts=reference,
        held_out_type=HELD_OUT_TYPE,
        perturbation="IFN-beta",
        library_size_key=None,
    )


def _labelled(adata: AnnData, table: dict[str, dict[str, str]]) -> AnnData:
    """Harmonised coarse labels, and the ontology id of a label where the table has the coarse label itself."""
    raw = adata.obs["cell_type"].astype(str)
    terms = {entry["coarse"]: entry["cl_id"] for entry in table.values() if entry["harmonised"] == entry["coarse"]}
    adata.obs["label"] = [table[name]["coarse"] if name in table else "" for name in raw]
    adata.obs["cell_type_ontology_term_id"] = [terms.get(label, "") for label in adata.obs["label"]]
    return adata


def shipped_case(seed: int) -> Case:
    """The 700 PBMC of scanpy, half of them with a simulated response; a fifth of the cells and one treated type out."""
    import scanpy as sc

    source = sc.datasets.pbmc68k_reduced()
    depth = source.obs["n_counts"].to_numpy(dtype=np.float64)
    counts = recover_counts(source.raw.X, library_size=depth).counts
    adata = AnnData(counts, obs=source.obs[["bulk_labels"]].copy(), var=source.raw.var[[]].copy())
    adata.obs["label"] = adata.obs["bulk_labels"].astype(str)
    adata.obs["depth"] = depth
    rng = np.random.default_rng(seed)
    treated = rng.random(adata.n_obs) < 0.5
    adata = simulate_response(adata, treated, rng, name=SIMULATED)
    held_out = rng.random(adata.n_obs) < 0.2
    of_type = (adata.obs["label"] == "CD19+ B").to_numpy()
    reference = adata[~held_out & ~(of_type & treated)].copy()
    return Case(
        title="700 PBMC that scanpy ships; the response shown is SIMULATED on them, and a fifth of the cells held out",
        references=[reference],
        names=["pbmc68k_reduced"],
        tests={"held-out cells, untreated": adata[held_out & ~treated].copy()},
        control=adata[of_type & ~treated].copy(),
        perturbed=adata[of_type & treated].copy(),
        contexts=reference,
        held_out_type="CD19+ B",
        perturbation=SIMULATED,
        library_size_key="depth",
    )


# ---- what is shown -------------------------------------------------------------------------------------------------


def show_tokens(model: Model, case: Case, out: TextIO) -> list[str]:
    """Print the ten tokens of three held-out cells."""
    name, adata = next(iter(case.tests.items()))
    codes_NM, _ = cell_codes(adata[:3], model.cell_tokenizer, Reading(library_size_key=case.library_size_key))
    tokens = model.vocabulary.texts(codes_NM)
    print(f"Ten tokens of three {name.split(',')[0]}:", file=out)
    for text, label in zip(tokens, adata.obs["label"], strict=False):
        print(f"  {text}  {label}", file=out)
    return tokens


def show_perplexity(model: Model, case: Case, out: TextIO) -> dict[str, list[float]]:
    """Print how evenly each level's 32 codes are used."""
    print("\nPerplexity of the codes by level (32 = all used alike)", file=out)
    rows = {}
    sets = {"cells of the fit": case.references, **{name: [adata] for name, adata in case.tests.items()}}
    for name, files in sets.items():
        codes = [cell_codes(f, model.cell_tokenizer, Reading(library_size_key=case.library_size_key))[0] for f in files]
        values = perplexity(np.concatenate(codes), model.cell_tokenizer.config.entries)
        rows[name] = [float(value) for value in values]
        print(f"  {name:40s}" + " ".join(f"{value:5.1f}" for value in values), file=out)
    return rows


def new_report(model: Model, case: Case, output: Path) -> Report:
    """Page that `show_annotation` and `show_perturbation` fill; written beside the model."""
    sizes = f"{sum(each.n_obs for each in case.references):,} cells of {', '.join(case.names)}"
    genes = f"{len(model.cell_tokenizer.axis):,}"
    facts = {"Fitted on": sizes, "Genes of the model": genes, "Model": str(output)}
    return Report("rvqa demo", lead=case.title, facts=facts, command=command_line())


def show_annotation(model: Model, case: Case, out: TextIO, report: Report, *, progress: bool) -> dict[str, Any]:
    """Print accuracy and macro-F1 beside the baselines, all refitted on the genes each test file shares."""
    print("\nCell types of cells never seen (closed set of labels)          accuracy  macro-F1", file=out)
    results = {}
    for name, adata in case.tests.items():
        known = adata[np.isin(adata.obs["label"], model.card.labels)].copy()
        annotate(known, model, library_size_key=case.library_size_key, progress=progress)
        truth_N = known.obs["label"].to_numpy(dtype=object)
        train_NG, test_NG = shared_log1p(case.references, known, case.library_size_key)
        train_N = np.concatenate([each.obs["label"].to_numpy(dtype=object) for each in case.references])
        labelled = train_N != ""
        arguments = (train_NG[labelled], train_N[labelled], test_NG)
        predictions = {
            "rvqa, from ten tokens": known.obs["rvqa_cell_type"].to_numpy(dtype=object),
            "logistic regression on expression": baselines.logistic_regression(*arguments),
            "15 nearest neighbours on 50 PCs": baselines.nearest_neighbours(*arguments),
            "majority class": baselines.majority(train_N[labelled], len(truth_N)),
        }
        print(f"  {name}: {known.n_obs:,} cells, {train_NG.shape[1]:,} genes shared with the reference", file=out)
        rows = {method: classification(truth_N, predicted) for method, predicted in predictions.items()}
        for method, row in rows.items():
            print(f"    {method:58s} {row['accuracy']:7.3f}   {row['macro_f1']:7.3f}", file=out)
        results[name] = {"cells": known.n_obs, "genes": train_NG.shape[1], "methods": rows}
        add_annotation(report, known, heading=f"Annotation: {name}", truth="label", methods=rows)
    return results


def show_perturbation(
    model: Model, case: Case, out: TextIO, report: Report, *, seed: int, progress: bool
) -> dict[str, Any]:
    """Print errors and correlations of predicted profiles of the held-out type beside baselines and ceiling."""
    found = evaluate_held_out(
        case.control,
        case.perturbed,
        case.contexts,
        model,
        perturbation=case.perturbation,
        held_out_type=case.held_out_type,
        library_size_key=case.library_size_key,
        seed=seed,
        progress=progress,
    )
    print(
        f"\n{case.perturbation} on {case.held_out_type} cells, of which none was seen perturbed: "
        f"{case.control.n_obs} control, {case.perturbed.n_obs} true, {len(found.shift.genes):,} genes",
        file=out,
    )
    print(
        "  on profiles of log1p counts per 10,000                     MSE top 50      MSE   Pearson of shift", file=out
    )
    for method, row in found.methods.items():
        print(f"    {method:56s} {row['mse_top']:8.4f} {row['mse']:8.5f}   {row['pearson_shift']:8.3f}", file=out)
    add_perturbation(
        report,
        found.shift,
        {"control": case.control, "predicted": found.predicted, "measured": case.perturbed},
        model,
        heading=f"Perturbation: {case.perturbation} on {case.held_out_type} cells",
        perturbation=case.perturbation,
        cell_type_key="label",
        methods=found.methods,
        reading=Reading(library_size_key=case.library_size_key),
    )
    return {"genes": len(found.shift.genes), "nearest_context": found.nearest_context, "methods": found.methods}


def show_reopened(output: Path, out: TextIO) -> str:
    """Open the written directory with transformers alone."""
    from transformers import AutoModelForCausalLM

    with quiet_transformers():
        reopened = AutoModelForCausalLM.from_pretrained(output, local_files_only=True)
    size = sum(parameter.numel() for parameter in reopened.parameters())
    line = f"{type(reopened).__name__} with {size / 1e6:.2f} million parameters"
    print(f"\nWrote {output}; AutoModelForCausalLM.from_pretrained opens it: {line}", file=out)
    return line
