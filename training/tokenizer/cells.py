"""The cells of all files of a fit on one axis, in memory or in mapped files.

A fit adds up what it learns from all cells over blocks of `ROWS` cells of one file. So the result does not depend on
where the cells are stored.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import scipy.sparse as sp
import torch
from torch import Tensor

from rvqa.data.alignment import align
from rvqa.data.cells import ROWS, Cells
from rvqa.data.depth import log1p_normalise
from rvqa.data.genes import GeneAxis
from rvqa.io.files import save_array, writing
from rvqa.tokenizer.model import CellTokenizer


class StoredRows:
    """Rows of a CSR matrix, float32 [N, G], whose entries stay in files until they are asked for.

    Parameters
    ----------
    folder
        Folder that `write` filled.
    indptr
        Row pointers, int64 [N + 1].
    columns
        Number of columns, G.
    """

    def __init__(self, folder: Path, indptr: np.ndarray, columns: int) -> None:
        self.indptr, self.shape = indptr, (len(indptr) - 1, columns)
        empty = not indptr[-1]
        self._indices, self._data = (
            np.zeros(0, dtype) if empty else np.memmap(folder / name, dtype=dtype, mode="r")
            for name, dtype in (("indices", np.int32), ("data", np.float32))
        )

    @classmethod
    def write(cls, folder: Path, blocks: Iterable[sp.csr_matrix], columns: int) -> "StoredRows":
        """Write canonical CSR blocks one after another."""
        lengths = [np.zeros(1, dtype=np.int64)]
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
            with ExitStack() as stack:
                indices, data = (stack.enter_context(open(folder / name, "wb")) for name in ("indices", "data"))
                for block in blocks:
                    lengths.append(np.diff(block.indptr).astype(np.int64))
                    _append(indices, block.indices.astype(np.int32, copy=False))
                    _append(data, block.data.astype(np.float32, copy=False))
            indptr = np.cumsum(np.concatenate(lengths))
            save_array(folder / "indptr.npy", indptr)
        return cls(folder, indptr, columns)

    @classmethod
    def open(cls, folder: Path, columns: int) -> "StoredRows":
        """Open the rows that another process wrote."""
        return cls(folder, np.load(folder / "indptr.npy", allow_pickle=False), columns)

    def __getitem__(self, rows: slice | np.ndarray) -> sp.csr_matrix:
        """Return the rows of a slice or of an array of indices, in the given order."""
        if isinstance(rows, slice):
            first, last, _ = rows.indices(self.shape[0])
            span = slice(self.indptr[first], self.indptr[last])
            parts = (self._data[span], self._indices[span], self.indptr[first : last + 1] - self.indptr[first])
            return sp.csr_matrix(tuple(map(np.array, parts)), shape=(last - first, self.shape[1]))
        length_B = self.indptr[rows + 1] - self.indptr[rows]
        indptr = np.concatenate(([0], np.cumsum(length_B)))
        at = np.repeat(self.indptr[rows] - indptr[:-1], length_B) + np.arange(indptr[-1])
        return sp.csr_matrix((self._data[at], self._indices[at], indptr), shape=(len(rows), self.shape[1]))


def _append(file: BinaryIO, array: np.ndarray) -> None:
    file.write(np.ascontiguousarray(array).data)


@dataclass(frozen=True)
class Gathered:
    """Cells on one axis: counts int-valued float32 CSR [N, G], library sizes [N], measured genes and labels by cell."""

    counts: sp.csr_matrix | StoredRows
    """CSR matrix [N, G] that a slice or an array of indices selects rows of."""
    library_size: np.ndarray
    measured_FG: np.ndarray
    """Genes that each file measures, bool [files, G]."""
    file_N: np.ndarray
    """Ascending."""
    label_N: np.ndarray
    """Index of the label, -1 where unlabelled."""
    n_labels: int
    condition_N: np.ndarray
    """Perturbation, object [N]; "" for control cells, None where the file does not say."""

    def blocks(self) -> Iterator[tuple[int, slice]]:
        """Yield the number of a file and a slice of at most `ROWS` of its rows."""
        for file, n in enumerate(np.bincount(self.file_N, minlength=len(self.measured_FG))):
            first = int(np.searchsorted(self.file_N, file))
            for start in range(first, first + n, ROWS):
                yield file, slice(start, min(start + ROWS, first + n))


def gather(files: Sequence[Cells], axis: GeneAxis, *, folder: Path | None = None, read: bool = True) -> Gathered:
    """Put the cells of several files on one axis.

    Parameters
    ----------
    files
        Cells at the depth at which a tokenizer reads them.
    axis
        Gene axis of the tokenizer.
    folder
        Folder for the counts, which then stay on disk. Defaults to None, which keeps them in memory.
    read
        Whether to read the files. False if another process has written `folder`. Defaults to True.

    Raises
    ------
    rvqa.errors.InputError
        A file has too few genes of the axis, or the folder cannot be written.
    """
    blocks = (block for file in files for _, block in file.on_axis(axis))
    if folder is None:
        counts = sp.vstack(list(blocks), format="csr")
    else:
        counts = StoredRows.write(folder, blocks, len(axis)) if read else StoredRows.open(folder, len(axis))
    names = sorted({label for file in files for label in file.label_N if label})
    index = {name: i for i, name in enumerate(names)} | {"": -1}
    return Gathered(
        counts=counts,
        library_size=np.concatenate([file.library_size for file in files]),
        measured_FG=np.stack([align(file.var, axis).measured for file in files]),
        file_N=np.repeat(np.arange(len(files)), [len(file) for file in files]),
        label_N=np.array([index[label] for file in files for label in file.label_N]),
        n_labels=len(names),
        condition_N=np.concatenate([np.asarray(file.condition_N, dtype=object) for file in files]),
    )


@torch.inference_mode()
def latent_blocks(
    tokenizer: CellTokenizer, cells: Gathered, which: slice | None = None
) -> Iterator[tuple[slice, Tensor]]:
    """Yield latents [B, D] by the dense layers as trained; they equal `CellTokenizer.latent` up to rounding."""
    tokenizer.eval()
    first, last, _ = (which or slice(None)).indices(len(cells.library_size))
    device = tokenizer.gene_mean_G.device
    for start in range(first, last, 1024):
        rows = slice(start, min(start + 1024, last))
        measured_BG = torch.from_numpy(cells.measured_FG[cells.file_N[rows]]).to(device)
        log1p_BG = torch.from_numpy(log1p_normalise(cells.counts[rows], cells.library_size[rows]).toarray()).to(device)
        yield rows, tokenizer.encode_dense(tokenizer.standardise(log1p_BG, measured_BG))


def latents(tokenizer: CellTokenizer, cells: Gathered) -> Tensor:
    """Return latents [N, D] of all cells."""
    return torch.cat([latent_BD for _, latent_BD in latent_blocks(tokenizer, cells)])
