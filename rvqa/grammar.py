"""The grammar of cell spans: one table that says what a language model may write next, on the device and on the host.

With 8 levels there are 13 states. `LEVEL_0 + m` waits for a code of level m; `LEVEL_0 + levels` waits for the closer::

    state          may write                            then
    PLAIN          text, stop                           outside
    TEXT           text, stop | opener                  outside | LEVEL_0
    OPEN           opener                               LEVEL_0
    END            stop                                 outside
    LEVEL_0 + m    a code of level m                    LEVEL_0 + m + 1
    .. + levels    the closer                           outside

    mode           outside, nothing written yet         outside, later
    free           TEXT                                 TEXT         text with whole spans in it
    text           PLAIN                                PLAIN        no cell tokens at all
    one_cell       OPEN                                 END          exactly one span, then stop

A span opens only if it can close within the remaining tokens: with fewer left, TEXT becomes PLAIN and OPEN becomes END.

The state is a pure function of the ids written so far (the prompt is not among them) and of the budget; the last
`span_length` ids are enough. It is never kept from step to step, so engines may preempt, replay or reorder requests.
What a state may write is always the ids inside one window [lo, hi), or all ids outside one: masks need no bit sets.

Legend: B rows (any leading shape), K = span_length ids, V vocabulary, S states.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Literal, NamedTuple

import torch

from rvqa.errors import InputError
from rvqa.vocabulary import CellVocabulary

Mode = Literal["free", "text", "one_cell"]

PLAIN, TEXT, OPEN, END, LEVEL_0 = range(5)

# Token classes are the kinds of CellVocabulary (0 opener, m + 1 code of level m, levels + 1 closer) and these two.
TEXT_TOKEN, STOP_TOKEN, OPENER_TOKEN = -1, -2, 0

# Stands in the ids that `states` reads where an output is still shorter than `span_length`; never a token's id.
ABSENT = -2

_OUTSIDE = -1  # in the table: the state outside a span, which the mode decides
_MODES: dict[str, tuple[int, int]] = {"free": (TEXT, TEXT), "text": (PLAIN, PLAIN), "one_cell": (OPEN, END)}
_SHORT = {TEXT: PLAIN, OPEN: END}  # what becomes of a state when a span would no longer fit


class Window(NamedTuple):
    """What a state may write: ids in [lo, hi) where `inside`, all other ids where not."""

    lo: int
    hi: int
    inside: bool


@lru_cache(maxsize=8)
def table(levels: int) -> tuple[dict[int, int], ...]:
    """Return the automaton: for each state, the token classes it may write and the states they lead to."""
    spans = [{m + 1: LEVEL_0 + m + 1} for m in range(levels)]
    return (
        {TEXT_TOKEN: _OUTSIDE, STOP_TOKEN: _OUTSIDE},
        {TEXT_TOKEN: _OUTSIDE, STOP_TOKEN: _OUTSIDE, OPENER_TOKEN: LEVEL_0},
        {OPENER_TOKEN: LEVEL_0},
        {STOP_TOKEN: _OUTSIDE},
        *spans,
        {levels + 1: _OUTSIDE},
    )


@lru_cache(maxsize=64)
def windows(vocabulary: CellVocabulary, *, stop_id: int | None = None) -> tuple[Window, ...]:
    """List what every state may write, in the order of states: the table put on a vocabulary's ids.

    Parameters
    ----------
    vocabulary
        Where the cell tokens lie.
    stop_id
        The id that END writes. It is one id, so that the token is forced, where a model has several end tokens; the
        others count as text. None where END is never reached; it then allows nothing.
    """
    cells = Window(vocabulary.opener, vocabulary.closer + 1, inside=False)
    if stop_id is not None and vocabulary.kinds(stop_id) >= 0:
        raise InputError(f"The stop id {stop_id} is a cell token; expected an end token of the language model.")
    stop = (0, 0) if stop_id is None else (stop_id, stop_id + 1)
    ids = {
        STOP_TOKEN: stop,
        OPENER_TOKEN: (vocabulary.opener, vocabulary.opener + 1),
        **{m + 1: vocabulary.level_range(m) for m in range(vocabulary.levels)},
        vocabulary.levels + 1: (vocabulary.closer, vocabulary.closer + 1),
    }
    result = []
    for row in table(vocabulary.levels):
        if TEXT_TOKEN in row:
            result.append(cells._replace(lo=cells.lo + 1) if OPENER_TOKEN in row else cells)
        else:
            (token_class,) = row
            result.append(Window(*ids[token_class], inside=True))
    return tuple(result)


def check_request(
    vocabulary: CellVocabulary, mode: Mode, *, max_new_tokens: int | None = None, stop_ids: Sequence[int] = ()
) -> int | None:
    """Return the stop id of a request (the first of `stop_ids`, or None), or raise InputError if it cannot be served.

    That is a mode that does not exist, a stop id that is a cell token, and one_cell with a budget too small for a span
    or with room after the span but no stop id to write there.
    """
    _outside(mode)
    stop_id = int(stop_ids[0]) if len(stop_ids) else None
    windows(vocabulary, stop_id=stop_id)
    if mode == "one_cell":
        if max_new_tokens is not None and max_new_tokens < vocabulary.span_length:
            raise InputError(
                f"max_new_tokens={max_new_tokens} cannot hold a cell; expected {vocabulary.span_length} or more."
            )
        if max_new_tokens != vocabulary.span_length and stop_id is None:
            raise InputError(
                "There is no end token to write after the cell. Name the model's end tokens "
                f"(generation_config.eos_token_id), or set max_new_tokens={vocabulary.span_length}."
            )
    return stop_id


# ---- on the device -------------------------------------------------------------------------------------------------


def states(
    last_ids: torch.Tensor,
    vocabulary: CellVocabulary,
    mode: Mode,
    *,
    remaining: int | torch.Tensor | None = None,
) -> torch.Tensor:
    """State of each row after its last ids, vectorised and without a host synchronisation.

    Parameters
    ----------
    last_ids
        The last ids of each output, integers [..., k]: right-aligned, prompt excluded. k is `span_length` or more, with
        ABSENT on the left of shorter outputs; fewer columns say that the whole output has k ids.
    vocabulary
        Where the cell tokens lie.
    mode
        "free", "text" or "one_cell".
    remaining
        How many tokens may still be written, the next one included: one number, or integers [...]. None: no limit.

    Returns
    -------
    int64 [...]: PLAIN, TEXT, OPEN, END, or LEVEL_0 + m.
    """
    start, later = _outside(mode)
    K = vocabulary.span_length
    ids = torch.nn.functional.pad(last_ids[..., -K:], (max(K - last_ids.shape[-1], 0), 0), value=ABSENT).long()
    outside = torch.where(ids[..., -1] == ABSENT, start, later)
    if remaining is not None:
        short = torch.where(ids[..., -1] == ABSENT, _SHORT.get(start, start), _SHORT.get(later, later))
        if isinstance(remaining, torch.Tensor):
            outside = torch.where(remaining < K, short, outside)
        elif remaining < K:
            outside = short
    if mode == "text":
        return outside
    # In a span, the kinds of its tokens count up from 0 at the opener to the last token's: 0, 1, ..., m.
    kinds = vocabulary.kinds(ids)
    last = kinds[..., -1]
    expected = last[..., None] - torch.arange(K - 1, -1, -1, device=ids.device)
    agrees = (expected < 0) | (kinds == expected)
    if mode == "one_cell":  # the one span is the output's first token
        agrees &= (expected != -1) | (ids == ABSENT)
    in_span = (last >= 0) & (last <= vocabulary.levels) & agrees.all(dim=-1)
    return torch.where(in_span, LEVEL_0 + last, outside)


def apply_mask_(
    logits: torch.Tensor, states: torch.Tensor, vocabulary: CellVocabulary, *, stop_id: int | None = None
) -> torch.Tensor:
    """Set the logits of ids that a state may not write to -inf, in place.

    Parameters
    ----------
    logits
        Floating point [..., V], V > `vocabulary.closer`.
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
            "Give the model rows for them with rvqa.vocabulary.install_rows."
        )
    lo_S, hi_S, inside_S = _window_tensors(vocabulary, stop_id, logits.device)
    ids_V = torch.arange(V, device=logits.device)
    within = (ids_V >= lo_S[states][..., None]) & (ids_V < hi_S[states][..., None])
    return logits.masked_fill_(within != inside_S[states][..., None], -torch.inf)


@lru_cache(maxsize=16)
def _window_tensors(
    vocabulary: CellVocabulary, stop_id: int | None, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Put the windows on a device once, so that steps copy nothing from the host."""
    with torch.inference_mode(mode=False):
        columns = zip(*windows(vocabulary, stop_id=stop_id), strict=True)
        lo_S, hi_S, inside_S = (torch.tensor(column, device=device) for column in columns)
    return lo_S, hi_S, inside_S


# ---- on the host ---------------------------------------------------------------------------------------------------


def token_class(token_id: int, vocabulary: CellVocabulary, *, stop_id: int | None = None) -> int:
    """Class of one id: STOP_TOKEN, TEXT_TOKEN, or its kind in the vocabulary."""
    return STOP_TOKEN if token_id == stop_id else vocabulary.kinds(token_id)


def step(state: int, token_class: int, mode: Mode, *, levels: int) -> int:
    """Next state by the table, without a budget. After a token that the state may not write, reading begins anew.

    "Anew" is what `states` sees, too: outside the span, and at an opener (mode free) in a new one.
    """
    _, later = _outside(mode)
    rows = table(levels)
    after = rows[state if token_class in rows[state] else later].get(token_class, _OUTSIDE)
    return later if after == _OUTSIDE else after


def trace(
    ids: Iterable[int],
    vocabulary: CellVocabulary,
    mode: Mode,
    *,
    stop_id: int | None = None,
    max_new_tokens: int | None = None,
) -> list[int]:
    """States before each id of an output and after its last one, step by step: the plain form of `states`."""
    state, _ = _outside(mode)
    trail = [state]
    for token_id in ids:
        state = step(state, token_class(token_id, vocabulary, stop_id=stop_id), mode, levels=vocabulary.levels)
        trail.append(state)
    if max_new_tokens is None:
        return trail
    last_start = max_new_tokens - vocabulary.span_length
    return [_SHORT.get(state, state) if position > last_start else state for position, state in enumerate(trail)]


def is_valid_output(
    ids: Sequence[int],
    mode: Mode,
    vocabulary: CellVocabulary,
    *,
    stop_ids: Sequence[int] = (),
) -> bool:
    """Whether an output could have been written under the grammar, whole: every token allowed, no span left open.

    Parameters
    ----------
    ids
        Ids of the output, prompt excluded. What follows the first stop id is padding and is not read.
    mode
        "free", "text" or "one_cell". The latter wants its one span; the stop id after it may be missing, as where the
        budget ended.
    vocabulary
        Where the cell tokens lie.
    stop_ids
        End tokens; the first is the one that END writes.
    """
    stop_id = stop_ids[0] if len(stop_ids) else None
    written = [int(token_id) for token_id in ids]
    ends = [position for position, token_id in enumerate(written) if token_id in stop_ids]
    written = written[: ends[0] + 1] if ends else written
    trail = trace(written, vocabulary, mode, stop_id=stop_id)
    rows = table(vocabulary.levels)
    classes = (token_class(token_id, vocabulary, stop_id=stop_id) for token_id in written)
    allowed = all(token_class in rows[state] for state, token_class in zip(trail, classes, strict=False))
    return allowed and trail[-1] == _outside(mode)[1]


def _outside(mode: str) -> tuple[int, int]:
    if mode not in _MODES:
        raise InputError(f"There is no mode {mode!r}; expected one of {', '.join(_MODES)}.")
    return _MODES[mode]
