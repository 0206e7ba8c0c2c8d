"""The grammar of cell spans inside vLLM: one logits processor for its two model runners.

`vllm serve MODEL --logits-processors rvqa.serving.vllm:CellSpans`, or `LLM(..., logits_processors=[CellSpans])`. Each
request says what its output must be in `SamplingParams.extra_args`, over HTTP in `vllm_xargs`: `rvqa_mode` ("free" by
default, "text", "one_cell", "n_cells", "choice"), `rvqa_n_cells`, `rvqa_choices`. See docs/serving.md.

States are computed at each step from what was written, on the device of the logits and without waiting for it; nothing
is kept from step to step. V1 hands over lists of ids, Model Runner V2 tensors of them; both end in `rvqa.grammar`.

Legend: B rows of logits, K = span_length ids, V vocabulary, A answers of up to D ids.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from transformers import AutoTokenizer
from vllm.logger import init_logger
from vllm.v1.sample.logits_processor.builtin import process_dict_updates
from vllm.v1.sample.logits_processor.interface import LogitsProcessor as V1
from vllm.v1.worker.gpu.sample.logits_processor.interface import LogitsProcessor as V2

from rvqa import grammar
from rvqa.errors import InputError
from rvqa.grammar import Rule
from rvqa.prompts import word_ids
from rvqa.vocabulary import OPENER, CellVocabulary

if TYPE_CHECKING:
    from vllm import SamplingParams
    from vllm.config import VllmConfig
    from vllm.v1.sample.logits_processor.interface import BatchUpdate
    from vllm.v1.worker.gpu.sample.logits_processor.interface import LogitsContext, LogitsProcRequestState

logger = init_logger(__name__)

EXPLICIT = "--logits-processors rvqa.serving.vllm:CellSpans"

_PLACEHOLDER = -1  # what vLLM writes for an id that it does not know yet

_CELL_TEXT = re.compile(r"<\|/?c(?:ell|[0-9]+_[0-9]+)\|>")


@dataclass(frozen=True)
class _Request:
    """What V1's `apply` needs to know of a row."""

    cells: int
    budget: int
    """Tokens that the output may have; 0 where no span may open."""
    answers: torch.Tensor | None
    written: list[int]
    """vLLM's own list: it grows."""


class CellSpans(V1, V2):
    """Holds vLLM's outputs to the grammar of cell spans.

    With a model that has no cell tokens only mode choice does anything.

    Parameters
    ----------
    vllm_config
        The engine's.
    device
        V1: where logits lie. Model Runner V2: its `LogitsProcRequestState`.
    is_pin_memory
        V1: whether host memory can be pinned. V2 passes nothing.

    Raises
    ------
    rvqa.errors.InputError
        A model with cell tokens but without an end token.
    """

    def __init__(
        self,
        vllm_config: VllmConfig,
        device: torch.device | LogitsProcRequestState,
        is_pin_memory: bool | None = None,  # noqa: FBT001
    ) -> None:
        model = vllm_config.model_config
        self.tokenizer = AutoTokenizer.from_pretrained(
            model.tokenizer, revision=model.tokenizer_revision, trust_remote_code=False
        )
        self.stop_id: int | None = self.tokenizer.eos_token_id
        self.vocabulary: CellVocabulary | None = None
        if OPENER in self.tokenizer.get_added_vocab():
            self.vocabulary = CellVocabulary.from_tokenizer(self.tokenizer)
            if self.stop_id is None:
                raise InputError(f"The tokenizer of {model.model} has no end token (eos_token); set one.")
            grammar.windows(self.vocabulary, stop_id=self.stop_id)
        else:
            logger.warning("%s has no cell tokens: rvqa's grammar of cells leaves its outputs alone.", model.model)
        self.max_length = int(model.max_model_len)
        if isinstance(device, torch.device):
            self.device, self.pin = device, bool(is_pin_memory)
            self.requests: dict[int, _Request] = {}
            return
        self.states = device
        self.device, self.pin = device.device, device.device.type == "cuda"
        self.rules = torch.zeros(device.max_num_reqs, 3, dtype=torch.int64, device=self.device)
        """Of each slot: `Rule.cells`, the most tokens it may write, and the number of its set of choices."""
        self.staged: dict[int, tuple[int, int, int]] = {}
        self.choices: dict[int, tuple[str, ...]] = {}
        self.numbers: dict[tuple[str, ...], int] = {}

    # ---- requests ----------------------------------------------------------------------------------------------------

    @classmethod
    def validate_params(cls, sampling_params: SamplingParams) -> None:
        """Refuse options that could break a span; vLLM's server answers 400.

        Raises
        ------
        rvqa.errors.InputError
            A `ValueError`: says which option, and what to do instead.
        """
        params = sampling_params
        rule = Rule.from_options(params.extra_args)
        grammar.require_budget(rule, params.max_tokens, CellVocabulary(0).span_length)
        refused: dict[str, Any] = {
            "allowed_token_ids": params.allowed_token_ids,
            "trace_decode_token_ids": getattr(params, "trace_decode_token_ids", None),
        }
        if rule.cells != 0:
            detection = getattr(params, "repetition_detection", None)
            refused |= {
                "structured_outputs": params.structured_outputs,
                "thinking_token_budget": getattr(params, "thinking_token_budget", None),
                "repetition_detection": detection if detection and detection.max_pattern_size else None,
                "stop": [text for text in _texts(params.stop) if ends_inside_span(text)],
                "bad_words": [text for text in _texts(params.bad_words) if rule.ends or _CELL_TEXT.search(text)],
            }
        if rule.ends:
            refused |= {"min_tokens": params.min_tokens, "ignore_eos": params.ignore_eos}
        for name, value in refused.items():
            if value not in (None, False, 0, []):
                raise InputError(
                    f"{name}={value!r} could break a cell or its end in rvqa_mode {rule.mode!r}. Leave it out"
                    + (
                        ', or ask for text alone (rvqa_mode "text").'
                        if rule.cells and name != "allowed_token_ids"
                        else "."
                    )
                )

    def _rule(self, params: SamplingParams) -> tuple[Rule, int]:
        """Rule of a request, and how many tokens it may write; 0 where it would stop at a token inside a span."""
        rule = Rule.from_options(params.extra_args)
        budget = self.max_length if params.max_tokens is None else params.max_tokens
        if self.vocabulary is not None:
            stops = {*(params.stop_token_ids or ()), *params.all_stop_token_ids}
            if any(0 <= self.vocabulary.kinds(stop) <= self.vocabulary.levels for stop in stops):
                budget = 0
        return rule, budget

    @lru_cache(maxsize=256)  # noqa: B019  # lives as long as the engine
    def _answers(self, choices: tuple[str, ...]) -> torch.Tensor:
        if self.stop_id is None:
            raise InputError("The tokenizer has no end token (eos_token): mode choice cannot end an answer.")
        ids = [word_ids(self.tokenizer, text) for text in choices]
        return grammar.answer_tensor(ids, self.stop_id, self.device)

    def is_argmax_invariant(self) -> bool:
        """No: the likeliest token may be one that is not allowed."""
        return False

    # ---- V1 ----------------------------------------------------------------------------------------------------------

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        """Follow which request is in which row."""
        process_dict_updates(self.requests, batch_update, self._new_request)

    def _new_request(self, params: SamplingParams, prompt: list[int] | None, written: list[int]) -> _Request | None:
        rule, budget = self._rule(params)
        if self.vocabulary is None and rule.cells != grammar.CHOICE:
            return None
        room = 0 if prompt is None else self.max_length - len(prompt)  # a prompt of embeddings does not say how long
        answers = self._answers(rule.choices) if rule.choices else None
        return _Request(rule.cells, min(budget, room), answers, written)

    # ---- Model Runner V2 ---------------------------------------------------------------------------------------------

    def add_request(self, req_idx: int, sampling_params: SamplingParams) -> bool:
        """Take note of the rule of a slot's new request."""
        rule, budget = self._rule(sampling_params)
        self.choices.pop(req_idx, None)
        number = 0
        if rule.choices:
            self._answers(rule.choices)
            self.choices[req_idx] = rule.choices
            if rule.choices not in self.numbers:
                active = set(self.choices.values())
                self.numbers = {known: i for known, i in self.numbers.items() if known in active}
                taken = set(self.numbers.values())
                self.numbers[rule.choices] = next(i for i in range(1, len(taken) + 2) if i not in taken)
            number = self.numbers[rule.choices]
        acts = self.vocabulary is not None or rule.cells == grammar.CHOICE
        self.staged[req_idx] = (rule.cells, budget, number)
        return acts

    def apply_staged_writes(self) -> None:
        """Bring the rules of new requests to the device."""
        if self.staged:
            slots = self._to_device(np.array(list(self.staged), dtype=np.int64))
            self.rules.index_copy_(0, slots, self._to_device(np.array(list(self.staged.values()), dtype=np.int64)))
            self.staged.clear()

    # ---- both --------------------------------------------------------------------------------------------------------

    def apply(self, logits: torch.Tensor, ctx: LogitsContext | None = None) -> torch.Tensor:
        """Mask logits [B, V] in place; `ctx` is Model Runner V2's."""
        return self._apply_v1(logits) if ctx is None else self._apply_v2(logits, ctx)

    def _apply_v1(self, logits: torch.Tensor) -> torch.Tensor:
        span = self.vocabulary.span_length if self.vocabulary else 0
        K, B = max(span, 1), len(logits)
        facts = np.full((B, K + 3), grammar.ABSENT, dtype=np.int64)  # ids, cells (CHOICE: leave), length, remaining
        chosen: dict[int, list[int]] = {}
        answers = {}
        for row, request in self.requests.items():
            length = len(request.written)
            facts[row, K:] = request.cells, length, request.budget - length
            if request.answers is not None:
                answers[id(request.answers)] = request.answers
                chosen.setdefault(id(request.answers), []).append(row)
            elif request.cells == grammar.ANY_CELLS:
                last = request.written[-K:]
                facts[row, K - len(last) : K] = last
        if (facts[:, :K] == _PLACEHOLDER).any():
            raise RuntimeError(
                "vLLM did not hand over the ids of this step (async scheduling, a processor known by its entry point "
                f"alone; vllm#52461). Start the server with {EXPLICIT}."
            )
        if self.vocabulary is not None:
            self._mask(logits, *self._to_device(facts).split([K, 1, 1, 1], dim=1))
        for which, rows in chosen.items():
            tensor = answers[which]
            ids = np.full((len(rows), tensor.shape[1]), grammar.ABSENT, dtype=np.int64)
            for i, row in enumerate(rows):
                first = self.requests[row].written[: ids.shape[1]]
                ids[i, : len(first)] = first
            if (ids == _PLACEHOLDER).any():
                raise RuntimeError(f"vLLM did not hand over the ids of this step. Start the server with {EXPLICIT}.")
            at = self._to_device(np.array(rows))
            numbers = self._to_device(facts[rows])
            masked = self._mask_choices(logits[at], self._to_device(ids), numbers[:, -2], tensor, numbers[:, -1])
            logits[at] = masked
        return logits

    def _apply_v2(self, logits: torch.Tensor, ctx: LogitsContext) -> torch.Tensor:
        slot_B, pos_B = ctx.expanded_idx_mapping.long(), ctx.pos.long()
        cells_B, budget_B, number_B = self.rules[slot_B].unbind(1)
        prompt_B = self.states.prompt_len.gpu[slot_B].long()
        known_B = self.states.total_len.gpu[slot_B].long()
        length_B = (pos_B + 1 - prompt_B).clamp_min(0)
        remaining_B = torch.minimum(budget_B, self.max_length - prompt_B) - length_B
        row_B = torch.arange(len(slot_B), device=logits.device)

        def written(at: torch.Tensor) -> torch.Tensor:  # ids [B, n] at positions; ABSENT in the prompt and ahead
            ids = self.states.all_token_ids.gpu[slot_B[:, None], at.clamp(0, self.max_length - 1)].long()
            row_of = (row_B[:, None] - (pos_B[:, None] - at)).clamp(
                0, len(row_B) - 1
            )  # a draft is the input of its row
            ids = torch.where(at >= known_B[:, None], ctx.input_ids[row_of].long(), ids)
            return torch.where((at < prompt_B[:, None]) | (at > pos_B[:, None]), grammar.ABSENT, ids)

        if self.vocabulary is not None:
            back_K = torch.arange(self.vocabulary.span_length - 1, -1, -1, device=logits.device)
            self._mask(logits, written(pos_B[:, None] - back_K), cells_B, length_B, remaining_B)
        active = {self.choices[slot] for slot in ctx.idx_mapping_np.tolist() if slot in self.choices}
        for choices in sorted(active):
            tensor = self._answers(choices)
            ids = written(prompt_B[:, None] + torch.arange(tensor.shape[1], device=logits.device))
            masked = self._mask_choices(logits.clone(), ids, length_B, tensor, remaining_B)
            logits.copy_(torch.where((number_B == self.numbers[choices])[:, None], masked, logits))
        return logits

    def _mask(
        self,
        logits: torch.Tensor,
        ids: torch.Tensor,
        cells: torch.Tensor,
        length: torch.Tensor,
        remaining: torch.Tensor,
    ) -> None:
        assert self.vocabulary is not None
        columns = (each.reshape(-1) for each in (cells, length, remaining))
        cells, length, remaining = columns
        states = grammar.states(ids, self.vocabulary, cells, length=length, remaining=remaining)
        grammar.apply_mask_(logits, states, self.vocabulary, stop_id=self.stop_id)

    def _mask_choices(
        self, logits: torch.Tensor, ids: torch.Tensor, length: torch.Tensor, answers: torch.Tensor, left: torch.Tensor
    ) -> torch.Tensor:
        assert self.stop_id is not None
        return grammar.mask_choices_(logits, ids, length, answers, self.stop_id, remaining=left)

    def _to_device(self, values: np.ndarray) -> torch.Tensor:
        host = torch.from_numpy(values)
        return (host.pin_memory() if self.pin else host).to(self.device, non_blocking=True)


def ends_inside_span(text: str, vocabulary: CellVocabulary | None = None) -> bool:
    """Whether a match of a stop string could end inside a cell's text and so cut it."""
    vocabulary = vocabulary or CellVocabulary(0)
    tokens: list[list[str]] = [[] for _ in range(vocabulary.span_length)]
    for token_id, token in enumerate(vocabulary.tokens(), start=vocabulary.base):
        tokens[vocabulary.kinds(token_id)].append(token)

    def ends_after(rest: str, place: int) -> bool:  # some text that ends behind this place's token ends so
        if place < 0:
            return True
        return any(
            token.endswith(rest) or (rest.endswith(token) and ends_after(rest[: -len(token)], place - 1))
            for token in tokens[place]
        )

    for place, several in enumerate(tokens):
        for token in several:
            for size in range(1, len(token) + (place < vocabulary.span_length - 1)):
                part = token[:size]
                if part.endswith(text) or (text.endswith(part) and ends_after(text[:-size], place - 1)):
                    return True
    return False


def _texts(value: str | list[str] | None) -> list[str]:
    return [value] if isinstance(value, str) else list(value or [])
