"""Every data file, in every form of cells, gives the same codes through every command."""

import numpy as np
import pytest
import scipy.sparse as sp

import rvqa
from rvqa.data.alignment import match_columns
from rvqa.data.files.sources import read_cells
from rvqa.errors import InputError
from rvqa.training.references import read_reference
from rvqa.training.tokenizer.fit_files import fit_tokenizer_files
from rvqa.training.tokenizer.settings import TokenizerSettings
from tests.data.files.conftest import read_codes
from tests.data.files.test_files import matrix_market, tenx_h5

FORMS = {
    "cells.h5ad": lambda adata, path: adata.write_h5ad(path),
    "cells.zarr": lambda adata, path: adata.write_zarr(path),
    "cells.h5": tenx_h5,
    "cells": matrix_market,
}

pytestmark = [
    pytest.mark.filterwarnings("ignore::rvqa.data.alignment.CoverageWarning"),
    pytest.mark.filterwarnings("ignore:Writing zarr v2"),
    pytest.mark.filterwarnings("ignore:(Variable|Observation) names are not unique"),
]


@pytest.fixture(scope="module")
def loaded(kang_model):
    """A model."""
    return rvqa.load(kang_model)


@pytest.fixture
def some(read, data_file, pbmc_tokenizer):
    """30 cells of a file with counts in genes of the tokenizer, and their codes."""
    adata = read(data_file)
    adata.layers.clear()
    known = match_columns(adata.var, pbmc_tokenizer.axis) >= 0
    full = np.flatnonzero(np.asarray(sp.csr_matrix(adata.X)[:, known].sum(1)).ravel() > 0)
    adata = adata[full[:: max(1, len(full) // 30)][:30]].copy()
    coded = rvqa.encode(adata, pbmc_tokenizer, copy=True)
    return adata, coded.obsm["rvqa_codes"]


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_same_codes(form, some, loaded, tmp_path):
    """A file of its kind goes to every output; files of other kinds go to one."""
    adata, right = some
    path, model = tmp_path / form, loaded
    FORMS[form](adata, path)
    rvqa.annotate(path, model, out=tmp_path / "annotated.h5ad", progress=False)
    found = {"annotate": read_codes(tmp_path / "annotated.h5ad")}
    for suffix in (".rvq", ".zarr", ".parquet", ".h5ad") if form == "cells.h5ad" else (".rvq",):
        out = tmp_path / f"out{suffix}"
        codes = rvqa.encode(path, model, out=out, progress=False)
        found[suffix] = read_codes(out) if codes is None else codes[:]
    found["in memory"] = rvqa.encode(path, model).obsm["rvqa_codes"]
    for name, codes in found.items():
        assert np.array_equal(codes, right), name
    reference = read_reference(read_cells(path))
    assert (reference.counts != sp.csr_matrix(adata.X)).nnz == 0


def test_every_form_is_fitted_alike(small, tmp_path, one_thread):
    small.obs = small.obs[[]]  # 10x's files do not hold it
    fingerprints = set()
    for form, write in FORMS.items():
        write(small, tmp_path / form)
        settings = TokenizerSettings(epochs=2, n_top_genes=200)
        fit_tokenizer_files([tmp_path / form], tmp_path / "fitted", settings=settings, force=True, progress=False)
        fingerprints.add(
            rvqa.tokenizer.model.CellTokenizer.from_pretrained(tmp_path / "fitted").codebooks_MKD.numpy().tobytes()
        )
    assert len(fingerprints) == 1


def test_a_file_of_another_kind(tmp_path, kang_model):
    (tmp_path / "cells.csv").write_text("a,b\n")
    (tmp_path / "empty").mkdir()
    for name, said in (("cells.csv", "not named"), ("empty", "is a folder"), ("nothing.zarr", "does not exist")):
        with pytest.raises(InputError, match=said):
            rvqa.encode(tmp_path / name, rvqa.load(kang_model))
