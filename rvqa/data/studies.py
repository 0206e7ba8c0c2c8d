"""Files of cells as evaluation sees them: counts, depth, harmonised labels, donors.

N cells, G genes of an axis. Labels are harmonised by a table (`label_to_cl.json` of the reference folder: raw label ->
coarse label) where one is at hand, so that studies with other words for the same types can be compared.
"""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
import scipy.sparse as sp
from anndata import AnnData

from rvqa.data.alignment import GeneAlignment, align, map_columns
from rvqa.data.columns import conditions_of, labels_of
from rvqa.data.counts import read_counts
from rvqa.data.depth import GeneShares, log1p_normalise
from rvqa.data.files.layers import Layers, layer_of
from rvqa.data.files.matrix_market import find_matrix_market
from rvqa.data.files.sources import read_cells
from rvqa.data.genes import GeneAxis
from rvqa.errors import InputError, about

DEPTH_COLUMNS = ("n_counts_all_genes", "nUMI_all_genes", "library_size")
"""Columns of obs in which files that were cut to a few genes keep every cell's total counts."""


@dataclass(frozen=True)
class CellTable:
    """What a file says of its cells beside their counts."""

    name: str
    label_N: np.ndarray
    """Harmonised cell type, object [N]; "" where unlabelled."""
    truth_N: np.ndarray
    """The same, "" also where the label was made by a model: what predictions are compared with."""
    donor_N: np.ndarray
    """Donor, object [N]; "" where unknown."""
    condition_N: np.ndarray
    """Condition, object [N]; "" where the file has no such column, None where it has but does not say."""
    cell_N: np.ndarray
    """Barcode, object [N]."""

    def __len__(self) -> int:
        return len(self.cell_N)

    @classmethod
    def of(
        cls, adata: AnnData, name: str, *, labels: str, donor: str, condition: str, table: Mapping[str, str] | None
    ) -> "CellTable":
        """Read `adata.obs`; arguments are those of `read_study`."""

        def texts(name: str) -> np.ndarray:
            values = labels_of(adata, name) if name in adata.obs else [""] * adata.n_obs
            return np.array([str(value) for value in values], dtype=object)

        label_N = np.array([(table or {}).get(name, name) for name in texts(labels)], dtype=object)
        by_author = f"{labels}_author"
        truth_N = np.where(texts(by_author) == "", "", label_N) if by_author in adata.obs else label_N
        cell_N = np.array([str(name) for name in adata.obs_names], dtype=object)
        condition_N = conditions_of(adata, condition, ()) if condition in adata.obs else texts(condition)
        return cls(name, label_N, truth_N, texts(donor), condition_N, cell_N)


def table_columns(labels: str, donor: str, condition: str) -> list[str]:
    """Columns of obs that `CellTable.of` and depth are read from."""
    return [labels, f"{labels}_author", donor, condition, *DEPTH_COLUMNS]


def depth_column(obs: pd.DataFrame) -> str | None:
    """The first of `DEPTH_COLUMNS` that there is."""
    return next((name for name in DEPTH_COLUMNS if name in obs), None)


@dataclass(frozen=True)
class Study(CellTable):
    """Cells of one file, with their counts."""

    counts: sp.csr_matrix
    """Raw counts over the genes of the file, float32 [N, genes]."""
    var: pd.DataFrame
    library_size: np.ndarray
    """Total counts, float64 [N]."""
    given: bool
    """Whether the file gives them over all genes; else they are sums of the stored counts."""

    @property
    def axis(self) -> GeneAxis:
        """Genes of the file."""
        with about(self.name):
            return GeneAxis.from_adata(AnnData(var=self.var))

    def alignment(self, axis: GeneAxis) -> GeneAlignment:
        """How the genes of the file meet an axis."""
        with about(self.name):
            return align(self.var, axis)

    def log1p(self, axis: GeneAxis) -> sp.csr_matrix:
        """log1p of counts per 10,000 on an axis, float32 CSR [N, G]."""
        return log1p_normalise(map_columns(self.counts, self.alignment(axis)), self.library_size)

    def take(self, rows: np.ndarray) -> "Study":
        """Some of the cells: a mask or indices."""
        return replace(
            self,
            counts=self.counts[rows].tocsr(),
            library_size=self.library_size[rows],
            label_N=self.label_N[rows],
            truth_N=self.truth_N[rows],
            donor_N=self.donor_N[rows],
            condition_N=self.condition_N[rows],
            cell_N=self.cell_N[rows],
        )

    def at_depth(self, shares: GeneShares) -> "Study":
        """The same with `library_size` over all genes, as a tokenizer reads it."""
        with about(self.name):
            return replace(self, library_size=shares.depth(self))

    def cut(self, columns: np.ndarray) -> "Study":
        """Some of the genes, by index; library sizes stay those of all genes."""
        return replace(self, counts=self.counts[:, columns].tocsr(), var=self.var.iloc[columns])


def read_study(
    path: str | Path,
    *,
    labels: str = "cell_type",
    donor: str = "donor",
    condition: str = "condition",
    layer: str | Layers | None = None,
    table: Mapping[str, str] | None = None,
) -> Study:
    """Read one .h5ad file with raw counts.

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
        cells = read_counts(adata, layer=layer_of(layer, path), library_size_key=depth_column(adata.obs), recover=None)
        told = CellTable.of(adata, path.stem, labels=labels, donor=donor, condition=condition, table=table)
    return Study(**vars(told), counts=cells.counts, var=cells.var, library_size=cells.library_size, given=cells.given)


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


def shared_axis(studies: Sequence[Study]) -> GeneAxis:
    """Genes that all of the studies measure."""
    axis = studies[-1].axis
    for study in studies[:-1]:
        axis = axis.subset(np.flatnonzero(study.alignment(axis).measured))
    return axis
