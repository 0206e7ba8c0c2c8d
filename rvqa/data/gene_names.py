"""Where the Ensembl ids and symbols of a file stand, and which names in several files are one gene.

Names stand in `var_names` and in columns that 10x, CELLxGENE and Seurat converters write. Nothing is interpreted here
but the form: an Ensembl id is `ENSG` and 11 digits, a number is not a symbol, and the name of the human genome before a
name is dropped.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import product
from typing import Any

import numpy as np
import pandas as pd

from rvqa.data.aliases import AliasTable

_ID_COLUMNS = (
    *("ensembl_id", "gene_ids", "gene_id", "feature_id", "feature_ids"),
    *("ensembl_ids", "ensembl", "ensembl_gene_id"),
)
_SYMBOL_COLUMNS = (
    *("gene_symbol", "gene_symbols", "feature_name", "symbol", "gene_name", "gene_names", "symbols"),
    *("hgnc_symbol", "gene_short_name", "feature_names", "features", "gene", "genes", "name", "names"),
)
_MISSING = frozenset({"", "nan", "None", "NA", "<NA>"})
_ENSEMBL = re.compile(r"(ENSG\d{11})(?:\.\d+)?")
_HUMAN_GENOME = re.compile(
    r"(?:GRCh\d+(?:\.p\d+)?|hg\d+|human|Human|HUMAN)(?:-\d{4}-[A-Z])?(?:_pre-?m[Rr][Nn][Aa])?[_-]+(?=[A-Za-z0-9])"
)
"""What 10x (and the first CITE-seq files) put before names where a reference has several genomes, and Seurat's form of
it with "-". No symbol, previous symbol or alias of the HGNC begins like this."""


def ensembl(name: str) -> str:
    """Return a human Ensembl gene id without its version, "" for any other text."""
    match = _ENSEMBL.fullmatch(name) if name.startswith("ENSG") else None
    return match[1] if match else ""


def texts(values: Iterable[Any]) -> list[str]:
    """Return values as stripped text, "" where missing; bytes, which old writers leave, as the text they stand for."""
    decoded = (value.decode(errors="replace") if isinstance(value, bytes) else value for value in values)
    stripped = (str(value).strip() for value in decoded)
    return ["" if text in _MISSING else text for text in stripped]


def without_genome(name: str) -> str:
    """Return a name without the human genome's name before it ("GRCh38_CD4"); any other text as it is."""
    # Most names are told by their first letter, which is quicker.
    match = _HUMAN_GENOME.match(name) if name[:1] in {"G", "h", "H"} else None
    return name[match.end() :] if match else name


def text_columns(var: pd.DataFrame) -> dict[str, pd.Series]:
    """Columns of a table that are not numbers, by name in lower case with "_" between words."""
    # By place: a table may have a name twice. The first of equal names counts.
    columns = {
        re.sub(r"[\W_]+", "_", str(var.columns[at]).lower()): var.iloc[:, at] for at in range(var.shape[1])[::-1]
    }
    return {name: values for name, values in columns.items() if not pd.api.types.is_numeric_dtype(values.dtype)}


def all_names(var: pd.DataFrame) -> list[list[str]]:
    """Names of the features in each place where ids or symbols stand, as written: `var_names` and columns."""
    columns = text_columns(var)
    return [texts(var.index), *(texts(columns[name]) for name in (*_ID_COLUMNS, *_SYMBOL_COLUMNS) if name in columns)]


def sources(var: pd.DataFrame) -> tuple[list[list[str]], list[list[str]]]:
    """Ensembl ids and symbols of the file columns: one list for each place they stand in, first choice first."""
    columns = text_columns(var)
    n_ids = sum(name in columns for name in _ID_COLUMNS)
    names, *in_columns = [[without_genome(name) for name in place] for place in all_names(var)]
    in_ids, in_symbols = in_columns[:n_ids], in_columns[n_ids:]
    ids = [[ensembl(text) for text in place] for place in (names, *in_ids, *in_symbols)]
    # The symbol columns first: var_names_make_unique may have changed var_names. A number is not a symbol.
    places = (*in_symbols, names)
    symbols = [["" if text.isdigit() or ensembl(text) else text for text in place] for place in places]
    return ids, symbols


def first_known(places: list[list[str]]) -> list[str]:
    """Return for each column the name in the first place that has one, else ""."""
    return [next(filter(None, names), "") for names in zip(*places, strict=True)]


def joined(
    files: Sequence[tuple[Sequence[str], Sequence[str]]], table: AliasTable | None
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Names of the genes of several files, each gene once, in the order in which genes are first seen.

    Which names are one gene does not depend on the order of the files; which of them a gene goes by does.

    Parameters
    ----------
    files
        Symbols and Ensembl ids of the genes of each file, one of each a gene and both unique in a file; "" for an
        unknown Ensembl id, and the Ensembl id for an unknown symbol.
    table
        HGNC's genes, or None.

    Returns
    -------
    symbols, ensembl_ids
        Such that `rvqa.data.alignment.align`, with the same table, finds every gene of every file.

    Notes
    -----
    Two genes of one file are never one gene. Apart from that:

    1. The same Ensembl id is the same gene.
    2. Ensembl ids that go with the same symbol are one gene, if at most one of them has another symbol, or none, in any
       file (the ids of a gene change between releases).
    3. A symbol without an Ensembl id is the gene whose id goes with that symbol in other files, where that is one gene.
       As a gene has one symbol, this is so for one symbol of a gene only: the most frequent.
    4. What is left is joined where the table says that all its names are one gene and nothing contradicts it.
    """
    return _Names(files).join(table)


class _Names:
    """All genes of all files. Shapes: N genes of files, S distinct symbols, I distinct Ensembl ids.

    The classes of genes that are one are numbered like the Ensembl ids, then (from I on) like the symbols.
    """

    def __init__(self, files: Sequence[tuple[Sequence[str], Sequence[str]]]) -> None:
        self.n_files = len(files)
        self.file_N = np.repeat(np.arange(len(files)), [len(ids) for _, ids in files])
        self.id_texts = [name for _, ids in files for name in ids]
        pairs = (pair for symbols, ids in files for pair in zip(symbols, ids, strict=True))
        self.symbol_texts = ["" if symbol == name else symbol for symbol, name in pairs]
        self.symbol_N, self.symbols = _numbered(self.symbol_texts)
        self.id_N, self.ids = _numbered(self.id_texts)
        n_symbols, n_ids = len(self.symbols), len(self.ids)
        self.symbol_of = np.concatenate([np.full(n_ids, -1), np.arange(n_symbols)])
        """Symbol that a class goes by."""
        self.id_of = np.concatenate([np.arange(n_ids), np.full(n_symbols, -1)])
        self.class_N = self._as_written()

    def join(self, table: AliasTable | None) -> tuple[tuple[str, ...], tuple[str, ...]]:
        if table is not None and len(table):
            self._join_by(table)
        return self._named(pd.unique(self.class_N))

    def _named(self, classes: np.ndarray) -> tuple[tuple[str, ...], tuple[str, ...]]:
        ids = tuple(self.ids[at] if at >= 0 else "" for at in self.id_of[classes].tolist())
        symbols = (self.symbols[at] if at >= 0 else "" for at in self.symbol_of[classes].tolist())
        return tuple(symbol or name for symbol, name in zip(symbols, ids, strict=True)), ids

    def _as_written(self) -> np.ndarray:
        """Class of every gene by rules 1 to 3; sets `symbol_of`."""
        n_symbols, n_ids = len(self.symbols), len(self.ids)
        has_symbol, has_id = self.symbol_N >= 0, self.id_N >= 0
        both = np.flatnonzero(has_symbol & has_id)
        pair, first = np.unique(self.symbol_N[both] * (n_ids + 1) + self.id_N[both], return_index=True)
        symbol_P, id_P = np.divmod(pair, n_ids + 1)
        ids_S = np.bincount(symbol_P, minlength=n_symbols)
        alone_S = np.zeros(n_symbols, dtype=bool)
        alone_S[self.symbol_N[has_symbol & ~has_id]] = True

        class_I, kept = self._changed_ids(symbol_P, id_P, ids_S)
        symbol_of_id = {at: symbol for symbol, at in kept.items()}
        home_S = np.full(n_symbols, -1)
        home_S[symbol_P] = id_P
        home_S[(ids_S != 1) | ~alone_S | self._meets(home_S)] = -1
        times_S = np.bincount(self.symbol_N[has_symbol], minlength=n_symbols)
        found: dict[int, int] = {}
        for symbol in np.flatnonzero(home_S >= 0).tolist():
            rivals = (symbol, found.get(int(home_S[symbol]), symbol))
            found[int(home_S[symbol])] = min(rivals, key=lambda at: (-times_S[at], self.symbols[at]))
        symbol_of_id = found | symbol_of_id

        class_S = n_ids + np.arange(n_symbols)
        class_S[list(symbol_of_id.values())] = list(symbol_of_id)
        taken_S = alone_S.copy()
        taken_S[list(symbol_of_id.values())] = True
        self.symbol_of[list(symbol_of_id)] = list(symbol_of_id.values())
        for at in np.argsort(first):  # an Ensembl id goes by the first symbol that no other gene goes by
            if self.symbol_of[id_P[at]] < 0 and not taken_S[symbol_P[at]]:
                self.symbol_of[id_P[at]] = symbol_P[at]
                taken_S[symbol_P[at]] = True
        # The index -1, of what a gene lacks, is the place that is appended.
        return np.where(has_id, np.append(class_I, -1)[self.id_N], np.append(class_S, -1)[self.symbol_N])

    def _changed_ids(
        self, symbol_P: np.ndarray, id_P: np.ndarray, ids_S: np.ndarray
    ) -> tuple[np.ndarray, dict[int, int]]:
        """Rule 2: the class of every Ensembl id, and the symbols by which ids were joined, each with the id kept."""
        symbols_I = np.bincount(id_P, minlength=len(self.ids))
        symbols_I[self.id_N[(self.symbol_N < 0) & (self.id_N >= 0)]] += 1
        genes_of_id, genes_of_symbol = _Places(self.id_N), _Places(self.symbol_N)
        of_symbol = _Places(symbol_P)
        joined_ids: dict[int, list[int]] = {}
        kept: dict[int, int] = {}
        for symbol in np.flatnonzero(ids_S > 1).tolist():
            ids = id_P[of_symbol.of(symbol)].tolist()
            elsewhere = [at for at in ids if symbols_I[at] > 1]
            genes = np.unique(np.concatenate([genes_of_symbol.of(symbol), *map(genes_of_id.of, ids)]))
            if len(elsewhere) <= 1 and len(np.unique(self.file_N[genes])) == len(genes):
                joined_ids[symbol], kept[symbol] = ids, elsewhere[0] if elsewhere else min(ids)
        times = Counter(kept.values())
        kept = {symbol: at for symbol, at in kept.items() if times[at] == 1}
        class_I = np.arange(len(self.ids))
        for symbol, at in kept.items():
            class_I[joined_ids[symbol]] = at
        return class_I, kept

    def _meets(self, home_S: np.ndarray) -> np.ndarray:
        """Whether a file has both a symbol without an Ensembl id and the gene that it would be."""
        meets_S = np.zeros(len(self.symbols), dtype=bool)
        alone = np.flatnonzero((self.symbol_N >= 0) & (self.id_N < 0))
        alone = alone[home_S[self.symbol_N[alone]] >= 0]
        would_be = home_S[self.symbol_N[alone]] * self.n_files + self.file_N[alone]
        there = (self.id_N * self.n_files + self.file_N)[self.id_N >= 0]
        meets_S[self.symbol_N[alone[np.isin(would_be, there)]]] = True
        return meets_S

    def _join_by(self, table: AliasTable) -> None:
        """Rule 4. What decides is in all names of a class, and not in those it goes by, which depend on the order."""
        gene_N = table.genes(self.symbol_texts, self.id_texts)
        # An Ensembl id that the table lacks leaves it to the symbol, which may be that of another gene of the class.
        lacking_I = table.genes([""] * len(self.ids), self.ids) < 0
        loose = np.zeros(len(self.symbol_of), dtype=bool)
        loose[self.class_N[(self.id_N >= 0) & np.append(lacking_I, False)[self.id_N]]] = True
        loose_N = np.flatnonzero(loose[self.class_N])
        by_symbol = table.genes([self.symbol_texts[at] for at in loose_N], [""] * len(loose_N))
        claims = np.stack([np.append(self.class_N, self.class_N[loose_N]), np.append(gene_N, by_symbol)])
        claims = np.unique(claims[:, claims[1] >= 0], axis=1)
        # A class that is several of HGNC's genes makes all of them ambiguous.
        sure = np.bincount(claims[0], minlength=len(self.symbol_of))[claims[0]] == 1
        open_G = np.bincount(claims[1], minlength=len(table)) > 1
        open_G[claims[1][~sure]] = False
        gene_of = np.full(len(self.symbol_of), -1)
        gene_of[claims[0][sure]] = claims[1][sure]
        gene_of[(gene_of >= 0) & ~open_G[gene_of]] = -1

        owner_S = self._owners()
        places = _Places(gene_of[self.class_N])
        for gene in np.flatnonzero(open_G).tolist():
            at = places.of(gene)
            if len(np.unique(self.file_N[at])) == len(at):
                self._join_one(gene, at, gene_N, owner_S, table)

    def _owners(self) -> np.ndarray:
        """Class that alone may go by a symbol, -2 where several might; last -1, for no symbol."""
        with_symbol = np.flatnonzero(self.symbol_N >= 0)
        symbol_P, class_P = np.unique(np.stack([self.symbol_N, self.class_N])[:, with_symbol], axis=1)
        owner_S = np.full(len(self.symbols) + 1, -1)
        owner_S[symbol_P] = class_P
        owner_S[:-1][np.bincount(symbol_P, minlength=len(self.symbols)) > 1] = -2
        alone = with_symbol[self.id_N[with_symbol] < 0]
        owner_S[self.symbol_N[alone]] = self.class_N[alone]
        return owner_S

    def _join_one(
        self, gene: int, genes: np.ndarray, gene_N: np.ndarray, owner_S: np.ndarray, table: AliasTable
    ) -> None:
        """Join the classes of these genes of files, if there are names under which `align` finds them all."""
        group = set(self.class_N[genes].tolist())
        members = list(
            zip(self.symbol_N[genes].tolist(), self.id_N[genes].tolist(), gene_N[genes].tolist(), strict=True)
        )
        symbols = dict.fromkeys(symbol for symbol, _, _ in members if symbol >= 0 and owner_S[symbol] in group)
        ids = dict.fromkeys(name for _, name, _ in members if name >= 0)
        for symbol, name in product(symbols or [-1], ids or [-1]):
            unlike = [each for each in members if not (each[1] == name >= 0 or each[0] == symbol >= 0)]
            id_text = self.ids[name] if name >= 0 else ""
            resolved = int(table.genes([self.symbols[symbol] if symbol >= 0 else id_text], [id_text])[0])
            if resolved not in ((gene,) if unlike else (gene, -1)):
                continue
            # What is named otherwise must get here by the table, and have no name that another gene goes by.
            if all(found == gene and owner_S[text] in {-1, *group} for text, _, found in unlike):
                first = int(self.class_N[genes[0]])
                self.class_N[genes] = first
                self.symbol_of[first], self.id_of[first] = symbol, name
                return


class _Places:
    """Where each number stands in an array."""

    def __init__(self, numbers: np.ndarray) -> None:
        self._order = np.argsort(numbers, kind="stable")
        self._bounds = np.searchsorted(numbers[self._order], np.arange(numbers.max(initial=-1) + 2))

    def of(self, number: int) -> np.ndarray:
        if number + 1 >= len(self._bounds):
            return self._order[:0]
        return self._order[self._bounds[number] : self._bounds[number + 1]]


def _numbered(names: Iterable[str]) -> tuple[np.ndarray, list[str]]:
    """Number names in the order in which they are first seen, -1 for ""; and the names."""
    numbers, known = pd.factorize(np.array([name or None for name in names], dtype=object))
    return numbers.astype(np.int64), known.tolist()
