"""The temperature at which the probabilities of labels mean what they say: one number, fitted on cells set aside.

Temperature scaling (Guo et al., ICML 2017): softmax(scores / T), with T of the least negative log likelihood on cells
whose labels nothing was trained on.

Legend: N cells, C labels.
"""

import numpy as np
import torch
from scipy.optimize import minimize_scalar

SHARE, FEWEST, MOST = 0.05, 50, 1000
"""Of every label's cells, this share is set aside: in all so many at least, else none, and so many at most."""


def set_aside(label_N: np.ndarray, *, seed: int) -> np.ndarray:
    """Which cells to set aside, bool [N]: a share of each label ("" is none), none where that makes too few.

    Parameters
    ----------
    label_N
        Labels, texts.
    seed
        Of the choice.
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
    """Temperature of the least negative log likelihood, between 0.2 and 5.

    Parameters
    ----------
    log_probability_NC
        Scores of labels, nats, float [N, C]; up to a constant of each cell.
    label_N
        Index of the true label, int [N].
    """
    scores_NC, truth_N = torch.as_tensor(log_probability_NC).double(), torch.as_tensor(label_N)

    def loss(log_temperature: float) -> float:
        return float(torch.nn.functional.cross_entropy(scores_NC / np.exp(log_temperature), truth_N))

    return float(np.exp(minimize_scalar(loss, bounds=(np.log(0.2), np.log(5.0)), method="bounded").x))
