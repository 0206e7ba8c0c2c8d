"""The grammar's masks on logits."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch

from rvqa.errors import InputError
from rvqa.kernels import ops, reference
from rvqa.language.grammar import ABSENT, on_device, windows
from rvqa.language.vocabulary import CellVocabulary


def apply_mask_(
    logits: torch.Tensor, states: torch.Tensor, vocabulary: CellVocabulary, *, stop_id: int | None = None
) -> torch.Tensor:
    """Set the logits of ids that a state may not write to -inf, in place.

    Parameters
    ----------
    logits
        Floating point [..., V], V > `vocabulary.closer`; with a gradient, too.
    states
        int64 [...], from `states`.
    vocabulary
        Where the cell tokens lie.
    stop_id
        The id that END writes, as for `windows`.

    Returns
    -------
    The same `logits`.
    """
    V = logits.shape[-1]
    if vocabulary.closer >= V:
        raise InputError(
            f"Logits have {V} columns, but the cell tokens reach id {vocabulary.closer}. "
            "Give the model rows for them with rvqa.language.rows.install_rows."
        )
    apply = reference.apply_span_mask_ if logits.requires_grad else ops.apply_span_mask_
    apply(logits.view(-1, V), states.reshape(-1), _window_tensor(vocabulary, stop_id, logits.device))
    return logits


@lru_cache(maxsize=16)
def _window_tensor(vocabulary: CellVocabulary, stop_id: int | None, device: torch.device) -> torch.Tensor:
    """Put the windows on a device once, int64 [S, 3], so that steps copy nothing from the host."""
    with torch.inference_mode(mode=False):
        return torch.tensor([list(map(int, window)) for window in windows(vocabulary, stop_id=stop_id)], device=device)


def answer_tensor(answers: Sequence[Sequence[int]], stop_id: int, device: torch.device | str = "cpu") -> torch.Tensor:
    """Ids of answers, each with the stop id behind it, int64 [A, D]; ABSENT fills shorter ones."""
    rows = [torch.tensor([*answer, stop_id]) for answer in answers]
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=ABSENT).to(device)


def mask_choices_(
    logits: torch.Tensor,
    ids: torch.Tensor,
    length: int | torch.Tensor,
    answers: torch.Tensor,
    stop_id: int,
    *,
    remaining: int | torch.Tensor | None = None,
) -> torch.Tensor:
    """Leave only the ids with which an output can go on to be one of the answers, in place: their token trie.

    Without a host synchronisation. Where no answer fits what was written and the budget, only the stop id is left.

    Parameters
    ----------
    logits
        Floating point [B, V].
    ids
        Outputs from their first id on, int64 [B, L]; what stands behind `length` is not read. More than D ids of a row
        are not needed.
    length
        How many ids each output has: one number, or integers [B].
    answers
        From `answer_tensor`, int64 [A, D].
    stop_id
        The id that ends an answer; it may be missing where the budget ends.
    remaining
        How many tokens may still be written, the next one included: one number, or integers [B]. None: no limit.

    Returns
    -------
    The same `logits`.
    """

    def column(value: int | torch.Tensor) -> torch.Tensor:
        return on_device(logits.device, value).expand(len(logits))[:, None]

    A, D = answers.shape
    length = column(length)
    L = min(ids.shape[1], D)
    written_AL = answers[:, :L]
    agrees_BAL = (ids[:, None, :L] == written_AL) | (torch.arange(L, device=ids.device) >= length[..., None])
    size_A = (answers != ABSENT).sum(-1)  # with the stop id
    possible_BA = agrees_BAL.all(-1) & (length < size_A)
    if remaining is not None:
        possible_BA &= size_A - 1 - length <= column(remaining)
    next_BA = (
        answers[None].expand(len(logits), A, D).gather(2, length.clamp(max=D - 1).expand(-1, A)[..., None])[..., 0]
    )
    next_BA = next_BA.clamp_min(0)
    kept_BA = logits.gather(1, next_BA).masked_fill(~possible_BA, -torch.inf)
    stop_B = logits[:, stop_id].masked_fill(possible_BA.any(1), -torch.inf)
    logits.fill_(-torch.inf)
    logits.scatter_reduce_(1, next_BA, kept_BA, "amax")
    logits[:, stop_id] = torch.maximum(logits[:, stop_id], stop_B)
    return logits
