"""Metrics, each once, equal to scikit-learn's, SciPy's and cell-eval's where these define one.

N cells, M levels, G genes. "Profile": mean over cells of log1p of counts per 10,000, [G].
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import pandas as pd
import scipy.sparse as sp
from scipy import stats

Expression: TypeAlias = np.ndarray | sp.csr_matrix


def classification(true_N: np.ndarray, predicted_N: np.ndarray) -> dict[str, float]:
    """Accuracy, and F1 averaged over the classes that occur among the true labels (each class counts the same)."""
    f1_C = per_class(true_N, predicted_N, sorted(set(true_N)))["f1"]
    return {"accuracy": float(np.mean(true_N == predicted_N)), "macro_f1": float(np.mean(f1_C))}


def confusion(true_N: np.ndarray, predicted_N: np.ndarray, rows: Sequence[str], columns: Sequence[str]) -> np.ndarray:
    """Cells by true label (rows) and predicted label (columns), int64; cells of other labels are in none."""
    row_N, column_N = pd.Index(rows).get_indexer(true_N), pd.Index(columns).get_indexer(predicted_N)
    inside_N = (row_N >= 0) & (column_N >= 0)
    cells = row_N[inside_N] * len(columns) + column_N[inside_N]
    return np.bincount(cells, minlength=len(rows) * len(columns)).reshape(len(rows), len(columns))


def per_class(true_N: np.ndarray, predicted_N: np.ndarray, classes: Sequence[str]) -> dict[str, np.ndarray]:
    """`precision`, `recall` and `f1` of every class, float64 [C] each; 0 where one is undefined, as in scikit-learn."""
    hit_C = np.array([np.sum((true_N == name) & (predicted_N == name)) for name in classes], dtype=np.float64)
    predicted_C = np.array([np.sum(predicted_N == name) for name in classes])
    true_C = np.array([np.sum(true_N == name) for name in classes])
    return {
        "precision": hit_C / np.maximum(predicted_C, 1),
        "recall": hit_C / np.maximum(true_C, 1),
        "f1": 2 * hit_C / np.maximum(predicted_C + true_C, 1),
    }


def bootstrap_interval(
    values_N: np.ndarray, *, rng: np.random.Generator, level: float = 0.95, rounds: int = 1000
) -> tuple[float, float]:
    """Percentile bootstrap interval of a mean over cells (Efron 1979).

    How often each distinct value is drawn is multinomial, so 0/1 values cost two columns whatever the number of cells.
    Cells count as independent: what differs between donors is not in the interval.

    Parameters
    ----------
    values_N
        One value a cell, [N]; for an accuracy whether the cell is right, 0 or 1.
    rng
        Decides the draws.
    level
        Share of the bootstrap means within the interval.
    rounds
        Number of bootstrap means.

    Returns
    -------
    tuple
        Lower and upper end; NaN without cells.
    """
    n = len(values_N)
    if n == 0:
        return float("nan"), float("nan")
    distinct_V, cells_V = np.unique(np.asarray(values_N, dtype=np.float64), return_counts=True)
    drawn_RV = rng.multinomial(n, cells_V / n, size=rounds)
    low, high = np.quantile(drawn_RV @ distinct_V / n, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def perplexity(codes_NM: np.ndarray, entries: int) -> np.ndarray:
    """Codebook use of every level, float64 [M]: exp of the entropy of its codes; `entries` when all are used alike."""
    counts_MK = np.stack([np.bincount(codes_NM[:, level], minlength=entries) for level in range(codes_NM.shape[1])])
    return np.exp(stats.entropy(counts_MK, axis=1))


@dataclass(frozen=True)
class ShiftTruth:
    """What really happened to a population of cells: the ruler for predicted shifts."""

    control_G: np.ndarray
    """Profile of the control cells."""
    perturbed_G: np.ndarray
    """Profile of the perturbed cells."""
    top: np.ndarray
    """Indices of the genes that differ most by Welch's t between perturbed and control cells."""

    @classmethod
    def of(cls, control_NG: Expression, perturbed_NG: Expression, *, n_top: int = 50) -> "ShiftTruth":
        """Measure it on log1p of counts per 10,000, [cells, G] each, dense or sparse."""
        (control_G, control_spread_G), (perturbed_G, spread_G) = _moments(control_NG), _moments(perturbed_NG)
        t_G = np.abs(perturbed_G - control_G) / np.sqrt(control_spread_G + spread_G + 1e-12)
        top = np.argsort(-t_G, kind="stable")[:n_top]
        return cls(control_G, perturbed_G, top)

    def scores(self, predicted_G: np.ndarray) -> dict[str, float]:
        """Compare a predicted profile with the perturbed cells.

        Returns
        -------
        dict
            `mse_top`: mean squared error over the top genes; `mse`: over all genes, cell-eval's `mse`; `pearson_shift`:
            correlation over all genes of predicted and true shift against control, NaN where no shift is predicted,
            cell-eval's `pearson_delta` for predictions with the true control cells.
        """
        shift_G, error_G = predicted_G - self.control_G, predicted_G - self.perturbed_G
        moves = float(np.abs(shift_G).max()) > 0
        pearson = stats.pearsonr(shift_G, self.perturbed_G - self.control_G).statistic if moves else np.nan
        return {
            "mse_top": float(np.mean(error_G[self.top] ** 2)),
            "mse": float(np.mean(error_G**2)),
            "pearson_shift": float(pearson),
        }


def _moments(cells_NG: Expression) -> tuple[np.ndarray, np.ndarray]:
    """Mean over cells, float64 [G], and the variance of that mean [G]."""
    if isinstance(cells_NG, np.ndarray):
        return cells_NG.mean(0, dtype=np.float64), cells_NG.var(0) / len(cells_NG)
    n = cells_NG.shape[0]
    mean_G = np.asarray(cells_NG.mean(0, dtype=np.float64)).ravel()
    square_G = np.asarray(cells_NG.multiply(cells_NG).mean(0, dtype=np.float64)).ravel()
    return mean_G, np.maximum(square_G - mean_G**2, 0) / n
