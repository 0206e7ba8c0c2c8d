"""Cell tokens inside a language model's vocabulary: codes <-> ids <-> text.

A cell is a span of `levels + 2` tokens (10 for the usual 8 levels of 32 codes) with contiguous, level-major ids::

    base                          <|cell|>              opener
    base + 1 + 32 * level + code  <|c0_00|>..<|c7_31|>  one code of each level, in the order of levels
    base + 257                    <|/cell|>             closer

The tokens are added with `special=False` (so `skip_special_tokens` keeps them) and `normalized=False` (so they are
matched in raw text, which is why text that people wrote must go through `escape` before it enters a prompt).

Legend: N cells, M levels, K entries of a codebook.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from tokenizers import AddedToken

from rvqa.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


Ids = TypeVar("Ids", int, npt.NDArray[np.int64], torch.Tensor)

OPENER, CLOSER = "<|cell|>", "<|/cell|>"
_CODE = re.compile(r"<\|c([0-9]{1,9})_([0-9]{2,9})\|>")
_PIECE = re.compile(r"<\|[^<>|]*\|>")


@dataclass(frozen=True)
class CellVocabulary:
    """Where the cell tokens lie in a vocabulary, and the exact maps between codes, ids and text.

    Parameters
    ----------
    base
        Id of the opener `<|cell|>`; all other ids follow from it.
    levels, entries
        Number of residual levels M (1 or more) and of codes K of each (1 to 256).
    """

    base: int
    levels: int = 8
    entries: int = 32

    def __post_init__(self) -> None:
        if self.base < 0 or self.levels < 1 or not 1 <= self.entries <= 256:
            raise InputError(
                f"{self} cannot be; expected base >= 0, levels >= 1 and 1 <= entries <= 256 (uint8 codes)."
            )

    @property
    def opener(self) -> int:
        """Id of `<|cell|>`."""
        return self.base

    @property
    def closer(self) -> int:
        """Id of `<|/cell|>`, the last cell token."""
        return self.base + self.size - 1

    @property
    def size(self) -> int:
        """Number of cell tokens: levels * entries + 2."""
        return self.levels * self.entries + 2

    @property
    def span_length(self) -> int:
        """Number of tokens of one cell: levels + 2."""
        return self.levels + 2

    def level_range(self, level: int) -> tuple[int, int]:
        """Ids [lo, hi) of the codes of one level."""
        if not 0 <= level < self.levels:
            raise InputError(f"There is no level {level}; this vocabulary has levels 0 to {self.levels - 1}.")
        lo = self.base + 1 + level * self.entries
        return lo, lo + self.entries

    def code_id(self, level: int, code: int) -> int:
        """Id of one code of one level."""
        lo, _ = self.level_range(level)
        if not 0 <= code < self.entries:
            raise InputError(f"There is no code {code}; a level of this vocabulary has codes 0 to {self.entries - 1}.")
        return lo + code

    def tokens(self) -> list[str]:
        """Return the token strings in the order of their ids, the opener's first."""
        codes = [f"<|c{m}_{k:02d}|>" for m in range(self.levels) for k in range(self.entries)]
        return [OPENER, *codes, CLOSER]

    def kinds(self, ids: Ids) -> Ids:
        """Say what each id is: 0 opener, m + 1 code of level m, levels + 1 closer, -1 none of them.

        Plain arithmetic for an int, an array or a tensor on any device. A whole span reads 0, 1, ..., levels + 1.
        """
        offset = ids - self.base
        ours = (offset >= 0) & (offset < self.size)
        return ours * ((offset + self.entries - 1) // self.entries + 1) - 1

    @classmethod
    def install(cls, tokenizer: PreTrainedTokenizerBase, *, levels: int = 8, entries: int = 32) -> CellVocabulary:
        """Add the cell tokens to a tokenizer, in place, and say where they are. A second call changes nothing.

        Raises InputError if only some of the tokens, or those of another shape, exist already, or if the tokenizer
        did not give them contiguous ids.
        """
        tokens = cls(0, levels, entries).tokens()
        present = _cell_tokens(tokenizer)
        if not present:
            tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in tokens])
        elif set(present) != set(tokens):
            raise InputError(
                f"The tokenizer already holds {len(present)} cell tokens that are not the {len(tokens)} asked for "
                f"({levels} levels of {entries}). Start from the base model's tokenizer, or use from_tokenizer."
            )
        return cls.from_tokenizer(tokenizer)

    @classmethod
    def from_tokenizer(cls, tokenizer: PreTrainedTokenizerBase) -> CellVocabulary:
        """Find the cell tokens of a tokenizer; levels and entries are inferred from the token names.

        Raises InputError if there are none, if the set is incomplete or not contiguous and level-major, or if they
        were added as special or normalized tokens.
        """
        present = _cell_tokens(tokenizer)
        if OPENER not in present:
            raise InputError(
                f"The tokenizer ({len(tokenizer)} tokens) has no cell tokens: {OPENER} is missing. "
                "Load the tokenizer saved with an rvqa model, or add them with CellVocabulary.install."
            )
        names = [match for match in map(_CODE.fullmatch, present) if match]
        levels, entries = (1 + max((int(match[group]) for match in names), default=0) for group in (1, 2))
        vocabulary = cls(present[OPENER], levels, entries)
        if vocabulary.size > 2 * len(present) + 2:  # before any are made: a name may say any number
            raise InputError(
                f"The tokenizer has {len(present)} cell tokens, but their names are of {levels} levels of {entries}. "
                "Start from the base model's tokenizer and CellVocabulary.install."
            )
        expected = {token: vocabulary.base + offset for offset, token in enumerate(vocabulary.tokens())}
        if present != expected:
            odd = next(t for t in [*expected, *present] if present.get(t) != expected.get(t))
            raise InputError(
                f"The tokenizer's cell tokens are not a contiguous level-major block: {odd} has id {present.get(odd)}, "
                f"expected {expected.get(odd)} ({levels} levels of {entries} from {OPENER} = {vocabulary.base}). "
                "Start from the base model's tokenizer and CellVocabulary.install."
            )
        for token_id, token in tokenizer.added_tokens_decoder.items():
            if vocabulary.kinds(token_id) >= 0 and (token.special or token.normalized or token.lstrip or token.rstrip):
                raise InputError(
                    f"The tokenizer holds {token.content} as {token!r}; expected special=False, normalized=False and "
                    "no stripping. Start from the base model's tokenizer and CellVocabulary.install."
                )
        return vocabulary

    def ids(self, codes_NM: npt.ArrayLike) -> npt.NDArray[np.int64]:
        """Spans of token ids, int64 [N, levels + 2], of codes (any integers [N, levels] in 0 .. entries - 1)."""
        codes_NM = np.asarray(codes_NM)
        if codes_NM.ndim != 2 or codes_NM.shape[1] != self.levels or codes_NM.dtype.kind not in "iu":
            raise InputError(
                f"Codes have shape {codes_NM.shape} and type {codes_NM.dtype}; expected uint8 of shape "
                f"[cells, {self.levels}], as rvqa.encode writes to adata.obsm['rvqa_codes']."
            )
        bad = np.argwhere((codes_NM < 0) | (codes_NM >= self.entries))
        if len(bad):
            row, level = (int(i) for i in bad[0])
            raise InputError(
                f"Row {row} has code {codes_NM[row, level]} at level {level}; expected 0 to {self.entries - 1}. "
                "Were these codes made by another tokenizer?"
            )
        ids_NL = np.empty((len(codes_NM), self.span_length), dtype=np.int64)
        ids_NL[:, 0], ids_NL[:, -1] = self.opener, self.closer
        ids_NL[:, 1:-1] = codes_NM.astype(np.int64) + self.base + 1 + self.entries * np.arange(self.levels)
        return ids_NL

    def codes(self, ids_NL: npt.ArrayLike) -> npt.NDArray[np.uint8]:
        """Codes uint8 [N, levels] of spans of token ids int [N, levels + 2]: the inverse of `ids`.

        Raises InputError on another shape, and on a row that is not one span; names the first such row.
        """
        ids_NL = np.asarray(ids_NL)
        if ids_NL.ndim != 2 or ids_NL.shape[1] != self.span_length or ids_NL.dtype.kind not in "iu":
            raise InputError(
                f"Ids have shape {ids_NL.shape} and type {ids_NL.dtype}; expected integers of shape "
                f"[cells, {self.span_length}]. Cut spans out of longer sequences with find_spans."
            )
        ids_NL = ids_NL.astype(np.int64)
        bad = np.argwhere(self.kinds(ids_NL) != np.arange(self.span_length))
        if len(bad):
            row, position = (int(i) for i in bad[0])
            names = [OPENER, *(f"a code of level {m}" for m in range(self.levels)), CLOSER, "no cell token"]
            raise InputError(
                f"Row {row} is not a cell span: position {position} holds id {ids_NL[row, position]} "
                f"({names[self.kinds(int(ids_NL[row, position]))]}), expected {names[position]}. "
                "Generate with the grammar of rvqa.language.grammar, or cut spans out with find_spans."
            )
        return ((ids_NL[:, 1:-1] - self.base - 1) % self.entries).astype(np.uint8)

    def texts(self, codes_NM: npt.ArrayLike) -> list[str]:
        """Spans as text, one string a cell: `<|cell|><|c0_07|>...<|/cell|>`. Codes as for `ids`."""
        return ["".join(row) for row in np.array(self.tokens(), dtype=object)[self.ids(codes_NM) - self.base]]

    def codes_from_texts(self, texts: Sequence[str]) -> npt.NDArray[np.uint8]:
        """Codes uint8 [N, levels] of spans written as text, one a text: the inverse of `texts`.

        Only whitespace may stand around a span; InputError says which text holds anything else, and what was seen.
        """
        index = {token: self.base + offset for offset, token in enumerate(self.tokens())}
        ids_NL = np.empty((len(texts), self.span_length), dtype=np.int64)
        for row, text in enumerate(texts):
            pieces = _PIECE.findall(text)
            ids = [index.get(piece, -1) for piece in pieces]
            kinds = [self.kinds(token_id) for token_id in ids]
            if kinds != list(range(self.span_length)) or "".join(pieces) != text.strip():
                raise InputError(
                    f"Text {row} is not one cell span: saw {self._seen(text, pieces, kinds)} in {text[:120]!r}; "
                    f"expected {OPENER}, {self.levels} codes of levels 0 to {self.levels - 1} in this order, {CLOSER}, "
                    "and nothing else. Read spans out of generated ids with find_spans."
                )
            ids_NL[row] = ids
        return self.codes(ids_NL)

    def find_spans(self, ids: npt.ArrayLike) -> list[tuple[int, npt.NDArray[np.uint8]]]:
        """Whole spans in a sequence of ids (int [L]): their start positions and codes uint8 [levels], in order.

        Broken spans are passed over; `rvqa.language.grammar.is_valid_output` says whether there are any.
        """
        ids_L = np.asarray(ids)
        if ids_L.ndim != 1 or (len(ids_L) and ids_L.dtype.kind not in "iu"):
            raise InputError(f"Ids have shape {ids_L.shape} and type {ids_L.dtype}; expected one sequence of integers.")
        if len(ids_L) < self.span_length:
            return []
        spans = np.lib.stride_tricks.sliding_window_view(ids_L.astype(np.int64), self.span_length)
        starts = np.flatnonzero((self.kinds(spans) == np.arange(self.span_length)).all(axis=1)).tolist()
        return list(zip(starts, self.codes(spans[starts]), strict=True))

    def _seen(self, text: str, pieces: list[str], kinds: list[int]) -> str:
        """Say in a few words what keeps a text from being one span."""
        levels = [kind - 1 for kind in kinds if 0 < kind <= self.levels]
        if -1 in kinds:
            return f"the unknown token {pieces[kinds.index(-1)]}"
        if kinds.count(0) != 1 or kinds.count(self.levels + 1) != 1:
            return f"{kinds.count(0)} openers and {kinds.count(self.levels + 1)} closers"
        if len(levels) != self.levels:
            return f"{len(levels)} code{'s' * (len(levels) != 1)}"
        ordered = kinds == list(range(self.span_length))
        return "other text beside the tokens" if ordered else f"tokens in the wrong order, levels {levels}"


def escape(tokenizer: PreTrainedTokenizerBase, text: str) -> str:
    r"""Make text that people wrote harmless: no added token of the tokenizer is left in it.

    Added tokens (cell tokens, `<|im_start|>`, `<think>`, ...) match inside any text, so a file name or a label could
    open a turn or a cell. A backslash goes in after the first character of each such token: `<|cell|>` becomes
    `<\|cell|>`, and `<\|cell|>` becomes `<\\|cell|>`, so that the text can be told from the result (where no token
    has another's first character inside it, as with Qwen's). Tokens of one character or of whitespace alone, which some
    tokenizers add for plain text, are left alone. Escape a whole field, and put text of your own between fields.
    """
    return escape_all(tokenizer, [text])[0]


def escape_all(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[str]:
    """`escape` many texts: most of its time goes into the list of added tokens, which is made once here."""
    places = _places(frozenset(tokenizer.get_added_vocab()))
    return [places.sub(r"\\", text) for text in texts]


@lru_cache(maxsize=8)
def _places(tokens: frozenset[str]) -> re.Pattern[str]:
    """Zero-width places (overlapping tokens, too) where `escape` adds a backslash."""
    rests: dict[str, list[str]] = {}
    for token in sorted(tokens):
        if len(token) > 1 and not token.isspace():
            rests.setdefault(token[0], []).append(re.escape(token[1:]))
    places = [rf"(?<={re.escape(t0)})(?=\\*(?:{'|'.join(rest)}))" for t0, rest in rests.items()]
    return re.compile("|".join(places) or "(?!)")


def _cell_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    added = tokenizer.get_added_vocab()
    return {token: i for token, i in added.items() if token in (OPENER, CLOSER) or _CODE.fullmatch(token)}
