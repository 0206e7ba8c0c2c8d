"""Which files were given."""

import glob
import os
from collections.abc import Sequence
from pathlib import Path

from anndata import AnnData

from rvqa.data.reading import Given
from rvqa.errors import InputError


def expand(given: Given | Sequence[Given]) -> list[Given]:
    """Files of a path, a pattern with `*`, or a list of these; an AnnData stays as it is.

    Raises
    ------
    rvqa.errors.InputError
        A pattern that no file matches, or the same file twice.
    """
    files: list[Given] = []
    for each in given if isinstance(given, list | tuple) else [given]:
        if isinstance(each, AnnData):
            files.append(each)
            continue
        text = str(each)
        found = sorted(glob.glob(text)) if glob.has_magic(text) and not Path(text).exists() else [text]
        if not found:
            raise InputError(f"No file matches {text!r}. Check the pattern.")
        files += [Path(name) for name in found]
    paths = [os.path.realpath(path) for path in files if isinstance(path, Path)]
    if repeated := [path for at, path in enumerate(paths) if path in paths[:at]]:
        raise InputError(f"{repeated[0]} is given twice. Give each file once.")
    if not files:
        raise InputError("No file was given. Give one or more .h5ad files or .zarr stores.")
    return files
