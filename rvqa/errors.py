"""The one kind of error that is the user's to mend: wrong input or wrong use, said in one clear sentence."""

from collections.abc import Iterator
from contextlib import contextmanager


class InputError(ValueError):
    """Input that cannot be used: says what was seen, what was expected, and the next step.

    The command line prints the message without a traceback and ends with exit code 2.
    """


class InputWarning(UserWarning):
    """Input that can be used, though probably not as it was meant."""


@contextmanager
def about(name: object) -> Iterator[None]:
    """Begin the `InputError` of a block with the file it is about, unless it does."""
    try:
        yield
    except InputError as error:
        if str(error).startswith(str(name)):
            raise
        raise InputError(f"{name}: {error}") from error
