"""The one kind of error that is the user's to mend: wrong input or wrong use, said in one clear sentence."""


class InputError(ValueError):
    """Input that cannot be used: says what was seen, what was expected, and the next step.

    The command line prints the message without a traceback and ends with exit code 2.
    """
