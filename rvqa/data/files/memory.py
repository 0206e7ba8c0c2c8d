"""How much memory the reading of cells may take: what a file states is held against it before anything is made.

A few bytes of a file can stand for any amount of memory: compressed zeros, a shape without values, one long text that
every cell names. Each reader therefore says here what its next piece takes. What is more than may be taken at all is
rejected, with both numbers; large pieces that threads read at once wait for each other.
"""

import os
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rvqa.errors import InputError

SHARE = 0.75
"""Part of the machine's memory that may be taken by default: the rest is for the model, libraries and others."""

SMALL = 2**25
"""Bytes of a piece up to which threads do not wait for each other: 32 MiB."""

INFLATED = 100
"""Bytes that one stored byte of a chunk above `LARGE` may stand for: counts are compressed 3 to 30 times."""

LARGE = 2**28
"""Bytes up to which a chunk may be stored in any number of bytes: 256 MiB."""

TEXT = 100
"""Bytes of a text in memory beside its letters, with its place in a table."""

_UNITS = {"": 2**20, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
_GIVEN = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(?:I?B)?", re.IGNORECASE)

_changed = threading.Condition()
_given: int | None = None
_taken = 0


def size_of(memory: int | str) -> int:
    """Bytes that a setting stands for: a number of MiB, or a text such as "4G".

    Raises
    ------
    rvqa.errors.InputError
        Anything else.

    Examples
    --------
    >>> size_of("4G") == size_of(4096) == 2**32
    True
    """
    found = _GIVEN.fullmatch(str(memory).strip())
    size = int(float(found[1]) * _UNITS[found[2].upper()]) if found else 0
    if size < 1:
        raise InputError(f"memory (--memory) is {memory!r}; expected a number of MiB, or a size such as 4G.")
    return size


def allowed() -> int:
    """Bytes that reading may take at once."""
    return int(SHARE * of_machine()) if _given is None else _given


@contextmanager
def limited(memory: int | str | None) -> Iterator[None]:
    """Let reading take no more than so much memory, in all of this process; None changes nothing.

    Raises
    ------
    rvqa.errors.InputError
        As `size_of`.
    """
    global _given
    before = _given
    _given = before if memory is None else size_of(memory)
    try:
        yield
    finally:
        _given = before


def of_machine() -> int:
    """Bytes of memory of this machine, or what the control group of this process may take of it."""
    sizes = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    told = Path("/proc/self/cgroup")
    for line in told.read_text().splitlines() if told.is_file() else ():
        number, controllers, path = line.split(":", 2)
        root = Path("/sys/fs/cgroup" if number == "0" else "/sys/fs/cgroup/memory")
        if number == "0" or "memory" in controllers.split(","):
            group = root / path.strip("/")
            for each in (group, *group.parents):
                for name in ("memory.max", "memory.limit_in_bytes"):
                    if each.is_relative_to(root) and (file := each / name).is_file():
                        text = file.read_text().strip()
                        sizes += [int(text)] if text.isdigit() else []
    return min(sizes)


def require(size: int, what: str) -> None:
    """Reject a piece of a file that takes more than reading may.

    Parameters
    ----------
    size
        Bytes of memory that it takes while it is read.
    what
        The file, what is read of it and how much there is: "cells.h5ad: the names of 3 cells".

    Raises
    ------
    rvqa.errors.InputError
        With both numbers.
    """
    if size > SMALL and size > (most := allowed()):
        raise InputError(
            f"{what} would take {_amount(size)} of memory, more than the {_amount(most)} that reading may take. "
            "Allow more with --memory (memory=), or check whether the file is damaged."
        )


@contextmanager
def taken(size: int, what: str) -> Iterator[None]:
    """`require`, and have other threads wait where all pieces together would take more; not to be nested."""
    global _taken
    if size <= SMALL:
        yield
        return
    require(size, what)
    with _changed:
        _changed.wait_for(lambda: not _taken or _taken + size <= allowed())
        _taken += size
    try:
        yield
    finally:
        with _changed:
            _taken -= size
            _changed.notify_all()


def require_stored(size: int, stored: int, what: str) -> None:
    """Reject a large piece that the file stores next to nothing of.

    Raises
    ------
    rvqa.errors.InputError
        With both numbers.
    """
    if size > max(LARGE, INFLATED * stored):
        raise InputError(
            f"{what} would take {_amount(size)} of memory, but the file stores {stored:,} bytes of it: it is damaged, "
            "or made to fill memory. Copy or write it again."
        )


def _amount(size: int) -> str:
    return f"{size / 2**30:,.1f} GiB" if size >= 2**30 else f"{size / 2**20:,.0f} MiB"
