"""The command line: exit code 2 and one sentence for wrong use, nothing half-written, no heavy imports for help."""

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


@pytest.mark.parametrize("arguments", [["rvqa"], ["rvqa", "--help"], ["rvqa", "fit", "--help"]])
def test_import_and_help_import_nothing_heavy(arguments):
    heavy = "torch transformers vllm deepspeed dask anndata scanpy numba triton numpy pandas scipy sklearn"
    script = f"""
import sys, contextlib, rvqa, rvqa.cli
sys.argv = {arguments}
if sys.argv[1:]:
    with contextlib.suppress(SystemExit):
        rvqa.cli.main()
sys.exit(sorted(set({heavy.split()}) & set(sys.modules)) or 0)
"""
    done = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True)
    assert ("Usage" in done.stdout) == bool(arguments[1:])


def test_fit_annotate_perturb_encode_decode(shipped, cells_path, tmp_path, rvqa_cli):
    """A user's whole workflow on own files, from a labelled reference to annotated cells.

    `fit` runs in a separate process, as `encode` in `atlas/test_run.py` and `perturb` in `test_bad_input.py`.
    """

    def done(*arguments):
        said = rvqa_cli(*arguments)
        assert said.code == 0, said.err
        return said

    reference = tmp_path / "reference.h5ad"
    shipped.references[0].write_h5ad(reference)
    model = tmp_path / "model"
    options = ["--labels", "label", "--condition", "condition", "--control", "control", "--library-size-key", "depth"]
    fit = ["fit", reference, "-o", model, *options, "--steps", 20, "--quiet"]
    run(*fit)
    assert rvqa_cli(*fit).code == 2
    depth = ["-m", model, "--library-size-key", "depth"]

    annotated = tmp_path / "annotated.h5ad"
    assert "median confidence" in done("annotate", cells_path, *depth, "-o", annotated, "--quiet").out
    assert "rvqa_cell_type" in anndata.read_h5ad(annotated).obs

    encoded = tmp_path / "encoded.h5ad"
    done("encode", cells_path, *depth, "-o", encoded)
    codes = anndata.read_h5ad(encoded).obsm["rvqa_codes"]
    np.testing.assert_array_equal(codes, anndata.read_h5ad(annotated).obsm["rvqa_codes"])

    decoded = tmp_path / "decoded.h5ad"
    done("decode", encoded, "-m", model, "-o", decoded, "--genes", "CD74, NKG7")
    assert anndata.read_h5ad(decoded).var_names.tolist() == ["CD74", "NKG7"]

    predicted = tmp_path / "predicted.h5ad"
    asked = ["-p", SIMULATED, "--cell-type-key", "label", "--control-key", "condition", "--control-value", "control"]
    done("perturb", cells_path, *depth, "-o", predicted, *asked, "--quiet")
    assert anndata.read_h5ad(predicted).uns["rvqa"]["perturbation"] == SIMULATED
