"""Folders for what is being written, beside the place where it will stand; those of killed processes are removed.

Such a folder is `.NAME-rvqa-XXXXXXXX`. It holds a file `lock`, which the process that made it keeps locked for as long
as it lives; what is written, in `new`; and the output that is about to be replaced, in `earlier`. So whoever writes
into the same place next can tell what a killed process left there from what another is writing now.
"""

import errno
import fcntl
import os
import re
import secrets
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

_OURS = re.compile(r"\..*-rvqa-[0-9a-f]{8}", re.DOTALL)
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
"""What file systems without locks answer; nothing is cleaned there."""


@contextmanager
def folder_beside(path: Path) -> Iterator[Path]:
    """Give an empty folder where `path` will stand, making the folders above it; gone again when the block is done."""
    above = [folder for folder in path.absolute().parents if not folder.exists()]
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_dead(path.parent)
    try:
        with _temporary(path.parent, path.name) as folder:
            yield folder
    finally:
        for each in above:
            if not any(each.iterdir()):
                each.rmdir()


@contextmanager
def scratch_folder() -> Iterator[Path]:
    """Give an empty folder where the system keeps temporary files."""
    with folder_beside(Path(tempfile.gettempdir()) / "scratch") as folder:
        yield folder


def remove_dead(folder: Path) -> None:
    """Remove what killed processes left in a folder; what a live one is writing stays, and so does all else.

    An output that was set aside when a process was killed is put back.
    """
    for name in _temporaries(folder):
        left = folder / name
        with ExitStack() as held, suppress(OSError):  # another user's, a live process's, or gone by now
            held.callback(os.close, _hold(left))
            for earlier in (left / "earlier").glob("*"):
                if not os.path.lexists(folder / earlier.name):
                    earlier.replace(folder / earlier.name)
            shutil.rmtree(left)


def set_aside(path: Path, folder: Path) -> None:
    """Move an output out of the way of the one in a folder of `folder_beside`."""
    earlier = folder.parent / "earlier"
    earlier.mkdir()
    path.replace(earlier / path.name)


def follow_umask(folder: Path) -> None:
    """Give all that is in a folder of `folder_beside` the mode that the umask gives.

    Some libraries make files for their owner alone, and what is copied comes with the mode it had.
    """
    modes = [stat.S_IMODE(os.stat(path).st_mode) for path in (folder, folder.parent / "lock")]
    for place, folders, files in os.walk(folder):
        for mode, names in zip(modes, (folders, files), strict=True):
            for name in names:
                path = os.path.join(place, name)
                if stat.S_IMODE(os.stat(path).st_mode) != mode:
                    os.chmod(path, mode)


def is_temporary(path: Path) -> bool:
    """Whether a path is a folder that this module made."""
    return bool(_OURS.fullmatch(path.name)) and not path.is_symlink() and path.is_dir()


def _temporaries(folder: Path) -> list[str]:
    with suppress(PermissionError), os.scandir(folder) as entries:
        return [each.name for each in entries if _OURS.fullmatch(each.name) and each.is_dir(follow_symlinks=False)]
    return []


@contextmanager
def _temporary(parent: Path, name: str) -> Iterator[Path]:
    while True:
        whole = parent / f".{name[:40]}-rvqa-{secrets.token_hex(4)}"
        whole.mkdir(mode=0o700)
        try:
            lock = _hold(whole)
        except (BlockingIOError, FileNotFoundError):
            continue  # another process took it for what a dead one left
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                shutil.rmtree(whole)
                raise
            lock = os.open(whole / "lock", os.O_RDWR)
        break
    try:
        (whole / "new").mkdir()
        yield whole / "new"
    finally:
        os.close(lock)  # some network file systems keep a file that is open
        shutil.rmtree(whole, ignore_errors=True)  # what cannot be removed now is removed at the next start


def _hold(folder: Path) -> int:
    """Lock a temporary folder; raises `OSError` where another process has it, or removed it."""
    lock = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not os.path.samestat(os.fstat(lock), os.stat(folder / "lock")):
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(folder))
    except BaseException:
        os.close(lock)
        raise
    return lock
