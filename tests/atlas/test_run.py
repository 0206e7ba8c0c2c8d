"""Whole runs on real cells: every form of file, stopped anywhere, gives the same codes and bytes."""

import json
import os
import signal
import subprocess
import sys
import time

import anndata
import h5py
import numpy as np
import pandas as pd
import pytest
from anndata import AnnData

import rvqa
from rvqa.atlas import run, rvq
from rvqa.atlas.encoder import Settings
from rvqa.atlas.run import encode_files
from rvqa.data.files import matrices
from rvqa.data.reading import Reading
from rvqa.errors import InputError
from rvqa.tokenizer.model import CellTokenizer
from tests.atlas.conftest import DENSE

CELLS = 300


def encoded(given, tokenizer, out, *, cells=CELLS, **options):
    """Codes of one run."""
    reading = Reading(options.pop("layer", None), options.pop("library_size_key", None))
    settings = Settings(reading, options.pop("obs", ()), cells)
    encode_files(given, tokenizer, out, settings=settings, threads=options.pop("threads", 2), **options)
    assert not out.with_name(f"{out.name}.parts").exists()
    return rvqa.open_codes(out)


def test_every_form_has_the_codes_of_memory(form, cells, right, pbmc_tokenizer, tmp_path):
    path, layer = form
    codes = encoded(path, pbmc_tokenizer, tmp_path / "a.rvq", layer=layer)
    if "dense" in path.name:  # of fewer genes
        part = cells[:, DENSE].copy()
        rvqa.encode(part, pbmc_tokenizer)
        right = part.obsm["rvqa_codes"]
    assert np.array_equal(codes[:], right)
    assert codes.obs.index.tolist() == cells.obs_names.tolist()


@pytest.mark.parametrize("entries", [1, 5_000, 100_000])
@pytest.mark.parametrize(("size", "threads"), [(1, 1), (97, 3), (2_000, 2), (70_000, 8)])
def test_blocks_tasks_and_threads_change_nothing(
    cells, right, pbmc_tokenizer, tmp_path, monkeypatch, entries, size, threads
):
    if size == 1 or entries == 1:
        cells, right = cells[:150].copy(), right[:150]
    cells.write_h5ad(tmp_path / "cells.h5ad")
    monkeypatch.setattr(matrices, "ENTRIES", entries)
    codes = encoded(tmp_path / "cells.h5ad", pbmc_tokenizer, tmp_path / "a.rvq", cells=size, threads=threads)
    assert np.array_equal(codes[:], right)


@pytest.mark.parametrize("kind", ["memory", "backed", "backed view", "dask", "lazy"])
def test_anndata_objects(cells, right, pbmc_tokenizer, tmp_path, kind):
    cells.write_h5ad(tmp_path / "cells.h5ad")
    if kind == "memory":
        given = cells
    elif kind == "dask":
        array = pytest.importorskip("dask.array")
        given = AnnData(array.from_array(cells.X.toarray(), chunks=(500, -1)), obs=cells.obs, var=cells.var)
    elif kind == "lazy":
        pytest.importorskip("xarray")
        given = anndata.experimental.read_lazy(tmp_path / "cells.h5ad")
    else:
        given = anndata.read_h5ad(tmp_path / "cells.h5ad", backed="r")
        if kind == "backed view":
            given, right = given[100:900], right[100:900]
    codes = encoded(given, pbmc_tokenizer, tmp_path / "a.rvq", obs=("number",))
    assert np.array_equal(codes[:], right)
    assert codes.obs["number"].tolist() == list(range(100, 900) if kind == "backed view" else range(2_000))


@pytest.mark.parametrize("suffix", [".rvq", ".zarr", ".parquet"])
def test_outputs_carry_columns(cells, right, pbmc_tokenizer, tmp_path, suffix):
    cells.write_h5ad(tmp_path / "cells.h5ad")
    columns = ("cell_type", "number", "maybe", "flag")
    codes = encoded(tmp_path / "cells.h5ad", pbmc_tokenizer, tmp_path / f"a{suffix}", obs=columns)
    assert np.array_equal(codes[:], right)
    assert codes.obs.index.tolist() == cells.obs_names.tolist()
    assert codes.obs["cell_type"].tolist() == cells.obs["cell_type"].astype(str).tolist()
    for name in columns[1:]:
        pd.testing.assert_series_equal(codes.obs[name], cells.obs[name], check_dtype=False)
    assert codes.manifest["model"] == pbmc_tokenizer.fingerprint()


def test_h5ad_is_a_copy_with_the_keys_of_memory(cells, pbmc_tokenizer, tmp_path):
    cells.uns["rvqa"] = {"kept": "yes"}
    cells.write_h5ad(tmp_path / "cells.h5ad")
    encode_files(tmp_path / "cells.h5ad", pbmc_tokenizer, tmp_path / "a.h5ad", settings=Settings(cells=CELLS))
    made, expected = anndata.read_h5ad(tmp_path / "a.h5ad"), cells.copy()
    rvqa.encode(expected, pbmc_tokenizer)
    for key in ("rvqa_codes", "X_rvqa"):
        assert np.array_equal(made.obsm[key], expected.obsm[key])
    assert made.uns["rvqa"]["coverage"]["n_measured"] == expected.uns["rvqa"]["coverage"]["n_measured"]
    assert (made.uns["rvqa"]["kept"], made.uns["rvqa"]["version"]) == ("yes", rvqa.__version__)
    assert (made.X != expected.X).nnz == 0
    pd.testing.assert_frame_equal(made.obs, expected.obs)
    del cells.uns["rvqa"]


def test_in_place(cells, right, pbmc_tokenizer, tmp_path):
    path = tmp_path / "cells.h5ad"
    cells.write_h5ad(path)
    with pytest.raises(InputError, match=r"is the file to read.*--in-place"):
        encode_files(path, pbmc_tokenizer, path, settings=Settings())
    encode_files(path, pbmc_tokenizer, path, settings=Settings(), in_place=True)
    encode_files(path, pbmc_tokenizer, path, settings=Settings(), in_place=True)
    assert np.array_equal(anndata.read_h5ad(path).obsm["rvqa_codes"], right)
    assert sorted(os.listdir(tmp_path)) == ["cells.h5ad"]


def test_files_of_different_panels(read, pbmc_tokenizer, tmp_path, data_dir):
    names = ["he2020_bone_marrow_421genes", "pbmc68k_reduced_700", "pbmc3k_10x"]
    expected = []
    for name in names:
        adata = read(name)
        rvqa.encode(adata, pbmc_tokenizer)
        expected.append(adata.obsm["rvqa_codes"])
    codes = encoded([data_dir / f"{name}.h5ad" for name in names], pbmc_tokenizer, tmp_path / "a.rvq", cells=1000)
    assert np.array_equal(codes[:], np.concatenate(expected))
    assert codes.obs["file"].value_counts().to_dict() == {
        f"{name}.h5ad": len(each) for name, each in zip(names, expected, strict=True)
    }


def test_a_pattern_is_all_files_that_match(cells, right, pbmc_tokenizer, tmp_path):
    for part in (0, 1):
        cells[part * 1000 : part * 1000 + 1000].write_h5ad(tmp_path / f"part{part}.h5ad")
    codes = encoded(str(tmp_path / "part*.h5ad"), pbmc_tokenizer, tmp_path / "a.rvq")
    assert np.array_equal(codes[:], right)


def test_library_sizes_of_a_column(read, pbmc_tokenizer, tmp_path):
    adata = read("pbmc68k_reduced_700")
    adata.write_h5ad(tmp_path / "cells.h5ad")
    rvqa.encode(adata, pbmc_tokenizer, library_size_key="n_counts_all_genes")
    given = {"library_size_key": "n_counts_all_genes"}
    codes = encoded(tmp_path / "cells.h5ad", pbmc_tokenizer, tmp_path / "a.rvq", **given)
    assert np.array_equal(codes[:], adata.obsm["rvqa_codes"])


# Stopped runs


class Stop(Exception):
    pass


@pytest.mark.parametrize("suffix", [".rvq", ".zarr"])
def test_a_stopped_run_goes_on_to_the_same_bytes(cells, pbmc_tokenizer, tmp_path, monkeypatch, suffix):
    """The run stops at each task in turn: it repeats no finished part, and the output does not depend on the stop."""
    path = tmp_path / "cells.h5ad"
    cells.write_h5ad(path)
    whole = tmp_path / f"whole{suffix}"
    encoded(path, pbmc_tokenizer, whole)
    keep, kept = run.Work.keep, []
    for stop in (1, 3, 6):
        out = tmp_path / f"stopped{stop}{suffix}"

        def fails(work, task, *given, stop=stop, **named):
            if len(kept) == stop:
                raise Stop
            kept.append(task.number)
            keep(work, task, *given, **named)

        kept.clear()
        monkeypatch.setattr(run.Work, "keep", fails)
        with pytest.raises(Stop):
            encoded(path, pbmc_tokenizer, out)
        assert not out.exists()
        first, kept[:] = list(kept), []
        monkeypatch.setattr(
            run.Work, "keep", lambda work, task, *a, **n: (kept.append(task.number), keep(work, task, *a, **n))
        )
        encoded(path, pbmc_tokenizer, out)
        assert sorted(first + kept) == list(range(7))
        assert bytes_of(out) == bytes_of(whole)


def bytes_of(path):
    files = [path] if path.is_file() else sorted(each for each in path.rglob("*") if each.is_file())
    return [(str(each.relative_to(path)), each.read_bytes()) for each in files]


def test_parts_of_another_run_are_refused(cells, pbmc_tokenizer, tmp_path, monkeypatch):
    path, out = tmp_path / "cells.h5ad", tmp_path / "a.rvq"
    cells.write_h5ad(path)
    keep = run.Work.keep

    def fails(work, task, *given, **named):
        keep(work, task, *given, **named)
        raise Stop

    monkeypatch.setattr(run.Work, "keep", fails)
    with pytest.raises(Stop):
        encoded(path, pbmc_tokenizer, out)
    monkeypatch.undo()
    other = pbmc_tokenizer.from_pretrained(saved(pbmc_tokenizer, tmp_path / "tokenizer"))
    other.codebooks_MKD[0, 0, 0] += 1
    with pytest.raises(InputError, match="parts of another run: model is"):
        encoded(path, other, out)
    with pytest.raises(InputError, match=r"settings\.cells is 300 there, 301 here"):
        encoded(path, pbmc_tokenizer, out, cells=301)
    with pytest.raises(InputError, match=r"settings\.obs has 0 entries there, 1 here"):
        encoded(path, pbmc_tokenizer, out, obs=("number",))
    monkeypatch.setenv("RVQA_BACKEND", "reference")
    with pytest.raises(InputError, match=r"compute\.backend is 'cpu' there, 'reference' here"):
        encoded(path, pbmc_tokenizer, out)
    monkeypatch.delenv("RVQA_BACKEND")
    os.utime(path, (1, 1))
    with pytest.raises(InputError, match=r"inputs\[0\]\.modified"):
        encoded(path, pbmc_tokenizer, out)


def saved(tokenizer, path):
    tokenizer.save_pretrained(path)
    return path


def test_damaged_parts_are_made_again(cells, right, pbmc_tokenizer, tmp_path, monkeypatch):
    path, out = tmp_path / "cells.h5ad", tmp_path / "a.rvq"
    cells.write_h5ad(path)
    monkeypatch.setattr(rvq.RvqFile, "table", lambda self: (_ for _ in ()).throw(Stop))
    with pytest.raises(Stop):
        encoded(path, pbmc_tokenizer, out)
    monkeypatch.undo()
    parts = sorted((tmp_path / "a.rvq.parts").glob("part-*"))
    assert len(parts) == 7
    stored = bytearray(parts[2].read_bytes())
    stored[200] ^= 1
    parts[2].write_bytes(stored)
    parts[4].write_bytes(parts[4].read_bytes()[:500])
    assert np.array_equal(encoded(path, pbmc_tokenizer, out)[:], right)


def test_two_runs_at_once_are_refused(cells, pbmc_tokenizer, tmp_path):
    path, out = tmp_path / "cells.h5ad", tmp_path / "a.rvq"
    cells.write_h5ad(path)

    def again(text, *_):
        with pytest.raises(InputError, match="Another run is writing into"):
            encoded(path, pbmc_tokenizer, out)

    encode_files(path, pbmc_tokenizer, out, settings=Settings(cells=1000), progress=again)
    assert len(rvqa.open_codes(out)) == 2_000


def test_a_read_error_in_the_middle(cells, right, pbmc_tokenizer, tmp_path, monkeypatch):
    path, out = tmp_path / "cells.h5ad", tmp_path / "a.rvq"
    cells.write_h5ad(path)
    rows, calls = matrices.Compressed.rows, []

    def fails(self, start, stop):
        calls.append(start)
        if start >= 900 and stop - start > 100:  # not while the run reads its first sample
            raise OSError(5, "Input/output error")
        return rows(self, start, stop)

    monkeypatch.setattr(matrices.Compressed, "rows", fails)
    with pytest.raises(OSError, match="Input/output"):
        encoded(path, pbmc_tokenizer, out)
    monkeypatch.undo()
    assert 1 <= len(list((tmp_path / "a.rvq.parts").glob("part-*"))) <= 3
    assert np.array_equal(encoded(path, pbmc_tokenizer, out)[:], right)


def encode_in_child(tokenizer, path, out, ready):
    tokenizer = CellTokenizer.from_pretrained(tokenizer)
    ready.send("ready")
    encode_files(path, tokenizer, out, settings=Settings(cells=60), threads=2)


@pytest.mark.parametrize("suffix", [".rvq", ".zarr"])
def test_killed_at_any_moment(cells, pbmc_tokenizer, processes, tmp_path, suffix):
    """SIGKILL ends several runs at random moments, then one finishes; no corrupt output ever opens."""
    tokenizer, path = saved(pbmc_tokenizer, tmp_path / "tokenizer"), tmp_path / "cells.h5ad"
    cells.write_h5ad(path)
    whole, out = tmp_path / f"whole{suffix}", tmp_path / f"killed{suffix}"
    encoded(path, pbmc_tokenizer, tmp_path / f"first{suffix}", cells=60)
    start = time.perf_counter()
    encoded(path, pbmc_tokenizer, whole, cells=60)
    took = time.perf_counter() - start
    rng, kills = np.random.default_rng(0), 0
    for share in (0.0, *rng.uniform(0.05, 0.5, 4)):  # the first kill comes at once, however fast the child is
        ready, send = processes.Pipe(duplex=False)
        child = processes.Process(target=encode_in_child, args=(tokenizer, path, out, send))
        child.start()
        send.close()
        assert ready.recv() == "ready"
        time.sleep(share * took)
        child.kill()
        child.join()
        kills += child.exitcode == -signal.SIGKILL
        if out.exists():
            break
    else:
        encoded(path, pbmc_tokenizer, out, cells=60)
    assert kills >= 1
    assert bytes_of(out) == bytes_of(whole)


# Refusals


def spoil(path, change):
    with h5py.File(path, "r+") as file:
        change(file)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: f["X/data"].__setitem__(5_000, -1.0), "negative values"),
        (lambda f: f["X/data"].__setitem__(5_000, np.nan), "NaN or infinite"),
        (lambda f: f["X/data"].__setitem__(5_000, 1.5), "not integers"),
        (lambda f: f["X/indices"].__setitem__(5_000, 999_999), "broken"),
        (lambda f: f["X/indices"].__setitem__(5_000, -3), "broken"),
        (lambda f: f["X/indptr"].__setitem__(1_000, 10**9), "broken"),
        (lambda f: f["X/indptr"].__setitem__(1_000, 3), "broken"),
        (lambda f: f["X"].attrs.__setitem__("shape", (1999, 9015)), "row pointers for 1,999 cells"),
        (lambda f: f["X"].attrs.__setitem__("encoding-type", "coo_matrix"), "coo_matrix"),
        (lambda f: f.__delitem__("X"), "X is missing"),
        (lambda f: f.__delitem__("var"), "no var"),
    ],
)
@pytest.mark.parametrize("diagnosed", [2**30, 0])
def test_refused(cells, pbmc_tokenizer, tmp_path, change, message, diagnosed, monkeypatch):
    """The message names a small file as a whole, and the cells with the fault in a large one."""
    monkeypatch.setattr("rvqa.data.files.source.DIAGNOSED", diagnosed)
    path = tmp_path / "cells.h5ad"
    cells.write_h5ad(path)
    spoil(path, change)
    with pytest.raises(InputError, match=message) as error:
        encoded(path, pbmc_tokenizer, tmp_path / "a.rvq")
    assert str(path) in str(error.value) or path.name in str(error.value)
    assert not (tmp_path / "a.rvq").exists()


def test_outputs_that_cannot_be(cells, pbmc_tokenizer, tmp_path):
    path = tmp_path / "cells.h5ad"
    cells[:100].write_h5ad(path)
    for out, message in (
        ("a.txt", r"not named \.rvq, \.zarr, \.parquet, \.h5ad"),
        ("none/a.rvq", "does not exist"),
    ):
        with pytest.raises(InputError, match=message):
            encode_files(path, pbmc_tokenizer, tmp_path / out, settings=Settings())
    with pytest.raises(InputError, match=r"needs one \.h5ad file"):
        encode_files([path, tmp_path / "b.h5ad"], pbmc_tokenizer, tmp_path / "a.h5ad", settings=Settings())
    with pytest.raises(InputError, match="given twice"):
        encode_files([path, path], pbmc_tokenizer, tmp_path / "a.rvq", settings=Settings())
    with pytest.raises(InputError, match="No file matches"):
        encode_files(str(tmp_path / "none*.h5ad"), pbmc_tokenizer, tmp_path / "a.rvq", settings=Settings())
    (tmp_path / "a.rvq").write_text("mine")
    with pytest.raises(InputError, match=r"exists.*--force"):
        encode_files(path, pbmc_tokenizer, tmp_path / "a.rvq", settings=Settings())
    encode_files(path, pbmc_tokenizer, tmp_path / "a.rvq", settings=Settings(), force=True)
    assert len(rvqa.open_codes(tmp_path / "a.rvq")) == 100
    (tmp_path / "mine.zarr").mkdir()
    (tmp_path / "mine.zarr" / "letter.txt").write_text("mine")
    with pytest.raises(InputError, match="something else"):
        encode_files(path, pbmc_tokenizer, tmp_path / "mine.zarr", settings=Settings(), force=True)


def test_unknown_columns_are_refused_before_any_work(cells, pbmc_tokenizer, tmp_path):
    path = tmp_path / "cells.h5ad"
    cells[:100].write_h5ad(path)
    with pytest.raises(InputError, match=r"no column 'cell_typ'. Nearest: 'cell_type"):
        encoded(path, pbmc_tokenizer, tmp_path / "a.rvq", obs=("cell_typ",))
    assert sorted(os.listdir(tmp_path)) == ["cells.h5ad"]


def test_the_command_line(cells, right, tmp_path, pbmc_tokenizer, rvqa_cli):
    path, tokenizer = tmp_path / "cells.h5ad", saved(pbmc_tokenizer, tmp_path / "tokenizer")
    cells.write_h5ad(path)
    command = ["encode", path, "-m", tokenizer, "-o", tmp_path / "a.rvq"]
    process = [sys.executable, "-m", "rvqa", *command, "--obs", "cell_type", "--json"]
    done = subprocess.run(process, capture_output=True, text=True, check=True)
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert (lines[-1]["cells"], lines[-1]["resumed"], lines[-2]["cells"], lines[-2]["of"]) == (2_000, 0, 2_000, 2_000)
    assert np.array_equal(rvqa.open_codes(tmp_path / "a.rvq")[:], right)
    again = rvqa_cli(*command)
    assert (again.code, again.err.count("\n")) == (2, 1)
    assert "exists" in again.err


def test_encode_with_out(cells, right, pbmc_tokenizer, tmp_path):
    codes = rvqa.encode(cells, pbmc_tokenizer, out=tmp_path / "a.zarr", progress=False)
    assert np.array_equal(codes[:], right)
    with pytest.raises(InputError, match="leave out= away"):
        rvqa.encode(cells, pbmc_tokenizer, out=tmp_path / "b.zarr", recover=True)
    with pytest.raises(InputError, match="pass out="):
        rvqa.encode([tmp_path / "cells.h5ad"], pbmc_tokenizer)
