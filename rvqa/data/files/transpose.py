"""A matrix stored by genes (CSC) turned into rows of cells on disk, in constant memory.

Entries are read once, a range of genes at a time, and put behind each other in one file for every range of cells; each
of these is then sorted by cell and written out. Twice the size of the matrix passes through the scratch folder.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from rvqa.data.files import memory
from rvqa.data.files.matrices import Array, Compressed, parts_of, stored_shape
from rvqa.data.kinds import native
from rvqa.errors import InputError
from rvqa.io.files import save_array, whole_file, writing

ENTRIES = 8_000_000
"""Entries in memory at a time."""


def transposed(group: Any, scratch: Path, *, name: str, say: Callable[[str], None]) -> Compressed:
    """CSR form of a CSC matrix of an AnnData file, in files under `scratch`.

    Parameters
    ----------
    group
        HDF5 or zarr group as anndata writes it.
    scratch
        Folder to put them in.
    name
        Of the file, for messages.
    say
        Told what is done.
    """
    cells, genes = stored_shape(group)
    indptr, indices, data = parts_of(group)
    if odd := [each.dtype for each in (indptr, indices) if each.dtype.kind not in "iu"]:
        raise InputError(f"{name}: the sparse matrix is broken: its places have the type {odd[0]}.")
    if len(indptr) != genes + 1:
        raise InputError(f"{name}: the sparse matrix is broken: {len(indptr):,} column pointers for {genes:,} genes.")
    memory.require(32 * cells, f"{name}: pointers of {cells:,} cells")
    pointers = indptr.read(0, genes + 1).astype(np.int64)
    entries = len(data)
    if (np.diff(pointers) < 0).any() or pointers[0] != 0 or pointers[-1] != entries or len(indices) != entries:
        raise InputError(f"{name}: the sparse matrix is broken: its column pointers do not fit its values.")
    folder = scratch / f"rows-{name}"
    dtype = np.dtype([("cell", np.int64), ("gene", np.int32), ("count", native(data.read(0, 0)).dtype)])
    if not (folder / "indptr.npy").is_file():
        say(f"{name} is stored by genes (CSC): turning {entries:,} entries into rows on disk first, in {folder}")
        folder.mkdir(parents=True, exist_ok=True)
        with writing(folder):
            indptr_N = _transpose(folder, indices, data, pointers, cells, dtype, name)
        with whole_file(folder / "indptr.npy", output=False) as made:
            save_array(made, indptr_N)  # the last: without it nothing else counts
    indptr_N = np.load(folder / "indptr.npy", allow_pickle=False)
    columns = np.memmap(folder / "indices", dtype=np.int32, mode="r") if entries else np.zeros(0, np.int32)
    values = np.memmap(folder / "data", dtype=dtype["count"], mode="r") if entries else np.zeros(0, dtype["count"])
    return Compressed(Array(indptr_N), Array(columns), Array(values), (cells, genes))


def _transpose(
    folder: Path, indices: Any, data: Any, pointers: np.ndarray, cells: int, dtype: np.dtype, name: str
) -> np.ndarray:
    """Write the files `indices` and `data` of the CSR form; returns its row pointers."""
    entries = len(data)
    stored_N = np.zeros(cells + 1, dtype=np.int64)
    for start in range(0, entries, ENTRIES):
        rows = indices.read(start, min(start + ENTRIES, entries))
        if len(rows) and (rows.min() < 0 or rows.max() >= cells):
            raise InputError(f"{name}: the sparse matrix is broken: it has rows beyond its {cells:,} cells.")
        stored_N[1:] += np.bincount(rows, minlength=cells)
    indptr_N = np.cumsum(stored_N)
    bounds = [0]
    while bounds[-1] < cells:
        last = int(np.searchsorted(indptr_N, indptr_N[bounds[-1]] + ENTRIES, side="right")) - 1
        bounds.append(min(max(last, bounds[-1] + 1), cells))

    files = [open(folder / f"part-{i}", "wb") for i in range(len(bounds) - 1)]  # noqa: SIM115
    try:
        for start in range(0, entries, ENTRIES):
            stop = min(start + ENTRIES, entries)
            part = np.empty(stop - start, dtype=dtype)
            part["cell"], part["count"] = indices.read(start, stop), data.read(start, stop)
            part["gene"] = np.searchsorted(pointers, np.arange(start, stop), side="right") - 1
            bucket = np.searchsorted(bounds, part["cell"], side="right") - 1
            order = np.argsort(bucket, kind="stable")
            ends = np.searchsorted(bucket[order], np.arange(len(bounds)))
            for i, file in enumerate(files):
                file.write(part[order[ends[i] : ends[i + 1]]].data)  # `tofile` does not say why a disk fails
    finally:
        for file in files:
            file.close()
    with open(folder / "indices", "wb") as out_indices, open(folder / "data", "wb") as out_data:
        for i in range(len(files)):
            part = np.fromfile(folder / f"part-{i}", dtype=dtype)
            part = part[np.argsort(part["cell"], kind="stable")]  # genes stay in order
            out_indices.write(np.ascontiguousarray(part["gene"]).data)
            out_data.write(np.ascontiguousarray(part["count"]).data)
            (folder / f"part-{i}").unlink()
    return indptr_N
