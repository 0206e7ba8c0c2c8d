"""The span automaton: the table, the vectorised states, the masks and a regular expression agree."""

from itertools import product

import numpy as np
import pytest
import torch

from rvqa.errors import InputError
from rvqa.language import grammar, masks
from rvqa.language.grammar import Rule
from rvqa.language.vocabulary import CellVocabulary
from tests import spans
from tests.spans import CELL, END_ID, ROWS, RULES, SMALL, STATES, an_id, letter_of, letters, may_go_on, still_needed


def class_of(letter, vocabulary):
    return grammar.token_class(an_id(letter, vocabulary), vocabulary, stop_id=END_ID)


def written(states, vocabulary, rows=ROWS):
    """Return which ids the mask leaves in each state, bool [.., rows]."""
    logits = torch.zeros(*states.shape, rows)
    assert masks.apply_mask_(logits, states, vocabulary, stop_id=END_ID) is logits
    assert set(logits.unique().tolist()) <= {0.0, -np.inf}
    return logits == 0


def states_along(ids, vocabulary, rule, budget=None):
    """Return vectorised states before each id of each row and after the last one, int [B, L + 1]."""
    K = vocabulary.span_length
    padded = torch.nn.functional.pad(torch.as_tensor(ids), (K, 0), value=grammar.ABSENT)
    last_BLK = padded.unfold(-1, K, 1)
    length = torch.arange(last_BLK.shape[1])
    remaining = None if budget is None else budget - length
    return grammar.states(last_BLK, vocabulary, rule.cells, length=length, remaining=remaining)


# ---- every state and every token class -----------------------------------------------------------------------------


def test_every_state_and_token_class():
    """The table is written a second time here, as state -> letters."""
    may = {grammar.PLAIN: "te", grammar.TEXT: "teo", grammar.OPEN: "o", grammar.END: "e"}
    may |= {grammar.LEVEL_0 + m: str(m) for m in range(8)} | {grammar.LEVEL_0 + 8: "c"}
    assert len(may) == STATES == len(grammar.table(8)) == len(grammar.windows(CELL))
    allowed = written(torch.arange(STATES), CELL)
    for state, token_id in product(range(STATES), range(ROWS)):
        letter = letter_of(token_id, CELL)
        assert allowed[state, token_id] == (letter in may[state])
        assert (class_of(letter, CELL) in grammar.table(8)[state]) == (letter in may[state])


def test_steps_of_every_state_and_token_class():
    for rule, state, letter, length in product(RULES, range(STATES), letters(CELL), (1, 7, 10, 11, 20, 25)):
        after = grammar.step(state, class_of(letter, CELL), rule.cells, length=length, levels=8)
        level = state - grammar.LEVEL_0
        opens = letter == "o" and (state == grammar.TEXT or rule.mode == "free")
        if rule.cells > 0:  # counted, whatever was written
            inside = length < 10 * rule.cells and length % 10
            assert after == (
                grammar.LEVEL_0 + length % 10 - 1
                if inside
                else grammar.OPEN
                if length < 10 * rule.cells
                else grammar.END
            )
        elif opens or (state == grammar.OPEN and letter == "o"):
            assert after == grammar.LEVEL_0
        elif 0 <= level < 8 and letter == str(level):
            assert after == state + 1
        else:
            assert after == (grammar.TEXT if rule.mode == "free" else grammar.PLAIN)


# ---- every short string, random walks ------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.mode)
@pytest.mark.parametrize(("vocabulary", "longest"), [(CELL, 4), (SMALL, 5)])
def test_every_short_string(rule, vocabulary, longest):
    alphabet = letters(vocabulary)
    classes = torch.tensor([an_id(letter, vocabulary) for letter in alphabet])
    for length in range(longest + 1):
        picks, ids = spans.every_string(vocabulary, length)
        along = states_along(ids, vocabulary, rule)
        allowed = written(torch.arange(5 + vocabulary.levels), vocabulary)[:, classes]
        for row, row_ids, row_states in zip(picks.tolist(), ids.tolist(), along.tolist(), strict=True):
            text = "".join(alphabet[pick] for pick in row)
            assert grammar.trace(row_ids, vocabulary, rule.cells, stop_id=END_ID) == row_states
            if may_go_on(text, rule, vocabulary):
                expected = [may_go_on(text + letter, rule, vocabulary) for letter in alphabet]
                assert allowed[row_states[-1]].tolist() == expected, text
            whole = text.partition("e")[0] + "e" * ("e" in text)
            valid = may_go_on(whole, rule, vocabulary) and not still_needed(whole, vocabulary)
            valid &= whole.count("c") == rule.cells or rule.cells <= 0
            assert grammar.is_valid_output(row_ids, rule, vocabulary, stop_ids=[END_ID]) == valid, text


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.mode)
@pytest.mark.parametrize("budget", [0, 1, 3, 4, 5, 6, 7])
def test_every_output_within_a_budget(rule, budget):
    """A depth-first search of all outputs that masks allow: each open span can close, and none is lost."""
    alphabet = letters(SMALL)
    ids = [an_id(letter, SMALL) for letter in alphabet]
    frontier = [""]
    for length in range(budget + 1):
        rows = [[an_id(letter, SMALL) for letter in text] for text in frontier]
        along = states_along(torch.tensor(rows).reshape(len(rows), length), SMALL, rule, budget)
        allowed = written(along[:, -1], SMALL)[:, ids].tolist()
        grown = []
        for text, row, states, may in zip(frontier, rows, along.tolist(), allowed, strict=True):
            assert grammar.trace(row, SMALL, rule.cells, stop_id=END_ID, max_new_tokens=budget) == states
            for letter, allow in zip(alphabet, may, strict=True):
                fits = length + 1 + still_needed(text + letter, SMALL) <= budget
                if rule.cells > 0 and text.count("c") == min(rule.cells, budget // SMALL.span_length):
                    assert allow == (letter == "e")  # all cells that fit are there
                elif length < budget:
                    assert allow == (may_go_on(text + letter, rule, SMALL) and fits), (text, letter)
                if allow and length < budget:
                    grown.append(text + letter)
        if length == budget:
            assert not any(still_needed(text, SMALL) for text in frontier)
        frontier = grown


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.mode)
def test_random_walks(rule):
    """In long strings with mostly allowed steps, trace and states agree at each position and budget."""
    for budget, n in ((None, 20_000), (35, 5_000)):
        walks, traces = spans.random_walks(rule, n, 24 if budget is None else 40, budget=budget)
        np.testing.assert_array_equal(states_along(walks, CELL, rule, budget).numpy(), traces)
        if rule.mode == "free":
            assert len(np.unique(traces)) >= 10


def test_states_need_no_more_than_the_last_ids():
    walk = torch.tensor([[1, *CELL.ids(np.zeros((1, 8), int))[0], 2, *CELL.ids(np.ones((1, 8), int))[0][:6]]])
    for rule in RULES:
        for length in range(walk.shape[1] + 1):
            whole, last = walk[:, :length], walk[:, max(length - 10, 0) : length]
            short = grammar.states(last, CELL, rule.cells, length=length)
            assert grammar.states(whole, CELL, rule.cells).tolist() == short.tolist()


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.mode)
def test_a_span_opens_when_ten_tokens_remain_and_not_when_nine_do(rule):
    for output in ([], [1]):
        ids = torch.tensor([output] * 3, dtype=torch.long)
        plenty = grammar.states(ids, CELL, rule.cells)
        if int(plenty[0]) >= grammar.LEVEL_0:  # the id does not matter within a span, where no budget applies
            continue
        short = {grammar.TEXT: grammar.PLAIN, grammar.OPEN: grammar.END}.get(int(plenty[0]), int(plenty[0]))
        for remaining in (0, 9, 10, 11):
            expected = [short if remaining < 10 else int(plenty[0])] * 3
            for given in (remaining, torch.tensor(remaining), torch.tensor([remaining] * 3)):
                assert grammar.states(ids, CELL, rule.cells, remaining=given).tolist() == expected


def test_nothing_waits_for_the_device():
    """A tensor on the meta device has no values, so a read from the host would raise."""
    last = torch.zeros(4, 7, 10, dtype=torch.long, device="meta")
    zeros = torch.zeros(4, 7, dtype=torch.long, device="meta")
    for cells, remaining, length in product((-2, -1, 0, 3, zeros), (None, 5, zeros), (None, 12, zeros)):
        states = grammar.states(last, CELL, cells, length=length, remaining=remaining)
        assert states.shape == (4, 7)
        assert states.dtype == torch.int64
        logits = torch.zeros(4, 7, ROWS, device="meta")
        assert masks.apply_mask_(logits, states, CELL, stop_id=END_ID) is logits


# ---- masks ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_masks_change_only_what_is_not_allowed(dtype):
    logits = torch.randn(STATES, 2, ROWS).to(dtype)
    states = torch.arange(STATES)[:, None].expand(-1, 2)
    masked = masks.apply_mask_(logits.clone(), states, CELL, stop_id=END_ID)
    allowed = written(states, CELL)
    assert torch.equal(masked[allowed], logits[allowed])
    assert (masked[~allowed] == -torch.inf).all()


def test_masks_made_in_inference_mode_serve_training():
    vocabulary = CellVocabulary(2, levels=3, entries=4)
    with torch.inference_mode():
        masks.apply_mask_(torch.zeros(1, 30), torch.tensor([5]), vocabulary)
    logits = torch.zeros(2, 30, requires_grad=True)
    masked = masks.apply_mask_(logits * 1, torch.tensor([5, 6]), vocabulary)
    masked.log_softmax(-1)[:, 8].sum().backward()
    assert logits.grad is not None
    assert logits.grad[1].count_nonzero() == 4


def test_what_cannot_be():
    with pytest.raises(InputError, match="270 columns, but the cell tokens reach id 277"):
        masks.apply_mask_(torch.zeros(1, 270), torch.tensor([0]), CELL)
    with pytest.raises(InputError, match="no mode 'cells'; expected one of free, text, one_cell"):
        Rule("cells")
    with pytest.raises(InputError, match="is a cell token"):
        grammar.windows(CELL, stop_id=CELL.closer)


def test_outputs_with_several_end_tokens():
    span = CELL.ids(np.zeros((1, 8), int))[0].tolist()
    ends = (END_ID, 4)
    for tail, valid in [([], True), ([END_ID], True), ([END_ID, 4, 4], True), ([4], False), ([1], False)]:
        assert grammar.is_valid_output([*span, *tail], Rule("one_cell"), CELL, stop_ids=ends) == valid
    assert grammar.is_valid_output([1, 4, CELL.closer], Rule("free"), CELL, stop_ids=ends)
    assert not grammar.is_valid_output([1, 5, CELL.closer], Rule("free"), CELL, stop_ids=ends)
    assert grammar.is_valid_output(torch.tensor([1, *span, 2]), Rule("free"), CELL)
    assert not grammar.is_valid_output([1, *span, 2], Rule("text"), CELL)


# ---- rows of several rules, choices, options -----------------------------------------------------------------------


def test_rows_of_several_rules_at_once():
    """One call for a mixed batch gives each row the same as a call for it alone."""
    walks = np.concatenate([spans.random_walks(rule, 50, 30, seed=1)[0] for rule in RULES])
    cells = torch.tensor([[rule.cells] * 50 for rule in RULES]).reshape(-1)
    length = torch.from_numpy(np.random.default_rng(0).integers(0, 31, len(walks)))
    remaining = torch.from_numpy(np.random.default_rng(1).integers(0, 30, len(walks)))
    last = torch.full((len(walks), 10), grammar.ABSENT)
    for row, n in enumerate(length.tolist()):
        kept = walks[row, max(n - 10, 0) : n]
        last[row, 10 - len(kept) :] = torch.from_numpy(kept)
    together = grammar.states(last, CELL, cells, length=length, remaining=remaining)
    for row, state in enumerate(together.tolist()):
        n = int(length[row])
        budget = n + int(remaining[row])
        assert state == grammar.trace(walks[row, :n], CELL, int(cells[row]), max_new_tokens=budget)[-1]
    assert grammar.states(last, CELL, grammar.CHOICE).tolist() == [grammar.LEAVE] * len(walks)


@pytest.mark.parametrize("remaining", [None, 0, 1, 2, 3, 9])
def test_choices_are_a_trie(remaining):
    """The trie equals a plain walk over all answers, for every output of up to four ids of a small alphabet."""
    answers = [(5, 6), (5, 6, 7), (5, 7), (8,), (8, 8, 8)]
    tensor = masks.answer_tensor(answers, END_ID)
    alphabet = [5, 6, 7, 8, END_ID]
    for length in range(5):
        rows = list(product(alphabet, repeat=length))
        logits = torch.randn(len(rows), 12, generator=torch.Generator().manual_seed(0))
        ids = torch.tensor(rows, dtype=torch.long).reshape(len(rows), length)
        padded = torch.cat([ids, torch.randint(0, 12, (len(rows), 3))], dim=1)  # later ids are not read
        masked = masks.mask_choices_(logits.clone(), padded, length, tensor, END_ID, remaining=remaining)
        for row, before, after in zip(rows, logits, masked, strict=True):
            whole = [(*answer, END_ID) for answer in answers]
            fit = [a for a in whole if a[:length] == row and len(a) > length]
            fit = [a for a in fit if remaining is None or len(a) - 1 - length <= remaining]
            expected = {a[length] for a in fit} or {END_ID}
            kept = set(torch.isfinite(after).nonzero().flatten().tolist())
            assert kept == expected
            assert all(before[i] == after[i] for i in kept)
    for answer in answers:
        assert grammar.is_valid_output(
            [*answer, END_ID], Rule("choice", choices=("x",)), CELL, stop_ids=[END_ID], answers=answers
        )
        assert grammar.is_valid_output(answer, Rule("choice", choices=("x",)), CELL, stop_ids=[END_ID], answers=answers)
    assert not grammar.is_valid_output([5], Rule("choice", choices=("x",)), CELL, stop_ids=[END_ID], answers=answers)


def test_choices_of_each_row_at_its_own_length():
    tensor = masks.answer_tensor([(5, 6), (7,)], END_ID)
    ids = torch.tensor([[0, 0], [5, 0], [5, 6], [7, 9], [9, 9]])
    length = torch.tensor([0, 1, 2, 1, 2])
    remaining = torch.tensor([1, 4, 4, 4, 4])
    masked = masks.mask_choices_(torch.zeros(5, 12), ids, length, tensor, END_ID, remaining=remaining)
    assert [row.nonzero().flatten().tolist() for row in torch.isfinite(masked)] == [[7], [6], [3], [3], [3]]
    meta = torch.zeros(5, 12, device="meta")
    on_meta = (each.to("meta") for each in (ids, length, tensor))
    assert masks.mask_choices_(meta, *on_meta, END_ID, remaining=3) is meta  # nothing waits for the device


def test_rules_as_options():
    for rule in (*RULES, Rule("n_cells", 7), Rule("choice", choices=(" B", " T cell"))):
        assert Rule.from_options({**rule.options(), "other": 1}) == rule
    assert Rule.from_options(None) == Rule("free")
    for options, match in [
        ({"rvqa_mode": "cells"}, "no mode 'cells'"),
        ({"rvqa_mode": ["free"]}, "no mode"),
        ({"rvqa_mod": "free"}, "no option 'rvqa_mod'; expected rvqa_mode"),
        ({"rvqa_mode": "n_cells"}, "n_cells goes with mode"),
        ({"rvqa_n_cells": 2}, "n_cells goes with mode"),
        ({"rvqa_mode": "n_cells", "rvqa_n_cells": 0}, "n_cells is 0; expected a whole number"),
        ({"rvqa_mode": "n_cells", "rvqa_n_cells": True}, "n_cells is True"),
        ({"rvqa_mode": "n_cells", "rvqa_n_cells": 2.0}, r"n_cells is 2\.0"),
        ({"rvqa_mode": "choice"}, "choices with mode"),
        ({"rvqa_mode": "choice", "rvqa_choices": "B"}, "expected a list of texts"),
        ({"rvqa_mode": "choice", "rvqa_choices": []}, "each different and none empty"),
        ({"rvqa_mode": "choice", "rvqa_choices": ["B", "B"]}, "each different and none empty"),
        ({"rvqa_mode": "choice", "rvqa_choices": [["B"]]}, "each different and none empty"),
        ({"rvqa_mode": "choice", "rvqa_choices": [str(i) for i in range(70_000)]}, "70,000 choices"),
        ({"rvqa_mode": "choice", "rvqa_choices": ["\u00df" * 150_000]}, "300,000 bytes"),
        ({"rvqa_mode": "choice", "rvqa_choices": ["\ud800"]}, "cannot be written as UTF-8"),
    ]:
        with pytest.raises(InputError, match=match):
            Rule.from_options(options)
