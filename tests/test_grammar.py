"""The span automaton: the table, the vectorised states, the masks and a regular expression all say the same.

Outputs are written here as letters: t text, e the end token, o opener, 0-7 a code of that level, c closer.
"""

import re
from itertools import product

import numpy as np
import pytest
import torch

from rvqa import grammar
from rvqa.errors import InputError
from rvqa.vocabulary import CellVocabulary

CELL = CellVocabulary(20)  # ids 20 .. 277, as in a model of 290 rows
SMALL = CellVocabulary(6, levels=2, entries=3)  # ids 6 .. 13: spans are o01c
END_ID, ROWS = 3, 290
MODES = ("free", "text", "one_cell")
STATES = 5 + 8


def letters(vocabulary):
    return "teo" + "".join(map(str, range(vocabulary.levels))) + "c"


def an_id(letter, vocabulary, code=0):
    fixed = {"t": 1, "e": END_ID, "o": vocabulary.opener, "c": vocabulary.closer}
    return fixed[letter] if letter in fixed else vocabulary.code_id(int(letter), code)


def letter_of(token_id, vocabulary):
    if token_id == END_ID:
        return "e"
    kind = vocabulary.kinds(token_id)
    return "t" if kind < 0 else "o" if kind == 0 else "c" if kind > vocabulary.levels else str(kind - 1)


def class_of(letter, vocabulary):
    return grammar.token_class(an_id(letter, vocabulary), vocabulary, stop_id=END_ID)


def may_go_on(text, mode, vocabulary):
    """Whether some whole output begins with these letters: the grammar once more, as a regular expression."""
    codes = "".join(map(str, range(vocabulary.levels)))
    part = "(?:o" + "".join(f"(?:{code}" for code in codes) + ")?" * len(codes) + ")?"
    pattern = {"text": "[te]*", "free": f"(?:[te]|o{codes}c)*{part}", "one_cell": f"{part}|o{codes}ce*"}
    return re.fullmatch(pattern[mode], text) is not None


def still_needed(text, vocabulary):
    """Tokens that an output must still write to close its last span."""
    last = text.rfind("o")
    return 0 if last < 0 or "c" in text[last:] else vocabulary.span_length - (len(text) - last)


def written(states, vocabulary, rows=ROWS):
    """Which ids the mask leaves in each of the states: bool [.., rows]."""
    logits = torch.zeros(*states.shape, rows)
    assert grammar.apply_mask_(logits, states, vocabulary, stop_id=END_ID) is logits
    assert set(logits.unique().tolist()) <= {0.0, -np.inf}
    return logits == 0


def states_along(ids, vocabulary, mode, budget=None):
    """Vectorised states before each id of each row and after the last one: int [B, L + 1]."""
    K = vocabulary.span_length
    padded = torch.nn.functional.pad(torch.as_tensor(ids), (K, 0), value=grammar.ABSENT)
    last_BLK = padded.unfold(-1, K, 1)
    remaining = None if budget is None else budget - torch.arange(last_BLK.shape[1])
    return grammar.states(last_BLK, vocabulary, mode, remaining=remaining)


# ---- every state and every token class -----------------------------------------------------------------------------


def test_every_state_and_token_class():
    """The table, spelled out a second time as state -> letters."""
    may = {grammar.PLAIN: "te", grammar.TEXT: "teo", grammar.OPEN: "o", grammar.END: "e"}
    may |= {grammar.LEVEL_0 + m: str(m) for m in range(8)} | {grammar.LEVEL_0 + 8: "c"}
    assert len(may) == STATES == len(grammar.table(8)) == len(grammar.windows(CELL))
    allowed = written(torch.arange(STATES), CELL)
    for state, token_id in product(range(STATES), range(ROWS)):
        letter = letter_of(token_id, CELL)
        assert allowed[state, token_id] == (letter in may[state])
        assert (class_of(letter, CELL) in grammar.table(8)[state]) == (letter in may[state])


def test_steps_of_every_state_and_token_class():
    outside = {"free": grammar.TEXT, "text": grammar.PLAIN, "one_cell": grammar.END}
    for mode, state, letter in product(MODES, range(STATES), letters(CELL)):
        after = grammar.step(state, class_of(letter, CELL), mode, levels=8)
        level = state - grammar.LEVEL_0
        if letter == "o" and (state in (grammar.TEXT, grammar.OPEN) or mode == "free"):
            assert after == grammar.LEVEL_0
        elif 0 <= level < 8 and letter == str(level):
            assert after == state + 1
        else:
            assert after == outside[mode]


# ---- every short string, random walks ------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("vocabulary", "longest"), [(CELL, 4), (SMALL, 5)])
def test_every_short_string(mode, vocabulary, longest):
    alphabet = letters(vocabulary)
    classes = torch.tensor([an_id(letter, vocabulary) for letter in alphabet])
    for length in range(longest + 1):
        picks = (
            torch.tensor(list(product(range(len(alphabet)), repeat=length)))
            .long()
            .reshape(len(alphabet) ** length, length)
        )
        ids = classes[picks]
        along = states_along(ids, vocabulary, mode)
        allowed = written(torch.arange(5 + vocabulary.levels), vocabulary)[:, classes]
        for row, row_ids, row_states in zip(picks.tolist(), ids.tolist(), along.tolist(), strict=True):
            text = "".join(alphabet[pick] for pick in row)
            assert grammar.trace(row_ids, vocabulary, mode, stop_id=END_ID) == row_states
            if may_go_on(text, mode, vocabulary):
                expected = [may_go_on(text + letter, mode, vocabulary) for letter in alphabet]
                assert allowed[row_states[-1]].tolist() == expected, text
            whole = text.partition("e")[0] + "e" * ("e" in text)
            valid = may_go_on(whole, mode, vocabulary) and not still_needed(whole, vocabulary)
            valid &= mode != "one_cell" or "c" in whole
            assert grammar.is_valid_output(row_ids, mode, vocabulary, stop_ids=[END_ID]) == valid, text


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("budget", [0, 1, 3, 4, 5, 6, 7])
def test_every_output_within_a_budget(mode, budget):
    """Depth first over all outputs that the masks let through: each open span can close, and nothing else is lost."""
    alphabet = letters(SMALL)
    ids = [an_id(letter, SMALL) for letter in alphabet]
    frontier = [""]
    for length in range(budget + 1):
        rows = [[an_id(letter, SMALL) for letter in text] for text in frontier]
        along = states_along(torch.tensor(rows).reshape(len(rows), length), SMALL, mode, budget)
        allowed = written(along[:, -1], SMALL)[:, ids].tolist()
        grown = []
        for text, row, states, may in zip(frontier, rows, along.tolist(), allowed, strict=True):
            assert grammar.trace(row, SMALL, mode, stop_id=END_ID, max_new_tokens=budget) == states
            for letter, allow in zip(alphabet, may, strict=True):
                fits = length + 1 + still_needed(text + letter, SMALL) <= budget
                if mode == "one_cell" and budget < SMALL.span_length:
                    assert allow == (letter == "e")
                elif length < budget:
                    assert allow == (may_go_on(text + letter, mode, SMALL) and fits), (text, letter)
                if allow and length < budget:
                    grown.append(text + letter)
        if length == budget:
            assert not any(still_needed(text, SMALL) for text in frontier)
        frontier = grown


@pytest.mark.parametrize("mode", MODES)
def test_random_walks(mode):
    """Long strings, most steps allowed ones, some not: trace and states agree at each position, at any budget."""
    rng = np.random.default_rng(0)
    allowed = written(torch.arange(STATES), CELL).numpy()
    for budget in (None, 35):
        walks = np.empty((60, 60), np.int64)
        for walk in walks:
            state = grammar.trace([], CELL, mode)[0]
            for i in range(60):
                choices = np.flatnonzero(allowed[state])
                if mode != "one_cell" and rng.random() < 0.2:
                    choices = [CELL.opener, END_ID]
                if rng.random() < 0.03:
                    choices = range(ROWS)
                walk[i] = rng.choice(choices)
                token_class = grammar.token_class(int(walk[i]), CELL, stop_id=END_ID)
                state = grammar.step(state, token_class, mode, levels=8)
        traces = [grammar.trace(walk, CELL, mode, stop_id=END_ID, max_new_tokens=budget) for walk in walks.tolist()]
        np.testing.assert_array_equal(states_along(walks, CELL, mode, budget).numpy(), traces)
        if mode == "free":
            assert len({state for trace in traces for state in trace}) >= 10


def test_states_need_no_more_than_the_last_ids():
    walk = torch.tensor([[1, *CELL.ids(np.zeros((1, 8), int))[0], 2, *CELL.ids(np.ones((1, 8), int))[0][:6]]])
    for mode in MODES:
        for length in range(walk.shape[1] + 1):
            whole, last = walk[:, :length], walk[:, max(length - 10, 0) : length]
            assert grammar.states(whole, CELL, mode).tolist() == grammar.states(last, CELL, mode).tolist()


@pytest.mark.parametrize("mode", MODES)
def test_a_span_opens_when_ten_tokens_remain_and_not_when_nine_do(mode):
    for output in ([], [1]):
        ids = torch.tensor([output] * 3, dtype=torch.long)
        plenty = grammar.states(ids, CELL, mode)
        short = {grammar.TEXT: grammar.PLAIN, grammar.OPEN: grammar.END}.get(int(plenty[0]), int(plenty[0]))
        for remaining in (0, 9, 10, 11):
            expected = [short if remaining < 10 else int(plenty[0])] * 3
            for given in (remaining, torch.tensor(remaining), torch.tensor([remaining] * 3)):
                assert grammar.states(ids, CELL, mode, remaining=given).tolist() == expected


def test_nothing_waits_for_the_device():
    """A tensor on the meta device has no values: any look from the host at one would raise."""
    last = torch.zeros(4, 7, 10, dtype=torch.long, device="meta")
    for mode, remaining in product(MODES, (None, 5, torch.zeros(4, 7, dtype=torch.long, device="meta"))):
        states = grammar.states(last, CELL, mode, remaining=remaining)
        assert states.shape == (4, 7)
        assert states.dtype == torch.int64
        logits = torch.zeros(4, 7, ROWS, device="meta")
        assert grammar.apply_mask_(logits, states, CELL, stop_id=END_ID) is logits


# ---- masks ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_masks_change_only_what_is_not_allowed(dtype):
    logits = torch.randn(STATES, 2, ROWS).to(dtype)
    states = torch.arange(STATES)[:, None].expand(-1, 2)
    masked = grammar.apply_mask_(logits.clone(), states, CELL, stop_id=END_ID)
    allowed = written(states, CELL)
    assert torch.equal(masked[allowed], logits[allowed])
    assert (masked[~allowed] == -torch.inf).all()


def test_masks_made_in_inference_mode_serve_training():
    vocabulary = CellVocabulary(2, levels=3, entries=4)
    with torch.inference_mode():
        grammar.apply_mask_(torch.zeros(1, 30), torch.tensor([5]), vocabulary)
    logits = torch.zeros(2, 30, requires_grad=True)
    masked = grammar.apply_mask_(logits * 1, torch.tensor([5, 6]), vocabulary)
    masked.log_softmax(-1)[:, 8].sum().backward()
    assert logits.grad is not None
    assert logits.grad[1].count_nonzero() == 4


def test_what_cannot_be():
    with pytest.raises(InputError, match="270 columns, but the cell tokens reach id 277"):
        grammar.apply_mask_(torch.zeros(1, 270), torch.tensor([0]), CELL)
    with pytest.raises(InputError, match="no mode 'cells'; expected one of free, text, one_cell"):
        grammar.states(torch.zeros(1, 1, dtype=torch.long), CELL, "cells")
    with pytest.raises(InputError, match="is a cell token"):
        grammar.windows(CELL, stop_id=CELL.closer)


def test_outputs_with_several_end_tokens():
    span = CELL.ids(np.zeros((1, 8), int))[0].tolist()
    ends = (END_ID, 4)
    for tail, valid in [([], True), ([END_ID], True), ([END_ID, 4, 4], True), ([4], False), ([1], False)]:
        assert grammar.is_valid_output([*span, *tail], "one_cell", CELL, stop_ids=ends) == valid
    assert grammar.is_valid_output([1, 4, CELL.closer], "free", CELL, stop_ids=ends)
    assert not grammar.is_valid_output([1, 5, CELL.closer], "free", CELL, stop_ids=ends)
    assert grammar.is_valid_output(torch.tensor([1, *span, 2]), "free", CELL)
    assert not grammar.is_valid_output([1, *span, 2], "text", CELL)
