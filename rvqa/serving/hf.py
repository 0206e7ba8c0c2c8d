"""Cells written by Hugging Face models: the grammar as a logits processor, and ten forced-window tokens done fast.

`CellSpanLogitsProcessor` is a thin adapter of `rvqa.grammar` for `model.generate`. `generate_cells` writes one cell a
prompt; its fast path runs the model on the 8 free positions only (opener and closer are known) and multiplies the last
hidden state with the 32 output rows of the level at hand, `hidden_BH @ W[lo:hi].T`, instead of all 151,936.

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

from rvqa import grammar
from rvqa.errors import InputError
from rvqa.vocabulary import CellVocabulary, require_rows

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Settings with which a model changes logits after its output matrix; the fast path knows none of them.
_LOGIT_SETTINGS = ("final_logit_softcapping", "logit_scale", "logits_scaling", "lm_head_multiplier")


class CellSpanLogitsProcessor(LogitsProcessor):
    """Holds `model.generate` to the grammar of cell spans.

    Put it last among your logits processors. Options that ban the end token (`min_new_tokens`) contradict one_cell.

    Parameters
    ----------
    vocabulary
        Where the cell tokens lie.
    mode
        "free" (text with whole spans), "text" (no cell tokens) or "one_cell" (one span, then stop).
    prompt_length
        Number of columns of `input_ids` that are prompt, padding included; spans in the prompt do not matter.
    max_new_tokens
        The same number as given to `generate`: no span opens that could not close.
    stop_ids
        The model's end tokens (`generation_config.eos_token_id`); one_cell forces the first after its span.

    Raises
    ------
    InputError
        An unknown mode, or one_cell with a budget too small for a span or with room after it but no end token.
    """

    supports_continuous_batching = False

    def __init__(
        self,
        vocabulary: CellVocabulary,
        mode: grammar.Mode,
        *,
        prompt_length: int,
        max_new_tokens: int,
        stop_ids: Sequence[int] | int = (),
    ) -> None:
        stop_ids = (stop_ids,) if isinstance(stop_ids, int) else tuple(stop_ids)
        self.stop_id = grammar.check_request(vocabulary, mode, max_new_tokens=max_new_tokens, stop_ids=stop_ids)
        self.vocabulary = vocabulary
        self.mode = mode
        self.prompt_length = prompt_length
        self.max_new_tokens = max_new_tokens

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Masked copy of `scores` [B, V], given prompts and outputs `input_ids` int64 [B, L]."""
        output_BL = input_ids[:, self.prompt_length :]
        remaining = self.max_new_tokens - output_BL.shape[1]
        last_BK = output_BL[:, -self.vocabulary.span_length :]
        states_B = grammar.states(last_BK, self.vocabulary, self.mode, remaining=remaining)
        return grammar.apply_mask_(scores.clone(), states_B, self.vocabulary, stop_id=self.stop_id)


def generate_cells(
    model: PreTrainedModel,
    input_ids_BL: torch.Tensor,
    attention_mask: torch.Tensor | None,
    vocabulary: CellVocabulary,
    *,
    temperature: float = 0.0,
    seed: int = 0,
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
        Seed of the draws. The global random state is as before afterwards. Engines draw different numbers.
    engine
        "fast": 8 model calls and 32 output rows each. "generate": `model.generate` with `CellSpanLogitsProcessor`.
        "auto": fast where it is exact, that is, where logits are hidden states times a plain output matrix.

    Returns
    -------
    Codes, uint8 [B, levels].

    Raises
    ------
    InputError
        Empty or right-padded prompts, a negative temperature, no rows for the cell tokens, or "fast" on a model that it
        does not fit.
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
    require_rows(model, vocabulary)
    misfit = _fast_misfit(model)
    if engine == "fast" and misfit:
        raise InputError(f'The fast path does not fit this model: {misfit}. Use engine="auto" or "generate".')
    write = _fast if engine == "fast" or (engine == "auto" and not misfit) else _generate
    with torch.no_grad():
        ids_BK = write(model, input_ids_BL, attention_mask.long(), vocabulary, temperature, seed)
    return vocabulary.codes(ids_BK.cpu().numpy())


def _generate(
    model: Any,
    input_ids_BL: torch.Tensor,
    attention_mask: torch.Tensor,
    vocabulary: CellVocabulary,
    temperature: float,
    seed: int,
) -> torch.Tensor:
    """`model.generate` in mode one_cell: the plain form of `_fast`, for any model and any logit settings."""
    L = input_ids_BL.shape[1]
    processor = CellSpanLogitsProcessor(vocabulary, "one_cell", prompt_length=L, max_new_tokens=vocabulary.span_length)
    sampling = {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature else {"do_sample": False}
    devices = [input_ids_BL.device] if input_ids_BL.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), _plain_generation_config(model):
        torch.manual_seed(seed)
        output = model.generate(
            input_ids_BL,
            attention_mask=attention_mask,
            logits_processor=LogitsProcessorList([processor]),
            max_new_tokens=vocabulary.span_length,
            **sampling,
        )
    return output[:, L:]


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
    seed: int,
) -> torch.Tensor:
    """Prefill with prompt and opener, then one call a level; returns ids [B, levels + 2]."""
    B, device = len(input_ids_BL), input_ids_BL.device
    generator = torch.Generator(device).manual_seed(seed)
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
        if temperature:
            below_max_BK = logits_BK - logits_BK.amax(dim=-1, keepdim=True)  # a tiny temperature cannot overflow
            code_B1 = torch.multinomial((below_max_BK / temperature).softmax(dim=-1), 1, generator=generator)
        else:
            code_B1 = logits_BK.argmax(dim=-1, keepdim=True)
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
