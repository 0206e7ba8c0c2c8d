"""Calibration finds the temperature that made the scores; cells set aside are a share of every label."""

import numpy as np
import pytest

from rvqa.training.language.calibration import set_aside, temperature


@pytest.mark.parametrize("true", [0.5, 1.0, 3.0])
def test_the_temperature_that_labels_were_drawn_at_is_found(true):
    rng = np.random.default_rng(0)
    scores = rng.normal(0, 3, (20_000, 6))
    drawn = np.argmax(scores / true + rng.gumbel(size=scores.shape), axis=1)
    assert temperature(scores + rng.normal(0, 50, (20_000, 1)), drawn) == pytest.approx(true, rel=0.05)


def test_a_share_of_every_label_is_set_aside():
    labels = np.array(["B"] * 1000 + ["T"] * 400 + ["rare"] * 19 + [""] * 500)
    aside = set_aside(labels, seed=0)
    assert [int(aside[labels == name].sum()) for name in ("B", "T", "rare", "")] == [50, 20, 0, 0]
    assert (set_aside(labels, seed=0) == aside).all()
    assert (set_aside(labels, seed=1) != aside).any()
    assert not set_aside(labels[:900], seed=0).any()  # too few to fit a temperature
    assert set_aside(np.repeat(["B", "T"], 50_000), seed=0).sum() == 1000
