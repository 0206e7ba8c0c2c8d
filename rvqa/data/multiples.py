"""Whether rows sum to one total, or are whole numbers times a factor."""

from __future__ import annotations

import numpy as np


def common_total(rows: list[np.ndarray]) -> float | None:
    """Return the sum that rows of values share, None where they differ; for naming what a matrix looks like."""
    totals = np.array([row.sum() for row in rows])
    middle = float(np.median(totals)) if totals.size > 1 else 0.0
    # Within 0.5 %: float32, or values rounded to three decimals. Depths of real cells differ by far more.
    return middle if middle and np.ptp(totals) <= 5e-3 * middle else None


def whole_multiples(rows: list[np.ndarray]) -> bool:
    """Say if most rows look like whole numbers times the value of a single count, as counts over a depth do."""
    verdicts = []
    for row in rows:
        ratio = row / max(row.min(), 1e-30 * row.max())  # nothing overflows
        ratio = ratio[ratio > 1.5]
        if ratio.size >= 5:
            verdicts.append(np.mean(np.abs(ratio - np.rint(ratio)) <= 0.01) >= 0.95)
    return bool(verdicts) and float(np.mean(verdicts)) > 0.5
