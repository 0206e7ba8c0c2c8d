"""What a tokenizer keeps of cells: each measure once, on cells through the tokenizer (`Coded`).

Shapes: N cells, G genes of an axis, M levels, K codewords a level, D latent width.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import scipy.sparse as sp

from rvqa.counts import log1p_normalise
from rvqa.evaluation import baselines
from rvqa.evaluation.clusters import clustering, knn_purity
from rvqa.evaluation.metrics import bootstrap_interval, classification, perplexity
from rvqa.evaluation.populations import gene_correlation, mean_pearson_centered, variance_over_poisson, variance_pearson
from rvqa.evaluation.studies import Study, shared_axis
from rvqa.genes import GeneAxis, map_columns
from rvqa.tokenizer import CellTokenizer

MIN_CELLS = 50
"""Fewest unseen cells of a study, and of a type whose population is measured, that figures are given for."""

MOST_CELLS = 4_000
"""Cells of a study that are measured at most, drawn at random: enough for every figure here."""

EXPRESSION_C, CODES_C = 0.1, 1.0
"""Inverse strength of the penalty of the probes: on expression and latents, and on indicators of codes, which are few.
Chosen on Kang donors 1016 and 101 from 0.01 to 10: expression and latents differ by 0.005 around 0.1 there, codes by
0.04 around 1."""

PANEL_MOST = 4_000
"""Genes of a file that is taken as a panel of its own."""

PANEL_TOP = 2_000
"""Genes of a larger panel that are tried, those seen in most cells."""

EMPTY = 300
"""Counts of a simulated empty droplet."""


@dataclass(frozen=True)
class Coded:
    """Cells of a study through a tokenizer."""

    study: Study
    latent_ND: np.ndarray
    """Before quantization."""
    codes_NM: np.ndarray
    quantized_ND: np.ndarray

    @classmethod
    def of(cls, tokenizer: CellTokenizer, study: Study) -> "Coded":
        """Encode the cells."""
        latent = tokenizer.latent(study.counts, study.alignment(tokenizer.axis), study.library_size)
        codes_NM = tokenizer.quantize(latent)
        return cls(study, latent.numpy(), codes_NM, tokenizer.quantized_latent(codes_NM))

    def one_hot(self, entries: int, levels: int | None = None) -> sp.csr_matrix:
        """Codes of the first levels, all by default, as indicators, CSR [N, levels * K]."""
        codes_NM = self.codes_NM[:, :levels].astype(np.int64)
        N, M = codes_NM.shape
        at = (codes_NM + np.arange(M) * entries).ravel()
        return sp.csr_matrix((np.ones(N * M, np.float32), at, np.arange(N + 1) * M), shape=(N, M * entries))


def code_use(tests: Sequence[Coded], entries: int) -> dict[str, Any]:
    """Perplexity by level, and codes that no unseen cell has, over all unseen cells and by study."""
    codes_NM = np.concatenate([test.codes_NM for test in tests])
    used = [len(np.unique(codes_NM[:, level])) for level in range(codes_NM.shape[1])]
    return {
        "perplexity": perplexity(codes_NM, entries).tolist(),
        "dead": int(sum(entries - n for n in used)),
        "by_study": {test.study.name: perplexity(test.codes_NM, entries).tolist() for test in tests},
    }


def explained_variance(
    tokenizer: CellTokenizer,
    continuous: CellTokenizer | None,
    taught: Sequence[Coded],
    tests: Sequence[Coded],
    seed: int,
) -> dict[str, dict[str, float]]:
    """Share of the variance of log1p expression that a ridge readout, fitted on cells of the fit, explains.

    A linear readout of the quantized latent, of the latent of the model without codebooks and of as many principal
    components makes the three comparable whatever the decoder is; `ratio` is the first by the second.
    """
    from sklearn.decomposition import PCA
    from sklearn.linear_model import Ridge

    rows = {}
    for test in tests:
        axis = tokenizer.axis.subset(np.flatnonzero(test.study.alignment(tokenizer.axis).measured))
        axis = shared_axis([*(each.study for each in taught if _covers(each.study, axis)), _of(axis, test.study)])
        sources = [each for each in taught if _covers(each.study, axis)]
        train_NG = np.concatenate([each.study.log1p(axis).toarray() for each in sources])
        test_NG = test.study.log1p(axis).toarray()
        pca = PCA(tokenizer.config.latent, svd_solver="randomized", random_state=seed).fit(train_NG)
        features = {
            "quantized": ([each.quantized_ND for each in sources], test.quantized_ND),
            "before quantization": ([each.latent_ND for each in sources], test.latent_ND),
            "PCA": ([pca.transform(train_NG)], pca.transform(test_NG)),
        }
        if continuous is not None:
            features["continuous"] = (
                [Coded.of(continuous, each.study).latent_ND for each in sources],
                Coded.of(continuous, test.study).latent_ND,
            )
        row = {}
        for name, (train, inside) in features.items():
            readout = Ridge(1.0).fit(np.concatenate(train), train_NG)
            error = float(((test_NG - readout.predict(inside)) ** 2).sum())
            row[name] = 1.0 - error / float(((test_NG - test_NG.mean(0)) ** 2).sum())
        row["ratio"] = row["quantized"] / row.get("continuous", row["before quantization"])
        rows[test.study.name] = row
    return rows


def probe(taught: Sequence[Coded], test: Coded, entries: int, rng: np.random.Generator) -> dict[str, Any]:
    """Accuracy on the unseen cells of logistic regressions taught on the labelled cells of the fit.

    On expression: log1p over the genes that all files share, and on what the tokenizer makes of the same cells.
    """
    train_N, keep_N, truth_N = _truth(taught, test)
    axis = shared_axis([*(each.study for each in taught), test.study])
    train_NG = sp.vstack([each.study.log1p(axis) for each in taught], format="csr")
    rows_N = train_N != ""
    features = {
        "expression": (train_NG, test.study.log1p(axis)),
        "latent": _standardised([each.quantized_ND for each in taught], test.quantized_ND),
        "codes": (sp.vstack([each.one_hot(entries) for each in taught], format="csr"), test.one_hot(entries)),
    }
    result: dict[str, Any] = {"cells": int(keep_N.sum()), "genes": len(axis)}
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
    tokenizer: CellTokenizer, taught: Sequence[Coded], test: Coded, rng: np.random.Generator
) -> dict[str, float]:
    """Share of cells whose codes stay when every count is kept with probability 1/2; 32-means on PCA beside it."""
    from sklearn.cluster import KMeans
    from sklearn.decomposition import PCA

    thinned = test.study.counts.copy()
    thinned.data = rng.binomial(thinned.data.astype(np.int64), 0.5).astype(np.float32)
    stored_N = np.asarray(thinned.sum(1), dtype=np.float64).ravel()
    filled = stored_N > 0
    if test.study.given:
        unstored_N = test.study.library_size - np.asarray(test.study.counts.sum(1)).ravel()
        stored_N += rng.binomial(np.maximum(unstored_N, 0).astype(np.int64), 0.5)
    half = replace(test.study, counts=thinned, library_size=stored_N).take(filled).at_depth(tokenizer.shares)
    codes_NM = Coded.of(tokenizer, half).codes_NM
    same_NM = codes_NM == test.codes_NM[filled]
    axis = tokenizer.axis.subset(np.flatnonzero(test.study.alignment(tokenizer.axis).measured))
    sources = [each.study for each in taught if _covers(each.study, axis)] or [test.study]
    shared = shared_axis([*sources, _of(axis, test.study)])
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
    tokenizer: CellTokenizer, taught: Sequence[Coded], tests: Sequence[Coded], studies: Sequence[Study], entries: int
) -> dict[str, dict[str, dict[str, float]]]:
    """Accuracy of the probe on codes when unseen cells show only the genes of another study's panel."""
    result: dict[str, dict[str, dict[str, float]]] = {}
    small = [study for study in studies if study.counts.shape[1] <= PANEL_MOST]
    for test in tests:
        if test.study.counts.shape[1] <= PANEL_MOST or not can_probe(taught, test):
            continue
        whole = probe_codes(taught, test, entries, None)
        rows = {}
        for name, axis in _panels(small):
            measured = np.flatnonzero([position >= 0 for position in _columns(test.study, axis)])
            cut = test.study.cut(measured)
            if cut.alignment(tokenizer.axis).measured.sum() < MIN_CELLS:
                continue
            accuracy = probe_codes(taught, Coded.of(tokenizer, cut), entries, None)
            rows[name] = {"genes": len(measured), "accuracy": accuracy, "drop_points": 100 * (whole - accuracy)}
        result[test.study.name] = rows
    return result


def _panels(small: Sequence[Study]) -> list[tuple[str, GeneAxis]]:
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


def populations(
    tokenizer: CellTokenizer, test: Coded, taught_types: set[str], rng: np.random.Generator
) -> dict[str, Any]:
    """Decoded cells, drawn with the true library sizes, against the true cells: means, spreads, correlations.

    `mean_pearson_centered` is the mean over types that the fit has seen, `new_types` over the others.
    """
    study = test.study
    alignment = study.alignment(tokenizer.axis)
    measured_G = alignment.measured
    true = map_columns(study.counts, alignment)[:, measured_G].tocsr()
    drawn = tokenizer.draw(test.codes_NM, study.library_size, rng)[:, measured_G].tocsr()
    true_log, drawn_log = (log1p_normalise(each, study.library_size) for each in (true, drawn))
    global_G = np.asarray(true_log.mean(0), dtype=np.float64).ravel()
    types = [name for name in sorted(set(study.label_N) - {""}) if (study.label_N == name).sum() >= MIN_CELLS]
    by_type = mean_pearson_centered(
        {name: true_log[study.label_N == name] for name in types},
        {name: drawn_log[study.label_N == name] for name in types},
        global_G,
    )
    enough_G = np.asarray(true.sum(0)).ravel() >= MIN_CELLS
    spread, drawn_spread = (variance_over_poisson(each, study.library_size) for each in (true, drawn))
    enough_G &= np.isfinite(spread) & np.isfinite(drawn_spread)
    top = np.argsort(-np.asarray(true.sum(0)).ravel(), kind="stable")[:200]
    return {
        "types": by_type,
        "mean_pearson_centered": mean_of([value for name, value in by_type.items() if name in taught_types]),
        "new_types": mean_of([value for name, value in by_type.items() if name not in taught_types]),
        "variance_pearson": variance_pearson(spread, drawn_spread, enough_G),
        "gene_correlation_top_200": gene_correlation(true_log, drawn_log, top),
        "global_mean_baseline": 0.0,
    }


def clusters(test: Coded, seed: int) -> dict[str, dict[str, float]]:
    """How well types separate in the quantized latent, and in as many principal components of the same cells."""
    from sklearn.decomposition import PCA

    rows_N = test.study.label_N != ""
    labels_N = test.study.label_N[rows_N]
    log1p = test.study.log1p(test.study.axis)
    pca = PCA(test.quantized_ND.shape[1], svd_solver="arpack", random_state=seed).fit_transform(log1p)
    result = {}
    for name, latent_ND in (("quantized", test.quantized_ND), ("PCA of these cells", pca)):
        result[name] = {
            "knn_purity": knn_purity(latent_ND[rows_N], labels_N),
            **clustering(latent_ND[rows_N], labels_N, seed=seed),
        }
    return result


def odd_cells(tokenizer: CellTokenizer, test: Coded, rng: np.random.Generator) -> dict[str, float]:
    """Area under the ROC curve with which the reconstruction error finds simulated doublets and empty droplets.

    Doublets: sums of two cells of different types, thinned to the depth of the first. Empty droplets: draws of 300
    counts from the study's mean profile, among cells thinned to 300 counts.
    """
    from sklearn.metrics import roc_auc_score

    study = test.study
    typed = np.flatnonzero(study.label_N != "")
    one, two = (rng.choice(typed, 500) for _ in range(2))
    different = study.label_N[one] != study.label_N[two]
    one, two = one[different], two[different]
    depth = study.library_size
    keep = depth[one] / (depth[one] + depth[two])
    doublets = _thin(study.counts[one] + study.counts[two], keep, rng)
    singles = study.take(one)
    made = replace(singles, counts=doublets)
    errors = [tokenizer_error(tokenizer, each) for each in (singles, made)]
    result = {"doublets": float(roc_auc_score(np.repeat([0, 1], len(one)), np.concatenate(errors)))}
    rich = study.take(one[depth[one] > EMPTY])
    if len(rich) >= MIN_CELLS:
        shallow = _thin(rich.counts, EMPTY / rich.library_size, rng)
        share = np.asarray(study.counts.sum(0), dtype=np.float64).ravel() / depth.sum()
        empty = sp.csr_matrix(rng.poisson(EMPTY * share, (len(rich), len(share))).astype(np.float32))
        sizes = np.full(len(rich), float(EMPTY))
        pair = [replace(rich, counts=each, library_size=sizes) for each in (shallow, empty)]
        errors = [tokenizer_error(tokenizer, each) for each in pair]
        result["empty"] = float(roc_auc_score(np.repeat([0, 1], len(rich)), np.concatenate(errors)))
    return result


def tokenizer_error(tokenizer: CellTokenizer, study: Study) -> np.ndarray:
    """Reconstruction error of every cell, float64 [N]: what `rvqa.encode` writes as `rvqa_recon_error`."""
    alignment = study.alignment(tokenizer.axis)
    codes_NM = tokenizer.encode(study.counts, alignment, study.library_size)
    return tokenizer.recon_error(study.counts, alignment, study.library_size, codes_NM)


def _thin(counts: sp.csr_matrix, keep_N: np.ndarray, rng: np.random.Generator) -> sp.csr_matrix:
    thinned = counts.tocsr().copy()
    share_E = np.repeat(np.minimum(keep_N, 1.0), np.diff(thinned.indptr))
    thinned.data = rng.binomial(thinned.data.astype(np.int64), share_E).astype(np.float32)
    return thinned


def some(rows_N: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Rows of a mask, at most `MOST_CELLS` of them, drawn at random, in order."""
    at = np.flatnonzero(rows_N)
    return at if len(at) <= MOST_CELLS else np.sort(rng.choice(at, MOST_CELLS, replace=False))


def _truth(taught: Sequence[Coded], test: Coded) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Labels to learn [N]; which unseen cells have one of these, bool; their labels."""
    train_N = np.concatenate([each.study.label_N for each in taught])
    keep_N = np.isin(test.study.truth_N, sorted(set(train_N) - {""}))
    return train_N, keep_N, test.study.truth_N[keep_N]


def can_probe(taught: Sequence[Coded], test: Coded) -> bool:
    """Whether enough unseen cells have a label that can be learned, of two types or more."""
    if not taught:
        return False
    truth_N = _truth(taught, test)[2]
    return len(truth_N) >= MIN_CELLS and len(set(truth_N)) > 1


def probe_codes(taught: Sequence[Coded], test: Coded, entries: int, levels: int | None) -> float:
    """Accuracy on unseen cells of the logistic regression on the first levels of the codes."""
    train_N, keep_N, truth_N = _truth(taught, test)
    rows_N = train_N != ""
    train = sp.vstack([each.one_hot(entries, levels) for each in taught], format="csr")
    inside = test.one_hot(entries, levels)[keep_N]
    predicted_N = baselines.logistic_regression(train[rows_N], train_N[rows_N], inside, C=CODES_C)
    return float(np.mean(predicted_N == truth_N))


def _standardised(train: Sequence[np.ndarray], test_ND: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    train_ND = np.concatenate(train)
    mean_D, scale_D = train_ND.mean(0), train_ND.std(0) + 1e-6
    return (train_ND - mean_D) / scale_D, (test_ND - mean_D) / scale_D


def n_types(study: Study) -> int:
    """Number of types with enough cells."""
    return sum((study.label_N == name).sum() >= MIN_CELLS for name in set(study.label_N) - {""})


def _columns(study: Study, axis: GeneAxis) -> np.ndarray:
    return study.alignment(axis).column_map


def _covers(study: Study, axis: GeneAxis) -> bool:
    """Whether a study measures at least half of an axis, by symbol."""
    return len(set(study.axis.symbols) & set(axis.symbols)) >= 0.5 * len(axis)


def _of(axis: GeneAxis, study: Study) -> Study:
    """The study cut to an axis, for `shared_axis`."""
    inside = np.flatnonzero(_columns(study, axis) >= 0)
    return study.cut(inside)


def mean_of(values: Sequence[float]) -> float:
    """Mean of what is defined, NaN where nothing is."""
    kept = [value for value in values if np.isfinite(value)]
    return float(np.mean(kept)) if kept else float("nan")
