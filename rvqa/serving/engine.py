"""What rvqa asks of a language model, whichever program runs it: here, vLLM in this process, or a server.

An `Ask` is a prompt and what is wanted after it: the log probabilities of given answers, or an output under a rule of
`rvqa.grammar`. An engine answers many at once, in any order. With `resume`, replies are kept in a file as they come,
and the same asks made again are answered from it.
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing, nullcontext
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from tqdm import tqdm

from rvqa.errors import EngineError, InputError
from rvqa.files import writing
from rvqa.grammar import Rule

if TYPE_CHECKING:
    from rvqa.model import Model

Ids = tuple[int, ...]


@dataclass(frozen=True)
class Ask:
    """A prompt and what is wanted after it; the default wants nothing."""

    prompt: Ids
    answers: tuple[Ids, ...] = ()
    """Where there are any, the log probability of each is wanted; what follows is not read."""
    rule: Rule = field(default_factory=lambda: Rule("text"))
    max_tokens: int = 1
    temperature: float = 0.0
    seed: int = 0


@dataclass(frozen=True)
class Reply:
    """The ids of an output, the end token included where it was written; or the log probabilities in nats."""

    ids: list[int] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)


class Engine(Protocol):
    """A program that runs the language model."""

    def replies(self, asks: Sequence[Ask]) -> Iterator[tuple[int, Reply]]:
        """Answer all asks, each named by its place, in any order.

        Raises
        ------
        rvqa.errors.EngineError
            The program stopped answering.
        """
        ...


def open_engine(model: Model, engine: str | Engine) -> Engine:
    """Return the engine of a name: "hf", "vllm", or the address of a server, "http://..."; an engine as it is.

    Raises
    ------
    InputError
        Another name, no vLLM, or a server that is not there or serves another model.
    """
    if not isinstance(engine, str):
        return engine
    if engine == "hf":
        from rvqa.serving.hf import HuggingFace

        return HuggingFace(model)
    if engine == "vllm":
        from rvqa.serving.offline import Offline

        return Offline(model)
    if engine.startswith(("http://", "https://")):
        from rvqa.serving.client import Client

        return Client(model, engine)
    raise InputError(
        f"There is no engine {engine!r}; expected hf, vllm, or a server's address, such as http://host:8000."
    )


def gather(
    model: Model,
    engine: Engine,
    asks: Sequence[Ask],
    *,
    title: str,
    resume: str | Path | None = None,
    progress: bool = False,
) -> list[Reply]:
    """Answer all asks in their order.

    Parameters
    ----------
    model
        The model asked.
    engine
        From `open_engine`.
    asks
        What is wanted.
    title
        Of the progress bar.
    resume
        File that keeps replies as they come; made where it is missing.
    progress
        Show a progress bar.

    Raises
    ------
    InputError
        `resume` is no such file, or is of another model.
    rvqa.errors.EngineError
        The engine stopped; says how many replies there are and how to go on.
    """
    replies: list[Reply | None] = [None] * len(asks)
    kept = nullcontext() if resume is None else closing(Kept(Path(resume), model))
    with kept as store, tqdm(total=len(asks), desc=title, unit="cell", disable=None if progress else True) as bar:
        if store is not None:
            for i, reply in store.find(asks):
                replies[i] = reply
        left = [i for i, reply in enumerate(replies) if reply is None]
        bar.update(len(asks) - len(left))
        try:
            for place, reply in engine.replies([asks[i] for i in left]) if left else ():
                replies[left[place]] = reply
                if store is not None:
                    store.keep(asks[left[place]], reply)
                bar.update()
        except EngineError as error:
            done = sum(reply is not None for reply in replies)
            how = (
                f"they are kept in {resume}: the same call goes on from there"
                if resume is not None
                else "pass resume=FILE (--resume) to keep them next time"
            )
            raise EngineError(f"{error} {done:,} of {len(asks):,} replies had come; {how}.") from error
    return [reply for reply in replies if reply is not None]


class Kept:
    """Replies in a file (SQLite): each is on disk before the next is asked for, whatever happens to this process."""

    def __init__(self, path: Path, model: Model) -> None:
        with writing(path):
            if path.is_dir():
                raise InputError(f"{path} is a directory; give a file for the replies.")
            try:
                self.file = sqlite3.connect(path, isolation_level=None)
                self.file.execute("PRAGMA synchronous = NORMAL")
                self.file.execute("CREATE TABLE IF NOT EXISTS about (model TEXT)")
                self.file.execute("CREATE TABLE IF NOT EXISTS replies (ask BLOB PRIMARY KEY, reply TEXT) WITHOUT ROWID")
                known = self.file.execute("SELECT model FROM about").fetchone()
                if known is None:
                    self.file.execute("INSERT INTO about VALUES (?)", (model.identity,))
            except sqlite3.DatabaseError as error:
                raise InputError(f"{path} keeps no replies of rvqa ({error}); give another file.") from error
        if known is not None and known[0] != model.identity:
            self.close()
            raise InputError(f"{path} keeps replies of another model; give another file, or delete it.")

    def close(self) -> None:
        """Close the file."""
        self.file.close()

    def find(self, asks: Iterable[Ask]) -> Iterator[tuple[int, Reply]]:
        """Replies that are there, by the place of their ask."""
        for i, ask in enumerate(asks):
            row = self.file.execute("SELECT reply FROM replies WHERE ask = ?", (_key(ask),)).fetchone()
            if row is not None:
                yield i, Reply(**json.loads(row[0]))

    def keep(self, ask: Ask, reply: Reply) -> None:
        """Write one reply."""
        row = (_key(ask), json.dumps({"ids": reply.ids, "scores": reply.scores}))
        self.file.execute("INSERT OR REPLACE INTO replies VALUES (?, ?)", row)


def _key(ask: Ask) -> bytes:
    told = (ask.prompt, ask.rule, ask.max_tokens, ask.temperature, ask.seed)
    return hashlib.sha256(repr(told).encode() + _digest(ask.answers)).digest()


@lru_cache(maxsize=16)
def _digest(answers: tuple[Ids, ...]) -> bytes:
    return hashlib.sha256(repr(answers).encode()).digest()
