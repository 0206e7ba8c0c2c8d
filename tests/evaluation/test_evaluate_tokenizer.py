"""`rvqa fit-tokenizer` and `rvqa evaluate tokenizer` on real cells, through the command line."""

import json

import numpy as np
import pytest
from typer.testing import CliRunner

from rvqa.cli import app
from rvqa.tokenizer.model import CellTokenizer
from tests.test_cli import run

FILES = ("pbmc3k_10x", "kang2018_ifnb_pbmc_2k")


@pytest.fixture(scope="module")
def fitted(data_dir, tmp_path_factory):
    """A tokenizer fitted briefly, with two donors held out and one for validation."""
    path = tmp_path_factory.mktemp("tokenizer") / "fitted"
    files = [data_dir / f"{name}.h5ad" for name in FILES]
    options = ["--held-out", "1244,1256", "--validation", "1039", "--epochs", 10, "--quiet"]
    done = CliRunner().invoke(app, [str(each) for each in ("fit-tokenizer", *files, "-o", path, *options)])
    assert done.exit_code == 0, done.output
    assert "genes" in done.output
    return path


def test_what_a_fit_leaves(fitted, data_dir, rvqa_cli):
    facts = json.loads((fitted / "fit.json").read_text())
    assert facts["held_out_donors"] == ["1244", "1256"]
    assert facts["cells"]["held out"] == 594
    assert facts["cells"]["fit"] + facts["cells"]["validation"] == 2638 + 2000 - 594 - 26
    assert facts["settings"]["epochs"] == 10
    assert 0 < facts["fit_seconds"] <= facts["seconds"]
    assert len(CellTokenizer.from_pretrained(fitted).axis) == facts["genes"]
    again = rvqa_cli("fit-tokenizer", data_dir / "pbmc3k_10x.h5ad", "-o", fitted)
    assert again.code == 2
    assert "--force" in again.err
    wrong = rvqa_cli("fit-tokenizer", data_dir / "pbmc3k_10x.h5ad", "-o", fitted.parent / "x", "--preset", "huge")
    assert wrong.code == 2
    assert "small, atlas" in wrong.err
    assert "Traceback" not in again.err + wrong.err


def test_figures(fitted, data_dir, tmp_path):
    """All figures exist, use only unseen cells, and lie within bounds that must hold."""
    names = (*FILES, "zheng2017_sorted_pbmc_3500", "kang2018_ctrl_pbmc_12k_1287genes")
    page = tmp_path / "report.html"
    options = [each for name in names for each in ("--data", data_dir / f"{name}.h5ad")]
    done = run("evaluate", "tokenizer", fitted, *options, "--json", "--quiet", "--report", page)
    result = json.loads(done.stdout)
    html = page.read_text()
    for name in names[1:]:
        assert html.count(name) > 5
    assert f"{result['probes'][names[2]]['latent']['accuracy']:.3f}" in html
    figures = result["figures"]
    assert all(np.isfinite(value) for value in figures.values()), figures
    assert result["probes"]["kang2018_ctrl_pbmc_12k_1287genes"]["cells"] == 3987  # only donors 1244 and 1256
    assert "pbmc3k_10x" not in result["probes"]
    for row in result["probes"].values():
        for method in ("expression", "latent", "codes"):
            assert row["majority"]["accuracy"] < row[method]["accuracy"] < 1
            low, high = row[method]["interval"]
            assert low < row[method]["accuracy"] < high
    zheng = result["probes"]["zheng2017_sorted_pbmc_3500"]
    assert figures["lr_codes_minus_expression_mean"] == pytest.approx(
        zheng["codes"]["accuracy"] - zheng["expression"]["accuracy"]
    )
    assert result["levels"]["zheng2017_sorted_pbmc_3500"][-1] == zheng["codes"]["accuracy"]
    assert max(result["codes"]["perplexity"]) <= 32
    for row in result["variance"].values():
        assert 0 < row["quantized"] <= row["before quantization"] + 0.01
    assert result["odd_cells"]["zheng2017_sorted_pbmc_3500"]["doublets"] > 0.5


def test_a_directory_without_a_record_is_refused(data_dir, tmp_path, fitted, rvqa_cli):
    CellTokenizer.from_pretrained(fitted).save_pretrained(tmp_path / "bare")
    bare = rvqa_cli("evaluate", "tokenizer", tmp_path / "bare", "--data", data_dir / "pbmc3k_10x.h5ad")
    assert bare.code == 2
    assert "split.parquet" in bare.err
    seen = rvqa_cli("evaluate", "tokenizer", fitted, "--data", data_dir / "pbmc3k_10x.h5ad")
    assert seen.code == 2
    assert "50 unseen cells" in seen.err
    assert "Traceback" not in bare.err + seen.err
