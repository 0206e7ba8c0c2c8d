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
from typing import TYPE_CHECKING, Any, Protocol

from tqdm import tqdm

from rvqa.errors import EngineError, InputError
from rvqa.files import writing
from rvqa.grammar import Rule

if TYPE_CHECKING:
    from rvqa.model import Model

Ids = tuple[int, ...]

BLOCK = 1 << 15
"""Asks that callers hold in memory at once."""


@dataclass(frozen=True, slots=True)
class Ask:
    """A prompt and what is wanted after it; the default wants nothing."""

    prompt: Ids
    answers: tuple[Ids, ...] = ()
    """Where there are any, the log probability of each is wanted; what follows is not read."""
    rule: Rule = field(default_factory=lambda: Rule("text"))
    max_tokens: int = 1
    temperature: float = 0.0
    seed: int = 0

    def prompts(self) -> list[list[int]]:
        """Prompts that vLLM gets: with answers, one for each, which it ends."""
        return [[*self.prompt, *answer] for answer in self.answers or ((),)]

    def sampling(self) -> tuple[dict[str, Any], Rule]:
        """Sampling parameters that vLLM gets with each prompt, and the rule that its options name."""
        if self.answers:  # what is written after the answer does not matter
            return {"max_tokens": 1, "temperature": 0.0, "prompt_logprobs": 0}, Rule("text")
        drawn = {"seed": self.seed} if self.temperature else {}
        return {"max_tokens": self.max_tokens, "temperature": self.temperature, **drawn}, self.rule


@dataclass(frozen=True, slots=True)
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


def require_temperature(asks: Iterable[Ask]) -> None:
    """Refuse temperatures that vLLM does not take."""
    hottest = max((ask.temperature for ask in asks), default=0.0)
    if hottest > 2:
        raise InputError(f'The temperature is {hottest}; vLLM takes 0 to 2. Use engine="hf", or a lower one.')


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
    resume: str | Path | None = None,
    bar: tqdm[Any] | None = None,
) -> list[Reply]:
    """Answer all asks in their order. Callers with more than `BLOCK` come again, for memory.

    Parameters
    ----------
    model
        The model asked.
    engine
        From `open_engine`.
    asks
        What is wanted.
    resume
        File that keeps replies as they come; made where it is missing.
    bar
        Progress of the caller, in replies.

    Raises
    ------
    InputError
        `resume` is no such file, or is of another model.
    rvqa.errors.EngineError
        The engine stopped; says how many replies there are and how to go on.
    """
    replies: list[Reply | None] = [None] * len(asks)
    bar = tqdm(total=len(asks), disable=True) if bar is None else bar
    with nullcontext() if resume is None else closing(Kept(Path(resume), model)) as store:
        if store is not None:
            for i, reply in store.find(asks):
                replies[i] = reply
        left = [i for i, reply in enumerate(replies) if reply is None]
        done = len(asks) - len(left)
        bar.update(done)
        try:
            for place, reply in engine.replies([asks[i] for i in left]) if left else ():
                replies[left[place]] = reply
                if store is not None:
                    store.keep(asks[left[place]], reply)
                done += 1
                bar.update()
        except EngineError as error:
            how = (
                f"they are kept in {resume}: the same call goes on from there"
                if resume is not None
                else "pass resume=FILE to keep them next time"
            )
            raise EngineError(f"{error} {done:,} of {len(asks):,} replies had come; {how}.") from error
    return [reply for reply in replies if reply is not None]


class Kept:
    """Replies in a file (SQLite), each in it when it has come: they outlive this process, but not a power cut."""

    def __init__(self, path: Path, model: Model) -> None:
        self.path, identity = path, model.identity
        with writing(path):
            if path.is_dir():
                raise InputError(f"{path} is a directory; give a file for the replies.")
            try:
                self.file = sqlite3.connect(path, isolation_level=None)
                self.file.execute("PRAGMA synchronous = OFF")  # or each reply waits for the disk
                self.file.execute("CREATE TABLE IF NOT EXISTS about (model TEXT)")
                self.file.execute("CREATE TABLE IF NOT EXISTS replies (ask BLOB PRIMARY KEY, reply TEXT) WITHOUT ROWID")
                known = self.file.execute("SELECT model FROM about").fetchone()
                if known is None:
                    self.file.execute("INSERT INTO about VALUES (?)", (identity,))
            except sqlite3.DatabaseError as error:
                raise InputError(f"{path} keeps no replies of rvqa ({error}); give another file.") from error
        if known is not None and known[0] != identity:
            self.close()
            raise InputError(f"{path} keeps replies of another model; give another file, or delete it.")

    def close(self) -> None:
        """Close the file."""
        self.file.close()

    def find(self, asks: Iterable[Ask]) -> Iterator[tuple[int, Reply]]:
        """Replies that are there, by the place of their ask."""
        for i, ask in enumerate(asks):
            row = self._run("SELECT reply FROM replies WHERE ask = ?", _key(ask)).fetchone()
            if row is not None:
                yield i, Reply(**json.loads(row[0]))

    def keep(self, ask: Ask, reply: Reply) -> None:
        """Write one reply."""
        told = json.dumps({"ids": reply.ids, "scores": reply.scores})
        self._run("INSERT OR REPLACE INTO replies VALUES (?, ?)", _key(ask), told)

    def _run(self, statement: str, *values: bytes | str) -> sqlite3.Cursor:
        try:
            return self.file.execute(statement, values)
        except sqlite3.Error as error:
            raise InputError(f"{self.path} can keep no more replies ({error}); those in it stay.") from error


def _key(ask: Ask) -> bytes:
    told = (ask.prompt, ask.rule, ask.max_tokens, ask.temperature, ask.seed)
    return hashlib.sha256(repr(told).encode() + _digest(ask.answers)).digest()


@lru_cache(maxsize=16)
def _digest(answers: tuple[Ids, ...]) -> bytes:
    return hashlib.sha256(repr(answers).encode()).digest()
