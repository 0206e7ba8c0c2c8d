"""HDF5 files that are written so that a full disk is an error.

HDF5 crashes the process that closes a file whose last writes fail. Here it never learns of a write that failed: what
the disk did not take stays in memory until the file is closed, and then the error is raised.
"""

import io
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import h5py


@contextmanager
def hdf5_file(path: Path, mode: str) -> Iterator[h5py.File]:
    """Open an HDF5 file to write, "w" for a new one or "r+", so that it can be closed whatever the disk does.

    Raises
    ------
    OSError
        The first write that failed.
    """
    with open(path, "w+b" if mode == "w" else "r+b", buffering=0) as file:
        checked = _Checked(file.fileno(), path)
        try:
            with h5py.File(checked, mode) as opened:
                _checked[opened.filename] = checked
                yield opened
        except Exception as error:
            if checked.failed is not None:
                raise checked.failed from error
            raise
        if checked.failed is not None:
            raise checked.failed


def require_taken(group: Any) -> None:
    """Stop early where the disk did not take all that was written to an HDF5 file of `hdf5_file`.

    Raises
    ------
    OSError
        The first write that failed.
    """
    checked = _checked.get(group.file.filename) if isinstance(group, h5py.Group) else None
    if checked is not None and checked.failed is not None:
        raise checked.failed


class _Checked(io.RawIOBase):
    """A file that HDF5 reads and writes, which takes everything, and knows the first error."""

    def __init__(self, file: int, path: Path) -> None:
        self.file, self.path, self.failed, self._at = file, path, None, 0
        self._size = os.fstat(file).st_size
        self._kept: list[tuple[int, bytes]] = []
        """What the disk did not take: offsets and bytes, the latest last."""

    failed: OSError | None

    def __repr__(self) -> str:
        return str(self.path)  # HDF5 takes it for the name of the file

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._at = offset + (self._size if whence == os.SEEK_END else self._at if whence == os.SEEK_CUR else 0)
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: Any) -> int:
        view, done = memoryview(buffer).cast("B"), 0
        while done < len(view) and (read := os.preadv(self.file, [view[done:]], self._at + done)):
            done += read
        view[done:] = bytes(len(view) - done)
        for at, kept in self._kept:
            first, last = max(at, self._at), min(at + len(kept), self._at + len(view))
            if first < last:
                view[first - self._at : last - self._at] = kept[first - at : last - at]
        self._at += len(view)
        return len(view)

    def write(self, data: Any) -> int:
        view, done = memoryview(data).cast("B"), 0
        try:
            while done < len(view) and self.failed is None:
                done += os.pwrite(self.file, view[done:], self._at + done)
        except OSError as error:
            self.failed = error
        if self.failed is not None:
            self._kept.append((self._at, bytes(view)))
        self._at += len(view)
        self._size = max(self._size, self._at)
        return len(view)

    def truncate(self, size: int | None = None) -> int:
        self._size = self._at if size is None else size
        try:
            os.ftruncate(self.file, self._size)
        except OSError as error:
            self.failed = self.failed or error
        return self._size


_checked: WeakValueDictionary[str, _Checked] = WeakValueDictionary()
"""Files that are open now, by the name that HDF5 has for them."""
