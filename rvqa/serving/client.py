"""A vLLM server as an engine: prompts go out as ids over HTTP, many at once, and again after a while where it failed.

The server: `vllm serve MODEL --logits-processors rvqa.serving.vllm:CellSpans`; docs/serving.md.

What a server may do to its caller is in `rvqa.serving.connection`; here is what it must say.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from itertools import groupby, islice
from threading import Event
from typing import TYPE_CHECKING, Any

from rvqa.errors import EngineError, InputError, InputWarning
from rvqa.io.json_text import shown
from rvqa.serving.asks import Ask, Reply, is_log_probability, require_temperature
from rvqa.serving.connection import NETWORK, ROOM, Connections

if TYPE_CHECKING:
    from rvqa.language.model import Model

_AGAIN = (408, 429, 500, 502, 503, 504)
"""Answers of a server that may go well later."""

_TOKEN, _CHOICE = 512, 1024
"""Bytes of an answer for each token that was sent or asked for, and for each prompt; vLLM sends about 100 and 300."""


class Client:
    """An engine of `rvqa.serving.asks`.

    The environment variable RVQA_API_KEY, where it is set, is sent as a bearer token (`vllm serve --api-key`); the user
    and password of "http://user:password@host:8000" are sent in its place.

    Parameters
    ----------
    model
        The model that the server was started with; its weights are not needed here (`rvqa.load(..., weights=False)`).
    address
        "http://host:8000", with or without "/v1".
    concurrency
        Calls on the way at once.
    patience
        Seconds to try a call again, with growing pauses, before giving up.
    timeout
        Seconds for one reply, from the call to its last byte.

    Raises
    ------
    InputError
        No server there, several models and none of this name, or other ids for the cell tokens.
    """

    def __init__(
        self, model: Model, address: str, *, concurrency: int = 32, patience: float = 60.0, timeout: float = 300.0
    ) -> None:
        self.concurrency, self.patience = concurrency, patience
        self.server = Connections(address, timeout)
        self.address = self.server.address
        try:
            self.name = self._served(model.source)
            self._require_same_tokens(model)
        finally:
            self.server.close()

    def replies(self, asks: Sequence[Ask]) -> Iterator[tuple[int, Reply]]:
        """Answer all asks as replies come in.

        Raises
        ------
        EngineError
            The server is gone, rejects a call, or replies with something else than asked for.
        """
        require_temperature(asks)
        calls, stopped = iter(self._calls(asks)), Event()
        pool = ThreadPoolExecutor(self.concurrency)
        try:
            running: set[Future[list[tuple[int, Reply]]]] = set()
            while True:
                running |= {
                    pool.submit(self._call, *call, stopped) for call in islice(calls, self.concurrency - len(running))
                }
                if not running:
                    return
                done, running = wait(running, return_when=FIRST_COMPLETED)
                failed = next((call for call in done if call.exception()), None)
                for call in done:  # what came is handed over before a failure is told
                    if not call.exception():
                        yield from call.result()
                if failed is not None:
                    failed.result()
        finally:
            stopped.set()
            pool.shutdown(wait=False, cancel_futures=True)
            self.server.close()

    def _calls(self, asks: Sequence[Ask]) -> Iterator[tuple[list[int], list[Ask]]]:
        """Asks that go into one call: what is drawn needs a seed, and so a call, of its own."""

        def alike(i: int) -> tuple[object, ...]:
            ask = asks[i]
            return (i,) if ask.answers or ask.temperature else (ask.rule, ask.max_tokens)

        for _, group in groupby(range(len(asks)), key=alike):
            while places := list(islice(group, 32)):
                yield places, [asks[i] for i in places]

    def _call(self, places: list[int], asks: list[Ask], stopped: Event) -> list[tuple[int, Reply]]:
        first = asks[0]
        prompts = [prompt for ask in asks for prompt in ask.prompts()]
        settings, rule = first.sampling()
        body = settings | {
            "model": self.name,
            "prompt": prompts,
            "vllm_xargs": rule.options(),
            "add_special_tokens": False,
            "return_token_ids": True,
        }
        n_tokens = sum(len(prompt) + settings["max_tokens"] for prompt in prompts)
        most = ROOM + _CHOICE * len(prompts) + _TOKEN * n_tokens
        answer = self._again("/v1/completions", body, most, stopped)
        try:
            choices = _in_order(answer["choices"], prompts)
            if first.answers:
                told = zip(choices, prompts, first.answers, strict=True)
                return [(places[0], Reply(scores=[_score(choice, prompt, len(end)) for choice, prompt, end in told]))]
            return [(i, Reply(ids=[*choice["token_ids"]])) for i, choice in zip(places, choices, strict=True)]
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            wanted = "prompt_logprobs" if first.answers else "token_ids"
            raise EngineError(
                f"{self.address} sent no {wanted} for each of {len(prompts)} prompts; is it vLLM 0.31 or 0.32?"
            ) from error

    def _served(self, source: str) -> str:
        """Name of the model on the server."""
        try:
            models = self.server.call("GET", "/v1/models", None, most=1 << 20)["data"]
            names = [model["id"] for model in models]
            ours = [model["id"] for model in models if source and source in (model["id"], model.get("root"))]
        except (EngineError, LookupError, TypeError, AttributeError) as error:
            seen = error if isinstance(error, EngineError) else f"{self.address} is not a vLLM server."
            raise InputError(f"{seen} Start one with vllm serve {source or 'MODEL'} --logits-processors ...") from error
        if not ours and len(names) != 1:  # several of ours are names of one model
            served = self.server.shown(", ".join(map(str, names)))
            raise InputError(f"{self.address} serves {served}; none of them is {source}. Serve that one alone.")
        return str((ours or names)[0])

    def _require_same_tokens(self, model: Model) -> None:
        tokens, ids = model.vocabulary.tokens(), range(model.vocabulary.base, model.vocabulary.closer + 1)
        body = {"model": self.name, "prompt": "".join(tokens), "add_special_tokens": False}
        try:
            answer = self.server.call("POST", "/tokenize", body, most=1 << 20)
        except EngineError as error:
            if error.status != 404:
                raise
            warnings.warn(
                f"{self.address} has no /tokenize: whether its model is {model.source} was not checked.",
                InputWarning,
                stacklevel=4,
            )
            return
        if answer.get("tokens") != list(ids):
            raise InputError(
                f"{self.address} reads the cell tokens as other ids than {model.source or 'this model'} has. Serve the "
                "same directory that is loaded here."
            )

    def _again(self, path: str, body: dict[str, Any], most: int, stopped: Event) -> dict[str, Any]:
        """Call, and call again while the server cannot be reached or says it may go well later, until `stopped`."""
        began, pause = time.monotonic(), 0.25
        while True:
            try:
                return self.server.call("POST", path, body, most=most, stopped=stopped)
            except EngineError as error:
                later = error.status in _AGAIN or isinstance(error.__cause__, NETWORK)
                if not later or time.monotonic() - began + pause > self.patience or stopped.wait(pause):
                    raise
            pause = min(2 * pause, 8.0)


def _in_order(choices: Any, prompts: Sequence[list[int]]) -> list[dict[str, Any]]:
    """Choices by their index: one for each prompt, and of no other prompt."""
    by_index = {choice["index"]: choice for choice in choices}
    ordered = [by_index[i] for i in range(len(prompts))]
    asked = all(
        choice.get("prompt_token_ids") in (None, prompt) for choice, prompt in zip(ordered, prompts, strict=True)
    )
    if len(choices) != len(prompts) or not asked:
        raise ValueError
    return ordered


def _score(choice: dict[str, Any], prompt: Sequence[int], n_answer: int) -> float:
    """Log probability of the answer that ends a prompt; the server must have scored every id of it."""
    places = choice["prompt_logprobs"][1:]
    told = [place[str(token_id)]["logprob"] for place, token_id in zip(places, prompt[1:], strict=True)]
    told = [None, *told][-n_answer:]  # the first id follows nothing
    for value in told:
        if not is_log_probability(value):
            raise EngineError(
                f"The engine gave the log probability {shown(value)}; expected a finite number, at most 0."
            )
    return sum(told)
