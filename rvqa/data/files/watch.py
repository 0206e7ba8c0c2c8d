"""Whether the file of a run is still the one that it began with: by inode, size and time of every file that is read.

A file that is overwritten while it is read would give codes of two files under the name of one. One that is replaced by
another of its name counts as changed too: what is open stays the old one, but what the output says it is made of, and
what a copy is made of, is the new one.
"""

import hashlib
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from rvqa.data.files import matrix_market
from rvqa.errors import InputError

_SHARE = 20
"""Time between two looks at a folder, in units of the time that one takes."""


class InputChanged(InputError):
    """A file was changed while it was read."""


class Watch:
    """What a file, a zarr store or a Matrix Market folder was when this was made.

    Parameters
    ----------
    path
        Need not be there: whoever opens it says so.
    """

    def __init__(self, path: str | Path) -> None:
        self.path, self._next = Path(path), 0.0
        self._seen = self._look()

    def require_unchanged(self, *, soon: bool = False) -> None:
        """Look again; `soon` only at files, and at a folder where the last look was long ago.

        Raises
        ------
        InputChanged
            It is another.
        """
        if soon and self.path.is_dir() and time.monotonic() < self._next:
            return
        if self._look() != self._seen:
            raise InputChanged(
                f"{self.path} was changed or replaced while it was read; nothing is made of it. Run the command again "
                "when nothing writes to it."
            )

    def identity(self) -> dict[str, int | str]:
        """Bytes, time of the last change in ns and, of several files, a digest; the same wherever it is mounted."""
        modified = max((each[3] for each in self._seen), default=0)
        told: dict[str, int | str] = {"bytes": sum(size for _, _, size, _ in self._seen), "modified": modified}
        if len(self._seen) == 1:
            return told
        named = [(name, size, modified) for name, _, size, modified in self._seen]
        return told | {"files": hashlib.sha256(repr(named).encode("utf-8", "surrogateescape")).hexdigest()[:16]}

    def _look(self) -> list[tuple[str, int, int, int]]:
        started = time.monotonic()
        seen = []
        with suppress(InputError):  # whoever opens it says what is missing or cannot be followed
            for file in _files(self.path):
                with suppress(OSError):
                    told = os.stat(file)
                    name = os.path.relpath(file, self.path)
                    seen.append((name, told.st_ino, told.st_size, told.st_mtime_ns))
        now = time.monotonic()
        self._next = now + _SHARE * (now - started)
        return sorted(seen)


def watched(given: Sequence[Any]) -> list[Watch | None]:
    """A watch of each file; None for an AnnData."""
    return [Watch(each) if isinstance(each, str | Path) else None for each in given]


def _files(path: Path) -> Iterator[str | Path]:
    if path.suffix == ".zarr":
        for place, _, files in os.walk(path):
            yield from (os.path.join(place, name) for name in files)
    elif (market := matrix_market.find_matrix_market(path)) is not None:
        yield from market
    else:
        yield path
