"""`perturb`: counts at the control cell's depth, provenance, reproducible seeds, and errors with a remedy."""

import numpy as np
import pytest
import scipy.sparse as sp

import rvqa
from rvqa.data.alignment import align
from rvqa.data.reading import Reading
from rvqa.demo import SIMULATED
from rvqa.encoding import cell_codes
from rvqa.errors import InputError
from rvqa.perturbation import PRIOR_COUNTS, decode_counts, residual_ratios
from tests.raw_counts import raw_counts


@pytest.fixture
def cells(shipped):
    return shipped.contexts.copy()


def predict(cells, model, **options):
    settings = {
        "perturbation": SIMULATED,
        "cell_type_key": "label",
        "control_key": "condition",
        "control_value": "control",
        "library_size_key": "depth",
        "progress": False,
    }
    return rvqa.perturb(cells, model, **{**settings, **options})


def test_what_comes_back(cells, model):
    before = cells.copy()
    predicted = predict(cells, model, n_samples=2)
    control = cells[cells.obs["condition"] == "control"]
    assert predicted.shape == (2 * control.n_obs, len(model.cell_tokenizer.axis))
    assert list(predicted.obs["rvqa_control_cell"][::2]) == list(control.obs_names)
    assert predicted.obs_names.is_unique
    assert (predicted.obs["condition"] == SIMULATED).all()
    raw_counts(predicted)  # rejects anything but counts
    assert predicted.layers["mean"].dtype == np.float32
    assert predicted.obsm["rvqa_codes"].shape == (predicted.n_obs, 8)
    assert predicted.uns["rvqa"]["perturbation"] == SIMULATED
    assert predicted.uns["rvqa"]["seed"] == 0
    assert cells.obs.equals(before.obs)
    assert (cells.X != before.X).nnz == 0
    assert not cells.obsm.keys() - before.obsm.keys()


def test_the_same_seed_gives_the_same_cells(cells, model):
    first, again, other = (predict(cells, model, seed=seed) for seed in (3, 3, 4))
    np.testing.assert_array_equal(first.obsm["rvqa_codes"], again.obsm["rvqa_codes"])
    assert (first.X != again.X).nnz == 0
    assert (first.obsm["rvqa_codes"] != other.obsm["rvqa_codes"]).any()
    assert (first.X != other.X).nnz > 0


def test_counts_follow_their_mean_and_the_depth_of_the_control_cell(cells, model):
    predicted = predict(cells, model, n_samples=4)
    mean = predicted.layers["mean"].astype(np.float64).sum()
    drawn = predicted.X.sum(dtype=np.float64)
    assert drawn == pytest.approx(mean, rel=0.02)
    depth = cells.obs["depth"].loc[predicted.obs["rvqa_control_cell"]].to_numpy()
    share = predicted.layers["mean"].sum(1) / depth
    assert share.max() < 1.5
    assert np.corrcoef(np.asarray(predicted.X.sum(1)).ravel(), depth)[0, 1] > 0.5


def test_writing_the_control_codes_again_predicts_no_change(cells, model):
    """The correction makes sums of the decoded controls of a type equal the measured sums, gene by gene."""
    control = cells[cells.obs["condition"] == "control"].copy()
    tokenizer = model.cell_tokenizer
    codes, _ = cell_codes(control, tokenizer, Reading(library_size_key="depth"))
    symbols = list(tokenizer.axis.symbols)
    counts = sp.csr_matrix(control[:, symbols].X)
    depth = control.obs["depth"].to_numpy()
    types = control.obs["label"].to_numpy(dtype=object)
    ratio = residual_ratios(tokenizer, counts, align(control, tokenizer.axis).measured, depth, codes, types)
    mean, _ = decode_counts(tokenizer, codes, depth, types, ratio, np.random.default_rng(0))
    for name in ("Dendritic", "CD14+ Monocyte"):
        rows = types == name
        measured = np.asarray(counts[np.flatnonzero(rows)].sum(0)).ravel()
        many = np.minimum(measured, tokenizer.share_sum(codes[rows], depth[rows])) >= 20 * PRIOR_COUNTS
        assert many.sum() > 30
        np.testing.assert_allclose(mean[rows].sum(0)[many], measured[many], rtol=1 / 20)


def test_the_taught_response_is_predicted_for_taught_types(cells, model):
    """On a type seen under the simulated response, predicted and true shifts of strong genes agree in direction."""
    rows = (cells.obs["label"] == "Dendritic").to_numpy()
    treated = (cells.obs["condition"] == SIMULATED).to_numpy()
    symbols = list(model.cell_tokenizer.axis.symbols)

    def share(mask):
        chosen = cells[mask]
        total = np.asarray(chosen[:, symbols].X.sum(0)).ravel()
        return (total + 1) / chosen.obs["depth"].sum(), total

    (before, seen), (after, _) = share(rows & ~treated), share(rows & treated)
    predicted = predict(cells[rows].copy(), model, n_samples=4)
    depth = cells.obs["depth"].loc[predicted.obs["rvqa_control_cell"]].sum()
    written = (predicted.layers["mean"].sum(0) + 1) / depth
    strong = (np.abs(np.log(after / before)) > np.log(2)) & (seen >= 20)
    assert strong.sum() >= 5
    agree = np.sign(np.log(written / before)) == np.sign(np.log(after / before))
    assert agree[strong].mean() > 0.8


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"perturbation": "SIMULATED respons"}, "SIMULATED response"),
        ({"cell_type_key": "labels"}, "'label'"),
        ({"control_value": "contrl"}, "'control'"),
        ({"control_value": None}, "go together"),
        ({"n_samples": 0}, "n_samples is 0"),
        ({"n_samples": 1.5}, "n_samples is 1.5; expected a whole number"),
        ({"seed": -1}, "seed is -1"),
        ({"seed": 0.5}, "seed is 0.5"),
    ],
)
def test_wrong_use_is_refused_with_a_way_out(cells, model, options, message):
    with pytest.raises(InputError, match=message):
        predict(cells, model, **options)


def test_types_the_model_does_not_know_and_missing_ones(cells, model):
    cells.obs["label"] = cells.obs["label"].astype(str).replace("Dendritic", "Dendritc")
    with pytest.raises(InputError, match=r"'Dendritc'.*'Dendritic'"):
        predict(cells, model)
    cells.obs["label"] = ["", *cells.obs["label"][1:]]
    with pytest.raises(InputError, match="control cells have no type"):
        predict(cells, model, control_key=None, control_value=None)
