"""HDF5 datasets read by several threads at once.

The HDF5 library does one thing at a time, decompression included. Where a dataset is laid out plainly, its library is
only asked where a chunk's bytes are; they are read and decompressed beside it, in as many threads as there are, and
into no more memory than the chunk takes. Other layouts and filters go through h5py as they are, one thread at a time.

What is damaged is an `InputError` with the file, the dataset and the chunk.
"""

import math
import os
import threading
from importlib import import_module
from itertools import product
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from isal.igzip_lib import DECOMP_ZLIB, IgzipDecompressor

from rvqa.data.files import memory, stores
from rvqa.errors import InputError
from rvqa.io.files import UNREADABLE, sentence

_DEFLATE, _SHUFFLE = 1, 2
_LOCK = threading.RLock()

_DESCRIPTOR = np.dtype([("size", "<u4"), ("place", "<u8"), ("number", "<u4")])
"""What HDF5 stores for a text of any length: how long it is, and where."""

_STEP = 2**24
"""Bytes of texts of one length that become objects at a time."""


class Dataset:
    """A dataset, read along its first axis.

    Parameters
    ----------
    dataset
        Open; its file must stay so.
    dtype
        Of what is stored for an element, where that is not the dataset's.

    Raises
    ------
    rvqa.errors.InputError
        A chunk takes more memory than may be taken, or HDF5 does not know a filter.
    """

    def __init__(self, dataset: h5py.Dataset, dtype: np.dtype | None = None) -> None:
        self.dataset = dataset
        self.dtype = dataset.dtype if dtype is None else dtype
        self.shape = dataset.shape
        self._place = place_of(dataset)
        self._fd = -1
        self._filters: list[int] = []
        self._begin: int | None = None
        self._chunks = dataset.chunks
        with _LOCK:
            plist = dataset.id.get_create_plist()
            filters = [plist.get_filter(i)[0] for i in range(plist.get_nfilters())]
            require_filters(filters)
            plain = (
                dataset.file.driver == "sec2"
                and dataset.file.userblock_size == 0
                and (dtype is not None or _as_stored(dataset))
            )
            if plain and self._chunks and filters in ([], [_DEFLATE], [_SHUFFLE], [_SHUFFLE, _DEFLATE]):
                self._filters = filters
                self._fd = os.open(dataset.file.filename, os.O_RDONLY)
            elif plain and not self._chunks and (begin := dataset.id.get_offset()) is not None:
                self._begin = begin
                self._fd = os.open(dataset.file.filename, os.O_RDONLY)
        self._chunk_bytes = math.prod(self._chunks) * self.dtype.itemsize if self._chunks else 0
        self._what = f"{self._place}: a chunk of {' x '.join(f'{n:,}' for n in self._chunks or ())} values"
        memory.require(3 * self._chunk_bytes, self._what)

    def __len__(self) -> int:
        return int(self.shape[0])

    def __del__(self) -> None:
        if getattr(self, "_fd", -1) >= 0:
            os.close(self._fd)

    @property
    def plain(self) -> bool:
        """Whether it is read beside the HDF5 library."""
        return self._fd >= 0

    def read(self, start: int, stop: int) -> np.ndarray:
        """Elements from start to stop, in memory of their own.

        Raises
        ------
        rvqa.errors.InputError
            They are damaged, or take more memory than may be taken.
        """
        if not 0 <= start <= stop <= len(self):
            raise InputError(
                f"{self._place} holds {len(self):,} values; {stop:,} were expected. Copy or write the file again."
            )
        shape = (stop - start, *self.shape[1:])
        size = math.prod(shape) * self.dtype.itemsize
        memory.require(size, f"{self._place}: {' x '.join(f'{n:,}' for n in shape)} values")
        if not self.plain:
            return self._through_h5py(start, stop)
        out = np.empty(shape, dtype=self.dtype)
        if self._begin is not None:
            if out.size:
                self._fill(out.reshape(-1).view(np.uint8).data, self._begin + start * (size // len(out)))
        elif out.size:
            bounds = [(start, stop), *((0, n) for n in shape[1:])]
            steps = [range(low - low % n, high, n) for (low, high), n in zip(bounds, self._chunks, strict=True)]
            for first in product(*steps):
                spans = [
                    (max(low, at), min(high, at + n))
                    for (low, high), at, n in zip(bounds, first, self._chunks, strict=True)
                ]
                target = tuple(slice(a - low, b - low) for (a, b), (low, _) in zip(spans, bounds, strict=True))
                source = tuple(slice(a - at, b - at) for (a, b), at in zip(spans, first, strict=True))
                with memory.taken(3 * self._chunk_bytes, self._what):
                    out[target] = self._chunk(first)[source]
        return out

    def _chunk(self, first: tuple[int, ...]) -> np.ndarray:
        """The chunk that begins at some element."""
        try:
            with _LOCK:
                info = self.dataset.id.get_chunk_info_by_coord(first)
            if info.byte_offset is None:  # never written
                fill = 0 if self.dtype == _DESCRIPTOR else self.dataset.fillvalue
                return np.full(self._chunks, fill, dtype=self.dtype)
            used = [each for i, each in enumerate(self._filters) if not info.filter_mask >> i & 1]
            stored = self._bytes(info.byte_offset, info.size)
            if _DEFLATE in used:
                memory.require_stored(self._chunk_bytes, len(stored), self._what)
                inflate = IgzipDecompressor(flag=DECOMP_ZLIB)
                stored = inflate.decompress(stored, self._chunk_bytes)
                if not inflate.eof and (inflate.decompress(b"", 1) or not inflate.eof):
                    raise OSError(f"its compressed values do not end after {self._chunk_bytes:,} bytes")
            if len(stored) != self._chunk_bytes:
                raise OSError(f"it holds {len(stored):,} bytes, not {self._chunk_bytes:,}")
        except InputError:
            raise
        except UNREADABLE as error:
            raise damaged_chunk(self.dataset, first, error) from error
        if _SHUFFLE in used:
            planes = np.frombuffer(stored, dtype=np.uint8).reshape(self.dtype.itemsize, -1)
            return np.ascontiguousarray(planes.T).view(self.dtype).reshape(self._chunks)
        return np.frombuffer(stored, dtype=self.dtype).reshape(self._chunks)

    def _bytes(self, offset: int, size: int) -> bytes:
        there = os.fstat(self._fd).st_size
        if offset + size > there:
            raise OSError(f"it should end at byte {offset + size:,}, but the file has {there:,}")
        stored = os.pread(self._fd, size, offset)
        while len(stored) < size and (more := os.pread(self._fd, size - len(stored), offset + len(stored))):
            stored += more
        return stored

    def _fill(self, out: memoryview, offset: int) -> None:
        done = 0
        while done < len(out):
            read = os.preadv(self._fd, [out[done:]], offset + done)
            if not read:
                raise InputError(
                    f"{self._place} should end at byte {offset + len(out):,} or later, but the file has "
                    f"{offset + done:,}. Copy or download it again."
                )
            done += read

    def _through_h5py(self, start: int, stop: int) -> np.ndarray:
        try:
            with memory.taken(2 * self._chunk_bytes, self._what), _LOCK:
                return self.dataset[start:stop]
        except InputError:
            raise
        except UNREADABLE as error:
            raise damaged_part(self.dataset, start, stop, error) from error


def _as_stored(dataset: h5py.Dataset) -> bool:
    """Whether the bytes of an element are those that NumPy has in memory."""
    dtype = dataset.dtype
    if dtype.kind not in "iufbS" or (dtype.kind != "S" and dtype.itemsize > 8):
        return False
    return dataset.id.get_type().equal(h5py.h5t.py_create(dtype, logical=True))


def read_slice(stored: Any, start: int, stop: int) -> np.ndarray:
    """Part of a dataset of HDF5, or of an array of zarr, along its first axis; texts are objects of bytes or str.

    Raises
    ------
    rvqa.errors.InputError
        It is damaged, or takes more memory than may be taken.
    """
    if not isinstance(stored, h5py.Dataset):
        return stores.read(stored, start, stop)
    stop = min(stop, stored.shape[0] if stored.shape else stop)
    if not stored.shape:
        raise InputError(f"{place_of(stored)} has no axis; expected a value for each row. Write the file anew.")
    reader = Dataset(stored)
    if stored.dtype.kind == "S":
        what = f"{place_of(stored)}: {stop - start:,} texts of up to {stored.dtype.itemsize:,} bytes"
        memory.require(2 * min(_STEP, (stop - start) * stored.dtype.itemsize) + memory.TEXT * (stop - start), what)
        step = max(1, _STEP // stored.dtype.itemsize)
        parts = [reader.read(at, min(at + step, stop)).astype(object) for at in range(start, stop, step)]
        return np.concatenate(parts) if parts else np.zeros(0, dtype=object)
    if h5py.check_string_dtype(stored.dtype) is not None:
        letters = _letters(stored, start, stop)
        memory.require(2 * letters + memory.TEXT * (stop - start), f"{place_of(stored)}: {stop - start:,} texts")
    return reader.read(start, stop)


def _letters(dataset: h5py.Dataset, start: int, stop: int) -> int:
    """Bytes of texts of any length, of which many may be stored as one.

    Raises
    ------
    rvqa.errors.InputError
        One is longer than the file, or all are far longer.
    """
    if dataset.file.id.get_create_plist().get_sizes() != (8, 8) or not dataset.id.get_storage_size():
        return 0
    plain = Dataset(dataset, _DESCRIPTOR)
    if not plain.plain and not dataset.chunks:
        return 0
    sizes = (plain.read(start, stop) if plain.plain else _twin(dataset)[start:stop])["size"]
    there, letters = dataset.file.id.get_filesize(), int(sizes.sum(dtype=np.int64))
    what = f"{place_of(dataset)}: {stop - start:,} texts"
    if len(sizes) and int(sizes.max()) > there:
        raise InputError(
            f"{what} are damaged: one should have {int(sizes.max()):,} bytes, but the file has {there:,}. Copy or "
            "download it again."
        )
    memory.require_stored(letters, there, what)
    return letters


def place_of(stored: Any) -> str:
    """Name of the file and of an object in it, for messages."""
    hdf5 = isinstance(stored, h5py.Dataset | h5py.Group)
    file = stored.file.filename if hdf5 else str(getattr(stored.store_path.store, "root", ""))
    return f"{Path(file).name}: /{str(stored.name).strip('/')}"


def damaged_chunk(stored: Any, first: tuple[int, ...], error: BaseException) -> InputError:
    """What to raise where the chunk that begins at some element cannot be read."""
    ends = [min(at + n, size) for at, n, size in zip(first, stored.chunks, stored.shape, strict=True)]
    axes = ("values",) if len(first) == 1 else ("rows", "columns", *("values",) * len(first))
    where = ", ".join(f"{axis} {at:,} to {end:,}" for axis, at, end in zip(axes, first, ends, strict=False))
    number = ", ".join(str(at // n) for at, n in zip(first, stored.chunks, strict=True))
    return InputError(
        f"{place_of(stored)}: chunk {number} ({where}) cannot be read: {sentence(error)} Copy or download the file "
        "again."
    )


def damaged_part(stored: Any, start: int, stop: int, error: BaseException) -> InputError:
    """What to raise where a part cannot be read: the first of its chunks that cannot be read alone is named."""
    if chunks := getattr(stored, "chunks", None):
        spans = [(start, stop), *((0, n) for n in stored.shape[1:])]
        steps = [range(low - low % n, high, n) for (low, high), n in zip(spans, chunks, strict=True)]
        for first in product(*steps):
            try:
                with _LOCK:
                    stored[tuple(slice(at, at + n) for at, n in zip(first, chunks, strict=True))]
            except UNREADABLE as own:
                return damaged_chunk(stored, first, own)
    return InputError(
        f"{place_of(stored)}: rows {start:,} to {stop:,} cannot be read: {sentence(error)} Copy or download the file "
        "again."
    )


def require_filters(filters: list[int]) -> None:
    """Have the HDF5 library know these filters (zstd, blosc, ...), by the package hdf5plugin where it does not.

    Raises
    ------
    rvqa.errors.InputError
        There is no such package here, or it does not know a filter.
    """
    if all(map(h5py.h5z.filter_avail, filters)):
        return
    try:
        import_module("hdf5plugin")  # registers its filters
    except ImportError as error:
        raise InputError(
            f"The counts are compressed with the HDF5 filter {_absent(filters)}, which HDF5 does not bring along. "
            "Install hdf5plugin, or write the file with gzip."
        ) from error
    if not all(map(h5py.h5z.filter_avail, filters)):
        raise InputError(
            f"The counts are compressed with the HDF5 filter {_absent(filters)}, which even hdf5plugin does not know. "
            "Write the file with gzip."
        )


def _absent(filters: list[int]) -> int:
    return next(each for each in filters if not h5py.h5z.filter_avail(each))


def _twin(dataset: h5py.Dataset) -> np.ndarray:
    """Descriptors of texts that are stored in chunks with any filters: the same chunks in a file in memory."""
    with h5py.File.in_memory() as file:
        given, plist = dataset.id.get_create_plist(), h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        plist.set_chunk(dataset.chunks)
        for code, flags, values, _ in (given.get_filter(i) for i in range(given.get_nfilters())):
            plist.set_filter(code, flags, values)
        kind = h5py.h5t.py_create(np.dtype(("V", _DESCRIPTOR.itemsize)))
        space = h5py.h5s.create_simple(dataset.shape)
        twin = h5py.h5d.create(file.id, b"twin", kind, space, plist)
        for i in range(dataset.id.get_num_chunks()):
            place = dataset.id.get_chunk_info(i).chunk_offset
            mask, stored = dataset.id.read_direct_chunk(place)
            twin.write_direct_chunk(place, stored, mask)
        return file["twin"][()].view(_DESCRIPTOR)
