"""Columns and features: one reader for labels and conditions, genes only, and the user's columns are kept."""

import anndata
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from hypothesis import given
from hypothesis import strategies as st

import rvqa
from rvqa.data.columns import as_text, conditions_of, labels_of, split_names, texts
from rvqa.data.files.sources import open_source, read_cells
from rvqa.data.genes import GeneAxis
from rvqa.data.reading import Reading
from rvqa.errors import InputError, InputWarning
from rvqa.training.language.corpus import Corpus, CorpusSettings, words
from rvqa.training.references import read_reference

# Values.

SAME = {
    "integers": np.array([3, 0, 12]),
    "small integers": np.array([3, 0, 12], dtype=np.int8),
    "floats": np.array([3.0, 0.0, 12.0]),
    "float32": np.array([3, 0, 12], dtype=np.float32),
    "texts": ["3", "0", "12"],
    "texts of floats": ["3.0", "0.0", "12.0"],
    "bytes": [b"3", b"0", b"12"],
    "blanks": [" 3", "0 ", "12\t"],
    "categories": pd.Categorical(["3", "0", "12"]),
    "categories of integers": pd.Categorical([3, 0, 12]),
    "categories of floats": pd.Categorical([3.0, 0.0, 12.0]),
    "nullable integers": pd.array([3, 0, 12], dtype="Int64"),
    "nullable floats": pd.array([3.0, 0.0, 12.0], dtype="Float64"),
    "nullable texts": pd.array(["3", "0", "12"], dtype="string"),
    "objects": np.array([3, 0.0, "12"], dtype=object),
}


@pytest.mark.parametrize("kind", SAME)
def test_a_category_has_one_name_however_it_is_stored(kind):
    assert list(texts(SAME[kind])) == ["3", "0", "12"]


@pytest.mark.parametrize("kind", SAME)
def test_a_file_of_it_gives_the_same_labels(kind, small, tmp_path):
    """Beside a file with the numbers, each gives three labels, not six."""
    adata = small[:3].copy()
    values = SAME[kind]
    adata.obs = pd.DataFrame({"cluster": values}, index=adata.obs_names)
    if kind not in ("bytes", "objects", "nullable floats"):  # anndata writes none of these types
        before = anndata.settings.allow_write_nullable_strings
        anndata.settings.allow_write_nullable_strings = True
        adata.write_h5ad(tmp_path / "cells.h5ad")
        anndata.settings.allow_write_nullable_strings = before
        adata = read_cells(tmp_path / "cells.h5ad")
    assert list(read_reference(adata, labels="cluster").label_N) == ["3", "0", "12"]


@pytest.mark.parametrize("missing", [None, np.nan, pd.NA, pd.NaT, "", " ", "nan", "NA", "None", "N/A", "<NA>", b""])
def test_missing_is_missing(missing):
    values = np.array(["a", missing, "b"], dtype=object)
    assert list(texts(values)) == ["a", "", "b"]
    adata = anndata.AnnData(obs=pd.DataFrame({"c": values}, index=list("xyz")))
    assert list(labels_of(adata, "c")) == ["a", "", "b"]
    assert list(conditions_of(adata, "c", ["a"])) == ["", None, "b"]


def test_a_missing_number_makes_no_other_labels():
    assert list(texts(np.array([1.0, np.nan, 2.0]))) == ["1", "", "2"]
    assert list(texts(pd.Categorical([1.0, np.nan, 2.0]))) == ["1", "", "2"]
    assert list(texts([0.5, 1.0])) == ["0.5", "1"]
    assert list(texts([True, False])) == ["True", "False"]


def test_a_word_for_missing_may_be_the_control():
    adata = anndata.AnnData(obs=pd.DataFrame({"c": ["None", "drug", ""]}, index=list("xyz")))
    assert list(conditions_of(adata, "c", ["None"])) == ["", "drug", None]


@given(st.lists(st.one_of(st.text(), st.integers(), st.floats(), st.booleans(), st.none(), st.binary())))
def test_reading_twice_changes_nothing(values):
    once = texts(np.array([*values, None], dtype=object)[:-1])
    assert list(texts(once)) == list(once)
    assert all(text == text.strip() for text in once)
    assert [as_text(each) for each in once] == list(once)


@pytest.mark.parametrize(
    ("given", "known", "names"),
    [
        (["A,B"], ["A", "B"], ["A", "B"]),
        (["A, B ", "C"], ["A", "B", "C"], ["A", "B", "C"]),
        (["T cell, CD4", "B"], ["T cell, CD4", "B"], ["T cell, CD4", "B"]),
        (["T cell, CD4"], ["T cell, CD4", "T cell", "CD4"], ["T cell, CD4"]),
        (["B,C"], ["T cell, CD4", "B", "C"], ["B", "C"]),
        (["T cell, CD8"], ["T cell, CD4", "B"], ["T cell, CD8"]),
        (["A", "A"], ["A"], ["A"]),
        (["A,,B,"], [], ["A", "B"]),
    ],
)
def test_names_with_commas(given, known, names):
    assert split_names(given, known) == names


def test_a_missing_condition_teaches_no_condition(read):
    adata = read("kang2018_ifnb_pbmc_2k")[:200].copy()
    adata.obs["c"] = [None] * 50 + ["drug"] * 50 + ["ctrl"] * 100
    with pytest.warns(InputWarning, match=r"50 of 200 cells have no value in obs\['c'\]"):
        reference = read_reference(adata, labels="cell_type", condition="c", control="ctrl")
    assert words([reference])[1] == ["drug"]
    assert (reference.condition_N[50:100] == "drug").all()
    assert [each is None for each in reference.condition_N] == [True] * 50 + [False] * 150


def test_the_corpus_leaves_it_out(read, model):
    """Cells without a condition give examples of their labels, but none with a condition."""
    adata = read("pbmc68k_reduced_700")[:200].copy()
    adata.obs["c"] = [None] * 150 + ["drug"] * 20 + ["ctrl"] * 30
    with pytest.warns(InputWarning):
        reference = read_reference(
            adata, labels="cell_type", condition="c", control="ctrl", reading=Reading(None, "n_counts_all_genes")
        )
    settings = CorpusSettings(variants=1, generate_share=1.0)
    corpus = Corpus([reference], model.cell_tokenizer, model.prompts, settings, seed=0)
    labelled = reference.label_N != ""
    assert set(corpus.labelled) == set(np.flatnonzero(labelled))
    assert set(corpus.told) == set(np.flatnonzero(labelled & (np.arange(200) >= 150)))
    assert set(corpus.perturbed) <= set(range(150, 170))
    assert set(corpus.unchanged) <= set(range(170, 200))


# Features.

EXTRA = ["CD4", "CD14", "CD19", "CD3E", "CD8A", "FCGR3A", "NCAM1", "PTPRC"]


def with_features(adata, kind, column="feature_types", values=None, genes="Gene Expression"):
    """Cells with columns that have gene names but are not genes."""
    values = np.random.default_rng(0).poisson(80, (adata.n_obs, len(EXTRA))) if values is None else values
    var = pd.DataFrame({column: genes}, index=adata.var_names.astype(str))
    more = pd.DataFrame({column: kind}, index=EXTRA)
    return anndata.AnnData(
        sp.hstack([adata.X, sp.csr_matrix(values.astype(np.float32))]).tocsr(),
        obs=adata.obs.copy(),
        var=pd.concat([var, more]),
    )


FEATURES = {
    "antibodies": ("Antibody Capture", "feature_types", "Gene Expression"),
    "guides": ("CRISPR Guide Capture", "feature_types", "Gene Expression"),
    "hashtags": ("Multiplexing Capture", "feature_types", "Gene Expression"),
    "custom": ("Custom", "feature_types", "Gene Expression"),
    "spike-ins": ("spike-in", "feature_biotype", "gene"),
    "peaks": ("Peaks", "feature_types", "Gene Expression"),
    "of muon": ("prot", "modality", "rna"),
}


@pytest.mark.parametrize("kind", FEATURES)
@pytest.mark.parametrize("denoised", [False, True])
def test_features_that_are_no_genes_are_left_out_both_ways(kind, denoised, small, right, both_ways, tmp_path):
    """This also holds if their values are not counts, such as denoised antibodies."""
    name, column, genes = FEATURES[kind]
    values = np.random.default_rng(0).normal(2, 1, (120, len(EXTRA))) if denoised else None
    with_features(small, name, column, values, genes).write_h5ad(tmp_path / "cells.h5ad")
    for done in both_ways(tmp_path / "cells.h5ad"):
        assert done.code == 0, done.err
        assert np.array_equal(done.codes, right)
        assert "8 features are not genes and were left out" in done.out, done.out


def test_they_enter_no_fit(small, tmp_path):
    mixed = with_features(small, "Antibody Capture")
    reference = read_reference(mixed)
    assert reference.axis.symbols == GeneAxis.from_adata(small).symbols
    assert dict(reference.left_out) == {"Antibody Capture": 8}
    assert (reference.counts != small.X).nnz == 0
    mixed.write_h5ad(tmp_path / "cells.h5ad")
    source = open_source(tmp_path / "cells.h5ad", scratch=tmp_path)
    assert list(source.var.index) == list(small.var_names)
    rows = source.matrix.rows(3, 9)
    assert (sp.csr_matrix((rows.data, rows.indices, rows.indptr), shape=(6, small.n_vars)) != small.X[3:9]).nnz == 0


def test_cells_of_two_species(small, right, both_ways, tmp_path):
    """Names start with the genome; mouse genes are left out, and human ones lose the prefix."""
    mouse = sp.random(small.n_obs, 500, density=0.2, random_state=0, data_rvs=lambda n: np.ones(n), format="csr")
    names = [*(f"GRCh38_{name}" for name in small.var_names), *(f"mm10___Gene{i}" for i in range(500))]
    both = anndata.AnnData(
        sp.hstack([small.X, mouse]).tocsr().astype(np.float32), obs=small.obs.copy(), var=pd.DataFrame(index=names)
    )
    both.write_h5ad(tmp_path / "cells.h5ad")
    for done in both_ways(tmp_path / "cells.h5ad"):
        assert done.code == 0, done.err
        assert np.array_equal(done.codes, right)
        assert "500" in done.out


# Integers that are not counts, both ways.


def test_rounded_tpm_is_refused_both_ways(small, both_ways, tmp_path):
    dense = small.X.toarray() / np.random.default_rng(0).uniform(500, 5000, small.n_vars)
    small.X = sp.csr_matrix(np.round(dense / dense.sum(1, keepdims=True) * 1e6).astype(np.float32))
    small.write_h5ad(tmp_path / "cells.h5ad")
    for done in both_ways(tmp_path / "cells.h5ad"):
        assert done.code == 2
        assert "integers that are not counts" in done.err


def test_another_place_is_taken_where_x_is_binarised(small, right, both_ways, tmp_path):
    small.layers["counts"] = small.X.copy()
    small.X = small.X.sign()
    small.write_h5ad(tmp_path / "cells.h5ad")
    for done in both_ways(tmp_path / "cells.h5ad"):
        assert done.code == 0, done.err
        assert np.array_equal(done.codes, right)
    for done in both_ways(tmp_path / "cells.h5ad", "--layer", "X"):
        assert done.code == 2
        assert "presence or absence" in done.err


# The user's own columns.


def test_perturb_keeps_the_users_columns(shipped, model):
    cells = next(iter(shipped.tests.values()))[:12].copy()
    cells.obs["sample"], cells.obs["control_cell"] = [f"patient {i % 3}" for i in range(12)], "mine"
    predicted = rvqa.perturb(
        cells,
        model,
        perturbation=model.card.perturbations[0],
        cell_type_key="label",
        library_size_key="depth",
        n_samples=2,
        progress=False,
    )
    assert list(predicted.obs["sample"]) == [f"patient {i // 2 % 3}" for i in range(24)]
    assert set(predicted.obs["control_cell"]) == {"mine"}
    assert list(predicted.obs["rvqa_sample"]) == [0, 1] * 12
    assert set(predicted.obs["rvqa_perturbation"]) == {model.card.perturbations[0]}
    assert list(predicted.obs["rvqa_control_cell"][::2]) == list(cells.obs_names)


@pytest.mark.parametrize("suffix", [".rvq", ".zarr", ".parquet"])
def test_columns_with_names_of_ours_are_carried_under_others(suffix, small, right, kang_model, rvqa_cli, tmp_path):
    small.obs["cell"] = [f"mine {i}" for i in range(120)]
    small.obs["file"], small.obs["code_1"], small.obs["obs_cell"] = "a", np.arange(120), "b"
    small.write_h5ad(tmp_path / "cells.h5ad")
    columns = [word for name in ("cell", "file", "code_1", "obs_cell") for word in ("--obs", name)]
    out = tmp_path / f"out{suffix}"
    done = rvqa_cli("encode", tmp_path / "cells.h5ad", "-m", kang_model, "-o", out, *columns)
    assert done.code == 0, done.err
    assert "obs['cell'] is carried along as 'obs_cell_'" in done.err
    codes = rvqa.open_codes(out)
    assert np.array_equal(codes[:], right)
    assert list(codes.obs.index) == list(small.obs_names)
    assert list(codes.obs["obs_cell_"]) == list(small.obs["cell"])
    assert list(codes.obs["obs_code_1"]) == list(range(120))
    assert set(codes.obs["obs_cell"]) == {"b"}
    assert set(codes.obs["obs_file"]) == {"a"}
    assert set(codes.obs["file"]) == {"cells.h5ad"}


@pytest.mark.parametrize("key", ["pca", "leiden"])
def test_a_prefix_of_somebody_else_is_refused_before_any_work(key, small, pbmc_tokenizer):
    small.obsm["X_pca"], small.uns["leiden"] = np.zeros((120, 2)), {"params": {}}
    with pytest.raises(InputError, match=rf"key_added='{key}' would overwrite .*which rvqa did not write"):
        rvqa.encode(small, pbmc_tokenizer, key_added=key)
    assert "leiden_codes" not in small.obsm
    rvqa.encode(small, pbmc_tokenizer, key_added="mine")
    rvqa.encode(small, pbmc_tokenizer, key_added="mine")  # our own columns may be overwritten


# Lists and places on the command line.


def test_labels_with_commas(small, model_path, rvqa_cli, tmp_path):
    """A model is fitted briefly on labels with commas; the command line chooses among them."""
    name = "CD4-positive, alpha-beta T cell"
    small.obs["t"] = np.where(small.obs["cell_type"].astype(str).str.contains("CD4"), name, "other")
    small.write_h5ad(tmp_path / "cells.h5ad")
    fitted = rvqa_cli(
        "fit", tmp_path / "cells.h5ad", "-o", tmp_path / "model", "--labels", "t", "--steps", 2, "--seed", 1, "-q"
    )
    assert fitted.code == 0, fitted.err
    words = [
        "annotate",
        tmp_path / "cells.h5ad",
        "-m",
        tmp_path / "model",
        "-o",
        tmp_path / "out.h5ad",
        "-q",
        "--force",
    ]
    for chosen, labels in (
        (["--labels", name, "--labels", "other"], [name, "other"]),
        (["--labels", name], [name]),
        ([], [name, "other"]),
    ):
        done = rvqa_cli(*words, *chosen)
        assert done.code == 0, done.err
        assert list(anndata.read_h5ad(tmp_path / "out.h5ad").uns["rvqa"]["labels"]) == labels
    done = rvqa_cli(*words, "--labels", "CD4-positive, alpha-beta B cell")
    assert done.code == 2
    assert name in done.err


@pytest.fixture
def mixed(small, tmp_path):
    """A file with counts in X, and one with counts in a layer."""
    small.write_h5ad(tmp_path / "x.h5ad")
    small.layers["counts"] = small.X.copy()
    small.X = small.X.multiply(1e4 / small.X.sum(1)).tocsr().log1p()
    small.write_h5ad(tmp_path / "layer.h5ad")
    return tmp_path / "x.h5ad", tmp_path / "layer.h5ad"


@pytest.mark.parametrize(
    "options",
    [
        (),
        ("--layer", "auto"),
        ("--layer", "counts=layer.h5ad"),
        ("--layer", "X=x.h5ad", "--layer", "counts"),
        ("--layer", "counts={layer}"),
    ],
)
def test_files_with_counts_in_different_places(options, mixed, right, kang_model, rvqa_cli, tmp_path):
    options = [each.format(layer=mixed[1]) for each in options]
    done = rvqa_cli("encode", *mixed, "-m", kang_model, "-o", tmp_path / "out.rvq", *options)
    assert done.code == 0, done.err
    assert np.array_equal(rvqa.open_codes(tmp_path / "out.rvq")[:], np.concatenate([right, right]))
    assert "layer.h5ad counts: from layers['counts']" in done.out


def test_places_that_are_not_there(mixed, kang_model, rvqa_cli, tmp_path):
    words = ["encode", *mixed, "-m", kang_model, "-o", tmp_path / "out.rvq"]
    for options, said in (
        (["--layer", "counts"], "x.h5ad: There is no layer 'counts'"),
        (["--layer", "X"], "layer.h5ad: X looks log1p"),
        (["--layer", "X", "--layer", "counts"], "Two layers are named for all files"),
        (["--layer", "X=x.h5ad", "--layer", "counts=x.h5ad"], "Two layers are named for x.h5ad"),
    ):
        done = rvqa_cli(*words, *options)
        assert done.code == 2
        assert said in done.err, done.err


def test_which_layer_holds_the_counts(small, right, pbmc_tokenizer):
    counts = small.X.copy()
    small.X = counts.multiply(1e4 / counts.sum(1)).tocsr().log1p()
    with pytest.raises(InputError, match=r"looks log1p.*Pass raw counts"):
        rvqa.encode(small, pbmc_tokenizer)
    small.layers["spliced"], small.layers["unspliced"] = counts.copy(), counts.copy()
    with pytest.raises(InputError, match="looks log1p"):  # part of a cell's counts must not pass for all of them
        rvqa.encode(small, pbmc_tokenizer, layer="auto")
    small.layers["mine"] = counts.copy()
    rvqa.encode(small, pbmc_tokenizer, layer="auto")
    assert np.array_equal(small.obsm["rvqa_codes"], right)
    assert small.uns["rvqa"]["coverage"]["counts_from"] == "layers['mine']"
    small.layers["other"] = counts.copy()
    with pytest.raises(InputError, match=r"X holds no raw counts, and layers\['mine'\], layers\['other'\] look"):
        rvqa.encode(small, pbmc_tokenizer, layer="auto")
    small.layers["counts"] = counts.copy()
    rvqa.encode(small, pbmc_tokenizer, layer="auto")
    assert small.uns["rvqa"]["coverage"]["counts_from"] == "layers['counts']"
    small.layers.clear()
    small.raw = anndata.AnnData(counts, obs=small.obs, var=small.var)
    rvqa.encode(small, pbmc_tokenizer, layer="auto")
    assert small.uns["rvqa"]["coverage"]["counts_from"] == "raw.X"
    assert np.array_equal(small.obsm["rvqa_codes"], right)


def test_version(rvqa_cli):
    done = rvqa_cli("--version")
    assert (done.code, done.out) == (0, f"rvqa {rvqa.__version__}\n")
