"""Are decoded populations right: means, spread over cells, and how genes move together.

N cells, G genes. Profiles and correlations are of log1p of counts per 10,000, variances of raw counts; matrices are
dense or CSR [cells, G].
"""

from collections.abc import Mapping

import numpy as np
import scipy.sparse as sp
from scipy import stats

from rvqa.evaluation.metrics import Expression


def mean_pearson_centered(
    true_by_type: Mapping[str, Expression], decoded_by_type: Mapping[str, Expression], global_mean_G: np.ndarray
) -> dict[str, float]:
    """Correlation over genes of true and decoded mean profiles of each type, the global mean subtracted from both.

    Without the subtraction the global mean itself scores 0.999 on any type.

    Parameters
    ----------
    true_by_type
        log1p of counts per 10,000 of the true cells of each type, [cells, G].
    decoded_by_type
        The same of decoded cells, for every type of `true_by_type`; their number may differ.
    global_mean_G
        Mean profile of the true cells of all types, [G], summed in float64.

    Returns
    -------
    dict
        Pearson correlation by type. NaN without cells, and where a profile differs from the global mean by one
        constant or not at all, up to 1e-6 of the largest global mean (the rounding of float32).
    """
    mean_G = np.asarray(global_mean_G, dtype=np.float64)
    noise = 1e-6 * float(np.abs(mean_G).max(initial=0))
    return {
        name: _pearson(_profile(true_NG) - mean_G, _profile(decoded_by_type[name]) - mean_G, noise=noise)
        for name, true_NG in true_by_type.items()
    }


def variance_over_poisson(counts_NG: Expression, library_N: np.ndarray) -> np.ndarray:
    """How much more a gene varies over cells than Poisson counts of the same library sizes would.

    With the gene's share s = sum of counts / sum of library sizes L, Poisson counts of mean s L differ from it by a
    sum of squares of s sum(L), which is the sum of counts. A negative binomial of variance m + a m^2 gives
    1 + a sum(m^2) / sum(m), with m = s L.

    Parameters
    ----------
    counts_NG
        Raw counts, [N, G].
    library_N
        Library sizes, [N]: counts of a cell over all its genes, also those not in `counts_NG`.

    Returns
    -------
    numpy.ndarray
        Natural log of sum((c - s L)^2) / sum(c), float64 [G]; NaN for genes without counts, -inf or nearly where
        counts are in proportion to the library (means, not draws). Fitting s to the same cells lowers the ratio of
        Poisson counts from 1 to 1 - sum(L^2) / sum(L)^2, about 1 - 1 / N.
    """
    counts = sp.csr_matrix(counts_NG, dtype=np.float64)
    library_N = np.asarray(library_N, dtype=np.float64).ravel()
    total_G = np.asarray(counts.sum(0)).ravel()
    with np.errstate(divide="ignore", invalid="ignore"):
        share_G = total_G / library_N.sum()
        library_of_entry = np.repeat(library_N, np.diff(counts.indptr))
        gene_of_entry, n_genes = counts.indices, counts.shape[1]
        error = counts.data - share_G[gene_of_entry] * library_of_entry
        stored_G = np.bincount(gene_of_entry, weights=error**2, minlength=n_genes)
        # A zero is off by s L; float sums of the same squares may leave less than nothing.
        rest_G = (library_N**2).sum() - np.bincount(gene_of_entry, weights=library_of_entry**2, minlength=n_genes)
        return np.where(total_G > 0, np.log((stored_G + share_G**2 * np.maximum(rest_G, 0)) / total_G), np.nan)


def variance_pearson(true_G: np.ndarray, decoded_G: np.ndarray, enough_G: np.ndarray) -> float:
    """Correlation over genes of two results of `variance_over_poisson`.

    Parameters
    ----------
    true_G, decoded_G
        Of true and of decoded cells, [G] each.
    enough_G
        Genes to compare, bool [G]: those with enough true counts to measure a variance. Of these, genes that are not
        finite in both are skipped, as where no cell is decoded with a count.

    Returns
    -------
    float
        NaN where undefined.
    """
    both_G = np.asarray(enough_G, dtype=bool) & np.isfinite(true_G) & np.isfinite(decoded_G)
    return _pearson(true_G[both_G], decoded_G[both_G])


def gene_correlation(true_NG: Expression, decoded_NG: Expression, top: np.ndarray) -> float:
    """Do genes move together over decoded cells as over true ones: correlation of the correlations of all gene pairs.

    Parameters
    ----------
    true_NG, decoded_NG
        log1p of counts per 10,000, [cells, G] each; the numbers of cells may differ.
    top
        Indices of the genes to compare; those constant over the true or over the decoded cells are skipped.

    Returns
    -------
    float
        Pearson correlation between the upper triangles; NaN for fewer than three genes.
    """
    true_NT, decoded_NT = _columns(true_NG, top), _columns(decoded_NG, top)
    if not len(true_NT) or not len(decoded_NT):
        return float("nan")
    varies_T = (np.ptp(true_NT, axis=0) > 0) & (np.ptp(decoded_NT, axis=0) > 0)
    if varies_T.sum() < 3:
        return float("nan")
    pairs = np.triu_indices(int(varies_T.sum()), 1)
    true_TT, decoded_TT = (np.corrcoef(cells[:, varies_T], rowvar=False) for cells in (true_NT, decoded_NT))
    return _pearson(true_TT[pairs], decoded_TT[pairs])


def _profile(cells_NG: Expression) -> np.ndarray:
    """Mean over cells, float64 [G]; NaN without cells."""
    n = cells_NG.shape[0]
    # SciPy's mean(dtype=float64) of float32 sums in float32 all the same (1.17).
    return np.asarray(np.ones(n) @ cells_NG) / n if n else np.full(cells_NG.shape[1], np.nan)


def _columns(cells_NG: Expression, top: np.ndarray) -> np.ndarray:
    """Chosen genes, dense float64 [N, genes]."""
    chosen = cells_NG[:, top]
    return np.asarray(chosen if isinstance(chosen, np.ndarray) else chosen.toarray(), dtype=np.float64)


def _pearson(a: np.ndarray, b: np.ndarray, *, noise: float = 0.0) -> float:
    """Pearson correlation; NaN for fewer than two values, values not finite, or a range of `noise` or less."""
    if len(a) < 2 or not (np.ptp(a) > noise and np.ptp(b) > noise):
        return float("nan")
    return float(stats.pearsonr(a, b).statistic)
