"""The gene axis of a model, and how the columns of a file map onto it.

A gene is found by its Ensembl id (`ENSG` and 11 digits, version suffix dropped), else by its symbol, exactly as
written: no upper-casing, no guessing; what is left, by the aliases of `rvqa.data.aliases`, where there is a table of
them. `rvqa.data.gene_names` says where ids and symbols are looked for; a file may use either, or a mixture. What a file
did not measure is unmeasured, which is not zero: `GeneAlignment.measured` says which genes that concerns.
"""

from __future__ import annotations

import re
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import scipy.sparse as sp
from scipy.sparse.csgraph import connected_components

from rvqa.data.aliases import TABLE_NAMES, AliasSource, alias_table
from rvqa.data.counts import canonical_csr
from rvqa.data.features import left_out_sentence, other_genome
from rvqa.data.gene_names import ensembl, first_known, joined, sources, texts, without_genome
from rvqa.errors import InputError

if TYPE_CHECKING:
    from anndata import AnnData

FLOOR = 50
"""Fewest measured genes of the axis. On 50 random detected genes of PBMC3k a logistic regression names 49 % of cells
right (9 types, the largest 28 %), on 10 genes 32 %, on 250 70 %: below 50 an answer says little about the cell, and a
file that hits so few is nearly always one whose genes are named otherwise."""

LOW_COVERAGE = 0.2
"""Measured share of the axis under which `align` warns."""

HUMAN_GENES = 20_000
"""Protein-coding genes, about: two files of n and m of them, drawn at random, share n m / 20,000."""

LINKED = 0.25
"""Part of that number which two files must share, less `GRACE`, and one gene at least, to be fitted together. All pairs
of nine real files, panels of 299 genes to whole transcriptomes, share 0.78 times that number or more. Files named in
two ways share hardly any gene, or only those without a symbol, which both call by their Ensembl ids."""

GRACE = 10
"""Genes by which small panels may fall short: two of 300 genes are expected to share 4 or 5."""

_MOUSE = re.compile(r"ENSMUSG\d{11}(\.\d+)?|[A-Z][a-z][A-Za-z0-9-]*|[A-Z0-9]+Rik")
_PUT_NAMES = "Put human gene symbols or Ensembl ids into adata.var_names or var['gene_symbol'] or var['ensembl_id']."


class CoverageWarning(UserWarning):
    """A file measures so little of the model's gene axis that results rest on few genes."""


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
                f"{foreign[0]!r} is no human Ensembl gene id: expected ENSG and 11 digits, or '' if unknown."
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
                f"{_examples(nameless)}. {_PUT_NAMES}"
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


@dataclass(frozen=True, eq=False)
class GeneAlignment:
    """Which axis gene each column of a file stands for, and which genes of the axis were measured.

    Attributes
    ----------
    column_map
        int32 [n_file], axis column of each file column or -1; several file columns may share one (their counts add up).
    measured
        bool [n_axis], True where at least one file column maps to the gene.
    n_by_ensembl, n_by_symbol, n_by_alias
        File columns matched as written, either way, and those that only the HGNC table resolved (0 without one).
    n_duplicates
        File columns beyond the first of their axis gene.
    n_file, n_axis
        Number of file columns and of axis genes.
    unmatched
        Names of the first five file columns that are not on the axis.
    left_out
        Features of the file that are not genes, by kind; see `rvqa.data.features`. They are not among the file columns.
    """

    column_map: np.ndarray = field(repr=False)
    measured: np.ndarray = field(repr=False)
    n_by_ensembl: int
    n_by_symbol: int
    n_by_alias: int
    n_duplicates: int
    n_file: int
    n_axis: int
    unmatched: tuple[str, ...]
    left_out: Mapping[str, int] = field(default_factory=dict)

    @property
    def n_measured(self) -> int:
        """Number of axis genes that the file measured."""
        return int(np.count_nonzero(self.measured))

    @property
    def coverage(self) -> float:
        """Share of the axis that the file measured."""
        return self.n_measured / self.n_axis

    def summary(self) -> str:
        """Say in a sentence or two how the file matches the axis."""
        return coverage_sentence(self.report())

    def report(self) -> dict[str, Any]:
        """Return the figures as a dict that JSON can hold."""
        by = ("n_by_ensembl", "n_by_symbol", "n_by_alias")
        figures = ("n_file", "n_axis", "n_measured", "coverage", *by, "n_duplicates")
        others = {"unmatched_examples": list(self.unmatched), "left_out": dict(self.left_out)}
        return {name: getattr(self, name) for name in figures} | others


def coverage_sentence(report: Mapping[str, Any]) -> str:
    """Say in a sentence or two what `GeneAlignment.report` holds, which results keep as `uns["rvqa"]["coverage"]`."""
    text = (
        f"{report['n_measured']:,} of the model's {report['n_axis']:,} genes ({100 * report['coverage']:.1f} %) are "
        f"measured; of the file's {report['n_file']:,} genes {report['n_by_ensembl']:,} were matched by Ensembl id, "
        f"{report['n_by_symbol']:,} by symbol"
    )
    if report["n_by_alias"]:
        text += f", {report['n_by_alias']:,} by a previous symbol or alias"
    if report["n_duplicates"]:
        text += f" ({report['n_duplicates']:,} repeat another and are added to it)"
    n_unmatched = report["n_file"] - sum(report[f"n_by_{how}"] for how in ("ensembl", "symbol", "alias"))
    examples = f" (e.g. {_examples(report['unmatched_examples'])})" if n_unmatched else ""
    left_out = left_out_sentence(report.get("left_out", {}))  # files of older versions do not say
    return f"{text}, {n_unmatched:,} not{examples}." + (f" {left_out}." if left_out else "")


def align(
    adata_or_var: AnnData | pd.DataFrame,
    axis: GeneAxis,
    *,
    aliases: AliasSource = None,
    left_out: Mapping[str, int] | None = None,
) -> GeneAlignment:
    """Match the genes of a file to a model's axis: by Ensembl id wherever one is found, else by symbol, else by alias.

    Parameters
    ----------
    adata_or_var
        An AnnData, or its `var` (`adata.raw.var` for counts from `.raw`). Not changed.
    axis
        The model's genes.
    aliases
        HGNC table of previous symbols and aliases: an `AliasTable`, a path, None for the one in `RVQA_REF_DIR` if there
        is one, False for none. It only ever adds genes that no column names as written; `n_by_alias`, in `report` and
        `summary`, says how many columns. Where that is not 0, codes depend on the table: they differ without it.
    left_out
        What `rvqa.data.features.gene_features` left out of the file, to be reported with the rest.

    Returns
    -------
    GeneAlignment
        Column map, measured genes and figures. Where the Ensembl id and the symbol of a file column stand for
        different axis genes, the Ensembl id wins.

    Raises
    ------
    InputError
        Fewer than `FLOOR` axis genes measured (or fewer than all, of a shorter axis), or so few that the warning below
        would be due, of a file whose genes are mostly mouse genes: what matches is chance.

    Warns
    -----
    CoverageWarning
        Less than 20 % of the axis measured.
    """
    var = adata_or_var if isinstance(adata_or_var, pd.DataFrame) else adata_or_var.var
    ids, symbols = map(first_known, sources(var))
    column_map, matched = _matched(var, axis, aliases)
    n_matched = int(np.count_nonzero(column_map >= 0))
    measured = np.zeros(len(axis), dtype=bool)
    measured[column_map[column_map >= 0]] = True
    n_measured = int(np.count_nonzero(measured))
    shown = [symbol or name for symbol, name in zip(symbols, ids, strict=True)]
    mouse = _looks_like_mouse(shown) or _looks_like_mouse(texts(var.index))
    if n_measured < min(FLOOR, len(axis)) or (mouse and n_measured < LOW_COVERAGE * len(axis)):
        raise InputError(_too_few(n_measured, axis, shown, var, mouse=mouse))
    column_map.flags.writeable = measured.flags.writeable = False
    alignment = GeneAlignment(
        column_map=column_map,
        measured=measured,
        n_by_ensembl=matched[0],
        n_by_symbol=matched[1] - matched[0],
        n_by_alias=n_matched - matched[1],
        n_duplicates=n_matched - n_measured,
        n_file=len(var),
        n_axis=len(axis),
        unmatched=tuple(shown[at] for at in np.flatnonzero(column_map < 0)[:5]),
        left_out=dict(left_out or {}),
    )
    if alignment.coverage < LOW_COVERAGE:
        warnings.warn(
            f"Only {n_measured:,} of the model's {len(axis):,} genes ({100 * alignment.coverage:.1f} %) are measured; "
            "the others count as unmeasured, not as zero. If the file was cut to these genes, name the obs column that "
            "holds each cell's total counts over all genes as library size.",
            CoverageWarning,
            stacklevel=2,
        )
    return alignment


def match_columns(var: pd.DataFrame, axis: GeneAxis, *, aliases: AliasSource = None) -> np.ndarray:
    """Axis gene of every column of a file, int32 [n_file], -1 where none; as `align`, however few they are."""
    return _matched(var, axis, aliases)[0]


def _matched(var: pd.DataFrame, axis: GeneAxis, aliases: AliasSource) -> tuple[np.ndarray, list[int]]:
    """Axis gene of every column, and how many columns were matched by Ensembl id and by either as written."""
    places = sources(var)
    column_map = np.full(len(var), -1, dtype=np.int32)
    matched = []
    for names_by_place, table in zip(places, (axis._by_id, axis._by_symbol), strict=True):
        for names in names_by_place:
            open_columns = np.flatnonzero(column_map < 0)
            column_map[open_columns] = [table.get(names[at], -1) for at in open_columns]
        matched.append(int(np.count_nonzero(column_map >= 0)))
    if matched[1] < len(var) and (known := alias_table(aliases)) is not None:
        ids, symbols = map(first_known, places)
        column_map = known.fill(column_map, (symbols, ids), (axis.symbols, axis.ensembl_ids))
    return _with_hyphens(column_map, places[1], axis), matched


def _with_hyphens(column_map: np.ndarray, symbols: list[list[str]], axis: GeneAxis) -> np.ndarray:
    """Resolve names that R wrote with a point for a hyphen (HLA.DRA), where no other column is that gene."""
    taken = set(column_map[column_map >= 0].tolist())
    meant: dict[int, list[int]] = {}
    for names in symbols:
        for at in np.flatnonzero(column_map < 0).tolist():
            gene = axis._by_symbol.get(names[at].replace(".", "-"), -1) if "." in names[at] else -1
            if gene >= 0 and gene not in taken and at not in meant.setdefault(gene, []):
                meant[gene].append(at)
    filled = column_map.copy()
    for gene, columns in meant.items():
        if len(columns) == 1:
            filled[columns[0]] = gene
    return filled


@dataclass(frozen=True)
class SharedGenes:
    """How many genes several files have, and share.

    Attributes
    ----------
    n_all
        Genes of any file.
    n_common
        Genes that every file has.
    n_by_file
        Genes of each file.
    """

    n_all: int
    n_common: int
    n_by_file: tuple[int, ...]


def shared_sentence(shared: SharedGenes) -> str:
    """Say in one line which genes files share.

    Examples
    --------
    >>> shared_sentence(SharedGenes(14012, 13200, (13600, 13612)))
    'genes: 14,012 in all, 13,200 shared by all 2 files'
    """
    n_files = len(shared.n_by_file)
    if n_files == 1:
        return f"genes: {shared.n_all:,}"
    return f"genes: {shared.n_all:,} in all, {shared.n_common:,} shared by all {n_files} files"


def require_shared(
    names: Sequence[str],
    files: Sequence[GeneAxis | pd.DataFrame],
    axis: GeneAxis,
    *,
    aliases: AliasSource = None,
) -> SharedGenes:
    """Refuse a file that shares almost no gene with the others, as when one has symbols and another Ensembl ids.

    Parameters
    ----------
    names
        Of the files, for messages.
    files
        Their genes: an axis, or `var`.
    axis
        The union of their genes.
    aliases
        As in `align`.

    Returns
    -------
    SharedGenes
        What the files share, for `shared_sentence`.

    Raises
    ------
    InputError
        Files that are not linked to the others. Two files are linked by `LINKED` of the genes that as many genes drawn
        at random would share, less `GRACE`, and at least one; files are linked through others, too.
    """
    tables = [each.to_frame() if isinstance(each, GeneAxis) else each for each in files]
    has_FG = np.zeros((len(tables), len(axis)), dtype=bool)
    for has_G, table in zip(has_FG, tables, strict=True):
        column_map = match_columns(table, axis, aliases=aliases)
        has_G[column_map[column_map >= 0]] = True
    n_F = has_FG.sum(1)
    shared_FF = has_FG.astype(np.float32) @ has_FG.T.astype(np.float32)
    expected_FF = np.outer(n_F, n_F) / np.maximum(HUMAN_GENES, np.maximum.outer(n_F, n_F))
    _, group_F = connected_components(shared_FF >= np.maximum(LINKED * expected_FF - GRACE, 1), directed=False)
    most = max(set(group_F), key=lambda group: (n_F[group_F == group].sum(), -group))
    if (apart := np.flatnonzero(group_F != most)).size:
        raise InputError(_shares_little(names, has_FG, int(apart[0]), group_F == most, axis))
    return SharedGenes(len(axis), int(np.count_nonzero(has_FG.all(0))), tuple(map(int, n_F)))


def _shares_little(names: Sequence[str], has_FG: np.ndarray, file: int, others_F: np.ndarray, axis: GeneAxis) -> str:
    own_G, others_G = has_FG[file], has_FG[others_F].any(0)
    here, there = (
        _examples([axis.symbols[at] for at in np.flatnonzero(each)[:2]])
        for each in (own_G & ~others_G, others_G & ~own_G)
    )
    table = f", or set RVQA_REF_DIR to a folder with HGNC's table ({TABLE_NAMES[0]})"
    table = "" if alias_table() is not None else table
    which = names[int(np.flatnonzero(others_F)[0])] if others_F.sum() == 1 else "the other files"
    return (
        f"{names[file]} shares {np.count_nonzero(own_G & others_G):,} of its {np.count_nonzero(own_G):,} genes with "
        f"{which} ({np.count_nonzero(others_G):,} genes), which is too few to fit them together: genes are named like "
        f"{here} in it and {there} there. Give files that use the same names or one that has both "
        f"(var['gene_symbol'], var['ensembl_id']){table}."
    )


def refuse_transposed(adata: AnnData, axis: GeneAxis) -> None:
    """Raise `InputError` for a file whose cells are named like genes of the axis, and whose genes are not."""
    floor, tables = min(FLOOR, len(axis)), [adata.var] + ([] if adata.raw is None else [adata.raw.var])
    if any(len(_on_axis(table, axis)) >= floor for table in tables):
        return
    # Few of many cells may be named after a gene that was knocked out in them, in a column.
    if len(found := _on_axis(adata.obs, axis)) >= max(floor, 0.05 * adata.n_obs):
        examples = _examples([axis.symbols[at] for at in sorted(found)[:2]])
        raise InputError(
            f"The file looks transposed: {len(found):,} genes of the model ({examples}) are among the names of its "
            f"{adata.n_obs:,} cells. Transpose it with adata.T: cells are rows, genes are columns."
        )


def _on_axis(table: pd.DataFrame, axis: GeneAxis) -> set[int]:
    """Genes of the axis that the rows of a table are named after, in any place where names stand."""
    places = zip(sources(table), (axis._by_id, axis._by_symbol), strict=True)
    return {known[name] for lists, known in places for names in lists for name in names if name in known}


def map_columns(counts: sp.csr_matrix, alignment: GeneAlignment) -> sp.csr_matrix:
    """Bring the columns of a count matrix onto the axis, adding up columns that share a gene.

    Parameters
    ----------
    counts
        CSR [n_cells, n_file], any numeric dtype and index width. Not changed.
    alignment
        From `align` on the same file.

    Returns
    -------
    scipy.sparse.csr_matrix, float32 [n_cells, n_axis]
        Sorted indices, no duplicates, no stored zeros; the same whatever the order of the file's genes (sums are
        taken in float64). Shares memory with `counts` if nothing had to change.

    Raises
    ------
    InputError
        The matrix does not have the alignment's number of columns.
    """
    if counts.shape[1] != alignment.n_file:
        raise InputError(
            f"The counts have {counts.shape[1]:,} genes, the alignment was made for {alignment.n_file:,}: "
            "align the var table that belongs to these counts."
        )
    counts = canonical_csr(counts)
    target = alignment.column_map
    if alignment.n_file == alignment.n_axis and np.array_equal(target, np.arange(alignment.n_axis)):
        return counts.astype(np.float32, copy=False)
    columns, data, indptr = target[counts.indices], counts.data, counts.indptr
    kept = columns >= 0
    if not kept.all():
        before = np.concatenate(([0], np.cumsum(kept, dtype=np.int64)))
        columns, data, indptr = columns[kept], data[kept], before[indptr]
    exact = np.float64 if alignment.n_duplicates else np.float32
    mapped = sp.csr_matrix((data.astype(exact), columns, indptr.copy()), shape=(counts.shape[0], alignment.n_axis))
    mapped.sum_duplicates()  # sorts, too
    return mapped.astype(np.float32, copy=False)


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


def _looks_like_mouse(names: list[str]) -> bool:
    return _share(map(_MOUSE.fullmatch, names)) > 0.5


def _too_few(n_measured: int, axis: GeneAxis, shown: list[str], var: pd.DataFrame, *, mouse: bool) -> str:
    names = [name or text for name, text in zip(shown, texts(var.index), strict=True)]
    named = f" named like {_examples(names)}" if names else ""
    text = f"{n_measured:,} of the model's {len(axis):,} genes found among {len(names):,} genes{named}"
    floor = min(FLOOR, len(axis))
    text += f"; at least {floor} are needed. " if n_measured < floor else ". "
    if len(names) < floor and n_measured >= len(names) / 2:
        return f"{text}The file holds too few genes; give one with more of them."
    if found := _named_elsewhere(var, axis):
        column, n = found
        return f"{text}var[{column!r}] holds {n:,} of them: adata.var_names = adata.var[{column!r}]."
    if mouse:
        return f"{text}These look like mouse genes and the model knows human ones: map them to human orthologues first."
    if _share(map(other_genome, names)) > 0.5:
        genome = Counter(filter(None, map(other_genome, names))).most_common(1)[0][0]
        return f"{text}These are genes of {genome} and the model knows human ones: map them to human orthologues first."
    if _share(name.isdigit() for name in names) > 0.5:
        rows = any(_share(name == str(at) for at, name in enumerate(names, first)) > 0.5 for first in (0, 1))
        text += f"These look like {'row numbers' if rows else 'Entrez ids or other numbers, which are not read'}. "
    return f"{text}The model's are named like {_examples(axis.symbols)}. {_PUT_NAMES}"


def _named_elsewhere(var: pd.DataFrame, axis: GeneAxis) -> tuple[str, int] | None:
    """The column of a table that names most genes of the axis, if these are enough, and how many."""
    n_named = {}
    for place, column in enumerate(var.columns):
        if not pd.api.types.is_numeric_dtype(var.dtypes.iloc[place]):
            names = {without_genome(name) for name in texts(var.iloc[:, place])}
            known = {axis._by_id.get(ensembl(name), axis._by_symbol.get(name, -1)) for name in names}
            n_named[str(column)] = len(known - {-1})
    best = max(n_named, key=n_named.__getitem__, default="")
    return (best, n_named[best]) if n_named.get(best, 0) >= min(FLOOR, len(axis)) else None


def _share(hits: Iterable[Any]) -> float:
    verdicts = [bool(hit) for hit in hits]
    return sum(verdicts) / len(verdicts) if verdicts else 0.0


def _examples(names: Sequence[str]) -> str:
    return ", ".join(repr(name) for name in names[:2])
