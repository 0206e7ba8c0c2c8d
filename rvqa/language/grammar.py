"""The grammar of cell spans: one table that says what a language model may write next, on the device and on the host.

With 8 levels there are 13 states. `LEVEL_0 + m` waits for a code of level m; `LEVEL_0 + levels` waits for the closer::

    state          may write                            then
    PLAIN          text, stop                           outside
    TEXT           text, stop | opener                  outside | LEVEL_0
    OPEN           opener                               LEVEL_0
    END            stop                                 outside
    LEVEL_0 + m    a code of level m                    LEVEL_0 + m + 1
    .. + levels    the closer                           outside

    mode           outside                              output
    free           TEXT                                 text with whole spans in it
    text           PLAIN                                no cell tokens at all
    one_cell       OPEN, after the span END             exactly one span, then stop
    n_cells        OPEN, after n spans END              exactly n spans, then stop
    choice         LEAVE                                one of the given answers, then stop (`mask_choices_`)

A span opens only if it can close within the budget: with fewer tokens left, TEXT becomes PLAIN and OPEN becomes END. An
answer is offered only if it fits, too.

The state is a pure function of what was written so far (the prompt is not part of it) and of the budget: of the last
`span_length` ids in mode free, of the output's length alone in one_cell and n_cells, of the whole output in choice. It
is never kept from step to step, so engines may preempt, replay or reorder requests. What a state may write is always
the ids inside one window [lo, hi), or all ids outside one: masks need no bit sets.

Legend: B rows (any leading shape), K = span_length ids, V vocabulary, S states, A answers of up to D ids.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal, NamedTuple, get_args

import torch

from rvqa.errors import InputError
from rvqa.io.json_text import shown
from rvqa.language.vocabulary import CellVocabulary

Mode = Literal["free", "text", "one_cell", "n_cells", "choice"]

PLAIN, TEXT, OPEN, END, LEVEL_0 = range(5)

LEAVE = -1
"""State of a row that `apply_mask_` leaves alone."""

# Token classes are the kinds of CellVocabulary (0 opener, m + 1 code of level m, levels + 1 closer) and these two.
TEXT_TOKEN, STOP_TOKEN, OPENER_TOKEN = -1, -2, 0

ABSENT = -2
"""Stands in the ids that `states` reads where an output is still shorter than `span_length`; never a token's id."""

# What an output must hold, as a number: how many cells, exactly; or one of these two.
ANY_CELLS, CHOICE = -1, -2

_MOST_CELLS = 2**40
# What strangers may ask for: choices, and choices times bytes of the longest.
_MOST_CHOICES, _MOST_BYTES = 2**10, 2**16

_OUTSIDE = -1  # in the table: the state outside a span, which the mode decides


@dataclass(frozen=True)
class Rule:
    """What one output must be: a mode and what belongs to it.

    Raises
    ------
    InputError
        An unknown mode, a number of cells that is none, choices that are not different texts with something in them,
        or either with a mode that takes none.
    """

    mode: Mode = "free"
    n_cells: int | None = None
    """Number of spans, with n_cells."""
    choices: tuple[str, ...] | None = None
    """Answers as text, with choice; they follow the prompt as they stand, a leading space included."""

    def __post_init__(self) -> None:
        if self.mode not in get_args(Mode):
            raise InputError(f"There is no mode {shown(self.mode)}; expected one of {', '.join(get_args(Mode))}.")
        if (self.n_cells is not None) != (self.mode == "n_cells") or (self.choices is not None) != (
            self.mode == "choice"
        ):
            raise InputError(
                f"Mode {self.mode!r} came with n_cells={shown(self.n_cells)} and choices={shown(self.choices)}; "
                'n_cells goes with mode "n_cells", choices with mode "choice".'
            )
        n = self.n_cells
        if n is not None and (not isinstance(n, int) or isinstance(n, bool) or not 1 <= n <= _MOST_CELLS):
            raise InputError(f"n_cells is {shown(n)}; expected a whole number of cells, 1 or more.")
        if self.choices is not None:
            texts = self.choices
            if len(texts) > _MOST_CHOICES:
                raise InputError(f"There are {len(texts):,} choices; expected at most {_MOST_CHOICES:,}.")
            if not texts or not all(isinstance(text, str) and text for text in texts) or len(set(texts)) < len(texts):
                raise InputError(f"choices are {shown(texts)}; expected texts, each different and none empty.")
            try:
                longest = max(len(text.encode()) for text in texts)
            except UnicodeEncodeError as error:
                raise InputError(f"choices cannot be written as UTF-8: {error}.") from error
            if len(texts) * longest > _MOST_BYTES:
                raise InputError(
                    f"There are {len(texts):,} choices of up to {longest:,} bytes; expected at most {_MOST_BYTES:,} "
                    "bytes as number times longest."
                )

    @classmethod
    def from_options(cls, options: Mapping[str, Any] | None) -> Rule:
        """Read `rvqa_mode`, `rvqa_n_cells` and `rvqa_choices` of a request's options; others are not ours.

        Raises
        ------
        InputError
            As for the class, and another option that begins with `rvqa`.
        """
        ours = {key: value for key, value in (options or {}).items() if str(key).startswith("rvqa")}
        known = ("rvqa_mode", "rvqa_n_cells", "rvqa_choices")
        odd = sorted(set(ours) - set(known))
        if odd:
            raise InputError(f"There is no option {shown(odd[0])}; expected {', '.join(known)}.")
        choices = ours.get("rvqa_choices")
        if choices is not None and not isinstance(choices, list | tuple):
            raise InputError(f"rvqa_choices is {shown(choices)}; expected a list of texts.")
        return cls(
            ours.get("rvqa_mode", "free"),
            ours.get("rvqa_n_cells"),
            None if choices is None else tuple(choices),
        )

    def options(self) -> dict[str, Any]:
        """Options of a request that `from_options` reads: values that JSON knows."""
        named = {"rvqa_mode": self.mode, "rvqa_n_cells": self.n_cells, "rvqa_choices": self.choices and [*self.choices]}
        return {key: value for key, value in named.items() if value is not None}

    @property
    def cells(self) -> int:
        """The rule as a number: how many cells, ANY_CELLS, or CHOICE."""
        fixed = {"free": ANY_CELLS, "text": 0, "one_cell": 1, "choice": CHOICE}
        return fixed[self.mode] if self.n_cells is None else self.n_cells

    @property
    def ends(self) -> bool:
        """Whether the grammar decides when the output ends."""
        return self.cells > 0 or self.cells == CHOICE


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
    vocabulary: CellVocabulary, rule: Rule, *, max_new_tokens: int | None = None, stop_ids: Sequence[int] = ()
) -> int | None:
    """Return the stop id of a request (the first of `stop_ids`, or None), or raise InputError if it cannot be served.

    That is a stop id that is a cell token, a budget too small for the rule's cells, and a rule that ends outputs, with
    room for a stop id but none to write.
    """
    stop_id = int(stop_ids[0]) if len(stop_ids) else None
    windows(vocabulary, stop_id=stop_id)
    require_budget(rule, max_new_tokens, vocabulary.span_length)
    if rule.ends and stop_id is None and max_new_tokens != rule.cells * vocabulary.span_length:
        enough = f", or set max_new_tokens={rule.cells * vocabulary.span_length}" if rule.cells > 0 else ""
        raise InputError(
            f"There is no end token to write after the output of mode {rule.mode!r}. Name the model's end tokens "
            f"(generation_config.eos_token_id){enough}."
        )
    return stop_id


def require_budget(rule: Rule, max_new_tokens: int | None, span_length: int) -> None:
    """Raise InputError where a rule's cells do not fit in a budget."""
    need = max(rule.cells, 0) * span_length
    if max_new_tokens is not None and max_new_tokens < need:
        what = "a cell" if rule.cells == 1 else f"{rule.cells} cells"
        raise InputError(f"max_new_tokens={max_new_tokens} cannot hold {what}; expected {need} or more.")


# ---- on the device -------------------------------------------------------------------------------------------------


def states(
    last_ids: torch.Tensor,
    vocabulary: CellVocabulary,
    cells: int | torch.Tensor,
    *,
    length: int | torch.Tensor | None = None,
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
    cells
        `Rule.cells` of each row: one number, or integers [...]. Rows of CHOICE get LEAVE.
    length
        How many ids each output has: one number, or integers [...]. Counted in `last_ids` where None, which then must
        hold whole outputs, or rows of modes free and text.
    remaining
        How many tokens may still be written, the next one included: one number, or integers [...]. None: no limit.

    Returns
    -------
    int64 [...]: PLAIN, TEXT, OPEN, END, LEVEL_0 + m, or LEAVE.
    """
    K, device = vocabulary.span_length, last_ids.device
    cells = on_device(device, cells)
    length = (last_ids != ABSENT).sum(-1) if length is None else on_device(device, length)
    ids = torch.nn.functional.pad(last_ids[..., -K:], (max(K - last_ids.shape[-1], 0), 0), value=ABSENT).long()

    opens = length < K * cells
    if remaining is not None:
        opens = opens & (
            length < (length + on_device(device, remaining)) // K * K
        )  # as many cells as fit into the whole budget
    outside = torch.where(cells > 0, torch.where(opens, OPEN, END), torch.where(cells == ANY_CELLS, TEXT, PLAIN))
    if remaining is not None:
        outside = torch.where((on_device(device, remaining) < K) & (outside == TEXT), PLAIN, outside)
    # In a span, the kinds of its tokens count up from 0 at the opener to the last token's: 0, 1, ..., m.
    kinds = vocabulary.kinds(ids)
    last = kinds[..., -1]
    expected = last[..., None] - torch.arange(K - 1, -1, -1, device=ids.device)
    spelled = (last >= 0) & (last <= vocabulary.levels) & ((expected < 0) | (kinds == expected)).all(dim=-1)
    place = length % K  # where spans follow each other from the start
    inside = torch.where(cells > 0, opens & (place > 0), spelled & (cells == ANY_CELLS))
    state = torch.where(inside, LEVEL_0 + torch.where(cells > 0, place - 1, last), outside)
    return torch.where(cells == CHOICE, LEAVE, state)


def on_device(device: torch.device, value: int | torch.Tensor) -> torch.Tensor:
    """A number as a tensor that is filled on the device: nothing is copied there."""
    return value if isinstance(value, torch.Tensor) else torch.full((), value, device=device)


# ---- on the host ---------------------------------------------------------------------------------------------------


def token_class(token_id: int, vocabulary: CellVocabulary, *, stop_id: int | None = None) -> int:
    """Class of one id: STOP_TOKEN, TEXT_TOKEN, or its kind in the vocabulary."""
    return STOP_TOKEN if token_id == stop_id else vocabulary.kinds(token_id)


def outside(cells: int, length: int, levels: int, *, max_new_tokens: int | None = None) -> int:
    """State outside a span, after `length` ids of an output that must hold `cells` cells."""
    K = levels + 2
    if cells > 0:
        fit = cells if max_new_tokens is None else min(cells, max_new_tokens // K)
        return OPEN if length < fit * K else END
    short = max_new_tokens is not None and max_new_tokens - length < K
    return TEXT if cells == ANY_CELLS and not short else PLAIN


def step(
    state: int, token_class: int, cells: int, *, length: int, levels: int, max_new_tokens: int | None = None
) -> int:
    """Next state by the table, where the output has `length` ids with this token.

    With a number of cells the place is counted, whatever was written. Else, after a token that the state may not write,
    reading begins anew, as `states` sees it: outside the span, and at an opener (mode free) in a new one.
    """
    later = outside(cells, length, levels, max_new_tokens=max_new_tokens)
    place = length % (levels + 2)
    if cells > 0:
        return LEVEL_0 + place - 1 if later == OPEN and place else later
    rows = table(levels)
    after = rows[state if token_class in rows[state] else outside(cells, 0, levels)].get(token_class, _OUTSIDE)
    return later if after == _OUTSIDE else after


def trace(
    ids: Iterable[int],
    vocabulary: CellVocabulary,
    cells: int,
    *,
    stop_id: int | None = None,
    max_new_tokens: int | None = None,
) -> list[int]:
    """States before each id of an output and after its last one, step by step: the plain form of `states`."""
    levels = vocabulary.levels
    state = outside(cells, 0, levels, max_new_tokens=max_new_tokens)
    trail = [state]
    for length, token_id in enumerate(ids, start=1):
        kind = token_class(token_id, vocabulary, stop_id=stop_id)
        state = step(state, kind, cells, length=length, levels=levels, max_new_tokens=max_new_tokens)
        trail.append(state)
    return trail


def is_valid_output(
    ids: Sequence[int],
    rule: Rule,
    vocabulary: CellVocabulary,
    *,
    stop_ids: Sequence[int] = (),
    answers: Collection[Sequence[int]] = (),
) -> bool:
    """Whether an output could have been written under a rule, whole: every token allowed, no span left open.

    Parameters
    ----------
    ids
        Ids of the output, prompt excluded. What follows the first stop id is padding and is not read.
    rule
        What the output must be. After its cells or its answer the stop id may be missing, as where the budget ended.
    vocabulary
        Where the cell tokens lie.
    stop_ids
        End tokens; the first is the one that END writes.
    answers
        Ids of the answers of mode choice.
    """
    stop_id = stop_ids[0] if len(stop_ids) else None
    written = [int(token_id) for token_id in ids]
    ends = [position for position, token_id in enumerate(written) if token_id in stop_ids]
    written = written[: ends[0] + 1] if ends else written
    if rule.cells == CHOICE:
        return (written[:-1] if written[-1:] == [stop_id] else written) in [list(answer) for answer in answers]
    trail = trace(written, vocabulary, rule.cells, stop_id=stop_id)
    rows = table(vocabulary.levels)
    classes = (token_class(token_id, vocabulary, stop_id=stop_id) for token_id in written)
    allowed = all(token_class in rows[state] for state, token_class in zip(trail, classes, strict=False))
    return allowed and trail[-1] == (END if rule.cells > 0 else outside(rule.cells, 0, vocabulary.levels))
