"""Tasks done by the workers of a Dask cluster, which must see the files and the output's folder under the same paths.

A worker opens the files and the tokenizer once, encodes whole tasks with its threads and sends codes back, five bytes a
cell; only the process that started the run writes parts. A worker that is lost costs the task it was at. One that
computes in another way (backend, instruction set, versions) is rejected: its codes could differ in rare cells.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from rvqa.atlas.encoder import Encoder, Settings, compute_kind, default_threads, encode_tasks
from rvqa.atlas.parts import Task
from rvqa.data.reading import Given
from rvqa.errors import InputError
from rvqa.io.files import whole_directory
from rvqa.tokenizer.model import CellTokenizer


@contextmanager
def local_cluster(scheduler: str | None, threads: int | None) -> Iterator[Any]:
    """Client of a scheduler at an address, or of workers on this machine for "local"; None for None."""
    if scheduler is None:
        yield None
        return
    distributed = _distributed()
    if scheduler != "local":
        with distributed.Client(scheduler) as client:
            yield client
        return
    cores = len(os.sched_getaffinity(0))
    with (
        distributed.LocalCluster(n_workers=max(1, cores // (threads or 1)), threads_per_worker=threads or 1) as workers,
        distributed.Client(workers) as client,
    ):
        yield client


def encode_on(
    cluster: Any,
    encoder: Encoder,
    files: Sequence[Given],
    tasks: Sequence[Task],
    done: Callable[[Task, np.ndarray, pa.Table], None],
    *,
    folder: Path,
    threads: int | None,
) -> None:
    """Have tasks done by a cluster; `done` gets each as it arrives, in any order.

    Parameters
    ----------
    cluster
        `dask.distributed.Client`, or the address of a scheduler.
    encoder, files, tasks
        The run.
    folder
        That of the run's parts; the tokenizer is put there for the workers.
    threads
        Of one task; by default twice those that a worker has.

    Raises
    ------
    rvqa.errors.InputError
        No Dask, an input that is not a file, or a worker of another kind.
    """
    distributed = _distributed()
    if not all(isinstance(each, Path) for each in files):
        raise InputError("A cluster needs paths of files that its workers can open, not an AnnData in memory.")
    shared = folder / "tokenizer"
    with whole_directory(shared, output=False) as whole:
        encoder.tokenizer.save_pretrained(whole)
    client = cluster if isinstance(cluster, distributed.Client) else distributed.Client(cluster)
    try:
        kind = compute_kind(encoder.lanes.device)
        paths = [str(Path(str(each)).resolve()) for each in files]
        device = encoder.lanes.device.type
        told = (encoder.tokenizer.fingerprint(), repr([watch.identity() for watch in encoder.watches if watch]))
        order = (str(shared.resolve()), tuple(paths), told, encoder.settings, device, tuple(kind.items()), threads)
        futures = {client.submit(_encode, *order, task, pure=False, retries=3): task for task in tasks}
        try:
            for future, result in distributed.as_completed(futures, with_results=True):
                codes_NM, table = result
                done(futures[future], codes_NM, table)
                future.release()
        finally:
            client.cancel(list(futures))
    finally:
        if client is not cluster:
            client.close()


def _distributed() -> Any:
    try:
        return import_module("distributed")
    except ImportError as error:
        raise InputError("There is no dask.distributed here. Install it with: pip install 'rvqa[cluster]'.") from error


def _encode(
    tokenizer: str,
    files: tuple[str, ...],
    told: tuple[str, str],
    settings: Settings,
    device: str,
    kind: tuple[tuple[str, Any], ...],
    threads: int | None,
    task: Task,
) -> tuple[np.ndarray, pa.Table]:
    """One task, on a worker."""
    encoder = _opened(tokenizer, files, told, settings, device)
    if (seen := repr([watch.identity() for watch in encoder.watches if watch])) != told[1]:
        raise InputError(f"A worker sees other files than the run: {seen} there, {told[1]} here. Share one folder.")
    here = compute_kind(encoder.lanes.device)
    if here != dict(kind):
        different = {name: (here.get(name), value) for name, value in kind if here.get(name) != value}
        raise InputError(
            f"A worker computes in another way than the run: {different} (worker, run). Give all one installation, "
            "or the same RVQA_BACKEND and RVQA_ISA."
        )
    results: list[tuple[np.ndarray, pa.Table]] = []
    encode_tasks(
        encoder,
        [task],
        lambda task, codes, table: results.append((codes, table)),
        threads=threads or default_threads(_threads()),
    )
    return results[0]


@lru_cache(maxsize=1)
def _opened(tokenizer: str, files: tuple[str, ...], told: tuple[str, str], settings: Settings, device: str) -> Encoder:
    """What a worker encodes with, until the model or a file is another: that is what it is `told`."""
    loaded, paths = CellTokenizer.from_pretrained(tokenizer), [Path(each) for each in files]
    scratch = Path(tokenizer).parent
    return Encoder(paths, loaded, settings, device=device, scratch=scratch, look=False)


def _threads() -> int:
    from distributed import get_worker

    return max(1, get_worker().state.nthreads)
