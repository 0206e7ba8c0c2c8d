"""The `.rvq` format: codes of cells packed to whole bytes, 5 for 8 levels of 32, with names and columns beside them.

All numbers are little-endian. A file is a header of 128 bytes, the codes, a CRC-32 of each block of codes, the table of
cells (Arrow IPC file), and the manifest (JSON, UTF-8), each directly behind the other:

    offset  bytes
    0       8      0x93 "RVQ" CR LF 0x1a LF: a transfer as text breaks it
    8       4      version, 1
    12      2      levels M (8)
    14      2      codewords a level K (32)
    16      8      cells N
    24      4      bytes a cell B: M x ceil(log2 K) bits, rounded up (5)
    28      4      cells a block (65,536)
    32      8      bytes of the table of cells, 0 where there is none
    40      8      bytes of the manifest
    48      4      CRC-32 of the table of cells
    52      4      CRC-32 of the manifest
    56      68     zero
    124     4      CRC-32 of bytes 0 to 123
    128     N x B  codes: the code of level m takes bits b m to b (m + 1) - 1 of a cell's B bytes, b = ceil(log2 K)
    ...     4 each CRC-32 of each block of N x B bytes of codes

The same codes, table and manifest give the same bytes.
"""

import io
import json
import mmap
import struct
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa

from rvqa.atlas.manifest import require_sizes
from rvqa.errors import InputError, about
from rvqa.io import cell_tables
from rvqa.io.cell_tables import REPAIR
from rvqa.io.json_text import object_of

OWN_COLUMNS = ("cell", "file")
"""Columns of the table of cells that are ours: names, and the file each cell is from."""

MAGIC = b"\x93RVQ\r\n\x1a\n"
VERSION = 1
BLOCK = 65_536
_HEADER = struct.Struct("<8sIHHQIIQQII68xI")


def stored_names(columns: Iterable[str], levels: int) -> dict[str, str]:
    """Name in a store of each column of obs that is carried along: its own, or another where ours has that name."""
    taken = {*OWN_COLUMNS, *(f"code_{level + 1}" for level in range(levels))}
    columns = list(dict.fromkeys(columns))
    names = {name: name for name in columns if name not in taken}
    for name in columns:
        if name in taken:
            other = f"obs_{name}"
            while other in names.values() or other in taken:
                other = f"{other}_"
            names[name] = other
    return {name: names[name] for name in columns}


def pack(codes_NM: np.ndarray, entries: int) -> np.ndarray:
    """Codes uint8 [N, M] as bytes uint8 [N, B]."""
    N, M = codes_NM.shape
    bits, size = _bits(entries), cell_bytes(M, entries)
    packed_N = np.zeros(N, dtype="<u8")
    for level in range(M):
        packed_N |= codes_NM[:, level].astype(np.uint64) << np.uint64(bits * level)
    return packed_N.view(np.uint8).reshape(N, 8)[:, :size]


def unpack(bytes_NB: np.ndarray, levels: int, entries: int) -> np.ndarray:
    """Codes uint8 [N, M] of bytes uint8 [N, B]."""
    packed_N = as_integers(bytes_NB)
    bits = _bits(entries)
    codes_NM = np.empty((len(bytes_NB), levels), dtype=np.uint8)
    for level in range(levels):
        codes_NM[:, level] = (packed_N >> np.uint64(bits * level)) & np.uint64((1 << bits) - 1)
    return codes_NM


def as_integers(bytes_NB: np.ndarray) -> np.ndarray:
    """Packed cells as one integer each, uint64 [N]: equal where all codes are."""
    wide_N8 = np.zeros((len(bytes_NB), 8), dtype=np.uint8)
    wide_N8[:, : bytes_NB.shape[1]] = bytes_NB
    return wide_N8.view("<u8")[:, 0]


def require_codes(codes_NM: np.ndarray, entries: int, path: Path) -> None:
    """Reject codes that stand for no codeword."""
    if (most := int(codes_NM.max(initial=0))) >= entries:
        raise InputError(f"{path} has the code {most}; expected 0 to {entries - 1}. {REPAIR}")


def cell_bytes(levels: int, entries: int) -> int:
    """Bytes of one cell.

    Raises
    ------
    rvqa.errors.InputError
        More than 8.
    """
    size = -(-levels * _bits(entries) // 8)
    if size > 8:
        raise InputError(f"{levels} levels of {entries} codes take {size} bytes a cell; .rvq holds up to 8.")
    return size


def _bits(entries: int) -> int:
    return max(1, (entries - 1).bit_length())


def write(
    path: Path,
    codes: Iterable[np.ndarray],
    tables: Iterable[pa.Table],
    manifest: dict[str, Any],
    *,
    cells: int,
    levels: int,
    entries: int,
) -> None:
    """Write a file in one pass; memory is that of the largest part.

    Parameters
    ----------
    path
        File to write; not renamed, see `rvqa.io.files.whole_file`.
    codes
        Parts of the codes, uint8 [n, M].
    tables
        Parts of the table of cells, one row a cell, all of one schema.
    manifest
        What JSON can hold.
    cells, levels, entries
        N, M, K.
    """
    size = cell_bytes(levels, entries)
    with open(path, "wb") as file:
        file.write(bytes(_HEADER.size))
        sums, rest, written = [], b"", 0
        for part_NM in codes:
            packed = rest + pack(part_NM, entries).tobytes()
            whole = len(packed) - len(packed) % (BLOCK * size)
            for start in range(0, whole, BLOCK * size):
                sums.append(zlib.crc32(packed[start : start + BLOCK * size]))
            file.write(packed[:whole])
            rest = packed[whole:]
            written += len(part_NM)
        if rest:
            sums.append(zlib.crc32(rest))
            file.write(rest)
        if written != cells:
            raise ValueError(f"{written} cells were given, {cells} announced")
        file.write(np.array(sums, dtype="<u4").tobytes())
        told = _Counted(file)
        writer = None
        for table in tables:
            if writer is None:
                writer = pa.ipc.new_file(told, table.schema)
            writer.write_table(table)
        if writer is not None:
            writer.close()
        text = json.dumps(manifest, sort_keys=True, ensure_ascii=False).encode()
        file.write(text)
        file.seek(0)
        file.write(_header(levels, entries, cells, size, told.written, len(text), told.crc, zlib.crc32(text)))


class _Counted(io.RawIOBase):
    """Passes on what is written, and keeps its length and CRC-32."""

    def __init__(self, file: Any) -> None:
        self.file, self.written, self.crc = file, 0, 0

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        self.crc = zlib.crc32(view, self.crc)
        self.written += len(view)
        self.file.write(view)
        return len(view)

    def tell(self) -> int:
        return self.written


def _header(levels: int, entries: int, cells: int, size: int, table: int, text: int, *crcs: int) -> bytes:
    first = _HEADER.pack(MAGIC, VERSION, levels, entries, cells, size, BLOCK, table, text, *crcs, 0)[:-4]
    return first + struct.pack("<I", zlib.crc32(first))


@dataclass(frozen=True, eq=False)
class RvqFile:
    """An open file; codes are read from a memory map as they are asked for.

    Attributes
    ----------
    path, n_cells, levels, entries
        Of the file.
    """

    path: Path
    n_cells: int
    levels: int
    entries: int
    _map: mmap.mmap
    _table: tuple[int, int, int]
    _manifest: tuple[int, int, int]

    @classmethod
    def open(cls, path: str | Path) -> "RvqFile":
        """Open a file; its header and length are checked, its codes by `verify`.

        Raises
        ------
        rvqa.errors.InputError
            No such file, not of this format or version, cut short, or a damaged header.
        """
        file = Path(path)
        if not file.is_file():
            raise InputError(f"{file} does not exist or is not a file. Give a .rvq file.")
        with open(file, "rb") as opened:
            head = opened.read(_HEADER.size)
            if head[:8] != MAGIC[: len(head)] or len(head) < 8:
                raise InputError(f"{file} is not a .rvq file. Make one with `rvqa encode CELLS -m MODEL -o CODES.rvq`.")
            if len(head) < _HEADER.size:
                raise InputError(f"{file} is cut short: {len(head)} bytes. {REPAIR}")
            _, version, levels, entries, cells, size, block, table, text, *crcs, crc = _HEADER.unpack(head)
            if zlib.crc32(head[:-4]) != crc:
                raise InputError(f"The header of {file} is damaged. {REPAIR}")
            if version != VERSION or block != BLOCK:
                raise InputError(f"{file} has format version {version}; this rvqa reads version {VERSION}.")
            require_sizes(levels, entries, file)
            with about(file):
                expected = cell_bytes(levels, entries)
            if size != expected:
                raise InputError(f"{file} has {size} bytes a cell for {levels} levels of {entries} codes. {REPAIR}")
            sums = 4 * -(-cells // BLOCK)
            at = _HEADER.size + cells * size + sums
            there = file.stat().st_size
            if there != at + table + text:
                raise InputError(
                    f"{file} is cut short or was added to: {there:,} of {at + table + text:,} bytes. {REPAIR}"
                )
            mapped = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)
        return cls(file, cells, levels, entries, mapped, (at, table, crcs[0]), (at + table, text, crcs[1]))

    @cached_property
    def packed(self) -> np.ndarray:
        """All codes as they are stored, uint8 [N, B], a read-only view of the file."""
        size = cell_bytes(self.levels, self.entries)
        count = self.n_cells * size
        return np.frombuffer(self._map, dtype=np.uint8, count=count, offset=_HEADER.size).reshape(-1, size)

    def codes(self, rows: slice | np.ndarray) -> np.ndarray:
        """Codes uint8 [n, M] of some cells.

        Raises
        ------
        rvqa.errors.InputError
            A code is K or more, which bits have room for where K is not a power of two.
        """
        codes_NM = unpack(self.packed[rows], self.levels, self.entries)
        if 1 << _bits(self.entries) > self.entries:
            require_codes(codes_NM, self.entries, self.path)
        return codes_NM

    @cached_property
    def manifest(self) -> dict[str, Any]:
        """What the file says of itself: model, inputs, settings."""
        return object_of(self._section(self._manifest, "manifest"), f"The manifest of {self.path}", REPAIR)

    def table(self) -> pa.Table | None:
        """Table of cells, None where there is none.

        Raises
        ------
        rvqa.errors.InputError
            Damaged, or made to do harm: a checksum that agrees proves nothing there.
        """
        stored = self._section(self._table, "table of cells")
        return cell_tables.of_ipc(stored, self.n_cells, self.path) if len(stored) else None

    def verify(self) -> None:
        """Compare every checksum, and read the manifest and the table of cells.

        Raises
        ------
        rvqa.errors.InputError
            Names the first cells that are damaged.
        """
        at = _HEADER.size + self.packed.size
        sums = np.frombuffer(self._map, dtype="<u4", count=-(-self.n_cells // BLOCK), offset=at)
        for i, expected in enumerate(sums):
            rows = slice(i * BLOCK, min((i + 1) * BLOCK, self.n_cells))
            if zlib.crc32(self.packed[rows].data) != expected:
                raise InputError(f"{self.path} is damaged in cells {rows.start:,} to {rows.stop:,}. {REPAIR}")
        _ = self.manifest, self.table()

    def _section(self, where: tuple[int, int, int], name: str) -> memoryview:
        at, size, crc = where
        stored = memoryview(self._map)[at : at + size]
        if zlib.crc32(stored) != crc:
            raise InputError(f"The {name} of {self.path} is damaged. {REPAIR}")
        return stored


class _Sliced(Protocol):
    @property
    def n_cells(self) -> int: ...

    def codes(self, rows: slice) -> np.ndarray: ...


def parts_of(file: _Sliced, cells: int = BLOCK) -> Iterator[np.ndarray]:
    """Codes part by part."""
    for start in range(0, file.n_cells, cells):
        yield file.codes(slice(start, start + cells))
