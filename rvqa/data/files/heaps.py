"""Where HDF5 keeps texts: a look at each heap before the library walks it, as it walks a damaged one for ever.

A global heap is "GCOL", a version and its size, then objects: a number, a size and as many bytes, the next behind them.
An object without a number is free space, and its size counts from its own beginning: where that is 0, as where a disk
lost a block, HDF5 (2.0 and before) never gets past it, and can be stopped only with the process.
"""

import mmap
import re
from pathlib import Path

import numpy as np

from rvqa.errors import InputError

LOOKED_AT = 2**27
"""Bytes of a file that are looked at: 128 MiB, which takes about 0.1 s."""

_HEAP = re.compile(rb"GCOL\x01\0\0\0")


def require_heaps(path: Path) -> None:
    """Reject an HDF5 file with a heap that does not end.

    Raises
    ------
    rvqa.errors.InputError
        Says where in the file.
    """
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        for found in _HEAP.finditer(mapped, 0, LOOKED_AT):
            at = found.start()
            size = int.from_bytes(mapped[at + 8 : at + 16], "little")
            held = mapped[at + 16 : at + min(size, LOOKED_AT)]  # shorter in a file that is cut short
            words = np.frombuffer(held, dtype="<u8", count=len(held) // 8)
            free = ((words[:-1] & 0xFFFF) == 0) & (words[1:] == 0)
            if free.any() and _stands_still(words):
                raise InputError(
                    f"{path} is damaged: the texts that it keeps at byte {at:,} do not end. Copy or download it again."
                )


def _stands_still(words: np.ndarray) -> bool:
    """Whether the walk over the objects of a heap, 8-byte words, comes to one that has no size."""
    at = 0
    while at + 2 <= len(words):
        number, size = int(words[at]) & 0xFFFF, int(words[at + 1])
        if number:
            size = 16 + size
        if not size:
            return True
        at += -(-size // 8)
    return False
