"""Cells of the demo: no held-out cell is in the fit, and simulated cells are marked as such."""

import os
from pathlib import Path

import numpy as np
import pytest
import scanpy as sc

from rvqa.data.studies import label_table
from rvqa.demo import HELD_OUT_DONORS, SIMULATED, data_folder, real_case, run
from rvqa.errors import InputError


@pytest.fixture(scope="module")
def case(data_dir, ref_dir):
    return real_case(data_dir)


def test_held_out_donors_and_cells_enter_no_fit(case):
    kang = case.references[1]
    assert not kang.obs["donor"].astype(str).isin([*HELD_OUT_DONORS, ""]).any()
    of_type = kang.obs["label"] == case.held_out_type
    assert (kang.obs["condition"][of_type] == "control").all()
    barcodes = set(kang.obs["barcode"][kang.obs["condition"] == "control"])
    for adata in case.tests.values():
        assert set(adata.obs["donor"].astype(str)) == set(HELD_OUT_DONORS)
        assert (adata.obs["label"] != "").all()
    assert not barcodes & set(case.tests["the same donors, 1,287-gene panel"].obs_names)
    assert set(case.perturbed.obs["condition"]) == {"IFN-beta"}
    assert not set(case.perturbed.obs_names) & set(kang.obs_names)


def test_shipped_counts_are_the_published_ones(shipped, read):
    """Rounding scanpy's log values gives the counts of the same cells, before the simulated response."""
    published = read("pbmc68k_reduced_700")
    untreated = shipped.references[0][shipped.references[0].obs["condition"] == "control"]
    np.testing.assert_array_equal(
        untreated.X.toarray(), published[untreated.obs_names, untreated.var_names].X.toarray()
    )


def test_the_simulated_response_is_named_and_real_cells_stay(shipped):
    assert "SIMULATED" in shipped.title
    assert set(shipped.contexts.obs["condition"]) == {"control", SIMULATED}
    names = set(sc.datasets.pbmc68k_reduced().obs_names)
    assert set(shipped.perturbed.obs_names) <= names
    assert not set(shipped.perturbed.obs_names) & set(shipped.references[0].obs_names)
    test = next(iter(shipped.tests.values()))
    assert not set(test.obs_names) & set(shipped.references[0].obs_names)


def test_data_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("RVQA_DATA_DIR", str(tmp_path))
    assert data_folder() == tmp_path
    monkeypatch.setenv("RVQA_DATA_DIR", str(tmp_path / "nowhere"))
    with pytest.raises(InputError, match="not a folder"):
        data_folder()
    monkeypatch.delenv("RVQA_DATA_DIR")
    assert data_folder() is None


def test_nothing_is_looked_for_beside_the_working_directory(monkeypatch, tmp_path):
    """An installed library looks only in folders that the user names."""
    beside, work = tmp_path / "shared", tmp_path / "work"
    for folder in (beside / "data", beside / "ref", work):
        folder.mkdir(parents=True)
    (beside / "ref" / "label_to_cl.json").write_text('{"B cells": {"coarse": "B"}}')
    monkeypatch.chdir(work)
    for name in ("RVQA_DATA_DIR", "RVQA_REF_DIR"):
        monkeypatch.delenv(name, raising=False)
    assert data_folder() is None
    assert label_table() == {}
    monkeypatch.setenv("RVQA_DATA_DIR", str(beside / "data"))
    assert label_table() == {"B cells": "B"}
    (beside / "ref" / "label_to_cl.json").unlink()
    with pytest.raises(InputError, match=r"label_to_cl\.json does not exist\. Set RVQA_REF_DIR"):
        real_case(beside / "data")


def test_the_demo_runs_without_a_data_folder_and_repeats(monkeypatch, tmp_path, capsys, one_thread):
    """A shortened demo on scanpy's cells, end to end; on one thread the same seed prints the same figures."""
    from rvqa.training import fit

    monkeypatch.delenv("RVQA_DATA_DIR", raising=False)
    monkeypatch.chdir(tmp_path)
    short = fit.FitSettings(
        tokenizer=fit.TokenizerSettings(epochs=10), language=fit.LanguageSettings(steps=20, batch_size=64)
    )
    monkeypatch.setattr(fit, "settings_for", lambda seed: short)
    results = [run(Path(name) / "model", progress=False) for name in ("one", "two")]
    printed = capsys.readouterr().out
    for words in (
        "<|cell|><|c0_",
        "Perplexity",
        "macro-F1",
        "majority class",
        "tokenizer ceiling",
        "SIMULATED response",
    ):
        assert words in printed
    for key in ("tokens", "perplexity", "annotation", "perturbation"):
        np.testing.assert_equal(results[0][key], results[1][key])
    assert (tmp_path / "one" / "model" / "rvqa.json").is_file()
    assert set(os.listdir(tmp_path)) == {"one", "two"}
