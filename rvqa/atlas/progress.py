"""How far a run is: a bar on a terminal, or one JSON object a line."""

import json
import sys
import time
from types import TracebackType
from typing import TextIO

from tqdm import tqdm


class Progress:
    """A progress bar: call it as `progress(done, total)`, in cells.

    Parameters
    ----------
    show
        A bar on standard error, where that is a terminal.
    lines
        Write a JSON object a line instead, at most one a second: `cells`, `of`, `cells_per_second`, `seconds_left`.
    """

    def __init__(self, *, show: bool, lines: TextIO | None = None) -> None:
        self.show, self.lines = show, lines
        self.bar: tqdm | None = None
        self._began: tuple[float, int] | None = None
        self._said = 0.0

    def __enter__(self) -> "Progress":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.bar is not None:
            self.bar.close()

    def __call__(self, done: int, cells: int) -> None:
        """Say it."""
        now = time.monotonic()
        if self._began is None:
            self._began = now, done
            if self.show and self.lines is None:
                self.bar = tqdm(total=cells, initial=done, desc="encode", unit="cell", unit_scale=True, disable=None)
        elif self.bar is not None:
            self.bar.update(done - self.bar.n)
        if self.lines is not None and (now - self._said >= 1.0 or done == cells):
            self._said = now
            began, before = self._began
            rate = (done - before) / max(now - began, 1e-9)
            left = (cells - done) / rate if rate > 0 else None
            told = {"cells": done, "of": cells, "cells_per_second": round(rate, 1), "seconds_left": left}
            print(json.dumps(told), file=self.lines or sys.stderr, flush=True)
