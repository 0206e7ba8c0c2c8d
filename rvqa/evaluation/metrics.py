"""Metrics, each once. Where scikit-learn or SciPy defines one, it is theirs.

N cells, M levels, G genes. "Profile": mean over cells of log1p of counts per 10,000, [G].
"""

from dataclasses import dataclass

import numpy as np
from scipy import stats


def classification(true_N: np.ndarray, predicted_N: np.ndarray) -> dict[str, float]:
    """Accuracy, and F1 averaged over the classes that occur among the true labels (each class counts the same)."""
    from sklearn.metrics import accuracy_score, f1_score

    classes = sorted(set(true_N))
    macro = f1_score(true_N, predicted_N, labels=classes, average="macro", zero_division=0)
    return {"accuracy": float(accuracy_score(true_N, predicted_N)), "macro_f1": float(macro)}


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
    def of(cls, control_NG: np.ndarray, perturbed_NG: np.ndarray, *, n_top: int = 50) -> "ShiftTruth":
        """Measure it on log1p of counts per 10,000, dense [cells, G] each."""
        spread_G = control_NG.var(0) / len(control_NG) + perturbed_NG.var(0) / len(perturbed_NG)
        shift_G = perturbed_NG.mean(0, dtype=np.float64) - control_NG.mean(0, dtype=np.float64)
        t_G = np.abs(shift_G) / np.sqrt(spread_G + 1e-12)
        top = np.argsort(-t_G, kind="stable")[:n_top]
        return cls(control_NG.mean(0, dtype=np.float64), perturbed_NG.mean(0, dtype=np.float64), top)

    def scores(self, predicted_G: np.ndarray) -> dict[str, float]:
        """Compare a predicted profile with the perturbed cells.

        Returns
        -------
        dict
            `mse_top`: mean squared error over the top genes; `mse`: over all genes; `pearson_shift`: correlation over
            all genes of predicted and true shift against control, NaN where no shift is predicted.
        """
        shift_G, error_G = predicted_G - self.control_G, predicted_G - self.perturbed_G
        moves = float(np.abs(shift_G).max()) > 0
        pearson = stats.pearsonr(shift_G, self.perturbed_G - self.control_G).statistic if moves else np.nan
        return {
            "mse_top": float(np.mean(error_G[self.top] ** 2)),
            "mse": float(np.mean(error_G**2)),
            "pearson_shift": float(pearson),
        }
