"""Raw counts out of log1p-normalised data, where the stored values prove them; otherwise an error, never a guess.

A cell was stored as v_j = ln(1 + c_j f): whole counts c_j times one factor f = target / library size. A stored value
stands for an interval, half a unit of its last decimal or a few units in the last place to each side, so
c_j f lies in [low_j, high_j]. Starting from "the smallest value is m counts", m = 1, 2, ...

    c_j is settled where [low_j / f_high, high_j / f_low] holds one integer;   a cell fails where it holds none
    [f_low, f_high] is cut to the intersection of [low_j / c_j, high_j / c_j] of the settled values

until nothing changes. A cell is explained if every c_j is settled; the counts are then normalised again and compared.
More than one integer left for a value (a large count rounded to few decimals) is an error as well.

What normalising destroys: counts c and k c of a cell, k = 2, 3, ..., give the same values. The smallest are returned,
and a cell whose counts all share a divisor would come out too small. For counts that are Poisson given any rates a
positive count is even with probability (cosh r - 1) / (e^r - 1) < 1/2, so n values all are with less than 2^-n: cells
with fewer than MIN_VALUES telling values are rejected. So are cells where more than 7/8 of them share a divisor: one
value that does not belong can make a finer unit look right. A library size of each cell settles these too: factor times
library size is the same target in every cell, so the factor follows from it.

Where genes are missing, the sums of the counts are not the library sizes. A usual target is then believed if it makes
every library size a whole number and chance cannot have done that. The witnesses are the different factors, each once:
log1p of counts that nobody normalised has the factor 1 in every cell, which 10,000 / 1 "explains" and which proves
nothing. `_proven_target` says what else speaks against a target. Where nothing is proven, the sums are returned.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy.sparse as sp
from scipy.special import bdtrc, pdtrc

from rvqa.errors import InputError

MIN_VALUES = 32
"""Telling values a cell needs without a library size: all would have to be even, 2^-32, for its counts to be wrong."""
_TELLING = 0.1  # width in counts of what a value allows: a count divided by 2..10 would be seen not to be an integer
_MULTIPLES = 10  # counts tried for the smallest value of a cell
_ROUNDS = 50
_BLOCK = 1 << 20  # values worked on at once, give or take a cell
_MIN_LOG, _MAX_LOG = 1e-30, 30.0
_PRIMES = tuple(p for p in range(3, 200) if all(p % q for q in range(2, p)))
_EXACT = 1e-12  # relative slack of float64 arithmetic here
_TARGETS = (1e4, 1e5, 1e6)  # targets that are looked for where genes are missing; each is believed only if proven
_DIFFERENT = 1 << 14  # values of a block that one factor gives; normalised cells have as many as values
_CHANCE = 1e-9  # what is less likely than this did not happen by chance


@dataclass(frozen=True, eq=False)
class RecoveredCounts:
    """What `recover_counts` proved."""

    counts: sp.csr_matrix
    """float32 [n_cells, n_genes], whole numbers, the sparsity pattern of the input."""
    library_size: np.ndarray
    """float64 [n_cells], counts: as given; else scale / factor where `scale` is known, whole but as precise as the
    values (3 decimals leave it uncertain by a count or two); else the sum of the counts."""
    scale: float | None
    """Target that every cell was scaled to, e.g. 10,000; None where the values do not show it, and where library sizes
    were given for values that nobody normalised."""
    decimals: int | None
    """Decimals the values were rounded to; None for full precision."""


@dataclass
class _Cells:
    """Per value: `counts` and `width` (range of counts it allows). Per cell: the rest, of cells that have values."""

    counts: np.ndarray
    width: np.ndarray
    low: np.ndarray
    high: np.ndarray
    impossible: np.ndarray
    """Values that no count explains."""
    open: np.ndarray
    """Values that more than one count explains."""

    @property
    def factor(self) -> np.ndarray:
        return (self.low + self.high) / 2

    @property
    def explained(self) -> np.ndarray:
        return (self.impossible == 0) & (self.open == 0)


def recover_counts(matrix: Any, *, library_size: np.ndarray | None = None) -> RecoveredCounts:
    """Recover the counts of log1p-normalised cells exactly, or raise.

    Parameters
    ----------
    matrix
        [n_cells, n_genes], dense or sparse, float32 or float64, not changed: natural log of 1 + counts scaled to one
        total a cell. Full precision, or rounded to decimals; genes may be missing.
    library_size
        [n_cells], total counts of each cell over all genes that were scaled, to within 0.1 %. Needed only where cells
        have too few values to tell counts from their halves. Where all cells share one factor, as after log1p without
        normalisation, they need not fit the values and are returned as they are.

    Returns
    -------
    RecoveredCounts

    Raises
    ------
    InputError
        A value is not explained by counts, or by more than one count; a cell has too few values; `library_size`
        disagrees with the values, or is below the sum of the counts of a cell that was not normalised.

    Notes
    -----
    Values at full precision must agree to 4 units in the last place (what math libraries promise for log1p in float32)
    and two roundings of count times factor, eps x / (1 + x) after the logarithm; float64 that holds float32 values
    is judged as float32. Rounded values: half a unit of the last decimal on top.
    """
    logs = sp.csr_matrix(matrix)
    if not logs.has_canonical_format or np.count_nonzero(logs.data) != logs.nnz:
        logs = logs.copy()
        logs.sum_duplicates()
        logs.eliminate_zeros()
    stored = logs.data if logs.data.dtype.kind == "f" else logs.data.astype(np.float64)
    if not stored.size or not (np.isfinite(stored).all() and stored.min() > _MIN_LOG and stored.max() < _MAX_LOG):
        expected = f"finite values from 0 to {_MAX_LOG:g}, not all 0 and none between 0 and {_MIN_LOG:g}"
        raise InputError(f"Counts are recovered from {expected}. {_ADVICE}")
    if stored.dtype == np.float64 and np.array_equal(stored.astype(np.float32), stored):
        stored = stored.astype(np.float32)
    decimals, eps = _decimals(stored), float(np.finfo(stored.dtype).eps)
    value = stored.astype(np.float64)
    place = np.full(value.size, 10.0**-decimals) if decimals is not None else np.spacing(stored).astype(np.float64)
    tolerance = 4 * np.spacing(stored).astype(np.float64) - eps * np.expm1(-value)  # -expm1(-v) is x / (1 + x)
    if decimals is not None:
        tolerance += place / 2
    low, high = np.expm1(np.maximum(value - tolerance, 0)), np.expm1(value + tolerance)

    lengths = np.diff(logs.indptr)
    filled = np.flatnonzero(lengths)
    cells = _in_blocks(low, high, lengths[filled])
    telling = _per_cell(np.add, cells.width < _TELLING, lengths[filled])
    given = None if library_size is None else _checked(library_size, logs.shape[0])
    scale = None
    shared = None if given is None else _shared_factor(low, high, lengths[filled], given[filled])
    if given is not None and shared is not None:
        every = np.ones(filled.size)
        cells = _in_blocks(low, high, lengths[filled], (shared[0] * every, shared[1] * every))
    elif given is not None:
        scale = _target(cells, telling, given[filled])
        factor = scale / given[filled]
        cells = _in_blocks(low, high, lengths[filled], (factor * (1 - 1e-3), factor * (1 + 1e-3)))
    _require_explained(cells, logs.shape[0], decimals, with_library=given is not None)
    if given is None and (few := int(np.count_nonzero(telling < MIN_VALUES))):
        raise InputError(
            f"Counts are not certain in {few:,} of {logs.shape[0]:,} cells: with fewer than {MIN_VALUES} telling "
            "values counts cannot be told from their multiples. Name the obs column with every cell's total counts "
            "(library_size_key), or remove these cells."
        )
    if given is None and (odd := int(np.count_nonzero(_nearly_multiples(cells, telling, lengths[filled])))):
        raise InputError(
            f"Counts cannot be recovered: in {odd:,} of {logs.shape[0]:,} cells nearly all counts would be multiples "
            f"of one number, as where a few values were altered. {_ADVICE}"
        )
    error = np.abs(np.log1p(cells.counts * np.repeat(cells.factor, lengths[filled])) - value)
    if (wrong := int(np.count_nonzero(error > tolerance * (1 + 1e-6)))) or cells.counts.max() > 2**24:
        raise InputError(f"{wrong:,} values are not what their counts give when normalised again. {_ADVICE}")

    totals = np.zeros(logs.shape[0])
    totals[filled] = _per_cell(np.add, cells.counts, lengths[filled])
    depth = totals
    if given is not None and shared is not None:
        if below := int(np.count_nonzero(given < totals)):
            raise InputError(
                f"{below:,} library sizes are below the sum of the counts of their cell. Check the column."
            )
        depth = given
    elif given is not None:
        depth, scale = given, _common_target(cells, given[filled], 4 * eps) or scale
    elif (common := _common_target(cells, totals[filled], 4 * eps)) is not None:
        scale = common
    elif (proven := _proven_target(cells, totals[filled], 4 * eps)) is not None:
        scale, depth[filled] = proven
    counts = sp.csr_matrix((cells.counts.astype(np.float32), logs.indices.copy(), logs.indptr.copy()), logs.shape)
    return RecoveredCounts(counts, depth, scale, decimals)


_ADVICE = "Pass the raw counts themselves; these values cannot be turned back into them."


def _decimals(stored: np.ndarray) -> int | None:
    """Fewest decimals that reproduce every value, None if that takes what the type holds anyway."""
    for decimals in range(7 if stored.dtype == np.float32 else 13):
        for part in (stored[:1000], stored):
            if not np.array_equal(np.round(part.astype(np.float64), decimals).astype(stored.dtype), part):
                break
        else:
            return decimals
    return None


def _per_cell(reduce: np.ufunc, values: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    kind = np.float64 if values.dtype.kind == "f" else np.int64
    return reduce.reduceat(values, np.cumsum(lengths) - lengths, dtype=kind)


def _in_blocks(
    low: np.ndarray, high: np.ndarray, lengths: np.ndarray, factor: tuple[np.ndarray, np.ndarray] | None = None
) -> _Cells:
    """Explain all cells, a block of them at a time."""
    ends = np.cumsum(lengths)
    edges = [0, *np.unique(np.searchsorted(ends, np.arange(_BLOCK, int(ends[-1]), _BLOCK))).tolist(), len(lengths)]
    parts = []
    for first, last in itertools.pairwise(edges):
        if last > first:
            span = slice(int(ends[first] - lengths[first]), int(ends[last - 1]))
            rows = slice(first, last)
            if factor is None:
                parts.append(_by_multiples(low[span], high[span], lengths[rows]))
            else:
                parts.append(_narrow(low[span], high[span], lengths[rows], factor[0][rows], factor[1][rows]))
    return _Cells(*(np.concatenate([getattr(part, name) for part in parts]) for name in _Cells.__annotations__))


def _by_multiples(low: np.ndarray, high: np.ndarray, lengths: np.ndarray) -> _Cells:
    """Take the smallest value of a cell for 1 count, of those that fail so for 2, and so on."""
    least = _per_cell(np.minimum, low, lengths), _per_cell(np.minimum, high, lengths)
    cells = _narrow(low, high, lengths, *least)
    for multiple in range(2, _MULTIPLES + 1):
        failed = cells.impossible > 0
        if not failed.any():
            break
        values = np.repeat(failed, lengths)
        again = _narrow(
            low[values], high[values], lengths[failed], least[0][failed] / multiple, least[1][failed] / multiple
        )
        better = again.impossible < cells.impossible[failed]
        cell, value = np.flatnonzero(failed)[better], np.flatnonzero(values)[np.repeat(better, lengths[failed])]
        for name in ("low", "high", "impossible", "open"):
            getattr(cells, name)[cell] = getattr(again, name)[better]
        for name in ("counts", "width"):
            getattr(cells, name)[value] = getattr(again, name)[np.repeat(better, lengths[failed])]
    return cells


def _narrow(low: np.ndarray, high: np.ndarray, lengths: np.ndarray, f_low: np.ndarray, f_high: np.ndarray) -> _Cells:
    """Settle counts and cut the factors, in turns, until nothing changes."""
    crossed = np.zeros(lengths.size, dtype=bool)
    for _ in range(_ROUNDS):
        most_counts, fewest_counts = high / np.repeat(f_low, lengths), low / np.repeat(f_high, lengths)
        fewest = np.maximum(np.ceil(fewest_counts * (1 - _EXACT)), 1)
        most = np.floor(most_counts * (1 + _EXACT))
        settled = fewest == most
        new_low = np.maximum(f_low, _per_cell(np.maximum, np.where(settled, low / fewest, 0), lengths))
        new_high = np.minimum(f_high, _per_cell(np.minimum, np.where(settled, high / fewest, np.inf), lengths))
        crossed |= new_low > new_high * (1 + _EXACT)
        # What failed stays as it is: its factors mean nothing.
        new_low, new_high = np.where(crossed, f_low, new_low), np.where(crossed, f_high, new_high)
        done = np.array_equal(new_low, f_low) and np.array_equal(new_high, f_high)
        f_low, f_high = new_low, new_high
        if done:
            break
    impossible = _per_cell(np.add, fewest > most, lengths)
    return _Cells(
        counts=fewest,
        width=most_counts - fewest_counts,
        low=f_low,
        high=f_high,
        impossible=np.maximum(impossible, crossed),
        open=_per_cell(np.add, fewest < most, lengths),
    )


def _require_explained(cells: _Cells, n_cells: int, decimals: int | None, *, with_library: bool) -> None:
    kept = "full precision" if decimals is None else f"{decimals} decimals"
    if (failed := cells.impossible > 0).any():
        column = "; or the library sizes are not those that it was normalised with" if with_library else ""
        raise InputError(
            f"Counts cannot be recovered: in {np.count_nonzero(failed):,} of {n_cells:,} cells at least "
            f"{cells.impossible.sum():,} values are not ln(1 + count x factor) to the precision stored "
            f"({kept}){column}. {_ADVICE}"
        )
    if (loose := cells.open > 0).any():
        raise InputError(
            f"Counts cannot be recovered: in {np.count_nonzero(loose):,} of {n_cells:,} cells {cells.open.sum():,} "
            f"values fit more than one count, as only {kept} are stored. {_ADVICE}"
        )


def _nearly_multiples(cells: _Cells, telling: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Cells of whose telling counts less than 1/8 are free of some prime; of natural counts more than 1/2 are."""
    told = cells.width < _TELLING
    few = 8 * _per_cell(np.add, told & (cells.counts % 2 != 0), lengths) < telling
    # A larger prime divides neither 1 nor 2, so only cells with few of these are left to look at.
    rest = np.flatnonzero(8 * _per_cell(np.add, told & (cells.counts <= 2), lengths) < telling)
    values = np.isin(np.repeat(np.arange(lengths.size), lengths), rest)
    if rest.size:
        for prime in _PRIMES:
            free = told[values] & (cells.counts[values] % prime != 0)
            few[rest] |= 8 * _per_cell(np.add, free, lengths[rest]) < telling[rest]
    return few


def _checked(library_size: np.ndarray, n_cells: int) -> np.ndarray:
    given = np.asarray(library_size, dtype=np.float64)
    if given.shape != (n_cells,) or not (np.isfinite(given).all() and (given > 0).all()):
        raise InputError(f"Expected one finite library size > 0 for each of {n_cells:,} cells.")
    return given


def _target(cells: _Cells, telling: np.ndarray, library_size: np.ndarray) -> float:
    """Return the common target of cells whose library size is known, from the cells that show their factor best."""
    good = cells.explained & (telling > 0)
    if telling[good].sum() < MIN_VALUES:
        raise InputError(f"Counts cannot be recovered: too few values are explained by counts. {_ADVICE}")
    # All counts of many cells at once are not even: the smallest of a few cells' targets is theirs.
    best = good & (telling >= min(MIN_VALUES, int(telling[good].max())))
    targets = (cells.factor * library_size)[best]
    return float(np.median(targets) if telling[best].min() >= MIN_VALUES else targets.min())


def _rounded(target: float, low: float, high: float) -> float:
    return float(np.rint(target)) if low <= np.rint(target) <= high else target


def _common_target(cells: _Cells, totals: np.ndarray, slack: float) -> float | None:
    """Return what totals times factors may all be: with the sums of the counts only if no gene is missing."""
    low = float((totals * cells.low).max()) * (1 - slack)
    high = float((totals * cells.high).min()) * (1 + slack)
    if len(totals) < 2 or low > high:
        return None
    return _rounded((low + high) / 2, low, high)


def _shared_factor(
    low: np.ndarray, high: np.ndarray, lengths: np.ndarray, library_size: np.ndarray
) -> tuple[float, float] | None:
    """Return the limits of the one factor of all cells, None if they have no such: the values are taken as one cell's.

    One factor is also what normalising gives cells of one library size: then the target says more.
    """
    if np.ptp(library_size) <= 2e-3 * library_size.min() or np.unique(low[:_BLOCK]).size > _DIFFERENT:
        return None
    _, first, often = np.unique(low, return_index=True, return_counts=True)
    pool = _in_blocks(low[first], high[first], np.array([first.size]))
    if not pool.explained[0] or often[pool.width < _TELLING].sum() < MIN_VALUES:
        return None
    counts = np.zeros(low.size, dtype=np.int64)
    counts[np.argsort(low, kind="stable")] = np.repeat(pool.counts.astype(np.int64), often)
    # n counts of a cell share a divisor with less than 2^-n. More such cells have a factor of their own, a multiple.
    divided = np.count_nonzero(np.gcd.reduceat(counts, np.cumsum(lengths) - lengths) > 1)
    if divided and pdtrc(divided - 1, np.exp2(-lengths.astype(np.float64)).sum()) < _CHANCE:
        return None
    return float(pool.low[0]), float(pool.high[0])


def _proven_target(cells: _Cells, totals: np.ndarray, slack: float) -> tuple[float, np.ndarray] | None:
    """Return the usual target that makes every library size an integer, and these; None where chance might do that.

    A library size that several cells share is one witness: cells that nobody normalised, or that were divided by one
    number, share a factor. A witness counts as one coin at most, because its library size could be even by chance.
    So 30 cells of different factors are the least. Two things speak against a target. Many cells share a factor
    that few others come near: part of the file was not normalised. Too many library sizes share a divisor: a part
    was scaled to a smaller target, or all of it.
    """
    for target in _TARGETS:
        low, high = target / cells.high * (1 - slack), target / cells.low * (1 + slack)
        if not ((np.floor(high) >= np.ceil(low)).all() and (high >= totals).all()):
            continue
        depth, width = np.clip(np.rint(target / cells.factor), np.ceil(low), np.floor(high)), high - low
        sizes, place = np.unique(depth[width < 1], return_inverse=True)
        witness = np.ones(sizes.size)
        np.minimum.at(witness, place, width[width < 1])
        proven = np.log(np.maximum(witness, 0.5)).sum() < np.log(_CHANCE)
        if proven and not _crowded(depth, width) and not _divisible(sizes):
            return target, depth
    return None


def _crowded(depth: np.ndarray, width: np.ndarray) -> bool:
    """Say if more cells have one library size than the cells within 10 % of it make likely, edges and peaks allowed."""
    ordered, reach = np.sort(depth), np.maximum(width, 0.5)

    def between(low: np.ndarray, high: np.ndarray) -> np.ndarray:
        return np.searchsorted(ordered, high, "right") - np.searchsorted(ordered, low)

    same, near = between(depth - reach, depth + reach), between(0.9 * depth, 1.1 * depth)
    expected = 3 * (np.maximum(near - same, 0) + 1) * 2 * reach / (0.2 * depth)
    return bool((pdtrc(same - 1, expected) < _CHANCE).any())


def _divisible(sizes: np.ndarray) -> bool:
    """Say if more library sizes than chance allows share what lies between usual targets."""
    return any(
        bdtrc(np.count_nonzero(sizes % divisor == 0) - 1, sizes.size, 1 / divisor) < _CHANCE
        for divisor in (2, 5, 10, 100)
        if (sizes % divisor == 0).any()
    )
