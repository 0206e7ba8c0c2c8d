"""Encodes the cells of files: settings, tasks of always the same rows, and the codes of each.

Within a task, threads take blocks of rows from start to end: each reads, decompresses, checks, projects and quantizes
its own, so that reading, arithmetic and writing overlap without one waiting for another.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import torch

import rvqa
from rvqa.atlas import rvq
from rvqa.atlas.device import Lanes
from rvqa.atlas.parts import Task
from rvqa.data.alignment import align, match_columns, refuse_transposed
from rvqa.data.columns import total_counts
from rvqa.data.counts import read_counts
from rvqa.data.files.matrices import Rows, as_csr
from rvqa.data.files.source import Source, anndata_of
from rvqa.data.files.sources import open_source, read_cells
from rvqa.data.files.watch import Watch, watched
from rvqa.data.reading import Given, Reading
from rvqa.errors import InputError, about
from rvqa.io.files import warn_of_repeated
from rvqa.kernels import ops, registry
from rvqa.tokenizer.model import CellTokenizer

CELLS = 65_536
"""Cells of a task."""


@dataclass(frozen=True)
class Settings:
    """What decides the codes of a file, apart from the model; part of the manifest."""

    reading: Reading = field(default_factory=Reading)
    obs: tuple[str, ...] = ()
    cells: int = CELLS


def default_threads(cores: int | None = None) -> int:
    """Two threads a core (of PyTorch's, by default): while some wait for a disk, others compute."""
    return 2 * (cores or torch.get_num_threads())


def compute_kind(device: torch.device) -> dict[str, Any]:
    """What computes here: codes of two kinds do not go into one output."""
    backend = registry.select(device)
    kind = {"backend": backend, "rvqa": rvqa.__version__, "torch": torch.__version__}
    if device.type == "cuda":
        kind["gpu"] = torch.cuda.get_device_name(device)
    return kind | ({"isa": registry.function("cpu", "isa")()} if backend == "cpu" else {})


class Encoder:
    """Open sources with all that is needed to encode their cells."""

    def __init__(
        self,
        given: Sequence[Given],
        tokenizer: CellTokenizer,
        settings: Settings,
        *,
        device: str | torch.device = "cpu",
        scratch: Path,
        say: Callable[[str], None] = lambda text: None,
        look: bool = True,
        watches: Sequence[Watch | None] | None = None,
    ) -> None:
        """`look` at every source as a whole, before any work; see `Source.require_counts`. `watches`: one a source."""
        self.tokenizer, self.settings, self.lanes = tokenizer, settings, Lanes(device)
        there = tokenizer if self.lanes.device.type == "cpu" else deepcopy(tokenizer).to(self.lanes.device)
        self.watches = watches or watched(given)
        self.sources = [open_source(each, layer=settings.reading.layer, scratch=scratch, say=say) for each in given]
        self.carried = rvq.stored_names(settings.obs, tokenizer.config.levels)
        self._ready: dict[int, _Panel] = {}
        self.coverage = []
        for at, source in enumerate(self.sources):
            if look:
                source.require_counts()
                if source.n_cells <= CELLS:
                    warn_of_repeated(source.path or source.name, pd.Index(source.column(None, 0, source.n_cells)))
            with about(source.name):
                self._ready[at] = _Panel(source, there, given=settings.reading.library_size_key is not None)
                self.coverage.append(self._ready[at].alignment.report() | {"counts_from": source.place})
                for key in (*settings.obs, *filter(None, [settings.reading.library_size_key])):
                    source.column(key, 0, min(1, source.n_cells))

    def require_unchanged(self, source: int | None = None) -> None:
        """Make sure that a file is still that which was opened, soon; without a number all files, for certain.

        Raises
        ------
        rvqa.data.files.watch.InputChanged
            It is another.
        """
        for watch in self.watches if source is None else [self.watches[source]]:
            if watch is not None:
                watch.require_unchanged(soon=source is not None)

    def manifest(self) -> dict[str, Any]:
        """Everything the codes depend on."""
        config = self.tokenizer.config
        return {
            "cells": sum(source.n_cells for source in self.sources),
            "levels": config.levels,
            "entries": config.entries,
            "model": self.tokenizer.fingerprint(),
            "settings": {
                "library_size_key": self.settings.reading.library_size_key,
                "obs": list(self.carried.values()),
                "cells": self.settings.cells,
            },
            "compute": compute_kind(self.lanes.device),
            "inputs": [
                source.identity | {"coverage": report}
                for source, report in zip(self.sources, self.coverage, strict=True)
            ],
        }

    def tasks(self) -> list[Task]:
        """All tasks, in order."""
        tasks: list[Task] = []
        for at, source in enumerate(self.sources):
            for start in range(0, source.n_cells, self.settings.cells):
                tasks.append(Task(len(tasks), at, start, min(start + self.settings.cells, source.n_cells)))
        return tasks

    def blocks(self, task: Task) -> Iterator[tuple[int, int]]:
        """Rows of the blocks of a task."""
        with about(self.sources[task.source].name):
            yield from self.sources[task.source].matrix.blocks(task.start, task.stop)

    def encode(self, task: Task, start: int, stop: int) -> np.ndarray:
        """Codes uint8 [stop - start, M] of some cells of the source of a task."""
        source, ready = self.sources[task.source], self._ready[task.source]
        with about(source.name):
            rows = source.matrix.rows(start, stop)
            with self.lanes.mine():
                parts = self.lanes.bring(rows)
                total_N, wrong = ops.csr_totals(*parts, columns=source.matrix.shape[1], known=ready.known)
                if wrong or not bool((total_N > 0).all()):
                    self._refuse(source, rows, start, stop)
                depth_N = total_N / ready.panel
                if (key := self.settings.reading.library_size_key) is not None:
                    given = self._given_depth(source, key, total_N.cpu().numpy(), start, stop)
                    depth_N = torch.from_numpy(given).to(self.lanes.device)
                return ready.encoder.codes(*parts, depth_N)

    def table(self, task: Task) -> pa.Table:
        """Names and carried columns of the cells of a task."""
        source = self.sources[task.source]
        with about(source.name):
            columns = {"cell": source.column(None, task.start, task.stop)}
            for key, name in self.carried.items():
                columns[name] = _storable(source.column(key, task.start, task.stop))
        kinds = {name: pa.string() if values.dtype.kind == "O" else None for name, values in columns.items()}
        return pa.table({name: pa.array(values, kinds[name]) for name, values in columns.items()})

    def _given_depth(self, source: Source, key: str, stored_N: np.ndarray, start: int, stop: int) -> np.ndarray:
        obs = pd.DataFrame({key: source.column(key, start, stop)}, index=source.column(None, start, stop))
        return total_counts(anndata_of(obs=obs), key, stored_N)

    def _refuse(self, source: Source, rows: Rows, start: int, stop: int) -> None:
        """Say what is wrong with the counts of a block, of the whole file where that is small."""
        try:
            if source.path is not None and source.small:
                own = self.settings.reading.of(source.path)
                whole = read_cells(source.path, layer=own.layer, whole=True)
                try:
                    cells = read_counts(whole, own)
                except InputError:
                    refuse_transposed(whole, self.tokenizer.axis)
                    raise
                cells.depth(self.tokenizer.shares)
            with about(f"cells {start:,} to {stop:,}"):
                counts = as_csr(rows, source.matrix.shape[1])
                block = anndata_of(X=counts, obs=pd.DataFrame(index=source.column(None, start, stop)), var=source.var)
                read_counts(block, part=True).depth(self.tokenizer.shares)
        except InputError as error:
            if source.unfiltered and "no counts" in str(error):
                raise InputError(
                    f"{error} This looks like the matrix of all barcodes, most of them of no cell: give that of the "
                    "cells, filtered_feature_bc_matrix."
                ) from error
            raise
        raise RuntimeError("the kernels reject counts that the checks accept; please report this as a bug of rvqa")


class _Panel:
    """How the genes of a source meet the tokenizer."""

    def __init__(self, source: Source, tokenizer: CellTokenizer, *, given: bool) -> None:
        self.alignment = align(source.var, tokenizer.axis, left_out=source.left_out)
        column_map = match_columns(source.var, tokenizer.shares.axis)
        self.encoder = tokenizer.encoder(self.alignment)
        self.known = None if given else torch.from_numpy(column_map >= 0).to(tokenizer.codebooks_MKD.device)
        self.panel = tokenizer.shares.panel(column_map)


def _storable(values: np.ndarray) -> np.ndarray:
    """Column of one type in every part, whatever the width in a file."""
    wide = {"i": np.int64, "u": np.int64, "f": np.float64}.get(values.dtype.kind)
    return values if wide is None else values.astype(wide)


# The loop


def encode_tasks(
    encoder: Encoder, tasks: Sequence[Task], done: Callable[[Task, np.ndarray, pa.Table], None], *, threads: int
) -> None:
    """Encode tasks on threads; `done` gets each as it is finished, in order, on the caller's thread."""
    before = torch.get_num_threads()

    def alone() -> None:
        torch.set_num_threads(1)

    waiting: deque[tuple[Task, list[Future[np.ndarray]], Future[pa.Table]]] = deque()

    def finish() -> None:
        task, blocks, table = waiting.popleft()
        codes_NM, table = np.concatenate([block.result() for block in blocks]), table.result()
        encoder.require_unchanged(task.source)  # before anything is kept
        done(task, codes_NM, table)

    pool = ThreadPoolExecutor(threads, thread_name_prefix="rvqa-encode", initializer=alone)
    try:
        running: deque[Future[np.ndarray]] = deque()
        for task in tasks:
            blocks: list[Future[np.ndarray]] = []
            for start, stop in encoder.blocks(task):
                while len(running) > threads:  # one more than there are threads: none waits, and memory is bounded
                    running.popleft().result()
                blocks.append(pool.submit(encoder.encode, task, start, stop))
                running.append(blocks[-1])
            waiting.append((task, blocks, pool.submit(encoder.table, task)))
            while len(waiting) > 1 and all(block.done() for block in waiting[0][1]):
                finish()
        while waiting:
            finish()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
        torch.set_num_threads(before)
