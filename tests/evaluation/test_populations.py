"""Decoded populations, against formulae written another way and simulated counts with a known answer."""

import numpy as np
import pytest
import scipy.sparse as sp

from rvqa.evaluation.populations import gene_correlation, mean_pearson_centered, variance_over_poisson, variance_pearson


def log1p(counts):
    return np.log1p(counts / counts.sum(1, keepdims=True) * 1e4)


def simulated(seed, *, cells=400, genes=60, dispersion=0.5):
    """Draw negative binomial counts of cells in two programs, with random library sizes."""
    rng = np.random.default_rng(seed)
    share = np.random.default_rng(7).dirichlet(np.full(genes, 2.0))
    program = rng.random(cells) < 0.4
    mean = rng.lognormal(7, 0.4, cells)[:, None] * share * np.where(program[:, None] & (np.arange(genes) < 12), 4, 1)
    return rng.poisson(mean * rng.gamma(1 / dispersion, dispersion, mean.shape)).astype(np.float64)


def negative_binomial(rng, mean, dispersion):
    """Variance mean + dispersion * mean^2."""
    size = 1 / np.broadcast_to(dispersion, mean.shape)
    return rng.negative_binomial(size, size / (size + mean))


def test_centered_pearson_equals_its_formula_and_sparse_equals_dense():
    true = {name: log1p(simulated(at)) for at, name in enumerate("abc")}
    decoded = {name: log1p(simulated(at + 10, cells=150)) for at, name in enumerate("abc")}
    center = np.concatenate(list(true.values())).mean(0)
    found = mean_pearson_centered(true, decoded, center)
    assert list(found) == list("abc")
    for name in "abc":
        x, y = true[name].mean(0) - center, decoded[name].mean(0) - center
        x, y = x - x.mean(), y - y.mean()
        assert found[name] == pytest.approx((x @ y) / np.sqrt((x @ x) * (y @ y)))
    sparse = mean_pearson_centered(
        {name: sp.csr_matrix(cells) for name, cells in true.items()},
        {name: sp.csr_matrix(cells) for name, cells in decoded.items()},
        center,
    )
    assert sparse == pytest.approx(found)


def test_centered_pearson_equals_cell_eval(kang):
    """The numbers are from cell-eval 0.8.2 (polars 2.1.0, SciPy 1.17.1), computed once elsewhere.

    They are its `pearson_delta` with the true cells of all types as the control of both the true and the predicted
    AnnData: what is subtracted is then the global mean. Stimulated cells stand for decoded ones. cell-eval has nothing
    for spreads and correlations of genes.
    """
    expected = {
        "B cell": 0.3741916247952906,
        "CD14+ Monocyte": 0.5415254705786166,
        "CD4 T cell": 0.5658706207110776,
        "NK cell": 0.6413464992978976,
    }
    true, decoded = ({name: kang(name, condition) for name in expected} for condition in ("ctrl", "stim"))
    center = np.concatenate(list(true.values())).mean(0)
    assert mean_pearson_centered(true, decoded, center) == pytest.approx(expected, rel=1e-12)


def test_centered_pearson_tells_a_type_from_the_global_mean():
    rng = np.random.default_rng(0)
    shift = rng.normal(size=(3, 200)) * 0.3
    base = rng.gamma(1, 1, 200)
    true = {name: base + shift[at] + rng.normal(size=(500, 200)) * 0.1 for at, name in enumerate("abc")}
    center = np.concatenate(list(true.values())).mean(0)
    swapped = {"a": true["a"], "b": true["c"], "c": np.tile(center, (4, 1))}
    found = mean_pearson_centered(true, swapped, center)
    assert found["a"] == pytest.approx(1)
    assert found["b"] < 0
    assert np.isnan(found["c"])


def test_centered_pearson_is_undefined_without_cells_or_without_other_types():
    cells = log1p(simulated(0)).astype(np.float32)
    center = cells.mean(0, dtype=np.float64).astype(np.float32)
    for form in (np.asarray, sp.csr_matrix):
        assert np.isnan(mean_pearson_centered({"a": form(cells)}, {"a": form(cells)}, center)["a"])
        empty = mean_pearson_centered({"a": form(cells)}, {"a": form(cells[:0])}, center * 0)
        assert np.isnan(empty["a"])


def test_variance_over_poisson_equals_its_definition_and_sparse_equals_dense():
    counts = simulated(0, cells=80)
    counts[:, 3] = 0
    counts[::2, :30] = 0
    library = counts.sum(1) + 100
    expected = []
    for gene in counts.T:
        share = gene.sum() / library.sum()
        expected.append(np.log(((gene - share * library) ** 2).sum() / gene.sum()) if gene.sum() else np.nan)
    for form in (np.asarray, sp.csr_matrix, lambda dense: sp.csr_matrix(dense.astype(np.float32))):
        np.testing.assert_allclose(variance_over_poisson(form(counts), library), expected, rtol=1e-10)
    assert np.isnan(expected[3])
    assert np.isfinite(np.delete(expected, 3)).all()


def test_variance_of_poisson_counts_is_poisson():
    rng = np.random.default_rng(0)
    library = rng.lognormal(7, 0.5, 4000)
    mean = library[:, None] * rng.dirichlet(np.full(300, 0.5)) * 0.9
    mean = mean[:, mean.mean(0) > 0.05]
    found = variance_over_poisson(rng.poisson(mean), library)
    # Squares of Poisson errors have variance m + 2 m^2; the ratio is their sum over sum(m).
    error = np.sqrt((mean + 2 * mean**2).sum(0)) / mean.sum(0)
    z = found / error
    assert np.abs(z).max() < 5
    assert abs(z.mean()) < 4 / np.sqrt(len(z))
    assert z.std() == pytest.approx(1, abs=0.2)


@pytest.mark.parametrize("dispersion", [0.1, 0.5, 2.0])
def test_variance_of_negative_binomial_counts_is_as_calculated(dispersion):
    rng = np.random.default_rng(1)
    library = rng.lognormal(7, 0.5, 20_000)
    mean = library[:, None] * np.array([1e-4, 1e-3, 3e-3, 1e-2])
    found = variance_over_poisson(sp.csr_matrix(negative_binomial(rng, mean, dispersion)), library)
    weighted = (mean**2).sum(0) / mean.sum(0)
    np.testing.assert_allclose(found, np.log(1 + dispersion * weighted), atol=0.1)
    assert found[3] > 0.5  # far from Poisson


def test_counts_in_proportion_to_the_library_have_no_variance():
    library = np.arange(1.0, 50)
    found = variance_over_poisson(np.outer(library, [0.1, 0.0]), library)
    assert found[0] < -20
    assert np.isnan(found[1])


def test_variance_pearson_within_the_mask():
    rng = np.random.default_rng(0)
    dispersion = rng.lognormal(-1, 1, 200)
    share = rng.dirichlet(np.full(200, 1.0))
    ratios = []
    for _ in range(2):
        library = rng.lognormal(8, 0.3, 600)
        ratios.append(variance_over_poisson(negative_binomial(rng, np.outer(library, share), dispersion), library))
    true, decoded = ratios
    enough = share > 0.002
    found = variance_pearson(true, decoded, enough)
    assert found == pytest.approx(np.corrcoef(true[enough], decoded[enough])[0, 1])
    assert found > 0.9
    true[np.flatnonzero(~enough)[0]] = 1e9  # not in `enough`, so without effect
    assert variance_pearson(true, decoded, enough) == found
    lost = np.flatnonzero(enough)[5]
    decoded[lost] = np.nan
    enough_but_one = enough.copy()
    enough_but_one[lost] = False
    assert variance_pearson(true, decoded, enough) == variance_pearson(true, decoded, enough_but_one)
    assert np.isnan(variance_pearson(true, decoded, np.zeros(200, bool)))
    assert np.isnan(variance_pearson(true, np.zeros(200), enough))


def test_gene_correlation_equals_its_formula_and_sparse_equals_dense():
    true, decoded = log1p(simulated(0)), log1p(simulated(1, cells=250))
    top = np.array([5, 0, 20, 31, 8, 11, 59])
    values = []
    for cells in (true, decoded):
        standard = (cells - cells.mean(0)) / cells.std(0)
        values.append([(standard[:, i] * standard[:, j]).mean() for at, i in enumerate(top) for j in top[at + 1 :]])
    found = gene_correlation(true, decoded, top)
    assert found == pytest.approx(np.corrcoef(*values)[0, 1])
    assert gene_correlation(sp.csr_matrix(true), sp.csr_matrix(decoded), top) == pytest.approx(found)


def test_gene_correlation_sees_programs_lost():
    true, again = log1p(simulated(0, cells=3000)), log1p(simulated(1, cells=3000))
    top = np.arange(30)
    rng = np.random.default_rng(0)
    alone = rng.permuted(true, axis=0)  # the same genes, each shuffled over cells independently
    assert gene_correlation(true, true, top) == pytest.approx(1)
    assert gene_correlation(true, again, top) > 0.9
    assert abs(gene_correlation(true, alone, top)) < 0.3


def test_gene_correlation_skips_constant_genes():
    true, decoded = log1p(simulated(0)), log1p(simulated(1))
    expected = gene_correlation(true, decoded, np.array([1, 2, 3, 4]))
    true[:, 0], decoded[:, 5] = 0, 0.3
    assert gene_correlation(true, decoded, np.arange(6)) == pytest.approx(expected)
    assert np.isnan(gene_correlation(true, decoded, np.array([0, 1, 2])))
    assert np.isnan(gene_correlation(true, decoded[:1], np.arange(6)))
    assert np.isnan(gene_correlation(true, decoded[:0], np.arange(6)))
