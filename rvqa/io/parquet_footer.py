"""Codecs of the column chunks of a parquet file, read out of its footer.

pyarrow would tell them one chunk at a time, but ends the process at some damaged footers where it is asked to. The
footer is Thrift's compact protocol (apache/thrift, doc/specs/thrift-compact-protocol.md), of which all but one field
is skipped here: FileMetaData.row_groups (4), RowGroup.columns (1), ColumnChunk.meta_data (3), ColumnMetaData.codec (4).
"""

from pathlib import Path
from typing import Any

UNCOMPRESSED, SNAPPY = 0, 1
NAMES = ("UNCOMPRESSED", "SNAPPY", "GZIP", "LZO", "BROTLI", "LZ4", "ZSTD", "LZ4_RAW")

_CODEC: dict[int, Any] = {4: {1: {3: {4: None}}}}


def codecs(path: Path) -> set[int]:
    """Numbers of the codecs that are named in a file.

    Raises
    ------
    IndexError, RecursionError
        The footer is damaged.
    """
    with path.open("rb") as file:
        file.seek(-8, 2)
        size = int.from_bytes(file.read(4), "little")
        file.seek(-8 - size, 2)
        footer = _Footer(file.read(size))
    footer.struct(_CODEC)
    return footer.found


class _Footer:
    def __init__(self, data: bytes) -> None:
        self.data, self.at, self.found = data, 0, set[int]()

    def struct(self, wanted: Any) -> None:
        """Pass over a struct, looking into the fields that are wanted."""
        number = 0
        while head := self._byte():
            number = number + (head >> 4) if head >> 4 else self._signed()
            if head & 15 not in (1, 2):  # true and false have no bytes of their own
                inside = wanted is not None and number in wanted
                self._value(head & 15, wanted[number] if inside else None, keep=inside and wanted[number] is None)

    def _value(self, kind: int, wanted: Any, *, keep: bool = False) -> None:
        if kind in (4, 5, 6):
            value = self._signed()
            if keep:
                self.found.add(value)
        elif kind in (1, 2, 3, 7):
            self.at += 8 if kind == 7 else 1
        elif kind == 8:
            size = self._varint()
            self.at += size
        elif kind in (9, 10):
            head = self._byte()
            for _ in range(self._varint() if head >> 4 == 15 else head >> 4):
                self._value(head & 15, wanted)
        elif kind == 11:
            if size := self._varint():
                kinds = self._byte()
                for _ in range(size):
                    self._value(kinds >> 4, None)
                    self._value(kinds & 15, None)
        elif kind == 12:
            self.struct(wanted)
        else:
            raise IndexError(f"its footer holds a value of kind {kind}")

    def _byte(self) -> int:
        self.at += 1
        return self.data[self.at - 1]

    def _varint(self) -> int:
        value = shift = 0
        while True:
            byte = self._byte()
            value |= (byte & 127) << shift
            if byte < 128:
                return value
            shift += 7

    def _signed(self) -> int:
        value = self._varint()
        return (value >> 1) ^ -(value & 1)
