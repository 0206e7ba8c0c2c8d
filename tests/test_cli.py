"""The command line: exit code 2 and one sentence for wrong use, nothing half-written, no heavy imports for help."""

import json
import subprocess
import sys

import anndata
import numpy as np
import pytest

from rvqa.demo import SIMULATED


def run(*arguments, code=0):
    done = subprocess.run(
        [sys.executable, "-m", "rvqa", *map(str, arguments)], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    return done


@pytest.fixture(scope="module")
def cells_path(shipped, tmp_path_factory):
    path = tmp_path_factory.mktemp("cells") / "cells.h5ad"
    next(iter(shipped.tests.values())).write_h5ad(path)
    return path


def test_import_and_help_need_no_torch():
    heavy = "{'torch', 'transformers', 'vllm', 'deepspeed', 'dask', 'anndata'}"
    script = f"import sys, rvqa, rvqa.cli; sys.exit(sorted({heavy} & set(sys.modules)) or 0)"
    subprocess.run([sys.executable, "-c", script], check=True)
    assert "annotate" in run("--help").stdout


def test_doctor(monkeypatch):
    facts = json.loads(run("doctor", "--json").stdout)
    assert facts["backends"]["reference"] is None
    assert facts["packages"]["torch"]
    assert "kernels" in run("doctor").stdout


def test_fit_annotate_perturb_encode_decode(shipped, cells_path, tmp_path):
    """A user's whole way, with own files: labelled reference in, annotated cells out."""
    reference = tmp_path / "reference.h5ad"
    shipped.references[0].write_h5ad(reference)
    model = tmp_path / "model"
    options = ["--labels", "label", "--condition", "condition", "--control", "control", "--library-size-key", "depth"]
    run("fit", reference, "-o", model, *options, "--steps", 20, "--quiet")
    run("fit", reference, "-o", model, *options, "--steps", 20, "--quiet", code=2)
    depth = ["-m", model, "--library-size-key", "depth"]

    annotated = tmp_path / "annotated.h5ad"
    assert "median confidence" in run("annotate", cells_path, *depth, "-o", annotated, "--quiet").stdout
    assert "rvqa_cell_type" in anndata.read_h5ad(annotated).obs

    encoded = tmp_path / "encoded.h5ad"
    run("encode", cells_path, *depth, "-o", encoded)
    codes = anndata.read_h5ad(encoded).obsm["rvqa_codes"]
    np.testing.assert_array_equal(codes, anndata.read_h5ad(annotated).obsm["rvqa_codes"])

    decoded = tmp_path / "decoded.h5ad"
    run("decode", encoded, "-m", model, "-o", decoded, "--genes", "CD74, NKG7")
    assert anndata.read_h5ad(decoded).var_names.tolist() == ["CD74", "NKG7"]

    predicted = tmp_path / "predicted.h5ad"
    asked = ["-p", SIMULATED, "--cell-type-key", "label", "--control-key", "condition", "--control-value", "control"]
    run("perturb", cells_path, *depth, "-o", predicted, *asked, "--quiet")
    assert anndata.read_h5ad(predicted).uns["rvqa"]["perturbation"] == SIMULATED


def test_wrong_use_is_one_sentence_and_leaves_nothing(cells_path, model_path, tmp_path):
    out = tmp_path / "out.h5ad"
    missing = run("annotate", tmp_path / "no.h5ad", "-m", model_path, "-o", out, code=2)
    assert "does not exist" in missing.stderr
    assert "no rvqa model" in run("annotate", cells_path, "-m", tmp_path / "none", "-o", out, code=2).stderr
    junk = tmp_path / "junk.h5ad"
    junk.write_bytes(b"not hdf5 at all")
    assert "cannot be read" in run("annotate", junk, "-m", model_path, "-o", out, code=2).stderr
    logged = anndata.read_h5ad(cells_path)
    logged.X = np.log1p(logged.X)
    logged.write_h5ad(tmp_path / "log.h5ad")
    assert "counts" in run("annotate", tmp_path / "log.h5ad", "-m", model_path, "-o", out, code=2).stderr
    wrong_key = ["-m", model_path, "-o", out, "--library-size-key", "dpth"]
    assert "'depth'" in run("annotate", cells_path, *wrong_key, code=2).stderr
    assert not out.exists()
    out.write_bytes(b"mine")
    assert "--force" in run("annotate", cells_path, "-m", model_path, "-o", out, code=2).stderr
    assert out.read_bytes() == b"mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["junk.h5ad", "log.h5ad", "out.h5ad"]
