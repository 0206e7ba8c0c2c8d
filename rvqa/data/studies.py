"""Files of cells with harmonised labels, donors and conditions: `read_study`, or `open_study` without their counts.

Labels are harmonised by a table (`label_to_cl.json` of the reference folder: raw label ->
coarse label) where one is at hand, so that studies with other words for the same types can be compared.
"""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from anndata import AnnData

from rvqa.data.cells import Cells
from rvqa.data.columns import conditions_of, labels_of
from rvqa.data.counts import read_counts
from rvqa.data.files.matrix_market import find_matrix_market
from rvqa.data.files.source import anndata_of
from rvqa.data.files.sources import open_source, read_cells
from rvqa.data.files.stored import Stored
from rvqa.data.genes import GeneAxis
from rvqa.data.reading import Layers, Reading, layer_of
from rvqa.errors import InputError, about
from rvqa.io.files import warn_of_repeated

DEPTH_COLUMNS = ("n_counts_all_genes", "nUMI_all_genes", "library_size")
"""Columns of obs in which files that were cut to a few genes keep every cell's total counts."""


def _columns(
    adata: AnnData, *, labels: str, donor: str, condition: str, table: Mapping[str, str] | None
) -> dict[str, Any]:
    """What `adata.obs` says of each cell, as `Cells` keeps it; arguments are those of `read_study`."""

    def texts(name: str) -> np.ndarray:
        values = labels_of(adata, name) if name in adata.obs else [""] * adata.n_obs
        return np.array([str(value) for value in values], dtype=object)

    label_N = np.array([(table or {}).get(name, name) for name in texts(labels)], dtype=object)
    by_author = f"{labels}_author"
    return {
        "label_N": label_N,
        "truth_N": np.where(texts(by_author) == "", "", label_N) if by_author in adata.obs else label_N,
        "donor_N": texts(donor),
        "condition_N": conditions_of(adata, condition, ()) if condition in adata.obs else texts(condition),
        "cell_N": np.array([str(name) for name in adata.obs_names], dtype=object),
    }


def depth_column(obs: pd.DataFrame) -> str | None:
    """The first of `DEPTH_COLUMNS` that there is."""
    return next((name for name in DEPTH_COLUMNS if name in obs), None)


def read_study(
    path: str | Path,
    *,
    labels: str = "cell_type",
    donor: str = "donor",
    condition: str = "condition",
    layer: str | Layers | None = None,
    table: Mapping[str, str] | None = None,
) -> Cells:
    """Read one file of raw counts, with labels, donors and conditions.

    Parameters
    ----------
    path
        The file. Total counts are taken from the first of `DEPTH_COLUMNS` it has, else summed.
    labels, donor, condition
        Columns of obs; one that the file does not have is taken as unknown in every cell. Where there is a column
        `<labels>_author` as well, labels that it leaves empty were transferred by a model: they teach and test nothing.
    layer
        As for `rvqa.encode`.
    table
        Harmonised label of a raw one; `label_table()` reads one. Labels that it does not know stay as they are.

    Raises
    ------
    rvqa.errors.InputError
        No such file, or no raw counts.
    """
    path = Path(path)
    adata = read_cells(path, layer=layer)
    with about(path):
        reading = Reading(layer_of(layer, path), depth_column(adata.obs), recover=None)
        cells = read_counts(adata, reading, name=path.stem)
        columns = _columns(adata, labels=labels, donor=donor, condition=condition, table=table)
    return replace(cells, **columns)


def open_study(
    path: str | Path,
    *,
    scratch: Path,
    labels: str = "cell_type",
    donor: str = "donor",
    condition: str = "condition",
    layer: str | Layers | None = None,
    table: Mapping[str, str] | None = None,
) -> Cells:
    """Open one file of raw counts: what it says of its cells is read, counts stay where they are.

    Parameters
    ----------
    path
        The file.
    scratch
        Folder for rows of a file that is stored by genes (CSC).
    labels, donor, condition, layer, table
        As for `read_study`.

    Raises
    ------
    rvqa.errors.InputError
        No such file, or not one of AnnData. Values that are not counts raise when they are read.
    """
    path = Path(path)
    source = open_source(path, layer=layer, scratch=scratch)
    with about(path):
        obs = source.obs.table([labels, f"{labels}_author", donor, condition, *DEPTH_COLUMNS])
        columns = _columns(anndata_of(obs=obs), labels=labels, donor=donor, condition=condition, table=table)
    source.require_counts()
    warn_of_repeated(path, obs.index)
    key = depth_column(obs)
    counts = Stored(source, obs[[] if key is None else [key]], np.arange(len(obs)), Reading(layer, key, recover=None))
    return Cells(
        counts,
        source.var,
        None,
        key is not None,
        **columns,
        name=path.stem,
        place=source.place,
        left_out=source.left_out,
    )


def label_table(folder: str | Path | None = None) -> dict[str, str]:
    """Coarse label of every raw label, from `label_to_cl.json`.

    The file is looked for in the folder given, else in RVQA_REF_DIR, else in $RVQA_DATA_DIR/../ref. The table is empty
    where there is no such file.
    """
    named, data = folder or os.environ.get("RVQA_REF_DIR"), os.environ.get("RVQA_DATA_DIR")
    if not named and not data:
        return {}
    file = (Path(named) if named else Path(data or "") / ".." / "ref") / "label_to_cl.json"
    if not file.is_file():
        return {}
    return {raw: entry["coarse"] for raw, entry in json.loads(file.read_text(encoding="utf-8")).items()}


def study_files(given: Sequence[str | Path]) -> list[Path]:
    """Files to read: those given, and all .h5ad files of folders given, in the order of their names."""
    files: list[Path] = []
    for each in map(Path, given):
        folder = each.is_dir() and each.suffix != ".zarr" and find_matrix_market(each) is None
        inside = sorted(each.glob("*.h5ad")) if folder else [each]
        if not inside:
            raise InputError(f"{each} holds no .h5ad file. Give files, or a folder of them.")
        files += inside
    names = [file.stem for file in files]
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        raise InputError(f"Two files are named {repeated[0]}. Rename one: figures go by the file's name.")
    return files


def shared_axis(studies: Sequence[Cells]) -> GeneAxis:
    """Genes that all of the studies measure."""
    axis = studies[-1].axis
    for study in studies[:-1]:
        axis = axis.subset(np.flatnonzero(study.alignment(axis).measured))
    return axis
