"""Simple predictors that stand in every table beside the model.

Annotation: majority class, k nearest neighbours, logistic regression, all on log1p of counts per 10,000 over the
genes that reference and test file share. Perturbation, on profiles: no change, additive (mean shift of the other
contexts), nearest context (shift of the cell type whose control profile is closest).
"""

from collections.abc import Mapping

import numpy as np
import scipy.sparse as sp


def majority(label_N: np.ndarray, n: int) -> np.ndarray:
    """Most frequent label, n times; the alphabetically first on a tie."""
    names, counts = np.unique(label_N.astype(str), return_counts=True)
    return np.full(n, names[np.argmax(counts)], dtype=object)


def nearest_neighbours(
    train_NG: sp.csr_matrix,
    label_N: np.ndarray,
    test_NG: sp.csr_matrix,
    *,
    k: int = 15,
    components: int = 50,
    seed: int = 0,
) -> np.ndarray:
    """Vote of the k nearest reference cells on principal components fitted on the reference."""
    from sklearn.decomposition import PCA
    from sklearn.neighbors import KNeighborsClassifier

    pca = PCA(min(components, min(train_NG.shape) - 1), svd_solver="arpack", random_state=seed).fit(train_NG)
    vote = KNeighborsClassifier(min(k, train_NG.shape[0])).fit(pca.transform(train_NG), label_N.astype(str))
    return vote.predict(pca.transform(test_NG)).astype(object)


def logistic_regression(
    train_NG: sp.csr_matrix, label_N: np.ndarray, test_NG: sp.csr_matrix, *, C: float = 0.1
) -> np.ndarray:
    """Multinomial logistic regression with an L2 penalty (CellTypist's model, without its gene selection)."""
    from sklearn.linear_model import LogisticRegression

    fitted = LogisticRegression(C=C, max_iter=1000).fit(train_NG, label_N.astype(str))
    return fitted.predict(test_NG).astype(object)


def additive(control_G: np.ndarray, shifts: Mapping[str, np.ndarray]) -> np.ndarray:
    """Control profile plus the mean shift of the other contexts."""
    return control_G + np.mean(list(shifts.values()), axis=0)


def nearest_context(
    control_G: np.ndarray, controls: Mapping[str, np.ndarray], shifts: Mapping[str, np.ndarray]
) -> tuple[np.ndarray, str]:
    """Control profile plus the shift of the context whose control profile is closest; and that context's name."""
    name = min(sorted(shifts), key=lambda each: float(((controls[each] - control_G) ** 2).sum()))
    return control_G + shifts[name], name
