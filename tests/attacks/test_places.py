"""rvqa removes only its own files, notices inputs that change, and gives files the mode of the umask."""

import fcntl
import os
import stat
import subprocess
import sys
from pathlib import Path

import anndata
import h5py
import pytest
import torch

import rvqa
from rvqa.atlas import encoder, run
from rvqa.atlas.encoder import Settings
from rvqa.atlas.run import encode_files
from rvqa.data.files import watch
from rvqa.data.reading import Reading
from rvqa.errors import InputError
from rvqa.io.files import require_folder, whole_directory, whole_file
from rvqa.io.temporaries import folder_beside
from rvqa.training.tokenizer.checkpoint import CheckpointFolder, State


@pytest.fixture(scope="module")
def cells(shipped):
    """40 real cells."""
    return next(iter(shipped.tests.values()))[:40].copy()


@pytest.fixture
def path(cells, tmp_path):
    cells.write_h5ad(tmp_path / "cells.h5ad")
    return tmp_path / "cells.h5ad"


def state(folder):
    return {
        each.relative_to(folder).as_posix(): os.readlink(each)
        if each.is_symlink()
        else each.is_dir() or each.read_bytes()
        for each in sorted(folder.rglob("*"))
    }


def encode(path, model, out, **options):
    settings = Settings(Reading(library_size_key="depth"), cells=options.pop("cells", 10))
    return encode_files(path, model.cell_tokenizer, out, settings=settings, threads=1, **options)


# Folders of parts


def mine(folder):
    folder.mkdir()
    (folder / "letter.txt").write_text("mine")


def named_alike(folder):
    folder.mkdir()
    (folder / "part-00000000.rvq").write_text("mine")


def letter_among_parts(folder):
    folder.mkdir()
    (folder / "lock").write_bytes(b"parts of a run of rvqa\n")
    (folder / "rows-a").mkdir()
    (folder / "rows-a" / "letter.txt").write_text("mine")


def a_link(folder):
    mine(folder.with_name("elsewhere"))
    folder.symlink_to("elsewhere")


def a_link_inside(folder):
    mine(folder.with_name("elsewhere"))
    folder.mkdir()
    (folder / "lock").write_bytes(b"parts of a run of rvqa\n")
    (folder / "rows-a").symlink_to("../elsewhere")


def a_file(folder):
    folder.write_text("mine")


@pytest.mark.parametrize("spoil", [mine, named_alike, letter_among_parts, a_link, a_link_inside, a_file])
@pytest.mark.parametrize("given", ["cells.h5ad", "none.h5ad"])
def test_parts_that_are_not_ours_are_refused_and_stay(spoil, given, path, model, tmp_path, rvqa_cli):
    spoil(tmp_path / "a.rvq.parts")
    before = state(tmp_path)
    done = rvqa_cli("encode", tmp_path / given, "-m", model.source, "-o", tmp_path / "a.rvq")
    assert (done.code, done.err.count("\n")) == (2, 1), done.err
    assert "a.rvq.parts" in done.err or given == "none.h5ad"
    assert state(tmp_path) == before


def test_a_file_that_comes_while_a_run_is_at_it_stays(path, model, tmp_path):
    def letter(*_):
        (tmp_path / "a.rvq.parts" / "letter.txt").write_text("mine")

    encode(path, model, tmp_path / "a.rvq", progress=letter)
    assert list((tmp_path / "a.rvq.parts").rglob("*")) == [tmp_path / "a.rvq.parts" / "letter.txt"]


# Other folders that are replaced


@pytest.mark.parametrize("place", ["letter.txt", "obs/letter.txt", "codes/letter.txt", "notes/0"])
def test_a_store_with_more_in_it_is_not_replaced(place, path, model, tmp_path):
    out = tmp_path / "a.zarr"
    encode(path, model, out)
    encode(path, model, out, force=True)
    (out / place).parent.mkdir(exist_ok=True)
    (out / place).write_text("mine")
    before = state(tmp_path)
    with pytest.raises(InputError, match=f"{place} is not part of the zarr store"):
        encode(path, model, out, force=True)
    assert state(tmp_path) == before


def test_every_store_of_zarr_is_known(cells, path, model, tmp_path):
    for version in (2, 3):
        with anndata.settings.override(zarr_write_format=version):
            cells.write_zarr(tmp_path / f"{version}.zarr")
        encode(path, model, tmp_path / f"{version}.zarr", force=True)


@pytest.mark.parametrize("place", ["notes.txt", "cell_tokenizer/notes.txt", "runs/model.safetensors"])
def test_a_model_with_more_in_it_is_not_replaced(place, model, tmp_path):
    out = tmp_path / "model"
    model.save_pretrained(out)
    model.save_pretrained(out, force=True)
    (out / place).parent.mkdir(exist_ok=True)
    (out / place).write_text("mine")
    before = state(tmp_path)
    with pytest.raises(InputError, match=f"{place.split('/')[0]}.* is not part of the model"):
        model.save_pretrained(out, force=True)
    assert state(tmp_path) == before


def test_tensors_of_others_in_a_checkpoint_stay(tmp_path):
    def written(step):
        CheckpointFolder(tmp_path, {}).write(State({"step": step}, {"a": torch.ones(3)}))

    for step in (1, 2):
        written(step)
    (tmp_path / "notes.txt").write_text("mine")
    assert sorted(os.listdir(tmp_path)) == ["checkpoint.json", "notes.txt", "step-2.safetensors"]
    (tmp_path / "step-7.safetensors").write_text("mine")
    before = state(tmp_path)
    with pytest.raises(InputError, match=r"holds step-7\.safetensors, which no fit wrote"):
        written(3)
    assert state(tmp_path) == before


# What killed runs leave behind


def left_behind(place):
    """Start an output in a process and kill it."""
    told = (
        "import os, sys; from pathlib import Path; from rvqa.io.temporaries import folder_beside\n"
        "with folder_beside(Path(sys.argv[1])) as folder:\n"
        "    (folder / 'half').write_text('half'); os.kill(os.getpid(), 9)"
    )
    assert subprocess.run([sys.executable, "-c", told, str(place)], check=False).returncode == -9


def test_the_next_start_removes_what_dead_processes_left_and_nothing_else(tmp_path):
    left_behind(tmp_path / "a.h5ad")
    (left,) = tmp_path.iterdir()
    (tmp_path / ".a.h5ad-rvqa-notes").mkdir()
    (tmp_path / ".b-rvqa-01234567").write_text("a file")
    (tmp_path / ".c-rvqa-01234567").symlink_to(tmp_path / ".a.h5ad-rvqa-notes")
    (tmp_path / ".d-rvqa-89abcdef").mkdir()  # killed before it had its lock
    with folder_beside(tmp_path / "live") as live:
        require_folder(tmp_path)
        assert live.is_dir()
        told = (
            "import sys, pathlib; from rvqa.io.temporaries import remove_dead; remove_dead(pathlib.Path(sys.argv[1]))"
        )
        subprocess.run([sys.executable, "-c", told, str(tmp_path)], check=True)  # also visible to other processes
        assert live.is_dir()
    assert not left.exists()
    assert sorted(os.listdir(tmp_path)) == [".a.h5ad-rvqa-notes", ".b-rvqa-01234567", ".c-rvqa-01234567"]


def test_an_output_that_was_set_aside_when_killed_is_put_back(tmp_path, monkeypatch):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "earlier").write_text("mine")
    left_behind(tmp_path / "model")
    (left,) = (each for each in tmp_path.iterdir() if each.name != "model")
    (left / "earlier").mkdir()
    (tmp_path / "model").replace(left / "earlier" / "model")
    require_folder(tmp_path)
    assert state(tmp_path) == {"model": True, "model/earlier": b"mine"}


def test_a_temporary_that_another_took_for_dead_is_made_again(tmp_path, monkeypatch):
    """Another process locks it after it is made and before its maker locks it."""
    lock, others = fcntl.flock, []

    def another_first(file, how):
        if not others:
            others.append(file)
            (taken,) = tmp_path.iterdir()
            (taken / "lock").unlink()
            taken.rmdir()
        lock(file, how)

    monkeypatch.setattr(fcntl, "flock", another_first)
    with whole_file(tmp_path / "a.txt") as scratch:
        scratch.write_text("whole")
    assert state(tmp_path) == {"a.txt": b"whole"}


def test_links_to_outputs_stay_links(tmp_path):
    (tmp_path / "real").mkdir()
    for name in ("a.txt", "b"):
        (tmp_path / name).symlink_to(tmp_path / "real" / name)
    with whole_file(tmp_path / "a.txt") as scratch:
        scratch.write_text("whole")
    with whole_directory(tmp_path / "b") as scratch:
        scratch.mkdir()
    assert sorted(os.listdir(tmp_path / "real")) == ["a.txt", "b"]
    assert (tmp_path / "a.txt").is_symlink()
    assert (tmp_path / "b").is_symlink()


# Modes


@pytest.mark.parametrize("mask", [0o022, 0o027, 0o002, 0o077])
def test_everything_has_the_mode_of_the_umask(mask, path, cells, model, tmp_path):
    cells.write_zarr(tmp_path / "cells.zarr")
    for each in (path, *(tmp_path / "cells.zarr").rglob("*")):
        each.chmod(0o755 if each.is_dir() else 0o444)
    made = tmp_path / "made"
    before = os.umask(mask)
    try:
        made.mkdir()
        model.save_pretrained(made / "model")
        for suffix in ("rvq", "zarr", "parquet", "h5ad"):
            encode(path, model, made / f"a.{suffix}")
        rvqa.annotate(tmp_path / "cells.zarr", model, out=made / "copy.zarr", progress=False, library_size_key="depth")
        CheckpointFolder(made / "state", {}).write(State({"step": 1}, {"a": torch.ones(3)}))
        with whole_file(made / "report.html") as scratch:
            scratch.write_text("")
    finally:
        os.umask(before)
    for each in made.rglob("*"):
        assert stat.S_IMODE(each.stat().st_mode) == (0o777 if each.is_dir() else 0o666) & ~mask, each


# Inputs that change


def overwrite(path):
    """Write into the same file without h5py, which has it open."""
    with path.open("r+b") as file:
        file.write(b"\x89")


def replace(path):
    other = path.with_name("other.h5ad")
    other.write_bytes(path.read_bytes())
    other.replace(path)


def cut(path):
    os.truncate(path, path.stat().st_size // 2)


@pytest.mark.parametrize("change", [overwrite, replace, cut, Path.unlink])
@pytest.mark.parametrize("suffix", [".rvq", ".zarr", ".parquet", ".h5ad"])
@pytest.mark.parametrize("size", [10, 1000])
def test_an_input_that_changes_is_refused(change, suffix, size, path, model, tmp_path):
    """The input changes in the middle of a run of several tasks, or of one."""
    out = tmp_path / f"a{suffix}"
    changed = []

    def progress(done, cells):
        if not changed and done >= min(size, 20):
            changed.append(change(path))

    with pytest.raises(InputError, match=f"^{path} was changed or replaced while it was read"):
        encode(path, model, out, cells=size, progress=progress)
    assert {each.name for each in tmp_path.iterdir()} <= {"cells.h5ad"}
    if path.exists() and change is not cut:
        encode(path, model, out, cells=size)


def test_an_input_that_changes_in_place_is_refused(path, model, tmp_path):
    with pytest.raises(InputError, match="was changed"):
        encode(path, model, path, in_place=True, progress=lambda done, cells: done == 20 and overwrite(path))
    with h5py.File(path) as file:
        assert "rvqa_codes" not in file["obsm"]


def test_rows_of_an_input_that_changed_are_not_gone_on_with(cells, path, model, tmp_path, monkeypatch):
    """The run stops after it has transposed a matrix and before it writes the manifest."""
    import scipy.sparse as sp

    cells = cells.copy()
    cells.X = sp.csc_matrix(cells.X)
    cells.write_h5ad(path)
    monkeypatch.setattr(run.Encoder, "manifest", lambda self: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        encode(path, model, tmp_path / "a.rvq")
    monkeypatch.undo()
    overwrite(path)
    with pytest.raises(InputError, match=r"parts of another run: inputs\[0\]\.modified"):
        encode(path, model, tmp_path / "a.rvq")


@pytest.mark.parametrize("kind", ["h5ad", "zarr"])
@pytest.mark.parametrize("out", ["a.h5ad", "a.zarr"])
def test_annotate_refuses_an_input_that_changes(kind, out, cells, path, model, tmp_path, monkeypatch):
    if kind == "zarr":
        cells.write_zarr(tmp_path / "cells.zarr")
        path = tmp_path / "cells.zarr"
    elif out == "a.zarr":
        pytest.skip("an .h5ad file is copied to .h5ad")
    encode_tasks = encoder.encode_tasks

    def change(*given, **named):
        encode_tasks(*given, **named)
        chunk = path if path.is_file() else max(path.glob("X/data/**/0"))
        chunk.write_bytes(chunk.read_bytes())

    monkeypatch.setattr(encoder, "encode_tasks", change)
    with pytest.raises(InputError, match="was changed or replaced"):
        rvqa.annotate(path, model, out=tmp_path / out, progress=False, library_size_key="depth")
    assert not (tmp_path / out).exists()
    assert not [each for each in os.listdir(tmp_path) if "-rvqa-" in each]


def test_perturb_and_fit_refuse_cells_that_change_while_they_are_read(path, monkeypatch):
    from rvqa.data.files import sources

    read = sources.Source.in_memory
    monkeypatch.setattr(sources.Source, "in_memory", lambda *given, **named: (read(*given, **named), replace(path))[0])
    with pytest.raises(InputError, match="was changed or replaced"):
        sources.read_cells(path)


def test_a_folder_is_watched_by_the_files_that_are_read(tmp_path):
    for name in ("matrix.mtx", "features.tsv", "barcodes.tsv"):
        (tmp_path / name).write_text(name)
    seen = watch.Watch(tmp_path)
    (tmp_path / "notes").write_text("")
    seen.require_unchanged()
    (tmp_path / "barcodes.tsv").write_text("another")
    with pytest.raises(watch.InputChanged, match="was changed"):
        seen.require_unchanged()


# Standard output


def test_a_full_standard_output(path, model_path, tmp_path):
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full here")
    command = [sys.executable, "-m", "rvqa", "encode", path, "-m", model_path, "-o", tmp_path / "a.rvq", "--quiet"]
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 2
    assert (
        done.stderr
        == "rvqa: What is printed cannot be written: the disk is full. Send standard output to another place.\n"
    )
