"""Cell Ranger's folders of Matrix Market files.

A Matrix Market file is text, so it is read whole: 28 bytes of memory an entry while it is read, 8 bytes afterwards. No
size that a file only states is allocated before the file is seen to be that large.
"""

import io
import os
import re
from contextlib import closing
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np
import pandas as pd
import scipy.sparse as sp
from isal import igzip
from scipy.io import mminfo, mmread

from rvqa.data.files.matrices import Array, Compressed
from rvqa.data.files.tenx import DEFLATE, Opened
from rvqa.errors import InputError
from rvqa.io.files import UNREADABLE, sentence

NAMES = 2**28
"""Most bytes of a text file of names: twice those of the 6.8 million barcodes of a whole whitelist."""

_LINE = 2**16
"""Most bytes of a line of a Matrix Market file."""
_HEADER = re.compile(
    r"(barcode|cell|gene|feature|ensembl|id|name|symbol)s?([ _.](barcode|id|(short_)?name|symbol)s?)?|x|v1",
    re.IGNORECASE,
)
_MISSING = re.compile(r"Expected another (\d+) lines")


class MatrixMarket(NamedTuple):
    """The three files of a Matrix Market folder.

    Attributes
    ----------
    path
        Of the matrix.
    features, barcodes
        Of the names of its genes and cells.
    """

    path: Path
    features: Path
    barcodes: Path


def find_matrix_market(path: Path) -> MatrixMarket | None:
    """Find the files of a Matrix Market folder, or those beside a `.mtx` file; None where the path is neither.

    The files are `matrix.mtx`, `features.tsv` or `genes.tsv`, and `barcodes.tsv`, each with the same prefix before its
    name, or none, and each with `.gz` behind it or not. A file goes before its `.gz`, and `features.tsv` before
    `genes.tsv`. Beside a `.mtx` file of another name the others may have no prefix.

    Raises
    ------
    rvqa.errors.InputError
        Several prefixes in one folder, or files that are missing.
    """
    if path.is_dir():
        if not os.access(path, os.R_OK | os.X_OK):
            raise InputError(f"{path} may not be read: permission denied. Ask its owner, or copy it.")
        prefixes = _prefixes(path, "matrix.mtx")
        if len(prefixes) > 1:
            shown = [f"{prefix}matrix.mtx" for prefix in prefixes[:10]] + (["..."] if len(prefixes) > 10 else [])
            raise InputError(
                f"{path} holds {len(prefixes)} matrices ({', '.join(shown)}); expected one. "
                "Give the path of one of these files."
            )
        prefixes = prefixes or _prefixes(path, "barcodes.tsv")[:1]
        return _beside(path, prefixes, _one(path, prefixes, "matrix.mtx")) if prefixes else None
    name = re.fullmatch(r"(.*?)(matrix)?\.mtx(\.gz)?", path.name)
    if name is None:
        return None
    if not path.is_file():
        raise InputError(f"{path} does not exist. Give the path of a .mtx file, or of its folder.")
    return _beside(path.parent, [name[1]] if name[2] else [name[1], ""], path)


def _prefixes(folder: Path, name: str) -> list[str]:
    """What stands before a name in a folder; hidden files, as macOS leaves them, do not count."""
    found = [re.fullmatch(rf"(?!\.)(.*){re.escape(name)}(\.gz)?", each.name) for each in folder.iterdir()]
    return sorted({each[1] for each in found if each})


def _beside(folder: Path, prefixes: list[str], matrix: Path) -> MatrixMarket:
    features = _one(folder, prefixes, "features.tsv", "genes.tsv")
    return MatrixMarket(matrix, features, _one(folder, prefixes, "barcodes.tsv"))


def _one(folder: Path, prefixes: list[str], *names: str) -> Path:
    """First file that there is."""
    offered = [f"{prefix}{name}" for prefix in prefixes for name in names]
    for name in offered:
        for file in (folder / name, folder / f"{name}.gz"):
            if file.is_file():
                return file
    raise InputError(f"{folder} has no {' or '.join(offered)} (.gz or not). Put it there.")


def open_matrix_market(files: MatrixMarket) -> Opened:
    """Read the files of a Matrix Market folder into memory.

    Genes by cells and cells by genes are told apart by the numbers of names; where these are equal the matrix is genes
    by cells, as Cell Ranger writes it. Features have one, two or three columns (id, symbol, type); without symbols the
    ids stand for them. A line of column names is left out.

    Returns
    -------
    Opened
        The counts are float32 where that holds all of them exactly, else float64.

    Raises
    ------
    rvqa.errors.InputError
        A file that is damaged, a matrix that is dense, symmetric or without values, or more or fewer names or entries
        than the matrix states.
    """
    for file in files:
        if not os.access(file, os.R_OK):
            raise InputError(f"{file} may not be read: permission denied. Ask its owner, or copy it.")
    rows, columns, entries = _stated(files.path)
    features, barcodes = _table(files.features), _table(files.barcodes)
    by_genes = (rows, columns) == (len(features), len(barcodes))
    if not by_genes and (columns, rows) != (len(features), len(barcodes)):
        raise InputError(
            f"{files.path} has {rows:,} rows and {columns:,} columns, but {files.features.name} names "
            f"{len(features):,} genes and {files.barcodes.name} {len(barcodes):,} cells. Give the files of one matrix."
        )
    counts = _counts(files.path, entries, by_genes=by_genes)
    small = counts.data.astype(np.float32)
    data = small if np.array_equal(small, counts.data) else counts.data
    matrix = Compressed(Array(counts.indptr), Array(counts.indices), Array(data), counts.shape)
    named = dict(zip(("gene_ids", "symbol", "feature_types"), (features[each] for each in features), strict=False))
    symbols = pd.Index(named.pop("symbol", features[0]).to_numpy())
    var = pd.DataFrame({key: each.to_numpy() for key, each in named.items()}, index=symbols)
    return Opened(matrix, var, barcodes[0].to_numpy(dtype=object))


def _unpacked(path: Path) -> IO[bytes]:
    """Open a file whose bytes, not its name, say whether it is gzip: browsers unpack files and keep their names."""
    return igzip.open(path, "rb") if _is_gzip(path) else open(path, "rb")


def _is_gzip(path: Path) -> bool:
    with open(path, "rb") as file:
        return file.read(2) == b"\x1f\x8b"


class _Text:
    """Bytes of a Matrix Market file; whole numbers are declared to be real.

    scipy reads 5.5 as 5 where the first line promises whole numbers, and gathers a line without end in memory.
    """

    def __init__(self, path: Path) -> None:
        self._file = _unpacked(path)
        self._begun = False
        self._line = 0

    def read(self, size: int = -1) -> bytes:
        """Next bytes."""
        if self._begun:
            part = self._file.read(size)
        else:
            part = re.sub(rb"(unsigned-)?integer", b"real", self._file.readline(_LINE), flags=re.IGNORECASE)
            self._begun = True
        if b"\0" in part:  # which makes scipy read beyond its memory
            raise ValueError("it holds zero bytes")
        self._line = 0 if b"\n" in part else self._line + len(part)
        if self._line > _LINE:
            raise ValueError(f"it has a line of more than {_LINE:,} bytes")
        return part

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def _stated(path: Path) -> tuple[int, int, int]:
    """Rows, columns and entries that a Matrix Market file states and has the bytes for."""
    try:
        with closing(_Text(path)) as text:
            rows, columns, entries, form, field, symmetry = mminfo(text)
    except UNREADABLE as error:
        raise _refused(path, error, 0) from error
    if (form, symmetry) != ("coordinate", "general") or field != "real":
        values = ": a pattern has no counts" if field == "pattern" else ""
        raise InputError(
            f"{path} is a {symmetry} {field} matrix in {form} form{values}; expected a general integer or real one in "
            "coordinate form. Write the counts anew."
        )
    size = path.stat().st_size
    if entries * len("1 1 1\n") - 1 > size * (DEFLATE if _is_gzip(path) else 1):
        raise InputError(
            f"{path} is cut short: it promises {entries:,} entries, more than {size:,} bytes can hold. "
            "Copy or download it again."
        )
    return rows, columns, entries


def _counts(path: Path, entries: int, *, by_genes: bool) -> sp.csr_matrix:
    """Cells by genes, float64, of a file of genes by cells (`by_genes`) or of cells by genes."""
    try:
        with closing(_Text(path)) as text:
            stored = mmread(text)
        return (stored.T if by_genes else stored).tocsr()
    except MemoryError as error:
        raise InputError(
            f"{path} has {entries:,} entries, which do not fit into memory while they are read from text. "
            "Give the .h5 file, or write an .h5ad file elsewhere."
        ) from error
    except UNREADABLE as error:
        raise _refused(path, error, entries) from error


def _refused(path: Path, error: Exception, entries: int) -> InputError:
    """Say what is wrong with a Matrix Market file that scipy did not read."""
    if missing := _MISSING.search(str(error)):
        seen = f"is cut short: it holds {entries - int(missing[1]):,} of the {entries:,} entries that it promises."
    elif "too long" in str(error):
        seen = f"does not end after the {entries:,} entries that it promises."
    else:
        seen = f"is damaged, or not a Matrix Market file: {sentence(error)}"
    return InputError(f"{path} {seen} Copy or download it again.")


def _table(path: Path) -> pd.DataFrame:
    """Columns of a file of names, without a line that names them."""
    try:
        text = bytearray()
        with _unpacked(path) as file:
            while part := file.read(2**20):
                text += part
                if len(text) > NAMES:
                    raise InputError(
                        f"{path} holds more than {NAMES:,} bytes; expected a name a line. Give the names alone."
                    )
        if not text.strip():
            return pd.DataFrame({0: np.zeros(0, dtype=object)})
        table = pd.read_csv(
            io.BytesIO(text), sep="\t", header=None, dtype=str, keep_default_na=False, encoding_errors="replace"
        )
    except InputError:
        raise
    except UNREADABLE as error:
        raise InputError(f"{path} is damaged: {sentence(error)} Copy or download it again.") from error
    return table.iloc[1:].reset_index(drop=True) if _HEADER.fullmatch(table.iloc[0, 0]) else table
