"""A full disk, and files compressed by filters that HDF5 does not include."""

import resource
import signal
import subprocess

import h5py
import numpy as np
import pytest

import rvqa
from rvqa.atlas.encoder import Settings
from rvqa.atlas.run import encode_files
from rvqa.data.files import hdf5
from rvqa.errors import InputError
from rvqa.tokenizer.model import CellTokenizer
from tests.atlas.conftest import rewrite
from tests.atlas.test_run import bytes_of, saved


def encode_limited(tokenizer, path, out, size, said):
    """Encode under a limit of `size` on every file, and send the message."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
    try:
        encode_files(path, CellTokenizer.from_pretrained(tokenizer), out, settings=Settings(cells=200), threads=2)
    except InputError as error:
        said.send(f"refused: {error}")
    else:
        said.send("done")


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 1 MB, if this user may make one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "rvqa-test", folder], capture_output=True)
    if made.returncode:
        pytest.skip("no file system may be mounted here")
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)


@pytest.mark.parametrize("suffix", [".rvq", ".zarr", ".parquet"])
def test_a_full_disk(cells, right, pbmc_tokenizer, tmp_path, small_disk, suffix):
    """The run reports it and keeps its parts; once there is room, it continues to the same bytes."""
    path, out = tmp_path / "cells.h5ad", small_disk / f"a{suffix}"
    cells.write_h5ad(path)
    encode_files(path, pbmc_tokenizer, tmp_path / f"whole{suffix}", settings=Settings(cells=200))
    room = small_disk / "filler"
    room.write_bytes(bytes(2**20 - 60_000))
    with pytest.raises(InputError, match="disk is full"):
        encode_files(path, pbmc_tokenizer, out, settings=Settings(cells=200))
    assert not out.exists()
    room.unlink()
    facts = encode_files(path, pbmc_tokenizer, out, settings=Settings(cells=200))
    assert facts["resumed"] > 0
    assert bytes_of(out) == bytes_of(tmp_path / f"whole{suffix}")


@pytest.mark.parametrize("suffix", [".rvq", ".parquet"])
def test_an_output_that_may_not_be_that_large(cells, right, pbmc_tokenizer, processes, tmp_path, suffix):
    """The parts fit but the whole does not: no half-written file stays, and little work is left to do."""
    path, out = tmp_path / "cells.h5ad", tmp_path / f"a{suffix}"
    cells.write_h5ad(path)
    tokenizer = saved(pbmc_tokenizer, tmp_path / "tokenizer")
    said, send = processes.Pipe(duplex=False)
    child = processes.Process(target=encode_limited, args=(tokenizer, path, out, 20_000, send))
    child.start()
    send.close()
    assert said.recv().startswith("refused")
    child.join()
    assert child.exitcode == 0
    assert not out.exists()
    encode_files(path, pbmc_tokenizer, out, settings=Settings(cells=200))
    assert np.array_equal(rvqa.open_codes(out)[:], right)


def test_zstd(cells, right, pbmc_tokenizer, tmp_path):
    hdf5plugin = pytest.importorskip("hdf5plugin")
    path = tmp_path / "cells.h5ad"
    cells.write_h5ad(path)
    rewrite(path, chunks=(10_000,), **hdf5plugin.Zstd())
    encode_files(path, pbmc_tokenizer, tmp_path / "a.rvq", settings=Settings())
    assert np.array_equal(rvqa.open_codes(tmp_path / "a.rvq")[:], right)


def test_a_filter_that_is_not_here_is_named(monkeypatch, tmp_path):
    """The filter is Zstandard, and its package is not installed."""
    monkeypatch.setattr(h5py.h5z, "filter_avail", lambda number: number != 32_015)
    with pytest.raises(InputError, match=r"filter 32015.*hdf5plugin"):
        hdf5.require_filters([2, 32_015])
    hdf5.require_filters([1, 2])
