"""What the command line prints, and how it stops."""

import errno
import json
import math
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import FrameType
from typing import Any, TextIO

from rvqa.errors import InputError, printable
from rvqa.io.outcomes import resumable, written


def show(text: object, *, file: TextIO | None = None) -> None:
    """Print text that may hold names out of files: as text, whatever is in it."""
    print(printable(text), file=file)


def show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    """Print our own warnings as a sentence, others with their kind."""
    kind = "" if category.__module__.startswith("rvqa") else f" ({category.__name__})"
    show(f"rvqa: warning{kind}: {message}", file=sys.stderr)


def show_json(value: Any) -> None:
    """Print one JSON object; what is not a number becomes null, since JSON has no NaN."""

    def plain(part: Any) -> Any:
        if isinstance(part, dict):
            return {name: plain(each) for name, each in part.items()}
        if isinstance(part, list | tuple):
            return [plain(each) for each in part]
        return None if isinstance(part, float) and not math.isfinite(part) else part

    show(json.dumps(plain(value), allow_nan=False))


def show_coverage(report: Mapping[str, Any], name: str = "") -> None:
    """Print one line on how the genes of a file met those of the model, and where its counts were if not in X."""
    from rvqa.data.alignment import coverage_sentence

    show(f"{name or 'genes'}: {coverage_sentence(report)}")
    if report.get("counts_from", "X") != "X":
        show(f"{f'{name} ' if name else ''}counts: from {report['counts_from']}")


def show_places(name: str, file: Mapping[str, Any]) -> None:
    """Print where the counts of a file were, if not in X, and what was left out of it."""
    from rvqa.data.features import left_out_sentence

    said = [f"counts from {file['counts_from']}"] * (file["counts_from"] != "X")
    said += [left_out_sentence(file["left_out"])] * bool(file["left_out"])
    if said:
        show(f"{name}: {'; '.join(said)}")


class Stopped(BaseException):
    """Ctrl-C, or a request to end; not the interrupt that click answers itself."""


def stop(signal_number: int, frame: FrameType | None) -> None:
    """Handle a signal that asks to end."""
    raise Stopped


def what_stands() -> str:
    """Say which outputs stand complete and what can go on."""
    outputs, folders = ", ".join(map(str, written)), ", ".join(map(str, resumable))
    said = [f"{outputs} was complete by then."] if outputs else [] if folders else ["nothing was written."]
    return " ".join([*said, *([f"the same command goes on from {folders}."] if folders else [])])


@contextmanager
def standard_output() -> Iterator[None]:
    """Say in one sentence that what is printed is sent to a disk that is full."""
    try:
        try:
            yield
        finally:
            sys.stdout.flush()
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python tries once more at its end
        raise InputError(
            "What is printed cannot be written: the disk is full. Send standard output to another place."
        ) from error
