"""Codes and tables of cells out of a zarr store as `rvqa.atlas.outputs` writes it, and of no other kind.

A store is many files of JSON and compressed chunks, any of which may be made to do harm: to lead out of the store, to
name other codecs, to be missing, or to unpack to more than a chunk holds. The first three are rejected when it is
opened, the last when it is read.
"""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import zarr
from zarr.codecs import ZstdCodec
from zarr.registry import register_codec

from rvqa.atlas.manifest import require_manifest
from rvqa.atlas.rvq import require_codes
from rvqa.errors import InputError
from rvqa.io import cell_tables
from rvqa.io.cell_tables import LARGEST_TASK, REPAIR
from rvqa.io.json_text import object_in, shown

LARGEST_CHUNK = 2**28
"""Bytes of a chunk of text, stored or unpacked: 4 kB for each of 65,536 cells."""

_CODECS = {
    "codes": ["sharding_indexed", ["bytes", "zstd"], ["bytes", "crc32c"]],
    "text": ["vlen-utf8", "zstd"],
    "numbers": ["bytes", "zstd"],
}
"""Names of the codecs of each kind of array, those inside a shard and of its index in lists of their own."""


class Store:
    """An open store.

    Parameters
    ----------
    path
        A folder.

    Raises
    ------
    rvqa.errors.InputError
        Not a store of codes, or not as rvqa writes it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        if not (path / "zarr.json").is_file():
            raise InputError(f"{path} is not a zarr store of codes: it has no zarr.json.")
        self._bytes = _bytes_of(path)
        told = object_in(path / "zarr.json", REPAIR)
        manifest = told["attributes"].get("rvqa") if isinstance(told.get("attributes"), dict) else None
        if not isinstance(manifest, dict):
            raise InputError(f"{path} is a zarr store, but not of codes. Give what `rvqa encode -o` wrote.")
        require_manifest(manifest, path)
        self.manifest: dict[str, Any] = manifest
        with _bounded():
            group = zarr.open_group(path, mode="r", zarr_format=3)
            self._codes = self._array(group, "codes", "codes")
            self._columns = {"cell": self._array(group, "obs_names", "text")}
            for name in manifest["settings"]["obs"]:
                self._columns[name] = self._array(group, f"obs/{name}", "")
        for name, array in (("codes", self._codes), ("obs_names", self._columns["cell"])):
            _require_chunks(path, name, array)

    def codes(self, rows: slice | np.ndarray) -> np.ndarray:
        """Codes uint8 [n, M] of some cells."""
        with cell_tables.reading(self.path):
            stored = self._codes[rows] if isinstance(rows, slice) else self._codes.oindex[rows]
        codes_NM = np.asarray(stored)
        require_codes(codes_NM, self.manifest["entries"], self.path)
        return codes_NM

    def table(self) -> pa.Table:
        """Names of the cells and the columns that were carried along."""
        cells = self.manifest["cells"]
        most, taken = cell_tables.UNPACKED + cell_tables.RATIO * self._bytes, 8 * cells * len(self._columns)
        columns: dict[str, pa.ChunkedArray] = {}
        with cell_tables.reading(self.path):
            for name, array in self._columns.items():
                parts = []
                for start in range(0, cells, array.chunks[0]):
                    if taken > most:
                        raise cell_tables.too_large(self.path, taken, self._bytes)
                    parts.append(pa.array(np.asarray(array[start : start + array.chunks[0]])))
                    taken += parts[-1].nbytes
                columns[name] = pa.chunked_array(parts or [pa.array(np.asarray(array[:]))])
        table = pa.table(columns)
        cell_tables.require_columns(table.schema, self.path)
        return cell_tables.require_cells(table, cells, self.path)

    def _array(self, group: zarr.Group, name: str, kind: str) -> Any:
        """An array of the store: one entry a cell, compressed as rvqa does."""
        array = group.get(name)
        if not isinstance(array, zarr.Array):
            raise InputError(f"{self.path} has no array {shown(name)}. {REPAIR}")
        told: Any = array.metadata.to_dict()
        width = (self.manifest["levels"],) if kind == "codes" else ()
        kind = kind or ("text" if told["data_type"] == "string" else "numbers")
        known = {"codes": told["data_type"] == "uint8", "text": told["data_type"] == "string"}
        if not known.get(kind, array.dtype.kind in "iufb"):
            raise InputError(f"{self.path}: {shown(name)} holds {shown(told['data_type'])}. {REPAIR}")
        if array.shape != (self.manifest["cells"], *width):
            raise InputError(
                f"{self.path}: {shown(name)} has the shape {shown(array.shape)}; its manifest makes it "
                f"{(self.manifest['cells'], *width)}. {REPAIR}"
            )
        sizes = array.chunks if array.shards is None else array.shards
        if not (array.chunks[0] >= 1 and sizes[0] <= 2 * LARGEST_TASK and array.chunks[1:] == sizes[1:] == width):
            raise InputError(f"{self.path}: {shown(name)} has chunks of {shown(array.chunks)}. {REPAIR}")
        keys = told["chunk_key_encoding"] == {"name": "default", "configuration": {"separator": "/"}}
        if _names(told["codecs"]) != _CODECS[kind] or not keys or told["storage_transformers"]:
            raise InputError(
                f"{self.path}: {shown(name)} is stored by {shown(_names(told['codecs']))}; expected {_CODECS[kind]}. "
                f"{REPAIR}"
            )
        return array


@dataclass(frozen=True)
class BoundedZstd(ZstdCodec):
    """Unpacks up to what a chunk of its array can hold, whatever its frames say."""

    def _decode_sync(self, chunk_bytes: Any, chunk_spec: Any) -> Any:
        dtype, size = chunk_spec.dtype.to_native_dtype(), int(np.prod(chunk_spec.shape))
        text = dtype.kind == "T"
        most = LARGEST_CHUNK if text else size * dtype.itemsize
        with pa.input_stream(pa.py_buffer(chunk_bytes.to_bytes()), compression="zstd") as stream:
            unpacked = stream.read(most + 1)
        if len(unpacked) > most:
            raise InputError(f"a chunk unpacks to more than {most:,} bytes")
        if text and (told := int.from_bytes(unpacked[:4], "little")) != size:  # room is made for so many
            raise InputError(f"a chunk of {size:,} texts says that it holds {told:,}")
        return chunk_spec.prototype.buffer.from_bytes(unpacked)


register_codec("zstd", BoundedZstd)


def _bounded() -> Any:
    """Have arrays that are opened meanwhile read by that codec."""
    return zarr.config.set({"codecs.zstd": f"{BoundedZstd.__module__}.{BoundedZstd.__qualname__}"})


def _bytes_of(path: Path) -> int:
    """Bytes of all files of a store.

    Raises
    ------
    rvqa.errors.InputError
        Anything but folders and files of bounded size: a link may lead anywhere, and a pipe has no end.
    """
    total, folders = 0, [path]
    while folders:
        with os.scandir(folders.pop()) as entries:
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    folders.append(Path(entry.path))
                    continue
                size = entry.stat(follow_symlinks=False).st_size
                if not entry.is_file(follow_symlinks=False) or size > LARGEST_CHUNK:
                    seen = f"a file of {size:,} bytes" if entry.is_file(follow_symlinks=False) else "a link or a device"
                    raise InputError(f"{path} holds {seen} ({shown(os.path.relpath(entry.path, path))}). {REPAIR}")
                total += size
    return total


def _require_chunks(path: Path, name: str, array: Any) -> None:
    """Reject an array with chunks missing, which zarr would take for zeros."""
    size, rest = (array.chunks if array.shards is None else array.shards)[0], "/0" * (array.ndim - 1)
    for i in range(-(-array.shape[0] // size)):
        if not (path / f"{name}/c/{i}{rest}").is_file():
            raise InputError(f"{path} lacks cells {i * size:,} and on: {name}/c/{i}{rest} is missing. {REPAIR}")


def _names(codecs: Any) -> list[Any]:
    """Names of codecs as in `_CODECS`."""
    names: list[Any] = []
    for each in codecs:
        names.append(each["name"])
        if each["name"] == "sharding_indexed":
            names += [_names(each["configuration"][part]) for part in ("codecs", "index_codecs")]
    return names
