"""Tables of cells and genes as files store them, read a column or a range of rows at a time.

A column that cannot be read costs nothing but itself: whoever asks for it is told, and all others are there.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import h5py
import numpy as np
import pandas as pd

from rvqa.data.files import memory
from rvqa.data.files.hdf5 import read_slice
from rvqa.errors import InputError, nearest
from rvqa.io.files import UNREADABLE, sentence

_NULLABLE = {
    "nullable-integer": pd.arrays.IntegerArray,
    "nullable-boolean": pd.arrays.BooleanArray,
    "nullable-string-array": lambda texts, missing: pd.array(np.where(missing, pd.NA, texts), dtype="string"),
    "nullable": lambda values, missing: pd.Series(values, dtype=object).mask(missing).array,
}
"""How pandas holds values and what is missing of them, by the encoding of a column."""

_SLICED = {"array", "string-array", "categorical", *_NULLABLE}


class Frame:
    """A table in memory.

    Parameters
    ----------
    frame
        Its index names the rows.
    name
        Of the table, for messages: "obs" or "var".
    """

    def __init__(self, frame: Any, name: str = "obs") -> None:
        self.frame, self.name = frame, name

    @property
    def names(self) -> list[str]:
        """Columns, in order."""
        return [str(name) for name in self.frame.columns]

    def __len__(self) -> int:
        """Number of rows."""
        return int(self.frame.shape[0])

    def index(self, start: int, stop: int) -> np.ndarray:
        """Names of rows from start to stop, objects of str."""
        return as_texts(self.frame.index[start:stop])

    def column(self, key: str, start: int, stop: int) -> np.ndarray:
        """Values of rows from start to stop: numbers, bool or objects of str; a missing number is NaN, a text "".

        Raises
        ------
        rvqa.errors.InputError
            No such column, or one of a kind that has no such form.
        """
        self.require(key)
        part = self.frame.iloc[start:stop]
        return plain((part if isinstance(part, pd.DataFrame) else part.to_memory())[key])

    def table(self, keys: Sequence[str]) -> pd.DataFrame:
        """Whole columns, those of some names that there are, as pandas holds them."""
        part = self.frame[[key for key in keys if key in self.names]]
        return part if isinstance(part, pd.DataFrame) else part.to_memory()

    def readable(self) -> tuple[pd.DataFrame, list[str]]:
        """All columns that can be read, and the names of the others."""
        return self.table(self.names), []

    def require(self, key: str) -> None:
        """Reject a column that there is not."""
        if key not in self.names:
            raise InputError(f"{self.name} has no column {key!r}. {nearest(key, self.names)}")


class StoredFrame(Frame):
    """A table in a group of an HDF5 file or a zarr store, as anndata 0.7 and later write it.

    Parameters
    ----------
    group
        Open.
    name
        Of the table, for messages.
    """

    def __init__(self, group: Any, name: str = "obs") -> None:
        self.group, self.name = group, name
        found = group.attrs.get("_index", "_index")
        index = found.decode() if isinstance(found, bytes) else str(found)
        if index not in group:
            raise InputError(f"{name} has no column {index!r}, which should name its rows. Write the file anew.")
        self._index = index

    @property
    def names(self) -> list[str]:
        """Columns, in order."""
        with self._reading("column-order"):
            there = [name for name in self.group if name not in (self._index, "__categories")]
            told = as_texts(np.atleast_1d(self.group.attrs.get("column-order", ())))
        first = [name for name in dict.fromkeys(told) if name in there]
        return first + [name for name in there if name not in first]

    def __len__(self) -> int:
        """Number of rows."""
        with self._reading(self._index):
            stored = self.group[self._index]
            return int((stored["values"] if _kind(stored).startswith("nullable") else stored).shape[0])

    def index(self, start: int, stop: int) -> np.ndarray:
        """Names of rows from start to stop, objects of str."""
        return as_texts(self._values(self._index, start, stop))

    def column(self, key: str, start: int, stop: int) -> np.ndarray:
        """Values of rows from start to stop, as `Frame.column`."""
        self.require(key)
        return self._values(key, start, stop)

    def _values(self, key: str, start: int, stop: int) -> np.ndarray:
        with self._reading(key):
            stored = self.group[key]
            kind = _kind(stored)
            if kind == "legacy-categorical":
                return _decoded(read_slice(stored, start, stop), self.group["__categories"][key])
            if kind not in _SLICED:
                raise InputError(f"{self.name}[{key!r}] is stored as {kind!r}, which cannot be carried along.")
            if kind == "categorical":
                return _decoded(read_slice(stored["codes"], start, stop), stored["categories"])
            if kind in _NULLABLE:
                values, missing = (read_slice(stored[part], start, stop) for part in ("values", "mask"))
                series = pd.Series(plain(pd.Series(values)), dtype=object)
                return plain(series.mask(missing))
            return plain(pd.Series(read_slice(stored, start, stop)))

    @contextmanager
    def _reading(self, key: str) -> Iterator[None]:
        try:
            yield
        except InputError:
            raise
        except UNREADABLE as error:
            raise InputError(
                f"{self.name}[{key!r}] cannot be read: {sentence(error)} Copy the file again, or write it anew."
            ) from error

    def table(self, keys: Sequence[str]) -> pd.DataFrame:
        """Whole columns, those of some names that there are, as pandas holds them.

        Raises
        ------
        rvqa.errors.InputError
            One of them cannot be read, or they take more memory than may be taken.
        """
        known = [key for key in self.names if key in set(keys)]
        index = self._whole_index(known)
        columns = {}
        for key in known:
            with self._reading(key):
                columns[key] = pd.Series(self._whole(key), index=index)
        return pd.DataFrame(columns, index=index)

    def readable(self) -> tuple[pd.DataFrame, list[str]]:
        """All columns that can be read, and the names of the others."""
        index = self._whole_index(self.names)
        columns, others = {}, []
        for key in self.names:
            try:
                columns[key] = pd.Series(self._whole(key), index=index)
            except UNREADABLE:
                others.append(key)
        return pd.DataFrame(columns, index=index), others

    def _whole_index(self, columns: Sequence[str]) -> pd.Index:
        """Names of all rows, where they and these columns fit in memory."""
        size = memory.TEXT * len(self) * (1 + len(columns)) // 2
        memory.require(size, f"{self.name}: {len(self):,} names and {len(columns):,} columns")
        return pd.Index(self.index(0, len(self)))

    def _whole(self, key: str) -> Any:
        stored = self.group[key]
        kind = _kind(stored)
        if kind in ("categorical", "legacy-categorical"):
            new = kind == "categorical"
            codes, categories = (
                (stored["codes"], stored["categories"]) if new else (stored, self.group["__categories"][key])
            )
            ordered = bool((stored if new else categories).attrs.get("ordered", False))
            codes = read_slice(codes, 0, len(self)).astype(np.int64)
            return pd.Categorical.from_codes(codes, _in_pandas(categories), ordered=ordered)
        return _in_pandas(stored)


def stored_frame(stored: Any, uns: Any = None, name: str = "obs") -> Frame:
    """A table of an AnnData file of any age.

    Parameters
    ----------
    stored
        Group, or the compound dataset that anndata before 0.7 wrote.
    uns
        Group of unstructured annotation, where such a file keeps the categories of its columns.
    name
        Of the table, for messages.

    Raises
    ------
    rvqa.errors.InputError
        Neither.
    """
    if not isinstance(stored, h5py.Dataset):
        return StoredFrame(stored, name)
    if stored.dtype.names is None:
        raise InputError(f"{name} is an array; expected a table as anndata writes it. Write the file anew.")
    records: Any = read_slice(stored, 0, stored.shape[0])
    frame = pd.DataFrame({key: _texts(records[key]) for key in records.dtype.names[1:]})
    frame.index = pd.Index(_texts(records[records.dtype.names[0]]))
    for key in frame.columns:
        if uns is not None and f"{key}_categories" in uns and frame[key].dtype.kind in "iu":
            categories = _texts(np.atleast_1d(uns[f"{key}_categories"][()]))
            frame[key] = pd.Categorical.from_codes(frame[key], categories)
    return Frame(frame, name)


def plain(values: pd.Series) -> np.ndarray:
    """Numbers or bool as they are, all else as text; missing numbers are NaN, missing texts are empty."""
    if isinstance(values.dtype, pd.CategoricalDtype):
        values = values.astype(object)
    if values.dtype.kind in "iufb" and not pd.api.types.is_extension_array_dtype(values.dtype):
        return values.to_numpy()
    if pd.api.types.is_numeric_dtype(values.dtype) or pd.api.types.infer_dtype(values) in ("integer", "floating"):
        return values.to_numpy(dtype=np.float64, na_value=np.nan)
    missing = values.isna()
    return as_texts(values.where(~missing, ""))


def as_texts(values: Iterable[Any]) -> np.ndarray:
    """Objects of str, [N]: an array of one width would take that of the longest for each."""
    texts = [each.decode(errors="replace") if isinstance(each, bytes) else str(each) for each in values]
    made = np.empty(len(texts), dtype=object)
    made[:] = texts
    return made


def _kind(stored: Any) -> str:
    """How a column is stored; told by its parts where a writer left the attributes out."""
    kind = stored.attrs.get("encoding-type")
    if kind is not None:
        return kind.decode() if isinstance(kind, bytes) else str(kind)
    if "categories" in stored.attrs:
        return "legacy-categorical"  # anndata 0.7
    if not hasattr(stored, "shape"):
        inside = set(stored)
        return (
            "categorical" if inside >= {"codes", "categories"} else "nullable" if inside >= {"values", "mask"} else ""
        )
    return "array"


def _decoded(codes: np.ndarray, stored: Any) -> np.ndarray:
    """Values of codes of categories, -1 for a missing one, as `plain`."""
    categories = plain(pd.Series(_in_pandas(stored)))
    if len(codes) and (codes.min() < -1 or codes.max() >= len(categories)):
        raise ValueError(f"it has codes beyond its {len(categories):,} categories")
    if categories.dtype.kind == "O":
        return np.append(categories, "")[codes]
    if (codes < 0).any():
        return np.where(codes < 0, np.nan, categories[codes])
    return categories[codes]


def _in_pandas(stored: Any) -> Any:
    """All values of a column or of its categories, as pandas holds them."""
    kind = _kind(stored)
    if kind not in _SLICED or kind == "categorical":
        raise InputError(f"it is stored as {kind!r}, which is not known")
    if kind in _NULLABLE:
        values, missing = (_in_pandas(stored[part]) for part in ("values", "mask"))
        return _NULLABLE[kind](values, missing)
    values = read_slice(stored, 0, int(stored.shape[0]))
    return as_texts(values) if values.dtype.kind in "TU" else _texts(values)


def _texts(values: Any) -> Any:
    """Bytes as text; all else as it is, in the byte order of this machine."""
    if not isinstance(values, np.ndarray):
        return values
    if values.dtype.kind in "SO":
        made = np.empty(values.shape, dtype=object)
        made[...] = [each.decode(errors="replace") if isinstance(each, bytes) else each for each in values]
        return made
    return values.astype(values.dtype.newbyteorder("="), copy=False)
