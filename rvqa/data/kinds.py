"""What a matrix of cells by genes holds: raw counts, or what was made of them; and the one form it is brought to.

Every value is checked before a matrix passes as counts (finite, non-negative, an integer, at most 2^24 so that float32
holds it exactly). What does not pass is labelled, so that the refusal can say what was probably handed over:

    EMPTY        no cells, no genes, or nothing but zeros
    JUNK         NaN or Inf; not a number; above 2^24; nearly integers
    SCALED       a negative value (sc.pp.scale, regress_out, ComBat)
    COUNTS       every value is an integer; `rvqa.data.integers` then doubts those that were never counted
    LOG1P        1 < max <= MAX_LOG, and after expm1 rows sum to one total or are whole numbers times a factor
    NORMALISED   rows sum to one total or are whole numbers times a factor
    otherwise    NORMALISED (corrected, estimated) above MAX_LOG or if most are integers; LOG1P above 1; JUNK below

The first line that applies wins. Only the last three look at a sample of rows (evenly spaced, so the label is
deterministic): they decide the wording, never the acceptance.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import Enum
from typing import Any

import numpy as np
import scipy.sparse as sp

from rvqa.data.multiples import common_total, whole_multiples
from rvqa.errors import InputError

MAX_COUNT = 2**24  # float32 holds every integer up to here
MAX_LOG = 20.0  # log2(1 + 1e6) = 19.9: no log-transformed expression is larger
NEARLY = 1e-3  # non-integers all closer than this to an integer are counts that went through floating point
_SAMPLED_ROWS, _SAMPLED_RUNS, _SCAN_BLOCK = 512, 16, 1 << 18


class MatrixKind(Enum):
    """What a matrix of cells by genes holds; the table at the top of this file is the decision."""

    COUNTS = "raw counts"
    LOG1P = "log1p-normalised"
    NORMALISED = "normalised"
    SCALED = "scaled"
    JUNK = "not expression"
    EMPTY = "empty"


@dataclass(frozen=True)
class MatrixFacts:
    """What `inspect_matrix` saw and concluded.

    Numbers are over the non-zero values of the whole matrix; `row_total` (None where rows differ) and `whole_multiples`
    over at most 512 rows, after expm1 if the kind is LOG1P, and only where the values alone do not decide.
    """

    kind: MatrixKind
    n_cells: int
    n_genes: int
    dtype: str
    n_nonzero: int = 0
    n_nonfinite: int = 0
    n_negative: int = 0
    n_integer: int = 0
    minimum: float = 0.0
    maximum: float = 0.0
    worst_fraction: float = 0.0
    row_total: float | None = None
    whole_multiples: bool = False

    @property
    def share_integer(self) -> float:
        """Share of the non-zero values that are integers, 1 where there are none."""
        return self.n_integer / self.n_nonzero if self.n_nonzero else 1.0


def canonical_csr(matrix: Any) -> sp.csr_matrix:
    """Bring any 2-D matrix to CSR with sorted indices, no duplicates and no stored zeros, without changing it.

    Shares memory with a CSR input that already has this form and may be written to. Indices are int32 where they fit,
    else int64; integers are int64 where duplicates had to be added up, else as stored. A sparse matrix whose parts
    contradict each other is an `InputError`.
    """
    csr = sp.csr_matrix(_checked(matrix) if sp.issparse(matrix) and matrix.format in ("csr", "csc") else matrix)
    if csr.has_canonical_format and np.count_nonzero(csr.data) == csr.nnz:
        return csr
    tidy = csr.astype(np.int64 if csr.dtype.kind in "iu" else csr.dtype)  # a copy, in which sums do not wrap around
    tidy.sum_duplicates()
    tidy = tidy.astype(csr.dtype, copy=False) if tidy.nnz == csr.nnz else tidy
    tidy.eliminate_zeros()
    return tidy


def classify(matrix: Any) -> MatrixKind:
    """Say what a matrix of cells by genes holds; `inspect_matrix` adds the facts behind it."""
    return inspect_matrix(matrix).kind


def inspect_matrix(matrix: Any) -> MatrixFacts:
    """Look at every value of a matrix [n_cells, n_genes], dense or sparse, and conclude what it holds.

    `kind` is COUNTS only if every value was seen to be one. Duplicate entries of a sparse matrix are taken one by one.
    """
    matrix = loaded(matrix)
    if matrix.ndim != 2:
        raise InputError(f"Expected a matrix of cells by genes, got an array with {matrix.ndim} dimensions.")
    shape: dict[str, Any] = {"n_cells": matrix.shape[0], "n_genes": matrix.shape[1], "dtype": str(matrix.dtype)}
    if 0 in matrix.shape or matrix.dtype.kind not in "iuf":
        return MatrixFacts(MatrixKind.EMPTY if 0 in matrix.shape else MatrixKind.JUNK, **shape)
    if sp.issparse(matrix) and matrix.format not in ("csr", "csc"):
        matrix = matrix.tocsr()
    values = matrix.data[: matrix.nnz] if sp.issparse(matrix) else matrix.ravel(order="K")
    facts = MatrixFacts(MatrixKind.NORMALISED, **shape, **_scan(values))
    if (certain := _kind_by_values(facts)) is not None:
        return replace(facts, kind=certain)
    sample = canonical_csr(matrix[sampled_rows(matrix.shape[0])])
    rows = [row for row in np.split(sample.data.astype(np.float64), sample.indptr[1:-1]) if row.size]
    integers, logs = facts.share_integer > 0.5, 1 < facts.maximum <= MAX_LOG
    for kind in (MatrixKind.LOG1P, MatrixKind.NORMALISED) if logs else (MatrixKind.NORMALISED,):
        with np.errstate(under="ignore"):  # on some processors expm1 of the smallest values underflows
            linear = [np.expm1(row) for row in rows] if kind is MatrixKind.LOG1P else rows
        total, multiples = common_total(linear), not integers and whole_multiples(linear)
        if total is not None or multiples:
            return replace(facts, kind=kind, row_total=total, whole_multiples=multiples)
    if integers or facts.maximum > MAX_LOG:
        return facts
    return replace(facts, kind=MatrixKind.LOG1P if logs else MatrixKind.JUNK)


def _checked(matrix: Any) -> Any:
    """Put the arrays of a CSR or CSC matrix into a new one, without a tail; compiled code will trust their indices."""
    stored = (matrix.data, matrix.indices, matrix.indptr)
    # PyTorch takes no read-only array and no reversed one.
    parts = (part if part.flags.writeable and part.flags.c_contiguous else part.copy() for part in stored)
    try:
        own = (sp.csr_matrix if matrix.format == "csr" else sp.csc_matrix)(tuple(parts), shape=matrix.shape)
        own.check_format(full_check=True)
    except ValueError as error:
        raise InputError(f"A sparse matrix of the file is broken ({error}): write the file anew.") from error
    return own


def loaded(matrix: Any) -> Any:
    """A matrix in memory: scipy sparse, or an array without a mask."""
    if hasattr(matrix, "to_memory"):  # anndata's backed sparse matrix
        matrix = matrix.to_memory()
    elif hasattr(matrix, "compute"):  # Dask
        matrix = matrix.compute()
    if sp.issparse(matrix):
        return matrix
    if np.ma.is_masked(matrix) and matrix.dtype.kind in "iuf":
        matrix = matrix.astype(np.float64).filled(np.nan)
    matrix = np.asarray(matrix)
    return native(matrix) if matrix.dtype.kind in "iuf" else matrix


def native(values: np.ndarray) -> np.ndarray:
    """Numbers as scipy knows them: this machine's byte order, half precision as single, long double as double; exact.

    Raises
    ------
    InputError
        Values of another kind: bool, complex numbers, texts.
    """
    if values.dtype.kind not in "iuf":
        raise InputError(f"The matrix holds values of type {values.dtype}, not counts. Pass raw counts.")
    if values.dtype.kind == "f" and values.dtype.itemsize not in (4, 8):
        return values.astype(np.float32 if values.dtype.itemsize < 4 else np.float64)
    return values.astype(values.dtype.newbyteorder("="), copy=False)


def sampled_rows(n_cells: int) -> np.ndarray:
    """Rows by which a matrix is judged, ascending int64: all of a small one, else runs of neighbours, evenly spaced."""
    if n_cells <= _SAMPLED_ROWS:
        return np.arange(n_cells)
    length = _SAMPLED_ROWS // _SAMPLED_RUNS
    first = np.linspace(0, n_cells - length, _SAMPLED_RUNS).astype(np.int64)
    return np.unique(first[:, None] + np.arange(length))


def _scan(values: np.ndarray) -> dict[str, Any]:
    seen: dict[str, Any] = dict.fromkeys(("n_nonzero", "n_nonfinite", "n_negative", "n_integer"), 0)
    extremes: dict[str, Any] = {}
    for start in range(0, values.size, _SCAN_BLOCK):
        block = values[start : start + _SCAN_BLOCK]
        block = block[block != 0]
        finite = block[np.isfinite(block)]
        seen["n_nonzero"] += block.size
        seen["n_nonfinite"] += block.size - finite.size
        if finite.size:
            size = np.abs(finite)
            # Nearest count that is not zero: 1e-4 is a fraction, not nearly an integer.
            fraction = np.abs(size - np.maximum(np.rint(size), 1)) if size.dtype.kind == "f" else np.zeros(1)
            seen["n_negative"] += int(np.count_nonzero(finite < 0))
            seen["n_integer"] += finite.size - int(np.count_nonzero(fraction))
            extremes["minimum"] = min(float(finite.min()), extremes.get("minimum", np.inf))
            extremes["maximum"] = max(float(finite.max()), extremes.get("maximum", -np.inf))
            extremes["worst_fraction"] = max(float(fraction.max()), extremes.get("worst_fraction", 0.0))
    return seen | extremes


def _kind_by_values(facts: MatrixFacts) -> MatrixKind | None:
    if facts.n_nonzero == 0:
        return MatrixKind.EMPTY
    if facts.n_negative and not facts.n_nonfinite:
        return MatrixKind.SCALED
    if facts.n_nonfinite or facts.maximum > MAX_COUNT:
        return MatrixKind.JUNK
    if facts.n_integer == facts.n_nonzero:
        return MatrixKind.COUNTS
    return MatrixKind.JUNK if facts.worst_fraction < NEARLY else None
