"""Cell Ranger's .h5 files and Matrix Market folders, compared with scanpy's readers."""

import gzip
import shutil
import tracemalloc

import h5py
import numpy as np
import pandas as pd
import pytest
import scanpy as sc
import scipy.io
import scipy.sparse as sp
from anndata import AnnData
from hypothesis import given, settings
from hypothesis import strategies as st

from rvqa.data.files import matrix_market, tenx
from rvqa.data.files.hdf5 import Dataset
from rvqa.errors import InputError

TYPES = ("Gene Expression", "Antibody Capture")


@pytest.fixture(scope="module")
def cells(read) -> AnnData:
    """300 real cells; the last genes are called antibodies, two genes share a symbol, and one cell has no counts."""
    adata = read("pbmc3k_10x")[:300].copy()
    symbols = adata.var_names.to_numpy().astype(object)
    symbols[7] = symbols[3]
    return made(adata.X, symbols)


def made(matrix, symbols) -> AnnData:
    counts = sp.csr_matrix(matrix).astype(np.int32)
    counts.data[slice(*counts.indptr[min(5, counts.shape[0] - 1) :][:2])] = 0
    counts.eliminate_zeros()
    numbers = np.arange(counts.shape[1])
    var = pd.DataFrame(
        {
            "gene_ids": [f"ENSG{number:011d}" for number in numbers],
            "feature_types": np.where(numbers < len(numbers) - 4, *TYPES),
            "genome": "GRCh38",
        },
        index=symbols,
    )
    letters = np.array(list("ACGT"))
    names = ["".join(letters[number // 4 ** np.arange(8) % 4]) + "-1" for number in range(counts.shape[0])]
    adata = AnnData(counts, obs=pd.DataFrame(index=names))
    adata.var = var
    return adata


def write_h5(path, adata, version=3, genomes=("GRCh38",)):
    """Write the layout of Cell Ranger; genomes after the first have the genes in reverse order."""
    counts = sp.csr_matrix(adata.X)

    def put(group, **datasets):
        for name, values in datasets.items():
            values = np.asarray(values)
            values = values.astype("S") if values.dtype.kind in "OU" else values
            stored = {"compression": "gzip", "chunks": (min(len(values), 5000),)} if len(values) else {}
            group.create_dataset(name, data=values, **stored)

    with h5py.File(path, "w") as file:
        for at, genome in enumerate(["matrix"] if version == 3 else genomes):
            var, stored = (adata.var, counts) if at == 0 else (adata.var[::-1], counts[:, ::-1].tocsr())
            group = file.create_group(genome)
            put(group, barcodes=adata.obs_names, data=stored.data, indices=stored.indices.astype(np.int64))
            put(group, indptr=stored.indptr.astype(np.int64), shape=np.array(stored.shape[::-1], dtype=np.int32))
            if version == 3:
                features = group.create_group("features")
                put(features, _all_tag_keys=["genome"], id=var["gene_ids"], name=var.index, genome=var["genome"])
                put(features, feature_type=var["feature_types"])
            else:
                put(group, genes=var["gene_ids"], gene_names=var.index)
    return path


def write_text(path, text, packed=None):
    if isinstance(text, str):
        text = text.encode()
    path.write_bytes(gzip.compress(text, 1) if (path.suffix == ".gz" if packed is None else packed) else text)


def write_folder(
    folder, adata, *, prefix="", gz=".gz", features="features.tsv", columns=3, field="integer", cells=False
):
    """Write three files with `columns` of the features, with cells as rows if `cells` is set."""
    folder.mkdir(exist_ok=True)
    counts = sp.csr_matrix(adata.X)
    plain = folder / "plain.mtx"
    scipy.io.mmwrite(plain, counts if cells else counts.T.tocsr(), field=field, symmetry="general")
    write_text(folder / f"{prefix}matrix.mtx{gz}", plain.read_bytes())
    plain.unlink()
    table = pd.DataFrame({"id": adata.var["gene_ids"], "name": adata.var_names, "type": adata.var["feature_types"]})
    table = table.iloc[:, :columns].to_csv(sep="\t", header=False, index=False)
    write_text(folder / f"{prefix}{features}{gz}", table)
    write_text(folder / f"{prefix}barcodes.tsv{gz}", "\n".join(adata.obs_names) + "\n")
    return folder


def open_folder(path) -> tenx.Opened:
    files = matrix_market.find_matrix_market(path)
    assert files is not None
    return matrix_market.open_matrix_market(files)


def whole(matrix) -> sp.csr_matrix:
    """Read all rows in the blocks that a run asks for."""
    parts = [matrix.rows(*block) for block in matrix.blocks(0, matrix.shape[0])]
    width = matrix.shape[1]
    rows = [sp.csr_matrix((each.data, each.indices, each.indptr), (len(each.indptr) - 1, width)) for each in parts]
    return sp.vstack(rows, format="csr") if rows else sp.csr_matrix((0, width))


def assert_same(opened: tenx.Opened, adata: AnnData, columns=("gene_ids", "feature_types", "genome")):
    assert opened.matrix.shape == adata.shape
    assert (whole(opened.matrix) != sp.csr_matrix(adata.X)).nnz == 0
    assert opened.names.dtype == object
    assert opened.names.tolist() == adata.obs_names.tolist()
    assert opened.var.index.tolist() == adata.var_names.tolist()
    assert opened.var.columns.tolist() == list(columns)
    for column in columns:
        assert opened.var[column].tolist() == adata.var[column].tolist()


@pytest.fixture
def path(cells, tmp_path):
    return write_h5(tmp_path / "filtered_feature_bc_matrix.h5", cells)


@pytest.fixture(scope="module")
def tiny(cells) -> AnnData:
    """20 cells and 40 genes, most of them with counts."""
    most = np.argsort(-np.asarray(cells.X.sum(axis=0)).ravel())[:40]
    return cells[:20, np.sort(most)].copy()


@pytest.fixture
def folder(tiny, tmp_path):
    return write_folder(tmp_path / "sample", tiny, gz="")


class TestCellRanger:
    def test_version_3(self, cells, path):
        with h5py.File(path) as file:
            assert tenx.is_tenx(file)
            opened = tenx.open_tenx(file)
            assert_same(opened, cells)
            assert_same(opened, sc.read_10x_h5(path, gex_only=False))

    def test_version_2(self, cells, tmp_path):
        path = write_h5(tmp_path / "cells.h5", cells, 2, ["hg19"])
        with h5py.File(path) as file:
            assert tenx.is_tenx(file)
            opened = tenx.open_tenx(file)
            assert set(opened.var.pop("genome")) == {"hg19"}
            assert_same(opened, sc.read_10x_h5(path), ["gene_ids"])

    @pytest.mark.parametrize(
        "genomes", [("mm10", "hg19"), ("GRCh38_premrna", "mm10"), ("mm10",), ("background_removed",)]
    )
    def test_the_human_genome_or_the_only_one(self, tiny, tmp_path, genomes):
        path = write_h5(tmp_path / "cells.h5", tiny, 2, genomes)
        human = next((name for name in genomes if name != "mm10"), "mm10")
        with h5py.File(path) as file:
            opened = tenx.open_tenx(file)
            assert set(opened.var.pop("genome")) == {human}
            assert_same(opened, sc.read_10x_h5(path, genome=human), ["gene_ids"])

    @pytest.mark.parametrize("genomes", [("mm10", "rn6"), ("hg19", "GRCh38", "mm10")])
    def test_several_genomes(self, tiny, tmp_path, genomes):
        path = write_h5(tmp_path / "cells.h5", tiny, 2, genomes)
        with h5py.File(path) as file, pytest.raises(InputError, match=r"holds the genomes .*mm10.*one that is human"):
            tenx.open_tenx(file)

    def test_counts_are_read_when_asked_for(self, path, monkeypatch):
        asked = []
        read = Dataset.read
        monkeypatch.setattr(Dataset, "read", lambda self, *span: asked.append(span) or read(self, *span))
        with h5py.File(path) as file:
            opened = tenx.open_tenx(file)
            assert asked == []
            opened.matrix.rows(10, 12)
            assert all(stop - start < 10_000 for start, stop in asked)

    def test_a_matrix_of_probes(self, tiny, path):
        genes = [f"ENSG{number // 3:011d}" for number in range(len(h5py.File(path)["matrix/features/id"]))]
        with h5py.File(path, "r+") as file:
            file["matrix/features"].create_dataset("gene_id", data=np.array(genes, dtype="S"))
        with h5py.File(path) as file:
            assert tenx.open_tenx(file).var["gene_ids"].tolist() == genes
        assert sc.read_10x_h5(path, gex_only=False).var["gene_ids"].tolist() == genes

    def test_names_of_other_letters_and_of_variable_length(self, tiny, tmp_path):
        path = write_h5(tmp_path / "cells.h5", tiny)
        names = ["TCR\u03b3\u03b4", *tiny.var_names[1:]]
        replace(path, "matrix/features/name", np.array(names, dtype=object))
        with h5py.File(path) as file:
            assert tenx.open_tenx(file).var.index.tolist() == names
        replace(path, "matrix/features/name", np.array([name.encode() for name in names]))
        with h5py.File(path) as file:
            assert tenx.open_tenx(file).var.index.tolist() == names

    def test_a_matrix_without_types_and_genomes(self, tiny, tmp_path):
        path = write_h5(tmp_path / "cells.h5", tiny)
        with h5py.File(path, "r+") as file:
            del file["matrix/features/genome"], file["matrix/features/feature_type"]
        with h5py.File(path) as file:
            assert_same(tenx.open_tenx(file), tiny, ["gene_ids"])

    def test_other_files(self, tiny, tmp_path):
        tiny.write_h5ad(tmp_path / "cells.h5ad")
        with h5py.File(tmp_path / "cells.h5ad") as file:
            assert not tenx.is_tenx(file)
            with pytest.raises(
                InputError, match=r"not a matrix of Cell Ranger: it holds 'X'.*Give filtered_feature_bc"
            ):
                tenx.open_tenx(file)
        with h5py.File(tmp_path / "cells.loom", "w") as file:
            file["matrix"] = np.zeros((3, 2))
            assert not tenx.is_tenx(file)
        with h5py.File(tmp_path / "empty.h5", "w") as file, pytest.raises(InputError, match="it holds nothing"):
            tenx.open_tenx(file)


def replace(path, name, values):
    with h5py.File(path, "r+") as file:
        del file[name]
        if values is not None:
            file[name] = values


DAMAGES = {
    "no data": ("data", None, "/matrix lacks data"),
    "no features": ("features", None, "/matrix lacks features"),
    "no barcodes": ("barcodes", None, "/matrix lacks barcodes"),
    "no names": ("features/name", None, "/matrix/features lacks name"),
    "few barcodes": ("barcodes", np.array([b"A", b"C"]), "20 cells, but the file 2 barcodes"),
    "few names": ("features/name", np.array([b"A", b"C"]), "40 genes, but the file 2 gene symbols"),
    "few ids": ("features/id", np.array([b"A", b"C"]), "40 genes, but the file 2 gene_ids"),
    "numbers for names": ("features/name", np.arange(40), "name holds int64 along 1 axes; expected texts"),
    "names of two axes": ("barcodes", np.array([[b"A"]]), "barcodes holds .* along 2 axes; expected texts"),
    "a scalar shape": ("shape", 3, "shape does not hold two whole numbers"),
    "a shape of text": ("shape", np.array([b"3", b"4"]), "shape does not hold two whole numbers"),
    "another shape": ("shape", np.array([40, 21]), "21 cells, but the file 20 barcodes"),
    "an absurd shape": ("shape", np.array([40, 2**60]), "but the file 20 barcodes"),
    "a negative shape": ("shape", np.array([-40, 20]), "-40 genes"),
    "few pointers": ("indptr", np.arange(5), "5 row pointers for 20 cells"),
    "few indices": ("indices", np.arange(5), "5 columns for"),
    "texts for counts": ("data", np.array([b"1"]), "data holds .* along 1 axes; expected numbers"),
    "dense counts": ("data", np.ones((20, 40)), "data holds float64 along 2 axes; expected numbers"),
    "real indices": ("indices", np.arange(5.0), "indices holds float64"),
    "pointers that decrease": ("indptr", np.arange(21)[::-1].copy(), "pointers of cells 0 to 20 decrease"),
    "pointers beyond": ("indptr", np.arange(21) * 1000, "pointers of cells 0 to 20 decrease or leave"),
    "a group for data": ("data", "group", "is damaged"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_broken_file(tiny, tmp_path, damage):
    name, values, said = DAMAGES[damage]
    path = write_h5(tmp_path / "cells.h5", tiny)
    if isinstance(values, str):
        replace(path, f"matrix/{name}", None)
        with h5py.File(path, "r+") as file:
            file.create_group(f"matrix/{name}")
    else:
        replace(path, f"matrix/{name}", values)
    with h5py.File(path) as file, pytest.raises(InputError, match=said) as caught:
        whole(tenx.open_tenx(file).matrix)
    assert str(caught.value).startswith(str(path)) or "pointers of" in said


@pytest.mark.parametrize("dtype", ["S18", h5py.string_dtype()])
def test_names_that_are_only_promised(tiny, tmp_path, dtype):
    """A file of a few kilobytes claims 10 ** 11 barcodes."""
    path = write_h5(tmp_path / "cells.h5", tiny)
    replace(path, "matrix/shape", np.array([40, 10**11]))
    replace(path, "matrix/barcodes", None)
    with h5py.File(path, "r+") as file:
        file.create_dataset("matrix/barcodes", (10**11,), dtype=dtype, chunks=(1000,))
    with h5py.File(path) as file, pytest.raises(InputError, match=r"promises 100,000,000,000 texts.* stores 0 bytes"):
        tenx.open_tenx(file)


class TestMatrixMarket:
    def test_version_3(self, cells, tmp_path):
        folder = write_folder(tmp_path / "filtered_feature_bc_matrix", cells)
        opened = open_folder(folder)
        assert_same(opened, cells, ["gene_ids", "feature_types"])
        assert_same(opened, sc.read_10x_mtx(folder, make_unique=False, gex_only=False), ["gene_ids", "feature_types"])
        assert whole(opened.matrix).dtype == np.float32

    def test_version_2(self, cells, tmp_path):
        folder = write_folder(tmp_path / "hg19", cells, gz="", features="genes.tsv", columns=2)
        assert_same(open_folder(folder), sc.read_10x_mtx(folder, make_unique=False), ["gene_ids"])

    @pytest.mark.parametrize("prefix", ["GSM123_sample_", "GSM123.", "a matrix.mtx of "])
    def test_a_prefix(self, tiny, tmp_path, prefix):
        folder = write_folder(tmp_path / "GSE1", tiny, prefix=prefix)
        right = sc.read_10x_mtx(folder, make_unique=False, gex_only=False, prefix=prefix)
        assert_same(open_folder(folder), right, ["gene_ids", "feature_types"])

    def test_the_path_of_the_matrix_chooses_the_prefix(self, cells, tiny, tmp_path):
        folder = write_folder(tmp_path / "GSE1", tiny, prefix="GSM1_")
        write_folder(folder, cells[:30], prefix="GSM2_", gz="")
        write_folder(folder, tiny[:3])
        columns = ["gene_ids", "feature_types"]
        assert_same(open_folder(folder / "GSM1_matrix.mtx.gz"), tiny, columns)
        assert_same(open_folder(folder / "GSM2_matrix.mtx"), cells[:30], columns)
        assert_same(open_folder(folder / "matrix.mtx.gz"), tiny[:3], columns)
        with pytest.raises(
            InputError, match=r"3 matrices \(matrix.mtx, GSM1_matrix.mtx, GSM2_matrix.mtx\).*one of these"
        ):
            matrix_market.find_matrix_market(folder)

    def test_a_matrix_of_another_name(self, tiny, folder):
        (folder / "matrix.mtx").rename(folder / "UniqueAndMult-EM.mtx")
        assert_same(open_folder(folder / "UniqueAndMult-EM.mtx"), tiny, ["gene_ids", "feature_types"])
        for name in ("features.tsv", "barcodes.tsv"):
            (folder / name).rename(folder / f"UniqueAndMult-EM{name}")
        assert_same(open_folder(folder / "UniqueAndMult-EM.mtx"), tiny, ["gene_ids", "feature_types"])

    def test_hidden_files_do_not_count(self, tiny, folder):
        (folder / "._matrix.mtx").write_bytes(b"\0\5\26\7")
        assert_same(open_folder(folder), tiny, ["gene_ids", "feature_types"])

    def test_other_paths(self, tmp_path):
        assert matrix_market.find_matrix_market(tmp_path) is None
        assert matrix_market.find_matrix_market(tmp_path / "cells.h5ad") is None
        (tmp_path / "matrix.csv").touch()
        assert matrix_market.find_matrix_market(tmp_path) is None
        with pytest.raises(InputError, match=r"cells.mtx does not exist. Give the path of a .mtx file"):
            matrix_market.find_matrix_market(tmp_path / "cells.mtx")

    @pytest.mark.parametrize(
        ("name", "said"),
        [
            ("matrix.mtx", "has no matrix.mtx "),
            ("features.tsv", "has no features.tsv or genes.tsv "),
            ("barcodes.tsv", "has no barcodes.tsv "),
        ],
    )
    def test_a_missing_file(self, folder, name, said):
        (folder / name).unlink()
        with pytest.raises(InputError, match=said):
            matrix_market.find_matrix_market(folder)

    @pytest.mark.parametrize("field", ["integer", "real"])
    @pytest.mark.parametrize("turned", [False, True])
    @pytest.mark.parametrize("columns", [1, 2, 3])
    def test_forms(self, tiny, tmp_path, field, turned, columns):
        folder = write_folder(tmp_path / "a", tiny, columns=columns, field=field, cells=turned)
        right = tiny.copy()
        if columns == 1:
            right.var_names = right.var["gene_ids"].tolist()
        assert_same(open_folder(folder), right, ["gene_ids", *(["feature_types"] if columns == 3 else [])])

    def test_as_many_cells_as_genes(self, tiny, tmp_path):
        """Only the convention of 10x says which axis is which."""
        square = tiny[:, :20].copy()
        folder = write_folder(tmp_path / "a", square)
        assert_same(open_folder(folder), square, ["gene_ids", "feature_types"])

    @pytest.mark.parametrize("kind", ["windows", "no last line end", "bom", "quoted", "headers", "more columns"])
    def test_texts_of_other_programs(self, tiny, folder, kind):
        for name in ("matrix.mtx", "features.tsv", "barcodes.tsv"):
            text = (folder / name).read_bytes().decode()
            if kind == "windows":
                text = text.replace("\n", "\r\n")
            elif kind == "no last line end":
                text = text.rstrip("\n")
            elif kind == "bom" and name != "matrix.mtx":
                text = "\ufeff" + text
            elif kind == "quoted" and name != "matrix.mtx":
                text = '"' + text.rstrip("\n").replace("\t", '"\t"').replace("\n", '"\n"') + '"\n'
            elif kind == "headers" and name != "matrix.mtx":
                text = {"f": "gene_id\tgene_name\tfeature_type\n", "b": "barcode\n"}[name[0]] + text
            elif kind == "more columns" and name != "matrix.mtx":
                text = text.replace("\n", "\tchr1\t5\t9\n")
            (folder / name).write_bytes(text.encode())
        assert_same(open_folder(folder), tiny, ["gene_ids", "feature_types"])

    def test_symbols_that_look_like_something_else(self, tiny, folder):
        """Names like NA, 1 and S (a first gene) are not missing values, numbers or headers."""
        symbols = ["S", "NA", "nan", "1e5", "007", *tiny.var_names[5:]]
        write_text(folder / "features.tsv", "\n".join(symbols) + "\n")
        write_text(folder / "barcodes.tsv", "\n".join(map(str, range(20))) + "\n")
        opened = open_folder(folder)
        assert opened.var.index.tolist() == symbols
        assert opened.names.tolist() == [str(number) for number in range(20)]

    def test_bytes_say_what_is_gzip(self, tiny, tmp_path):
        """Browsers may unpack a file and keep its .gz name."""
        folder = write_folder(tmp_path / "a", tiny)
        for name in ("matrix.mtx.gz", "features.tsv.gz", "barcodes.tsv.gz"):
            text = gzip.decompress((folder / name).read_bytes())
            write_text(folder / name, text, packed=False)
        assert_same(open_folder(folder), tiny, ["gene_ids", "feature_types"])
        for name in ("matrix.mtx", "features.tsv", "barcodes.tsv"):
            write_text(folder / name, (folder / f"{name}.gz").read_bytes(), packed=True)
            (folder / f"{name}.gz").unlink()
        assert_same(open_folder(folder), tiny, ["gene_ids", "feature_types"])

    def test_values_are_what_the_file_says(self, tmp_path):
        """scipy reads 5.5 as 5, and 1e3 as 1, if the first line declares whole numbers."""
        lines = ["%%MatrixMarket matrix coordinate integer general", "3 2 4", "1 1 5.5", "2 1 1e3", "3 2 7", "3 1 0"]
        write_text(tmp_path / "matrix.mtx", "\n".join(lines))
        write_text(tmp_path / "genes.tsv", "A\nB\nC")
        write_text(tmp_path / "barcodes.tsv", "x1\nx2")
        assert whole(open_folder(tmp_path).matrix).toarray().tolist() == [[5.5, 1000, 0], [0, 0, 7]]
        write_text(tmp_path / "matrix.mtx", "\n".join(lines).replace("1e3", "16777217"))
        counts = whole(open_folder(tmp_path).matrix)
        assert counts.dtype == np.float64
        assert counts[0, 1] == 16777217

    def test_no_permission(self, folder, monkeypatch):
        files = matrix_market.find_matrix_market(folder)
        monkeypatch.setattr("os.access", lambda *_: False)
        with pytest.raises(InputError, match=r"matrix.mtx may not be read: permission denied"):
            matrix_market.open_matrix_market(files)
        with pytest.raises(InputError, match="sample may not be read: permission denied"):
            matrix_market.find_matrix_market(folder)


FIRST = "%%MatrixMarket matrix coordinate integer general\n"
TEXTS = {
    "a pattern": (FIRST.replace("integer", "pattern") + "3 2 1\n1 1\n", "pattern has no counts; expected a general"),
    "complex": (FIRST.replace("integer", "complex") + "3 2 1\n1 1 1 0\n", "complex matrix .*; expected a general"),
    "symmetric": (FIRST.replace("general", "symmetric") + "3 3 1\n1 1 1\n", "symmetric real matrix"),
    "dense": ("%%MatrixMarket matrix array integer general\n3 2\n" + "1\n" * 6, "in array form; expected"),
    "too few": (FIRST + "3 2 3\n1 1 1\n2 1 5555555\n", "cut short: it holds 2 of the 3 entries"),
    "cut in a line": (FIRST + "3 2 2\n1 1 1\n2 1", "Line 4: Invalid"),
    "too many": (FIRST + "3 2 1\n1 1 1\n2 1 5\n", "does not end after the 1 entries"),
    "a row beyond": (FIRST + "3 2 1\n4 1 1\n", "Row index out of bounds"),
    "a column beyond": (FIRST + "3 2 1\n1 3 1\n", "Column index out of bounds"),
    "from zero": (FIRST + "3 2 1\n0 1 1\n", "Row index out of bounds"),
    "words": (FIRST + "3 2 1\n1 1 one\n", "Line 3: Invalid"),
    "no first line": ("3 2 1\n1 1 1\n", "not a Matrix Market file"),
    "nothing": ("", "not a Matrix Market file"),
    "no sizes": (FIRST, "Premature EOF"),
    "sizes below zero": (FIRST + "3 -2 1\n1 1 1\n", "can't be negative"),
    "sizes of 30 digits": (FIRST + f"3 2 {10**30}\n1 1 1\n", "out of range"),
    "other sizes": (FIRST + "3 4 1\n1 1 1\n", "3 rows and 4 columns, but features.tsv names 3 genes and .* 2 cells"),
    "absurd rows": (FIRST + f"{10**15} 2 1\n1 1 1\n", "1,000,000,000,000,000 rows .* names 3 genes"),
    "absurd entries": (FIRST + f"3 2 {10**12}\n1 1 1\n", "promises 1,000,000,000,000 entries, more than"),
    "an endless comment": (FIRST + "%" * 10**6, "a line of more than 65,536 bytes"),
    "an endless line": (FIRST + "3 2 1\n" + "1" * 10**6, "a line of more than 65,536 bytes"),
    "no line at all": ("\0" * 10**6, "not a Matrix Market file"),
}


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("kind", TEXTS)
def test_a_matrix_that_is_wrong(tmp_path, kind, packed):
    text, said = TEXTS[kind]
    write_text(tmp_path / "matrix.mtx", text, packed=packed)
    write_text(tmp_path / "features.tsv", "A\nB\nC\n")
    write_text(tmp_path / "barcodes.tsv", "x1\nx2\n")
    tracemalloc.start()
    with pytest.raises(InputError, match=said) as caught:
        open_folder(tmp_path)
    assert tracemalloc.get_traced_memory()[1] < 5_000_000
    tracemalloc.stop()
    assert str(caught.value).startswith(str(tmp_path / "matrix.mtx"))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("features.tsv", "A\nB\n", "40 rows and 20 columns, but features.tsv names 2 genes and barcodes.tsv 20 cells"),
        ("barcodes.tsv", "", "features.tsv names 40 genes and barcodes.tsv 0 cells"),
        ("features.tsv", "A\nB\tb\n", "features.tsv is damaged: .*Expected 1 fields in line 2, saw 2"),
        ("barcodes.tsv", 'x1\n"x2\nx3', "barcodes.tsv is damaged: .*EOF inside string"),
        ("barcodes.tsv", b"\x1f\x8b\x08", "barcodes.tsv is damaged"),
        ("features.tsv", "A\n" * 30_000, "features.tsv holds more than 50,000 bytes"),
    ],
)
def test_names_that_are_wrong(folder, monkeypatch, name, text, said):
    monkeypatch.setattr(matrix_market, "NAMES", 50_000)
    write_text(folder / name, text)
    with pytest.raises(InputError, match=said):
        open_folder(folder)


def test_more_entries_than_memory_holds(folder, monkeypatch):
    monkeypatch.setattr(np, "zeros", lambda *_, **__: (_ for _ in ()).throw(MemoryError()))
    with pytest.raises(InputError, match=r"matrix.mtx has \d+ entries, which do not fit into memory"):
        open_folder(folder)


@pytest.mark.parametrize("kind", ["cut", "changed"])
def test_a_damaged_gzip_file(cells, tmp_path, kind):
    folder = write_folder(tmp_path / "a", cells)
    for name in ("matrix.mtx.gz", "features.tsv.gz", "barcodes.tsv.gz"):
        there = (folder / name).read_bytes()
        half = len(there) // 2
        (folder / name).write_bytes(there[:half] + (b"" if kind == "cut" else bytes(30) + there[half + 30 :]))
        with pytest.raises(InputError, match=f"{name} is damaged"):
            open_folder(folder)
        (folder / name).write_bytes(there)


@pytest.mark.parametrize("entries", [2, 1_000, 1_000_000, 16_000_000])
def test_a_gzip_file_of_more_entries_than_it_promises(tmp_path, entries):
    """Reading stops at the declared number of entries, although 400 kB unpack to 100 MB; scipy has two messages."""
    write_text(tmp_path / "matrix.mtx.gz", FIRST + "3 2 1\n" + "1 1 1\n" * entries)
    write_text(tmp_path / "features.tsv", "A\nB\nC\n")
    write_text(tmp_path / "barcodes.tsv", "x1\nx2\n")
    tracemalloc.start()
    with pytest.raises(InputError, match="does not end after the 1 entries"):
        open_folder(tmp_path)
    assert tracemalloc.get_traced_memory()[1] < 5_000_000
    tracemalloc.stop()


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 6), st.integers(1, 6), st.integers(0, 2**32 - 1), st.sampled_from([0.0, 0.3, 1.0]))
def test_sizes(tmp_path_factory, cells, genes, seed, share):
    """Every form gives the same for one cell, one gene, cells without counts, and no counts at all."""
    rng = np.random.default_rng(seed)
    counts = rng.integers(1, 9, (cells, genes)) * (rng.random((cells, genes)) < share)
    adata = made(counts, [f"G{number}" for number in range(genes)])
    folder = tmp_path_factory.mktemp("sizes")
    for version, columns in ((3, ["gene_ids", "feature_types", "genome"]), (2, ["gene_ids", "genome"])):
        with h5py.File(write_h5(folder / "cells.h5", adata, version)) as file:
            assert_same(tenx.open_tenx(file), adata, columns)
    for turned in (False, True):
        if turned and cells == genes:
            continue
        assert_same(open_folder(write_folder(folder, adata, cells=turned)), adata, ["gene_ids", "feature_types"])
    shutil.rmtree(folder)


def test_no_cells(tmp_path):
    write_text(tmp_path / "matrix.mtx", FIRST + "3 0 0\n")
    write_text(tmp_path / "features.tsv", "A\nB\nC\n")
    write_text(tmp_path / "barcodes.tsv", "")
    opened = open_folder(tmp_path)
    assert opened.matrix.shape == (0, 3)
    assert opened.names.tolist() == []
    assert not tenx.looks_unfiltered("cells.h5", opened.matrix)


@pytest.mark.parametrize(
    ("name", "right"),
    [
        ("filtered_feature_bc_matrix.h5", False),
        ("raw_counts.h5", False),
        ("raw_feature_bc_matrix.h5", True),
        ("GSM1_raw_feature_bc_matrix.h5", True),
        ("raw_gene_bc_matrices/hg19/matrix.mtx", True),
    ],
)
def test_a_raw_matrix_by_its_name(path, name, right):
    with h5py.File(path) as file:
        assert tenx.looks_unfiltered(name, tenx.open_tenx(file).matrix) is right
        assert tenx.looks_unfiltered(path.parent / name, tenx.open_tenx(file).matrix) is right


def test_a_raw_matrix_by_its_counts(cells, tmp_path):
    """Real cells are among barcodes, most of which have at most two counts."""
    rng = np.random.default_rng(0)
    empty = sp.random(2000, cells.n_vars, density=1.5 / cells.n_vars, random_state=rng)
    empty.data = np.ones_like(empty.data)
    order = rng.permutation(2000 + cells.n_obs)
    raw = made(sp.vstack([cells.X, empty], format="csr")[order], cells.var_names)
    with h5py.File(write_h5(tmp_path / "cells.h5", raw)) as file:
        assert tenx.looks_unfiltered("cells.h5", tenx.open_tenx(file).matrix)
