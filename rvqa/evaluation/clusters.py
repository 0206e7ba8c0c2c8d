"""How well a latent separates known types and mixes batches. Needs scikit-learn.

N cells, D latent dimensions, U distinct points, T types, K neighbours. All distances are Euclidean. Cells without a
label are the caller's to leave out.
"""

import numpy as np


def knn_purity(latent_ND: np.ndarray, label_N: np.ndarray, *, k: int = 15) -> float:
    """Share of a cell's nearest other cells that carry its label, mean over cells.

    Quantized cells often share one point. Where a tie at one point is cut by `k`, the cells of that point count in
    proportion, so that the order of the cells does not matter.

    Parameters
    ----------
    latent_ND
        Latents, float [N, D].
    label_N
        Labels, [N].
    k
        Neighbours of a cell, itself excluded; at most N - 1 are used.

    Returns
    -------
    float
        In [0, 1]; NaN for fewer than two cells.
    """
    from sklearn.neighbors import NearestNeighbors

    k = min(k, len(label_N) - 1)
    if k < 1:
        return float("nan")
    point_UD, point_N = np.unique(_float64(latent_ND), axis=0, return_inverse=True)
    names, type_N = np.unique(np.asarray(label_N).astype(str), return_inverse=True)
    cells_UT = np.zeros((len(point_UD), len(names)))
    np.add.at(cells_UT, (point_N, type_N), 1)
    cells_U = cells_UT.sum(1)

    own_N = cells_U[point_N] - 1
    used_N = np.minimum(own_N, k)
    hits_N = used_N * (cells_UT[point_N, type_N] - 1) / np.maximum(own_N, 1)
    if len(point_UD) > 1:
        others = min(k, len(point_UD) - 1)
        near_UK = NearestNeighbors(n_neighbors=others).fit(point_UD).kneighbors(return_distance=False)
        for near_U in near_UK.T:
            near_N = near_U[point_N]
            taken_N = np.minimum(k - used_N, cells_U[near_N])
            hits_N += taken_N * cells_UT[near_N, type_N] / cells_U[near_N]
            used_N += taken_N
    return float(np.mean(hits_N / k))


def clustering(latent_ND: np.ndarray, label_N: np.ndarray, *, seed: int = 0) -> dict[str, float]:
    """Agreement of k-means with the labels, and the silhouette of the labels, as in scIB (Luecken et al. 2022).

    Parameters
    ----------
    latent_ND
        Latents, float [N, D].
    label_N
        Labels, [N].
    seed
        Of k-means, which makes as many clusters as there are labels and keeps the best of ten starts (scib-metrics 0.5
        makes one start: equal where that finds the optimum, noisier elsewhere).

    Returns
    -------
    dict
        `nmi`: mutual information over the arithmetic mean of the entropies; `ari`: adjusted Rand index; `asw`: mean
        silhouette s of the labels as (s + 1) / 2, NaN for a single label or where each cell has its own.
    """
    from sklearn.cluster import KMeans
    from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score, silhouette_score

    latent_ND, label_N = _float64(latent_ND), np.asarray(label_N).astype(str)
    types = len(np.unique(label_N))
    cluster_N = KMeans(types, n_init=10, random_state=seed).fit_predict(latent_ND)
    defined = 1 < types < len(label_N)
    silhouette = silhouette_score(latent_ND, label_N) if defined else np.nan
    return {
        "nmi": float(normalized_mutual_info_score(label_N, cluster_N, average_method="arithmetic")),
        "ari": float(adjusted_rand_score(label_N, cluster_N)),
        "asw": float((silhouette + 1) / 2),
    }


def _float64(latent_ND: np.ndarray) -> np.ndarray:
    return np.asarray(latent_ND, dtype=np.float64)
