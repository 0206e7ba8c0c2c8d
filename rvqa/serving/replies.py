"""Replies to asks: each is checked against its ask, whichever engine it comes from.

With `resume`, those that pass are kept in a file, and the same asks made again are answered from it.
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing, nullcontext
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from rvqa.errors import EngineError, InputError
from rvqa.io.files import writing
from rvqa.io.json_text import shown
from rvqa.io.tensors import read_json
from rvqa.language.grammar import is_valid_output
from rvqa.language.prompts import words_ids
from rvqa.serving.asks import Ask, Engine, Ids, Reply, is_log_probability

if TYPE_CHECKING:
    from rvqa.language.model import Model


_MOST_BYTES = 1 << 24
"""Longest value that is read from a file of replies."""

_TABLES = {
    b"about": b"CREATE TABLE about (model TEXT)",
    b"replies": b"CREATE TABLE replies (ask BLOB PRIMARY KEY, reply TEXT) WITHOUT ROWID",
}
"""What a file of replies holds, as SQLite tells it."""

_ADVICE = {
    "SQLITE_FULL": "Make room, or give a file on another disk.",
    "SQLITE_BUSY": "Another run writes to it: wait for its end, or give another file.",
    "SQLITE_READONLY": "Give a file that may be written.",
    "SQLITE_CANTOPEN": "Give a file in a folder that exists and may be written in.",
}


class Checker:
    """Says what is wrong with the replies of a model's engine."""

    def __init__(self, model: Model) -> None:
        self.model, self.end, self.n_ids = model, model.prompts.end, _n_ids(model)

    def fault(self, ask: Ask, reply: Reply) -> str:
        """What is wrong with a reply, to follow "The engine"; "" where nothing is."""
        if ask.answers:
            if len(reply.scores) != len(ask.answers):
                return f"gave {len(reply.scores):,} log probabilities for {len(ask.answers):,} answers"
            for score in reply.scores:
                if not is_log_probability(score):
                    return f"gave the log probability {shown(score)}; expected a finite number, at most 0"
            return ""
        if len(reply.ids) > ask.max_tokens:
            return f"wrote {len(reply.ids):,} tokens where it was asked for at most {ask.max_tokens:,}"
        for each in reply.ids:
            if type(each) is not int or not 0 <= each < self.n_ids:
                return f"wrote the id {shown(each)}; the ids of this model are 0 to {self.n_ids - 1:,}"
        answers = self._answers(ask.rule.choices) if ask.rule.choices else ()
        whole = is_valid_output(reply.ids, ask.rule, self.model.vocabulary, stop_ids=[self.end], answers=answers)
        if whole and self.end not in reply.ids[:-1]:
            return ""
        wanted = "one cell" if ask.rule.mode == "one_cell" else f"an output of mode {ask.rule.mode!r}"
        return (
            f"wrote {shown(self.model.text_tokenizer.decode(reply.ids))}, which is not {wanted}. Start the server "
            "with --logits-processors rvqa.serving.vllm:CellSpans"
        )

    @lru_cache(maxsize=4)  # noqa: B019  # lives as long as one `gather`
    def _answers(self, choices: tuple[str, ...]) -> list[list[int]]:
        return words_ids(self.model.text_tokenizer, choices)


def _n_ids(model: Model) -> int:
    """Number of ids that a language model can write: rows of its output matrix, some of which may have no token."""
    if model.network is not None:
        return int(model.network.get_output_embeddings().weight.shape[0])
    path = Path(model.source) / "config.json"
    config = read_json(path)
    n_ids = config.get("text_config", config).get("vocab_size")
    if not isinstance(n_ids, int):
        raise InputError(f"{path} does not say how many ids the model has (vocab_size). Save the model again.")
    return n_ids


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
        The engine stopped, or a reply is not what was asked for; says how many replies there are and how to go on.
    """
    checker = Checker(model)
    replies: list[Reply | None] = [None] * len(asks)
    bar = tqdm(total=len(asks), disable=True) if bar is None else bar
    with nullcontext() if resume is None else closing(Kept(Path(resume), checker)) as store:
        if store is not None:
            for i, reply in store.find(asks):
                replies[i] = reply
        left = [i for i, reply in enumerate(replies) if reply is None]
        done = len(asks) - len(left)
        bar.update(done)
        try:
            for place, reply in engine.replies([asks[i] for i in left]) if left else ():
                if fault := checker.fault(asks[left[place]], reply):
                    raise EngineError(f"The engine {fault}.")
                replies[left[place]] = reply
                if store is not None:
                    store.keep(asks[left[place]], reply)
                done += 1
                bar.update()
            if None in replies:
                raise EngineError("The engine left asks without a reply.")
        except EngineError as error:
            how = (
                f"they are kept in {resume}: the same call goes on from there"
                if resume is not None
                else "pass resume=FILE to keep them next time"
            )
            raise EngineError(f"{error} {done:,} of {len(asks):,} replies had come; {how}.") from error
    return [reply for reply in replies if reply is not None]


class Kept:
    """Replies in a file (SQLite), each in it when it has come: they outlive this process, but not a power cut.

    The file may come from anywhere. It is used only where it holds the two tables made here and nothing else, so that
    no view or trigger runs. A reply in it counts only where it would pass if an engine gave it now.
    """

    def __init__(self, path: Path, checker: Checker) -> None:
        self.path, self.checker, identity = path, checker, checker.model.identity.encode()
        self.said = "cannot be used for replies ({})"
        with writing(path):
            if path.exists() and not path.is_file():
                what = "a directory" if path.is_dir() else "not a file"
                raise InputError(f"{path} is {what}; give a file for the replies.")
        try:
            self.file = sqlite3.connect(path, isolation_level=None)
        except sqlite3.Error as error:
            raise self._refusal(error) from error
        try:
            self.file.text_factory = bytes  # of a damaged file, it may be no text
            self.file.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, _MOST_BYTES)
            self._run("PRAGMA synchronous = OFF")  # or each reply waits for the disk
            self._run("BEGIN IMMEDIATE")  # what cannot be written to is rejected before an engine works
            here = dict(self._run("SELECT name, sql FROM sqlite_schema LIMIT 9"))
            if not here.items() <= _TABLES.items():
                raise InputError(f"{path} is a database of something else; give another file for the replies.")
            for name in _TABLES.keys() - here.keys():
                self._run(_TABLES[name].decode())
            known = self._run("SELECT model FROM about LIMIT 1")
            if not known:
                self._run("INSERT INTO about VALUES (?)", identity.decode())
            elif known != [(identity,)]:
                raise InputError(f"{path} keeps replies of another model; give another file, or delete it.")
            self._run("COMMIT")
            self.said = "can keep no more replies ({}); those in it stay"
        except BaseException:
            self.file.close()
            raise

    def close(self) -> None:
        """Close the file."""
        self.file.close()

    def find(self, asks: Iterable[Ask]) -> Iterator[tuple[int, Reply]]:
        """Replies that are there and pass, by the place of their ask."""
        for i, ask in enumerate(asks):
            for (told,) in self._run("SELECT reply FROM replies WHERE ask = ?", _key(ask)):
                reply = _read(told)
                if reply is not None and not self.checker.fault(ask, reply):
                    yield i, reply

    def keep(self, ask: Ask, reply: Reply) -> None:
        """Write one reply."""
        told = json.dumps({"ids": reply.ids, "scores": reply.scores})
        self._run("INSERT OR REPLACE INTO replies VALUES (?, ?)", _key(ask), told)

    def _run(self, statement: str, *values: bytes | str) -> list[tuple[Any, ...]]:
        try:
            return self.file.execute(statement, values).fetchall()
        except sqlite3.DataError:
            return []  # a value that is longer than any reply
        except (sqlite3.Error, UnicodeDecodeError) as error:  # the latter for names of columns
            raise self._refusal(error) from error

    def _refusal(self, error: Exception) -> InputError:
        advice = _ADVICE.get(getattr(error, "sqlite_errorname", ""), "Give another file, or delete this one.")
        return InputError(f"{self.path} {self.said.format(error)}. {advice}")


def _read(told: object) -> Reply | None:
    """Reply in a row of the file; None where it is none."""
    try:
        kept = json.loads(told) if isinstance(told, bytes) else None
    except (ValueError, RecursionError):
        return None
    ids, scores = (kept.get("ids"), kept.get("scores")) if isinstance(kept, dict) else (None, None)
    return Reply(ids, scores) if isinstance(ids, list) and isinstance(scores, list) else None


def _key(ask: Ask) -> bytes:
    told = (ask.prompt, ask.rule, ask.max_tokens, ask.temperature, ask.seed)
    return hashlib.sha256(repr(told).encode() + _digest(ask.answers)).digest()


@lru_cache(maxsize=16)
def _digest(answers: tuple[Ids, ...]) -> bytes:
    return hashlib.sha256(repr(answers).encode()).digest()
