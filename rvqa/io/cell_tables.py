"""Tables of cells out of Arrow IPC and parquet: no hostile file crashes a process with one, or fills its memory.

Offsets are checked before anything follows them, and what unpacks to more than is stored is bounded.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import parquet

from rvqa.errors import InputError, about
from rvqa.io import parquet_footer
from rvqa.io.files import UNREADABLE, sentence
from rvqa.io.json_text import shown

REPAIR = "Copy it again, or make it anew."

LARGEST_TASK = 2**20
"""Most rows of a task: what is read of an output at once is bounded by it."""

UNPACKED, RATIO = 2**30, 64
"""A table may take this many bytes in memory and besides this many times what it takes on disk."""

_RECORD_BATCH_COMPRESSION = 3
"""Number of the field in `RecordBatch` of Arrow's Message.fbs."""


@contextmanager
def reading(path: Path, kind: str = "codes") -> Iterator[None]:
    """Say in one sentence that a store of codes, or another `kind`, is not what Arrow or zarr expect.

    Raises
    ------
    rvqa.errors.InputError
        With the name of the store before it, also where one of its chunks was rejected.
    """
    try:
        with about(path):
            yield
    except InputError:
        raise
    except (*UNREADABLE, pa.ArrowException, MemoryError) as error:
        raise InputError(f"{path} cannot be read as {kind}: {sentence(error)} {REPAIR}") from error


def of_ipc(stored: memoryview, cells: int, path: Path) -> pa.Table:
    """Table in an Arrow IPC file, without a copy.

    What stands in the file is read in order, as a stream, so that each message is seen once; the file's footer, which
    may point anywhere, is not needed for it. rvqa writes no compressed messages and no dictionaries.

    Raises
    ------
    rvqa.errors.InputError
        Anything but a whole table of that many cells.
    """
    with reading(path):
        body = pa.py_buffer(stored).slice(8)
        for message in pa.ipc.MessageReader.open_stream(body):
            if message.type not in ("schema", "record batch"):
                raise InputError(f"{path}: the table of cells holds a {message.type}. {REPAIR}")
            if message.type == "record batch" and _compressed(message.metadata.to_pybytes()):
                raise InputError(f"{path}: the table of cells is compressed. {REPAIR}")
        with pa.ipc.open_stream(body) as stream:
            require_columns(stream.schema, path)
            table = stream.read_all()
        table.validate(full=True)
    if table.nbytes > len(stored):
        raise InputError(f"{path}: the table of cells has columns that overlap. {REPAIR}")
    return require_cells(table, cells, path)


def of_parquet(file: parquet.ParquetFile, names: Sequence[str], cells: int, path: Path) -> pa.Table:
    """Columns of a parquet file that was opened with its texts as dictionaries (`texts_of`).

    Raises
    ------
    rvqa.errors.InputError
        Columns that would take more memory than `UNPACKED` and `RATIO` allow, or not of that many cells.
    """
    stored = path.stat().st_size
    most, taken = UNPACKED + RATIO * stored, 8 * cells * len(names)
    parts = []
    for i in range(file.num_row_groups):
        if taken > most:
            raise too_large(path, taken, stored)
        part = file.read_row_group(i, columns=list(names))
        part.validate(full=True)
        for column in part.columns:
            if pa.types.is_dictionary(column.type):
                taken += sum(_text_bytes(chunk) for chunk in column.chunks)
        if taken > most:
            raise too_large(path, taken, stored)
        parts.append(part.cast(pa.schema([_plain(field) for field in part.schema])))
    table = pa.concat_tables(parts) if parts else file.schema_arrow.empty_table()
    if table.num_rows != cells:
        raise InputError(f"{path} has {table.num_rows:,} rows; its metadata has {cells:,}. {REPAIR}")
    return table


def whole_parquet(path: Path) -> pa.Table:
    """All of a parquet file of flat columns and up to `LARGEST_TASK` rows.

    Raises
    ------
    rvqa.errors.InputError
        More rows, other columns, or more memory than `of_parquet` allows.
    """
    metadata = parquet.read_metadata(path)
    schema = metadata.schema.to_arrow_schema()
    if other := [field for field in schema if not _is_flat(field.type)]:
        raise InputError(f"{path} has the column {shown(other[0].name)} of type {shown(str(other[0].type))}. {REPAIR}")
    _require_groups(metadata, metadata.num_rows, path)
    if metadata.num_rows > LARGEST_TASK:
        raise InputError(f"{path} has {metadata.num_rows:,} rows; at most {LARGEST_TASK:,} are read. {REPAIR}")
    with parquet.ParquetFile(path, metadata=metadata, read_dictionary=texts_of(schema)) as file:
        return of_parquet(file, schema.names, metadata.num_rows, path)


def require_parquet(
    metadata: parquet.FileMetaData, schema: pa.Schema, codes: Sequence[str], cells: int, path: Path
) -> None:
    """Reject a parquet file that is not as rvqa writes it, by its metadata.

    Snappy, unlike zstd and others, unpacks to at most 22 times what is stored; no more than `LARGEST_TASK` rows are
    read at once.
    """
    for name in codes:
        if schema.names.count(name) != 1 or schema.field(name).type != pa.uint8():
            raise InputError(f"{path} has no column {name!r} of uint8, or two. {REPAIR}")
    require_columns(pa.schema([field for field in schema if field.name not in codes]), path)
    _require_groups(metadata, cells, path)


def _require_groups(metadata: parquet.FileMetaData, rows: int, path: Path) -> None:
    """Reject groups of rows that do not add up, are too large or are compressed otherwise."""
    groups = [metadata.row_group(i) for i in range(metadata.num_row_groups)]
    sizes = [group.num_rows for group in groups]
    within = all(0 <= size <= LARGEST_TASK for size in sizes)
    if not within or not sum(sizes) == metadata.num_rows == rows:
        raise InputError(
            f"{path} has {metadata.num_rows:,} rows in groups of up to {max(sizes, default=0):,}; expected "
            f"{rows:,}, in groups of up to {LARGEST_TASK:,}. {REPAIR}"
        )
    if other := sorted(parquet_footer.codecs(path) - {parquet_footer.UNCOMPRESSED, parquet_footer.SNAPPY}):
        name = dict(enumerate(parquet_footer.NAMES)).get(other[-1], shown(other[-1]))
        raise InputError(f"{path} is compressed by {name}; rvqa writes and reads SNAPPY. {REPAIR}")


def texts_of(schema: pa.Schema) -> list[str]:
    """Names of the columns of text."""
    return [field.name for field in schema if _is_text(field.type)]


def require_columns(schema: pa.Schema, path: Path) -> None:
    """Reject columns that are not those of cells: `cell`, text, and others of numbers, bool and text, none twice."""
    names = schema.names
    if "cell" not in names or "file" in names or len(set(names)) < len(names):
        raise InputError(
            f"{path}: the table of cells has the columns {shown(names)}; expected 'cell' and others, none twice and "
            f"none called 'file'. {REPAIR}"
        )
    for field in schema:
        known = _is_text(field.type) or (field.name != "cell" and _is_flat(field.type))
        if not known and not pa.types.is_null(field.type):
            raise InputError(
                f"{path}: the table of cells has the column {shown(field.name)} of type {shown(str(field.type))}; "
                f"expected {'text' if field.name == 'cell' else 'numbers, bool or text'}. {REPAIR}"
            )


def require_cells(table: pa.Table, cells: int, path: Path) -> pa.Table:
    """Reject a table of another number of cells, or with cells without a name; give the others back."""
    if table.num_rows != cells:
        raise InputError(f"{path}: the table of cells has {table.num_rows:,} rows for {cells:,} cells. {REPAIR}")
    if cells and (pa.types.is_null(table.schema.field("cell").type) or table.column("cell").null_count):
        raise InputError(f"{path}: the table of cells has cells without a name. {REPAIR}")
    if cells and any(pa.types.is_null(field.type) for field in table.schema):
        raise InputError(f"{path}: the table of cells has a column without values. {REPAIR}")
    return table


def too_large(path: Path, taken: int, stored: int) -> InputError:
    """What to raise where a table would take far more than what is stored can mean."""
    return InputError(
        f"{path}: the table of cells would take {taken / 2**30:,.1f} GiB or more in memory, made of {stored:,} bytes. "
        f"{REPAIR}"
    )


def _is_text(kind: pa.DataType) -> bool:
    return pa.types.is_string(kind) or pa.types.is_large_string(kind)


def _is_flat(kind: pa.DataType) -> bool:
    tests = (_is_text, pa.types.is_integer, pa.types.is_floating, pa.types.is_boolean)
    return any(test(kind) for test in tests)


def _plain(field: pa.Field) -> pa.Field:
    return field.with_type(field.type.value_type) if pa.types.is_dictionary(field.type) else field


def _text_bytes(chunk: pa.DictionaryArray) -> int:
    """Bytes of the texts of a dictionary array when each row holds its own."""
    return pc.sum(pc.binary_length(chunk.dictionary).take(chunk.indices)).as_py() or 0


def _compressed(message: bytes) -> bool:
    """Whether the buffers of a record batch are compressed: a walk through Arrow's flatbuffer, which Arrow verified."""
    root = int.from_bytes(message[:4], "little")
    header = _field(message, root, 2)  # of Message: version, type of header, header
    batch = header + int.from_bytes(message[header : header + 4], "little")
    return _field(message, batch, _RECORD_BATCH_COMPRESSION) != 0


def _field(data: bytes, table: int, number: int) -> int:
    """Place of a field of a flatbuffer's table, 0 where it is absent."""
    vtable = table - int.from_bytes(data[table : table + 4], "little", signed=True)
    size, at = int.from_bytes(data[vtable : vtable + 2], "little"), 4 + 2 * number
    offset = int.from_bytes(data[vtable + at : vtable + at + 2], "little") if at < size else 0
    return table + offset if offset else 0
