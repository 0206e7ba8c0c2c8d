"""Errors that are the user's to mend, said in one clear sentence: wrong input or wrong use, a server that is gone."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


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
