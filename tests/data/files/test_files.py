"""Files of other programs and older versions: every command reads them by the same rules and writes them whole."""

import warnings

import anndata
import h5py
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

import rvqa
from rvqa.data.files.sources import read_cells, read_results
from rvqa.errors import InputError

STRING = h5py.string_dtype()


def rewritten(path, part, values, **attributes):
    """Replace an array of a file by another, with the same attributes and further ones."""
    with h5py.File(path, "r+") as file:
        kept = dict(file[part].attrs)
        del file[part]
        file.create_dataset(part, data=values).attrs.update(kept | attributes)


def dense(dtype):
    def change(adata, path):
        adata.X = adata.X.toarray().astype(np.float32)
        adata.write_h5ad(path)
        rewritten(path, "X", adata.X.astype(dtype))

    return change


def sparse(dtype, part="data"):
    def change(adata, path):
        adata.write_h5ad(path)
        with h5py.File(path) as file:
            values = file[f"X/{part}"][()]
        rewritten(path, f"X/{part}", values.astype(dtype))

    return change


def by_genes(dtype):
    def change(adata, path):
        adata.X = sp.csc_matrix(adata.X)
        sparse(dtype)(adata, path)

    return change


def records(frame):
    """A table as anndata 0.6 stored it: a compound dataset, with the codes of categories."""
    columns = {"index": np.array(frame.index, dtype="S")}
    for name in frame:
        column = frame[name]
        categories = isinstance(column.dtype, pd.CategoricalDtype)
        columns[name] = column.cat.codes.to_numpy() if categories else np.array(column.to_numpy())
        if columns[name].dtype.kind == "O":
            columns[name] = columns[name].astype("S")
    made = np.zeros(len(frame), dtype=[(name, values.dtype) for name, values in columns.items()])
    for name, values in columns.items():
        made[name] = values
    return made


def of_anndata_0_6(adata, path):
    csr = sp.csr_matrix(adata.X)
    with h5py.File(path, "w") as file:
        group = file.create_group("X")
        group.attrs["h5sparse_format"], group.attrs["h5sparse_shape"] = b"csr", csr.shape
        for name in ("data", "indices", "indptr"):
            group[name] = getattr(csr, name)
        obs = adata.obs[["cell_type"]].assign(cell_type=adata.obs["cell_type"].astype("category"))
        file["obs"], file["var"] = records(obs), records(adata.var[[]])
        file["uns/cell_type_categories"] = np.array(obs["cell_type"].cat.categories, dtype="S")
        embedded = np.zeros(adata.n_obs, dtype=[("X_pca", np.float32, (2,))])
        file["obsm"] = embedded


def of_anndata_0_7(adata, path):
    adata.write_h5ad(path)
    frame = adata.obs
    with h5py.File(path, "r+") as file:
        del file["obs"]
        obs = file.create_group("obs")
        obs.attrs.update({"encoding-type": "dataframe", "encoding-version": "0.1.0", "_index": "_index"})
        obs.attrs["column-order"] = np.array(["cell_type"], dtype=STRING)
        obs["_index"] = np.array(frame.index, dtype=STRING)
        column = frame["cell_type"].astype("category")
        obs["cell_type"] = column.cat.codes.to_numpy()
        obs["__categories/cell_type"] = np.array(column.cat.categories, dtype=STRING)
        obs["cell_type"].attrs["categories"] = obs["__categories/cell_type"].ref


READ = {
    "float16, dense": dense(np.float16),
    "big-endian, dense": dense(">f4"),
    "big-endian integers, dense": dense(">i8"),
    "uint16, dense": dense(np.uint16),
    "float16, sparse": sparse(np.float16),
    "big-endian, sparse": sparse(">f8"),
    "big-endian integers, sparse": sparse(">u2"),
    "long double, sparse": sparse(np.longdouble),
    "big-endian columns": sparse(">i4", "indices"),
    "float16, by genes": by_genes(np.float16),
    "big-endian, by genes": by_genes(">f4"),
    "anndata 0.6": of_anndata_0_6,
    "anndata 0.7": of_anndata_0_7,
}


@pytest.mark.parametrize("kind", READ)
def test_every_storage_gives_the_same_codes_both_ways(kind, small, right, both_ways, tmp_path):
    READ[kind](small.copy(), tmp_path / "cells.h5ad")
    annotated, encoded = both_ways(tmp_path / "cells.h5ad")
    assert (annotated.code, encoded.code) == (0, 0), annotated.err + encoded.err
    assert np.array_equal(annotated.codes, right)
    assert np.array_equal(encoded.codes, right)
    again = read_results(tmp_path / "way.out.h5ad")
    assert list(again.obs_names) == list(small.obs_names)
    assert list(again.obs["cell_type"].astype(str)) == list(small.obs["cell_type"].astype(str))
    assert again.obs["rvqa_cell_type"].notna().all()


REFUSED = {
    "bool": (dense(bool), "type bool"),
    "bool, sparse": (sparse(bool), "type bool"),
    "complex, sparse": (sparse(np.complex64), "type complex64"),
    "complex, dense": (dense(np.complex64), "type complex64"),
    "texts, sparse": (sparse("S3"), r"type \|S3"),
    "no cells": (lambda adata, path: adata[:0].copy().write_h5ad(path), "X has no cells"),
    "no genes": (lambda adata, path: adata[:, :0].copy().write_h5ad(path), "X has no genes"),
    "a table of fewer genes": (
        lambda adata, path: (adata.write_h5ad(path), rewritten(path, "X", np.ones((120, 7), np.float32)))[0],
        "X has 7 columns, but its table of genes 9,015 rows",
    ),
}


@pytest.mark.filterwarnings("ignore::h5py.h5py_warnings.H5pyDeprecationWarning")
@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_refused_is_refused_both_ways(kind, small, both_ways, tmp_path):
    change, message = REFUSED[kind]
    change(small.copy(), tmp_path / "cells.h5ad")
    for done in both_ways(tmp_path / "cells.h5ad"):
        assert done.code == 2
        assert done.err.count("\n") == 1, done.err
        with pytest.raises(AssertionError, match=message):
            raise AssertionError(done.err)


# Parts that could disturb reading.


def index_column_in_raw(adata, path):
    """R converters write a column named _index."""
    adata.raw = adata.copy()
    adata.write_h5ad(path)
    with h5py.File(path, "r+") as file:
        var = file["raw/var"]
        var.move(var.attrs["_index"], "features")
        var.attrs["_index"] = "features"
        var.create_dataset("_index", data=var["features"][()]).attrs.update(dict(var["features"].attrs))
        var.attrs["column-order"] = np.array(["_index"], dtype=STRING)


def nullable_index(adata, path):
    before = anndata.settings.allow_write_nullable_strings
    anndata.settings.allow_write_nullable_strings = True
    try:
        adata.obs.index = pd.Index(pd.array(list(adata.obs_names), dtype="string"))
        adata.write_h5ad(path)
    finally:
        anndata.settings.allow_write_nullable_strings = before


def unknown_encoding(part):
    def change(adata, path):
        adata.obsm["X_pca"] = np.zeros((adata.n_obs, 2))
        adata.uns["log"] = {"base": 2}
        adata.write_h5ad(path)
        with h5py.File(path, "r+") as file:
            group = file[part].create_group("odd")
            group.attrs.update({"encoding-type": "awkward-array-of-tomorrow", "encoding-version": "9"})
            group["node0"] = np.arange(3)

    return change


def no_encodings(adata, path):
    adata.uns["note"] = {"a": "text"}
    adata.write_h5ad(path)
    with h5py.File(path, "r+") as file:
        for part in ("", "uns", "uns/note", "layers", "varm", "obsp"):
            for name in ("encoding-type", "encoding-version"):
                if part in file or not part:
                    (file[part] if part else file).attrs.pop(name, None)


def a_column_of_lists(adata, path):
    adata.write_h5ad(path)
    with h5py.File(path, "r+") as file:
        file["obs"].create_group("lists").attrs.update({"encoding-type": "ragged", "encoding-version": "1"})
        order = [*file["obs"].attrs["column-order"], "lists"]
        file["obs"].attrs["column-order"] = np.array(order, dtype=STRING)


IN_THE_WAY = {
    "_index in raw/var": index_column_in_raw,
    "a nullable index": nullable_index,
    "an unknown kind of obsm": unknown_encoding("obsm"),
    "an unknown kind of uns": unknown_encoding("uns"),
    "an unknown kind of layer": unknown_encoding("layers"),
    "no encodings": no_encodings,
    "a column of lists": a_column_of_lists,
}


def stored(path, ours=True):
    """Return everything in a file that we do not write, with attributes."""
    found = {}

    def keep(name, item):
        if "rvqa" not in name and name not in ("obsm", "uns", "obs", "obs/__categories"):
            values = item[()] if isinstance(item, h5py.Dataset) else None
            found[name] = (None if values is None else np.asarray(values).tolist(), sorted(item.attrs))

    with h5py.File(path) as file:
        file.visititems(keep)
        found[""] = sorted(file.attrs)
    return found


@pytest.mark.parametrize("kind", IN_THE_WAY)
def test_what_we_do_not_need_stays_as_it_is(kind, small, right, both_ways, tmp_path, kang_model, rvqa_cli):
    path = tmp_path / "cells.h5ad"
    IN_THE_WAY[kind](small.copy(), path)
    annotated, encoded = both_ways(path)
    assert (annotated.code, encoded.code) == (0, 0), annotated.err + encoded.err
    assert np.array_equal(annotated.codes, right)
    assert np.array_equal(encoded.codes, right)
    done = rvqa_cli("encode", path, "-m", kang_model, "-o", tmp_path / "codes.h5ad", "-q")
    assert done.code == 0, done.err
    before = stored(path)
    for out in ("way.out.h5ad", "codes.h5ad"):
        assert stored(tmp_path / out) == before


@pytest.mark.parametrize("kind", IN_THE_WAY)
def test_references_are_read_past_it_too(kind, small, tmp_path, model_path):
    path = tmp_path / "cells.h5ad"
    IN_THE_WAY[kind](small.copy(), path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", rvqa.errors.InputWarning)
        adata = read_cells(path, whole=True)
    assert (adata.X != small.X).nnz == 0
    assert list(adata.obs["cell_type"].astype(str)) == list(small.obs["cell_type"].astype(str))


def test_an_annotated_file_can_be_annotated_again(small, kang_model, rvqa_cli, tmp_path):
    small.write_h5ad(tmp_path / "cells.h5ad")
    first = ["annotate", tmp_path / "cells.h5ad", "-m", kang_model, "-o", tmp_path / "a.h5ad", "-q"]
    again = ["annotate", tmp_path / "a.h5ad", "-m", kang_model, "-o", tmp_path / "b.h5ad", "-q"]
    assert rvqa_cli(*first).code == 0
    assert rvqa_cli(*again).code == 0
    one, other = (anndata.read_h5ad(tmp_path / name) for name in ("a.h5ad", "b.h5ad"))
    pd.testing.assert_frame_equal(one.obs, other.obs)
    assert list(one.obs.columns)[: small.obs.shape[1]] == list(small.obs.columns)


# Other kinds of files.


def test_zarr(small, right, both_ways, tmp_path):
    small.obsm["X_umap"] = np.arange(240.0).reshape(120, 2)
    small.write_zarr(tmp_path / "cells.zarr")
    annotated, encoded = both_ways(tmp_path / "cells.zarr", out=".zarr")
    assert (annotated.code, encoded.code) == (0, 0), annotated.err + encoded.err
    assert np.array_equal(annotated.codes, right)
    assert np.array_equal(encoded.codes, right)
    again = anndata.read_zarr(tmp_path / "way.out.zarr")
    assert np.array_equal(again.obsm["X_umap"], small.obsm["X_umap"])
    assert list(again.obs.columns)[: small.obs.shape[1]] == list(small.obs.columns)


def test_zarr_becomes_h5ad(small, right, both_ways, tmp_path):
    small.obsm["X_umap"] = np.arange(240.0).reshape(120, 2)
    small.uns["note"] = "kept"
    small.write_zarr(tmp_path / "cells.zarr")
    annotated, _ = both_ways(tmp_path / "cells.zarr")
    assert annotated.code == 0, annotated.err
    again = anndata.read_h5ad(tmp_path / "way.out.h5ad")
    assert np.array_equal(again.obsm["rvqa_codes"], right)
    assert np.array_equal(again.obsm["X_umap"], small.obsm["X_umap"])
    assert again.uns["note"] == "kept"
    assert (again.X != small.X).nnz == 0


@pytest.mark.parametrize("out", [".h5mu", ".h5ad"])
def test_h5mu(small, right, both_ways, tmp_path, out):
    """A MuData file has an AnnData for each modality; `rna` has the genes."""
    from anndata.io import write_elem

    path = tmp_path / "cells.h5mu"
    with h5py.File(path, "w") as file:
        write_elem(file, "mod/rna", small)
        write_elem(file, "mod/prot", small[:, :10].copy())
        write_elem(file, "obs", small.obs[[]])
        write_elem(file, "var", small.var[[]])
    annotated, encoded = both_ways(path, out=out)
    assert (annotated.code, encoded.code) == (0, 0), annotated.err + encoded.err
    assert np.array_equal(annotated.codes, right)
    assert np.array_equal(encoded.codes, right)
    with h5py.File(path, "r+") as file:
        file["mod"].move("rna", "atac")
    for done in both_ways(path, out=out):
        assert done.code == 2
        assert "the modalities atac, prot, but no 'rna'" in done.err


def tenx_h5(adata, path):
    csr = sp.csr_matrix(adata.X).astype(np.int32)
    with h5py.File(path, "w") as file:
        group = file.create_group("matrix")
        for name in ("data", "indices", "indptr"):
            group[name] = getattr(csr, name)
        group["shape"] = np.array(csr.shape[::-1])
        group["barcodes"] = np.array(adata.obs_names, dtype="S")
        for name, values in (
            ("id", [f"gene {i}" for i in range(adata.n_vars)]),
            ("name", adata.var_names),
            ("feature_type", ["Gene Expression"] * adata.n_vars),
            ("genome", ["GRCh38"] * adata.n_vars),
        ):
            group[f"features/{name}"] = np.array(list(values), dtype="S")


def matrix_market(adata, path):
    from scipy.io import mmwrite

    path.mkdir()
    mmwrite(path / "matrix.mtx", sp.coo_matrix(adata.X.T).astype(np.int32))
    lines = [f"gene {i}\t{name}\tGene Expression" for i, name in enumerate(adata.var_names)]
    (path / "features.tsv").write_text("\n".join(lines) + "\n")
    (path / "barcodes.tsv").write_text("\n".join(adata.obs_names) + "\n")


@pytest.mark.parametrize(("write", "name"), [(tenx_h5, "cells.h5"), (matrix_market, "cells")])
def test_what_sequencing_cores_deliver(write, name, small, right, both_ways, tmp_path):
    write(small, tmp_path / name)
    annotated, encoded = both_ways(tmp_path / name)
    assert (annotated.code, encoded.code) == (0, 0), annotated.err + encoded.err
    assert np.array_equal(annotated.codes, right)
    assert np.array_equal(encoded.codes, right)
    assert list(anndata.read_h5ad(tmp_path / "way.out.h5ad").obs_names) == list(small.obs_names)


def test_a_matrix_of_all_barcodes_is_called_so(small, both_ways, tmp_path):
    empty = anndata.AnnData(sp.csr_matrix((400, small.n_vars), dtype=np.float32), var=small.var)
    everything = anndata.concat([empty, small], join="outer", index_unique="-")
    tenx_h5(everything, tmp_path / "raw_feature_bc_matrix.h5")
    for done in both_ways(tmp_path / "raw_feature_bc_matrix.h5"):
        assert done.code == 2
        assert "400 of 520 cells have no counts" in done.err
        assert "filtered_feature_bc_matrix" in done.err


# Paths in Python.


def test_functions_take_a_path(small, right, kang_model, tmp_path):
    small.obsm["X_umap"] = np.zeros((120, 2))
    small.write_h5ad(tmp_path / "cells.h5ad")
    model = rvqa.load(kang_model)
    annotated = rvqa.annotate(tmp_path / "cells.h5ad", model, progress=False)
    assert np.array_equal(annotated.obsm["rvqa_codes"], right)
    assert "X_umap" in annotated.obsm
    encoded = rvqa.encode(str(tmp_path / "cells.h5ad"), model)
    assert np.array_equal(encoded.obsm["rvqa_codes"], right)
    assert rvqa.annotate(tmp_path / "cells.h5ad", model, out=tmp_path / "out.h5ad", progress=False) is None
    pd.testing.assert_frame_equal(
        anndata.read_h5ad(tmp_path / "out.h5ad").obs, annotated.obs, check_categorical=False, check_names=False
    )
    with pytest.raises(InputError, match="the path of one file, not list"):
        rvqa.encode([tmp_path / "cells.h5ad"], model)
    with pytest.raises(InputError, match="Write an AnnData yourself"):
        rvqa.annotate(small, model, out=tmp_path / "b.h5ad")
