"""HDF5 datasets read by several threads at once.

The HDF5 library does one thing at a time, decompression included. Where a dataset is laid out plainly, its library is
only asked where a chunk's bytes are; they are read and decompressed beside it, in as many threads as there are. Other
layouts and filters go through h5py as they are, one thread at a time.
"""

import os
import threading
from importlib import import_module
from typing import Any

import h5py
import numpy as np
from isal import isal_zlib

from rvqa.errors import InputError

_DEFLATE, _SHUFFLE = 1, 2
_LOCK = threading.RLock()


class Dataset1D:
    """A dataset of one axis.

    Parameters
    ----------
    dataset
        Open; its file must stay so.
    """

    def __init__(self, dataset: h5py.Dataset) -> None:
        self.dataset = dataset
        self.dtype = dataset.dtype
        self._fd = -1
        self._filters: list[int] = []
        self._begin: int | None = None
        with _LOCK:
            plist = dataset.id.get_create_plist()
            filters = [plist.get_filter(i)[0] for i in range(plist.get_nfilters())]
            require_filters(filters)
            plain = (
                dataset.file.driver == "sec2"
                and dataset.file.userblock_size == 0
                and dataset.dtype.kind in "iufb"
                and dataset.dtype.itemsize <= 8
                and not dataset.is_virtual
                and not dataset.external
            )
            if plain and dataset.chunks is not None and filters in ([], [_DEFLATE], [_SHUFFLE], [_SHUFFLE, _DEFLATE]):
                self._filters = filters
                self._fd = os.open(dataset.file.filename, os.O_RDONLY)
            elif plain and dataset.chunks is None and (begin := dataset.id.get_offset()) is not None:
                self._begin = begin
                self._fd = os.open(dataset.file.filename, os.O_RDONLY)

    def __len__(self) -> int:
        return self.dataset.shape[0]

    def __del__(self) -> None:
        if getattr(self, "_fd", -1) >= 0:
            os.close(self._fd)

    def read(self, start: int, stop: int) -> np.ndarray:
        """Elements from start to stop, in memory of their own."""
        out = np.empty(stop - start, dtype=self.dtype)
        if self._begin is not None:
            self._fill(out.data.cast("B"), self._begin + start * self.dtype.itemsize)
        elif self._fd >= 0 and len(out):
            step = self.dataset.chunks[0]
            for first in range(start - start % step, stop, step):
                chunk = self._chunk(first, step)
                begin, end = max(start, first), min(stop, first + step)
                out[begin - start : end - start] = chunk[begin - first : end - first]
        elif len(out):
            with _LOCK:
                self.dataset.read_direct(out, np.s_[start:stop])
        return out

    def _chunk(self, first: int, step: int) -> np.ndarray:
        with _LOCK:
            info = self.dataset.id.get_chunk_info_by_coord((first,))
            if info.byte_offset is None or info.filter_mask:  # never written, or some filters skipped
                return self.dataset[first : first + step]
        stored = self._bytes(info.byte_offset, info.size)
        if _DEFLATE in self._filters:
            stored = isal_zlib.decompress(stored, bufsize=step * self.dtype.itemsize)
        if len(stored) != step * self.dtype.itemsize:
            raise OSError(
                f"a chunk of {self.dataset.name} in {self.dataset.file.filename} holds {len(stored)} bytes; expected "
                f"{step * self.dtype.itemsize}"
            )
        if _SHUFFLE in self._filters:
            planes = np.frombuffer(stored, dtype=np.uint8).reshape(self.dtype.itemsize, step)
            return np.ascontiguousarray(planes.T).view(self.dtype)[:, 0]
        return np.frombuffer(stored, dtype=self.dtype)

    def _bytes(self, offset: int, size: int) -> bytes:
        stored = os.pread(self._fd, size, offset)
        while len(stored) < size:
            more = os.pread(self._fd, size - len(stored), offset + len(stored))
            if not more:
                raise OSError(f"{self.dataset.file.filename} ends inside {self.dataset.name}")
            stored += more
        return stored

    def _fill(self, out: memoryview, offset: int) -> None:
        done = 0
        while done < len(out):
            read = os.preadv(self._fd, [out[done:]], offset + done)
            if not read:
                raise OSError(f"{self.dataset.file.filename} ends inside {self.dataset.name}")
            done += read


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


def read_slice(dataset: Any, start: int, stop: int) -> np.ndarray:
    """Part of any dataset along its first axis, such as names or dense rows, through h5py."""
    with _LOCK:
        return dataset[start:stop]
