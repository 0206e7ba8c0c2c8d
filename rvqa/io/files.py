"""AnnData files in and out: read with a clear word on what is wrong, written whole or not at all."""

import errno
import os
import re
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast
from zlib import error as ZlibError

import h5py
import numpy as np
import pandas as pd
from anndata import AnnData
from anndata._io.specs.registry import IORegistryError
from anndata.io import write_elem
from isal.igzip_lib import IsalError

from rvqa.errors import InputError, InputWarning, nearest
from rvqa.io.checked_hdf5 import hdf5_file
from rvqa.io.outcomes import written
from rvqa.io.temporaries import folder_beside, follow_umask, remove_dead, set_aside

DIAGNOSED = 2**30
"""Bytes of an .h5ad file up to which it is read whole where that helps to say what is wrong with it."""

_REFUSED = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.ENOENT: "nothing can be made there",
    errno.EFBIG: "it would be larger than a file may be here",
    errno.EROFS: "the disk is read-only",
    errno.EACCES: "permission denied",
    errno.EPERM: "the system does not permit it",
    errno.ENAMETOOLONG: "the name is too long",
}
_ERRNO = re.compile(r"(?:errno = |os error )(\d+)")
HDF5_SUFFIXES = (".h5ad", ".h5mu", ".h5")
"""Names of HDF5 files that cells come in."""

# What anndata and h5py raise where a file is not what they expect; each was seen on damaged files.
UNREADABLE: tuple[type[Exception], ...] = (
    *(OSError, KeyError, ValueError, TypeError, RuntimeError, AttributeError, IndexError),
    *(EOFError, OverflowError, MemoryError, ZlibError, IORegistryError, cast(type[Exception], IsalError)),
)


def require_hdf5(path: str | Path) -> Path:
    """Reject what is not a readable HDF5 file with a name for cells: `.h5ad`, `.h5mu` or 10x's `.h5`.

    Raises
    ------
    InputError
        Says which.
    """
    file = Path(path)
    if os.path.isdir(file):
        raise InputError(
            f"{file} is a folder. Give the path of one .h5ad file, of a .zarr store, or of a folder with matrix.mtx, "
            "features.tsv and barcodes.tsv."
        )
    if not os.path.isfile(file):
        beside = sorted(file.parent.glob("*.h5ad")) if os.path.isdir(file.parent) else []
        offered = f" {nearest(file.name, [each.name for each in beside])}" if beside else ""
        raise InputError(f"{file} does not exist or is not a file. Give the path of an .h5ad file.{offered}")
    if file.suffix == ".gz":
        raise InputError(f"{file} is compressed as a whole. Unpack it first: gunzip -k {file.name}.")
    if file.suffix not in HDF5_SUFFIXES:
        raise InputError(f"{file} is not named .h5ad. Write one with adata.write_h5ad(path).")
    if not os.access(file, os.R_OK):
        raise InputError(f"{file} may not be read: permission denied. Ask its owner, or copy it.")
    if not file.stat().st_size:
        raise InputError(f"{file} is empty (0 bytes). Write, copy or download it again.")
    if not h5py.is_hdf5(file):
        raise InputError(
            f"{file} is not an {file.suffix} file: it holds no HDF5. Write one with adata.write_h5ad(path)."
        )
    return file


def require_anndata(file: Path, opened: Any) -> None:
    """Reject an HDF5 file or zarr store without `obs` and `var`."""
    if absent := [part for part in ("obs", "var") if part not in opened]:
        raise InputError(
            f"{file} is {'HDF5' if isinstance(opened, h5py.File) else 'zarr'}, but not of AnnData: it has no "
            f"{' and no '.join(absent)}. Open it with what wrote it and write it with adata.write_h5ad(path)."
        )


def warn_of_repeated(file: Path | str, names: pd.Index, *, stacklevel: int = 2) -> None:
    """Say, in an `InputWarning`, that cells of a file share a name."""
    if not names.is_unique:
        repeated = names[names.duplicated()]
        message = f"{file}: {len(repeated):,} cells repeat the name of another (e.g. {str(repeated[0])!r})"
        warnings.warn(f"{message}; every row is taken for a cell of its own.", InputWarning, stacklevel=stacklevel)


@contextmanager
def reading(file: Path) -> Iterator[None]:
    """Say in one sentence that a file is not what other libraries expect.

    Raises
    ------
    InputError
        See `damaged`; an `InputError` passes as it is.
    """
    try:
        yield
    except InputError:
        raise
    except UNREADABLE as error:
        raise damaged(file, error) from error


def damaged(file: Path, error: BaseException) -> InputError:
    """What to raise where another library cannot read a file."""
    if size := re.search(r"truncated file: eof = (\d+).*stored_eof = (\d+)", str(error)):
        there, whole = (f"{int(number):,}" for number in size.groups())
        return InputError(f"{file} is cut short: {there} of {whole} bytes. Copy or download it again.")
    if "unable to lock file" in str(error):
        return InputError(f"{file} is open for writing in another program. Close it there, then try again.")
    return InputError(f"{file} is damaged, or not of AnnData: {sentence(error)} Copy or write it again.")


def sentence(error: BaseException) -> str:
    """Return what another library says about an error as one short sentence, without its class names."""
    text = " ".join(re.sub(r"\b[A-Z]\w*(Error|Exception): ", "", str(error)).split()) or type(error).__name__
    return f"{text[:119].rstrip()}..." if len(text) > 120 else f"{text.rstrip('.')}."


def require_writable(path: str | Path, *, force: bool, suffix: str = ".h5ad", inputs: Sequence[Path] = ()) -> Path:
    """Reject an output that cannot or should not be written, before any work is done.

    Parameters
    ----------
    path
        File to write.
    force
        Replace one that exists.
    suffix
        How its name ends.
    inputs
        Files that are read: none of them is ever written over.

    Raises
    ------
    InputError
        The file exists and `force` is not set, it is an input or a folder, its folder is missing or may not be written
        in, or it has another suffix.
    """
    file = Path(path)
    if file.suffix != suffix:
        raise InputError(f"The output {file} is not named {suffix}. Choose such a name.")
    if os.path.isdir(file):
        raise InputError(f"The output {file} is a folder. Choose the name of a file.")
    for each in inputs:
        if os.path.exists(file) and os.path.exists(each) and os.path.samefile(file, each):
            raise InputError(f"The output {file} is the file to read. Choose another name for the output.")
    if os.path.exists(file) and not force:
        raise InputError(f"{file} exists. Choose another name, or pass --force to replace it.")
    require_folder(file.parent)
    return file


def require_folder(folder: Path) -> None:
    """Reject a folder that is not there or that nothing can be written in; remove what killed runs left in it."""
    if not os.path.isdir(folder):
        if os.path.exists(folder):
            raise InputError(f"{folder} is not a folder. Choose another place for the output.")
        raise InputError(f"The folder {folder} does not exist. Make it first.")
    with writing(folder), tempfile.TemporaryFile(dir=folder):
        remove_dead(folder)


@contextmanager
def writing(target: Path) -> Iterator[None]:
    """Say in one sentence why the system does not let `target` be written: permission, space, a name too long.

    Raises
    ------
    InputError
        Any other error passes as it is.
    """
    try:
        yield
    except InputError:
        raise
    except Exception as error:  # the tokenizers library raises nothing more special
        reason = _REFUSED.get(_system_code(error))
        if reason is None:
            raise
        raise InputError(
            f"{target} cannot be written: {reason}. Choose another place or name for the output."
        ) from error


def _system_code(error: BaseException) -> int:
    """Return the system's number of an error, also where libraries only have it in their text; else 0."""
    if isinstance(error, OSError) and error.errno:
        return error.errno
    found = _ERRNO.search(str(error))
    return int(found[1]) if found else 0


@contextmanager
def whole_file(file: Path, *, output: bool = True) -> Iterator[Path]:
    """Give a path to write a file to; it takes its place if the block ends well, with the mode that the umask gives.

    `output` is False for a file on the way to one.

    Raises
    ------
    InputError
        No permission, or no space.
    """
    with writing(file):
        place = Path(os.path.realpath(file))  # behind a link
        with folder_beside(place) as folder:
            yield folder / place.name
            follow_umask(folder)
            os.replace(folder / place.name, place)
            if output:
                written.append(file)


@contextmanager
def whole_directory(path: Path, *, output: bool = True) -> Iterator[Path]:
    """Give a name to write a directory under; it takes the place of `path`, whole, when the block is done.

    An earlier one is set aside, not deleted, until the new one stands in its place. `output` as for `whole_file`.

    Raises
    ------
    InputError
        No permission, or no space.
    """
    with writing(path):
        place = Path(os.path.realpath(path))
        with folder_beside(place) as folder:
            yield folder / place.name
            follow_umask(folder)
            if place.exists():
                set_aside(place, folder)
            os.replace(folder / place.name, place)
            if output:
                written.append(path)


def write_h5ad(adata: AnnData, path: str | Path, *, force: bool) -> None:
    """Write an `.h5ad` file, whole or not at all.

    Raises
    ------
    InputError
        As for `require_writable`; no permission, or no space.
    """
    with whole_file(require_writable(path, force=force)) as scratch:
        write_anndata(adata, scratch)


def write_anndata(adata: AnnData, path: Path) -> None:
    """Write an AnnData as `adata.write_h5ad(path, compression="gzip")` does, but for a full disk."""
    adata.strings_to_categoricals()
    if adata.raw is not None:
        adata.strings_to_categoricals(adata.raw.var)
    with hdf5_file(path, "w") as file:
        write_elem(file, "/", adata, dataset_kwargs={"compression": "gzip"})


def save_array(path: Path, array: np.ndarray) -> None:
    """Write an array as `np.save` does, which does not tell a full disk from other errors."""
    with open(path, "wb") as file:
        np.lib.format.write_array_header_1_0(file, np.lib.format.header_data_from_array_1_0(array))
        file.write(np.ascontiguousarray(array).data)
