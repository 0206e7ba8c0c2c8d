"""AnnData files in and out: read with a clear word on what is wrong, written whole or not at all."""

import os
import tempfile
from pathlib import Path

import anndata as ad
from anndata import AnnData

from rvqa.errors import InputError


def read_h5ad(path: str | Path) -> AnnData:
    """Read an `.h5ad` file into memory.

    Raises
    ------
    InputError
        No such file, another suffix, or a file that anndata cannot read.
    """
    file = Path(path)
    if not file.is_file():
        raise InputError(f"{file} does not exist or is not a file. Give the path of an .h5ad file.")
    if file.suffix != ".h5ad":
        raise InputError(f"{file} is not named .h5ad. Write one with adata.write_h5ad(path).")
    try:
        return ad.read_h5ad(file)
    except (OSError, KeyError, ValueError, TypeError) as error:
        raise InputError(f"{file} cannot be read as .h5ad: {error}") from error


def require_writable(path: str | Path, *, force: bool, suffix: str = ".h5ad") -> Path:
    """Refuse an output that exists or has no folder, before any work is done.

    Raises
    ------
    InputError
        The file exists and `force` is not set, its folder is missing, or it has another suffix.
    """
    file = Path(path)
    if file.suffix != suffix:
        raise InputError(f"The output {file} is not named {suffix}. Choose such a name.")
    if file.exists() and not force:
        raise InputError(f"{file} exists. Choose another name, or pass --force to replace it.")
    if not file.parent.is_dir():
        raise InputError(f"The folder {file.parent} does not exist. Make it first.")
    return file


def write_h5ad(adata: AnnData, path: str | Path, *, force: bool) -> None:
    """Write an `.h5ad` file under a temporary name beside it, then rename: no reader ever sees half a file."""
    file = require_writable(path, force=force)
    handle, scratch = tempfile.mkstemp(prefix=f".{file.stem}-", suffix=file.suffix, dir=file.parent)
    os.close(handle)
    try:
        adata.write_h5ad(scratch, compression="gzip")
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(scratch, 0o666 & ~mask)  # mkstemp made it private
        os.replace(scratch, file)
    finally:
        Path(scratch).unlink(missing_ok=True)
