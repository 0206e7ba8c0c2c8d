"""Outputs as letters, for tests of masks against the grammar, and many outputs at once.

Letters: t text, e the end token, o opener, 0-7 a code of that level, c closer.
"""

import re
from itertools import product

import numpy as np
import torch

from rvqa.language import grammar
from rvqa.language.grammar import Rule
from rvqa.language.vocabulary import CellVocabulary

CELL = CellVocabulary(20)  # ids 20 .. 277, as in a model of 290 rows
SMALL = CellVocabulary(6, levels=2, entries=3)  # ids 6 .. 13: spans are o01c
END_ID, ROWS = 3, 290
RULES = (Rule("free"), Rule("text"), Rule("one_cell"), Rule("n_cells", 2))
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


def may_go_on(text, rule, vocabulary):
    """Return whether some whole output begins with these letters, by the grammar as a regular expression."""
    codes = "".join(map(str, range(vocabulary.levels)))
    part = "(?:o" + "".join(f"(?:{code}" for code in codes) + ")?" * len(codes) + ")?"
    n = rule.cells
    counted = f"(?:o{codes}c){{0,{n - 1}}}{part}|(?:o{codes}c){{{n}}}e*"
    pattern = {"text": "[te]*", "free": f"(?:[te]|o{codes}c)*{part}"}.get(rule.mode, counted)
    return re.fullmatch(pattern, text) is not None


def still_needed(text, vocabulary):
    """Return the number of tokens that an output must still write to close its last span."""
    last = text.rfind("o")
    return 0 if last < 0 or "c" in text[last:] else vocabulary.span_length - (len(text) - last)


def every_string(vocabulary, length):
    """Return every output of this many letters, as places in `letters` and as ids, int64 [12^length, length] each."""
    alphabet = letters(vocabulary)
    picks = torch.tensor(list(product(range(len(alphabet)), repeat=length)), dtype=torch.long)
    picks = picks.reshape(len(alphabet) ** length, length)
    return picks, torch.tensor([an_id(letter, vocabulary) for letter in alphabet])[picks]


def allowed(vocabulary=CELL, rows=ROWS, stop_id=END_ID):
    """Return which ids each state may write, by the windows, bool [states, rows]."""
    ids = torch.arange(rows)
    return torch.stack(
        [((ids >= lo) & (ids < hi)) == inside for lo, hi, inside in grammar.windows(vocabulary, stop_id=stop_id)]
    )


def random_walks(rule, n, length, *, budget=None, seed=0):
    """Return outputs int64 [n, length] with mostly allowed tokens, and their states [n, length + 1] by `trace`."""
    rng = np.random.default_rng(seed)
    choices = [np.flatnonzero(row) for row in allowed().numpy()]
    likely = np.array([CELL.opener, END_ID])
    walks, traces = np.empty((n, length), np.int64), np.empty((n, length + 1), np.int64)
    draws, odd = rng.random((n, length)), rng.random((n, length))
    for row in range(n):
        state = grammar.outside(rule.cells, 0, 8)
        for i in range(length):
            among = choices[state]
            if rule.cells <= 0 and odd[row, i] < 0.2:
                among = likely
            if odd[row, i] > 0.97:
                among = range(ROWS)
            token_id = walks[row, i] = among[int(draws[row, i] * len(among))]
            kind = grammar.token_class(int(token_id), CELL, stop_id=END_ID)
            state = grammar.step(state, kind, rule.cells, length=i + 1, levels=8)
        traces[row] = grammar.trace(walks[row].tolist(), CELL, rule.cells, stop_id=END_ID, max_new_tokens=budget)
    return walks, traces
