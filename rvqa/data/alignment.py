"""Columns of a file onto the axis of a model, and what was measured of it.

A gene is found by its Ensembl id (`ENSG` and 11 digits, version suffix dropped), else by its symbol, exactly as
written: no upper-casing, no guessing; what is left, by the aliases of `rvqa.data.aliases`, where there is a table of
them. `rvqa.data.gene_names` says where ids and symbols are looked for; a file may use either, or a mixture. What a file
did not measure is unmeasured, which is not zero: `GeneAlignment.measured` says which genes that concerns.
"""

from __future__ import annotations

import re
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import scipy.sparse as sp

from rvqa.data.aliases import AliasSource, alias_table
from rvqa.data.features import left_out_sentence, other_genome
from rvqa.data.gene_names import ensembl, first_known, sources, texts, without_genome
from rvqa.data.genes import PUT_NAMES, GeneAxis, first_names
from rvqa.data.kinds import canonical_csr
from rvqa.errors import InputError

if TYPE_CHECKING:
    from anndata import AnnData


FLOOR = 50
"""Fewest measured genes of the axis. On 50 random detected genes of PBMC3k a logistic regression names 49 % of cells
right (9 types, the largest 28 %), on 10 genes 32 %, on 250 70 %: below 50 an answer says little about the cell, and a
file that hits so few is nearly always one whose genes are named otherwise."""

LOW_COVERAGE = 0.2
"""Measured share of the axis under which `align` warns."""

_MOUSE = re.compile(r"ENSMUSG\d{11}(\.\d+)?|[A-Z][a-z][A-Za-z0-9-]*|[A-Z0-9]+Rik")


class CoverageWarning(UserWarning):
    """A file measures so little of the model's gene axis that results rest on few genes."""


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
    examples = f" (e.g. {first_names(report['unmatched_examples'])})" if n_unmatched else ""
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
        is one, False for none. It only ever adds genes that no column names as written; `n_by_alias`, in `report`, says
        how many columns. Where that is not 0, codes depend on the table: they differ without it.
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


def refuse_transposed(adata: AnnData, axis: GeneAxis) -> None:
    """Raise `InputError` for a file whose cells are named like genes of the axis, and whose genes are not."""
    floor, tables = min(FLOOR, len(axis)), [adata.var] + ([] if adata.raw is None else [adata.raw.var])
    if any(len(_on_axis(table, axis)) >= floor for table in tables):
        return
    # Few of many cells may be named after a gene that was knocked out in them, in a column.
    if len(found := _on_axis(adata.obs, axis)) >= max(floor, 0.05 * adata.n_obs):
        examples = first_names([axis.symbols[at] for at in sorted(found)[:2]])
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


def _looks_like_mouse(names: list[str]) -> bool:
    return _share(map(_MOUSE.fullmatch, names)) > 0.5


def _too_few(n_measured: int, axis: GeneAxis, shown: list[str], var: pd.DataFrame, *, mouse: bool) -> str:
    names = [name or text for name, text in zip(shown, texts(var.index), strict=True)]
    named = f" named like {first_names(names)}" if names else ""
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
    return f"{text}The model's are named like {first_names(axis.symbols)}. {PUT_NAMES}"


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
