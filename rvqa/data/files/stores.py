"""Arrays of zarr stores, read so that a chunk cannot fill memory, run code or bring what stands outside the store.

zarr gives a chunk to its codec whole, and the codec trusts what the chunk says of its own size. So the size that each
chunk states is looked at first; gzip states none, and a large chunk of it is unpacked piece by piece to see.
"""

import math
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from isal.igzip_lib import DECOMP_GZIP, DECOMP_ZLIB, IgzipDecompressor

from rvqa.data.files import memory
from rvqa.errors import InputError
from rvqa.io.files import UNREADABLE, sentence

_GZIP_RATIO = 1032
"""Bytes that one byte of gzip can stand for at most."""

_PIECE = 2**20
"""Bytes that are unpacked at a time to see how many there are."""


def require_inside(store: Path) -> None:
    """Reject a store in which a link leads out of it, or to a folder.

    Raises
    ------
    rvqa.errors.InputError
        Names the link.
    """
    root = os.path.realpath(store)
    folders = [root]
    while folders:
        with os.scandir(folders.pop()) as entries:
            for entry in entries:
                if entry.is_symlink():
                    target = os.path.realpath(entry.path)
                    if os.path.commonpath([root, target]) != root or os.path.isdir(target):
                        raise InputError(
                            f"{store} holds a link, {os.path.relpath(entry.path, root)}, to {target}. Copy what it "
                            "leads to into its place."
                        )
                elif entry.is_dir():
                    folders.append(entry.path)


def compiled_codecs() -> AbstractContextManager[Any]:
    """Have zarr arrays that are opened meanwhile read by `zarrs`, without an event loop in Python, where it is here."""
    import zarr

    if find_spec("zarrs") is None:
        return nullcontext()
    return zarr.config.set({"codec_pipeline.path": "zarrs.ZarrsCodecPipeline"})


def read(array: Any, start: int, stop: int) -> np.ndarray:
    """Elements of an array from start to stop along its first axis.

    Raises
    ------
    rvqa.errors.InputError
        They are damaged, or take more memory than may be taken.
    """
    place = f"{array.store_path.store.root.name}: /{array.path}"
    if not array.shape:
        raise InputError(f"{place} has no axis; expected a value for each row. Write the store anew.")
    stop = min(stop, array.shape[0])
    rows = math.prod((stop - start, *array.shape[1:])) * array.dtype.itemsize
    shape = " x ".join(f"{n:,}" for n in (stop - start, *array.shape[1:]))
    memory.require(rows, f"{place}: {shape} values")
    _require_codecs(array, place)
    spans = _chunk_spans(array, start, stop)
    whole = math.prod(array.chunks) * array.dtype.itemsize * math.prod(map(len, spans))
    with memory.taken(rows + whole if whole > memory.SMALL else 0, f"{place}: {shape} values in their chunks"):
        for at in product(*_file_spans(array, start, stop)):
            _require_chunk(array, at, place)
        try:
            return np.asarray(array[start:stop])
        except InputError:
            raise
        except UNREADABLE as error:
            raise _damaged(array, spans, place, error) from error


def _chunk_spans(array: Any, start: int, stop: int) -> list[range]:
    """Numbers along each axis of the chunks that hold some rows."""
    bounds = [(start, stop), *((0, n) for n in array.shape[1:])]
    return [range(low // n, -(-high // n)) for (low, high), n in zip(bounds, array.chunks, strict=True)]


def _file_spans(array: Any, start: int, stop: int) -> list[range]:
    bounds = [(start, stop), *((0, n) for n in array.shape[1:])]
    steps = array.shards or array.chunks
    return [range(low // n, -(-high // n)) for (low, high), n in zip(bounds, steps, strict=True)]


def _damaged(array: Any, spans: list[range], place: str, error: BaseException) -> InputError:
    """What to raise where rows cannot be read: the first of their chunks that cannot be read alone is named."""
    for at in product(*spans):
        begin = [i * n for i, n in zip(at, array.chunks, strict=True)]
        try:
            array[tuple(slice(b, b + n) for b, n in zip(begin, array.chunks, strict=True))]
        except UNREADABLE as own:
            number = ", ".join(map(str, at))
            return InputError(
                f"{place}: chunk {number} (rows {begin[0]:,} to {min(begin[0] + array.chunks[0], array.shape[0]):,}) "
                f"cannot be read: {sentence(own)} Copy or download the store again."
            )
    return InputError(f"{place} cannot be read: {sentence(error)} Copy or download the store again.")


def _require_codecs(array: Any, place: str) -> None:
    """Reject a codec that runs what the chunk says."""
    names = [str(getattr(each, "codec_id", "")) for each in (*array.filters, *array.compressors)]
    if "pickle" in names:
        raise InputError(f"{place} is stored by the codec pickle, which can run any program. Write it as plain values.")


def _require_chunk(array: Any, at: tuple[int, ...], place: str) -> None:
    """Reject a chunk that takes far more memory than a chunk of counts, or names, does."""
    file = array.store_path.store.root / array.path / array.metadata.encode_chunk_key(at)
    codec = next((_codec(each) for each in array.compressors), "")
    if not codec or not file.is_file():
        return
    with open(file, "rb") as opened:
        for begin, size in _stored(array, opened.fileno()):
            number = f"{place}: a chunk of {array.metadata.encode_chunk_key(at)}"
            stated = _stated(codec, opened.fileno(), begin, size)
            memory.require_stored(stated, size, number)
            memory.require(stated, number)


def _codec(compressor: Any) -> str:
    """Name of a codec, of numcodecs or of zarr."""
    return str(getattr(compressor, "codec_id", type(compressor).__name__.removesuffix("Codec").lower()))


def _stored(array: Any, file: int) -> Iterator[tuple[int, int]]:
    """Where in a file its chunks are, and their sizes; those of a shard are told by its index."""
    there = os.fstat(file).st_size
    if array.shards is None:
        yield 0, there
        return
    n = math.prod(s // c for s, c in zip(array.shards, array.chunks, strict=True))
    codec = array.metadata.codecs[-1]
    last = getattr(getattr(codec, "index_location", None), "value", "end") == "end"
    index = os.pread(file, min(16 * n, there), max(0, there - 16 * n - 4) if last else 0)
    for begin, size in np.frombuffer(index[: len(index) // 16 * 16], "<u8").reshape(-1, 2).tolist():
        if size and begin + size <= there:
            yield begin, size


def _stated(codec: str, file: int, begin: int, size: int) -> int:
    """Bytes that a stored chunk says it stands for, or, where it does not say, that were seen or may be."""
    head = os.pread(file, min(size, 18), begin)
    if codec == "blosc":
        return int.from_bytes(head[4:8], "little")
    if codec == "lz4":
        return int.from_bytes(head[:4], "little")
    if codec == "zstd":
        return _zstd_size(head)
    if codec in ("gzip", "zlib") and size * _GZIP_RATIO > memory.LARGE:
        return _unpacked(file, begin, begin + size, DECOMP_GZIP if codec == "gzip" else DECOMP_ZLIB)
    return 0


def _unpacked(file: int, at: int, end: int, flag: int) -> int:
    """Bytes that a part of a file stands for, as far as they may be read."""
    inflate, seen, part = IgzipDecompressor(flag=flag), 0, b""
    most = max(memory.LARGE, memory.INFLATED * (end - at))
    while seen <= most and (at < end or part or not inflate.needs_input):
        if inflate.eof:  # of one member of several
            part, inflate = inflate.unused_data, IgzipDecompressor(flag=flag)
        if inflate.needs_input and not part:
            part = os.pread(file, min(_PIECE, end - at), at)
            at += len(part)
        try:
            seen += len(inflate.decompress(part, _PIECE))
        except UNREADABLE:
            break  # zarr says what is wrong with it
        part = b""
        if inflate.eof and not inflate.unused_data and at >= end:
            break
    return seen


def _zstd_size(head: bytes) -> int:
    """Size that the first frame of zstd states, 0 where it states none."""
    if len(head) < 6 or head[:4] != b"\x28\xb5\x2f\xfd":
        return 0
    flags = head[4]
    single, width = flags >> 5 & 1, (1, 2, 4, 8)[flags >> 6]
    if not (single or flags >> 6):
        return 0
    begin = 5 + (not single) + (0, 1, 2, 4)[flags & 3]
    return int.from_bytes(head[begin : begin + width], "little") + (256 if width == 2 else 0)
