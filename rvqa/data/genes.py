"""The genes of a model, or of a file: an axis, from tables that name them by symbol, Ensembl id or both."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from rvqa.data.aliases import AliasSource, alias_table
from rvqa.data.gene_names import ensembl, first_known, joined, sources, texts
from rvqa.errors import InputError

if TYPE_CHECKING:
    from anndata import AnnData

PUT_NAMES = "Put human gene symbols or Ensembl ids into adata.var_names or var['gene_symbol'] or var['ensembl_id']."


@dataclass(frozen=True)
class GeneAxis:
    """An ordered list of human genes: what the columns of a model's count matrix stand for.

    Parameters
    ----------
    symbols
        Unique, non-empty; genes without a symbol go by their Ensembl id.
    ensembl_ids
        `ENSG` and 11 digits, unique, "" where unknown; a version suffix is dropped.

    Raises
    ------
    InputError
        No genes, unequal lengths, an empty or repeated symbol, a repeated or malformed Ensembl id.
    """

    symbols: tuple[str, ...]
    ensembl_ids: tuple[str, ...]

    def __post_init__(self) -> None:
        symbols = tuple(str(symbol) for symbol in self.symbols)
        if not symbols or len(symbols) != len(self.ensembl_ids):
            given = f"{len(symbols)} symbols and {len(self.ensembl_ids)} Ensembl ids given"
            raise InputError(f"A gene axis needs a symbol and an Ensembl id (or '') for each gene: {given}.")
        names = (str(name) or ensembl(symbol) for symbol, name in zip(symbols, self.ensembl_ids, strict=True))
        ids = tuple(ensembl(name) or name for name in names)
        for kind, known in (("symbol", symbols), ("Ensembl id", tuple(filter(None, ids)))):
            if len(set(known)) < len(known):
                repeated = Counter(known).most_common(1)[0][0]
                raise InputError(f"A gene axis names each gene once; the {kind} {repeated!r} occurs more than once.")
        if "" in symbols:
            raise InputError(f"Gene {symbols.index('')} of the axis has no symbol; use its Ensembl id as one.")
        if foreign := [name for name in ids if name and not ensembl(name)]:
            raise InputError(
                f"{foreign[0]!r} is not a human Ensembl gene id: expected ENSG and 11 digits, or '' if unknown."
            )
        object.__setattr__(self, "symbols", symbols)
        object.__setattr__(self, "ensembl_ids", ids)

    def __len__(self) -> int:
        return len(self.symbols)

    @classmethod
    def from_adata(cls, adata: AnnData) -> GeneAxis:
        """Read the axis of a file: its genes in their order, each once.

        Columns with the same Ensembl id are one gene, and so are columns with the same symbol unless their Ensembl ids
        differ: then the later one goes by its Ensembl id. A gene without a symbol does so, too.

        Raises
        ------
        InputError
            A gene without a symbol or Ensembl id: no name, or a number.
        """
        ids, symbols = sources(adata.var)
        genes = [(symbol or name, name) for symbol, name in zip(first_known(symbols), first_known(ids), strict=True)]
        if nameless := [str(adata.var_names[at]) for at, (symbol, _) in enumerate(genes) if not symbol]:
            raise InputError(
                f"{len(nameless):,} of {len(genes):,} genes have neither a symbol nor an Ensembl id, only names like "
                f"{first_names(nameless)}. {PUT_NAMES}"
            )
        return _merged(genes)

    @classmethod
    def from_frame(cls, frame: pd.DataFrame) -> GeneAxis:
        """Read what `to_frame` wrote: columns `gene_symbol` and `ensembl_id`, one row a gene, order kept."""
        if absent := {"gene_symbol", "ensembl_id"} - set(frame.columns):
            raise InputError(f"The table of genes lacks {sorted(absent)}; it has the columns {list(frame.columns)}.")
        return cls(tuple(texts(frame["gene_symbol"])), tuple(texts(frame["ensembl_id"])))

    def to_frame(self) -> pd.DataFrame:
        """Return the axis as a table with the columns `gene_symbol` and `ensembl_id` ("" where unknown)."""
        return pd.DataFrame({"gene_symbol": list(self.symbols), "ensembl_id": list(self.ensembl_ids)}, dtype=object)

    def subset(self, indices: Sequence[int] | np.ndarray) -> GeneAxis:
        """Return the genes at `indices` (whole numbers, or one bool a gene), in that order."""
        at = np.arange(len(self))[np.asarray(indices)]
        return GeneAxis(tuple(self.symbols[i] for i in at), tuple(self.ensembl_ids[i] for i in at))

    @classmethod
    def union(cls, axes: Iterable[GeneAxis], *, aliases: AliasSource = None) -> GeneAxis:
        """Join axes, keeping the order in which genes are first seen.

        Genes with the same Ensembl id are one gene, else those with the same symbol (Ensembl ids of one gene change
        between releases), else those that are the same gene in HGNC's table; `rvqa.data.gene_names.joined` has the
        rules. Two genes of one axis stay two. What the first axis does not know, Ensembl id or symbol, is filled in
        from a later one. Which genes are one does not depend on the order of the axes.

        Parameters
        ----------
        axes
            At least one.
        aliases
            As in `align`, which finds every gene of every axis on the union if it has the same table.
        """
        different = list(dict.fromkeys(axes))
        if len(different) == 1:
            return different[0]
        return cls(*joined([(axis.symbols, axis.ensembl_ids) for axis in different], alias_table(aliases)))

    @cached_property
    def _by_id(self) -> dict[str, int]:
        return {name: at for at, name in enumerate(self.ensembl_ids) if name}

    @cached_property
    def _by_symbol(self) -> dict[str, int]:
        return {symbol: at for at, symbol in enumerate(self.symbols)}


def _merged(genes: Iterable[tuple[str, str]]) -> GeneAxis:
    """Collect (symbol, Ensembl id) pairs of one file into an axis; see `from_adata` for what is one gene."""
    symbols: list[str] = []
    ids: list[str] = []
    by_symbol: dict[str, int] = {}
    by_id: dict[str, int] = {}
    for symbol, name in genes:
        at = by_id.get(name) if name else None
        if at is None:
            at = by_symbol.get(symbol)
            if at is not None and name and ids[at]:
                symbol, at = name, None
        if at is None:
            at = len(symbols)
            symbols.append(symbol)
            ids.append("")
            by_symbol[symbol] = at
        if name and not ids[at]:
            ids[at] = name
            by_id[name] = at
        if symbols[at] == ids[at] and symbol not in by_symbol:  # so far known by its Ensembl id alone
            symbols[at] = symbol
            by_symbol[symbol] = at
    return GeneAxis(tuple(symbols), tuple(ids))


def first_names(names: Sequence[str]) -> str:
    """The first two names, in quotes."""
    return ", ".join(repr(name) for name in names[:2])
