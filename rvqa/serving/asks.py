"""What rvqa asks of a language model, whichever program runs it: here, vLLM in this process, or a server.

An `Ask` is a prompt and what is wanted after it: the log probabilities of given answers, or an output under a rule of
`rvqa.language.grammar`. An engine answers many at once, in any order.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from rvqa.errors import InputError
from rvqa.language.grammar import Rule

Ids = tuple[int, ...]

BLOCK = 1 << 15
"""Asks that callers hold in memory at once."""

_ROUNDING = 1e-3
"""Nats by which rounding can bring the log probability of an answer above 0."""

_LOWEST = -1e9
"""Nats of the least likely answer: far below any real one, far above what float32 cannot hold."""


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
    """Reject temperatures that vLLM does not take."""
    hottest = max((ask.temperature for ask in asks), default=0.0)
    if hottest > 2:
        raise InputError(f'The temperature is {hottest}; vLLM takes 0 to 2. Use engine="hf", or a lower one.')


def without_password(address: str) -> str:
    """Return an address as it may be shown: `user:password@` becomes `...@`."""
    return re.sub(r"^([\w=-]*:?//)?.*@", r"\1...@", address, flags=re.DOTALL)


def is_log_probability(value: object) -> bool:
    """Whether a value is a log probability in nats: a finite number, at most 0 up to rounding."""
    return isinstance(value, int | float) and _LOWEST <= value <= _ROUNDING
