"""Cell types in the latents of the tokenizer, scVI and PCA: clusters and a probe, on cells that no fit has seen.

python -m venv beside && beside/bin/pip install -e ".[bench]" scvi-tools==1.4.2
beside/bin/python -m bench.scvi_beside --tokenizer DIR [--data DIR] [--json]

scVI is fitted on the cells that the tokenizer was fitted on (DIR/split.parquet) and the genes that all their files
share, with one batch per file. It has the defaults of scvi-tools, but the tokenizer's latent width. Unseen cells go
through `prepare_query_anndata`, which sets genes that a file does not measure to zero (scvi-tools warns below 80 % of
the genes). The fitted model encodes them without adaptation, because its encoder sees no batch. If a file has fewer
than half of the genes, scVI is fitted once more on the genes that it has: "of its genes".

Measures and unseen cells are those of `rvqa evaluate tokenizer`: clusters of types, and a logistic regression trained
on the labelled cells of the fit ("probe"). "PCA of the fit" has the cells and genes of scVI, "PCA of the unseen" is
fitted on the measured cells themselves, and "expression" is the probe on log1p of the genes that labelled files share.
"""

import argparse
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import scipy.sparse as sp
import scvi
import torch
from anndata import AnnData
from scvi.model import SCVI
from sklearn.decomposition import PCA

from bench import harness
from rvqa.data.alignment import map_columns
from rvqa.data.cells import Cells
from rvqa.data.genes import GeneAxis
from rvqa.data.splits import read_split
from rvqa.data.studies import label_table, read_study, shared_axis, study_files
from rvqa.evaluation import tokenizer_measures as measures
from rvqa.evaluation import tokenizer_probes as probes
from rvqa.evaluation.tokenizer_measures import Coded
from rvqa.evaluation.unseen import fitted_and_unseen
from rvqa.tokenizer.model import CellTokenizer

ENOUGH = 0.5
"""Share of scVI's genes below which a file gets a fit of its own."""


def cells_of(study: Cells, axis: GeneAxis) -> AnnData:
    """Return raw counts of the genes of an axis that a study measures."""
    alignment = study.alignment(axis)
    obs = pd.DataFrame({"study": study.name}, index=[f"{study.name} {name}" for name in study.cell_N])
    cells = AnnData(map_columns(study.counts, alignment), obs=obs, var=pd.DataFrame(index=list(axis.symbols)))
    return cells[:, alignment.measured].copy()


def fit_scvi(studies: Sequence[Cells], axis: GeneAxis, width: int, seed: int) -> tuple[SCVI, dict[str, float]]:
    """Fit scVI with its defaults except the latent width; return it and the cost of the fit."""
    scvi.settings.seed = seed
    cells = anndata.concat([cells_of(study, axis) for study in studies])
    wall, cpu = time.perf_counter(), time.process_time()
    SCVI.setup_anndata(cells, batch_key="study")
    model = SCVI(cells, n_latent=width)
    model.train(accelerator="cpu", enable_progress_bar=False)
    spent = {"fit_seconds": time.perf_counter() - wall, "fit_cpu_seconds": time.process_time() - cpu}
    return model, {**spent, "epochs": float(len(model.history["elbo_train"])), "genes": float(len(axis))}


def scvi_latent(model: SCVI, axis: GeneAxis, coded: Coded) -> np.ndarray:
    """Return the mean of every cell's latent, float32 [N, D], by the fitted model."""
    cells = cells_of(coded.study, axis)
    SCVI.prepare_query_anndata(cells, model)
    query = SCVI.load_query_data(cells, model, accelerator="cpu")
    query.is_trained_ = True
    return query.get_latent_representation()


def pca_latent(pca: PCA, axis: GeneAxis, coded: Coded) -> np.ndarray:
    """Return principal components of every cell, [N, D]; genes that a file lacks are zeros, as for scVI."""
    return pca.transform(coded.study.log1p(axis))


def measured(taught: Sequence[Coded], test: Coded, entries: int, seed: int) -> dict[str, dict[str, float]]:
    """Return measures of the latents in `quantized_ND` ("latent"), and of contenders that need no latents."""
    clusters = measures.clusters(test, seed)
    found = {"latent": clusters["quantized"], "PCA of the unseen": clusters["PCA of these cells"]}
    if measures.can_probe(taught, test):
        probe = probes.probe(taught, test, entries, np.random.default_rng(seed))
        found["latent"]["probe"] = probe["latent"]["accuracy"]
        found["expression"] = {"probe": probe["expression"]["accuracy"]}
    return found


def main() -> None:
    """Run the bench."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--tokenizer", type=Path, required=True, help="directory that `rvqa fit-tokenizer` wrote")
    folder = os.environ.get("RVQA_DATA_DIR")
    arguments.add_argument("--data", type=Path, default=folder, required=not folder, help="default: RVQA_DATA_DIR")
    arguments.add_argument("--seed", type=int, default=0)
    arguments.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments.add_argument("--json", action="store_true", help="print one JSON object as the last line of stdout")
    given = arguments.parse_args()
    torch.set_num_threads(given.threads)
    tokenizer = CellTokenizer.from_pretrained(given.tokenizer)
    table = label_table()
    studies = [read_study(file, table=table).at_depth(tokenizer.shares) for file in study_files([given.data])]
    split = read_split(given.tokenizer / "split.parquet")
    fitted, unseen = fitted_and_unseen(studies, split, np.random.default_rng(given.seed))
    unseen = [study for study in unseen if measures.n_types(study) > 1]
    labelled = [Coded.of(tokenizer, study) for study in fitted if (study.label_N != "").any()]
    tests = {study.name: Coded.of(tokenizer, study) for study in unseen}
    found: dict[str, dict[str, dict[str, float]]] = {name: {} for name in tests}

    def measure(contender: str, latent: Callable[[Coded], np.ndarray], names: Sequence[str]) -> None:
        taught = [replace(cells, quantized_ND=latent(cells)) for cells in labelled]
        for name in names:
            test = replace(tests[name], quantized_ND=latent(tests[name]))
            values = measured(taught, test, tokenizer.config.entries, given.seed)
            found[name] |= {contender: values.pop("latent"), **values}

    axis, width = shared_axis(fitted), tokenizer.config.latent
    share = {study.name: float(study.alignment(axis).measured.mean()) for study in unseen}
    few = [study for study in unseen if share[study.name] < ENOUGH]
    measure("rvqa", lambda cells: cells.quantized_ND, list(tests))
    measure("rvqa, continuous", lambda cells: cells.latent_ND, list(tests))
    fits = [("", axis, list(tests))]
    fits += [(" of its genes", shared_axis([*fitted, study]), [study.name]) for study in few]
    figures: dict[str, float] = {"cells": float(sum(map(len, fitted)))}
    for suffix, genes, names in fits:
        model, spent = fit_scvi(fitted, genes, width, given.seed)
        figures |= {f"scvi_{key}" + (f"_{names[0]}" if suffix else ""): value for key, value in spent.items()}
        pca = PCA(width, svd_solver="arpack", random_state=given.seed)
        pca.fit(sp.vstack([study.log1p(genes) for study in fitted], format="csr"))
        measure(f"scVI{suffix}", partial(scvi_latent, model, genes), names)
        measure(f"PCA of the fit{suffix}", partial(pca_latent, pca, genes), names)
    rows = []
    for name, contenders in found.items():
        rows.append(harness.Row(name, "scVI", share[name], "of genes", 0.0, None))
        for contender, values in contenders.items():
            rows += [harness.Row(name, contender, value, unit, 0.0, None) for unit, value in values.items()]
    harness.report("scvi_beside", sorted(rows, key=lambda row: (row.case, row.unit)), figures, as_json=given.json)


if __name__ == "__main__":
    main()
