"""Cells to encode that need not fit in memory: `.h5ad` and `.zarr` files, AnnData backed by a file, lazy AnnData.

A `Source` gives rows of counts, names and columns of cells by range; all of it may be asked for by several threads.
"""

import glob
import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import h5py
import numpy as np
import pandas as pd
from anndata import AnnData
from anndata.io import read_elem

from rvqa.atlas import matrices
from rvqa.atlas.hdf5 import read_slice
from rvqa.atlas.transpose import transposed
from rvqa.errors import InputError, about
from rvqa.files import UNREADABLE, require_anndata, require_h5ad, sentence
from rvqa.obs import nearest

Given: TypeAlias = str | Path | AnnData

_SLICED = {"array", "string-array", "nullable-string-array", "nullable-integer", "nullable-boolean", "categorical"}


@dataclass(frozen=True, eq=False)
class Source:
    """Cells of one file.

    Attributes
    ----------
    name
        For messages and the manifest.
    matrix
        Raw counts, cells by genes.
    var
        Table of the genes of the matrix.
    column
        Values of a column of `obs`, or of its index for None, from start to stop: a numpy array of numbers, bool or
        str. Raises `InputError` for a column that is not there.
    table
        Whole columns of `obs`, those of some names that there are, as pandas holds them; its index names the cells.
    identity
        What a resumed run compares: another file, or a changed one, differs in it.
    path
        Of the file, or None.
    """

    name: str
    matrix: matrices.Matrix
    var: pd.DataFrame
    column: Callable[[str | None, int, int], np.ndarray]
    table: Callable[[Sequence[str]], pd.DataFrame]
    identity: dict[str, Any]
    path: Path | None

    @property
    def n_cells(self) -> int:
        """Number of cells."""
        return self.matrix.shape[0]


def expand(given: Given | Sequence[Given]) -> list[Given]:
    """Files of a path, a pattern with `*`, or a list of these; an AnnData stays as it is.

    Raises
    ------
    rvqa.errors.InputError
        A pattern that no file matches, or the same file twice.
    """
    files: list[Given] = []
    for each in given if isinstance(given, list | tuple) else [given]:
        if isinstance(each, AnnData):
            files.append(each)
            continue
        text = str(each)
        found = sorted(glob.glob(text)) if glob.has_magic(text) and not Path(text).exists() else [text]
        if not found:
            raise InputError(f"No file matches {text!r}. Check the pattern.")
        files += [Path(name) for name in found]
    paths = [path.resolve() for path in files if isinstance(path, Path)]
    if repeated := [path for at, path in enumerate(paths) if path in paths[:at]]:
        raise InputError(f"{repeated[0]} is given twice. Give each file once.")
    if not files:
        raise InputError("No file was given. Give one or more .h5ad files or .zarr stores.")
    return files


def open_source(given: Given, *, layer: str | None, scratch: Path, say: Callable[[str], None]) -> Source:
    """Open cells, without reading their counts.

    Parameters
    ----------
    given
        Path of a file, or an AnnData.
    layer
        As for `rvqa.encode`.
    scratch
        Folder for the transposed matrix of a file stored by genes (CSC); kept until the run is done.
    say
        Told when that is about to happen.

    Raises
    ------
    rvqa.errors.InputError
        No such file, one that is not of AnnData, a layer that it does not have, or a matrix of another encoding.
    """
    if isinstance(given, AnnData):
        return _of_anndata(given, layer)
    path = Path(given)
    with about(path):
        try:
            file, told, matrix_of = _zarr(path) if path.suffix == ".zarr" else _hdf5(path)
            require_anndata(path, file)
            stored, genes = _select(file, layer)
            matrix = matrix_of(stored)
            if matrix is None:
                matrix = transposed(stored, scratch, name=path.name, say=say)
            columns, table = _columns(file["obs"]), _table(file["obs"])
            identity = _identity(path, told, matrix, genes)
            return Source(path.name, matrix, read_elem(genes), columns, table, identity, path)
        except InputError:
            raise
        except UNREADABLE as error:
            raise InputError(
                f"{path} is damaged, or not of AnnData: {sentence(error)} Copy or write it again."
            ) from error


_Opened: TypeAlias = tuple[Any, Path, Callable[[Any], matrices.Matrix | None]]
"""Root of an AnnData file, the file whose size and time tell of changes, and what reads its matrices."""


def _hdf5(path: Path) -> _Opened:
    return h5py.File(require_h5ad(path)), path, matrices.of_hdf5


def _zarr(path: Path) -> _Opened:
    import zarr

    if not path.is_dir():
        raise InputError(f"{path} is not a zarr store: it {'is a file' if path.exists() else 'does not exist'}.")
    told = [each for name in ("zarr.json", ".zgroup", ".zmetadata") if (each := path / name).exists()]
    if not told:
        raise InputError(f"{path} is not a zarr store: it has no zarr.json or .zgroup.")
    return zarr.open_group(path, mode="r"), told[0], matrices.of_zarr


def _of_anndata(adata: AnnData, layer: str | None) -> Source:
    var = adata.var
    if layer is None:
        stored = adata.X
    elif layer in adata.layers:
        stored = adata.layers[layer]
    elif layer == "raw" and adata.raw is not None:
        stored, var = adata.raw.X, adata.raw.var
    else:
        raise InputError(f"There is no layer {layer!r}. {nearest(layer, [*adata.layers, 'raw'])}")
    if stored is None:
        raise InputError("X is missing. Name a layer.")
    names = np.asarray(adata.obs_names, dtype=str)

    def column(key: str | None, start: int, stop: int) -> np.ndarray:
        if key is None:
            return names[start:stop]
        if key not in adata.obs.columns:
            raise InputError(f"obs has no column {key!r}. {nearest(key, adata.obs.columns)}")
        part = adata.obs.iloc[start:stop]
        return _plain((part if isinstance(part, pd.DataFrame) else part.to_memory())[key])

    group = getattr(stored, "group", None)  # backed CSR, or CSC
    matrix = matrices.of_hdf5(group) if isinstance(group, h5py.Group) else None
    if isinstance(stored, h5py.Dataset):
        matrix = matrices.of_hdf5(stored)
    matrix = matrices.of_lazy(stored) if matrix is None else matrix
    digest = hashlib.sha256("\0".join([*names, *map(str, var.index)]).encode()).hexdigest()[:16]
    identity = {"name": "", "cells": matrix.shape[0], "genes": matrix.shape[1], "names": digest}

    def table(keys: Sequence[str]) -> pd.DataFrame:
        part = adata.obs[[key for key in keys if key in adata.obs.columns]]
        return part if isinstance(part, pd.DataFrame) else part.to_memory()

    var = var if isinstance(var, pd.DataFrame) else var.to_memory()
    return Source("the AnnData", matrix, var, column, table, identity, None)


def _select(file: Any, layer: str | None) -> tuple[Any, Any]:
    """Matrix and table of genes of the counts in an AnnData file."""
    layers = list(file["layers"]) if "layers" in file else []
    if layer is None:
        if "X" not in file:
            raise InputError(f"X is missing. Name a layer (--layer): {', '.join(layers) or 'there are none'}.")
        return file["X"], file["var"]
    if layer in layers:
        return file["layers"][layer], file["var"]
    if layer == "raw" and "raw" in file:
        return file["raw"]["X"], file["raw"]["var"]
    raise InputError(f"There is no layer {layer!r}. {nearest(layer, [*layers, *(['raw'] if 'raw' in file else [])])}")


def _columns(obs: Any) -> Callable[[str | None, int, int], np.ndarray]:
    """Slices of the columns of a stored data frame."""

    def column(key: str | None, start: int, stop: int) -> np.ndarray:
        name = obs.attrs.get("_index", "_index") if key is None else key
        if name not in obs:
            raise InputError(f"obs has no column {name!r}. {nearest(name, [each for each in obs if each != '_index'])}")
        stored = obs[name]
        kind = stored.attrs.get("encoding-type", "array")
        if "categories" in stored.attrs:  # anndata before 0.8
            return _plain(read_elem(obs)[name].iloc[start:stop])
        if kind not in _SLICED:
            raise InputError(f"obs[{name!r}] is stored as {kind!r}, which cannot be carried along.")
        if kind == "categorical":
            codes = read_slice(stored["codes"], start, stop)
            categories = _plain(pd.Series(read_elem(stored["categories"])))
            if categories.dtype.kind == "U":
                categories = np.append(categories, "")
                return categories[codes]  # -1: missing
            if (codes < 0).any():
                return np.where(codes < 0, np.nan, categories[codes])
            return categories[codes]
        if kind.startswith("nullable"):
            values, missing = (read_slice(stored[part], start, stop) for part in ("values", "mask"))
            series = pd.Series(_plain(pd.Series(values)), dtype=object)
            return _plain(series.mask(missing))
        return _plain(pd.Series(read_slice(stored, start, stop)))

    return column


def _table(obs: Any) -> Callable[[Sequence[str]], pd.DataFrame]:
    """Whole columns of a stored data frame."""

    def table(keys: Sequence[str]) -> pd.DataFrame:
        there = [key for key in keys if key in obs]
        if any("categories" in obs[key].attrs for key in there):  # anndata before 0.8
            return read_elem(obs)[there]
        index = pd.Index(in_pandas(obs[obs.attrs.get("_index", "_index")]))
        return pd.DataFrame({key: pd.Series(in_pandas(obs[key]), index=index) for key in there}, index=index)

    def in_pandas(stored: Any) -> Any:
        values = read_elem(stored)
        return values.astype(object) if values.dtype.kind == "T" else values  # NumPy's own strings

    return table


def _plain(values: pd.Series) -> np.ndarray:
    """Numbers or bool as they are, all else as text; missing numbers are NaN, missing texts are empty."""
    if isinstance(values.dtype, pd.CategoricalDtype):
        values = values.astype(object)
    if values.dtype.kind in "iufb" and not pd.api.types.is_extension_array_dtype(values.dtype):
        return values.to_numpy()
    if pd.api.types.is_numeric_dtype(values.dtype) or pd.api.types.infer_dtype(values) in ("integer", "floating"):
        return values.to_numpy(dtype=np.float64, na_value=np.nan)
    missing = values.isna()
    texts = [each.decode() if isinstance(each, bytes) else str(each) for each in values.where(~missing, "")]
    return np.array(texts, dtype=str)


def _identity(path: Path, told: Path, matrix: matrices.Matrix, genes: Any) -> dict[str, Any]:
    """Name, size and time of a file, with its shape and genes; of a store, of the file `told` in it."""
    stat = told.stat()
    names = [str(name) for name in read_elem(genes).index]
    return {
        "name": path.name,
        "bytes": stat.st_size,
        "modified": stat.st_mtime_ns,
        "cells": matrix.shape[0],
        "genes": matrix.shape[1],
        "names": hashlib.sha256(json.dumps(names).encode()).hexdigest()[:16],
    }
