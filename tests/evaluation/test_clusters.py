"""Separation of a latent: equal to scikit-learn, to scib-metrics, or to a hand-made case."""

import numpy as np
import pytest
from sklearn.metrics import silhouette_score
from sklearn.neighbors import NearestNeighbors

from rvqa.evaluation.clusters import clustering, knn_purity


def blobs(scale):
    """Four types of 40, 30, 20 and 10 cells in 5 dimensions; two batches 0.7 apart, the smallest type in one only."""
    rng = np.random.default_rng(0)
    label = np.repeat(["a", "b", "c", "d"], [40, 30, 20, 10])
    batch = np.where(np.arange(100) % 3 == 0, "x", "y")
    batch[label == "d"] = "x"
    centre = rng.normal(size=(4, 5)) * scale
    latent = centre[np.unique(label, return_inverse=True)[1]] + rng.normal(size=(100, 5))
    latent[batch == "x"] += 0.7
    return latent, label


@pytest.mark.parametrize("scale", [0.0, 1.0, 2.0])
@pytest.mark.parametrize("k", [1, 15, 98])
def test_purity_equals_nearest_neighbours_of_scikit_learn(scale, k):
    latent, label = blobs(scale)
    near = NearestNeighbors(n_neighbors=k).fit(latent).kneighbors(return_distance=False)
    assert knn_purity(latent, label, k=k) == pytest.approx((label[near] == label[:, None]).mean())


def test_purity_of_types_apart_and_of_types_mixed():
    rng = np.random.default_rng(0)
    label = np.repeat(np.array(["a", "b"], dtype=object), 200)
    apart = rng.normal(size=(400, 8)).astype(np.float32) + 100 * (label == "a")[:, None]
    assert knn_purity(apart, label) == 1
    mixed = knn_purity(rng.normal(size=(400, 8)), label)
    assert mixed == pytest.approx(199 / 399, abs=0.03)


def test_purity_with_fewer_cells_than_neighbours_counts_all_others():
    label = np.array(["a", "a", "a", "b"])
    assert knn_purity(np.arange(4.0)[:, None], label, k=15) == pytest.approx((2 / 3 * 3 + 0) / 4)
    assert np.isnan(knn_purity(np.zeros((1, 2)), np.array(["a"])))
    assert knn_purity(np.zeros((4, 1)), label) == pytest.approx((2 / 3 * 3 + 0) / 4)


def test_purity_of_cells_on_one_point_is_the_mean_over_the_orders_of_ties():
    rng = np.random.default_rng(0)
    point = rng.normal(size=(12, 3))[rng.integers(0, 12, 120)]
    label = rng.choice(["a", "b", "c"], 120, p=[0.6, 0.3, 0.1])
    found = knn_purity(point, label, k=7)
    rounds = []
    for _ in range(300):  # the same with noise far below the distances between points, which breaks ties
        near = (
            NearestNeighbors(n_neighbors=7)
            .fit(point + rng.normal(size=point.shape) * 1e-6)
            .kneighbors(return_distance=False)
        )
        rounds.append((label[near] == label[:, None]).mean())
    assert found == pytest.approx(np.mean(rounds), abs=4 * np.std(rounds) / np.sqrt(300))
    order = rng.permutation(120)
    assert knn_purity(point[order], label[order], k=7) == pytest.approx(found)
    assert found != pytest.approx(1, abs=0.1)


def test_clustering_equals_scib_metrics():
    """The numbers are from scib-metrics 0.5.10 (jax 0.10.2, float32) on `blobs(2.0)`, computed once elsewhere.

    They are `nmi_ari_cluster_labels_kmeans(latent, label)` and `silhouette_label(latent, label)`.
    """
    latent, label = blobs(2.0)
    scores = clustering(latent, label)
    assert scores["nmi"] == pytest.approx(0.9092086176908872, abs=1e-12)
    assert scores["ari"] == pytest.approx(0.9099718242669091, abs=1e-12)
    assert scores["asw"] == pytest.approx(0.6759747, abs=1e-6)


def test_clustering_of_types_apart_is_perfect_and_of_noise_is_chance():
    rng = np.random.default_rng(0)
    label = np.repeat(np.array(["a", "b", "c"], dtype=object), [200, 150, 50])
    noise = rng.normal(size=(400, 6)).astype(np.float32)
    apart = noise + 50 * np.unique(label.astype(str), return_inverse=True)[1][:, None].astype(np.float32)
    perfect = clustering(apart, label)
    assert perfect["nmi"] == pytest.approx(1)
    assert perfect["ari"] == pytest.approx(1)
    assert perfect["asw"] == pytest.approx((silhouette_score(apart.astype(float), label) + 1) / 2)
    assert perfect["asw"] > 0.95
    chance = clustering(noise, label)
    assert abs(chance["ari"]) < 0.05
    assert chance["nmi"] < 0.05
    assert chance["asw"] == pytest.approx(0.5, abs=0.03)
    assert clustering(noise, label, seed=3) == clustering(noise, label, seed=3)


def test_clustering_of_one_label_has_no_silhouette():
    assert np.isnan(clustering(np.arange(6.0).reshape(3, 2), np.array(["a"] * 3))["asw"])
