"""Tables of cells and genes as files store them, read a column or a range of rows at a time.

A column that cannot be read costs nothing but itself: whoever asks for it is told, and all others are there.
"""

from collections.abc import Sequence
from typing import Any

import h5py
import numpy as np
import pandas as pd
from anndata.io import read_elem

from rvqa.atlas.hdf5 import read_slice
from rvqa.errors import InputError
from rvqa.files import UNREADABLE
from rvqa.obs import nearest

_SLICED = {"array", "string-array", "nullable-string-array", "nullable-integer", "nullable-boolean", "categorical"}


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

    def index(self, start: int, stop: int) -> np.ndarray:
        """Names of rows from start to stop, as text."""
        return np.asarray(self.frame.index[start:stop], dtype=str)

    def column(self, key: str, start: int, stop: int) -> np.ndarray:
        """Values of rows from start to stop: numbers, bool or str; a missing number is NaN, a missing text "".

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
        """Refuse a column that there is not."""
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
        there = [name for name in self.group if name not in (self._index, "__categories")]
        order = self.group.attrs.get("column-order", ())
        told = [name.decode() if isinstance(name, bytes) else str(name) for name in order]
        first = [name for name in dict.fromkeys(told) if name in there]
        return first + [name for name in there if name not in first]

    def index(self, start: int, stop: int) -> np.ndarray:
        """Names of rows from start to stop, as text."""
        return self._values(self._index, start, stop).astype(str)

    def column(self, key: str, start: int, stop: int) -> np.ndarray:
        """Values of rows from start to stop, as `Frame.column`."""
        self.require(key)
        return self._values(key, start, stop)

    def _values(self, key: str, start: int, stop: int) -> np.ndarray:
        stored = self.group[key]
        kind = _kind(stored)
        if kind == "legacy-categorical":
            return _decoded(read_slice(stored, start, stop), self.group["__categories"][key])
        if kind not in _SLICED:
            raise InputError(f"{self.name}[{key!r}] is stored as {kind!r}, which cannot be carried along.")
        if kind == "categorical":
            return _decoded(read_slice(stored["codes"], start, stop), stored["categories"])
        if kind.startswith("nullable"):
            values, missing = (read_slice(stored[part], start, stop) for part in ("values", "mask"))
            series = pd.Series(plain(pd.Series(values)), dtype=object)
            return plain(series.mask(missing))
        return plain(pd.Series(read_slice(stored, start, stop)))

    def table(self, keys: Sequence[str]) -> pd.DataFrame:
        """Whole columns, those of some names that there are, as pandas holds them.

        Raises
        ------
        rvqa.errors.InputError
            One of them cannot be read.
        """
        index = pd.Index(self.index(0, self._length()).astype(object))
        columns = {}
        for key in (key for key in self.names if key in set(keys)):
            try:
                columns[key] = pd.Series(self._whole(key), index=index)
            except UNREADABLE as error:
                raise InputError(f"{self.name}[{key!r}] cannot be read ({error}). Write the file anew.") from error
        return pd.DataFrame(columns, index=index)

    def readable(self) -> tuple[pd.DataFrame, list[str]]:
        """All columns that can be read, and the names of the others."""
        index = pd.Index(self.index(0, self._length()).astype(object))
        columns, others = {}, []
        for key in self.names:
            try:
                columns[key] = pd.Series(self._whole(key), index=index)
            except UNREADABLE:
                others.append(key)
        return pd.DataFrame(columns, index=index), others

    def _length(self) -> int:
        stored = self.group[self._index]
        return int((stored["values"] if _kind(stored).startswith("nullable") else stored).shape[0])

    def _whole(self, key: str) -> Any:
        stored = self.group[key]
        kind = _kind(stored)
        if kind in ("categorical", "legacy-categorical"):
            new = kind == "categorical"
            codes, categories = (
                (stored["codes"], stored["categories"]) if new else (stored, self.group["__categories"][key])
            )
            ordered = bool((stored if new else categories).attrs.get("ordered", False))
            values = _in_pandas(categories)
            return pd.Categorical.from_codes(np.asarray(codes[()], dtype=np.int64), values, ordered=ordered)
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
    records = stored[()]
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
    texts = [each.decode() if isinstance(each, bytes) else str(each) for each in values.where(~missing, "")]
    return np.array(texts, dtype=str)


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
    if categories.dtype.kind == "U":
        return np.append(categories, "")[codes]
    if (codes < 0).any():
        return np.where(codes < 0, np.nan, categories[codes])
    return categories[codes]


def _in_pandas(stored: Any) -> Any:
    values = read_elem(stored) if "encoding-type" in stored.attrs else stored[()]
    return values.astype(object) if values.dtype.kind == "T" else _texts(values)  # NumPy's own strings


def _texts(values: Any) -> Any:
    """Bytes as text; all else as it is, in the byte order of this machine."""
    if not isinstance(values, np.ndarray):
        return values
    if values.dtype.kind == "S":
        return np.char.decode(values, "utf-8", "replace").astype(object)
    if values.dtype.kind == "O":
        return np.array([each.decode(errors="replace") if isinstance(each, bytes) else each for each in values], object)
    return values.astype(values.dtype.newbyteorder("="), copy=False)
