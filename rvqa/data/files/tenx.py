"""Cell Ranger's `.h5` files.

Cell Ranger stores genes by cells in CSC form, which is cells by genes in CSR form, so the rows of a `.h5` file are read
from disk when they are asked for. No size that a file only states is allocated before the file is seen to be that
large.
"""

import re
from pathlib import Path
from typing import NamedTuple

import h5py
import numpy as np
import pandas as pd

from rvqa.data.files.hdf5 import Dataset
from rvqa.data.files.matrices import Compressed
from rvqa.errors import InputError, about
from rvqa.io.files import UNREADABLE, sentence

_UNCHECKED = 2**26
"""Bytes of names that a dataset may state without storing as much as gzip would need for them."""

DEFLATE = 1032
"""Bytes that one byte of a gzip file can stand for at most."""

_HUMAN = re.compile(r"grch\d|hg\d|human|homo", re.IGNORECASE)
_UNFILTERED = re.compile(r"raw_\w+_bc_matri")


class Opened(NamedTuple):
    """Counts of a file or folder.

    Attributes
    ----------
    matrix
        Cells by genes.
    var
        One row for each gene, indexed by its symbol, which may repeat; columns `gene_ids` and, where the file has
        them, `feature_types` and `genome`.
    names
        Barcodes, objects of str [cells], which may repeat.
    """

    matrix: Compressed
    var: pd.DataFrame
    names: np.ndarray


def is_tenx(file: h5py.File) -> bool:
    """Whether an HDF5 file is laid out as Cell Ranger's matrices are, of version 3 and later or of version 2."""
    return _has(file, "matrix", "barcodes") or _has(file, "matrix", "features") or bool(_genomes(file))


def open_tenx(file: h5py.File) -> Opened:
    """Open a `.h5` file of Cell Ranger without reading its counts.

    Parameters
    ----------
    file
        Must stay open while the matrix is used. A file of version 2 may hold several genomes: the human one is taken.

    Raises
    ------
    rvqa.errors.InputError
        Another layout, parts that are missing or contradict each other, or several genomes of which not exactly one is
        human.
    """
    with about(file.filename):
        try:
            return _version_3(file["matrix"]) if isinstance(file.get("matrix"), h5py.Group) else _version_2(file)
        except InputError:
            raise
        except UNREADABLE as error:
            raise InputError(f"The file is damaged: {sentence(error)} Copy or download it again.") from error


def _version_3(group: h5py.Group) -> Opened:
    _require(group, "barcodes", "data", "indices", "indptr", "shape", "features")
    features = group["features"]
    _require(features, "id", "name")
    # A matrix of probes names them in `id` and their genes in `gene_id`.
    stored = {"gene_ids": "gene_id" if "gene_id" in features else "id", "feature_types": "feature_type"}
    stored["genome"] = "genome"
    columns = {key: _texts(features, name) for key, name in stored.items() if name in features}
    return _opened(group, _texts(features, "name"), columns)


def _version_2(file: h5py.File) -> Opened:
    genomes = _genomes(file)
    human = [name for name in genomes if _HUMAN.search(name)]
    if not genomes:
        raise InputError(
            f"The file is not a matrix of Cell Ranger: it holds {', '.join(map(repr, file)) or 'nothing'}. "
            "Give filtered_feature_bc_matrix.h5."
        )
    if len(genomes) > 1 and len(human) != 1:
        raise InputError(
            f"The file holds the genomes {', '.join(genomes)}; expected one, or one that is human. "
            "Write the cells of one genome to a file of their own."
        )
    genome = genomes[0] if len(genomes) == 1 else human[0]
    group = file[genome]
    _require(group, "barcodes", "data", "genes", "gene_names", "indices", "indptr", "shape")
    symbols = _texts(group, "gene_names")
    ids, named = _texts(group, "genes"), np.full(len(symbols), genome, dtype=object)
    return _opened(group, symbols, {"gene_ids": ids, "genome": named})


def _opened(group: h5py.Group, symbols: np.ndarray, columns: dict[str, np.ndarray]) -> Opened:
    stated = group["shape"]
    if stated.shape != (2,) or stated.dtype.kind not in "iu":
        raise InputError(f"{stated.name} does not hold two whole numbers, genes and cells. Copy the file again.")
    genes, cells = (int(number) for number in stated[()])
    names = _texts(group, "barcodes")
    for kind, number in (("gene symbols", len(symbols)), *((key, len(each)) for key, each in columns.items())):
        if number != genes:
            raise InputError(f"The matrix has {genes:,} genes, but the file {number:,} {kind}. Copy the file again.")
    if len(names) != cells:
        raise InputError(f"The matrix has {cells:,} cells, but the file {len(names):,} barcodes. Copy the file again.")
    indptr, indices = _numbers(group, "indptr", "iu"), _numbers(group, "indices", "iu")
    matrix = Compressed(indptr, indices, _numbers(group, "data", "iuf"), (cells, genes))
    return Opened(matrix, pd.DataFrame(columns, index=pd.Index(symbols)), names)


def _genomes(file: h5py.File) -> list[str]:
    """Groups that are matrices of version 2."""
    return [name for name in file if _has(file, name, "barcodes") and _has(file, name, "genes")]


def _has(file: h5py.File, group: str, name: str) -> bool:
    return file.get(group, getclass=True) is h5py.Group and name in file[group]


def _require(group: h5py.Group, *parts: str) -> None:
    if absent := [name for name in parts if name not in group]:
        raise InputError(
            f"The group {group.name} lacks {', '.join(absent)}, which Cell Ranger writes. Copy the file again."
        )


def _numbers(group: h5py.Group, name: str, kinds: str) -> Dataset:
    dataset = group[name]
    if dataset.ndim != 1 or dataset.dtype.kind not in kinds:
        raise InputError(
            f"{dataset.name} holds {dataset.dtype} along {dataset.ndim} axes; expected numbers along one. "
            "Copy the file again."
        )
    return Dataset(dataset)


def _texts(group: h5py.Group, name: str) -> np.ndarray:
    """All texts of a dataset, object [entries]."""
    dataset = group[name]
    if dataset.ndim != 1 or h5py.check_string_dtype(dataset.dtype) is None:
        raise InputError(
            f"{dataset.name} holds {dataset.dtype} along {dataset.ndim} axes; expected texts along one. "
            "Copy the file again."
        )
    stored = dataset.id.get_storage_size()
    if dataset.nbytes > max(_UNCHECKED, stored * DEFLATE):
        raise InputError(
            f"{dataset.name} promises {dataset.shape[0]:,} texts, but the file stores {stored:,} bytes of them. "
            "Copy the file again."
        )
    return dataset.asstr("utf-8", errors="replace")[()]


def looks_unfiltered(name: str | Path, matrix: Compressed) -> bool:
    """Whether counts seem to be those of all barcodes, most of them without a cell.

    Parameters
    ----------
    name
        Path or name of the file or folder. Cell Ranger names it `raw_feature_bc_matrix`, or `raw_gene_bc_matrices` with
        a folder in it.
    matrix
        Cells by genes. Under any other name, half of the first 1,000 barcodes must have fewer than 10 genes.
    """
    if _UNFILTERED.search("/".join(Path(name).parts[-3:])):
        return True
    genes_N = np.diff(matrix.pointers(0, min(1000, matrix.shape[0])))
    return bool(len(genes_N)) and float(np.median(genes_N)) < 10
