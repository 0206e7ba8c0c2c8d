"""Cells to codes and back: the tokenizer, the encoder of one file, and what is stored."""

from rvqa.tokenizer.model import CellTokenizer

__all__ = ["CellTokenizer"]
