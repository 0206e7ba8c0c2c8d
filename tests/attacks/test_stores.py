"""Altered stores of codes: `.rvq` with every checksum recomputed, zarr and parquet, and their manifests.

An attacker can recompute a checksum, so bytes are altered both with and without that.
"""

import json
import os
import random
import struct
import zlib
from functools import cache
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
import zarr
from anndata import AnnData
from pyarrow import parquet

import rvqa
from rvqa.atlas import rvq
from rvqa.atlas.append import Earlier
from rvqa.atlas.encoder import Settings
from rvqa.atlas.run import encode_files
from rvqa.data.genes import GeneAxis
from rvqa.errors import InputError
from rvqa.language.vocabulary import CellVocabulary
from rvqa.tokenizer.model import CellTokenizer, CellTokenizerConfig
from tests.attacks.cases import CASES, mutated, survive
from tests.attacks.odd_json import altered, written

CELLS = 250
HEADER = rvq._HEADER


@cache
def tokenizer(entries: int = 20) -> CellTokenizer:
    """A tokenizer with random weights; its 20 codes per level leave codes 20 to 31 invalid."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        axis = GeneAxis(tuple(f"GENE{i}" for i in range(60)), ("",) * 60)
        made = CellTokenizer(axis, CellTokenizerConfig(hidden=8, latent=4, entries=entries))
        made.codebooks_MKD.normal_()
    return made.eval()


def cells(n: int = CELLS) -> AnnData:
    rng = np.random.default_rng(0)
    made = AnnData(rng.poisson(2.0, (n, 60)).astype(np.float32))
    made.var_names = [f"GENE{i}" for i in range(60)]
    made.obs["kind"] = [f"kind {i % 3}" for i in range(n)]
    made.obs["number"] = np.arange(n)
    made.obs["flag"] = np.arange(n) % 2 == 0
    return made


def stored(suffix: str, folder: Path) -> Path:
    """Codes of those cells, written as `rvqa encode` writes them."""
    out = folder / f"a{suffix}"
    settings = Settings(cells=100, obs=("kind", "number", "flag"))
    encode_files(cells(), tokenizer(), out, settings=settings, threads=1)
    return out


@cache
def bytes_of(suffix: str) -> dict[str, bytes]:
    """Return files of a store by their path in it, "" for a store that is one file."""
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        out = stored(suffix, Path(folder))
        if out.is_file():
            return {"": out.read_bytes()}
        return {
            path.relative_to(out).as_posix(): path.read_bytes() for path in sorted(out.rglob("*")) if path.is_file()
        }


def put(files: dict[str, bytes], suffix: str, folder: Path) -> Path:
    out = folder / f"a{suffix}"
    for name, data in files.items():
        path = out / name if name else out
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return out


def use(path: Path) -> None:
    """Do all that can be done with a store; an error in one step does not skip the others."""
    codes = rvqa.open_codes(path, verify=True)
    refused = []
    steps = (
        lambda: codes[:],
        lambda: codes[[0, -1]] if len(codes) else None,
        lambda: codes.table,
        lambda: codes.obs,
        lambda: list(codes.token_ids(CellVocabulary(0, codes.levels, codes.entries), batch_size=64, shuffle=True)),
        lambda: codes.count_prefixes(min(2, codes.levels)),
        lambda: next(codes.near_duplicates(1), None),
        lambda: [(part.codes(slice(None)), part.table()) for part in Earlier(path).parts()],
        lambda: Earlier(path).joined(codes.manifest | {"inputs": [{"name": "b", "cells": 1}], "cells": 1}),
        lambda: Earlier(path).fingerprint(),
        lambda: tokenizer().decode(codes[:10]),
    )
    for step in steps:
        try:
            step()
        except InputError as error:
            refused.append(error)
    if refused:
        raise refused[0]


# .rvq


def mended(data: bytes) -> bytes:
    """Return a `.rvq` file with every checksum recomputed, as far as its header says where they are."""
    if len(data) < HEADER.size:
        return data
    *fields, _, _, _ = HEADER.unpack(data[: HEADER.size])
    _, _, _, _, n, size, _, table, text = fields
    sums = 4 * -(-n // rvq.BLOCK)
    at = HEADER.size + n * size
    changed = bytearray(data)
    if at + sums + table + text <= len(data):
        for i in range(sums // 4):
            start = HEADER.size + i * rvq.BLOCK * size
            crc = zlib.crc32(data[start : min(start + rvq.BLOCK * size, at)])
            changed[at + 4 * i : at + 4 * i + 4] = struct.pack("<I", crc)
        start = at + sums
        crcs = (zlib.crc32(data[start : start + table]), zlib.crc32(data[start + table : start + table + text]))
        changed[48:56] = struct.pack("<II", *crcs)
    changed[124:128] = struct.pack("<I", zlib.crc32(bytes(changed[:124])))
    return bytes(changed)


def sections(data: bytes) -> list[bytes]:
    """Return header, codes, checksums, table and manifest of a `.rvq` file."""
    _, _, _, _, n, size, _, table, text, *_ = HEADER.unpack(data[: HEADER.size])
    ends = np.cumsum([0, HEADER.size, n * size, 4 * -(-n // rvq.BLOCK), table, text]).tolist()
    return [data[start:stop] for start, stop in pairwise(ends)]


def joined(parts: list[bytes]) -> bytes:
    """Return the file of those sections, with fitting sizes of table and manifest and all checksums."""
    head = bytearray(parts[0])
    head[32:48] = struct.pack("<QQ", len(parts[3]), len(parts[4]))
    return mended(bytes(head) + b"".join(parts[1:]))


def rvq_bytes(number: int, folder: Path) -> None:
    use(put({"": mutated(bytes_of(".rvq")[""], number)}, ".rvq", folder))


def rvq_mended(number: int, folder: Path) -> None:
    parts = sections(bytes_of(".rvq")[""])
    at = (3, 3, 0, 4, 3, 1)[number % 6]
    parts[at] = mutated(parts[at], number)
    use(put({"": mended(b"".join(parts)) if at == 0 else joined(parts)}, ".rvq", folder))


def rvq_offsets(number: int, folder: Path) -> None:
    """Only words of the table are altered: offsets of its texts, lengths in its messages."""
    parts, rng = sections(bytes_of(".rvq")[""]), random.Random(number)
    table = bytearray(parts[3])
    for _ in range(rng.choice((1, 2, 8))):
        place, width = 4 * rng.randrange(len(table) // 4 - 2), rng.choice((4, 8))
        word = int.from_bytes(table[place : place + width], "little")
        word = rng.choice((word + 1, word - 1, word * 2, word ^ (1 << rng.randrange(32)), 2**31 - 1, 2**40, 2**62, -1))
        table[place : place + width] = (word % 2 ** (8 * width)).to_bytes(width, "little")
    parts[3] = bytes(table)
    use(put({"": joined(parts)}, ".rvq", folder))


def rvq_header(number: int, folder: Path) -> None:
    """Fields of the header are altered: impossible numbers, products that overflow."""
    rng, data = random.Random(number), bytes_of(".rvq")[""]
    fields = list(HEADER.unpack(data[: HEADER.size]))
    widths = (0, 4, 2, 2, 8, 4, 4, 8, 8, 4, 4, 4)
    for at in rng.sample(range(1, 9), rng.choice((1, 1, 2, 3))):
        top = 2 ** (8 * widths[at])
        word = rng.choice(
            (0, 1, 2, 3, 7, 9, 64, 255, 257, 2**15, 2**31, 2**32 - 1, 2**61, 2**63, 2**64 - 1, fields[at] + 1)
        )
        fields[at] = word % top
    use(put({"": mended(HEADER.pack(*fields) + data[HEADER.size :])}, ".rvq", folder))


def rvq_manifest(number: int, folder: Path) -> None:
    parts = sections(bytes_of(".rvq")[""])
    parts[4] = written(altered(json.loads(parts[4]), number))
    use(put({"": joined(parts)}, ".rvq", folder))


# Parquet and zarr


def parquet_bytes(number: int, folder: Path) -> None:
    """Bytes are altered anywhere, or in the footer that says where everything is."""
    data = bytes_of(".parquet")[""]
    size = int.from_bytes(data[-8:-4], "little")
    if number % 3:
        footer = mutated(data[-8 - size : -8], number)
        data = data[: -8 - size] + footer + len(footer).to_bytes(4, "little") + data[-4:]
    else:
        data = mutated(data, number)
    use(put({"": data}, ".parquet", folder))


def parquet_manifest(number: int, folder: Path) -> None:
    table = parquet_table()
    told = written(altered(json.loads(table.schema.metadata[b"rvqa"]), number))
    parquet.write_table(table.replace_schema_metadata({b"rvqa": told}), folder / "a.parquet", row_group_size=100)
    use(folder / "a.parquet")


@cache
def parquet_table() -> pa.Table:
    return parquet.read_table(pa.BufferReader(bytes_of(".parquet")[""]))


def zarr_bytes(number: int, folder: Path) -> None:
    files = dict(bytes_of(".zarr"))
    name = random.Random(number).choice(sorted(files))
    if number % 10 == 9:
        del files[name]
    else:
        files[name] = mutated(files[name], number)
    use(put(files, ".zarr", folder))


def zarr_metadata(number: int, folder: Path) -> None:
    files = dict(bytes_of(".zarr"))
    name = random.Random(number).choice([name for name in sorted(files) if name.endswith("zarr.json")])
    files[name] = written(altered(json.loads(files[name]), number))
    use(put(files, ".zarr", folder))


# Parts of a run that was stopped


@cache
def parts_of_a_run() -> dict[str, bytes]:
    """Return the parts that a run keeps beside its output when it stops before its last task."""
    import tempfile

    from rvqa.atlas import run

    class Stop(Exception):
        pass

    def keep(work: run.Work, task: run.Task, *given: object, **named: object) -> None:
        if task.number == 2:
            raise Stop
        kept(work, task, *given, **named)

    kept, run.Work.keep = run.Work.keep, keep
    with tempfile.TemporaryDirectory() as place:
        cells().write_h5ad(Path(place) / "cells.h5ad")
        os.utime(Path(place) / "cells.h5ad", ns=(10**18, 10**18))  # a run asks for the same file
        try:
            encode_files(Path(place) / "cells.h5ad", tokenizer(), Path(place) / "a.rvq", settings=Settings(cells=100))
        except Stop:
            pass
        finally:
            run.Work.keep = kept
        return {
            path.relative_to(place).as_posix(): path.read_bytes() for path in Path(place).rglob("*") if path.is_file()
        }


def run_parts(number: int, folder: Path) -> None:
    """A stopped run continues from valid parts and makes the rest again, or reports what is wrong."""
    files = dict(parts_of_a_run())
    name = random.Random(number).choice([name for name in sorted(files) if name.endswith((".rvq", ".json"))])
    if name.endswith(".json") and number % 2:
        files[name] = written(altered(json.loads(files[name]), number))
    elif name.endswith(".rvq") and number % 2:
        parts = sections(files[name])
        parts[3] = mutated(parts[3], number)
        files[name] = joined(parts)
    else:
        files[name] = mutated(files[name], number)
    for name, data in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(data)
    os.utime(folder / "cells.h5ad", ns=(10**18, 10**18))
    encode_files(folder / "cells.h5ad", tokenizer(), folder / "a.rvq", settings=Settings(cells=100), threads=1)
    use(folder / "a.rvq")


def rvq_file(number: int, folder: Path) -> None:
    """The cases take each way in turn."""
    ways = (rvq_bytes, rvq_mended, rvq_offsets, rvq_header, rvq_manifest)
    ways[number % len(ways)](number // len(ways), folder)


def parquet_file(number: int, folder: Path) -> None:
    """Three cases alter bytes for each one that alters the manifest."""
    (parquet_bytes if number % 4 else parquet_manifest)(number, folder)


def zarr_store(number: int, folder: Path) -> None:
    """The cases alter bytes and values in turn."""
    (zarr_bytes if number % 2 else zarr_metadata)(number // 2, folder)


@pytest.mark.parametrize("case", [rvq_file, parquet_file])
def test_altered_files_are_refused_or_read(case, tmp_path):
    survive(case, tmp_path)


def test_altered_stores_of_zarr_are_refused_or_read(tmp_path):
    """Only a fifth of the cases run, because each reads 20 files through an event loop."""
    survive(zarr_store, tmp_path, cases=CASES // 5)


def test_a_run_goes_on_from_altered_parts_or_refuses_them(tmp_path):
    """Only a tenth of the cases run, because each is a whole run."""
    survive(run_parts, tmp_path, cases=CASES // 10)


@pytest.mark.parametrize("suffix", [".rvq", ".parquet", ".zarr"])
def test_stores_that_nobody_altered_are_read(suffix, tmp_path):
    use(put(bytes_of(suffix), suffix, tmp_path))


def test_offsets_that_lead_out_of_a_table(tmp_path):
    """Arrow follows them without a check, which can kill the process."""
    parts = sections(bytes_of(".rvq")[""])
    at = parts[3].index(b"kind 0kind 1")
    parts[3] = parts[3][: at - 64] + b"\xff\xff\xff\x7f" * 8 + parts[3][at - 32 :]
    with pytest.raises(InputError, match="cannot be read as codes"):
        use(put({"": joined(parts)}, ".rvq", tmp_path))


def test_compressed_messages_are_not_unpacked(tmp_path):
    parts = sections(bytes_of(".rvq")[""])
    sink = pa.BufferOutputStream()
    table = pa.table({"cell": ["a" * 1000] * CELLS})
    with pa.ipc.new_file(sink, table.schema, options=pa.ipc.IpcWriteOptions(compression="zstd")) as writer:
        writer.write_table(table)
    parts[3] = sink.getvalue().to_pybytes()
    with pytest.raises(InputError, match="compressed"):
        rvqa.open_codes(put({"": joined(parts)}, ".rvq", tmp_path)).table  # noqa: B018


@pytest.mark.parametrize(
    ("table", "said"),
    [
        ({"cell": ["a"] * 9}, "9 rows"),
        ({"name": ["a"] * CELLS}, "columns"),
        ({"cell": np.arange(CELLS)}, "type"),
        ({"cell": ["a", None] * (CELLS // 2)}, "without a name"),
        ({"cell": pa.array(["a"] * CELLS).dictionary_encode()}, "dictionary"),
        ({"cell": ["a"] * CELLS, "file": ["b"] * CELLS}, "file"),
        ({"cell": ["a"] * CELLS, "n": [[1]] * CELLS}, "type"),
    ],
)
def test_tables_that_are_not_of_cells(table, said, tmp_path):
    parts = sections(bytes_of(".rvq")[""])
    sink, made = pa.BufferOutputStream(), pa.table(table)
    with pa.ipc.new_file(sink, made.schema) as writer:
        writer.write_table(made)
    parts[3] = sink.getvalue().to_pybytes()
    with pytest.raises(InputError, match=said):
        rvqa.open_codes(put({"": joined(parts)}, ".rvq", tmp_path)).obs  # noqa: B018


def test_codes_of_no_codeword_are_refused(tmp_path):
    """Five bits hold 32 codes and a byte 256, but there are only 20."""
    parts = sections(bytes_of(".rvq")[""])
    packed = np.frombuffer(parts[1], np.uint8).reshape(-1, 5).copy()
    packed[7] = 255
    parts[1] = packed.tobytes()
    table = parquet_table()
    for name in ("code_1", "code_8"):
        values = table.column(name).to_numpy().copy()
        values[7] = 20
        table = table.set_column(table.schema.get_field_index(name), name, pa.array(values))
    parquet.write_table(table, tmp_path / "b.parquet", row_group_size=100)
    store = put(bytes_of(".zarr"), ".zarr", tmp_path)
    zarr.open_group(store, mode="r+")["codes"][7] = 31
    for path in (put({"": joined(parts)}, ".rvq", tmp_path), tmp_path / "b.parquet", store):
        codes = rvqa.open_codes(path)
        with pytest.raises(InputError, match=r"has the code (20|31); expected 0 to 19"):
            codes[:]
        assert codes[100:110].max() < 20


def test_what_a_parquet_file_of_codes_is_not(tmp_path):
    table = parquet_table()
    for name, made, said in (
        ("rows", table[:-1], "rows"),
        ("columns", table.drop_columns(["code_3"]), "code_3"),
        ("types", table.set_column(6, "code_3", table["code_3"].cast(pa.int64())), "code_3"),
        ("nulls", table.set_column(6, "code_3", pa.array([None] * CELLS, pa.uint8())), "lacks codes"),
        ("twice", table.append_column("kind", table["kind"]), "none twice"),
    ):
        path = tmp_path / f"{name}.parquet"
        parquet.write_table(made.replace_schema_metadata(table.schema.metadata), path)
        with pytest.raises(InputError, match=said):
            rvqa.open_codes(path)[:]
    parquet.write_table(table, tmp_path / "zstd.parquet", compression="zstd")
    with pytest.raises(InputError, match="ZSTD"):
        rvqa.open_codes(tmp_path / "zstd.parquet")


def test_a_dictionary_that_unpacks_to_a_terabyte(tmp_path):
    """Every cell has the same name of a megabyte, stored once in the file."""
    manifest = json.loads(parquet_table().schema.metadata[b"rvqa"])
    n = 2**20
    manifest |= {"cells": n, "inputs": [{"name": "a", "cells": n}]}
    columns = {f"code_{level + 1}": pa.array(np.zeros(n, np.uint8)) for level in range(8)}
    names = pa.DictionaryArray.from_arrays(pa.array(np.zeros(n, np.int32)), ["x" * 2**20])
    table = pa.table({"cell": names, **columns})
    with parquet.ParquetWriter(tmp_path / "a.parquet", table.schema, store_schema=False) as writer:
        writer.write_table(table)
        writer.add_key_value_metadata({"rvqa": json.dumps(manifest)})
    assert (tmp_path / "a.parquet").stat().st_size < 2**18
    codes = rvqa.open_codes(tmp_path / "a.parquet")
    with pytest.raises(InputError, match="GiB or more"):
        codes.table  # noqa: B018


def test_chunks_that_unpack_to_more_than_they_hold(tmp_path):
    """Chunks of numbers and of text unpack to gigabytes of zeros."""
    zeros = pa.compress(bytes(2**29), codec="zstd", asbytes=True)
    for name in ("obs/number/c/0", "obs_names/c/0"):
        store = put(dict(bytes_of(".zarr")) | {name: zeros}, ".zarr", tmp_path / name.replace("/", "-"))
        with pytest.raises(InputError, match="unpacks to more"):
            rvqa.open_codes(store).table  # noqa: B018
    many = pa.compress((2**31).to_bytes(4, "little") + bytes(1000), codec="zstd", asbytes=True)
    store = put(dict(bytes_of(".zarr")) | {"obs_names/c/0": many}, ".zarr", tmp_path / "many")
    with pytest.raises(InputError, match="says that it holds"):
        rvqa.open_codes(store).table  # noqa: B018


def test_a_store_of_zarr_stays_in_its_folder(tmp_path):
    for name in ("codes/c/1/0", "obs_names/c/2"):
        files = dict(bytes_of(".zarr"))
        del files[name]
        with pytest.raises(InputError, match="is missing"):
            rvqa.open_codes(put(files, ".zarr", tmp_path / f"{name[:4]}-gone"))
        for kind, make in (("link", lambda path: path.symlink_to("/dev/zero")), ("pipe", os.mkfifo)):
            store = put(files, ".zarr", tmp_path / f"{name[:4]}-{kind}")
            (store / name).parent.mkdir(exist_ok=True)
            make(store / name)
            with pytest.raises(InputError, match="a link or a device"):
                rvqa.open_codes(store)


def test_files_of_one_name_in_two_folders(tmp_path):
    """Two files of the same name are one category."""
    paths = [tmp_path / name / "a.h5ad" for name in ("one", "two")]
    for path, n in zip(paths, (120, 130), strict=True):
        path.parent.mkdir()
        cells(n).write_h5ad(path)
    encode_files(paths, tokenizer(), tmp_path / "a.rvq", settings=Settings(cells=100), threads=1)
    assert rvqa.open_codes(tmp_path / "a.rvq").obs["file"].tolist() == ["a.h5ad"] * 250


def test_a_store_whose_codes_are_all_zero_opens(tmp_path):
    made = tokenizer(2)
    with torch.no_grad():
        made.codebooks_MKD[:, 1] = 1e5
    encode_files(cells(), made, tmp_path / "zeros.zarr", settings=Settings(obs=("number",)))
    opened = rvqa.open_codes(tmp_path / "zeros.zarr")
    assert not opened[:].any()
    assert list(opened.obs["number"]) == list(range(CELLS))
