"""Hostile and damaged files of cells: reading gives counts or raises an error of one sentence."""

import contextlib
import json
import re
import warnings
import zlib
from functools import cache
from pathlib import Path

import anndata
import h5py
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import zarr
from anndata.io import write_elem
from scipy.io import mmwrite

from rvqa.data.files import memory
from rvqa.data.files.keys import copied
from rvqa.data.files.memory import limited
from rvqa.data.files.sources import obs_of, open_source, read_cells, read_results
from rvqa.data.reading import Reading
from rvqa.encoding import codes_of_file
from rvqa.errors import InputError
from tests.attacks.cases import mutated, survive
from tests.test_fuzz import IDS, SYMBOLS, counts_of, tokenizer

STRING = h5py.string_dtype()


# Small files of every kind.


@cache
def cells() -> anndata.AnnData:
    """24 cells with a column of every kind."""
    rng = np.random.default_rng(0)
    n, genes = 24, len(SYMBOLS)
    obs = pd.DataFrame(
        {
            "type": pd.Categorical(rng.choice(["B", "T"], n)),
            "depth": rng.integers(1000, 2000, n),
            "stage": pd.array([None, 1, 2] * 8, dtype="Int64"),
            "word": pd.array([None, "a", "b"] * 8, dtype="string"),
        },
        index=[f"cell{i}" for i in range(n)],
    )
    var = pd.DataFrame({"gene_ids": IDS}, index=SYMBOLS)
    made = anndata.AnnData(sp.csr_matrix(counts_of(rng, n, genes).astype(np.float32)), obs=obs, var=var)
    made.obsm["X_pca"] = rng.random((n, 3))
    anndata.settings.allow_write_nullable_strings = True
    return made


FORMS = {"csr": sp.csr_matrix, "csc": sp.csc_matrix, "dense": lambda x: x.toarray()}
FILTERS = {
    "plain": {},
    "gzip": {"compression": "gzip"},
    "shuffle": {"compression": "gzip", "shuffle": True},
    "lzf": {"compression": "lzf"},
    "fletcher32": {"compression": "gzip", "shuffle": True},
    "chunks": {"chunks": True},
}


def h5ad(form: str, filters: str, folder: Path) -> Path:
    made = cells().copy()
    made.X = FORMS[form](made.X)
    with h5py.File(folder / "cells.h5ad", "w") as file:
        write_elem(file, "/", made, dataset_kwargs=FILTERS[filters])
        write_elem(file, "uns", {"note": {"by": "hand"}})
        if filters == "fletcher32":  # strings cannot have this
            write_elem(file, "X", made.X, dataset_kwargs={**FILTERS[filters], "fletcher32": True})
    return folder / "cells.h5ad"


def h5mu(folder: Path) -> Path:
    with h5py.File(folder / "cells.h5mu", "w") as file:
        write_elem(file, "mod/rna", cells(), dataset_kwargs={"compression": "gzip"})
        write_elem(file, "mod/prot", cells()[:, :10].copy())
        write_elem(file, "obs", cells().obs[["depth"]])
        write_elem(file, "var", cells().var[[]])
    return folder / "cells.h5mu"


def tenx(version: int, folder: Path) -> Path:
    csr = sp.csr_matrix(cells().X).astype(np.int32)
    kinds = {"compression": "gzip", "shuffle": True, "chunks": True}
    with h5py.File(folder / "cells.h5", "w") as file:
        group = file.create_group("matrix" if version == 3 else "GRCh38")
        for name in ("data", "indices", "indptr"):
            group.create_dataset(name, data=getattr(csr, name), **kinds)
        group["shape"] = np.array(csr.shape[::-1], dtype=np.int32)
        group.create_dataset("barcodes", data=cells().obs_names.to_numpy().astype("S"), **kinds)
        ids, names = IDS.astype("S"), SYMBOLS.astype("S")
        table = {"genes": ids, "gene_names": names}
        if version == 3:
            table = {"features/id": ids, "features/name": names, "features/genome": np.full(len(ids), b"GRCh38")}
            table["features/feature_type"] = np.full(len(ids), b"Gene Expression")
        for name, values in table.items():
            group.create_dataset(name, data=values, **kinds)
    return folder / "cells.h5"


STORES = [
    *((2, "zlib", "csr"), (2, "blosc", "dense"), (2, "zstd", "csc"), (2, "lz4", "csr"), (2, "none", "dense")),
    *((3, "gzip", "dense"), (3, "blosc", "csc"), (3, "zstd", "csr"), (3, "sharded", "csr"), (3, "none", "dense")),
]


def zarr_store(version: int, codec: str, form: str, folder: Path) -> Path:
    import numcodecs
    from zarr.codecs import BloscCodec, GzipCodec, ZstdCodec

    made = cells().copy()
    made.X = FORMS[form](made.X)
    path = folder / "cells.zarr"
    codecs = {
        2: {"zlib": numcodecs.Zlib(), "blosc": numcodecs.Blosc(), "zstd": numcodecs.Zstd(), "lz4": numcodecs.LZ4()},
        3: {"gzip": GzipCodec(), "blosc": BloscCodec(), "zstd": ZstdCodec()},
    }
    before = anndata.settings.zarr_write_format
    anndata.settings.zarr_write_format = version
    try:
        root = zarr.open_group(path, mode="w", zarr_format=version)
        asked = {"compressor" if version == 2 else "compressors": codecs[version].get(codec)}
        if codec == "sharded":
            asked = {}
        write_elem(root, "/", made, dataset_kwargs=asked)
        if codec == "sharded":
            at = root["X"] if form != "dense" else root
            for name in ("data", "indices") if form != "dense" else ("X",):
                values, kept = at[name][...], dict(at[name].attrs)
                size = tuple(max(1, n // 4) for n in values.shape)
                array = at.create_array(
                    name, data=values, chunks=size, shards=tuple(4 * n for n in size), overwrite=True
                )
                array.attrs.update(kept)
        if codec == "zstd":
            zarr.consolidate_metadata(path)
    finally:
        anndata.settings.zarr_write_format = before
    return path


def market(packed: str, folder: Path) -> Path:
    path = folder / "cells"
    path.mkdir()
    mmwrite(path / "matrix.mtx", sp.coo_matrix(cells().X.T).astype(np.int32))
    lines = [f"{one}\t{name}\tGene Expression" for one, name in zip(IDS, SYMBOLS, strict=True)]
    (path / "features.tsv").write_text("\n".join(lines) + "\n")
    (path / "barcodes.tsv").write_text("\n".join(cells().obs_names) + "\n")
    if packed:
        import gzip

        for file in list(path.iterdir()):
            file.with_name(f"{file.name}.gz").write_bytes(gzip.compress(file.read_bytes()))
            file.unlink()
    return path


KINDS = {
    "h5ad": [lambda folder, a=a, b=b: h5ad(a, b, folder) for a in FORMS for b in FILTERS],
    "h5mu": [h5mu],
    "tenx": [lambda folder, v=v: tenx(v, folder) for v in (2, 3)],
    "zarr": [lambda folder, each=each: zarr_store(*each, folder) for each in STORES],
    "market": [lambda folder, p=p: market(p, folder) for p in ("", ".gz")],
}


@cache
def whole_files(kind: str) -> list[tuple[str, dict[str, bytes]]]:
    """Return each file of a kind: its name, and bytes by path inside ("" for a single file)."""
    import tempfile

    made = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for write in KINDS[kind]:
            with tempfile.TemporaryDirectory() as folder:
                path = write(Path(folder))
                files = [path] if path.is_file() else sorted(each for each in path.rglob("*") if each.is_file())
                inside = {str(each.relative_to(path)) if each != path else "": each.read_bytes() for each in files}
                made.append((path.name, inside))
    return made


def use(path: Path, number: int, folder: Path) -> None:
    """Read a file in one of the ways that commands use."""
    if number % 3 == 0:
        read_cells(path, layer="auto", whole=True)
    elif number % 3 == 1:
        codes_of_file(path, tokenizer(), Reading("auto"))
    else:
        source = open_source(path, layer="auto", scratch=folder / "scratch")
        for start, stop in source.matrix.blocks(0, source.n_cells):
            source.matrix.rows(start, stop)
        for key in (None, *source.obs.names):
            source.column(key, 0, source.n_cells)


def case(kind: str, number: int, folder: Path) -> None:
    name, inside = whole_files(kind)[number % len(whole_files(kind))]
    path = folder / name
    spoilt = sorted(inside)[number // len(whole_files(kind)) % len(inside)]
    for at, data in inside.items():
        (path / at).parent.mkdir(parents=True, exist_ok=True)
        (path / at if at else path).write_bytes(mutated(data, number) if at == spoilt else data)
    use(path, number, folder)


def of_h5ad(number, folder):
    case("h5ad", number, folder)


def of_h5mu(number, folder):
    case("h5mu", number, folder)


def of_tenx(number, folder):
    case("tenx", number, folder)


def of_zarr(number, folder):
    case("zarr", number, folder)


def of_market(number, folder):
    case("market", number, folder)


@pytest.mark.parametrize("kind", KINDS)
def test_altered_files_end_in_counts_or_a_sentence(kind, tmp_path):
    survive({"h5ad": of_h5ad, "h5mu": of_h5mu, "tenx": of_tenx, "zarr": of_zarr, "market": of_market}[kind], tmp_path)


# Bit rot that a checksum or a length reveals: the error names the file, the dataset and the chunk.


def big_h5ad(path: Path, form: str, **kinds) -> None:
    made = cells().copy()
    made.obs = made.obs[["depth"]]
    made.X = FORMS[form](made.X)
    with h5py.File(path, "w") as file:
        write_elem(file, "/", made)
        part = file if form == "dense" else file["X"]
        for name in ("X",) if form == "dense" else ("data", "indices"):
            values, kept = part[name][()], dict(part[name].attrs)
            del part[name]
            chunks = (5, 30) if form == "dense" else (100,)
            part.create_dataset(name, data=values, chunks=chunks, **kinds).attrs.update(kept)


def spoil_chunk(path: Path, dataset: str, number: int, change) -> None:
    """Alter the bytes of one chunk in place in the file."""
    with h5py.File(path) as file:
        info = file[dataset].id.get_chunk_info(number)
    data = bytearray(path.read_bytes())
    part = data[info.byte_offset : info.byte_offset + info.size]
    change(part)
    data[info.byte_offset : info.byte_offset + info.size] = part
    path.write_bytes(data)


def flip(part):
    part[len(part) // 2] ^= 255


def zero(part):
    part[:] = bytes(len(part))


def last(part):
    part[-1] ^= 1


ROT = {
    "gzip": {"compression": "gzip"},
    "gzip, shuffle": {"compression": "gzip", "shuffle": True},
    "gzip, fletcher32": {"compression": "gzip", "fletcher32": True},
    "fletcher32": {"fletcher32": True},
    "lzf, fletcher32": {"compression": "lzf", "fletcher32": True},
    "zstd": {"compression": 32015},
}


NOTICED = [
    *(("gzip", each) for each in (flip, zero, last)),
    *(("gzip, shuffle", each) for each in (flip, zero, last)),
    *((name, each) for name in ("gzip, fletcher32", "fletcher32", "lzf, fletcher32") for each in (flip, last)),
    ("zstd", zero),
]
"""What is told by a checksum or by the codec; zeros have a fletcher32 of zero, and zstd in HDF5 has no checksum."""


@pytest.mark.parametrize(("kinds", "change"), NOTICED)
@pytest.mark.parametrize("form", FORMS)
def test_a_rotten_chunk_is_named(form, kinds, change, tmp_path):
    if kinds == "zstd":
        pytest.importorskip("hdf5plugin")
    path, dataset = tmp_path / "cells.h5ad", "X" if form == "dense" else "X/data"
    big_h5ad(path, form, **ROT[kinds])
    spoil_chunk(path, dataset, 3, change)
    said = rf"cells\.h5ad: /{dataset}: chunk {'1, 0' if form == 'dense' else '3'} \((rows|values) .*Copy or download"
    for read in (lambda: read_cells(path), lambda: codes_of_file(path, tokenizer())):
        with pytest.raises(InputError, match=said):
            read()


def test_a_chunk_of_another_length_is_named(tmp_path):
    path = tmp_path / "cells.h5ad"
    big_h5ad(path, "csr", compression="gzip")
    with h5py.File(path, "r+") as file:
        file["X/data"].id.write_direct_chunk((200,), zlib.compress(bytes(396)))
    with pytest.raises(InputError, match=r"/X/data: chunk 2 \(values 200 to 300\) .* it holds 396 bytes, not 400"):
        codes_of_file(path, tokenizer())
    with h5py.File(path, "r+") as file:
        file["X/data"].id.write_direct_chunk((200,), zlib.compress(bytes(404)))
    with pytest.raises(InputError, match=r"/X/data: chunk 2 .* do not end after 400 bytes"):
        codes_of_file(path, tokenizer())


def test_rot_in_columns_is_named(tmp_path):
    path = tmp_path / "cells.h5ad"
    with h5py.File(path, "w") as file:
        write_elem(file, "/", cells().copy()[:, :].copy(), dataset_kwargs={"compression": "gzip"})
    for key, dataset in (("depth", "obs/depth"), ("type", "obs/type/codes"), (None, "obs/_index")):
        whole = path.read_bytes()
        spoil_chunk(path, dataset, 0, flip)
        with pytest.raises(InputError, match=f"cells.h5ad: /{dataset}: chunk 0 "):
            open_source(path, scratch=tmp_path).column(key, 0, 24)
        path.write_bytes(whole)


@pytest.mark.parametrize("store", [each for each in STORES if each[1] != "none"])
def test_a_rotten_chunk_of_a_store_is_named(store, tmp_path):
    path = zarr_store(*store, tmp_path)
    at = path / ("X" if store[2] == "dense" else "X/data")
    chunk = max(
        (each for each in at.rglob("*") if each.is_file() and "z" not in each.name), key=lambda f: f.stat().st_size
    )
    chunk.write_bytes(chunk.read_bytes()[:-20])
    said = rf"/{at.relative_to(path)}: chunk 0.* cannot be read: .*Copy or download"
    for read in (lambda: read_cells(path), lambda: codes_of_file(path, tokenizer())):
        with pytest.raises(InputError, match=said):
            read()


# Values that are not counts: both ways reject them alike.

STORAGES = {
    "h5ad, csr": lambda values, folder: retyped(folder, "csr", values),
    "h5ad, csc": lambda values, folder: retyped(folder, "csc", values),
    "h5ad, dense": lambda values, folder: retyped(folder, "dense", values),
    "zarr, csr": lambda values, folder: retyped(folder, "csr", values, ".zarr"),
    "zarr, dense": lambda values, folder: retyped(folder, "dense", values, ".zarr"),
    "10x": lambda values, folder: retyped_tenx(folder, values),
}


def retyped(folder: Path, form: str, dtype: str, suffix: str = ".h5ad") -> Path:
    made, path = cells().copy(), folder / f"cells{suffix}"
    made.obs = made.obs[["depth"]]
    made.X = FORMS[form](made.X)
    root = h5py.File(path, "w") if suffix == ".h5ad" else zarr.open_group(path, mode="w")
    write_elem(root, "/", made)
    part, name = (root, "X") if form == "dense" else (root["X"], "data")
    values, kept = part[name][...], dict(part[name].attrs)
    del part[name]
    values = values.astype(dtype)
    array = part.create_dataset(name, data=values) if suffix == ".h5ad" else part.create_array(name, data=values)
    array.attrs.update(kept)
    if suffix == ".h5ad":
        root.close()
    return path


def retyped_tenx(folder: Path, dtype: str) -> Path:
    path = tenx(3, folder)
    with h5py.File(path, "r+") as file:
        values = file["matrix/data"][()].astype(dtype)
        del file["matrix/data"]
        file["matrix/data"] = values
    return path


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dtype", ["bool", "complex64", "S4"])
@pytest.mark.parametrize("storage", STORAGES)
def test_values_that_are_no_counts_are_refused_both_ways(storage, dtype, tmp_path):
    path = STORAGES[storage](dtype, tmp_path)
    said = set()
    for read in (lambda: read_cells(path), lambda: codes_of_file(path, tokenizer())):
        with pytest.raises(
            InputError, match=rf"(type|holds) {re.escape(np.dtype(dtype).str) if dtype == 'S4' else dtype}"
        ) as error:
            read()
        said.add(str(error.value).replace(str(path), path.name))
    assert len(said) == 1


# Files that ask for more memory than they hold.


def bare(path: Path, n: int = 24, **obs) -> h5py.File:
    """Write a file whose parts a test replaces."""
    made = anndata.AnnData(cells().X[:n], obs=pd.DataFrame(index=cells().obs_names[:n]), var=cells().var)
    made.write_h5ad(path)
    return h5py.File(path, "r+")


def replaced(file: h5py.File, name: str, **kinds) -> h5py.Dataset:
    kept = dict(file[name].attrs) if name in file else {}
    if name in file:
        del file[name]
    made = file.create_dataset(name, **kinds)
    made.attrs.update(kept)
    return made


def one_long_name(folder):
    with bare(folder / "cells.h5ad") as file:
        names = np.array(["x" * 10_000_000, *(f"cell{i}" for i in range(1, 24))], dtype=object)
        replaced(file, "obs/_index", data=names, dtype=STRING)


def a_long_category(folder):
    with bare(folder / "cells.h5ad") as file:
        group = file.create_group("obs/type")
        group.attrs.update({"encoding-type": "categorical", "encoding-version": "0.2.0", "ordered": False})
        group["codes"] = np.arange(24, dtype=np.int8) % 3
        group.create_dataset("categories", data=np.array(["y" * 10_000_000, "a", "b"], dtype=object), dtype=STRING)


def one_text_for_all(folder):
    """200,000 cells share one name of 1 MB, stored once: unpacked it is 200 GB."""
    with bare(folder / "cells.h5ad") as file:
        names = replaced(file, "obs/_index", shape=(200_000,), chunks=(200_000,), dtype=STRING)
        names[0] = "x" * 2**20
        _, stored = names.id.read_direct_chunk((0,))
        names.id.write_direct_chunk((0,), stored[:16] * 200_000)
        replaced(file, "X", shape=(200_000, len(SYMBOLS)), dtype="f4", chunks=(1000, len(SYMBOLS)))


def a_row_of_zeros(folder):
    with bare(folder / "cells.h5ad") as file:
        for name, kind in (("X/data", "f4"), ("X/indices", "i4")):
            replaced(file, name, shape=(2**28,), dtype=kind, chunks=(2**22,), compression="gzip")
        indptr = np.full(25, 2**28)
        indptr[0] = 0
        replaced(file, "X/indptr", data=indptr)


@cache
def zeros(wbits: int) -> bytes:
    """512 MiB of zeros, deflated."""
    packer = zlib.compressobj(1, wbits=wbits)
    return b"".join([*(packer.compress(bytes(2**20)) for _ in range(512)), packer.flush()])


def zstd_zeros() -> bytes:
    """512 MiB of zeros as 16 kB of zstd: each block repeats one byte 128 KiB times."""
    head = b"\x28\xb5\x2f\xfd\xe0" + (2**29).to_bytes(8, "little")
    blocks = [(int(i == 4095) | 1 << 1 | 2**17 << 3).to_bytes(3, "little") + b"\0" for i in range(4096)]
    return head + b"".join(blocks)


def deflated(chunk: int):
    """Write a chunk of so many values that its stored bytes unpack to 512 MiB."""

    def make(folder):
        n = len(cells().X.data)
        with bare(folder / "cells.h5ad") as file:
            kinds = {"dtype": "f4", "chunks": (chunk,), "compression": "gzip"}
            data = replaced(file, "X/data", shape=(n,), maxshape=(None,), **kinds)
            data.id.write_direct_chunk((0,), zeros(15))

    return make


def nothing_stored(folder):
    with bare(folder / "cells.h5ad") as file:
        replaced(file, "X", shape=(2**40, 2**40), dtype="f4", chunks=(1, 1024))
        for name in ("obs/_index", "var/_index"):
            replaced(file, name, shape=(2**40,), dtype=STRING, chunks=(1024,))


def many_genes(folder):
    with bare(folder / "cells.h5ad") as file:
        replaced(file, "X", shape=(24, 10**9), dtype="f4", chunks=(1, 1024))
        replaced(file, "var/_index", shape=(10**9,), dtype="S8", chunks=(2**20,), compression="gzip")


def store_of_zeros(codec):
    def make(folder):
        path = zarr_store(3, codec, "csr", folder)
        chunk = next(each for each in (path / "X/data/c").rglob("*") if each.is_file())
        chunk.write_bytes(zeros(31) if codec == "gzip" else zstd_zeros())

    return make


def market_of_zeros(folder):
    path = market("", folder)
    (path / "barcodes.tsv").unlink()
    (path / "barcodes.tsv.gz").write_bytes(zeros(31))


BOMBS = [
    *(one_text_for_all, a_row_of_zeros, deflated(2**27), deflated(100), nothing_stored, many_genes),
    *(store_of_zeros("zstd"), store_of_zeros("gzip"), market_of_zeros),
]


def bombs(number, folder):
    """Ten plain files give the baseline of memory; then come two with a long text, which can be read, and the bombs."""
    if number < 10:
        return use(h5ad("csr", "gzip", folder), number, folder)
    if number < 12:
        (one_long_name, a_long_category)[number - 10](folder)
        codes_of_file(folder / "cells.h5ad", tokenizer())
        obs = read_cells(folder / "cells.h5ad").obs
        assert max(map(len, [*obs.index, *obs.get("type", [])])) == 10_000_000
        return None
    BOMBS[number - 12](folder)
    (path,) = folder.iterdir()
    with limited("8G"):
        try:
            read_cells(path)
        except InputError:
            codes_of_file(path, tokenizer())
    raise AssertionError("it was read")


def test_bombs_take_no_memory(tmp_path):
    survive(bombs, tmp_path, cases=12 + len(BOMBS), grows=700)  # 256 MiB of a text file are read before it is rejected


# Files that would read or change other files.


def an_external_link(file, other):
    file["obs/depth"] = h5py.ExternalLink(str(other), "/secret")


def a_link_to_a_link(file, other):
    file["away"] = h5py.ExternalLink(str(other), "/")
    file["obs/depth"] = h5py.SoftLink("/away/secret")


def external_storage(file, other):
    file["obs"].create_dataset("depth", shape=(24,), dtype="u1", external=[(str(other), 0, 24)])


def counts_elsewhere(file, other):
    replaced(file, "X/data", shape=(len(cells().X.data),), dtype="f4", external=[(str(other), 0, 2**20)])


def a_virtual_dataset(file, other):
    layout = h5py.VirtualLayout((24,), "i8")
    layout[:] = h5py.VirtualSource(str(other), "secret", (24,))
    file["obs"].create_virtual_dataset("depth", layout)


def where_results_go(file, other):
    """A result written into obsm would go into the other file."""
    del file["obsm"]
    file["obsm"] = h5py.ExternalLink(str(other), "/")


ELSEWHERE = [
    *(an_external_link, a_link_to_a_link, external_storage, counts_elsewhere, a_virtual_dataset, where_results_go),
]


@pytest.mark.parametrize("make", ELSEWHERE)
def test_nothing_of_another_file_is_read(make, tmp_path):
    with h5py.File(tmp_path / "other.h5", "w") as other:
        other["secret"] = np.arange(24)
    before = (tmp_path / "other.h5").read_bytes()
    with bare(tmp_path / "cells.h5ad") as file:
        make(file, tmp_path / "other.h5")
    for read in (read_cells, read_results, obs_of, lambda path: codes_of_file(path, tokenizer())):
        with pytest.raises(
            InputError, match=r"cells\.h5ad: /\S* (has a link, .*, to the|keeps its values in another) file"
        ):
            read(tmp_path / "cells.h5ad")
    with pytest.raises(InputError), copied(tmp_path / "cells.h5ad", tmp_path / "out.h5ad"):
        raise AssertionError("it was copied")
    assert (tmp_path / "other.h5").read_bytes() == before


def test_links_inside_a_file_are_followed(tmp_path):
    """This includes links in circles."""
    with bare(tmp_path / "cells.h5ad") as file:
        file["layers/counts"] = h5py.SoftLink("/X")
        file["uns/up"], file["uns/again"] = file["/"], h5py.SoftLink("/uns")
        file["uns/a"], file["uns/b"] = h5py.SoftLink("/uns/b"), h5py.SoftLink("/uns/a")
        file["uns/nowhere"] = h5py.SoftLink("/nowhere")
    assert (read_cells(tmp_path / "cells.h5ad", layer="counts").layers["counts"] != cells().X).nnz == 0


def test_links_out_of_a_store(tmp_path):
    (tmp_path / "secret").write_bytes(b"secret")
    path = zarr_store(3, "none", "dense", tmp_path)
    chunk = next(each for each in (path / "obs/depth/c").rglob("*") if each.is_file())
    chunk.unlink()
    chunk.symlink_to(tmp_path / "secret")
    for read in (read_cells, obs_of, lambda path: codes_of_file(path, tokenizer())):
        with pytest.raises(InputError, match=r"cells.zarr holds a link, obs/depth/c/0, to .*secret"):
            read(path)


def test_a_codec_that_runs_programs(tmp_path):
    """zarr 2 has a codec that unpickles."""
    path = zarr_store(2, "none", "csr", tmp_path)
    told = json.loads((path / "obs/depth/.zarray").read_text())
    told |= {"filters": [{"id": "pickle", "protocol": 5}], "dtype": "|O"}
    (path / "obs/depth/.zarray").write_text(json.dumps(told))
    (path / "obs/depth/0").write_bytes(b"cos\nsystem\n(S'touch %s'\ntR." % str(tmp_path / "ran").encode())
    for read in (read_cells, lambda path: open_source(path, scratch=tmp_path).column("depth", 0, 24)):
        with contextlib.suppress(InputError):
            read(path)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("left", range(8))
def test_a_heap_that_is_cut_short(tmp_path, left):
    path = h5ad("csr", "plain", tmp_path)
    data = path.read_bytes()
    path.write_bytes(data[: data.index(b"GCOL") + 1000 + left])
    with pytest.raises(InputError, match=r"cells\.h5ad is cut short: [\d,]+ of [\d,]+ bytes"):
        read_cells(path)


def test_a_heap_that_does_not_end(tmp_path):
    """HDF5 would search it for the texts without end."""
    path = h5ad("csr", "plain", tmp_path)
    data = bytearray(path.read_bytes())
    at = data.index(b"GCOL") + 16
    data[at : at + 16] = bytes(16)
    path.write_bytes(data)
    with pytest.raises(InputError, match=r"the texts that it keeps at byte [\d,]+ do not end"):
        read_cells(path)


@pytest.mark.parametrize(
    ("given", "size"), [(100, 100 * 2**20), ("100", 100 * 2**20), ("4G", 2**32), ("1.5 GiB", 3 * 2**29), ("1TB", 2**40)]
)
def test_sizes_of_memory(given, size):
    assert memory.size_of(given) == size


@pytest.mark.parametrize("given", ["", "lots", "-1", 0, "4X"])
def test_sizes_that_are_none(given):
    with pytest.raises(InputError, match="expected a number of MiB, or a size such as 4G"):
        memory.size_of(given)


def test_what_is_refused_says_both_numbers(tmp_path):
    with bare(tmp_path / "cells.h5ad") as file:
        many = replaced(file, "X/data", shape=(2**26,), dtype="f4", chunks=(2**26,), compression="gzip")
        many[:1000] = 1
    with (
        limited("500M"),
        pytest.raises(InputError, match=r"/X/data: a chunk of 67,108,864 values would take 768 MiB .* 500 MiB"),
    ):
        read_cells(tmp_path / "cells.h5ad")
