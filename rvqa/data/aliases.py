"""Previous symbols and aliases of human genes, from the table of the HGNC (`hgnc_complete_set.txt.gz`).

`rvqa.data.alignment.align` asks here for the file columns that match no axis gene as they are written.
`AliasTable.genes` reads a name as a gene of the HGNC; `AliasTable.fill` sends a column to the axis gene that is the
same gene. So it does not matter whether the file or the axis uses the old name. The table is optional: without one
nothing is resolved.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Literal, TypeAlias

import numpy as np
import pandas as pd

from rvqa.errors import InputError

TABLE_NAMES = ("hgnc_complete_set.txt.gz", "hgnc_complete_set.txt")
"""Names of the table in the folder of reference tables."""

_COLUMNS = ("symbol", "alias_symbol", "prev_symbol", "ensembl_gene_id", "status")


class AliasTable:
    """What each approved, previous and alternative symbol and each Ensembl id stands for.

    A symbol is read as written: as the approved symbol of a gene, else as a previous symbol, else as an alias. It
    stands for nothing where that leaves a choice: a previous symbol or alias of several genes, or an approved symbol
    that another gene bore before (its meaning depends on the file's age). An alias that is the approved symbol of
    another gene is not an alias. An Ensembl id of several genes is not an id; withdrawn entries are left out.

    Parameters
    ----------
    frame
        One row a gene, text columns `symbol`, `alias_symbol`, `prev_symbol` ("|" between names), `ensembl_gene_id` and
        `status`; "" where unknown.

    Raises
    ------
    InputError
        A column is absent.
    """

    def __init__(self, frame: pd.DataFrame) -> None:
        if absent := [name for name in _COLUMNS if name not in frame.columns]:
            raise InputError(f"The table of gene aliases lacks the columns {absent}; expected HGNC's complete set.")
        frame = frame[frame["status"] == "Approved"]
        previous = _owners(frame["prev_symbol"])
        self._n_genes = len(frame)
        self._by_id = {name: gene for name, gene in _owners(frame["ensembl_gene_id"]).items() if gene >= 0}
        self._by_name = _owners(frame["alias_symbol"]) | previous
        for symbol, gene in _owners(frame["symbol"]).items():
            self._by_name[symbol] = gene if previous.get(symbol, gene) == gene else -1

    def __len__(self) -> int:
        return self._n_genes

    def genes(self, symbols: Sequence[str], ensembl_ids: Sequence[str]) -> np.ndarray:
        """Read names as genes of the HGNC.

        Parameters
        ----------
        symbols, ensembl_ids
            One of each a gene, "" where unknown. An Ensembl id the table has decides; else the symbol does.

        Returns
        -------
        numpy.ndarray
            int32 [n], row of the gene in the table, -1 where a name stands for none or for several.
        """
        by_id, by_name = self._by_id, self._by_name
        pairs = zip(symbols, ensembl_ids, strict=True)
        found = [by_id[name] if name in by_id else by_name.get(symbol, -1) for symbol, name in pairs]
        return np.array(found, dtype=np.int32)

    def fill(
        self,
        column_map: np.ndarray,
        names: tuple[Sequence[str], Sequence[str]],
        axis_names: tuple[Sequence[str], Sequence[str]],
    ) -> np.ndarray:
        """Resolve the file columns that matched nothing as written.

        A column goes to the one axis gene that is the same gene of the HGNC; several such columns are added up, and
        columns of different HGNC genes never meet. It goes nowhere if another column matches that axis gene as written,
        or if two axis genes are that gene.

        Parameters
        ----------
        column_map
            int32 [n_file], axis gene of each file column, -1 where open. Not changed.
        names, axis_names
            Symbols and Ensembl ids of the file columns and of the axis.

        Returns
        -------
        numpy.ndarray
            int32 [n_file], the column map with what aliases add; what was matched stays.
        """
        axis_genes = self.genes(*axis_names)
        known = np.flatnonzero(axis_genes >= 0)
        target = np.full(len(self) + 1, -1, dtype=np.int32)  # the last place is that of gene -1
        target[axis_genes[known]] = known
        repeats = np.bincount(axis_genes[known], minlength=len(self) + 1) > 1
        target[repeats] = -1
        target[axis_genes[column_map[column_map >= 0]]] = -1
        return np.where(column_map < 0, target[self.genes(*names)], column_map)


AliasSource: TypeAlias = AliasTable | str | os.PathLike[str] | Literal[False] | None


def alias_table(source: AliasSource = None) -> AliasTable | None:
    """Return the table to use.

    Parameters
    ----------
    source
        A table (returned as it is); the path of HGNC's complete set, tab-separated, or of the folder that holds it;
        None for the one in the folder `RVQA_REF_DIR`, if there is one; False for no table. A file is read once per
        process, and again if it changed.

    Raises
    ------
    InputError
        A path where no table is, or a file that is no such table.
    """
    if isinstance(source, AliasTable):
        return source
    given = os.environ.get("RVQA_REF_DIR") if source is None else source
    if not given:
        return None
    path = Path(given)
    if path.is_dir():
        path = next((path / name for name in TABLE_NAMES if (path / name).is_file()), path / TABLE_NAMES[0])
    if not path.is_file():
        if source is None:
            return None
        raise InputError(f"No table of gene aliases at {path}: expected HGNC's {TABLE_NAMES[0]}, or aliases=False.")
    return _read(path.resolve(), path.stat().st_mtime_ns)


@lru_cache(maxsize=2)
def _read(path: Path, changed_ns: int) -> AliasTable:
    try:
        frame = pd.read_csv(path, sep="\t", usecols=_COLUMNS.__contains__, dtype=str, keep_default_na=False)
        return AliasTable(frame)
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise InputError(f"{path} cannot be read as HGNC's table of gene names ({error}); download it anew.") from error


def _owners(column: Iterable[str]) -> dict[str, int]:
    """Row of each name in a column of "|"-separated names, -1 for a name of several rows."""
    owners: dict[str, int] = {}
    for row, cell in enumerate(column):
        if cell:
            for name in cell.split("|"):
                name = name.strip(' "')
                if name and owners.setdefault(name, row) != row:
                    owners[name] = -1
    return owners
