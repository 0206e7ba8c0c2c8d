"""Tasks on real Dask workers in separate processes."""

import os
import signal

import numpy as np
import pytest

import rvqa
from rvqa.atlas.encoder import Settings
from rvqa.atlas.run import encode_files
from rvqa.errors import InputError
from tests.atlas.test_run import bytes_of

distributed = pytest.importorskip("distributed")


@pytest.fixture(scope="module")
def client():
    with (
        distributed.LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as cluster,
        distributed.Client(cluster) as connected,
    ):
        yield connected


@pytest.fixture
def path(cells, tmp_path):
    cells.write_h5ad(tmp_path / "cells.h5ad")
    return tmp_path / "cells.h5ad"


@pytest.mark.parametrize("suffix", [".rvq", ".zarr"])
def test_the_bytes_are_those_of_one_process(client, path, right, pbmc_tokenizer, tmp_path, suffix):
    settings = Settings(cells=150, obs=("number",))
    encode_files(path, pbmc_tokenizer, tmp_path / f"one{suffix}", settings=settings)
    encode_files(path, pbmc_tokenizer, tmp_path / f"many{suffix}", settings=settings, cluster=client)
    assert np.array_equal(rvqa.open_codes(tmp_path / f"many{suffix}")[:], right)
    assert bytes_of(tmp_path / f"one{suffix}") == bytes_of(tmp_path / f"many{suffix}")


def test_a_lost_worker_costs_its_tasks_only(client, path, right, pbmc_tokenizer, tmp_path):
    killed = []

    def kill_one(done, cells):
        if done > 200 and not killed:
            killed.append(next(iter(client.run(os.getpid).values())))
            os.kill(killed[0], signal.SIGKILL)

    encode_files(
        path, pbmc_tokenizer, tmp_path / "a.rvq", settings=Settings(cells=60), cluster=client, progress=kill_one
    )
    assert killed
    assert np.array_equal(rvqa.open_codes(tmp_path / "a.rvq")[:], right)


def test_a_worker_of_another_kind_is_refused(client, path, pbmc_tokenizer, tmp_path):
    client.wait_for_workers(2)
    client.run(lambda: __import__("os").environ.update(RVQA_BACKEND="reference"))
    try:
        with pytest.raises(InputError, match=r"computes in another way than the run.*reference"):
            encode_files(path, pbmc_tokenizer, tmp_path / "a.rvq", settings=Settings(cells=60), cluster=client)
    finally:
        client.run(lambda: __import__("os").environ.pop("RVQA_BACKEND", None))  # a restarted worker has none
    assert not (tmp_path / "a.rvq").exists()


def test_bad_cells_are_refused_as_they_are_alone(client, path, pbmc_tokenizer, tmp_path):
    import h5py

    with h5py.File(path, "r+") as file:
        file["X/data"][5_000] = 0.5
    with pytest.raises(InputError, match="not integers"):
        encode_files(path, pbmc_tokenizer, tmp_path / "a.rvq", settings=Settings(), cluster=client)


def test_cells_in_memory_are_refused(client, cells, pbmc_tokenizer, tmp_path):
    with pytest.raises(InputError, match="needs paths"):
        encode_files(cells, pbmc_tokenizer, tmp_path / "a.rvq", settings=Settings(), cluster=client)
