"""What a finished run is made into: `.rvq`, zarr, parquet, or a copy of the `.h5ad` file; one pass over the parts each.

All are written beside their place and renamed, if the inputs are still those that were encoded: no reader sees half of
one, or one of two inputs.
"""

import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import h5py
import numpy as np
import pyarrow as pa
from pyarrow import parquet

from rvqa.atlas import rvq
from rvqa.atlas.append import EarlierPart
from rvqa.data.files.keys import Keys, child, copied, require_store
from rvqa.data.reading import Given
from rvqa.errors import InputError
from rvqa.io.checked_hdf5 import require_taken
from rvqa.io.files import require_folder, whole_directory, whole_file

if TYPE_CHECKING:
    from rvqa.atlas.encoder import Encoder

Parts = Sequence[rvq.RvqFile | EarlierPart]


def require_output(out: str | Path, files: Sequence[Given], *, force: bool, in_place: bool) -> Path:
    """Reject an output that cannot or should not be written, before any work is done.

    Raises
    ------
    rvqa.errors.InputError
        Another suffix than those of `WRITERS`; it exists and `force` is not set, or is an input and `in_place` is not
        set; its folder is missing; `.h5ad` from anything but one `.h5ad` file.
    """
    target = Path(out)
    if target.suffix not in WRITERS:
        raise InputError(f"The output {target} is not named {', '.join(WRITERS)}. Choose such a name.")
    paths = [path for path in files if isinstance(path, Path)]
    if target.suffix == ".h5ad" and not len(files) == len(paths) == 1:
        raise InputError(
            f"The output {target} is a copy of its input, with codes; that needs one .h5ad file as input. Choose .rvq, "
            ".zarr or .parquet."
        )
    require_folder(target.absolute().parent)
    exists = os.path.exists(target)
    same = any(exists and os.path.exists(path) and target.samefile(path) for path in paths)
    if same and not in_place:
        raise InputError(
            f"The output {target} is the file to read. Choose another name for the output, or pass --in-place "
            "(in_place=True) to write the codes into it."
        )
    if in_place and not (same and target.suffix == ".h5ad"):
        raise InputError("in_place (--in-place) is for an .h5ad file that is its own output. Give the same path twice.")
    if exists and not same and not force:
        raise InputError(f"{target} exists. Choose another name, or pass --force to replace it.")
    if exists and target.is_dir() != (target.suffix == ".zarr"):
        raise InputError(f"The output {target} is a {'folder' if target.is_dir() else 'file'}. Choose another name.")
    if exists and target.is_dir():
        require_store(target)
    return target


def _write_rvq(target: Path, parts: Parts, encoder: "Encoder", manifest: dict[str, Any], model: str) -> None:
    sizes = {"cells": manifest["cells"], "levels": manifest["levels"], "entries": manifest["entries"]}
    with whole_file(target) as scratch:
        codes = (block for part in parts for block in rvq.parts_of(part))
        rvq.write(scratch, codes, _tables(parts), manifest, **sizes)
        encoder.require_unchanged()


def _write_zarr(target: Path, parts: Parts, encoder: "Encoder", manifest: dict[str, Any], model: str) -> None:
    """Group with `codes` uint8 [N, M], one shard a task, `obs_names`, `obs/<column>`; the manifest is an attribute."""
    import zarr

    cells, shard = manifest["cells"], manifest["settings"]["cells"]
    chunk = min(shard, 16_384)
    with whole_directory(target) as whole:
        group = zarr.open_group(whole, mode="w", zarr_format=3)
        group.attrs["rvqa"] = manifest
        shape = (cells, manifest["levels"])
        every: Any = {"write_empty_chunks": True}  # or zeros could not be told from what is missing
        shards = (-(-shard // chunk) * chunk, shape[1])
        codes = group.create_array(
            "codes", shape=shape, dtype="uint8", chunks=(chunk, shape[1]), shards=shards, config=every
        )
        columns: dict[str, Any] = {}
        at = 0
        for part, table in zip(parts, _tables(parts), strict=True):
            stop = at + part.n_cells
            codes[at:stop] = part.codes(slice(None))
            for name, values in table_columns(table).items():
                if name not in columns:
                    path = "obs_names" if name == "cell" else f"obs/{name}"
                    dtype = "string" if values.dtype.kind in "UO" else values.dtype
                    columns[name] = group.create_array(path, shape=(cells,), dtype=dtype, chunks=(shard,), config=every)
                columns[name][at:stop] = values
            at = stop
        encoder.require_unchanged()


def _write_parquet(target: Path, parts: Parts, encoder: "Encoder", manifest: dict[str, Any], model: str) -> None:
    """Columns `cell`, those of obs, `code_1` to `code_8`; one row group a task; the manifest as metadata `rvqa`."""
    names = [f"code_{level + 1}" for level in range(manifest["levels"])]
    with whole_file(target) as scratch:
        writer = None
        for part, table in zip(parts, _tables(parts), strict=True):
            codes_NM = part.codes(slice(None))
            for level, name in enumerate(names):
                table = table.append_column(name, pa.array(np.ascontiguousarray(codes_NM[:, level])))
            if writer is None:
                told = {"rvqa": json.dumps(manifest, sort_keys=True)}
                schema = table.schema.with_metadata(told)
                writer = parquet.ParquetWriter(scratch, schema)
            writer.write_table(table.cast(schema))
        if writer is not None:
            writer.close()
        encoder.require_unchanged()


def _write_h5ad(target: Path, parts: Parts, encoder: "Encoder", manifest: dict[str, Any], model: str) -> None:
    """A copy of the input with the keys of `rvqa.encode`; all else stays as it is stored."""
    source, tokenizer = encoder.sources[0], encoder.tokenizer
    assert source.path is not None
    with copied(source.path, target) as root:
        obsm = child(root, "obsm")
        cells, levels = manifest["cells"], manifest["levels"]
        codes = _dataset(obsm, "rvqa_codes", (cells, levels), np.uint8)
        latent = _dataset(obsm, "X_rvqa", (cells, tokenizer.config.latent), np.float32)
        at = 0
        for part in parts:
            for codes_NM in rvq.parts_of(part):
                codes[at : at + len(codes_NM)] = codes_NM
                latent[at : at + len(codes_NM)] = tokenizer.quantized_latent(codes_NM)
                require_taken(root)
                at += len(codes_NM)
        Keys(facts={"coverage": encoder.coverage[0], "model": model}).add_to_file(root)
        encoder.require_unchanged()


def _dataset(group: h5py.Group, name: str, shape: tuple[int, int], dtype: Any) -> h5py.Dataset:
    """Empty dataset that anndata reads as an array, in place of an earlier one."""
    if name in group:
        del group[name]
    made = group.create_dataset(
        name, shape, dtype, chunks=(min(65_536, max(shape[0], 1)), shape[1]), compression="gzip"
    )
    made.attrs["encoding-type"], made.attrs["encoding-version"] = "array", "0.2.0"
    return made


def _tables(parts: Parts) -> Iterator[pa.Table]:
    """Table of cells of each part, of one schema: that of the first.

    Raises
    ------
    rvqa.errors.InputError
        A column is of another kind in another file.
    """
    schema = None
    for part in parts:
        table = part.table()
        assert table is not None
        schema = schema or table.schema
        try:
            yield table.cast(schema)
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError, ValueError) as error:
            raise InputError(
                f"The columns of obs are {table.schema} in one file and {schema} in another; carry those of one kind."
            ) from error


def table_columns(table: pa.Table) -> dict[str, np.ndarray]:
    """Columns of a table of cells by name."""
    return {name: table.column(name).to_numpy() for name in table.column_names}


WRITERS: dict[str, Callable[[Path, Parts, "Encoder", dict[str, Any], str], None]] = {
    ".rvq": _write_rvq,
    ".zarr": _write_zarr,
    ".parquet": _write_parquet,
    ".h5ad": _write_h5ad,
}
"""How to write each kind of output, by suffix."""
