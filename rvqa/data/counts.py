"""Raw counts: find them in an AnnData, prove that they are raw, and say what else was handed over."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import scipy.sparse as sp

from rvqa.data.cells import Cells, unknown
from rvqa.data.depth import library_size
from rvqa.data.features import gene_features, with_kinds
from rvqa.data.integers import doubt
from rvqa.data.kinds import (
    MAX_COUNT,
    MAX_LOG,
    NEARLY,
    MatrixFacts,
    MatrixKind,
    canonical_csr,
    classify,
    inspect_matrix,
    loaded,
    sampled_rows,
)
from rvqa.data.reading import AUTO, Reading
from rvqa.data.recovery import recover_counts
from rvqa.errors import InputError, InputWarning, nearest, quoted

if TYPE_CHECKING:
    import pandas as pd
    from anndata import AnnData


_USUAL = ("counts", "raw_counts", "count", "counts_raw", "raw", "umi", "umis", "umi_counts")
_PARTS = tuple(f"layers[{name!r}]" for name in ("spliced", "unspliced", "ambiguous", "spanning"))
"""Layers of RNA velocity: integers, but not all of a cell's counts."""


def read_counts(adata: AnnData, reading: Reading | None = None, *, name: str = "", part: bool = False) -> Cells:
    """Return the raw counts of an AnnData, their genes and library sizes; raise on what is not raw counts.

    Parameters
    ----------
    adata
        Cells by genes, not changed. Dense, any scipy sparse matrix or array, backed or Dask (read into memory).
    reading
        Which layer, which column of totals, and whether log1p values are turned back into counts; recovered counts
        bring the library size that the values were normalised with. Defaults to raw counts in `X`.
    name
        Of the file, kept in the result.
    part
        The cells are some of a file that was looked at before: what only many cells tell is not asked.

    Returns
    -------
    Cells
        Of each cell nothing more is known.

    Raises
    ------
    InputError
        An unknown layer, other values, or a cell without counts.
    """
    reading = reading or Reading()
    key = reading.library_size_key
    found = _read(adata, reading, part=part)
    stored = library_size(adata, found.counts, key=key)
    total = stored if found.recovered is None else found.recovered
    given = key is not None or not np.array_equal(total, stored)
    told = unknown(adata.n_obs)
    return Cells(found.counts, found.var, total, given, **told, name=name, place=found.place, left_out=found.left_out)


@dataclass(frozen=True, eq=False)
class _Found:
    counts: sp.csr_matrix
    var: pd.DataFrame
    place: str
    left_out: Mapping[str, int]
    recovered: np.ndarray | None = None
    """Library sizes that recovered counts were normalised with."""


def _read(adata: AnnData, reading: Reading, *, part: bool = False) -> _Found:
    key, recover = reading.library_size_key, reading.recover
    name, stored, var = _select(adata, reading.layer_of(adata))
    matrix = loaded(stored)
    matrix = canonical_csr(matrix) if sp.issparse(matrix) else matrix
    genes, left_out = gene_features(var)
    if left_out:
        matrix, var = matrix[:, genes], var[genes]
    facts = inspect_matrix(matrix)
    if facts.kind is not MatrixKind.COUNTS and not (recover and facts.kind is MatrixKind.LOG1P):
        seen = f"{_what_was_seen(name, facts)}{_first_place(adata, var, matrix, facts)}"
        raise InputError(f"{seen} {_next_step(adata, name, facts, offer=recover is not None)}")
    csr = canonical_csr(matrix)
    if facts.kind is MatrixKind.COUNTS:
        if not part:
            require_counted(csr[sampled_rows(csr.shape[0])], name)
        counts = csr.astype(np.float32 if csr.dtype.kind == "f" else csr.dtype, copy=False)
        return _Found(counts, var, name, left_out)
    # A column of totals is checked against one count a value, for now.
    recovered = recover_counts(csr, library_size=None if key is None else library_size(adata, csr.sign(), key=key))
    # What the cells were normalised with may be a total of other features, too: then the sums of their genes are known.
    depth = None if left_out and key is None else recovered.library_size
    return _Found(recovered.counts, var, name, left_out, depth)


def require_counted(sample: sp.csr_matrix, name: str) -> None:
    """Reject integers that were never counted, by a sample of the rows of a matrix; warn where that is only likely.

    Raises
    ------
    InputError
        They are certainly no counts.

    Warns
    -----
    InputWarning
        They probably are not counts.
    """
    if (found := doubt(sample)) is None:
        return
    if found.certain:
        raise InputError(f"{name} holds integers that are not counts: {found.text}. {found.advice}")
    warnings.warn(f"{name} may not hold counts: {found.text}. {found.advice}", InputWarning, stacklevel=4)


def find_counts(places: Mapping[str, Callable[[], Any]]) -> str:
    """Where raw counts are.

    Parameters
    ----------
    places
        By name ("X", "raw.X", "layers['...']"), what gives a sample of the rows there, as CSR or dense.

    Returns
    -------
    str
        "X" if it holds raw counts, and where nothing does; else a layer that is usually called so ("counts" first),
        "raw.X", or the one other layer that holds them.

    Raises
    ------
    InputError
        Several other layers hold them.
    """

    def counted(name: str) -> bool:
        try:
            rows = places[name]()
            if len(getattr(rows, "shape", ())) != 2 or classify(rows) is not MatrixKind.COUNTS:
                return False
        except InputError:
            return False  # what it holds is not a matrix of numbers
        found = doubt(canonical_csr(loaded(rows)))
        return found is None or not found.certain

    usual = ["X", *(f"layers[{name!r}]" for name in _USUAL), "raw.X"]
    for name in usual:
        if name in places and counted(name):
            return name
    others = [name for name in places if name not in usual and name not in _PARTS]
    hold = [name for name in others if counted(name)]
    if len(hold) > 1:
        raise InputError(
            f"X holds no raw counts, and {', '.join(hold)} look as if they did. Say which: layer='...' (--layer)."
        )
    return hold[0] if hold else "X"


def _select(adata: AnnData, layer: str | None) -> tuple[str, Any, pd.DataFrame]:
    if layer is None and adata.X is not None:
        return "X", adata.X, adata.var
    places = _places(adata)
    if layer == AUTO and AUTO not in adata.layers:
        name = find_counts({name: lambda at=name: _sample_of(*places[at]) for name in places})  # type: ignore[misc]
    elif layer in adata.layers:
        name = f"layers[{layer!r}]"
    else:
        name = {None: "X", "X": "X", "raw": "raw.X"}.get(layer, "")
    if name in places:
        return (name, *places[name])
    if name == "X":
        raise InputError(f"X is missing. {_next_step(adata, 'X', None)}")
    layers = f"the layers {quoted(adata.layers)}" if len(adata.layers) else "no layers"
    raw = "no .raw" if adata.raw is None else ".raw (layer='raw')"
    advice = f"Leave layer out to use X.{' ' + nearest(str(layer), adata.layers) if len(adata.layers) else ''}"
    raise InputError(f"There is no layer {layer!r}: the AnnData has {layers} and {raw}. {advice}")


def _places(adata: AnnData) -> dict[str, tuple[Any, pd.DataFrame]]:
    """Matrices of an AnnData that may hold counts, with the tables of their genes."""
    places: dict[str, tuple[Any, pd.DataFrame]] = {} if adata.X is None else {"X": (adata.X, adata.var)}
    places |= {f"layers[{key!r}]": (adata.layers[key], adata.var) for key in adata.layers}
    if adata.raw is not None and "raw" not in adata.layers:
        places["raw.X"] = (adata.raw.X, with_kinds(adata.raw.var, adata.var))
    return places


def _sample_of(matrix: Any, var: pd.DataFrame) -> Any:
    """Sampled rows of a matrix in an AnnData, of its genes."""
    rows = loaded(matrix[sampled_rows(matrix.shape[0])])
    genes, left_out = gene_features(var)
    return rows[:, genes] if left_out else rows


def _what_was_seen(name: str, facts: MatrixFacts) -> str:
    shape = f"{facts.n_cells:,} cells x {facts.n_genes:,} genes"
    if 0 in (facts.n_cells, facts.n_genes):
        return f"{name} has no {'genes' if facts.n_cells else 'cells'} ({shape})."
    if facts.n_nonzero == 0:
        what = "nothing but zeros" if facts.kind is MatrixKind.EMPTY else f"values of type {facts.dtype}, not counts"
        return f"{name} holds {what} ({shape})."
    if facts.n_nonfinite:
        return f"{name} holds NaN or infinite values ({facts.n_nonfinite:,} of {facts.n_nonzero:,} non-zero values)."
    broken, few = facts.n_nonzero - facts.n_integer, facts.share_integer > 0.995
    share = f"{broken:,} of {facts.n_nonzero:,}" if few else f"{100 * (1 - facts.share_integer):.0f} % of"
    numbers = f"max {_number(facts.maximum)}, {share} non-zero values are not integers"
    if facts.kind is MatrixKind.SCALED:
        return f"{name} looks scaled or centred: it holds negative values (min {facts.minimum:.4g}, {numbers})."
    if facts.maximum > MAX_COUNT:
        most = f"no gene of one cell has more than {MAX_COUNT:,} counts"
        return f"{name} holds a value of {_number(facts.maximum)}; {most}."
    if facts.worst_fraction < NEARLY:
        return f"{name} holds nearly integers ({numbers}); if they are counts, round them: adata.X = adata.X.round()."
    if facts.kind is MatrixKind.JUNK:
        return f"{name} holds fractions between 0 and 1, not counts ({numbers})."
    log = facts.kind is MatrixKind.LOG1P
    if facts.row_total is None and not facts.whole_multiples:
        return f"{name} looks {'log-transformed' if log else 'normalised, corrected or estimated'} ({numbers})."
    sums = facts.row_total is not None and f"rows sum to {_number(facts.row_total)}"
    why = (sums or "each row is whole numbers times a factor") + " after expm1" * log
    return f"{name} looks {facts.kind.value} ({numbers}; {why})."


def _first_place(adata: AnnData, var: pd.DataFrame, matrix: Any, facts: MatrixFacts) -> str:
    """Name the cell and the gene of the first value that is wrong, in a sentence; "" where most are."""
    few = max(10, facts.n_nonzero // 1000)
    if facts.n_nonfinite:
        wrong: Any = lambda values: ~np.isfinite(values)  # noqa: E731
    elif 0 < facts.n_negative <= few:
        wrong = lambda values: values < 0  # noqa: E731
    elif 0 < facts.n_nonzero - facts.n_integer <= few:
        wrong = lambda values: values != np.rint(values)  # noqa: E731
    else:
        return ""
    if sp.issparse(matrix):
        at = int(np.flatnonzero(wrong(matrix.data))[0])
        cell, gene = int(np.searchsorted(matrix.indptr, at, side="right")) - 1, int(matrix.indices[at])
    else:
        cell, gene = (int(i[0]) for i in np.nonzero(wrong(np.asarray(matrix))))
    return (
        f" The first is {matrix[cell, gene]:.4g} in cell {str(adata.obs_names[cell])!r}, gene {str(var.index[gene])!r}."
    )


def _next_step(adata: AnnData, refused: str, facts: MatrixFacts | None, *, offer: bool = True) -> str:
    """What to do about a matrix that is rejected, or missing."""
    if 0 in adata.shape:
        return "Check what filtered or sliced it."
    kind = MatrixKind.EMPTY if facts is None else facts.kind
    offered = offer and kind is MatrixKind.LOG1P
    recover = " Or have them recovered: recover=True, or --recover." if offered else ""
    places = {name: place for name, place in _places(adata).items() if name != refused}
    parts: list[str] = []
    for name, (matrix, var) in places.items():
        advice = _naming(name)
        # A sample of rows is enough for advice: following it checks every value.
        found = MatrixKind.EMPTY
        if len(getattr(matrix, "shape", ())) == 2:
            found = classify(_sample_of(matrix, var))
        if name in _PARTS and found is MatrixKind.COUNTS:
            parts.append(name)
        elif found is MatrixKind.COUNTS:
            return f"But {name} looks like raw counts: {advice}."
        elif found is MatrixKind.LOG1P and offer and not recover:
            recover = f" Or have them recovered from adata.{name}: {advice} and recover=True, or --recover."
    if parts:
        held = " and ".join(parts)
        return f"{held} hold parts of the counts: put their sum into a layer and name it (--layer).{recover}"
    others = f" ({', '.join(places)} looked no better)" if places else ""
    estimated = ""
    unlike = facts is not None and facts.row_total is None and not facts.whole_multiples
    if kind is MatrixKind.NORMALISED and facts is not None and unlike and facts.maximum > MAX_LOG:
        estimated = (
            " If they are estimates of counts (SoupX, RSEM, salmon), rounding is safe: adata.X = adata.X.round()."
        )
    return f"Pass raw counts, e.g. adata.layers['counts'] with layer='counts'{others}.{estimated}{recover}"


def _naming(place: str) -> str:
    """How to say that counts are in a place."""
    if place == "X":
        return "leave layer out"
    return f"pass layer={place[7:-1] if place != 'raw.X' else repr('raw')} (--layer)"


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"
