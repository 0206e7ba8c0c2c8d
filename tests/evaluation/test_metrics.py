"""Metrics and baselines: equal to the libraries that define them, or to a hand-made case."""

import anndata
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from sklearn.metrics import f1_score

from rvqa.data import splits
from rvqa.errors import InputError
from rvqa.evaluation import baselines
from rvqa.evaluation.metrics import ShiftTruth, bootstrap_interval, classification, perplexity


def test_macro_f1_averages_over_the_true_classes_alone():
    true = np.array(["a", "a", "b", "b"], dtype=object)
    predicted = np.array(["a", "c", "b", "b"], dtype=object)
    scores = classification(true, predicted)
    assert scores["accuracy"] == 0.75
    assert scores["macro_f1"] == pytest.approx((2 / 3 + 1.0) / 2)
    both = f1_score(true, predicted, labels=["a", "b"], average="macro")
    assert scores["macro_f1"] == pytest.approx(both)


def test_perplexity_of_even_and_of_single_use():
    codes = np.stack([np.arange(32), np.zeros(32, int), np.arange(32) % 4], axis=1).astype(np.uint8)
    np.testing.assert_allclose(perplexity(codes, 32), [32, 1, 4])


def test_shift_scores():
    rng = np.random.default_rng(0)
    control, shift = rng.normal(size=(400, 80)), np.zeros(80)
    shift[:10] = 3.0
    perturbed = rng.normal(size=(300, 80)) + shift
    truth = ShiftTruth.of(control, perturbed, n_top=10)
    assert set(truth.top) == set(range(10))
    perfect = truth.scores(perturbed.mean(0))
    assert perfect["mse"] == 0
    assert perfect["pearson_shift"] == pytest.approx(1)
    still = truth.scores(truth.control_G)
    assert np.isnan(still["pearson_shift"])
    assert still["mse_top"] == pytest.approx(9, rel=0.1)
    half = truth.scores(truth.control_G + shift / 2)
    assert half["mse_top"] == pytest.approx(9 / 4, rel=0.1)
    assert half["pearson_shift"] == pytest.approx(
        stats.pearsonr(shift / 2, truth.perturbed_G - truth.control_G).statistic
    )


@pytest.mark.parametrize(
    ("form", "tolerance"),
    [(np.asarray, 1e-12), (sp.csr_matrix, 1e-12), (lambda cells: sp.csr_matrix(cells, dtype=np.float32), 1e-6)],
)
def test_shift_scores_equal_cell_eval(kang, form, tolerance):
    """The numbers are from cell-eval 0.8.2 (polars 2.1.0, SciPy 1.17.1), computed once elsewhere.

    `MetricsEvaluator(..., skip_de=True).compute(profile="anndata")` on these cells, which it does not change (it
    would normalise counts to their median). The predicted AnnData has the true control cells, because cell-eval takes
    the predicted shift from predicted controls, and we from true ones. It has no error over top genes; `mse_top` is its
    `mse` on an embedding (`embed_key`) of the 50 genes of largest |t| by `scipy.stats.ttest_ind(equal_var=False)`.
    """
    truth = ShiftTruth.of(form(kang("CD14+ Monocyte", "ctrl")), form(kang("CD14+ Monocyte", "stim")))
    scores = truth.scores(np.asarray(form(kang("FCGR3A+ Monocyte", "stim")).mean(0)).ravel())
    assert scores["pearson_shift"] == pytest.approx(0.9184057096797286, rel=tolerance)
    assert scores["mse"] == pytest.approx(0.008757537615172709, rel=tolerance)
    assert scores["mse_top"] == pytest.approx(0.03274659912147623, rel=tolerance)


def test_perturbation_baselines_by_hand():
    controls = {"near": np.array([1.0, 0.0]), "far": np.array([9.0, 9.0])}
    shifts = {"near": np.array([1.0, 1.0]), "far": np.array([3.0, -1.0])}
    control = np.array([1.0, 0.5])
    np.testing.assert_allclose(baselines.additive(control, shifts), [3.0, 0.5])
    profile, name = baselines.nearest_context(control, controls, shifts)
    assert name == "near"
    np.testing.assert_allclose(profile, [2.0, 1.5])


def test_annotation_baselines_separate_what_is_separate():
    rng = np.random.default_rng(0)
    labels = np.repeat(np.array(["x", "y", "z"], dtype=object), [60, 40, 40])
    rows = rng.poisson(0.2, (140, 70)).astype(np.float32)
    for at, name in enumerate("xyz"):
        rows[labels == name, at * 10 : at * 10 + 10] += 3
    train, test = sp.csr_matrix(rows[::2]), sp.csr_matrix(rows[1::2])
    assert (baselines.logistic_regression(train, labels[::2], test) == labels[1::2]).all()
    assert (baselines.nearest_neighbours(train, labels[::2], test) == labels[1::2]).all()
    assert (baselines.majority(labels, 5) == "x").all()


@given(st.lists(st.sampled_from(["1", "2", "3", "", "nan"]), min_size=3, max_size=30))
def test_a_cell_is_held_out_or_trained_on_never_both(donors):
    names = [str(i) for i in range(len(donors))]
    adata = anndata.AnnData(np.zeros((len(donors), 1)), obs=pd.DataFrame({"donor": donors}, index=names))
    if "2" not in donors:
        with pytest.raises(InputError, match="'2'"):
            splits.by_donor(adata, "donor", ["2"])
        return
    train, held_out = splits.by_donor(adata, "donor", ["2"])
    assert not (train & held_out).any()
    known = np.isin(donors, ["1", "2", "3"])
    np.testing.assert_array_equal(train | held_out, known)
    assert (np.array(donors)[held_out] == "2").all()


def test_bootstrap_interval_of_an_accuracy():
    right = np.repeat([1, 0], [900, 100])
    low, high = bootstrap_interval(right, rng=np.random.default_rng(0), rounds=20_000)
    exact = stats.binom(1000, 0.9).ppf([0.025, 0.975]) / 1000
    np.testing.assert_allclose([low, high], exact, atol=0.0011)
    assert (low, high) == bootstrap_interval(right == 1, rng=np.random.default_rng(0), rounds=20_000)
    narrow = bootstrap_interval(right, rng=np.random.default_rng(0), level=0.5)
    assert low < narrow[0] < 0.9 < narrow[1] < high


def test_bootstrap_interval_equals_resampling_of_cells():
    values = np.random.default_rng(1).gamma(2.0, size=300)
    found = bootstrap_interval(values, rng=np.random.default_rng(2), rounds=4000)
    library = stats.bootstrap(
        (values,), np.mean, n_resamples=4000, method="percentile", rng=np.random.default_rng(3)
    ).confidence_interval
    # A 2.5 % quantile of 4,000 means has an error of about 5 % of their spread; three times that is allowed.
    np.testing.assert_allclose(found, library, atol=0.15 * values.std() / np.sqrt(300))


def test_bootstrap_interval_covers_as_often_as_it_says():
    rng = np.random.default_rng(0)
    inside = 0
    for right in rng.binomial(1, 0.8, (400, 500)):
        low, high = bootstrap_interval(right, rng=rng, level=0.9, rounds=400)
        inside += low <= 0.8 <= high
    assert abs(inside / 400 - 0.9) < 0.06


def test_bootstrap_interval_at_the_ends():
    rng = np.random.default_rng(0)
    assert bootstrap_interval(np.ones(7), rng=rng) == (1, 1)
    assert np.isnan(bootstrap_interval(np.array([]), rng=rng)).all()
