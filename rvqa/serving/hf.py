"""Hugging Face models as an engine: the grammar as a logits processor, and ten forced-window tokens done fast.

`CellSpanLogitsProcessor` is a thin adapter of `rvqa.language.grammar` for `model.generate`. `HuggingFace` answers the
asks of `rvqa.serving.asks`. `generate_cells` writes one cell a prompt; its fast path runs the model on the 8 free
positions only (opener and closer are known) and multiplies the last hidden state with the 32 output rows of the level
at hand, `hidden_BH @ W[lo:hi].T`, instead of all 151,936.

Legend: B prompts, L prompt length, H hidden width, K codes of a level, V vocabulary.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from rvqa.errors import InputError
from rvqa.language import grammar, masks
from rvqa.language.prompts import words_ids
from rvqa.language.rows import require_rows
from rvqa.language.vocabulary import CellVocabulary
from rvqa.serving.asks import Ask, Reply
from rvqa.serving.scoring import AnswerTree

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from rvqa.language.model import Model

# Settings with which a model changes logits after its output matrix; the fast path knows none of them.
_LOGIT_SETTINGS = ("final_logit_softcapping", "logit_scale", "logits_scaling", "lm_head_multiplier")

_SEEDS = 2**64
"""Seeds are taken modulo this, because numpy rejects negative ones."""


class HuggingFace:
    """An engine of `rvqa.serving.asks`: the model in this process.

    An ask draws from its own seed, so its output does not depend on the other asks, their order or the batches. One
    limit remains: the logits of a prompt can differ in their last bits between batches of different shape, and a draw
    or a greedy choice that is as close as that can then fall to the neighbour.

    Parameters
    ----------
    model
        With its weights.
    batch_size
        Most prompts at once; fewer where logits would take too much memory.
    """

    def __init__(self, model: Model, *, batch_size: int = 256) -> None:
        self.model, self.network, self.batch_size = model, model.language_model, batch_size

    def replies(self, asks: Sequence[Ask]) -> Iterator[tuple[int, Reply]]:
        """Answer all asks, those alike in one batch; prompts of one length together."""
        groups: dict[tuple[object, ...], list[int]] = {}
        for i, ask in enumerate(asks):
            groups.setdefault((ask.answers, ask.rule, ask.max_tokens, ask.temperature), []).append(i)
        for places in groups.values():
            places.sort(key=lambda i: len(asks[i].prompt))  # stable
            first = asks[places[0]]
            tree = AnswerTree(self.network, first.answers) if first.answers else None
            size = min(self.batch_size, tree.most_prompts) if tree else self.batch_size
            for start in range(0, len(places), size):
                batch = places[start : start + size]
                prompts_BP, pad_B = self._padded([asks[i].prompt for i in batch])
                padded = bool(pad_B.any())
                if tree:
                    scores_BC = tree.scores(prompts_BP, pad_B.to(prompts_BP.device) if padded else None)
                    replies = [Reply(scores=row) for row in scores_BC.tolist()]
                else:
                    mask = (torch.arange(prompts_BP.shape[1]) >= pad_B[:, None]).long().to(prompts_BP.device)
                    replies = [Reply(ids=row) for row in self._write([asks[i] for i in batch], prompts_BP, mask)]
                yield from zip(batch, replies, strict=True)

    def _padded(self, prompts: Sequence[Sequence[int]]) -> tuple[torch.Tensor, torch.Tensor]:
        width = max(map(len, prompts))
        end = self.model.prompts.end
        rows = np.array([[*[end] * (width - len(prompt)), *prompt] for prompt in prompts], dtype=np.int64)
        return torch.from_numpy(rows).to(self.network.device), torch.tensor([width - len(prompt) for prompt in prompts])

    def _write(self, asks: Sequence[Ask], prompts_BP: torch.Tensor, mask_BP: torch.Tensor) -> list[list[int]]:
        """Outputs of one batch of asks that differ in prompt and seed alone, each up to its end token."""
        vocabulary, tokenizer = self.model.vocabulary, self.model.text_tokenizer
        ask, seeds = asks[0], [each.seed for each in asks]
        if ask.rule.mode == "one_cell":
            codes_BM = generate_cells(
                self.network, prompts_BP, mask_BP, vocabulary, temperature=ask.temperature, seed=seeds
            )
            return vocabulary.ids(codes_BM).tolist()
        end = self.model.prompts.end
        processor = CellSpanLogitsProcessor(
            vocabulary,
            ask.rule,
            prompt_length=prompts_BP.shape[1],
            max_new_tokens=ask.max_tokens,
            stop_ids=end,
            answers=words_ids(tokenizer, ask.rule.choices) if ask.rule.choices else (),
        )
        output_BL = _sample(
            self.network, prompts_BP, mask_BP, processor, ask.temperature, seeds, eos_token_id=end, pad_token_id=end
        )
        rows = output_BL.tolist()
        return [row[: row.index(end) + 1] if end in row else row for row in rows]


class CellSpanLogitsProcessor(LogitsProcessor):
    """Holds `model.generate` to the grammar of cell spans.

    Put it last among your logits processors. Options that ban the end token (`min_new_tokens`) contradict the rules
    that end an output themselves.

    Parameters
    ----------
    vocabulary
        Where the cell tokens lie.
    rule
        What outputs must be: `Rule("free")` (text with whole spans), `Rule("text")` (no cell tokens),
        `Rule("one_cell")`, `Rule("n_cells", n_cells=3)` or `Rule("choice", choices=(" B", " T"))`.
    prompt_length
        Number of columns of `input_ids` that are prompt, padding included; spans in the prompt do not matter.
    max_new_tokens
        The same number as given to `generate`: no span opens that could not close.
    stop_ids
        The model's end tokens (`generation_config.eos_token_id`); the first is forced where the rule ends an output.
    answers
        Ids of the rule's choices, in their order (`rvqa.language.prompts.word_ids`).

    Raises
    ------
    InputError
        A budget too small for the rule's cells, room after them but no end token, or choices without ids.
    """

    supports_continuous_batching = False

    def __init__(
        self,
        vocabulary: CellVocabulary,
        rule: grammar.Rule,
        *,
        prompt_length: int,
        max_new_tokens: int,
        stop_ids: Sequence[int] | int = (),
        answers: Sequence[Sequence[int]] = (),
    ) -> None:
        stop_ids = (stop_ids,) if isinstance(stop_ids, int) else tuple(stop_ids)
        self.stop_id = grammar.check_request(vocabulary, rule, max_new_tokens=max_new_tokens, stop_ids=stop_ids)
        if len(answers) != len(rule.choices or ()):
            raise InputError(
                f"There are {len(rule.choices or ())} choices and ids of {len(answers)}; give one for each."
            )
        self.vocabulary = vocabulary
        self.rule = rule
        self.prompt_length = prompt_length
        self.max_new_tokens = max_new_tokens
        self.answers_AD = masks.answer_tensor(answers, self.stop_id) if answers and self.stop_id is not None else None

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Masked copy of `scores` [B, V], given prompts and outputs `input_ids` int64 [B, L]."""
        output_BL = input_ids[:, self.prompt_length :]
        length = output_BL.shape[1]
        remaining = self.max_new_tokens - length
        if self.stop_id is not None and self.answers_AD is not None:
            self.answers_AD = answers_AD = self.answers_AD.to(scores.device)
            return masks.mask_choices_(scores.clone(), output_BL, length, answers_AD, self.stop_id, remaining=remaining)
        last_BK = output_BL[:, -self.vocabulary.span_length :]
        states_B = grammar.states(last_BK, self.vocabulary, self.rule.cells, length=length, remaining=remaining)
        return masks.apply_mask_(scores.clone(), states_B, self.vocabulary, stop_id=self.stop_id)


def generate_cells(
    model: PreTrainedModel,
    input_ids_BL: torch.Tensor,
    attention_mask: torch.Tensor | None,
    vocabulary: CellVocabulary,
    *,
    temperature: float = 0.0,
    seed: int | Sequence[int] = 0,
    engine: Literal["auto", "fast", "generate"] = "auto",
) -> npt.NDArray[np.uint8]:
    """Write one cell after each prompt.

    Parameters
    ----------
    model
        Causal language model with the rows of the cell tokens, in evaluation mode.
    input_ids_BL
        Prompts, int64 [B, L], padded on the left, on the model's device. The cell follows at once.
    attention_mask
        1 for prompt, 0 for padding, [B, L]; None where nothing is padded.
    vocabulary
        Where the cell tokens lie.
    temperature
        0 takes the likeliest code of each level; above, codes are drawn from the softmax of logits / temperature over
        the codes of the level, without top-k, top-p or penalties, whatever the model's generation_config says.
    seed
        Seed of the draws: one for each prompt, or one number from which each row gets a seed of its own. A row draws
        from its seed alone, not from the global random state, and draws the same whatever the other rows are and
        whichever engine runs, up to logits that differ in their last bits.
    engine
        "fast": 8 model calls and 32 output rows each. "generate": `model.generate` with `CellSpanLogitsProcessor`.
        "auto": fast where it is exact, that is, where logits are hidden states times a plain output matrix.

    Returns
    -------
    Codes, uint8 [B, levels].

    Raises
    ------
    InputError
        Empty or right-padded prompts, a negative temperature, another number of seeds than of prompts, no rows for the
        cell tokens, or "fast" on a model that it does not fit.
    """
    if input_ids_BL.ndim != 2 or 0 in input_ids_BL.shape:
        raise InputError(f"Prompts have shape {tuple(input_ids_BL.shape)}; expected ids [prompts, length], not empty.")
    if attention_mask is None:
        attention_mask = torch.ones_like(input_ids_BL)
    if attention_mask.shape != input_ids_BL.shape or not bool(attention_mask[:, -1].all()):
        raise InputError(
            f"The attention mask has shape {tuple(attention_mask.shape)} for prompts {tuple(input_ids_BL.shape)}, or a "
            "prompt ends in padding. Pad prompts on the left: tokenizer.padding_side = 'left'."
        )
    if not 0 <= temperature < float("inf"):
        raise InputError(f"The temperature is {temperature}; expected 0 (greedy) or a positive number.")
    B = len(input_ids_BL)
    if isinstance(seed, int | np.integer):
        seeds: Sequence[int] = np.random.default_rng(int(seed) % _SEEDS).integers(2**63, size=B).tolist()
    else:
        seeds = seed
    if len(seeds) != B:
        raise InputError(f"There are {len(seeds)} seeds for {B} prompts; give one seed for each, or one number.")
    require_rows(model, vocabulary)
    misfit = _fast_misfit(model)
    if engine == "fast" and misfit:
        raise InputError(f'The fast path does not fit this model: {misfit}. Use engine="auto" or "generate".')
    write = _fast if engine == "fast" or (engine == "auto" and not misfit) else _generate
    with torch.no_grad():
        ids_BK = write(model, input_ids_BL, attention_mask.long(), vocabulary, temperature, seeds)
    return vocabulary.codes(ids_BK.cpu().numpy())


def _generate(
    model: Any,
    input_ids_BL: torch.Tensor,
    attention_mask: torch.Tensor,
    vocabulary: CellVocabulary,
    temperature: float,
    seeds: Sequence[int],
) -> torch.Tensor:
    """`model.generate` in mode one_cell: the plain form of `_fast`, for any model and any logit settings."""
    processor = CellSpanLogitsProcessor(
        vocabulary,
        grammar.Rule("one_cell"),
        prompt_length=input_ids_BL.shape[1],
        max_new_tokens=vocabulary.span_length,
    )
    return _sample(model, input_ids_BL, attention_mask, processor, temperature, seeds)


def _sample(
    model: Any,
    input_ids_BL: torch.Tensor,
    attention_mask: torch.Tensor,
    processor: CellSpanLogitsProcessor,
    temperature: float,
    seeds: Sequence[int],
    **settings: int,
) -> torch.Tensor:
    """Outputs of `model.generate` under the grammar alone, [B, length]."""
    processors: list[LogitsProcessor] = [processor]
    if temperature:
        processors.append(_Draw(seeds, temperature, input_ids_BL.shape[1], processor.max_new_tokens))
    with _plain_generation_config(model), torch.no_grad():
        output = model.generate(
            input_ids_BL,
            attention_mask=attention_mask,
            logits_processor=LogitsProcessorList(processors),
            max_new_tokens=processor.max_new_tokens,
            do_sample=False,
            **settings,
        )
    return output[:, input_ids_BL.shape[1] :]


class _Draw(LogitsProcessor):
    """Leaves each row only the token that it draws from its own seed: a greedy `generate` then samples.

    `generate` itself draws for all rows from one generator, so that a row's draws depend on the rows before it.
    """

    supports_continuous_batching = False

    def __init__(self, seeds: Sequence[int], temperature: float, prompt_length: int, max_new_tokens: int) -> None:
        self.uniform_BL, self.temperature = _uniforms(seeds, max_new_tokens), temperature
        self.prompt_length = prompt_length

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        uniform_B = self.uniform_BL[:, input_ids.shape[1] - self.prompt_length]
        return torch.full_like(scores, -torch.inf).scatter_(1, _drawn(scores, self.temperature, uniform_B), 0.0)


def _uniforms(seeds: Sequence[int], length: int) -> torch.Tensor:
    """Numbers in [0, 1), float64 [B, length]. A row depends on its seed alone; a short row begins a longer one."""
    return torch.from_numpy(np.stack([np.random.default_rng(int(seed) % _SEEDS).random(length) for seed in seeds]))


def _drawn(logits_BK: torch.Tensor, temperature: float, uniform_B: torch.Tensor) -> torch.Tensor:
    """Index [B, 1] where the cumulative probability of softmax(logits / temperature) passes the row's number.

    In float64, so that only logits themselves, and no sum over them, can move a draw.
    """
    logits_BK = logits_BK.double()
    below_max_BK = logits_BK - logits_BK.amax(dim=-1, keepdim=True)  # a tiny temperature cannot overflow
    cumulative_BK = (below_max_BK / temperature).exp().cumsum(dim=-1)
    target_B1 = uniform_B.to(logits_BK.device)[:, None] * cumulative_BK[:, -1:]
    return torch.searchsorted(cumulative_BK, target_B1, right=True)


@contextmanager
def _plain_generation_config(model: Any) -> Iterator[None]:
    """Set the model's own top-k, penalties, forced tokens and the like aside: they bend the distribution over codes."""
    own = model.generation_config
    model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = own


def _fast(
    model: Any,
    input_ids_BL: torch.Tensor,
    attention_mask: torch.Tensor,
    vocabulary: CellVocabulary,
    temperature: float,
    seeds: Sequence[int],
) -> torch.Tensor:
    """Prefill with prompt and opener, then one call a level; returns ids [B, levels + 2]."""
    B, device = len(input_ids_BL), input_ids_BL.device
    uniform_BK = _uniforms(seeds, vocabulary.levels + 1).to(device) if temperature else None
    output_VH, bias_V = model.get_output_embeddings().weight, model.get_output_embeddings().bias
    one_B1 = torch.ones(B, 1, dtype=torch.long, device=device)
    written = [one_B1 * vocabulary.opener]
    new_ids, mask, cache = torch.cat([input_ids_BL, written[0]], dim=1), attention_mask, None
    for level in range(vocabulary.levels):
        mask = torch.cat([mask, one_B1], dim=1)
        positions = (mask.cumsum(dim=1) - 1).clamp_min(0)[:, -new_ids.shape[1] :]
        out = model.get_decoder()(
            input_ids=new_ids, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True
        )
        cache = out.past_key_values
        lo, hi = vocabulary.level_range(level)
        bias_K = None if bias_V is None else bias_V[lo:hi]
        logits_BK = torch.nn.functional.linear(out.last_hidden_state[:, -1], output_VH[lo:hi], bias_K).float()
        if uniform_BK is None:
            code_B1 = logits_BK.argmax(dim=-1, keepdim=True)
        else:
            code_B1 = _drawn(logits_BK, temperature, uniform_BK[:, level + 1])  # `generate` draws the opener first
        new_ids = lo + code_B1
        written.append(new_ids)
    return torch.cat([*written, one_B1 * vocabulary.closer], dim=1)


def _fast_misfit(model: Any) -> str:
    """Why logits of this model are not simply hidden states times the output matrix; empty where they are."""
    head = model.get_output_embeddings()
    if type(head) is not torch.nn.Linear:  # adapters and quantized layers add to, or hide, the weight
        return f"its output layer is a {type(head).__name__}, not a torch.nn.Linear"
    config = model.config.get_text_config()
    for setting in _LOGIT_SETTINGS:
        if getattr(config, setting, None) not in (None, 1, 1.0):
            return f"its {setting} is {getattr(config, setting)}"
    if config.is_encoder_decoder or model.get_decoder() is model:
        return f"{type(model).__name__} has no decoder that stands apart from its output layer"
    missing = {"position_ids", "past_key_values"} - set(inspect.signature(model.get_decoder().forward).parameters)
    return f"its decoder takes no {' and no '.join(sorted(missing))}" if missing else ""
