"""Count matrices outside memory: rows from start to stop, as the parts of a CSR matrix.

Every kind has `n_cells`, `n_genes`, `rows(start, stop)`, which several threads may call at once, and `blocks(start,
stop)`, which cuts rows so that each part has about `ENTRIES` entries.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple, Protocol

import h5py
import numpy as np
import scipy.sparse as sp

from rvqa.data.files import memory, stores
from rvqa.data.files.hdf5 import Dataset
from rvqa.data.kinds import canonical_csr, native, sampled_rows
from rvqa.errors import InputError

ENTRIES = 3_000_000
"""Entries of a block: 24 MB, long enough that threads rarely meet."""

CELLS = 32_768
"""Most cells of a block: their hidden units take 512 bytes each and more."""


class Rows(NamedTuple):
    """Rows of a CSR matrix: pointers int64 [n + 1] from 0, columns and counts [entries]."""

    indptr: np.ndarray
    indices: np.ndarray
    data: np.ndarray


class Matrix(Protocol):
    """Cells by genes."""

    @property
    def shape(self) -> tuple[int, int]:
        """Cells and genes."""

    def rows(self, start: int, stop: int) -> Rows:
        """Rows from start to stop."""

    def blocks(self, start: int, stop: int) -> Iterator[tuple[int, int]]:
        """Consecutive parts of a range of rows."""


class Compressed:
    """CSR in arrays with a `dtype` and `read(start, stop)` each.

    Raises
    ------
    rvqa.errors.InputError
        The arrays contradict each other, or hold no numbers.
    """

    def __init__(self, indptr: Any, indices: Any, data: Any, shape: tuple[int, int]) -> None:
        self.indptr, self.indices, self.data, self.shape = indptr, indices, data, shape
        native(np.zeros(0, data.dtype))
        if odd := [each.dtype for each in (indptr, indices) if each.dtype.kind not in "iu"]:
            raise InputError(f"The sparse matrix is broken: its places have the type {odd[0]}. Write the file anew.")
        if len(indptr) != shape[0] + 1 or len(indices) != len(data):
            raise InputError(
                f"The sparse matrix is broken: {len(indptr):,} row pointers for {shape[0]:,} cells, {len(indices):,} "
                f"columns for {len(data):,} values. Write the file anew."
            )

    def pointers(self, start: int, stop: int) -> np.ndarray:
        """Row pointers int64 [stop - start + 1], checked."""
        indptr = self.indptr.read(start, stop + 1).astype(np.int64)
        if (np.diff(indptr) < 0).any() or indptr[0] < 0 or indptr[-1] > len(self.data):
            raise InputError(
                f"The sparse matrix is broken: row pointers of cells {start:,} to {stop:,} decrease or leave its "
                f"{len(self.data):,} values. Write the file anew."
            )
        most = max(ENTRIES, self.shape[1])
        if (long := np.flatnonzero(np.diff(indptr) > most)).size:
            cell, entries = start + int(long[0]), int(np.diff(indptr)[long[0]])
            raise InputError(
                f"The sparse matrix is broken: cell {cell:,} has {entries:,} values, but there are {self.shape[1]:,} "
                "genes. Write the file anew."
            )
        return indptr

    def rows(self, start: int, stop: int) -> Rows:
        """Rows from start to stop."""
        indptr = self.pointers(start, stop)
        span = int(indptr[0]), int(indptr[-1])
        each = self.indices.dtype.itemsize + self.data.dtype.itemsize
        memory.require(2 * each * (span[1] - span[0]), f"{stop - start:,} cells with {span[1] - span[0]:,} values")
        return Rows(indptr - indptr[0], native(self.indices.read(*span)), native(self.data.read(*span)))

    def blocks(self, start: int, stop: int) -> Iterator[tuple[int, int]]:
        """Parts of at most `ENTRIES` entries, unless one row has more."""
        indptr = self.pointers(start, stop)
        first = 0
        while first < stop - start:
            last = int(np.searchsorted(indptr, indptr[first] + ENTRIES, side="right")) - 1
            last = min(max(last, first + 1), first + CELLS, stop - start)
            yield start + first, start + last
            first = last


class Dense:
    """Rows of a dense array, through a function that reads them."""

    def __init__(self, read: Any, shape: tuple[int, int]) -> None:
        self.read, self.shape = read, shape

    def rows(self, start: int, stop: int) -> Rows:
        """Rows from start to stop."""
        part = self.read(start, stop)
        csr = canonical_csr(part if sp.issparse(part) else native(part))
        return Rows(csr.indptr.astype(np.int64), csr.indices, csr.data)

    def blocks(self, start: int, stop: int) -> Iterator[tuple[int, int]]:
        """Parts of `ENTRIES` values, zeros counted."""
        step = min(max(1, ENTRIES // max(1, self.shape[1])), CELLS)
        for first in range(start, stop, step):
            yield first, min(first + step, stop)


class Chosen:
    """Some columns of another matrix.

    Parameters
    ----------
    matrix
        All columns.
    keep_G
        bool, one for each of its columns.
    """

    def __init__(self, matrix: Matrix, keep_G: np.ndarray) -> None:
        self.matrix, self._keep_G = matrix, keep_G
        self._place_G = np.cumsum(keep_G, dtype=np.int32) - 1
        self.shape = (matrix.shape[0], int(keep_G.sum()))

    def rows(self, start: int, stop: int) -> Rows:
        """Rows from start to stop."""
        indptr, indices, data = self.matrix.rows(start, stop)
        if len(indices) and (indices.min() < 0 or indices.max() >= len(self._keep_G)):
            raise InputError(
                f"The sparse matrix is broken: it has columns beyond its {len(self._keep_G):,}. Write the file anew."
            )
        kept = self._keep_G[indices]
        before = np.concatenate(([0], np.cumsum(kept, dtype=np.int64)))
        return Rows(before[indptr], self._place_G[indices[kept]], data[kept])

    def blocks(self, start: int, stop: int) -> Iterator[tuple[int, int]]:
        """Those of the whole matrix."""
        return self.matrix.blocks(start, stop)


def sample(matrix: Matrix) -> sp.csr_matrix:
    """The `sampled_rows` of a matrix."""
    return rows_of(matrix, sampled_rows(matrix.shape[0]))


def rows_of(matrix: Matrix, at: np.ndarray) -> sp.csr_matrix:
    """Some rows, ascending int64, as canonical CSR; neighbours are read at once.

    Raises
    ------
    rvqa.errors.InputError
        The matrix is broken.
    """
    parts = [sp.csr_matrix((0, matrix.shape[1]), dtype=np.float32)]
    for run in np.split(at, np.flatnonzero(np.diff(at) > 1) + 1):
        if len(run):
            parts.append(as_csr(matrix.rows(int(run[0]), int(run[-1]) + 1), matrix.shape[1]))
    return sp.vstack(parts[1:] or parts, format="csr")


def whole(matrix: Matrix) -> np.ndarray | sp.csr_matrix:
    """All rows, dense where they are stored so.

    Raises
    ------
    rvqa.errors.InputError
        The matrix is broken, or holds no numbers.
    """
    if isinstance(matrix, Dense) and not sp.issparse(rows := matrix.read(0, matrix.shape[0])):
        return native(rows)
    return as_csr(matrix.rows(0, matrix.shape[0]), matrix.shape[1])


def as_csr(rows: Rows, columns: int) -> sp.csr_matrix:
    """Rows as a canonical CSR matrix; what is broken is rejected.

    Raises
    ------
    rvqa.errors.InputError
        The matrix is broken.
    """
    shape = (len(rows.indptr) - 1, columns)
    try:
        csr = sp.csr_matrix((rows.data, rows.indices, rows.indptr), shape=shape)
    except ValueError as error:
        raise InputError(f"A sparse matrix of the file is broken ({error}): write the file anew.") from error
    return canonical_csr(csr)


class Array:
    """An array in memory or on disk, or of zarr, with `read`."""

    def __init__(self, array: Any) -> None:
        self.array, self.dtype = array, array.dtype

    def __len__(self) -> int:
        return self.array.shape[0]

    def read(self, start: int, stop: int) -> np.ndarray:
        """Elements from start to stop."""
        if isinstance(self.array, np.ndarray):
            return self.array[start:stop]
        return stores.read(self.array, start, stop)


def of_hdf5(stored: h5py.Group | h5py.Dataset) -> Matrix | None:
    """Matrix of an `.h5ad` file as anndata writes it; None where it is CSC.

    Raises
    ------
    rvqa.errors.InputError
        Another encoding.
    """
    if isinstance(stored, h5py.Dataset):
        if stored.ndim != 2:
            raise InputError(f"{stored.name} has {stored.ndim} axes; expected cells by genes.")
        native(np.zeros(0, stored.dtype))
        dense = Dataset(stored)
        return Dense(dense.read, (int(dense.shape[0]), int(dense.shape[1])))
    shape = _sparse_shape(stored)
    return None if shape is None else Compressed(*parts_of(stored), shape)


def of_zarr(stored: Any) -> Matrix | None:
    """Matrix of a zarr store as anndata writes it; None where it is CSC."""
    import zarr

    if isinstance(stored, zarr.Array):
        if stored.ndim != 2:
            raise InputError(f"{stored.name} has {stored.ndim} axes; expected cells by genes.")
        native(np.zeros(0, stored.dtype))
        with stores.compiled_codecs():
            dense = zarr.open_array(stored.store_path, mode="r")
        return Dense(lambda start, stop: stores.read(dense, start, stop), (stored.shape[0], stored.shape[1]))
    shape = _sparse_shape(stored)
    return None if shape is None else Compressed(*parts_of(stored), shape)


def parts_of(group: Any) -> tuple[Any, Any, Any]:
    """Pointers, places and values of a sparse matrix of HDF5 or zarr, each with `dtype`, a length and `read`.

    Raises
    ------
    rvqa.errors.InputError
        One has not one axis.
    """
    with stores.compiled_codecs():
        stored = [group[name] for name in ("indptr", "indices", "data")]
    for each in stored:
        if each.ndim != 1:
            raise InputError(f"The sparse matrix is broken: {each.name} has {each.ndim} axes. Write the file anew.")
    indptr, indices, data = map(Dataset if isinstance(group, h5py.Group) else Array, stored)
    return indptr, indices, data


def of_lazy(stored: Any) -> Matrix:
    """Matrix of an AnnData that is not in memory: backed, a view of one, or Dask."""

    def read(start: int, stop: int) -> Any:
        part = stored[start:stop]
        part = part.compute() if hasattr(part, "compute") else part
        return part if sp.issparse(part) else np.asarray(part)

    return Dense(read, tuple(stored.shape))


def _sparse_shape(group: Any) -> tuple[int, int] | None:
    encoding = group.attrs.get("encoding-type", "")
    if "h5sparse_format" in group.attrs:  # anndata before 0.7
        found = group.attrs["h5sparse_format"]
        encoding = f"{found.decode() if isinstance(found, bytes) else found}_matrix"
    if encoding == "csc_matrix":
        return None
    if absent := [name for name in ("indptr", "indices", "data") if encoding == "csr_matrix" and name not in group]:
        raise KeyError(f"{group.name} has no {' and no '.join(absent)}")
    if encoding != "csr_matrix":
        raise InputError(
            f"{group.name} is stored as {encoding or 'a group without an encoding'!r}; expected a dense array, or "
            "csr_matrix as anndata writes it."
        )
    cells, genes = stored_shape(group)
    return cells, genes


def stored_shape(group: Any) -> tuple[int, int]:
    """Cells and genes of a sparse matrix in a group, of any age."""
    stated = np.asarray(group.attrs["shape" if "shape" in group.attrs else "h5sparse_shape"])
    if stated.shape != (2,) or stated.dtype.kind not in "iu" or int(stated.min()) < 0:
        raise InputError(f"{group.name} does not say how many cells and genes it has. Write the file anew.")
    return int(stated[0]), int(stated[1])
