"""Integers that are not counts: what can be told from a sample of cells, with certainty or as likely.

    MULTIPLES    all values, or those of most cells, share a divisor                                       rejected
    PRESENCE     only ones, in a cell where chance would have put more than 25 values above 1              rejected
    RANKS        a cell's different values are as far apart as they are often (ordinal, min, max)          rejected
    SHARES       a cell's values are whole numbers times a factor, rounded (CP10K, CPM of UMI)             rejected
    ONE TOTAL    cells sum to one total above 100,000, but not exactly, and ones are rare (TPM, CPM)       rejected
                 or to a power of ten above 10,000 to within the noise of rounding                         warned
    PEAKS        a value above 1 is a cell's most common, and the one before is missing (log2, log1p)      rejected
    LOGARITHMS   values up to 20 that vary less between cells than counting does                           rejected
    NO GAPS      every number up to a cell's largest occurs: dense ranks; of 30 or more levels             rejected
                 of fewer levels, in 20 cells or more                                                      warned

The first line that applies wins. Each test is about something that counts do not do, whichever cells or genes somebody
chose and however deep the cells are: shallow cells look binary, downsampled cells have exactly equal sums, panels of
highly expressed genes have hardly any ones, and all of them pass. The numbers beside the constants are the most extreme
that ten cells or more of nine real files reach, thinned, downsampled and cut to genes (tests/data/test_integers.py).

What cannot be told, and passes:
    - 0 and 1 of shallow cells, for which real cells of that depth would look alike;
    - counts per n rounded where n is below about 1.5 times a cell's depth: thinned counts look alike;
    - rounded TPM that lost genes afterwards: neither their sums nor a spacing is left;
    - rounded log1p of raw counts with fewer than 10 genes that are in most cells, or of ten cells;
    - average ranks, dense ranks with fewer than 10 levels, ranks that lost genes or ties;
    - counts plus a constant, counts of reads instead of molecules, counts cut off at a maximum.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import numpy as np
import scipy.sparse as sp

_ENOUGH = 32
"""Values that all share a divisor: 2^-32 for counts. No real cell with as many values has a divisor."""
_COLLISIONS = 25.0
"""Expected values above 1 in a cell without any: e^-25 for counts. Real: 5.5 in the deepest of 50,000 binary cells."""
_LEVELS, _DENSE_LEVELS = 8, 30
"""Different values from which on a cell shows ranks, and values without gaps. Real: no gaps up to 22 values in some."""
_LOOKED_AT = 32  # cells that the slower tests look at
_SHARES = -15.0
"""Logarithm (base 10) of the chance that integers lie as close to the multiples of one factor a cell."""
_LARGE, _SAME, _RARE = 1e5, 1e-3, 0.1
"""Least sum, how far sums are from their median, and the share of ones, in TPM. Real: up to 45 cells of a file with
as few ones have such sums, of about 574 counts; in samples tried none of 20,000 or more."""
_LARGEST_LOG = 20
_LESS, _GENES, _FREEDOM = 0.5, 10, 500
"""Variance over mean of genes whose mean is at least 2, how many they are, and its degrees of freedom. Counts: 1 or
more; real: 0.89, and down to 0.06 for a single gene in cells chosen by a total that is mostly this gene's."""
_PEAK, _GAP = 0.25, 0.1
"""Share of a cell's values at their peak, and of what must precede it at least. Poisson mixtures: 1 or more."""


@dataclass(frozen=True)
class Doubt:
    """Why integers are probably not counts."""

    text: str
    """A clause: what was seen and what it means."""
    advice: str
    """A sentence: what to do."""
    certain: bool
    """Whether the caller should reject the values; otherwise it should warn."""


_ADVICE = "Pass the raw counts themselves, e.g. adata.layers['counts'] with layer='counts'."


def doubt(sample: sp.csr_matrix) -> Doubt | None:
    """Say why the positive integers of some cells are not counts.

    Parameters
    ----------
    sample
        Canonical CSR [n_cells, n_genes] of any dtype, not changed: up to 512 cells of a file, all its genes. Every
        stored value is an integer > 0.

    Returns
    -------
    Doubt or None
        The first finding in the order of the table at the top of `rvqa.data.integers`; None where nothing speaks
        against counts, which does not prove that they are counts.

    Notes
    -----
    The tests on Poisson mixtures: whatever the rates, p(n) n! = E[rate^n exp(-rate)] is log-convex in n, so that
    n p(n) / p(n-1) grows with n; and the variance is at least the mean.
    """
    lengths = np.diff(sample.indptr)
    lengths = lengths[lengths > 0].astype(np.int64)
    if not lengths.size:
        return None
    values = sample.data[: sample.nnz].astype(np.int64)
    starts = np.cumsum(lengths) - lengths
    cells = _levels(values, starts, lengths)
    return (
        _multiples(values, starts, lengths)
        or _presence(values, lengths, sample)
        or _ranks(cells)
        or _shares(cells)
        or _one_total(values, starts, lengths)
        or _peaks(cells)
        or _logarithms(values, lengths.size, sample)
        or _no_gaps(cells)
    )


_Level = tuple[np.ndarray, np.ndarray]  # of a cell: its different values, ascending, and how many genes have each


def _levels(values: np.ndarray, starts: np.ndarray, lengths: np.ndarray) -> list[_Level]:
    """Return the levels of up to `_LOOKED_AT` cells that have enough values, evenly spaced."""
    cells = np.flatnonzero(lengths >= _ENOUGH)
    cells = cells[np.unique(np.linspace(0, cells.size - 1, min(cells.size, _LOOKED_AT)).astype(np.int64))]
    return [np.unique(values[starts[cell] : starts[cell] + lengths[cell]], return_counts=True) for cell in cells]


def _multiples(values: np.ndarray, starts: np.ndarray, lengths: np.ndarray) -> Doubt | None:
    least = np.minimum.reduceat(values, starts)
    shared = np.ones_like(least)
    for cell in np.flatnonzero(least > 1):  # few: a cell with a 1 has no divisor
        row = values[starts[cell] : starts[cell] + lengths[cell]]
        shared[cell] = np.gcd.reduce(row) if np.gcd.reduce(row[:_ENOUGH]) > 1 else 1
    divisor, advice = int(np.gcd.reduce(shared)), "Divide the values by what they were multiplied by."
    if divisor > 1 and values.size - lengths.size >= _ENOUGH:  # cells may have been chosen by one value
        return Doubt(f"all values are multiples of {divisor:,}: multiplied counts, not counts", advice, certain=True)
    told = lengths >= _ENOUGH
    if told.any() and np.mean(shared[told] > 1) >= 0.5:
        text = "in most cells all values are multiples of one number: multiplied or normalised counts, not counts"
        return Doubt(text, _ADVICE, certain=True)
    return None


def _presence(values: np.ndarray, lengths: np.ndarray, sample: sp.csr_matrix) -> Doubt | None:
    if values.max() > 1:
        return None
    # How often counts of two cells are of one gene. Two counts of one cell are so more often.
    found = np.bincount(sample.indices[: sample.nnz], minlength=sample.shape[1]).astype(np.float64)
    pairs = float(found.sum() ** 2 - (lengths.astype(np.float64) ** 2).sum())
    together = float((found * (found - 1)).sum()) / pairs if pairs else 0.0
    deepest = int(lengths.max())
    if (expected := deepest**2 / 2 * together) <= _COLLISIONS:
        return None
    text = (
        f"every value is 1, also in a cell with {deepest:,} of them, where about {expected:,.0f} genes would have been "
        "counted more than once: presence or absence, not counts"
    )
    return Doubt(text, _ADVICE, certain=True)


def _ranks(cells: list[_Level]) -> Doubt | None:
    told = [(np.diff(level), ties) for level, ties in cells if level.size >= _LEVELS]
    if not told:
        return None
    spaced = np.mean([bool((step == ties[:-1]).all() or (step == ties[1:]).all()) for step, ties in told])
    if spaced < 0.9:
        return None
    text = f"in {len(told)} cells looked at the values are the numbers of places in an order: ranks, not counts"
    return Doubt(text, _ADVICE, certain=True)


def _no_gaps(cells: list[_Level]) -> Doubt | None:
    told = [level for level, _ in cells if level.size >= _LEVELS]
    if not told or any(level[-1] - level[0] >= level.size for level in told):
        return None
    certain = bool(np.median([level.size for level in told]) >= _DENSE_LEVELS)
    if not certain and (len(told) < 20 or np.median([level.size for level in told]) < 10):
        return None
    text = (
        f"in {len(told)} cells looked at every number up to the largest value occurs: ranks or rounded logarithms, not "
        "counts"
    )
    return Doubt(text, _ADVICE, certain=certain)


def _shares(cells: list[_Level]) -> Doubt | None:
    told = [level.astype(np.float64) for level, _ in cells if level[0] > 1]
    near = 0.5 + 0.0025 * (_ENOUGH + 1)  # half a unit of rounding, and half a step of the factor, times counts
    factors, chance = [], 0.0
    for level in told:
        some = level[level <= _ENOUGH * level[0]]
        for least, middle in itertools.product((1, 2, 3), (0.0, 0.5)):  # counts of the least value; rounded or cut off
            tried = (level[0] + middle + np.linspace(-0.5, 0.5, 201)) / least
            off = np.abs(some + middle - tried[:, None] * np.rint((some + middle) / tried[:, None])).max(axis=1)
            if off.min() <= near:
                factor = float(tried[np.argmin(off)])
                integers = np.arange(level[0], _ENOUGH * level[0]) + middle
                fit = np.mean(np.abs(integers - factor * np.rint(integers / factor)) <= near)
                factors.append(factor)
                chance += math.log10(6 * tried.size) + (some.size - 1) * math.log10(fit)
                break
    if len(factors) < max(1, 0.9 * len(told), 0.25 * len(cells)) or chance > _SHARES:
        return None
    text = (
        f"in {len(factors)} cells looked at the values are whole numbers times a factor, about "
        f"{np.median(factors):,.1f}, and rounded: counts per 10,000, per million or the like, not counts"
    )
    return Doubt(text, _ADVICE, certain=True)


def _peaks(cells: list[_Level]) -> Doubt | None:
    peaks, before, expected = [], 0, 0.0
    for level, ties in cells:
        place = int(np.argmax(ties))
        peak, often = int(level[place]), int(ties[place])
        if peak > 1 and often >= _PEAK * ties.sum():
            # p(n+1) <= p(n) at the peak n, so n p(n) / p(n-1) <= (n + 1) p(n+1) / p(n) <= n + 1.
            expected += often * peak / (peak + 1)
            before += int(ties[place - 1]) if place and level[place - 1] == peak - 1 else 0
            peaks.append(peak)
    if len(peaks) < max(3, 0.25 * len(cells)) or expected < 50 or before > _GAP * expected:
        return None
    text = (
        f"in {len(peaks)} of {len(cells)} cells looked at the most common value is {min(peaks)} to {max(peaks)}, and "
        "next to none is one less: rounded logarithms or normalised values, not counts"
    )
    return Doubt(text, _ADVICE, certain=True)


def _one_total(values: np.ndarray, starts: np.ndarray, lengths: np.ndarray) -> Doubt | None:
    totals = np.add.reduceat(values, starts)
    middle, ones = float(np.median(totals)), float(np.mean(values == 1))
    if totals.size < 10 or ones > _RARE or np.unique(totals, return_counts=True)[1].max() > totals.size / 2:
        return None
    if middle >= _LARGE and np.mean(np.abs(totals - middle) <= _SAME * middle) >= 0.95:
        certain = True
    else:  # the noise of rounding alone, around a power of ten
        noise = 5 * np.sqrt(lengths / 12)
        power = 10.0 ** round(math.log10(middle))
        certain = False
        if power < 1e4 or ones > _RARE / 2 or np.mean(np.abs(totals - power) <= noise) < 0.95:
            return None
    text = (
        f"cells sum to about {middle:,.0f} and {100 * ones:.1f} % of the values are 1: rounded TPM or counts per "
        f"{middle:,.0f}, not counts"
    )
    return Doubt(text, _ADVICE, certain=certain)


def _logarithms(values: np.ndarray, n_cells: int, sample: sp.csr_matrix) -> Doubt | None:
    if values.max() > _LARGEST_LOG:
        return None
    genes, places = sample.shape[1], sample.indices[: sample.nnz]
    mean = np.bincount(places, weights=values, minlength=genes) / n_cells
    square = np.bincount(places, weights=values * values, minlength=genes) / n_cells
    high = mean >= 2
    if np.count_nonzero(high) < _GENES or np.count_nonzero(high) * (n_cells - 1) < _FREEDOM:
        return None
    spread = float((square - mean**2)[high].sum() / mean[high].sum()) * n_cells / (n_cells - 1)
    if spread >= _LESS:
        return None
    text = (
        f"no value is above {int(values.max())} and the variance of genes between cells is {spread:.2f} of their mean, "
        "where counting alone makes it 1: rounded logarithms, not counts"
    )
    return Doubt(text, _ADVICE, certain=True)
