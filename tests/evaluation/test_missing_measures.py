"""`rvqa evaluate tokenizer`: measures that it cannot take, files with few genes, and a model's directory."""

import json

import numpy as np
import pytest

from rvqa.data import splits
from rvqa.data.studies import read_study
from rvqa.errors import InputError
from rvqa.evaluation import tokenizer_measures as measures
from rvqa.evaluation.tokenizer import evaluate_directory, evaluate_tokenizer
from rvqa.evaluation.tokenizer_figures import missing, text
from rvqa.evaluation.unseen import same_cells
from rvqa.report.tokenizer import tokenizer_report

TABLES = ("variance", "probes", "levels", "depth", "panels", "populations", "clusters", "odd_cells")
FEW = ("papalexi2021_eccite_thp1_299genes", "he2020_bone_marrow_421genes")


def plain(adata):
    """Return a file's cells with the default column names."""
    adata = adata.copy()
    adata.obs["library_size"] = adata.obs["depth"]
    adata.obs["cell_type"] = adata.obs["label"]
    return adata


@pytest.fixture(scope="module")
def files(shipped, tmp_path_factory):
    """Write the model's reference under its name, a copy under another name, and held-out cells."""
    folder = tmp_path_factory.mktemp("files")
    reference = plain(shipped.references[0])
    reference.write_h5ad(folder / f"{shipped.names[0]}.h5ad")
    reference.obs_names = [f"renamed {i}" for i in range(reference.n_obs)]
    reference[:, ::2].copy().write_h5ad(folder / "copied.h5ad")
    plain(next(iter(shipped.tests.values()))).write_h5ad(folder / "held_out.h5ad")
    return folder


def everything_said(result, folder):
    """Return text, page and JSON of a result; every measure must be a number or have a reason, never nan."""
    json.dumps(result, allow_nan=False)
    page = folder / "page.html"
    tokenizer_report(result, page, title="title", force=True)
    html = page.read_text(encoding="utf-8").split("<main>")[1].split("</main>")[0].replace("&#x27;", "'")
    said = text(result)
    for written in (said, html):
        assert "nan" not in written.lower().replace("nano", "")
    assert "<tbody></tbody>" not in html
    for name in TABLES:
        assert result[name] is not None or result["reasons"][name]
        for study, row in (result[name] or {}).items():
            assert row is not None or result["reasons"][f"{name}: {study}"]
        for sentence in missing(result, name):
            assert sentence in said
            assert sentence in html
    for name, value in result["figures"].items():
        assert value is not None or result["reasons"][name]
    return said


def test_a_model_directory_is_measured_on_cells_of_other_files(model_path, model, files, tmp_path, shipped):
    """Cells of the references count as fitted in any file; only held-out cells are measured."""
    result = evaluate_directory(model_path, [files])
    assert list(result["codes"]["by_study"]) == ["held_out"]
    assert "does not record which cells" in result["reasons"]["split"]
    assert "0 of its" in result["reasons"]["cells: copied"]
    assert result["fit"]["files"] == {shipped.names[0]: {"cells": shipped.references[0].n_obs}}
    everything_said(result, tmp_path)

    split = splits.make_split([read_study(files / f"{shipped.names[0]}.h5ad")])
    splits.write_split(split, tmp_path / "split.parquet")
    given = evaluate_directory(model_path, [files], split=tmp_path / "split.parquet")
    assert given["figures"] == result["figures"]
    assert "split" not in given["reasons"]

    splits.write_split(split.iloc[1:], tmp_path / "short.parquet")
    with pytest.raises(InputError, match="Give the split of that fit"):
        evaluate_directory(model_path, [files], split=tmp_path / "short.parquet")


def test_nothing_is_called_unseen_without_the_files_of_the_fit(model_path, files, tmp_path, shipped):
    with pytest.raises(InputError, match="which is not among the files") as error:
        evaluate_directory(model_path, [files / "held_out.h5ad"])
    assert "--split" in str(error.value)
    part = plain(shipped.references[0])[:-1].copy()
    part.write_h5ad(tmp_path / f"{shipped.names[0]}.h5ad")
    with pytest.raises(InputError, match="cells among the files"):
        evaluate_directory(model_path, [tmp_path, files / "held_out.h5ad"])
    with pytest.raises(InputError, match="--split"):
        evaluate_directory(model_path / "cell_tokenizer", [files])


def test_without_labels_every_measure_says_why(model_path, files, tmp_path):
    result = evaluate_directory(model_path, [files], labels="no such column")
    for name in ("probes", "levels", "panels", "clusters", "odd_cells"):
        assert result[name] is None
        assert "obs['no such column']" in result["reasons"][name]
        assert "--labels" in result["reasons"][name]
    for name in ("lr_codes_minus_expression_mean", "coarse_share_two_levels", "mean_pearson_centered"):
        assert result["figures"][name] is None
        assert result["reasons"][name]
    assert result["figures"]["first_code_kept_half_depth"] > 0
    assert result["figures"]["variance_pearson"] is not None
    assert "not measured" in everything_said(result, tmp_path)


@pytest.fixture(scope="module")
def parts(read, tmp_path_factory):
    """`parts(name, step, first)` gives every `step`-th cell of a data file, as a study."""
    folder = tmp_path_factory.mktemp("parts")

    def part(name, step, first=0):
        path = folder / f"{name}-{first}.h5ad"
        read(name)[first::step].copy().write_h5ad(path)
        return read_study(path)

    return part


def test_files_of_few_genes_narrow_no_comparison_but_their_own(parts, read, tmp_path):
    """Fitted and unseen files have 299 genes, 421 genes, or whole transcriptomes."""
    from rvqa.tokenizer.model import CellTokenizer
    from rvqa.training.references import read_reference
    from rvqa.training.tokenizer.settings import TokenizerSettings

    fitted = [parts(name, step) for name, step in (("pbmc3k_10x", 5), (FEW[0], 60), (FEW[1], 6))]
    references = [
        read_reference(read(name)[::step].copy(), name=name, labels="cell_type")
        for name, step in (("pbmc3k_10x", 5), (FEW[0], 60), (FEW[1], 6))
    ]
    tokenizer = CellTokenizer.fit(references, TokenizerSettings(epochs=2), progress=False)
    unseen = [parts(name, step, 1) for name, step in ((FEW[0], 200), (FEW[1], 6), ("pbmc3k_10x", 20))]
    unseen += [parts("tian2019_lung_cancer_lines", 10), parts("pbmc5k_citeseq_4000genes", 40)]
    split = splits.make_split([*fitted])
    split["donor"] = ""  # PBMC3k is one of them, and some of its cells are unseen here
    result = evaluate_tokenizer(tokenizer, [*fitted, *unseen], split)
    assert list(result["codes"]["by_study"]) == [study.name for study in unseen]
    genes = {name: row["genes"] for name, row in result["probes"].items() if row}
    assert genes["pbmc3k_10x-1"] == 13714  # only PBMC3k of the fit is compared with
    assert 50 <= genes["he2020_bone_marrow_421genes-1"] <= 421
    assert all(f"{name}-0" in result["reasons"]["probes: pbmc3k_10x-1"] for name in FEW)
    assert "H1975" in result["reasons"]["probes: tian2019_lung_cancer_lines-0"]
    assert all(row["quantized"] > -10 for row in result["variance"].values())
    assert all(0 < row["first_code_kept"] <= 1 for row in result["depth"].values())
    everything_said(result, tmp_path)


def test_the_files_to_compare_with(parts):
    """The file with most genes stays, and so do other files that leave at least half of these genes."""
    pbmc, kang, few, marrow = (
        measures.Coded(parts(name, step), *[np.empty(0)] * 3)
        for name, step in (("pbmc3k_10x", 50), ("kang2018_ifnb_pbmc_2k", 50), (FEW[0], 400), (FEW[1], 50))
    )
    test = parts("zheng2017_sorted_pbmc_3500", 50)
    found = measures.Comparison.of([few, pbmc, marrow, kang], test, test.axis)
    assert found.sources == [pbmc, kang]
    assert found.left_out == [few.study.name, marrow.study.name]
    assert len(found.axis) > 7000
    only = measures.Comparison.of([few, pbmc, marrow], test, test.axis, [marrow])
    assert only.sources == [pbmc, marrow]
    assert 250 < len(only.axis) < 421
    with pytest.raises(measures.NotMeasured, match="No file of the fit"):
        measures.Comparison.of([], test, test.axis)


def test_the_same_cells_are_found_in_another_file(parts, read):
    """Another Kang file with fewer genes has 954 of the 1,000 control cells of the first."""
    kang, panel = parts("kang2018_ifnb_pbmc_2k", 1), parts("kang2018_ctrl_pbmc_12k_1287genes", 1)
    same_N = same_cells(kang, [panel])
    assert same_N.sum() == 954
    assert (kang.condition_N[same_N] == "ctrl").all()
    assert not same_cells(kang, [parts("pbmc3k_10x", 1), parts(FEW[0], 10)]).any()
    assert same_cells(kang.take(np.arange(5)), [kang]).all()
