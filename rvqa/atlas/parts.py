"""The folder of a run's finished parts, beside its output: what a stopped run goes on from.

Only what a run put there is ever removed, and only from a folder that says that it is one of parts.
"""

import fcntl
import json
import os
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from rvqa.atlas import rvq
from rvqa.errors import InputError
from rvqa.io.files import whole_file, writing
from rvqa.io.json_text import differences, object_in
from rvqa.io.outcomes import resumable
from rvqa.io.temporaries import is_temporary, remove_dead
from rvqa.tokenizer.model import CellTokenizerConfig


@dataclass(frozen=True)
class Task:
    """Some cells of one source."""

    number: int
    source: int
    start: int
    stop: int


_FILES = re.compile(
    r"lock|(inputs|manifest)\.json|part-\d{8}\.rvq|rows-[^/]+/(indptr\.npy|indices|data|part-\d+)"
    r"|tokenizer/(config\.json|model\.safetensors|genes\.parquet)"
)
_FOLDERS = re.compile(r"rows-[^/]+|tokenizer")
"""All that a run puts into the folder of its parts."""

_MARK = b"parts of a run of rvqa\n"


class Work:
    """The folder of a run's finished parts; one run at a time.

    Parameters
    ----------
    folder
        Made if it is not there.

    Raises
    ------
    rvqa.errors.InputError
        Another run is at it, or it is not a folder of parts: nothing in it is touched then.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        _require_ours(folder)
        with writing(folder):
            while True:
                folder.mkdir(exist_ok=True)
                self._lock = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
                try:
                    fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError as error:
                    os.close(self._lock)
                    raise InputError(
                        f"Another run is writing into {folder}. Wait for it, or choose another output."
                    ) from error
                if _is_open_as(self._lock, folder / "lock"):
                    break
                os.close(self._lock)  # of a run that has just ended
            os.pwrite(self._lock, _MARK, 0)
        for place in (folder, *folder.glob("rows-*")):
            remove_dead(place)

    def begin(self, inputs: Sequence[dict[str, Any]]) -> None:
        """Make sure, before any input is opened, that what a stopped run turned into rows is of the same inputs.

        Raises
        ------
        rvqa.errors.InputError
            As for `bind`.
        """
        self._agree("inputs.json", {"inputs": inputs})

    def bind(self, manifest: dict[str, Any]) -> None:
        """Go on with the parts of the same run, or begin.

        Raises
        ------
        rvqa.errors.InputError
            The folder is of another run.
        """
        self._agree("manifest.json", manifest)

    def _agree(self, name: str, manifest: dict[str, Any]) -> None:
        told = self.folder / name
        if not told.is_file():
            with whole_file(told, output=False) as scratch:
                scratch.write_text(json.dumps(manifest, sort_keys=True, indent=1), encoding="utf-8")
            return
        there = object_in(told, f"Remove {self.folder} to begin anew.")
        if differing := differences(there, manifest):
            raise InputError(
                f"{self.folder} has parts of another run: {differing[0]}. Give the same model, files and settings to "
                "go on with it, or remove that folder to begin anew."
            )

    def part(self, task: Task) -> Path:
        """File of the codes of a task."""
        return self.folder / f"part-{task.number:08d}.rvq"

    def missing(self, tasks: Sequence[Task], config: CellTokenizerConfig) -> list[Task]:
        """Tasks without a part; one that is damaged, or of other sizes, is made again."""
        left = []
        for task in tasks:
            try:
                part = rvq.RvqFile.open(self.part(task))
                part.verify()
                made = part.n_cells, part.levels, part.entries
                if made != (task.stop - task.start, config.levels, config.entries) or part.table() is None:
                    left.append(task)
            except InputError:
                left.append(task)
        return left

    def keep(self, task: Task, codes_NM: np.ndarray, table: pa.Table, *, entries: int) -> None:
        """Write a part, whole or not at all."""
        cells, levels = codes_NM.shape
        with whole_file(self.part(task), output=False) as scratch:
            rvq.write(scratch, [codes_NM], [table], {"task": asdict(task)}, cells=cells, levels=levels, entries=entries)

    def close(self, *, finished: bool) -> None:
        """Let go of the folder; for good where the run has ended or there is nothing worth going on from."""
        if finished or not (any(self.folder.glob("part-*.rvq")) or any(self.folder.glob("rows-*/indptr.npy"))):
            found = [path for path in sorted(self.folder.rglob("*"), reverse=True) if _is_ours(path, self.folder)]
            with writing(self.folder):
                for path in found:
                    path.rmdir() if path.is_dir() else path.unlink()
                os.close(self._lock)
                if not any(self.folder.iterdir()):
                    self.folder.rmdir()
        else:
            resumable.append(self.folder)
            os.close(self._lock)


def _require_ours(folder: Path) -> None:
    """Reject a folder, a file or a link that no run has made, or that holds what none has put there."""
    if not os.path.lexists(folder):
        return
    if folder.is_symlink() or not folder.is_dir():
        raise InputError(
            f"{folder} is a {'link' if folder.is_symlink() else 'file'}; a run keeps its parts in a folder of that "
            "name. Move it away, or choose another output."
        )
    inside = sorted(folder.rglob("*"))
    foreign = [path for path in inside if os.path.lexists(path) and not _is_ours(path, folder)]
    lock = folder / "lock"
    if inside and not foreign and not (inside == [lock] and not lock.stat().st_size) and not _is_marked(folder):
        foreign = inside
    if foreign:
        raise InputError(
            f"{folder} holds {foreign[0].relative_to(folder)}, which no run of rvqa has put there. Move it away, or "
            "choose another output."
        )


def _is_ours(path: Path, folder: Path) -> bool:
    """Whether something in a folder of parts is of a run."""
    within = path.relative_to(folder)
    if any(is_temporary(folder / above) for above in (within, *within.parents)):
        return True
    named = _FOLDERS if path.is_dir() else _FILES
    return bool(named.fullmatch(within.as_posix())) and not path.is_symlink()


def _is_marked(folder: Path) -> bool:
    """Whether a folder says that it is one of parts, or has the manifest of a run, as those before had."""
    if (folder / "lock").is_file() and (folder / "lock").read_bytes()[: len(_MARK)] == _MARK:
        return True
    return (folder / "manifest.json").is_file() and b'"settings"' in (folder / "manifest.json").read_bytes()


def _is_open_as(file: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file), os.stat(path))
    except FileNotFoundError:
        return False
