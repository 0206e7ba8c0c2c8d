"""Probes: how well labels are read from codes, at full and half depth and on panels."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import scipy.sparse as sp

from rvqa.data.alignment import FLOOR, match_columns
from rvqa.data.cells import Cells
from rvqa.data.genes import GeneAxis
from rvqa.errors import quoted
from rvqa.evaluation import baselines
from rvqa.evaluation.metrics import bootstrap_interval, classification
from rvqa.evaluation.tokenizer_measures import (
    CODES_C,
    EXPRESSION_C,
    MIN_CELLS,
    PANEL_MOST,
    PANEL_TOP,
    Coded,
    Comparison,
    NotMeasured,
    measured_genes,
    readable,
    truth_of,
)
from rvqa.tokenizer.model import CellTokenizer


def probe(taught: Comparison, test: Coded, entries: int, rng: np.random.Generator) -> dict[str, Any]:
    """Accuracy on the unseen cells of logistic regressions taught on the labelled cells of the fit.

    On expression: log1p over the genes of the comparison, and on what the tokenizer makes of the same cells.
    """
    train_N, keep_N, truth_N = truth_of(taught.sources, test)
    train_NG = sp.vstack([each.study.log1p(taught.axis) for each in taught.sources], format="csr")
    rows_N = train_N != ""
    features = {
        "expression": (train_NG, test.study.log1p(taught.axis)),
        "latent": _standardised([each.quantized_ND for each in taught.sources], test.quantized_ND),
        "codes": (sp.vstack([each.one_hot(entries) for each in taught.sources], format="csr"), test.one_hot(entries)),
    }
    result: dict[str, Any] = {"cells": int(keep_N.sum()), "genes": len(taught.axis)}
    for name, (train, inside) in features.items():
        strength = CODES_C if name == "codes" else EXPRESSION_C
        predicted_N = baselines.logistic_regression(train[rows_N], train_N[rows_N], inside[keep_N], C=strength)
        interval = bootstrap_interval((predicted_N == truth_N).astype(np.float64), rng=rng)
        result[name] = {**classification(truth_N, predicted_N), "interval": list(interval)}
    predicted_N = baselines.nearest_neighbours(train_NG[rows_N], train_N[rows_N], features["expression"][1][keep_N])
    result["neighbours on PCA"] = classification(truth_N, predicted_N)
    result["majority"] = classification(truth_N, baselines.majority(train_N[rows_N], len(truth_N)))
    return result


def half_depth(
    tokenizer: CellTokenizer, taught: Comparison | None, test: Coded, rng: np.random.Generator
) -> dict[str, float]:
    """Share of cells whose codes stay when every count is kept with probability 1/2; 32-means on PCA beside it.

    PCA is fitted on cells of the fit, without a comparison on the cells themselves.
    """
    from sklearn.cluster import KMeans
    from sklearn.decomposition import PCA

    thinned = test.study.counts.copy()
    thinned.data = rng.binomial(thinned.data.astype(np.int64), 0.5).astype(np.float32)
    stored_N = np.asarray(thinned.sum(1), dtype=np.float64).ravel()
    filled = readable(tokenizer, replace(test.study, counts=thinned, total_N=stored_N))
    if filled.sum() < MIN_CELLS:
        raise NotMeasured(
            f"At half depth {filled.sum()} of its {len(filled):,} cells have counts in genes that the tokenizer knows; "
            f"{MIN_CELLS} are needed."
        )
    if test.study.given:
        unstored_N = test.study.library_size - np.asarray(test.study.counts.sum(1)).ravel()
        stored_N += rng.binomial(np.maximum(unstored_N, 0).astype(np.int64), 0.5)
    half = replace(test.study, counts=thinned, total_N=stored_N).take(filled).at_depth(tokenizer.shares)
    codes_NM = Coded.of(tokenizer, half).codes_NM
    same_NM = codes_NM == test.codes_NM[filled]
    shared = taught.axis if taught else tokenizer.axis.subset(measured_genes(test.study, tokenizer.axis))
    sources = [each.study for each in taught.sources] if taught else [test.study]
    train_NG = sp.vstack([study.log1p(shared) for study in sources], format="csr")
    pca = PCA(min(32, min(train_NG.shape) - 1), svd_solver="arpack", random_state=0).fit(train_NG)
    means = KMeans(tokenizer.config.entries, n_init=3, random_state=0).fit(pca.transform(train_NG))
    before, after = (means.predict(pca.transform(study.log1p(shared))) for study in (test.study.take(filled), half))
    return {
        "first_code_kept": float(same_NM[:, 0].mean()),
        "first_two_kept": float(same_NM[:, :2].all(1).mean()),
        "k_means_on_pca_kept": float((before == after).mean()),
    }


def panels(
    tokenizer: CellTokenizer, taught: Comparison, test: Coded, studies: Sequence[Cells]
) -> dict[str, dict[str, float]]:
    """Accuracy of the probe on codes when unseen cells show only the genes of another study's panel."""
    if test.study.counts.shape[1] <= PANEL_MOST:
        raise NotMeasured(
            f"Its own panel has {test.study.counts.shape[1]:,} genes; unseen cells with more than {PANEL_MOST:,} are "
            "needed to cut."
        )
    small = _panels([study for study in studies if study.counts.shape[1] <= PANEL_MOST])
    if not small:
        raise NotMeasured(
            f"No file has a panel of {PANEL_TOP // 2:,} to {PANEL_MOST:,} genes to cut its cells to; give one (--data)."
        )
    entries = tokenizer.config.entries
    whole = probe_codes(taught, test, entries, None)
    rows = {}
    for name, axis in small:
        measured = np.flatnonzero(match_columns(test.study.var, axis) >= 0)
        cut = test.study.cut(measured)
        if measured_genes(cut, tokenizer.axis).sum() < min(FLOOR, len(tokenizer.axis)):
            continue
        accuracy = probe_codes(taught, Coded.of(tokenizer, cut), entries, None)
        rows[name] = {"genes": len(measured), "accuracy": accuracy, "drop_points": 100 * (whole - accuracy)}
    if not rows:
        raise NotMeasured(
            f"Cut to the genes of {quoted(name for name, _ in small)} it has fewer than {FLOOR} of the tokenizer's "
            "genes; give a file of another panel (--data)."
        )
    return rows


def _panels(small: Sequence[Cells]) -> list[tuple[str, GeneAxis]]:
    """Panels to try: files of 1,000 to 2,000 genes as they are, and the 2,000 genes of larger ones seen most often."""
    found = []
    for study in small:
        n = study.counts.shape[1]
        if n >= PANEL_TOP:
            top = np.sort(np.argsort(-study.counts.getnnz(0), kind="stable")[:PANEL_TOP])
            found.append((f"{PANEL_TOP} genes of {study.name}", study.axis.subset(top)))
        elif n >= PANEL_TOP // 2:
            found.append((study.name, study.axis))
    return found


def probe_codes(taught: Comparison, test: Coded, entries: int, levels: int | None) -> float:
    """Accuracy on unseen cells of the logistic regression on the first levels of the codes."""
    train_N, keep_N, truth_N = truth_of(taught.sources, test)
    rows_N = train_N != ""
    train = sp.vstack([each.one_hot(entries, levels) for each in taught.sources], format="csr")
    inside = test.one_hot(entries, levels)[keep_N]
    predicted_N = baselines.logistic_regression(train[rows_N], train_N[rows_N], inside, C=CODES_C)
    return float(np.mean(predicted_N == truth_N))


def _standardised(train: Sequence[np.ndarray], test_ND: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    train_ND = np.concatenate(train)
    mean_D, scale_D = train_ND.mean(0), train_ND.std(0) + 1e-6
    return (train_ND - mean_D) / scale_D, (test_ND - mean_D) / scale_D
