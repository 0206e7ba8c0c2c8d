"""Partners: cells of different files that are each other's nearest neighbours and are taken to be of one kind.

Chemistry, depth and laboratory shift all cells of a file alike; what is left after each gene is standardised within its
file is shared biology. A perturbation's effect is also biology, so control cells have partners among control cells, and
perturbed cells among cells with the same perturbation. For two files, the leading singular vectors of the product of
their standardised matrices put both in one space (canonical correlation with the identity for both covariances), where
mutual nearest neighbours are found.

Sources: mutual nearest neighbours between batches (Haghverdi et al., Nature Biotechnology 2018), the joint space
(Butler et al., Nature Biotechnology 2018).
"""

from dataclasses import dataclass
from itertools import product

import numpy as np
from scipy.sparse.linalg import LinearOperator, svds

from rvqa.data.depth import log1p_normalise
from rvqa.training.tokenizer.cells import Gathered

MOST_CELLS = 5_000
"""Most cells of a file and condition that can have partners; they are drawn at random if there are more."""

MOST_FILES = 8
"""Number of files that each file is compared with: those that follow it, in a circle."""

NEIGHBOURS, DIMENSIONS = 10, 20
LEAST_GENES = 50
_LARGEST, _MIN_SCALE = 5.0, 0.1


@dataclass(frozen=True, eq=False)
class Partners:
    """Partners of every cell, as the parts of a CSR matrix: pointers [N + 1] and rows of partners."""

    pointers: np.ndarray
    rows: np.ndarray

    def draw(self, cells: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Return the positions in `cells` of those that have a partner, and the row of one partner for each."""
        first, count = self.pointers[cells], np.diff(self.pointers)[cells]
        having = np.flatnonzero(count)
        return having, self.rows[first[having] + rng.integers(count[having])]


def find_partners(cells: Gathered, *, seed: int) -> Partners:
    """Find mutual nearest neighbours among the files of a fit; one file gives none."""
    files = len(cells.measured_FG)
    if files == 1:
        return Partners(np.zeros(len(cells.file_N) + 1, dtype=np.int64), np.zeros(0, dtype=np.int64))
    rng = np.random.default_rng(seed)
    chosen: list[dict[str, np.ndarray]] = [{} for _ in range(files)]
    known = sorted({condition for condition in cells.condition_N if condition is not None})
    for file, condition in product(range(files), known):
        rows = np.flatnonzero((cells.file_N == file) & (cells.condition_N == condition))
        if len(rows) > 1:
            chosen[file][condition] = np.sort(rng.permutation(rows)[:MOST_CELLS])
    ones, others = [np.zeros(0, dtype=np.int64)], [np.zeros(0, dtype=np.int64)]
    for one in range(files):
        for other in sorted({(one + step) % files for step in range(1, MOST_FILES + 1)} - {one}):
            both_G = np.flatnonzero(cells.measured_FG[one] & cells.measured_FG[other])
            if (other < one and (one - other) % files <= MOST_FILES) or len(both_G) < LEAST_GENES:
                continue  # the pair was compared already, or shares too few genes
            for condition in sorted(chosen[one].keys() & chosen[other].keys()):
                own_N, their_N = chosen[one][condition], chosen[other][condition]
                a, b = _mutual(*(_standardised(cells, each, both_G) for each in (own_N, their_N)))
                ones.append(own_N[a])
                others.append(their_N[b])
    first, second = np.concatenate([*ones, *others]), np.concatenate([*others, *ones])
    order = np.argsort(first, kind="stable")
    pointers = np.concatenate(([0], np.cumsum(np.bincount(first, minlength=len(cells.file_N)))))
    return Partners(pointers, second[order])


def _standardised(cells: Gathered, rows: np.ndarray, genes: np.ndarray) -> np.ndarray:
    dense = log1p_normalise(cells.counts[rows], cells.library_size[rows])[:, genes].toarray()
    return np.clip((dense - dense.mean(0)) / np.maximum(dense.std(0), _MIN_SCALE), -_LARGEST, _LARGEST)


def _mutual(one_NG: np.ndarray, other_NG: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return pairs of rows that are among each other's nearest neighbours in the joint space."""
    shape = (len(one_NG), len(other_NG))
    k = min(DIMENSIONS, min(shape) - 1)
    neighbours = min(NEIGHBOURS, *shape)
    if k < 1:
        return np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64)
    joint = LinearOperator(
        shape,
        matvec=lambda v: one_NG @ (other_NG.T @ v),
        rmatvec=lambda v: other_NG @ (one_NG.T @ v),
        dtype=np.float32,
    )
    u, s, vt = svds(joint, k=k, v0=np.ones(min(shape), dtype=np.float32), return_singular_vectors=True)
    both = []
    for vectors in (u * np.sqrt(s), vt.T * np.sqrt(s)):
        both.append(vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12))
    near = both[0] @ both[1].T
    hits = _highest(near, neighbours) & _highest(near.T, neighbours).T
    a, b = np.nonzero(hits)
    return a, b


def _highest(values: np.ndarray, n: int) -> np.ndarray:
    """Return whether each value is one of the n highest of its row, bool."""
    at = np.argpartition(-values, n - 1, axis=1)[:, :n]
    chosen = np.zeros(values.shape, dtype=bool)
    np.put_along_axis(chosen, at, values=True, axis=1)
    return chosen
