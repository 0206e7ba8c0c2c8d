"""Inputs close to those of the other test files here; each was handled wrongly once."""

import gzip
import os
import shutil

import anndata
import h5py
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

import rvqa
from rvqa.data.alignment import match_columns
from rvqa.data.columns import labels_of, split_names, texts
from rvqa.data.features import gene_features, with_kinds
from rvqa.data.genes import GeneAxis
from rvqa.data.reading import Layers
from rvqa.errors import InputError, InputWarning
from tests.data.files.conftest import read_codes
from tests.data.files.test_files import tenx_h5
from tests.data.files.test_values import EXTRA, with_features


def normalised(adata):
    """log1p of counts per 10,000 over all features."""
    adata.X = adata.X.multiply(1e4 / np.asarray(adata.X.sum(1))).tocsr().log1p()
    return adata


# Depth.


@pytest.mark.parametrize("features", [2, 8])
def test_depth_is_that_of_the_genes_where_antibodies_were_normalised_with_them(features, small, right, pbmc_tokenizer):
    mixed = with_features(small, "Antibody Capture")[:, : small.n_vars + features].copy()
    adata = normalised(mixed)
    rvqa.encode(adata, pbmc_tokenizer, recover=True)
    assert np.array_equal(adata.obsm["rvqa_codes"], right)


def test_no_advice_to_recover_where_that_cannot_be_asked_for(small, rvqa_cli, tmp_path):
    normalised(small).write_h5ad(tmp_path / "cells.h5ad")
    done = rvqa_cli("fit-tokenizer", tmp_path / "cells.h5ad", "-o", tmp_path / "t", "-q")
    assert done.code == 2
    assert "looks log1p" in done.err
    assert "recover" not in done.err


def test_parts_of_counts_are_not_advised(small, pbmc_tokenizer):
    counts = small.X.copy()
    normalised(small)
    small.layers["spliced"], small.layers["unspliced"] = counts.copy(), counts.copy()
    with pytest.raises(
        InputError, match=r"'spliced'\] and layers\['unspliced'\] hold parts of the counts: put their sum"
    ):
        rvqa.encode(small, pbmc_tokenizer)


def test_rounding_is_advised_for_estimates_alone(small, pbmc_tokenizer):
    counts = small.X.toarray()
    rng = np.random.default_rng(0)
    estimates = np.where(counts > 0, np.maximum(counts - rng.uniform(0, 0.4, counts.shape), 0), 0)
    estimates[0, 0] = 40.5
    small.X = sp.csr_matrix(estimates)
    with pytest.raises(InputError, match="rounding is safe"):
        rvqa.encode(small, pbmc_tokenizer)
    small.X = sp.csr_matrix(np.log2(1 + counts))
    with pytest.raises(InputError) as error:
        rvqa.encode(small, pbmc_tokenizer)
    assert "round" not in str(error.value)


# Features.


def test_proteins_joined_without_a_kind(small, right, pbmc_tokenizer):
    """anndata.concat joins two tables, one without a column of feature types."""
    mixed = with_features(small, np.nan)
    assert dict(gene_features(mixed.var)[1]) == {"no kind": 8}
    rvqa.encode(mixed, pbmc_tokenizer)
    assert np.array_equal(mixed.obsm["rvqa_codes"], right)
    var = mixed.var.rename(index={name: f"{name} protein" for name in EXTRA})
    var.index = [*small.var_names, *(f"NEW{i}" for i in range(8))]
    assert gene_features(var)[0].all()  # genes without a feature type


@pytest.mark.parametrize("same", [True, False])
def test_kinds_of_var_hold_for_raw(same, small, right, both_ways, tmp_path):
    mixed = with_features(small, "Antibody Capture")
    mixed.var.index = [*small.var_names, *(f"{name}_prot" for name in EXTRA)]
    whole = mixed.copy()
    whole.var = whole.var[[]]
    kept = mixed if same else mixed[:, 1000:].copy()
    kept.raw = whole
    kept.X = kept.X.astype(np.float32) - np.float32(0.5) * kept.X.sign()
    kept.write_h5ad(tmp_path / "cells.h5ad")
    for done in both_ways(tmp_path / "cells.h5ad", "--layer", "raw"):
        assert done.code == 0, done.err
        assert np.array_equal(done.codes, right)
        assert "8 features are not genes" in done.out
    assert "feature_types" not in with_kinds(whole.var, whole.var).columns


def test_ids_of_another_species_beside_human_ones():
    ids = [f"ENSG{i:011d}" for i in range(60)] + [f"ENSMUSG{i:011d}.2" for i in range(40)]
    names = [f"GENE{i}" for i in range(60)] + [f"Gene{i}" for i in range(40)]
    mask, left_out = gene_features(pd.DataFrame({"gene_ids": ids}, index=names))
    assert (mask.sum(), left_out) == (60, {"genome ENSMUSG": 40})
    assert gene_features(pd.DataFrame({"gene_ids": ids[60:]}, index=names[60:]))[0].all()


def test_names_that_r_wrote_with_points():
    axis = GeneAxis(("HLA-DRA", "MT-CO1", "HLA-A", "CD4"), ("", "", "", ""))
    found = match_columns(pd.DataFrame(index=["HLA.DRA", "MT.CO1", "HLA-A", "HLA.A", "CD.4"]), axis, aliases=False)
    assert found.tolist() == [0, 1, 2, -1, -1]


def test_a_small_panel_is_called_small(small, pbmc_tokenizer):
    known = small[:, np.isin(small.var_names, pbmc_tokenizer.axis.symbols)]
    panel = known[:, np.argsort(-np.asarray(known.X.sum(0)).ravel())[:20]].copy()
    panel = panel[np.asarray(panel.X.sum(1)).ravel() > 0].copy()
    with pytest.raises(InputError, match="holds too few genes; give one with more"):
        rvqa.encode(panel, pbmc_tokenizer)


# Values.


@pytest.mark.parametrize("word", ["Unlabeled", "UNLABELLED", "na", "None", "none", "NAN", "missing", "Unassigned"])
def test_words_for_no_label_in_any_case(word):
    adata = anndata.AnnData(obs=pd.DataFrame({"c": ["B", word]}, index=list("xy")))
    assert list(labels_of(adata, "c")) == ["B", ""]


@pytest.mark.parametrize("other", ["B\u00a0cell", "B  cell", "\ufeffB cell", "B\u200b cell", "B\tcell "])
def test_what_cannot_be_seen_makes_no_label(other):
    assert set(texts(["B cell", other])) == {"B cell"}
    assert len(set(texts(["T c\u00e9ll", "T ce\u0301ll"]))) == 1


@pytest.mark.parametrize("given", ["", " ", ",", " , "])
def test_an_option_that_names_nothing(given, small, rvqa_cli, kang_model, tmp_path):
    with pytest.raises(InputError, match="names nothing"):
        split_names([given], ["a"])
    small.obs["donor"] = np.where(np.arange(120) % 2, "1", "2")
    small.write_h5ad(tmp_path / "cells.h5ad")
    cells = tmp_path / "cells.h5ad"
    for command in (
        ["fit-tokenizer", cells, "-o", tmp_path / "t", "--held-out", given],
        ["fit-tokenizer", cells, "-o", tmp_path / "t", "--validation", given],
        ["annotate", cells, "-m", kang_model, "-o", tmp_path / "o.h5ad", "--labels", given],
        ["encode", cells, "-m", kang_model, "-o", tmp_path / "o.rvq", "--obs", given],
    ):
        done = rvqa_cli(*command, "-q")
        assert done.code == 2
        assert "names nothing" in done.err
    assert os.listdir(tmp_path) == ["cells.h5ad"]


def test_a_missing_value_is_no_control(small, model_path, rvqa_cli, tmp_path):
    small.obs["c"] = [None] * 60 + ["drug"] * 60
    small.write_h5ad(tmp_path / "cells.h5ad")
    words = ["fit", tmp_path / "cells.h5ad", "-o", tmp_path / "m", "--condition", "c", "--control", "nan", "-q"]
    done = rvqa_cli(*words)
    assert done.code == 2
    assert "60 of 120 cells have no value in obs['c'], and a missing value is not a control" in done.err


def test_a_column_with_blanks_around_its_name(small, right, kang_model, rvqa_cli, tmp_path):
    small.obs[" lead"] = "x"
    small.write_h5ad(tmp_path / "cells.h5ad")
    done = rvqa_cli("encode", tmp_path / "cells.h5ad", "-m", kang_model, "-o", tmp_path / "o.rvq", "--obs", " lead")
    assert done.code == 0, done.err
    assert set(rvqa.open_codes(tmp_path / "o.rvq").obs[" lead"]) == {"x"}


def test_a_column_like_ours_is_said(small, pbmc_tokenizer):
    small.obsm["rvqa_codes"] = np.zeros((120, 8), np.uint8)
    with pytest.warns(InputWarning, match=r"obsm\['rvqa_codes'\] are replaced"):
        rvqa.encode(small, pbmc_tokenizer)


# Files.


def spoilt(path, cells):
    """Damaged files by name."""
    cells.write_h5ad(path / "whole.h5ad")
    whole = (path / "whole.h5ad").read_bytes()
    (path / "text.h5ad").write_text("hello\n")
    (path / "gzip.h5ad").write_bytes(gzip.compress(b"hello"))
    (path / "half.h5ad").write_bytes(whole[: len(whole) // 2])
    (path / "less.h5ad").write_bytes(whole[:-1000])
    (path / "folder.h5ad").mkdir()
    os.symlink(path / "loop.h5ad", path / "loop.h5ad")
    (path / "whole.h5ad.gz").write_bytes(b"x")


def test_what_is_no_file_of_cells_is_said_by_every_command(small, kang_model, rvqa_cli, tmp_path):
    spoilt(tmp_path, small)
    before = sorted(os.listdir(tmp_path))
    for name, said in (
        ("text.h5ad", "holds no HDF5"),
        ("gzip.h5ad", "holds no HDF5"),
        ("half.h5ad", "is cut short"),
        ("less.h5ad", "is cut short"),
        ("folder.h5ad", "is a folder"),
        ("loop.h5ad", "does not exist"),
        ("whole.h5a", "does not exist or is not a file. Give the path of an .h5ad file. Nearest: 'whole.h5ad'"),
        ("whole.h5ad.gz", "Unpack it first"),
    ):
        for command in ("annotate", "encode"):
            done = rvqa_cli(command, tmp_path / name, "-m", kang_model, "-o", tmp_path / "o.h5ad", "-q")
            assert done.code == 2, done.err
            assert said in done.err, done.err
            assert done.err.count("\n") == 1
    assert sorted(os.listdir(tmp_path)) == before


def test_a_file_without_counts(small, kang_model, rvqa_cli, tmp_path):
    anndata.AnnData(obs=small.obs, var=small.var).write_h5ad(tmp_path / "cells.h5ad")
    for command in ("annotate", "encode"):
        done = rvqa_cli(command, tmp_path / "cells.h5ad", "-m", kang_model, "-o", tmp_path / "o.h5ad", "-q")
        assert done.code == 2
        assert "X is missing" in done.err


def test_a_file_that_another_program_writes(small, both_ways, tmp_path):
    small.write_h5ad(tmp_path / "cells.h5ad")
    with h5py.File(tmp_path / "cells.h5ad", "r+"):
        import subprocess
        import sys

        run = subprocess.run(
            [
                sys.executable,
                "-c",
                f"from rvqa.data.files.sources import obs_of; obs_of({str(tmp_path / 'cells.h5ad')!r})",
            ],
            capture_output=True,
            text=True,
        )
    assert "is open for writing in another program" in run.stderr


def test_a_10x_file_of_another_name(small, right, both_ways, tmp_path):
    tenx_h5(small, tmp_path / "cells.h5ad")
    annotated, encoded = both_ways(tmp_path / "cells.h5ad")
    assert (annotated.code, encoded.code) == (0, 0), annotated.err + encoded.err
    assert np.array_equal(annotated.codes, right)


def test_a_modality_of_another_name(small, right, both_ways, tmp_path):
    from anndata.io import write_elem

    with h5py.File(tmp_path / "cells.h5mu", "w") as file:
        write_elem(file, "mod/RNA", small)
    annotated, _ = both_ways(tmp_path / "cells.h5mu")
    assert annotated.code == 0, annotated.err


def test_more_columns_than_a_file_can_list_are_refused_before_any_work(small, kang_model, rvqa_cli, tmp_path):
    many = pd.DataFrame(np.zeros((120, 4090), np.int8), index=small.obs_names, columns=[f"c{i}" for i in range(4090)])
    small.obs = many
    small.write_h5ad(tmp_path / "cells.h5ad")
    done = rvqa_cli("annotate", tmp_path / "cells.h5ad", "-m", kang_model, "-o", tmp_path / "o.h5ad", "-q")
    assert done.code == 2
    assert "obs has 4,090 columns; an .h5ad file cannot list 8 more" in done.err
    assert os.listdir(tmp_path) == ["cells.h5ad"]


def test_names_of_cells_under_a_name_of_ours(small, kang_model, rvqa_cli, tmp_path):
    small.obs.index.name = "rvqa_cell_type"
    small.write_h5ad(tmp_path / "cells.h5ad")
    done = rvqa_cli("annotate", tmp_path / "cells.h5ad", "-m", kang_model, "-o", tmp_path / "o.h5ad", "-q")
    assert done.code == 2
    assert "a name of ours" in done.err
    assert os.listdir(tmp_path) == ["cells.h5ad"]


def test_outputs_behind_links(small, right, kang_model, rvqa_cli, tmp_path):
    small.write_h5ad(tmp_path / "real.h5ad")
    os.symlink("real.h5ad", tmp_path / "link.h5ad")
    link = tmp_path / "link.h5ad"
    done = rvqa_cli("encode", link, "-m", kang_model, "-o", link, "--in-place", "-q")
    assert done.code == 0, done.err
    assert link.is_symlink()
    assert np.array_equal(read_codes(tmp_path / "real.h5ad"), right)
    shutil.copy(tmp_path / "real.h5ad", tmp_path / "cells.h5ad")
    os.symlink(tmp_path / "elsewhere.h5ad", tmp_path / "out.h5ad")
    (tmp_path / "elsewhere.h5ad").write_text("earlier")
    done = rvqa_cli("annotate", tmp_path / "cells.h5ad", "-m", kang_model, "-o", tmp_path / "out.h5ad", "--force", "-q")
    assert done.code == 0, done.err
    assert np.array_equal(read_codes(tmp_path / "elsewhere.h5ad"), right)


def test_a_lazy_anndata_is_refused_in_memory(small, pbmc_tokenizer, tmp_path):
    small.write_h5ad(tmp_path / "cells.h5ad")
    with h5py.File(tmp_path / "cells.h5ad") as file:
        lazy = anndata.experimental.read_lazy(file)
        with pytest.raises(InputError, match="This AnnData is lazy"):
            rvqa.encode(lazy, pbmc_tokenizer)


def test_layers_of_files_by_any_of_their_paths(tmp_path, monkeypatch):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    files = [tmp_path / "a" / "x.h5ad", tmp_path / "b" / "x.h5ad", tmp_path / "y.h5ad"]
    monkeypatch.chdir(tmp_path)
    for word in ("soup=./y.h5ad", "soup=y.h5ad", f"soup={tmp_path}/y.h5ad", "soup=a/../y.h5ad"):
        layers = Layers.of([word], files)
        assert [layers.layer(file) for file in files] == ["auto", "auto", "soup"]
    assert Layers.of(["my=layer"], files).layer(files[0]) == "my=layer"
    with pytest.raises(InputError, match=r"z\.h5ad is none of the files"):
        Layers.of(["soup=z.h5ad"], files)
    with pytest.raises(InputError, match=r"x\.h5ad is several of the files"):
        Layers.of(["soup=x.h5ad"], files)
    assert Layers.of(["soup=a/x.h5ad"], files).layer(files[1]) == "auto"
