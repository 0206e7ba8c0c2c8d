"""`rvqa fit-tokenizer`: from files of cells to a tokenizer's directory, with a record of the fit.

The directory holds what `CellTokenizer.save_pretrained` writes, and two more files:

fit.json        settings, files, versions, seconds and memory of the fit
split.parquet   role of every cell of the files: fitted, validation or held out
"""

import json
import resource
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pandas as pd
import torch

import rvqa
from rvqa.data import splits
from rvqa.data.columns import as_text, split_names
from rvqa.data.files.watch import Watch
from rvqa.data.reading import Layers
from rvqa.data.studies import label_table, open_study, study_files
from rvqa.io.files import whole_directory, writing
from rvqa.io.model_directory import require_new_directory
from rvqa.io.temporaries import folder_beside
from rvqa.tokenizer.model import CellTokenizer
from rvqa.training.distributed import Processes
from rvqa.training.tokenizer.fit import fit_tokenizer
from rvqa.training.tokenizer.settings import TokenizerSettings


def fit_tokenizer_files(
    given: Sequence[str | Path],
    output: str | Path,
    *,
    settings: TokenizerSettings | None = None,
    labels: str = "cell_type",
    donor: str = "donor",
    condition: str = "condition",
    control: Sequence[str] = ("control", "ctrl"),
    held_out: Sequence[str] = (),
    validation: Sequence[str] = (),
    layer: str | Layers | None = None,
    checkpoint: str | Path | None = None,
    device: str = "cpu",
    force: bool = False,
    progress: bool = True,
) -> dict[str, Any]:
    """Fit a tokenizer on files of any size and write its directory.

    The fit reads the files in blocks, three times. While it runs, a folder beside the output holds the counts on the
    genes of the tokenizer (8 bytes for each count that is not 0).

    Parameters
    ----------
    given
        `.h5ad` files, `.zarr` stores or folders of `.h5ad` files, with raw counts. Their panels may differ.
    output
        Directory to write. It appears whole or not at all.
    settings
        See `TokenizerSettings`.
    labels, donor
        Columns of obs with cell types and donors. A file without them counts as unlabelled, of unknown donors.
        `label_to_cl.json` of RVQA_REF_DIR harmonises labels if it exists.
    condition, control
        Column of obs with perturbations, if any, and its values for control cells. All cells of a file without the
        column are control cells. Partners in two files must have the same condition.
    held_out, validation
        Donors whose cells are not used at all, and donors whose cells only decide which epoch is kept.
    layer
        Layer with the counts, as for `rvqa.encode`.
    checkpoint, device, progress
        As for `fit_tokenizer`.
    force
        Whether to replace an existing tokenizer's directory.

    Returns
    -------
    dict
        Content of `fit.json`.

    Raises
    ------
    rvqa.errors.InputError
        The input cannot be read or fitted, a donor is unknown, or the output exists.
    """
    path = require_new_directory(output, force=force, kind="tokenizer", mark="fit.json")
    settings = settings or TokenizerSettings()
    started = time.perf_counter()
    table = label_table()
    processes = Processes(device)
    with _scratch(path, processes) as scratch:
        rows = scratch / f"rows-{processes.rank}"
        paths = study_files(given)
        watches = [Watch(path) for path in paths]
        files = [
            open_study(file, scratch=rows, labels=labels, donor=donor, condition=condition, layer=layer, table=table)
            for file in paths
        ]
        conditions = {name for file in files for name in file.condition_N if name}
        donors = {name for file in files for name in file.donor_N if name}
        control = split_names(control, conditions)
        held_out, validation = (split_names(map(as_text, names), donors) for names in (held_out, validation))
        split = splits.make_split(files, held_out=held_out, validation=validation)
        fitted, valid = (
            [
                file.take(rows_N).with_control(control)
                for file in files
                if (rows_N := splits.rows_of(split, file, role)).any()
            ]
            for role in (splits.FIT, splits.VALIDATION)
        )
        fitting = time.perf_counter()
        tokenizer = fit_tokenizer(
            fitted,
            settings,
            validation=valid,
            checkpoint=checkpoint,
            scratch=scratch,
            device=device,
            progress=progress,
        )
        for watch in watches:
            watch.require_unchanged()
    facts = {
        "settings": asdict(settings),
        "files": {
            file.name: {
                "cells": len(file),
                "genes": len(file.var),
                "counts_from": file.place,
                "left_out": dict(file.left_out),
            }
            for file in files
        },
        "cells": {role or "without a donor": int(n) for role, n in split["role"].value_counts().items()},
        "held_out_donors": list(held_out),
        "validation_donors": list(validation),
        "genes": len(tokenizer.axis),
        "fit_seconds": time.perf_counter() - fitting,
        "seconds": time.perf_counter() - started,
        "peak_memory_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**30 if _MAC else 2**20),
        "threads": torch.get_num_threads(),
        "versions": {"rvqa": rvqa.__version__, "torch": torch.__version__},
    }
    if processes.first:
        _write(path, tokenizer, split, facts)
    return facts


_MAC = sys.platform == "darwin"
"""Whether the system counts memory in bytes."""


@contextmanager
def _scratch(path: Path, processes: Processes) -> Iterator[Path]:
    """Make a folder beside the output for counts, one for all processes; remove it when the block ends."""
    with ExitStack() as stack:
        folder = ""
        if processes.first:
            with writing(path):
                folder = str(stack.enter_context(folder_beside(path.absolute())))
        yield Path(processes.gather_texts(folder)[0])
        processes.wait()


def _write(path: Path, tokenizer: CellTokenizer, split: pd.DataFrame, facts: dict[str, Any]) -> None:
    with whole_directory(path) as whole:
        tokenizer.save_pretrained(whole)
        splits.write_split(split, whole / "split.parquet")
        (whole / "fit.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
