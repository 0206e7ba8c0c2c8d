"""What a tokenizer keeps of cells: each measure once, on cells through the tokenizer (`Coded`).

A measure that cannot be taken of some cells raises `NotMeasured`, which says why and what would make it possible. Each
comparison of unseen cells with cells of the fit is made on genes of its own (`Comparison`), so that a file of few genes
narrows no comparison but its own.

Shapes: N cells, G genes of an axis, M levels, K codewords a level, D latent width.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import scipy.sparse as sp

from rvqa.data.alignment import FLOOR, map_columns, match_columns
from rvqa.data.cells import Cells
from rvqa.data.depth import log1p_normalise
from rvqa.data.genes import GeneAxis
from rvqa.errors import quoted
from rvqa.evaluation.clusters import clustering, knn_purity
from rvqa.evaluation.metrics import perplexity
from rvqa.evaluation.populations import gene_correlation, mean_pearson_centered, variance_over_poisson, variance_pearson
from rvqa.tokenizer.model import CellTokenizer

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


class NotMeasured(Exception):
    """A measure cannot be taken of some cells; the message says why, and what would make it possible."""


@dataclass(frozen=True)
class Coded:
    """Cells of a study through a tokenizer."""

    study: Cells
    latent_ND: np.ndarray
    """Before quantization."""
    codes_NM: np.ndarray
    quantized_ND: np.ndarray

    @classmethod
    def of(cls, tokenizer: CellTokenizer, study: Cells) -> "Coded":
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


@dataclass(frozen=True)
class Comparison:
    """Files of the fit that unseen cells are compared with, and the genes that all of these files measure."""

    sources: list[Coded]
    axis: GeneAxis
    left_out: list[str]
    """Files of the fit that measure too few of the genes."""

    @classmethod
    def of(
        cls, taught: Sequence[Coded], study: Cells, axis: GeneAxis, useful: Sequence[Coded] | None = None
    ) -> "Comparison":
        """Choose the files of the fit, and with them the genes.

        The file that measures most of the study's genes is always taken. Of the others, the one that measures the
        fewest of these genes is left out, again and again, until at least half of them are left.

        Parameters
        ----------
        taught
            Files of the fit.
        study
            Unseen cells.
        axis
            Genes to choose from.
        useful
            Files of the fit of which one must be taken; all by default.

        Raises
        ------
        NotMeasured
            No useful file measures `FLOOR` of the study's genes.
        """
        here_G = measured_genes(study, axis)
        genes = {each.study.name: here_G & measured_genes(each.study, axis) for each in taught}
        first = max(useful or taught, key=lambda each: genes[each.study.name].sum(), default=None)
        least = min(FLOOR, len(axis))
        if first is None or genes[first.study.name].sum() < least:
            raise NotMeasured(
                f"No file of the fit measures {least} of its {here_G.sum():,} genes; give one that does with --data."
            )
        most_G = genes[first.study.name]
        kept = list(taught)
        while True:
            shared_G = np.all([genes[each.study.name] for each in kept], axis=0)
            if 2 * shared_G.sum() >= most_G.sum():
                break
            others = [each for each in kept if each is not first]
            kept.remove(min(others, key=lambda each: int((most_G & genes[each.study.name]).sum())))
        left_out = [each.study.name for each in taught if each not in kept]
        return cls(kept, axis.subset(shared_G), left_out)


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
    tokenizer: CellTokenizer, continuous: CellTokenizer | None, taught: Comparison, test: Coded, seed: int
) -> dict[str, float]:
    """Share of the variance of log1p expression that a ridge readout, fitted on cells of the fit, explains.

    A linear readout of the quantized latent, of the latent of the model without codebooks and of as many principal
    components makes the three comparable whatever the decoder is; `ratio` is the first by the second.
    """
    from sklearn.decomposition import PCA
    from sklearn.linear_model import Ridge

    train_NG = np.concatenate([each.study.log1p(taught.axis).toarray() for each in taught.sources])
    test_NG = test.study.log1p(taught.axis).toarray()
    total = float(((test_NG - test_NG.mean(0)) ** 2).sum())
    if total == 0:
        raise NotMeasured("Its expression does not vary over the unseen cells; different cells are needed.")
    components = min(tokenizer.config.latent, *train_NG.shape)
    pca = PCA(components, svd_solver="randomized", random_state=seed).fit(train_NG)
    features = {
        "quantized": ([each.quantized_ND for each in taught.sources], test.quantized_ND),
        "before quantization": ([each.latent_ND for each in taught.sources], test.latent_ND),
        "PCA": ([pca.transform(train_NG)], pca.transform(test_NG)),
    }
    if continuous is not None:
        features["continuous"] = (
            [Coded.of(continuous, each.study).latent_ND for each in taught.sources],
            Coded.of(continuous, test.study).latent_ND,
        )
    row = {}
    for name, (train, inside) in features.items():
        readout = Ridge(1.0).fit(np.concatenate(train), train_NG)
        row[name] = 1.0 - float(((test_NG - readout.predict(inside)) ** 2).sum()) / total
    whole = row.get("continuous", row["before quantization"])
    row["ratio"] = row["quantized"] / whole if whole > 0 else float("nan")
    return row


def comparable(taught: Sequence[Coded], test: Coded, labels: str) -> Comparison:
    """Files of the fit whose cells can teach a probe the types of a study, and the genes it can learn from.

    Parameters
    ----------
    taught
        Files of the fit.
    test
        Unseen cells.
    labels
        Column of obs with cell types, for the message.

    Raises
    ------
    NotMeasured
        No file has known types, or too few of the unseen cells have a type that a file of the fit has.
    """
    column = f"obs[{labels!r}]"
    labelled = [each for each in taught if (each.study.label_N != "").any()]
    if not labelled:
        raise NotMeasured(
            f"No file of the fit has cell types in {column}; name the column with --labels, or give labelled files of "
            "the fit with --data."
        )
    types = set(test.study.truth_N) - {""}
    if not types and (test.study.label_N != "").any():
        raise NotMeasured(f"A model made all of its types in {column}; name a column of known types with --labels.")
    if not types:
        raise NotMeasured(f"No unseen cell has a type in {column}; name the column with --labels.")
    useful = [each for each in labelled if types & set(each.study.label_N)]
    if useful:
        found = Comparison.of(labelled, test.study, test.study.axis, useful)
        known = truth_of(found.sources, test)[2]
        if len(known) >= MIN_CELLS and len(set(known)) > 1:
            return found
    fitted = {name for each in labelled for name in each.study.label_N} - {""}
    raise NotMeasured(
        f"A probe needs {MIN_CELLS} unseen cells of two types that the fit was taught. In {column} are {_some(types)}, "
        f"and the fit has {_some(fitted)}; give files with types in common, or common names in label_to_cl.json "
        "(RVQA_REF_DIR)."
    )


def _some(names: set[str]) -> str:
    """The first names of many."""
    return quoted(sorted(names)[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


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


def clusters(test: Coded, seed: int, labels: str) -> dict[str, dict[str, float]]:
    """How well types separate in the quantized latent, and in as many principal components of the same cells."""
    from sklearn.decomposition import PCA

    require_types(test.study, labels)
    rows_N = test.study.label_N != ""
    labels_N = test.study.label_N[rows_N]
    log1p = test.study.log1p(test.study.axis)
    components = min(test.quantized_ND.shape[1], min(log1p.shape) - 1)
    pca = PCA(components, svd_solver="arpack", random_state=seed).fit_transform(log1p)
    result = {}
    for name, latent_ND in (("quantized", test.quantized_ND), ("PCA of these cells", pca)):
        result[name] = {
            "knn_purity": knn_purity(latent_ND[rows_N], labels_N),
            **clustering(latent_ND[rows_N], labels_N, seed=seed),
        }
    return result


def odd_cells(tokenizer: CellTokenizer, test: Coded, rng: np.random.Generator, labels: str) -> dict[str, float]:
    """Area under the ROC curve with which the reconstruction error finds simulated doublets and empty droplets.

    Doublets: sums of two cells of different types, thinned to the depth of the first. Empty droplets: draws of 300
    counts from the study's mean profile, among cells thinned to 300 counts.
    """
    from sklearn.metrics import roc_auc_score

    study = test.study
    require_types(study, labels)
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
    result = {"doublets": float(roc_auc_score(np.repeat([0, 1], len(one)), np.concatenate(errors))), "empty": np.nan}
    rich = study.take(one[depth[one] > EMPTY])
    if len(rich) >= MIN_CELLS:
        shallow = _thin(rich.counts, EMPTY / rich.library_size, rng)
        share = np.asarray(study.counts.sum(0), dtype=np.float64).ravel() / depth.sum()
        empty = sp.csr_matrix(rng.poisson(EMPTY * share, (len(rich), len(share))).astype(np.float32))
        sizes = np.full(len(rich), float(EMPTY))
        pair = [replace(rich, counts=each, total_N=sizes) for each in (shallow, empty)]
        errors = [tokenizer_error(tokenizer, each) for each in pair]
        result["empty"] = float(roc_auc_score(np.repeat([0, 1], len(rich)), np.concatenate(errors)))
    return result


def tokenizer_error(tokenizer: CellTokenizer, study: Cells) -> np.ndarray:
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


def truth_of(taught: Sequence[Coded], test: Coded) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Labels to learn [N]; which unseen cells have one of these, bool; their labels."""
    train_N = np.concatenate([each.study.label_N for each in taught])
    keep_N = np.isin(test.study.truth_N, sorted(set(train_N) - {""}))
    return train_N, keep_N, test.study.truth_N[keep_N]


def require_types(study: Cells, labels: str) -> None:
    """Reject a study without two types of enough cells."""
    many = [name for name in set(study.label_N) - {""} if (study.label_N == name).sum() >= MIN_CELLS]
    if len(many) < 2:
        raise NotMeasured(
            f"Two types of {MIN_CELLS} unseen cells are needed, and obs[{labels!r}] has {len(many)}; name the column "
            "of cell types with --labels."
        )


def measured_genes(study: Cells, axis: GeneAxis) -> np.ndarray:
    """Which genes of an axis a study measures, bool [G]."""
    return np.isin(np.arange(len(axis)), match_columns(study.var, axis))


def readable(tokenizer: CellTokenizer, study: Cells) -> np.ndarray:
    """Cells with a count in a gene that the tokenizer knows, bool [N]: their depth can be told."""
    known = np.ones(study.counts.shape[1]) if study.given else match_columns(study.var, tokenizer.shares.axis) >= 0
    return np.asarray(study.counts @ known.astype(np.float64)) > 0


def mean_of(values: Sequence[float]) -> float:
    """Mean of what is defined, NaN where nothing is."""
    kept = [value for value in values if np.isfinite(value)]
    return float(np.mean(kept)) if kept else float("nan")
