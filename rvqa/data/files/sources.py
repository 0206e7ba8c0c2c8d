"""Cells of files and of AnnData that need not fit in memory: the one reader of `.h5ad`, `.zarr`, `.h5mu`, 10x files.

A `Source` gives rows of counts, names and columns of cells by range; all of it may be asked for by several threads. The
rest of a file, of which counts, their genes and `obs` have no need, is not looked at, so it cannot stand in the way.
"""

import glob
import hashlib
import json
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import h5py
import numpy as np
import pandas as pd
from anndata import AnnData
from anndata.io import read_elem

from rvqa.data.counts import AUTO, MatrixKind, find_counts, inspect_matrix, native, require_counted
from rvqa.data.features import gene_features, with_kinds
from rvqa.data.files import matrices, memory, tenx
from rvqa.data.files.frames import Frame, stored_frame
from rvqa.data.files.heaps import require_heaps
from rvqa.data.files.links import require_own
from rvqa.data.files.stores import require_inside
from rvqa.data.files.transpose import transposed
from rvqa.data.files.watch import Watch
from rvqa.errors import InputError, InputWarning, about, nearest
from rvqa.io.files import DIAGNOSED, HDF5_SUFFIXES, UNREADABLE, reading, require_anndata, require_hdf5, warn_of_repeated
from rvqa.io.temporaries import scratch_folder

Given: TypeAlias = str | Path | AnnData

FEATURE = 1000
"""Bytes that a feature's names take, in the tables and lists by which genes are found."""


@dataclass(frozen=True)
class Layers:
    """Where the counts of each of several files are.

    Attributes
    ----------
    default
        As `layer` of `rvqa.encode`.
    by_file
        Path of a file, and its own.
    """

    default: str | None = None
    by_file: tuple[tuple[str, str], ...] = ()

    @classmethod
    def of(cls, given: Sequence[str], files: Sequence[Given]) -> "Layers":
        """Read the words of an option: NAME for all files, NAME=FILE for one; none of them is "auto".

        Raises
        ------
        rvqa.errors.InputError
            Two names for all files, or for one.
        """
        paths = [Path(each) for each in files if not isinstance(each, AnnData)]
        default: list[str] = []
        by_file: dict[str, str] = {}
        for word in given:
            name, sign, file = word.partition("=")
            meant = [path for path in paths if os.path.realpath(path) == os.path.realpath(file)]
            meant = meant or [path for path in paths if path.name == file]
            if sign and len(meant) == 1:
                place = os.path.realpath(meant[0])
                if by_file.setdefault(place, name) != name:
                    raise InputError(f"Two layers are named for {file}: {by_file[place]!r} and {name!r}. Name one.")
            elif sign and (len(meant) > 1 or Path(file).suffix in (*HDF5_SUFFIXES, ".zarr", ".mtx")):
                which = "several of the files" if meant else "none of the files"
                raise InputError(f"--layer {word}: {file} is {which}. {nearest(file, map(str, paths))}")
            elif word not in default:
                default.append(word)
        if len(default) > 1:
            raise InputError(
                f"Two layers are named for all files: {default[0]!r} and {default[1]!r}. Name one, or NAME=FILE for "
                f"that of one file, of {', '.join(map(str, paths))}."
            )
        return cls(default[0] if default else AUTO, tuple(sorted(by_file.items())))

    def layer(self, given: Given) -> str | None:
        """The layer of one file."""
        place = "" if isinstance(given, AnnData) else os.path.realpath(given)
        return dict(self.by_file).get(place, self.default)


def layer_of(layer: str | Layers | None, given: Given) -> str | None:
    """The layer of one file, of one for all or of `Layers`."""
    return layer.layer(given) if isinstance(layer, Layers) else layer


@dataclass(frozen=True, eq=False)
class Source:
    """Cells of one file.

    Attributes
    ----------
    name
        For messages and the manifest.
    matrix
        Raw counts, cells by genes; features that are not genes are left out.
    var
        Table of the genes of the matrix.
    obs
        Table of the cells.
    identity
        What a resumed run compares: another file, or a changed one, differs in it.
    path
        Of the file, or None.
    place
        Where in the file the counts are: "X", "raw.X" or "layers['...']".
    left_out
        Number of features of each kind that are not genes.
    unfiltered
        Whether it looks like a matrix of all barcodes, most of them of no cell.
    places
        Matrices that there are by place, each as a function that opens it and the table of its features, those that are
        not genes among them.
    """

    name: str
    matrix: matrices.Matrix
    var: pd.DataFrame
    obs: Frame
    identity: dict[str, Any]
    path: Path | None
    place: str = "X"
    left_out: Mapping[str, int] = field(default_factory=dict)
    unfiltered: bool = False
    places: Mapping[str, Callable[[], tuple[matrices.Matrix, pd.DataFrame]]] = field(default_factory=dict)
    root: Any = None
    """Where in the open file the AnnData is, or None."""

    @property
    def n_cells(self) -> int:
        """Number of cells."""
        return self.matrix.shape[0]

    def column(self, key: str | None, start: int, stop: int) -> np.ndarray:
        """Values of a column of `obs`, or for None the names of the cells, from start to stop; see `Frame.column`."""
        return self.obs.index(start, stop) if key is None else self.obs.column(key, start, stop)

    @property
    def small(self) -> bool:
        """Whether the counts fit in memory several times over."""
        stored = getattr(self.matrix, "data", None)
        entries = self.matrix.shape[0] * self.matrix.shape[1] / 2 if stored is None else len(stored)
        return 8 * entries <= DIAGNOSED

    def in_memory(self, *, whole: bool = False) -> AnnData:
        """The cells as an AnnData: their counts where they are in the file, all columns of `obs` that can be read.

        `whole` adds all else that can be read.
        """
        obs, lost = self.obs.readable()
        if lost:
            warnings.warn(
                f"{self.name}: the columns {', '.join(lost)} of obs cannot be read and are left out.",
                InputWarning,
                stacklevel=3,
            )
        adata = anndata_of(obs=obs)
        read = {}
        for place in self.places if whole else (self.place,):
            try:
                matrix, var = self.places[place]()
                read[place] = (matrices.whole(matrix), var)
            except UNREADABLE:
                if place == self.place:
                    raise
        layers = {place[8:-2]: csr for place, (csr, _) in read.items() if place.startswith("layers")}
        var = next((var for place, (_, var) in read.items() if place != "raw.X"), None)
        x = read["X"][0] if "X" in read else None
        adata = anndata_of(X=x, obs=obs, var=var, layers=layers) if var is not None else adata
        if "raw.X" in read:
            csr, var = read["raw.X"]
            adata.raw = anndata_of(X=csr, obs=obs[[]], var=var)
        if whole and self.root is not None:
            add_rest(adata, self.root, PARTS)
        return adata

    def require_counts(self) -> None:
        """Look at the source as a whole, before any work: is there a cell, and are its integers counts.

        Raises
        ------
        rvqa.errors.InputError
            No cells, or integers that were certainly never counted.

        Warns
        -----
        rvqa.errors.InputWarning
            Integers that probably are no counts.
        """
        with about(self.name):
            if 0 in self.matrix.shape:
                cells, genes = self.matrix.shape
                raise InputError(
                    f"{self.place} has no {'genes' if cells else 'cells'} ({cells:,} cells x {genes:,} genes). Check "
                    "what filtered or sliced it."
                )
            sample = matrices.sample(self.matrix)
            if inspect_matrix(sample).kind is MatrixKind.COUNTS:
                require_counted(sample, self.place)


def anndata_of(**parts: Any) -> AnnData:
    """An AnnData, without its word on names that repeat."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".* names are not unique", UserWarning)
        warnings.filterwarnings("ignore", "Transforming to str index", UserWarning)
        return AnnData(**parts)


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
    paths = [os.path.realpath(path) for path in files if isinstance(path, Path)]
    if repeated := [path for at, path in enumerate(paths) if path in paths[:at]]:
        raise InputError(f"{repeated[0]} is given twice. Give each file once.")
    if not files:
        raise InputError("No file was given. Give one or more .h5ad files or .zarr stores.")
    return files


def open_source(
    given: Given, *, layer: str | Layers | None = None, scratch: Path, say: Callable[[str], None] = lambda text: None
) -> Source:
    """Open cells, without reading their counts.

    Parameters
    ----------
    given
        `.h5ad` file, `.zarr` store, `.h5mu` file (of which the modality `rna` is taken), Cell Ranger's `.h5` file or
        folder of Matrix Market files; or an AnnData.
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
    own = layer_of(layer, given)
    if isinstance(given, AnnData):
        return _of_anndata(given, own)
    path = Path(given)
    with about(path), reading(path):
        return _of_file(path, own, scratch, say)


PARTS = ("obsm", "varm", "obsp", "varp", "uns")
"""Parts of an AnnData beside its matrices and tables."""


def add_rest(adata: AnnData, root: Any, parts: Sequence[str]) -> None:
    """Add what can be read of some parts of a file to an AnnData of its cells."""
    for part in parts:
        stored = root.get(part, {})
        for name in stored if not isinstance(stored, h5py.Dataset) else ():
            try:
                getattr(adata, part)[name] = read_elem(stored[name])
            except UNREADABLE:
                continue  # of no use to us; in a copy of the file it stays


def obs_of(path: str | Path) -> Frame:
    """The table of cells of a file, without a look at its counts.

    Raises
    ------
    rvqa.errors.InputError
        As `open_source`.
    """
    file = Path(path)
    with about(file), reading(file):
        if file.suffix == ".zarr":
            root = anndata_root(file, _zarr(file)[0])
        else:
            if (market := tenx.find_matrix_market(file)) is not None:
                return _tenx_obs(tenx.open_matrix_market(market))
            opened = _hdf5(file)
            if tenx.is_tenx(opened):
                return _tenx_obs(tenx.open_tenx(opened))
            root = anndata_root(file, opened)
        return stored_frame(root["obs"], root.get("uns"))


def _tenx_obs(opened: tenx.Opened) -> Frame:
    return Frame(pd.DataFrame(index=pd.Index(opened.names.astype(object))))


def read_results(path: str | Path) -> AnnData:
    """Read what a file says of its cells, without counts and genes: of `obs`, `obsm` and `uns` what can be read.

    Raises
    ------
    rvqa.errors.InputError
        No such file, or not one of AnnData.
    """
    file = Path(path)
    with about(file), reading(file):
        root = anndata_root(file, _zarr(file)[0] if file.suffix == ".zarr" else _hdf5(file))
        obs, _ = stored_frame(root["obs"], root.get("uns")).readable()
        adata = anndata_of(obs=obs)
        add_rest(adata, root, ("obsm", "uns"))
    return adata


def read_cells(given: str | Path, *, layer: str | Layers | None = None, whole: bool = False) -> AnnData:
    """Read cells into memory by the same rules as `open_source`: what they need, and nothing else of the file.

    Parameters
    ----------
    given
        As for `open_source`.
    layer
        As for `rvqa.encode`; only that matrix is read, unless it holds no raw counts: messages then say what does.
    whole
        Read all else that can be read.

    Raises
    ------
    rvqa.errors.InputError
        As `open_source`; a file that is changed while it is read.

    Warns
    -----
    rvqa.errors.InputWarning
        Cells share a name, or columns of obs cannot be read.
    """
    with scratch_folder() as scratch, about(given):
        watch = Watch(given)
        source = open_source(given, layer=layer, scratch=scratch)
        warn_of_repeated(Path(given), pd.Index(source.column(None, 0, source.n_cells)), stacklevel=3)
        with reading(Path(given)):
            counted = inspect_matrix(matrices.sample(source.matrix)).kind is MatrixKind.COUNTS
            adata = source.in_memory(whole=whole or not counted)
        watch.require_unchanged()
        return adata


def _of_file(path: Path, layer: str | None, scratch: Path, say: Callable[[str], None]) -> Source:
    if path.suffix == ".zarr":
        file, matrix_of = _zarr(path)
    elif (market := tenx.find_matrix_market(path)) is not None:
        return _of_tenx(path, layer, tenx.open_matrix_market(market))
    else:
        file, matrix_of = _hdf5(path), matrices.of_hdf5
        if tenx.is_tenx(file):
            return _of_tenx(path, layer, tenx.open_tenx(file))
    root = anndata_root(path, file)

    uns = root.get("uns")

    def opened(at: str) -> tuple[matrices.Matrix, pd.DataFrame]:
        stored, genes = places[at]
        matrix = matrix_of(stored)
        if matrix is None:
            name = path.name if at == place else f"{path.name}-{at}"
            matrix = transposed(stored, scratch, name=name, say=say)
        var = _genes_of(genes, matrix, at, uns)
        if at == "raw.X":
            var = with_kinds(var, stored_frame(root["var"], uns, "var").readable()[0])
        return matrix, var

    places = _places(root)
    place = _chosen(places, layer, lambda name: _sample(*places[name], matrix_of))
    obs = stored_frame(root["obs"], uns)
    source = _source(obs, path, place, {name: partial(opened, name) for name in places})
    return replace(source, root=root)


def anndata_root(path: Path, file: Any) -> Any:
    """Where in an open file or store the AnnData is: the modality `rna` of a `.h5mu`, else its root.

    Raises
    ------
    rvqa.errors.InputError
        It has no `obs` and `var`, or no modality `rna`.
    """
    if "mod" in file and "X" not in file:
        named = [name for name in file["mod"] if name.casefold() in ("rna", "gex", "gene expression")]
        if len(named) != 1:
            raise InputError(
                f"{path} holds the modalities {', '.join(file['mod'])}, but no 'rna'. Write that as .h5ad."
            )
        file = file["mod"][named[0]]
    require_anndata(path, file)
    return file


def _hdf5(path: Path) -> h5py.File:
    """An open file that keeps to itself."""
    require_heaps(require_hdf5(path))
    file = h5py.File(path)
    require_own(file)
    return file


def _zarr(path: Path) -> tuple[Any, Callable[[Any], matrices.Matrix | None]]:
    """Root of a store, and what reads its matrices."""
    import zarr

    if not path.is_dir():
        raise InputError(f"{path} is not a zarr store: it {'is a file' if path.exists() else 'does not exist'}.")
    if not any((path / name).exists() for name in ("zarr.json", ".zgroup", ".zmetadata")):
        raise InputError(f"{path} is not a zarr store: it has no zarr.json or .zgroup.")
    require_inside(path)
    return zarr.open_group(path, mode="r"), matrices.of_zarr


def _places(file: Any) -> dict[str, tuple[Any, Any]]:
    """Matrices of a file that may hold counts, with the tables of their genes."""

    def held(parent: Any, name: str) -> bool:
        return name in parent and getattr(parent[name], "shape", ()) is not None  # an empty dataset stands for None

    places = {"X": (file["X"], file["var"])} if held(file, "X") else {}
    layers = file["layers"] if held(file, "layers") else {}
    places |= {f"layers[{name!r}]": (layers[name], file["var"]) for name in layers if held(layers, name)}
    if "raw" in layers:
        return places
    if held(file, "raw") and held(file["raw"], "X"):
        places["raw.X"] = (file["raw"]["X"], file["raw"]["var"])
    elif held(file, "raw.X"):  # anndata before 0.7
        places["raw.X"] = (file["raw.X"], file["raw.var"])
    return places


def _chosen(places: Mapping[str, Any], layer: str | None, sample: Callable[[str], Any]) -> str:
    """Name of the place that a layer stands for."""
    if layer == AUTO and f"layers[{AUTO!r}]" not in places:
        found = find_counts({name: lambda at=name: sample(at) for name in places})  # type: ignore[misc]
        layer = None if found == "X" else layer
        if found in places:
            return found
    by_name = {None: "X", "X": "X", "raw": "raw.X"}
    name = named if (named := f"layers[{layer!r}]") in places else by_name.get(layer, named)
    if name in places:
        return name
    layers = [place[8:-2] for place in places if place.startswith("layers")]
    if name == "X":
        raise InputError(f"X is missing. Name a layer (--layer): {', '.join(layers) or 'there are none'}.")
    there = [*layers, *(["raw"] if "raw.X" in places else [])]
    offered = nearest(str(layer), there) if there else "There are no layers: leave layer out to use X."
    raise InputError(f"There is no layer {layer!r}. {offered}")


def _sample(stored: Any, genes: Any, matrix_of: Callable[[Any], matrices.Matrix | None]) -> Any:
    """Sampled rows of a stored matrix, of its genes; of one stored by genes, its first entries."""
    matrix = matrix_of(stored)
    if matrix is None:
        data = matrices.parts_of(stored)[2]
        return native(data.read(0, min(len(data), matrices.ENTRIES))).reshape(1, -1)
    return matrices.sample(_genes(matrix, _genes_of(genes, matrix, "The matrix"))[0])


def _genes_of(stored: Any, matrix: matrices.Matrix, place: str, uns: Any = None) -> pd.DataFrame:
    """The table of the columns of a matrix, read where it fits."""
    table = stored_frame(stored, uns, "var")
    if len(table) != matrix.shape[1]:
        raise InputError(
            f"{place} has {matrix.shape[1]:,} columns, but its table of genes {len(table):,} rows. Write the file anew."
        )
    memory.require(FEATURE * len(table), f"The names of {len(table):,} genes")
    return table.readable()[0]


def _source(
    obs: Frame,
    path: Path,
    place: str,
    places: Mapping[str, Callable[[], tuple[matrices.Matrix, pd.DataFrame]]],
) -> Source:
    """A source of a file, of its genes alone."""
    matrix, var = places[place]()
    if len(obs) != matrix.shape[0]:
        raise InputError(
            f"{place} has {matrix.shape[0]:,} rows, but its table of cells {len(obs):,}. Write the file anew."
        )
    identity = _identity(path, matrix, var) | {"place": place}
    matrix, var, left_out = _genes(matrix, var)
    return Source(path.name, matrix, var, obs, identity, path, place, left_out, places=places)


def _genes(matrix: matrices.Matrix, var: pd.DataFrame) -> tuple[matrices.Matrix, pd.DataFrame, dict[str, int]]:
    """A matrix and its table without the features that are not genes, and how many these are."""
    keep_G, left_out = gene_features(var)
    return (matrices.Chosen(matrix, keep_G), var[keep_G], left_out) if left_out else (matrix, var, left_out)


def _of_tenx(path: Path, layer: str | None, opened: tenx.Opened) -> Source:
    if layer not in (None, AUTO, "X"):
        raise InputError(f"There is no layer {layer!r}: a 10x matrix has none. Leave layer out.")
    source = _source(_tenx_obs(opened), path, "X", {"X": lambda: (opened.matrix, opened.var)})
    return replace(source, unfiltered=tenx.looks_unfiltered(path, opened.matrix))


def _of_anndata(adata: AnnData, layer: str | None) -> Source:
    held: dict[str, tuple[Any, Any]] = {} if adata.X is None else {"X": (adata.X, adata.var)}
    held |= {f"layers[{name!r}]": (adata.layers[name], adata.var) for name in adata.layers}
    if adata.raw is not None and "raw" not in adata.layers:
        held["raw.X"] = (adata.raw.X, adata.raw.var)

    def opened(place: str) -> tuple[matrices.Matrix, pd.DataFrame]:
        stored, genes = held[place]
        var, own = (each if isinstance(each, pd.DataFrame) else each.to_memory() for each in (genes, adata.var))
        return _lazy(stored), with_kinds(var, own) if place == "raw.X" else var

    place = _chosen(held, layer, lambda name: matrices.sample(_genes(*opened(name))[0]))
    matrix, var = opened(place)
    names = [*map(str, adata.obs_names), *map(str, var.index)]
    digest = hashlib.sha256("\0".join(names).encode(errors="surrogatepass")).hexdigest()[:16]
    identity = {"name": "", "cells": matrix.shape[0], "genes": matrix.shape[1], "names": digest, "place": place}
    matrix, var, left_out = _genes(matrix, var)
    places = {name: partial(opened, name) for name in held}
    return Source("the AnnData", matrix, var, Frame(adata.obs), identity, None, place, left_out, places=places)


def _lazy(stored: Any) -> matrices.Matrix:
    """Matrix of an AnnData: backed CSR or dense by its file, all else by slices."""
    group = getattr(stored, "group", None)
    matrix = matrices.of_hdf5(group) if isinstance(group, h5py.Group) else None
    if isinstance(stored, h5py.Dataset):
        matrix = matrices.of_hdf5(stored)
    return matrices.of_lazy(stored) if matrix is None else matrix


def _identity(path: Path, matrix: matrices.Matrix, var: pd.DataFrame) -> dict[str, Any]:
    """Name, size and time of a file, store or folder, with its shape and genes."""
    return {
        "name": path.name,
        **Watch(path).identity(),
        "cells": matrix.shape[0],
        "genes": matrix.shape[1],
        "names": hashlib.sha256(json.dumps([str(name) for name in var.index]).encode()).hexdigest()[:16],
    }
