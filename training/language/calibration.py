"""Calibration of label probabilities by one temperature, fitted on cells that were set aside.

Temperature scaling (Guo et al., ICML 2017) uses softmax(scores / T). T minimises the negative log likelihood on cells
whose labels were not used in training.

Legend: N cells, C labels.
"""

import numpy as np
import torch
from scipy.optimize import minimize_scalar

SHARE, FEWEST, MOST = 0.05, 50, 1000
"""Share of each label's cells to set aside; the least number of cells in all, below which none is; and the most."""


def set_aside(label_N: np.ndarray, *, seed: int) -> np.ndarray:
    """Choose cells to set aside, bool [N]: a share of each label except "", or none where that gives too few.

    Parameters
    ----------
    label_N
        Label of each cell.
    seed
        Seed of the choice.
    """
    rng = np.random.default_rng(seed)
    labelled = int((label_N != "").sum())
    share = min(SHARE, MOST / max(labelled, 1))
    aside_N = np.zeros(len(label_N), dtype=bool)
    for label in sorted(set(label_N) - {""}):
        rows = np.flatnonzero(label_N == label)
        aside_N[rng.choice(rows, int(share * len(rows)), replace=False)] = True
    return aside_N if aside_N.sum() >= FEWEST else np.zeros_like(aside_N)


def temperature(log_probability_NC: np.ndarray, label_N: np.ndarray) -> float:
    """Find the temperature between 0.2 and 5 with the least negative log likelihood.

    Parameters
    ----------
    log_probability_NC
        Scores of labels in nats, float [N, C]. A constant may be added to all scores of a cell.
    label_N
        Index of the true label, int [N].
    """
    scores_NC, truth_N = torch.as_tensor(log_probability_NC).double(), torch.as_tensor(label_N)

    def loss(log_temperature: float) -> float:
        return float(torch.nn.functional.cross_entropy(scores_NC / np.exp(log_temperature), truth_N))

    return float(np.exp(minimize_scalar(loss, bounds=(np.log(0.2), np.log(5.0)), method="bounded").x))
