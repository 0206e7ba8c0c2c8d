"""vLLM in this process as an engine. Needs the official vLLM (`pip install "rvqa[serve]"`)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from rvqa.errors import InputError
from rvqa.serving.asks import Ask, Reply, require_temperature

if TYPE_CHECKING:
    from rvqa.language.model import Model

_BLOCK = 2048
"""Asks given to vLLM at once; it fills its own batches from them."""


class Offline:
    """An engine of `rvqa.serving.asks`.

    Parameters
    ----------
    model
        With a directory: vLLM reads the language model itself.
    llm
        A `vllm.LLM` made with your own settings and `logits_processors=[rvqa.serving.vllm.CellSpans]`; by default one
        with vLLM's settings is made, and kept for later calls.

    Raises
    ------
    InputError
        No vLLM, or a model without a directory.
    """

    def __init__(self, model: Model, llm: Any = None) -> None:
        if not model.source:
            raise InputError("vLLM reads a model's directory, and this model has none. Save it and load it again.")
        self.llm = _llm(model.source) if llm is None else llm

    def replies(self, asks: Sequence[Ask]) -> Iterator[tuple[int, Reply]]:
        """Answer all asks, block by block."""
        from vllm import TokensPrompt

        require_temperature(asks)
        for start in range(0, len(asks), _BLOCK):
            block = asks[start : start + _BLOCK]
            prompts, params = [], []
            for ask in block:
                for prompt in ask.prompts():
                    prompts.append(TokensPrompt(prompt_token_ids=prompt))
                    params.append(_params(ask))
            outputs = iter(self.llm.generate(prompts, params, use_tqdm=False))
            for i, ask in enumerate(block, start=start):
                if ask.answers:
                    yield i, Reply(scores=[_score(next(outputs), answer) for answer in ask.answers])
                else:
                    yield i, Reply(ids=list(next(outputs).outputs[0].token_ids))


@lru_cache(maxsize=1)
def _llm(source: str) -> Any:
    """Return vLLM on a model's directory; one at a time, since it takes most of a GPU's memory."""
    try:
        from vllm import LLM
    except ImportError as error:
        raise InputError(
            f'vLLM cannot be imported ({error}). Install it with pip install "rvqa[serve]", or use engine="hf".'
        ) from error
    from rvqa.serving.vllm import CellSpans

    return LLM(model=source, logits_processors=[CellSpans], trust_remote_code=False)


def _params(ask: Ask) -> Any:
    from vllm import SamplingParams

    settings, rule = ask.sampling()
    return SamplingParams(**settings, extra_args=rule.options(), detokenize=False)


def _score(output: Any, answer: Sequence[int]) -> float:
    """Log probability of the answer that ends a prompt."""
    last = output.prompt_logprobs[-len(answer) :]
    return sum(place[token_id].logprob for place, token_id in zip(last, answer, strict=True))
