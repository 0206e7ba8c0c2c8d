"""Cells of files and of AnnData that need not fit in memory: the one reader of `.h5ad`, `.zarr`, `.h5mu`, 10x files.

A `Source` gives rows of counts, names and columns of cells by range; all of it may be asked for by several threads. The
rest of a file, of which counts, their genes and `obs` have no need, is not looked at, so it cannot stand in the way.
"""

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import h5py
import pandas as pd
from anndata import AnnData

from rvqa.data.counts import find_counts
from rvqa.data.features import gene_features, with_kinds
from rvqa.data.files import matrices, matrix_market, memory, tenx
from rvqa.data.files.frames import Frame, stored_frame
from rvqa.data.files.heaps import require_heaps
from rvqa.data.files.links import require_own
from rvqa.data.files.source import Source, add_rest, anndata_of
from rvqa.data.files.stores import require_inside
from rvqa.data.files.transpose import transposed
from rvqa.data.files.watch import Watch
from rvqa.data.kinds import MatrixKind, inspect_matrix, native
from rvqa.data.reading import AUTO, Given, Layers, layer_of
from rvqa.errors import InputError, about, nearest
from rvqa.io.files import reading, require_anndata, require_hdf5, warn_of_repeated
from rvqa.io.temporaries import scratch_folder

FEATURE = 1000
"""Bytes that a feature's names take, in the tables and lists by which genes are found."""


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
            if (market := matrix_market.find_matrix_market(file)) is not None:
                return _tenx_obs(matrix_market.open_matrix_market(market))
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
    elif (market := matrix_market.find_matrix_market(path)) is not None:
        return _of_tenx(path, layer, matrix_market.open_matrix_market(market))
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
