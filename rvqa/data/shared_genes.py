"""Which genes several files share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy.sparse.csgraph import connected_components

from rvqa.data.aliases import TABLE_NAMES, AliasSource, alias_table
from rvqa.data.alignment import match_columns
from rvqa.data.genes import GeneAxis, first_names
from rvqa.errors import InputError

HUMAN_GENES = 20_000
"""Protein-coding genes, about: two files of n and m of them, drawn at random, share n m / 20,000."""

LINKED = 0.25
"""Part of that number which two files must share, less `GRACE`, and one gene at least, to be fitted together. All pairs
of nine real files, panels of 299 genes to whole transcriptomes, share 0.78 times that number or more. Files named in
two ways share hardly any gene, or only those without a symbol, which both call by their Ensembl ids."""

GRACE = 10
"""Genes by which small panels may fall short: two of 300 genes are expected to share 4 or 5."""


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
    """Reject a file that shares almost no gene with the others, as when one has symbols and another Ensembl ids.

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
        first_names([axis.symbols[at] for at in np.flatnonzero(each)[:2]])
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
