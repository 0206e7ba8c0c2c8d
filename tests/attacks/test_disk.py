"""Full disks of many sizes, up to just enough: one sentence, no file left behind, no earlier file lost.

The functions behind the commands write every kind of output, in a separate process, because HDF5 crashes if its last
writes fail.
"""

import os
import resource
import subprocess
import tempfile
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import anndata
import numpy as np
import pytest
import scipy.sparse as sp

import rvqa
from rvqa.errors import InputError
from tests.attacks.cases import survive

SIZES = int(os.environ.get("RVQA_DISK_SIZES", "8"))
"""Sizes of the disk for each kind of output."""

REFUSALS = ("the disk is full", "larger than a file may be")


@pytest.fixture(scope="module", autouse=True)
def inputs(model_path, shipped, tmp_path_factory):
    """Cells in files and a model, for the processes."""
    folder = tmp_path_factory.mktemp("inputs")
    cells = next(iter(shipped.tests.values()))[:40].copy()
    cells.write_h5ad(folder / "cells.h5ad")
    cells.write_zarr(folder / "cells.zarr")
    by_genes = cells.copy()
    by_genes.X = sp.csc_matrix(by_genes.X)
    by_genes.write_h5ad(folder / "csc.h5ad")
    os.environ["RVQA_DISK_INPUTS"], os.environ["RVQA_DISK_MODEL"] = str(folder), str(model_path)
    yield
    del os.environ["RVQA_DISK_INPUTS"], os.environ["RVQA_DISK_MODEL"]


def given(name="cells.h5ad"):
    return Path(os.environ["RVQA_DISK_INPUTS"]) / name


@cache
def model():
    return rvqa.load(os.environ["RVQA_DISK_MODEL"])


DEPTH = {"library_size_key": "depth"}


def encode(out, cells="cells.h5ad", **options):
    rvqa.encode(given(cells), model(), out=out, progress=False, **DEPTH, **options)


def annotate(out, cells="cells.h5ad", **options):
    labels = model().card.labels[:3]
    rvqa.annotate(given(cells), model(), out=out, labels=labels, progress=False, **DEPTH, **options)


@cache
def predicted():
    from rvqa.demo import SIMULATED

    cells = anndata.read_h5ad(given())
    return rvqa.perturb(cells, model(), perturbation=SIMULATED, cell_type_key="label", progress=False, **DEPTH)


def perturb(out, **options):
    from rvqa.io.files import write_h5ad

    write_h5ad(predicted(), out, force=True)


def report(out, **options):
    from rvqa.report import annotation_report

    annotation_report(annotated(), out, title="cells", force=True)


@cache
def annotated():
    cells = anndata.read_h5ad(given())
    cells.obsm["X_umap"] = np.random.default_rng(0).normal(size=(cells.n_obs, 2))  # computing one takes long
    rvqa.annotate(cells, model(), labels=model().card.labels[:3], progress=False, **DEPTH)
    return cells


def save(out, **options):
    model().save_pretrained(out, force=True)


def checkpoint(out, **options):
    import torch

    from rvqa.training.tokenizer.checkpoint import CheckpointFolder, State

    CheckpointFolder(out, {"settings": 1}).write(State({"step": 3}, {"a": torch.ones(5_000), "b": torch.ones(3)}))


def fit_tokenizer(out, **options):
    from rvqa.training.tokenizer.fit_files import fit_tokenizer_files
    from rvqa.training.tokenizer.settings import TokenizerSettings

    settings = TokenizerSettings(epochs=2, n_top_genes=60, hidden=8, latent=4, levels=2, entries=4)
    checkpoint = out.with_name("state")
    fit_tokenizer_files(
        [given()], out, settings=settings, labels="label", checkpoint=checkpoint, progress=False, force=True
    )


WRITERS = {
    "encode.h5ad": encode,
    "encode.rvq": encode,
    "encode.zarr": encode,
    "encode.parquet": encode,
    "by_genes.rvq": lambda out, **options: encode(out, "csc.h5ad", **options),
    "recon_error.h5ad": lambda out, **options: encode(out, recon_error=True, **options),
    "annotate.h5ad": annotate,
    "annotate.zarr": lambda out, **options: annotate(out, "cells.zarr", **options),
    "converted.h5ad": lambda out, **options: annotate(out, "cells.zarr", **options),
    "perturb.h5ad": perturb,
    "report.html": report,
    "model": save,
    "checkpoint": checkpoint,
    "tokenizer": fit_tokenizer,
}


@contextmanager
def disk(folder, size):
    """A file system of `size` bytes if one can be mounted, else a limit on the size of files."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder]
    mounted = not subprocess.run(mount, capture_output=True, check=False).returncode
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    if not mounted:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield mounted
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        if mounted:
            subprocess.run(["umount", "--lazy", folder], check=True)


def contents(folder):
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() if path.is_file() else None
        for path in sorted(folder.rglob("*"))
    }


@cache
def needed(name):
    """Return the most bytes of disk that an output takes, in pages."""
    with tempfile.TemporaryDirectory() as place:
        WRITERS[name](Path(place) / name)
        files = [path for path in Path(place).rglob("*") if path.is_file()]
        return sum(-(-path.stat().st_size // 4096) + 1 for path in files) * 4096


def full(number, folder):
    """Write with too little room, every other time beside an earlier output."""
    name = list(WRITERS)[number % len(WRITERS)]
    at = number // len(WRITERS)
    size = 4096 * (2 + (needed(name) * (at + 1) // SIZES) // 4096)
    before = {}
    with disk(folder / "disk", size) as mounted:
        out = folder / "disk" / name
        options = {}
        if mounted and at % 2 and out.suffix in (".h5ad", ".rvq", ".parquet", ".html"):
            out.write_bytes(b"mine")
            options, before = {"force": True}, {name: b"mine"}
        refusal = None
        try:
            WRITERS[name](out, **options)
        except InputError as error:
            refusal = str(error)
        if refusal is not None:
            assert any(each in refusal for each in REFUSALS), refusal
            left = contents(folder / "disk")
            parts = {path for path in left if path.startswith((f"{name}.parts", "state")) and "-rvqa-" not in path}
            assert {path: left[path] for path in left.keys() - parts} == before, (name, size, list(left))
        else:
            assert out.stat().st_size if out.is_file() else any(out.iterdir()), name


def test_full(tmp_path):
    survive(full, tmp_path, cases=SIZES * len(WRITERS), grows=1024)
