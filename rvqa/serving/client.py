"""A vLLM server as an engine: prompts go out as ids over HTTP, many at once, and again after a while where it failed.

The server: `vllm serve MODEL --logits-processors rvqa.serving.vllm:CellSpans`; docs/serving.md.
"""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from itertools import groupby, islice
from threading import Event
from typing import TYPE_CHECKING, Any

import httpx

from rvqa.errors import EngineError, InputError, InputWarning
from rvqa.serving.engine import Ask, Reply, require_temperature

if TYPE_CHECKING:
    from rvqa.model import Model

_AGAIN = (408, 429, 500, 502, 503, 504)
"""Answers of a server that may go well later."""


class Client:
    """An engine of `rvqa.serving.engine`.

    The environment variable RVQA_API_KEY, where it is set, is sent as a bearer token (`vllm serve --api-key`).

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
        Seconds to wait for one reply.

    Raises
    ------
    InputError
        No server there, several models and none of this name, or other ids for the cell tokens.
    """

    def __init__(
        self, model: Model, address: str, *, concurrency: int = 32, patience: float = 60.0, timeout: float = 300.0
    ) -> None:
        self.address = address.rstrip("/").removesuffix("/v1")
        self.concurrency, self.patience = concurrency, patience
        key = os.environ.get("RVQA_API_KEY")
        limits = httpx.Limits(max_connections=concurrency, max_keepalive_connections=concurrency)
        try:
            httpx.URL(self.address)
            self.http = httpx.Client(
                headers={"Authorization": f"Bearer {key}"} if key else {}, timeout=timeout, limits=limits
            )
        except (httpx.InvalidURL, UnicodeEncodeError) as error:
            raise InputError(f"{address!r} or RVQA_API_KEY cannot be used: {error}.") from error
        self.name = self._served(model.source)
        self._require_same_tokens(model)

    def replies(self, asks: Sequence[Ask]) -> Iterator[tuple[int, Reply]]:
        """Answer all asks as replies come in.

        Raises
        ------
        EngineError
            The server is gone, refuses a call, or replies with something else than asked for.
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
        answer = self._again("POST", "/v1/completions", body, patience=self.patience, stopped=stopped)
        try:
            choices = sorted(answer["choices"], key=lambda choice: choice["index"])
            if first.answers:
                pairs = zip(choices, first.answers, strict=True)
                return [(places[0], Reply(scores=[_score(choice, answer) for choice, answer in pairs]))]
            return [(i, Reply(ids=[*choice["token_ids"]])) for i, choice in zip(places, choices, strict=True)]
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            wanted = "prompt_logprobs" if first.answers else "token_ids"
            raise EngineError(
                f"{self.address} sent no {wanted} for each of {len(prompts)} prompts; is it vLLM 0.31 or 0.32?"
            ) from error

    def _served(self, source: str) -> str:
        """Name of the model on the server."""
        try:
            models = self._again("GET", "/v1/models", None)["data"]
            names = [model["id"] for model in models]
            ours = [model["id"] for model in models if source and source in (model["id"], model.get("root"))]
        except (EngineError, LookupError, TypeError, AttributeError) as error:
            seen = error if isinstance(error, EngineError) else f"{self.address} is no vLLM server."
            raise InputError(f"{seen} Start one with vllm serve {source or 'MODEL'} --logits-processors ...") from error
        if len(ours or names) != 1:
            raise InputError(
                f"{self.address} serves {', '.join(names)}; none of them is {source}. Serve that one alone."
            )
        return str((ours or names)[0])

    def _require_same_tokens(self, model: Model) -> None:
        tokens, ids = model.vocabulary.tokens(), range(model.vocabulary.base, model.vocabulary.closer + 1)
        body = {"model": self.name, "prompt": "".join(tokens), "add_special_tokens": False}
        try:
            answer = self._again("POST", "/tokenize", body)
        except EngineError as error:
            if error.status != 404:
                raise
            warnings.warn(
                f"{self.address} has no /tokenize: whether its model is {model.source} was not checked.",
                InputWarning,
                stacklevel=4,
            )
            return
        seen = answer.get("tokens") if isinstance(answer, dict) else None
        if seen != list(ids):
            raise InputError(
                f"{self.address} reads the cell tokens as other ids than {model.source or 'this model'} has. Serve the "
                "same directory that is loaded here."
            )

    def _again(
        self,
        method: str,
        path: str,
        body: dict[str, Any] | None,
        *,
        patience: float = 0.0,
        stopped: Event | None = None,
    ) -> Any:
        """Call, and call again while the server cannot be reached or says it may go well later, until `stopped`."""
        began, pause, stopped = time.monotonic(), 0.25, stopped or Event()
        while True:
            status = None
            try:
                answer = self.http.request(method, self.address + path, json=body)
                if answer.is_success:
                    return answer.json()
                status = answer.status_code
                seen = f"{self.address}{path} answered {status}: {answer.text[:300]}."
                later = status in _AGAIN
            except (httpx.TransportError, ValueError) as error:
                seen = f"{self.address} does not answer ({type(error).__name__}: {error})."
                later = isinstance(error, httpx.TransportError)
            if not later or time.monotonic() - began + pause > patience or stopped.wait(pause):
                failed = EngineError(seen)
                failed.status = status
                raise failed
            pause = min(2 * pause, 8.0)


def _score(choice: dict[str, Any], answer: Sequence[int]) -> float:
    """Log probability of the answer that ends a prompt."""
    last = choice["prompt_logprobs"][-len(answer) :]
    return sum(place[str(token_id)]["logprob"] for place, token_id in zip(last, answer, strict=True))
