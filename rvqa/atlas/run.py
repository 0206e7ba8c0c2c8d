"""Codes of files of any size: read, encode, keep each finished part, put the parts together.

Cells are cut into tasks of always the same rows, and what a task gives is kept as one `.rvq` file in a folder beside
the output. A run that was stopped finds them there and goes on with the rest; the output is made of all parts when none
is missing, so it is the same bytes however often a run was stopped, and on however many machines it ran.
"""

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from rvqa.atlas import rvq
from rvqa.atlas.encoder import Encoder, Settings, default_threads, encode_tasks
from rvqa.atlas.parts import Task, Work
from rvqa.data.files.given import expand
from rvqa.data.files.watch import InputChanged, watched
from rvqa.data.reading import Given
from rvqa.errors import InputError
from rvqa.tokenizer.model import CellTokenizer


def encode_files(
    given: Given | Sequence[Given],
    tokenizer: CellTokenizer,
    out: str | Path,
    *,
    settings: Settings,
    threads: int | None = None,
    cluster: Any = None,
    force: bool = False,
    in_place: bool = False,
    append: bool = False,
    device: str = "cpu",
    progress: Callable[[int, int], None] = lambda done, cells: None,
    say: Callable[[str], None] = lambda text: None,
    model: str = "",
) -> dict[str, Any]:
    """Encode files of any size into one output; see `rvqa.encode`, which says more.

    Parameters
    ----------
    given
        Files, patterns or AnnData objects.
    tokenizer
        Makes the codes.
    out
        `.rvq`, `.zarr`, `.parquet`, or `.h5ad` for a copy of one `.h5ad` file.
    settings
        What decides the codes.
    threads
        Threads that read and encode; by default `default_threads()`.
    cluster
        `dask.distributed.Client`, or the address of a scheduler, to have the tasks done by its workers.
    force, in_place
        Replace an output that exists; write codes into the input itself, by copy and rename.
    append
        Add the cells to those of an output that exists, made with the same model and settings; the result is that of
        one run over all files.
    device
        "cpu" or "cuda".
    progress
        Called as `progress(done, total)` from time to time, in cells.
    say
        Told what happens next.
    model
        Where the tokenizer is from, for an `.h5ad` file's `uns`.

    Returns
    -------
    dict
        `cells` of the files given, `seconds`, `cells_per_second` (of those encoded now), `resumed` (cells found done),
        `coverage` by file.
    """
    from rvqa.atlas.append import Earlier
    from rvqa.atlas.outputs import WRITERS, require_output

    started = time.perf_counter()
    files = expand(given)
    if append and (force or in_place or Path(out).suffix == ".h5ad"):
        raise InputError("append (--append) is for .rvq, .zarr and .parquet, without force and in_place.")
    target = require_output(out, files, force=force or append, in_place=in_place)
    earlier = Earlier(target) if append and target.exists() else None
    folder = target.with_name(f"{target.name}.parts")
    work, finished, short = Work(folder), False, False
    encoder = None
    try:
        watches = watched(files)
        work.begin([watch.identity() if watch else {} for watch in watches])
        encoder = Encoder(files, tokenizer, settings, device=device, scratch=folder, say=say, watches=watches)
        for key, name in encoder.carried.items():
            if key != name:
                say(f"obs[{key!r}] is carried along as {name!r}: the output has a column {key!r} of its own")
        manifest = encoder.manifest()
        whole = manifest if earlier is None else earlier.joined(manifest)
        work.bind(manifest | ({} if earlier is None else {"appended_to": earlier.fingerprint()}))
        tasks = encoder.tasks()
        short = len(tasks) == 1 and earlier is None  # done again as fast as gone on with
        left = work.missing(tasks, tokenizer.config)
        cells = manifest["cells"]
        todo = sum(task.stop - task.start for task in left)
        done_cells = cells - todo
        if done_cells:
            say(f"{done_cells:,} of {cells:,} cells are done; going on")
        progress(done_cells, cells)

        def keep(task: Task, codes_NM: np.ndarray, table: pa.Table) -> None:
            nonlocal done_cells
            work.keep(task, codes_NM, table, entries=tokenizer.config.entries)
            done_cells += len(codes_NM)
            progress(done_cells, cells)

        if cluster is None:
            encode_tasks(encoder, left, keep, threads=threads or default_threads())
        elif left:
            from rvqa.atlas.cluster import encode_on

            encode_on(cluster, encoder, files, left, keep, folder=folder, threads=threads)
        parts = [*(() if earlier is None else earlier.parts()), *(rvq.RvqFile.open(work.part(task)) for task in tasks)]
        encoded = time.perf_counter() - started
        WRITERS[target.suffix](target, parts, encoder, whole, model)
        finished = True
    except Exception as error:
        finished = True  # where an input has changed, what is kept is of no use
        if encoder is not None and not isinstance(error, InputChanged):
            encoder.require_unchanged()
        finished = isinstance(error, InputChanged)
        raise
    finally:
        work.close(finished=finished or short)
    return {
        "output": str(target),
        "cells": cells,
        "resumed": cells - todo,
        "seconds": time.perf_counter() - started,
        "cells_per_second": todo / encoded,
        "coverage": {source.name: report for source, report in zip(encoder.sources, encoder.coverage, strict=True)},
    }
