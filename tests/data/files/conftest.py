"""Real cells in files as other programs write them, read in our two ways."""

from types import SimpleNamespace

import numpy as np
import pytest

import rvqa


def some_cells(read):
    """120 control cells of two donors."""
    adata = read("kang2018_ifnb_pbmc_2k")
    rows = adata.obs["donor"].astype(str).isin(["1244", "1256"]) & (adata.obs["condition"].astype(str) == "ctrl")
    adata = adata[rows.to_numpy()]
    return adata[np.sort(np.random.default_rng(0).choice(adata.n_obs, 120, replace=False))].copy()


@pytest.fixture
def small(read):
    """A copy of those cells for each test."""
    return some_cells(read)


@pytest.fixture(scope="session")
def kang_model(pbmc_tokenizer, model_path, tmp_path_factory):
    """Directory of a model whose tokenizer has those cells' genes; its language model saw other cells."""
    model = rvqa.load(model_path)
    path = tmp_path_factory.mktemp("kang") / "model"
    rvqa.language.model.Model(
        pbmc_tokenizer, model.network, model.text_tokenizer, model.vocabulary, model.card
    ).save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def right(read, pbmc_tokenizer):
    """Codes of those cells."""
    adata = some_cells(read)
    rvqa.encode(adata, pbmc_tokenizer)
    return adata.obsm["rvqa_codes"]


@pytest.fixture
def both_ways(kang_model, rvqa_cli, tmp_path):
    """Run `annotate` and `encode -o .rvq` on a file; return exit codes, messages and codes."""

    def run(path, *options, out=".h5ad"):
        results = {}
        for way, arguments in (
            ("annotate", ["annotate", path, "-m", kang_model, "-o", tmp_path / f"way.out{out}", "-q"]),
            ("encode", ["encode", path, "-m", kang_model, "-o", tmp_path / "way.rvq", "-q"]),
        ):
            done = rvqa_cli(*arguments, "--force", *options)
            codes = None
            if done.code == 0:
                written = arguments[5]
                codes = rvqa.open_codes(written)[:] if way == "encode" else read_codes(written)
            results[way] = SimpleNamespace(code=done.code, out=done.out, err=done.err, codes=codes)
        return results["annotate"], results["encode"]

    return run


def read_codes(path):
    """Return the codes as stored in a file that `annotate` wrote."""
    import h5py
    import zarr

    if path.suffix == ".zarr":
        return np.asarray(zarr.open_group(path, mode="r")["obsm/rvqa_codes"][:])
    with h5py.File(path) as file:
        root = file["mod/rna"] if "mod" in file else file
        return root["obsm/rvqa_codes"][()]
