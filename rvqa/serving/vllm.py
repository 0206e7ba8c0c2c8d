"""The grammar of cell spans inside vLLM: one logits processor for its two model runners.

`vllm serve MODEL --logits-processors rvqa.serving.vllm:CellSpans`, or `LLM(..., logits_processors=[CellSpans])`. Each
request says what its output must be in `SamplingParams.extra_args`, over HTTP in `vllm_xargs`: `rvqa_mode` ("free" by
default, "text", "one_cell", "n_cells", "choice"), `rvqa_n_cells`, `rvqa_choices`. See docs/serving.md.

States are computed at each step from what was written, on the device of the logits and without waiting for it; nothing
is kept from step to step. V1 hands over lists of ids, Model Runner V2 tensors of them; both end in
`rvqa.language.grammar`.

Legend: B rows of logits, K = span_length ids, V vocabulary, A answers of up to D ids.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
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

from rvqa.errors import InputError
from rvqa.io.json_text import shown
from rvqa.language import grammar, masks
from rvqa.language.grammar import Rule
from rvqa.language.prompts import words_ids
from rvqa.language.vocabulary import OPENER, CellVocabulary

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

    A model without cell tokens is left alone.

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
        A model with cell tokens but without an end token; V1 with async scheduling, where the class is known by its
        entry point alone.
    """

    def __init__(
        self,
        vllm_config: VllmConfig,
        device: torch.device | LogitsProcRequestState,
        is_pin_memory: bool | None = None,  # noqa: FBT001
    ) -> None:
        self.model = vllm_config.model_config
        v1 = isinstance(device, torch.device)
        self.vocabulary, self.stop_id = None, 0
        if self._open_tokenizer(named := _is_named(self.model.logits_processors)):
            self.vocabulary = CellVocabulary.from_tokenizer(self.tokenizer)
            if self.tokenizer.eos_token_id is None:
                raise InputError(f"The tokenizer of {self.model.model} has no end token (eos_token); set one.")
            self.stop_id = int(self.tokenizer.eos_token_id)
            grammar.windows(self.vocabulary, stop_id=self.stop_id)
            if v1 and not named and vllm_config.scheduler_config.async_scheduling:
                raise InputError(
                    "With async scheduling vLLM's V1 runner shows processors known by entry point alone -1 in place "
                    f"of ids (vllm#52461). Start it with {EXPLICIT}, or with --no-async-scheduling."
                )
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
        self.sets: dict[tuple[str, ...], tuple[int, torch.Tensor]] = {}
        """Number and answers of every set of choices in use."""

    def _open_tokenizer(self, named: bool) -> bool:  # noqa: FBT001
        """Open the model's tokenizer; whether it has cell tokens. Other models are left alone where nobody named us."""
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(
                self.model.tokenizer, revision=self.model.tokenizer_revision, trust_remote_code=False
            )
            found = OPENER in self.tokenizer.get_added_vocab()
        except Exception as error:
            if named:
                raise
            logger.warning("rvqa cannot open the tokenizer of %s (%s).", self.model.model, error)
            found = False
        if not found:
            logger.warning("%s has no cell tokens: rvqa's grammar leaves its outputs alone.", self.model.model)
        return found

    # ---- requests ----------------------------------------------------------------------------------------------------

    @classmethod
    def validate_params(cls, sampling_params: SamplingParams) -> None:
        """Reject options that could break what a request asks for in its `rvqa_` options; vLLM's server answers 400.

        A request without such options is served as text alone where one of its options could break a cell.

        Raises
        ------
        rvqa.errors.InputError
            A `ValueError`: says which option, and what to do instead.
        """
        params = sampling_params
        rule = Rule.from_options(params.extra_args)
        bias = list((params.logit_bias or {}).values())
        never = {
            "repetition_penalty": None if 0.01 <= params.repetition_penalty <= 100 else params.repetition_penalty,
            "logit_bias": None if all(abs(each) <= 100 for each in bias) else params.logit_bias,
            "trace_decode_token_ids": getattr(params, "trace_decode_token_ids", None),
        }
        asked = any(str(key).startswith("rvqa") for key in params.extra_args or ())
        for name, value in (never | (_breaking(params, rule) if asked else {})).items():
            if value is not None:
                raise InputError(
                    f"{name}={shown(value)} could break a cell or its end in rvqa_mode {rule.mode!r}. Leave it out"
                    + (", or ask for text alone (rvqa_mode 'text')." if name not in never else ".")
                )
        grammar.require_budget(rule, params.max_tokens, CellVocabulary(0).span_length)

    def _rule(self, params: SamplingParams) -> tuple[Rule, int]:
        """Rule of a request, and how many tokens it may write: none where a stop token could cut what it must hold."""
        rule = Rule.from_options(params.extra_args)
        budget = self.model.max_model_len if params.max_tokens is None else params.max_tokens
        if self.vocabulary is None or rule.cells == 0:
            return rule, budget
        if _breaking(params, rule):  # a request without options of ours: see validate_params
            return Rule("text"), budget
        stops = {*(params.stop_token_ids or ()), *params.all_stop_token_ids}
        cell = range(self.vocabulary.opener, self.vocabulary.closer)
        cut = any(stop in cell for stop in stops)
        cut |= cell.stop in stops and bool(rule.cells > 1 or params.min_tokens)
        cut |= bool(rule.choices) and not self._answers(rule.choices)[0].isdisjoint(stops - {self.stop_id})
        return rule, 0 if cut else budget

    @lru_cache(maxsize=16)  # noqa: B019  # lives as long as the engine; `grammar` bounds what each can hold
    def _answers(self, choices: tuple[str, ...]) -> tuple[frozenset[int], torch.Tensor]:
        """Ids that occur in the answers of mode choice, and the answers on the device."""
        answers = words_ids(self.tokenizer, choices)
        ids = frozenset(token_id for answer in answers for token_id in answer)
        return ids, masks.answer_tensor(answers, self.stop_id, self.device)

    def is_argmax_invariant(self) -> bool:
        """No: the likeliest token may be one that is not allowed."""
        return False

    # ---- V1 ----------------------------------------------------------------------------------------------------------

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        """Follow which request is in which row."""
        process_dict_updates(self.requests, batch_update, self._new_request)

    def _new_request(self, params: SamplingParams, prompt: list[int] | None, written: list[int]) -> _Request | None:
        rule, budget = self._rule(params)
        if self.vocabulary is None:
            return None
        room = 0 if prompt is None else self.model.max_model_len - len(prompt)  # embeddings do not say how long
        answers = self._answers(rule.choices)[1] if rule.choices else None
        return _Request(rule.cells, min(budget, room), answers, written)

    # ---- Model Runner V2 ---------------------------------------------------------------------------------------------

    def add_request(self, req_idx: int, sampling_params: SamplingParams) -> bool:
        """Take note of the rule of a slot's new request."""
        if self.vocabulary is None:
            return False
        rule, budget = self._rule(sampling_params)
        self.choices.pop(req_idx, None)
        number = 0
        if rule.choices:
            if rule.choices not in self.sets:
                active = set(self.choices.values())
                self.sets = {known: kept for known, kept in self.sets.items() if known in active}
                taken = {number for number, _ in self.sets.values()}
                free = next(i for i in range(1, len(taken) + 2) if i not in taken)
                self.sets[rule.choices] = free, self._answers(rule.choices)[1]
            self.choices[req_idx] = rule.choices
            number, _ = self.sets[rule.choices]
        self.staged[req_idx] = (rule.cells, budget, number)
        return True

    def apply_staged_writes(self) -> None:
        """Bring the rules of new requests to the device."""
        if self.staged:
            slots = self._to_device(np.array(list(self.staged), dtype=np.int64))
            self.rules.index_copy_(0, slots, self._to_device(np.array(list(self.staged.values()), dtype=np.int64)))
            self.staged.clear()

    # ---- both --------------------------------------------------------------------------------------------------------

    def apply(self, logits: torch.Tensor, ctx: LogitsContext | None = None) -> torch.Tensor:
        """Mask logits [B, V] in place; `ctx` is Model Runner V2's."""
        if self.vocabulary is None:
            return logits
        return self._apply_v1(logits) if ctx is None else self._apply_v2(logits, ctx)

    def _apply_v1(self, logits: torch.Tensor) -> torch.Tensor:
        assert self.vocabulary is not None
        K, B = self.vocabulary.span_length, len(logits)
        facts = np.full((B, K + 3), grammar.ABSENT, dtype=np.int64)  # of each row: last ids, cells, length, remaining
        facts[:, K] = grammar.CHOICE  # whose state is LEAVE: rows that no request of ours is in stay as they are
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
        _require_known(facts[:, :K])
        self._mask(logits, *self._to_device(facts).split([K, 1, 1, 1], dim=1))
        for which, rows in chosen.items():
            tensor = answers[which]
            ids = np.full((len(rows), tensor.shape[1]), grammar.ABSENT, dtype=np.int64)
            for i, row in enumerate(rows):
                first = self.requests[row].written[: ids.shape[1]]
                ids[i, : len(first)] = first
            _require_known(ids)
            at = self._to_device(np.array(rows))
            numbers = self._to_device(facts[rows])
            logits[at] = masks.mask_choices_(
                logits[at], self._to_device(ids), numbers[:, -2], tensor, self.stop_id, remaining=numbers[:, -1]
            )
        return logits

    def _apply_v2(self, logits: torch.Tensor, ctx: LogitsContext) -> torch.Tensor:
        assert self.vocabulary is not None
        slot_B, pos_B = ctx.expanded_idx_mapping.long(), ctx.pos.long()
        cells_B, budget_B, number_B = self.rules[slot_B].unbind(1)
        prompt_B = self.states.prompt_len.gpu[slot_B].long()
        known_B = self.states.total_len.gpu[slot_B].long()
        length_B = (pos_B + 1 - prompt_B).clamp_min(0)
        remaining_B = torch.minimum(budget_B, self.model.max_model_len - prompt_B) - length_B
        row_B = torch.arange(len(slot_B), device=logits.device)

        def written(at: torch.Tensor) -> torch.Tensor:  # ids [B, n] at positions; ABSENT in the prompt and ahead
            every = self.states.all_token_ids.gpu
            ids = every[slot_B[:, None], at.clamp(0, every.shape[1] - 1)].long()
            back = pos_B[:, None] - at  # a draft is the input of its row
            row_of = (row_B[:, None] - back).clamp(0, len(row_B) - 1)
            ids = torch.where(at >= known_B[:, None], ctx.input_ids[row_of].long(), ids)
            return torch.where((at < prompt_B[:, None]) | (at > pos_B[:, None]), grammar.ABSENT, ids)

        back_K = torch.arange(self.vocabulary.span_length - 1, -1, -1, device=logits.device)
        self._mask(logits, written(pos_B[:, None] - back_K), cells_B, length_B, remaining_B)
        active = {self.choices[slot] for slot in ctx.idx_mapping_np.tolist() if slot in self.choices}
        for choices in sorted(active):
            number, tensor = self.sets[choices]
            ids = written(prompt_B[:, None] + torch.arange(tensor.shape[1], device=logits.device))
            masked = masks.mask_choices_(logits.clone(), ids, length_B, tensor, self.stop_id, remaining=remaining_B)
            logits.copy_(torch.where((number_B == number)[:, None], masked, logits))
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
        cells, length, remaining = (each.reshape(-1) for each in (cells, length, remaining))
        states = grammar.states(ids, self.vocabulary, cells, length=length, remaining=remaining)
        masks.apply_mask_(logits, states, self.vocabulary, stop_id=self.stop_id)

    def _to_device(self, values: np.ndarray) -> torch.Tensor:
        host = torch.from_numpy(values)
        return (host.pin_memory() if self.pin else host).to(self.device, non_blocking=True)


def _require_known(ids: np.ndarray) -> None:
    if (ids == _PLACEHOLDER).any():
        raise RuntimeError(f"vLLM did not hand over the ids of this step. Start it with {EXPLICIT}.")


def _breaking(params: SamplingParams, rule: Rule) -> dict[str, Any]:
    """Options of a request that could break or cut what its rule asks for; mode text has nothing to break.

    A stop string may end at any character: it is found only when text is complete, with the next token already there.
    """
    if rule.cells == 0:
        return {}
    detection = getattr(params, "repetition_detection", None)
    found: dict[str, Any] = {
        "allowed_token_ids": params.allowed_token_ids,
        "structured_outputs": params.structured_outputs,
        "thinking_token_budget": getattr(params, "thinking_token_budget", None),
        "repetition_detection": detection if detection and detection.max_pattern_size else None,
        "stop": params.stop,
        "bad_words": [text for text in params.bad_words or () if rule.ends or _CELL_TEXT.search(text)],
        "min_tokens": params.min_tokens if rule.ends else None,
        "ignore_eos": params.ignore_eos if rule.ends else None,
    }
    return {name: value for name, value in found.items() if value not in (None, False, 0, [], "")}


def _is_named(given: Sequence[str | type] | None) -> bool:
    """Whether the class is among the processors that the engine was started with, not known by entry point alone."""
    return any(each is CellSpans or each == "rvqa.serving.vllm:CellSpans" for each in given or ())
