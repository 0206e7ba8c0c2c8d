"""Cells on disk and cells in memory give the same tokenizer, whatever the file and its blocks."""

import anndata
import numpy as np
import pytest
import scipy.sparse as sp
import torch
from anndata import AnnData

from rvqa.data import cells as data_cells
from rvqa.data.cells import in_blocks
from rvqa.data.columns import labels_of
from rvqa.data.files import matrices
from rvqa.data.reading import Reading
from rvqa.data.studies import label_table, open_study
from rvqa.errors import InputError, InputWarning
from rvqa.training.references import read_reference
from rvqa.training.tokenizer import cells as tokenizer_cells
from rvqa.training.tokenizer.cells import StoredRows
from rvqa.training.tokenizer.fit import fit_tokenizer
from rvqa.training.tokenizer.fit_files import fit_tokenizer_files
from rvqa.training.tokenizer.settings import TokenizerSettings

pytestmark = pytest.mark.usefixtures("one_thread")

TINY = TokenizerSettings(n_top_genes=400, hidden=16, latent=8, levels=3, entries=8, epochs=4, batch_size=128)


def files(data_dir):
    return [data_dir / f"{name}.h5ad" for name in ("pbmc68k_reduced_700", "kang2018_ifnb_pbmc_2k")]


@pytest.fixture(scope="module")
def in_memory(data_dir, read):
    """Tokenizer fitted on cells in memory, without donors 1244 and 1256."""
    table, references = label_table(), []
    for file, depth in zip(files(data_dir), ("n_counts_all_genes", None), strict=True):
        adata = read(file.stem)
        if "donor" in adata.obs:
            adata = adata[~np.isin(labels_of(adata, "donor"), ["1244", "1256", ""])].copy()
        adata.obs["cell_type"] = adata.obs["cell_type"].astype(str).replace(table)
        depth = depth if depth in adata.obs else None
        control = "ctrl" if "condition" in adata.obs else None
        key = None if control is None else "condition"
        named = {"labels": "cell_type", "condition": key, "control": control, "reading": Reading(None, depth)}
        references.append(read_reference(adata, name=file.stem, **named))
    return fit_tokenizer(references, TINY, progress=False)


def same(one, other):
    assert one.fingerprint() == other.fingerprint()
    for name, tensor in one.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[name]), name


@pytest.mark.parametrize("entries", [None, 40_000])
def test_files_give_the_tokenizer_of_cells_in_memory(data_dir, in_memory, tmp_path, monkeypatch, entries):
    """Real files of two panels, with donors held out; blocks are of the default size or small."""
    if entries is not None:
        monkeypatch.setattr(matrices, "ENTRIES", entries)
    kept = []
    monkeypatch.setattr(
        "rvqa.training.tokenizer.fit_files.fit_tokenizer",
        lambda *given, **named: kept.append(fit_tokenizer(*given, **named)) or kept[-1],
    )
    facts = fit_tokenizer_files(
        files(data_dir), tmp_path / "tok", settings=TINY, held_out=["1244", "1256"], progress=False
    )
    same(kept[0], in_memory)
    assert facts["cells"]["held out"] > 0
    assert [path.name for path in tmp_path.iterdir()] == ["tok"]


def small(seed=0, cells=300):
    rng = np.random.default_rng(seed)
    shares = rng.dirichlet(np.full(80, 0.5), 3)
    counts = rng.poisson(shares[rng.integers(3, size=cells)] * rng.uniform(300, 2000, cells)[:, None])
    counts[:, 0] += 1
    adata = AnnData(sp.csr_matrix(counts.astype(np.float32)))
    adata.var_names = [f"GENE{i}" for i in range(80)]
    adata.obs_names = [f"cell {i}" for i in range(cells)]
    adata.obs["donor"] = np.array(["a", "b", "c"])[np.arange(cells) % 3]
    return adata


def write(adata, path, form):
    made = adata.copy()
    if form == "csc":
        made.X = sp.csc_matrix(made.X)
    elif form == "dense":
        made.X = made.X.toarray()
    if path.suffix == ".zarr":
        anndata.io.write_zarr(path, made)
    else:
        made.write_h5ad(path, compression="gzip")
    return path


@pytest.mark.parametrize(("suffix", "form"), [("h5ad", "csc"), ("h5ad", "dense"), ("zarr", "csr"), ("zarr", "csc")])
def test_any_form_of_file_gives_the_same_tokenizer(tmp_path, monkeypatch, suffix, form):
    for module in (data_cells, tokenizer_cells):
        monkeypatch.setattr(module, "ROWS", 64)
    fitted = []
    for folder, name, kind in (("one", "cells.h5ad", "csr"), ("two", f"cells.{suffix}", form)):
        (tmp_path / folder).mkdir()
        path = write(small(), tmp_path / folder / name, kind)
        fit_tokenizer_files(
            [path], tmp_path / folder / "tok", settings=TINY, held_out=["a"], validation=["b"], progress=False
        )
        fitted.append((tmp_path / folder / "tok" / "model.safetensors").read_bytes())
    assert fitted[0] == fitted[1]


def test_rows_on_disk_are_those_of_the_matrix(tmp_path):
    matrix = sp.random(50, 30, 0.2, "csr", np.float32, random_state=0)
    stored = StoredRows.write(tmp_path / "rows", in_blocks([matrix[:20], matrix[20:]]), 30)
    for opened in (stored, StoredRows.open(tmp_path / "rows", 30)):
        assert opened.shape == (50, 30)
        for rows in (slice(None), slice(7, 7), slice(3, 19), np.array([4, 4, 49, 0]), np.zeros(0, np.int64)):
            found = opened[rows]
            assert (found.toarray() == matrix[rows].toarray()).all()
            assert found.has_canonical_format
    nothing = StoredRows.write(tmp_path / "none", in_blocks([sp.csr_matrix((3, 30), dtype=np.float32)]), 30)
    assert nothing[np.array([2, 0])].nnz == 0


@pytest.mark.parametrize("parts", [[10], [3, 7], [4, 4, 2], [1] * 10, [0, 10, 0]])
def test_blocks_do_not_depend_on_how_rows_come(monkeypatch, parts):
    monkeypatch.setattr(data_cells, "ROWS", 4)
    matrix = sp.csr_matrix(np.arange(20).reshape(10, 2))
    ends = np.cumsum(parts)
    blocks = list(in_blocks(matrix[end - n : end] for n, end in zip(parts, ends, strict=True)))
    assert [block.shape[0] for block in blocks] == [4, 4, 2]
    assert (sp.vstack(blocks).toarray() == matrix.toarray()).all()


def opened(path, tmp_path):
    return open_study(path, scratch=tmp_path, labels="cell_type", donor="donor", condition="condition")


def test_only_the_cells_that_are_taken_are_read(tmp_path):
    adata = small()
    adata.X.data[adata.X.indptr[299]] = 0.5  # in the last cell
    file = opened(write(adata, tmp_path / "cells.h5ad", "csr"), tmp_path)
    first = file.take(np.arange(300) < 100)
    assert first.library_size.tolist() == adata.X[:100].sum(1).A1.tolist()
    assert first.gene_totals().tolist() == adata.X[:100].sum(0).A1.tolist()
    with pytest.raises(InputError, match="not integers"):
        file.take(np.arange(300) >= 100).gene_totals()


def test_what_is_wrong_with_a_file_is_said_and_nothing_stays(tmp_path):
    adata = small()
    adata.layers["counts"] = adata.X.copy()
    adata.X = adata.X.log1p()
    path = write(adata, tmp_path / "logged.h5ad", "csr")
    with pytest.raises(InputError, match=r"(?s)logged\.h5ad.*layers\['counts'\] looks like raw counts"):
        fit_tokenizer_files([path], tmp_path / "new" / "tok", settings=TINY, progress=False)
    assert [each.name for each in tmp_path.iterdir()] == ["logged.h5ad"]
    facts = fit_tokenizer_files([path], tmp_path / "tok", settings=TINY, layer="counts", progress=False)
    assert facts["cells"] == {"fit": 300}


def test_names_that_repeat_are_told(tmp_path):
    adata = small()
    adata.obs_names = ["same"] * 300
    with pytest.warns(InputWarning, match="299 cells repeat"):
        opened(write(adata, tmp_path / "cells.h5ad", "csr"), tmp_path)
