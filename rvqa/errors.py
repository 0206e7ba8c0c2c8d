"""Errors that the user can fix, said in one sentence: wrong input or use, a server that is gone; and their words."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path
from typing import Any


class InputError(ValueError):
    """Input that cannot be used: says what was seen, what was expected, and the next step.

    The command line prints the message without a traceback and ends with exit code 2.
    """


class EngineError(RuntimeError):
    """A program that runs the language model stopped answering: says which, what came before, and the next step.

    The command line prints the message without a traceback and ends with exit code 3.
    """

    status: int | None = None
    """What a server answered, where it did."""


class InputWarning(UserWarning):
    """Input that can be used, though probably not as it was meant."""


@contextmanager
def about(name: object) -> Iterator[None]:
    """Begin the `InputError` of a block with the file it is about, unless it does."""
    try:
        yield
    except InputError as error:
        text, file = str(error), Path(str(name)).name
        if text.startswith(str(name)) or Path(text.partition(": ")[0]).name == str(name):
            raise
        raise InputError(f"{name}: {text.removeprefix(f'{file}: ')}") from error


def printable(text: object) -> str:
    """Text with its control characters written out: a terminal acts on those that a file's names may hold."""
    return "".join(each if each.isprintable() or each == "\n" else repr(each)[1:-1] for each in str(text))


def nearest(name: str, known: Iterable[str]) -> str:
    """Sentence that offers what is known, the names most like the given one first."""
    names = list(dict.fromkeys(str(each) for each in known))
    if not names:
        return "There are none."
    close = get_close_matches(str(name), names, n=3, cutoff=0.5)
    shown = close or sorted(names)[:10]
    more = f" and {len(names) - len(shown)} more" if len(names) > len(shown) else ""
    return f"{'Nearest' if close else 'Known'}: {', '.join(repr(each) for each in shown)}{more}."


def require_known(kind: str, names: Iterable[str], known: Iterable[str]) -> None:
    """Reject names that are not known, offering the nearest.

    Raises
    ------
    InputError
        Names the first unknown one.
    """
    known = list(known)
    for name in sorted(set(names) - set(known), key=str):
        raise InputError(f"{name!r} is not a {kind}. {nearest(name, known)}")


def quoted(names: Iterable[Any]) -> str:
    """List of names in quotes, at most 20."""
    each = [repr(str(name)) for name in names]
    return ", ".join(each[:20]) + ", ..." * (len(each) > 20)
