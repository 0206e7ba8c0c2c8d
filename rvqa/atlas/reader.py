"""`open_codes`: going on from the codes of any number of cells, without reading them all into memory.

N cells, M levels, K codewords a level.
"""

from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import pyarrow as pa
from pyarrow import parquet

from rvqa.atlas import rvq
from rvqa.atlas.manifest import require_manifest
from rvqa.errors import InputError
from rvqa.io import cell_tables
from rvqa.io.cell_tables import REPAIR
from rvqa.io.json_text import object_of

if TYPE_CHECKING:
    from rvqa.language.vocabulary import CellVocabulary

BLOCK = rvq.BLOCK

MOST_PREFIXES = 2**24
"""Most prefixes that are counted: 128 MiB."""


def open_codes(path: str | Path, *, verify: bool = False) -> "Codes":
    """Open what `rvqa.encode(..., out=...)` wrote as `.rvq`, `.zarr` or `.parquet`.

    Parameters
    ----------
    path
        The output.
    verify
        Compare every checksum of a `.rvq` file first.

    Returns
    -------
    Codes
        Reads codes as they are asked for.

    Raises
    ------
    rvqa.errors.InputError
        Nothing there, of another format, or damaged.

    Examples
    --------
    >>> codes = rvqa.open_codes("atlas.rvq")  # doctest: +SKIP
    >>> codes[:5]  # doctest: +SKIP
    """
    file = Path(path)
    if file.suffix == ".rvq":
        opened = rvq.RvqFile.open(file)
        if verify:
            opened.verify()
        require_manifest(opened.manifest, file)
        told = tuple(opened.manifest[key] for key in ("cells", "levels", "entries"))
        if told != (opened.n_cells, opened.levels, opened.entries):
            raise InputError(f"{file}: its manifest has {told} cells, levels and codes; its header others. {REPAIR}")
        return Codes(file, opened.codes, opened.table, opened.manifest)
    if file.suffix not in (".zarr", ".parquet"):
        raise InputError(f"{file} is not named .rvq, .zarr or .parquet. Give what `rvqa encode -o` wrote.")
    with cell_tables.reading(file):
        return _of_zarr(file) if file.suffix == ".zarr" else _of_parquet(file)


class Codes:
    """Codes of cells in a file.

    Attributes
    ----------
    path
        Of the file.
    manifest
        What they depend on: model, inputs, settings, what computed them.
    levels, entries
        M and K.
    """

    def __init__(self, path: Path, read: Any, table: Any, manifest: dict[str, Any]) -> None:
        self.path, self.manifest, self._read, self._table = path, manifest, read, table
        self._cells, self.levels, self.entries = (manifest[key] for key in ("cells", "levels", "entries"))

    def __len__(self) -> int:
        return self._cells

    def __repr__(self) -> str:
        return f"Codes of {len(self):,} cells in {self.path}"

    def __getitem__(self, rows: int | slice | Sequence[int] | np.ndarray) -> np.ndarray:
        """Codes uint8 [M] of one cell, or [n, M] of a slice, a list of rows or a mask [N]."""
        if isinstance(rows, slice):
            start, stop, step = rows.indices(len(self))
            if step != 1:
                return self[np.arange(start, stop, step)]
            return self._read(slice(start, max(start, stop)))
        at = np.asarray(rows)
        if at.dtype == bool:
            if at.shape != (len(self),):
                raise InputError(f"The mask has shape {at.shape}; expected one entry for each of {len(self):,} cells.")
            at = np.flatnonzero(at)
        at = at.astype(np.int64) if at.size == 0 else at
        if at.dtype.kind not in "iu" or at.ndim > 1:
            raise InputError(f"Rows are {at.dtype} of shape {at.shape}; expected whole numbers, a slice or a mask.")
        at = np.where(at < 0, at + len(self), at)
        if at.size and (at.min() < 0 or at.max() >= len(self)):
            raise IndexError(f"rows from {at.min():,} to {at.max():,} of {len(self):,} cells")
        return self._read(at.reshape(-1)).reshape(*at.shape, self.levels)

    @cached_property
    def table(self) -> pa.Table:
        """Names of the cells (`cell`) and the columns that were carried along, as they are stored."""
        table: pa.Table | None = self._table()
        if table is None:
            raise InputError(f"{self.path} has no table of cells. {REPAIR}")
        return table

    @cached_property
    def obs(self) -> pd.DataFrame:
        """Names of the cells (index), the file each is from, and the columns that were carried along."""
        frame = self.table.to_pandas(ignore_metadata=True).set_index("cell")
        frame.index.name = None
        inputs = self.manifest["inputs"]
        files = list(dict.fromkeys(each["name"] for each in inputs))  # of two folders, two may have one name
        at = np.repeat([files.index(each["name"]) for each in inputs], [each["cells"] for each in inputs])
        frame.insert(0, "file", pd.Categorical.from_codes(at, files))
        return frame

    def blocks(self, cells: int = BLOCK) -> Iterator[tuple[slice, np.ndarray]]:
        """Rows and codes, part by part, in order."""
        for start in range(0, len(self), cells):
            rows = slice(start, min(start + cells, len(self)))
            yield rows, self._read(rows)

    def token_ids(
        self,
        vocabulary: "CellVocabulary",
        *,
        batch_size: int = 4096,
        shuffle: bool = False,
        seed: int = 0,
        rank: int = 0,
        world: int = 1,
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Batches of rows int64 [B] and token ids int64 [B, M + 2], opener and closer among them, for training.

        Parameters
        ----------
        vocabulary
            Of the language model (`model.vocabulary`).
        batch_size
            Cells a batch; the last is smaller.
        shuffle
            Blocks of 65,536 cells in random order, cells within each too; memory stays that of one block.
        seed
            Of the order; another each epoch.
        rank, world
            This process and how many there are: each gets every world-th block, so all cells once in all.

        Raises
        ------
        rvqa.errors.InputError
            A vocabulary of other levels or codewords, or a rank outside the world.
        """
        if (vocabulary.levels, vocabulary.entries) != (self.levels, self.entries):
            raise InputError(
                f"{self.path} has {self.levels} levels of {self.entries} codes, the vocabulary {vocabulary.levels} of "
                f"{vocabulary.entries}. Encode with the tokenizer of that model."
            )
        if not 0 <= rank < world or batch_size < 1:
            raise InputError(
                f"rank {rank} of {world}, batch_size {batch_size}; expected 0 <= rank < world, batch_size >= 1."
            )
        starts = np.arange(0, len(self), BLOCK)
        rng = np.random.default_rng(seed)
        if shuffle:
            starts = rng.permutation(starts)
        for number, start in enumerate(starts.tolist()):
            rows_B = np.arange(start, min(start + BLOCK, len(self)))
            order = np.random.default_rng([seed, start]).permutation(len(rows_B)) if shuffle else slice(None)
            if number % world != rank:
                continue
            codes_BM, rows_B = self._read(slice(start, start + len(rows_B)))[order], rows_B[order]
            for first in range(0, len(rows_B), batch_size):
                part = slice(first, first + batch_size)
                yield rows_B[part], vocabulary.ids(codes_BM[part])

    def count_prefixes(self, levels: int = 1) -> np.ndarray:
        """Cells by the codes of their first levels, int64 of shape [K] * levels."""
        if not 1 <= levels <= min(4, self.levels):
            raise InputError(f"levels is {levels}; expected 1 to {min(4, self.levels)}.")
        if self.entries**levels > MOST_PREFIXES:
            raise InputError(f"{levels} levels of {self.entries} codes have more than {MOST_PREFIXES:,} prefixes.")
        shape = (self.entries,) * levels
        count = np.zeros(self.entries**levels, dtype=np.int64)
        for _, codes_BM in self.blocks():
            count += np.bincount(np.ravel_multi_index(codes_BM[:, :levels].T, shape), minlength=len(count))
        return count.reshape(shape)

    def near_duplicates(self, levels: int | None = None) -> Iterator[np.ndarray]:
        """Groups of two and more cells whose first levels of codes (all by default) are equal, as rows int64.

        Groups come in the order of their codes, rows in theirs. Memory is that of the cells with one first code.
        """
        levels = self.levels if levels is None else levels
        if not 1 <= levels <= self.levels:
            raise InputError(f"levels is {levels}; expected 1 to {self.levels}.")
        for first in range(self.entries):
            rows, keys = [np.zeros(0, np.int64)], [np.zeros(0, np.uint64)]
            for block, codes_BM in self.blocks():
                inside = np.flatnonzero(codes_BM[:, 0] == first)
                # The first level takes the highest bits, so that sorting groups whole prefixes.
                prefix = codes_BM[inside, :levels][:, ::-1]
                keys.append(rvq.as_integers(rvq.pack(np.ascontiguousarray(prefix), self.entries)))
                rows.append(inside + block.start)
            row_N, key_N = np.concatenate(rows), np.concatenate(keys)
            order = np.argsort(key_N, kind="stable")
            ends = np.flatnonzero(np.diff(key_N[order])) + 1
            yield from (group for group in np.split(row_N[order], ends) if len(group) > 1)


def _of_parquet(path: Path) -> Codes:
    if not path.is_file():
        raise InputError(f"{path} does not exist or is not a file. Give what `rvqa encode -o` wrote.")
    metadata = parquet.read_metadata(path)
    schema = metadata.schema.to_arrow_schema()
    told = (schema.metadata or {}).get(b"rvqa")
    if told is None:
        raise InputError(f"{path} is a parquet file, but not of codes. Give what `rvqa encode -o` wrote.")
    manifest = object_of(told, f"The manifest of {path}", REPAIR)
    require_manifest(manifest, path)
    names = [f"code_{level + 1}" for level in range(manifest["levels"])]
    columns = [name for name in schema.names if name not in names]
    cell_tables.require_parquet(metadata, schema, names, manifest["cells"], path)
    file = parquet.ParquetFile(path, metadata=metadata, read_dictionary=cell_tables.texts_of(schema))
    sizes = [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)]
    starts = np.cumsum([0, *sizes])

    def group(i: int) -> np.ndarray:
        with cell_tables.reading(path):
            stored = file.read_row_group(i, columns=names)
        if stored.num_rows != sizes[i] or any(column.null_count for column in stored.columns):
            raise InputError(f"{path} lacks codes of cells {starts[i]:,} to {starts[i + 1]:,}. {REPAIR}")
        codes_NM = np.stack([stored.column(name).to_numpy() for name in names], axis=1)
        rvq.require_codes(codes_NM, manifest["entries"], path)
        return codes_NM

    def read(rows: slice | np.ndarray) -> np.ndarray:
        at = np.arange(rows.start, rows.stop) if isinstance(rows, slice) else rows
        out = np.empty((len(at), len(names)), dtype=np.uint8)
        inside = np.searchsorted(starts, at, side="right") - 1
        for i in np.unique(inside):
            out[inside == i] = group(int(i))[at[inside == i] - starts[i]]
        return out

    def table() -> pa.Table:
        with cell_tables.reading(path):
            found = cell_tables.of_parquet(file, columns, manifest["cells"], path)
            return cell_tables.require_cells(found, manifest["cells"], path)

    return Codes(path, read, table, manifest)


def _of_zarr(path: Path) -> Codes:
    from rvqa.atlas.zarr_store import Store

    store = Store(path)
    return Codes(path, store.codes, store.table, store.manifest)
