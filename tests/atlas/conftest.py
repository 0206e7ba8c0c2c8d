"""Real cells, their codes in memory, and files of every form."""

import multiprocessing

import anndata
import h5py
import numpy as np
import pytest
import scipy.sparse as sp
from anndata import AnnData

import rvqa


@pytest.fixture(scope="session")
def cells(read) -> AnnData:
    """2,000 real cells with a few columns."""
    adata = read("kang2018_ifnb_pbmc_2k")
    adata.obs["number"] = np.arange(adata.n_obs)
    adata.obs["maybe"] = np.where(np.arange(adata.n_obs) % 3 == 0, np.nan, 1.5)
    adata.obs["flag"] = np.arange(adata.n_obs) % 2 == 0
    return adata


@pytest.fixture(scope="session")
def right(cells, pbmc_tokenizer) -> np.ndarray:
    """Codes of those cells by `rvqa.encode` in memory; other tests check that against the exact definition."""
    adata = cells.copy()
    rvqa.encode(adata, pbmc_tokenizer)
    return adata.obsm["rvqa_codes"]


@pytest.fixture(scope="session")
def processes():
    """New processes with all modules loaded, because an import takes ten times as long as a run."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["zarr", "tests.atlas.test_run", "tests.atlas.test_disk"])
    return context


DENSE = slice(0, 5000)
"""Genes of a dense file; every cell has counts in one of them."""

FORMS = (
    "h5ad-gzip",
    "h5ad-plain",
    "h5ad-lzf",
    "h5ad-shuffled",
    "h5ad-checksums",
    "h5ad-contiguous",
    "h5ad-int64",
    "h5ad-uint16",
    "h5ad-float64",
    "h5ad-big-endian",
    "h5ad-dense",
    "h5ad-csc",
    "h5ad-raw",
    "h5ad-layer",
    "zarr-v3",
    "zarr-v2",
    "zarr-sharded",
    "zarr-dense",
    "zarr-csc",
)


def rewrite(path, **options):
    """Store the arrays of X again with other options of HDF5."""
    with h5py.File(path, "r+") as file:
        for name in ("data", "indices"):
            values = file["X"][name][()]
            attributes = dict(file["X"][name].attrs)
            del file["X"][name]
            made = file["X"].create_dataset(name, data=values, **options)
            made.attrs.update(attributes)


def write_form(adata: AnnData, form: str, folder):
    """Write cells in one of `FORMS`; return the path and the layer."""
    import zarr

    adata = adata.copy()
    kind, _, how = form.partition("-")
    path = folder / f"cells-{how}.{kind}"
    layer = None
    if how in ("int64", "uint16", "float64"):
        adata.X = adata.X.astype(how)
    elif how == "dense":
        adata = adata[:, DENSE].copy()
        adata.X = adata.X.toarray()
    elif how == "csc":
        adata.X = sp.csc_matrix(adata.X)
    elif how == "raw":
        adata.raw = adata
        adata.X = adata.X.log1p()
        layer = "raw"
    elif how == "layer":
        adata.layers["counts"] = adata.X
        adata.X = adata.X.log1p()
        layer = "counts"
    if kind == "h5ad":
        adata.write_h5ad(path, compression=None if how == "plain" else "gzip")
        if how == "lzf":
            rewrite(path, chunks=(1000,), compression="lzf")
        elif how == "shuffled":
            rewrite(path, chunks=(999,), compression="gzip", shuffle=True)
        elif how == "checksums":
            rewrite(path, chunks=(5000,), compression="gzip", fletcher32=True)
        elif how == "contiguous":
            rewrite(path)
        elif how == "big-endian":
            with h5py.File(path, "r+") as file:
                values = file["X/data"][()]
                del file["X/data"]
                file["X"].create_dataset("data", data=values.astype(">f4"), chunks=(700,))
    else:
        before = anndata.settings.zarr_write_format
        anndata.settings.zarr_write_format = 2 if how == "v2" else 3
        try:
            adata.write_zarr(path)
        finally:
            anndata.settings.zarr_write_format = before
        if how == "sharded":
            group = zarr.open_group(path, mode="r+")
            for name in ("data", "indices"):
                values = group["X"][name][:]
                del group["X"][name]
                made = group["X"].create_array(
                    name, shape=values.shape, dtype=values.dtype, chunks=(1000,), shards=(8000,)
                )
                made[:] = values
            zarr.consolidate_metadata(path)
    return path, layer


@pytest.fixture(scope="session", params=FORMS)
def form(request, cells, tmp_path_factory):
    """A file of those cells in each form, with the layer of the counts."""
    return write_form(cells, request.param, tmp_path_factory.mktemp("form"))
