"""`rvqa fit-tokenizer`: files of cells to a tokenizer's directory, with what it was made of.

The directory holds what `CellTokenizer.save_pretrained` writes, and beside it

fit.json        settings, files, versions, seconds and memory of the fit
split.parquet   role of every cell of the files: fitted, for validation, held out
"""

import json
import resource
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from anndata import AnnData

import rvqa
from rvqa.evaluation import splits
from rvqa.evaluation.studies import Study, label_table, read_study, study_files
from rvqa.model import require_new_directory, whole_directory
from rvqa.tokenizer import CellTokenizer
from rvqa.training.reference import Reference
from rvqa.training.tokenizer import fit_tokenizer
from rvqa.training.tokenizer_settings import TokenizerSettings


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
    checkpoint: str | Path | None = None,
    device: str = "cpu",
    force: bool = False,
    progress: bool = True,
) -> dict[str, Any]:
    """Fit a tokenizer on .h5ad files and write its directory.

    Parameters
    ----------
    given
        Files, or folders of files, of raw counts; panels may differ.
    output
        Directory to write, whole or not at all.
    settings
        See `TokenizerSettings`.
    labels, donor
        Columns of obs with cell types and donors; files without them are taken as unlabelled, of unknown donors.
        Labels are harmonised by `label_to_cl.json` of RVQA_REF_DIR where that is.
    condition, control
        Column of obs with perturbations, where there is one, and its values for control cells, as which all cells of
        files without it count: only cells of one condition are taken to be alike in two files.
    held_out, validation
        Donors whose cells enter nothing, and donors whose cells decide which epoch is kept and enter nothing else.
    checkpoint, device, progress
        As for `fit_tokenizer`.
    force
        Replace a tokenizer's directory.

    Returns
    -------
    dict
        What `fit.json` holds.

    Raises
    ------
    rvqa.errors.InputError
        Input that cannot be read or fitted, an unknown donor, or an output that exists.
    """
    path = require_new_directory(output, force=force, kind="tokenizer", mark="fit.json")
    settings = settings or TokenizerSettings()
    started = time.perf_counter()
    table = label_table()
    studies = [
        read_study(file, labels=labels, donor=donor, condition=condition, table=table) for file in study_files(given)
    ]
    split = splits.make_split(studies, held_out=held_out, validation=validation)
    fitted, valid = (_references(studies, split, role, control) for role in (splits.FIT, splits.VALIDATION))
    fitting = time.perf_counter()
    tokenizer = fit_tokenizer(
        fitted, settings, validation=valid, checkpoint=checkpoint, device=device, progress=progress
    )
    facts = {
        "settings": asdict(settings),
        "files": {study.name: {"cells": len(study), "genes": study.counts.shape[1]} for study in studies},
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
    if not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0:
        _write(path, tokenizer, split, facts)
    return facts


_MAC = sys.platform == "darwin"
"""Where the system counts memory in bytes."""


def _references(studies: Sequence[Study], split: pd.DataFrame, role: str, control: Sequence[str]) -> list[Reference]:
    """Cells of a role as the fit takes them."""
    chosen = [study.take(splits.rows_of(split, study, role)) for study in studies]
    return [
        Reference(
            name=each.name,
            adata=AnnData(obs=pd.DataFrame(index=pd.Index(each.cell_N.astype(str)))),
            var=each.var,
            counts=each.counts,
            library_size=each.library_size,
            given=each.given,
            labels=each.label_N,
            conditions=np.where(np.isin(each.condition_N, list(control)), "", each.condition_N),
            ontology_ids={},
        )
        for each in chosen
        if len(each)
    ]


def _write(path: Path, tokenizer: CellTokenizer, split: pd.DataFrame, facts: dict[str, Any]) -> None:
    with whole_directory(path) as whole:
        tokenizer.save_pretrained(whole)
        splits.write_split(split, whole / "split.parquet")
        (whole / "fit.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
