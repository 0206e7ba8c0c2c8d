"""What the language model is asked and how it answers: every template once, for training and for use alike.

A template is text with `{cell}` where a cell's ten tokens go and `{label}`, `{condition}` for words. Words are
escaped, so that cell-token text in a label or a perturbation's name cannot become cell tokens. Prompts reach the
model as ids.

Legend: N cells, L ids.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from rvqa.errors import InputError
from rvqa.language.vocabulary import CellVocabulary, escape, escape_all

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CONTROL = "control"
"""The condition of cells that were not perturbed."""

_FIELD = re.compile(r"\{(cell|label|condition)\}")


@dataclass(frozen=True)
class Task:
    """A prompt and the answer that follows it; the answer ends with the model's end token."""

    name: str
    prompt: str
    answer: str


ANNOTATE = Task("annotate", "{cell} Cell type:", " {label}")
GENERATE = Task("generate", "Cell type: {label}. Condition: {condition}.", "{cell}")
PERTURB = Task("perturb", "{cell} Cell type: {label}. Condition: {condition}.", "{cell}")
EVIDENCE = Task("evidence", "{cell} Evidence:", " Cell type:")
"""Not taught yet: words about the cell, written freely, and then the answer of `ANNOTATE`."""
TASKS = (ANNOTATE, GENERATE, PERTURB)


def word_ids(tokenizer: "PreTrainedTokenizerBase", text: str) -> list[int]:
    """Ids of text that people wrote: escaped, so that no added token is among them."""
    return words_ids(tokenizer, [text])[0]


def words_ids(tokenizer: "PreTrainedTokenizerBase", texts: Sequence[str]) -> list[list[int]]:
    """`word_ids` of many texts at once."""
    ids: list[list[int]] = tokenizer(escape_all(tokenizer, texts), add_special_tokens=False)["input_ids"]
    return ids


class PromptEncoder:
    """Turns templates into ids with one tokenizer; rows of one call share their words and have equal length."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", vocabulary: CellVocabulary) -> None:
        if tokenizer.eos_token_id is None:
            raise InputError("The tokenizer has no end token (eos_token). rvqa ends every answer with it; set one.")
        self.tokenizer, self.vocabulary, self.end = tokenizer, vocabulary, int(tokenizer.eos_token_id)

    def ids(
        self, template: str, codes_NM: np.ndarray | None = None, *, label: str = "", condition: str = ""
    ) -> np.ndarray:
        """Ids of a template.

        Parameters
        ----------
        template
            One of a `Task`.
        codes_NM
            Codes uint8 [N, M] for `{cell}`; without `{cell}` in the template they are not read and there is one row.
        label, condition
            Words for the other fields.

        Returns
        -------
        numpy.ndarray
            int64 [N, L], equal to tokenising the filled-in text.
        """
        words = {"label": escape(self.tokenizer, label), "condition": escape(self.tokenizer, condition)}
        columns: list[np.ndarray] = []
        text = ""
        for i, piece in enumerate(_FIELD.split(template)):
            if i % 2 == 0:
                text += piece
            elif piece != "cell":
                text += words[piece]
            else:
                if codes_NM is None:
                    raise InputError(f"The template {template!r} needs the codes of a cell.")
                columns += [self._text(text), self.vocabulary.ids(codes_NM)]
                text = ""
        columns.append(self._text(text))
        rows = max(len(column) for column in columns)
        return np.concatenate([np.broadcast_to(column, (rows, column.shape[1])) for column in columns], axis=1)

    def answer(self, template: str, codes_NM: np.ndarray | None = None, *, label: str = "") -> np.ndarray:
        """Ids of an answer with the end token, int64 [N, L]."""
        ids = self.ids(template, codes_NM, label=label)
        return np.concatenate([ids, np.full((len(ids), 1), self.end)], axis=1)

    def _text(self, text: str) -> np.ndarray:
        return np.array([self.tokenizer.encode(text, add_special_tokens=False)], dtype=np.int64).reshape(1, -1)
