"""A model is one directory: a Hugging Face causal language model, the cell tokenizer, and what rvqa knows about both.

config.json model.safetensors tokenizer.json ...      opened by AutoModelForCausalLM and AutoTokenizer without rvqa
cell_tokenizer/{config.json,model.safetensors,genes.parquet}
rvqa.json                                             format version, token ids, labels, perturbations, provenance
"""

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

import rvqa
from rvqa.errors import InputError
from rvqa.prompts import PromptEncoder
from rvqa.tokenizer import CellTokenizer
from rvqa.vocabulary import CellVocabulary, require_rows

FORMAT_VERSION = 1


@dataclass(frozen=True)
class Card:
    """What a model knows besides its weights; saved as `rvqa.json`."""

    labels: list[str]
    """Cell types it was taught, sorted."""
    perturbations: list[str]
    """Perturbations it was taught, sorted."""
    ontology_ids: dict[str, str] = field(default_factory=dict)
    """Cell Ontology id by label, where the reference gave one."""
    training: dict[str, Any] = field(default_factory=dict)
    """References, settings and versions it was made with."""


@dataclass(frozen=True)
class Model:
    """Cell tokenizer and language model that belong together."""

    cell_tokenizer: CellTokenizer
    language_model: PreTrainedModel
    text_tokenizer: PreTrainedTokenizerBase
    vocabulary: CellVocabulary
    card: Card
    source: str = ""
    """Directory it was loaded from; "" for one that is only in memory."""

    @property
    def prompts(self) -> PromptEncoder:
        """Encoder of prompts for this model."""
        return PromptEncoder(self.text_tokenizer, self.vocabulary)

    def save_pretrained(self, directory: str | Path, *, force: bool = False) -> None:
        """Write the model's directory, whole or not at all.

        Raises
        ------
        InputError
            The directory exists and is not empty, and `force` is not set; with it, only a directory that holds a
            model is replaced.
        """
        path = require_new_directory(directory, force=force)
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{path.name}-", dir=path.parent) as scratch:
            whole = Path(scratch) / path.name
            with quiet_transformers():
                self.language_model.save_pretrained(whole)
            self.text_tokenizer.save_pretrained(whole)
            self.cell_tokenizer.save_pretrained(whole / "cell_tokenizer")
            card = {
                "format_version": FORMAT_VERSION,
                "rvqa_version": rvqa.__version__,
                "vocabulary": asdict(self.vocabulary),
                **asdict(self.card),
            }
            text = json.dumps(card, indent=2, ensure_ascii=False, sort_keys=True)
            (whole / "rvqa.json").write_text(text + "\n", encoding="utf-8")
            if path.exists():  # set aside, not deleted, until the new one stands in its place
                path.replace(Path(scratch) / "earlier")
            whole.replace(path)


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """No progress bars of transformers for reading and writing weights; as they were afterwards."""
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()


def require_new_directory(directory: str | Path, *, force: bool) -> Path:
    """Refuse an output directory that exists, unless it is empty, or `force` is set and it holds a model.

    Raises
    ------
    InputError
        Says what to do.
    """
    path = Path(directory)
    empty = path.is_dir() and not any(path.iterdir())
    if path.exists() and not empty and not (force and (path / "rvqa.json").is_file()):
        hint = "" if force else ", or pass --force (force=True) to replace an earlier model"
        raise InputError(f"{path} exists. Choose a new directory{hint}.")
    return path


def load(directory: str | Path) -> Model:
    """Load a model that `rvqa fit` (or `Model.save_pretrained`) wrote.

    Parameters
    ----------
    directory
        The model's directory.

    Returns
    -------
    Model
        In evaluation mode, on the CPU, in the precision it was saved with.

    Raises
    ------
    rvqa.errors.InputError
        Not a model's directory, another format version, or parts that do not fit together.

    Examples
    --------
    >>> model = rvqa.load("model")  # doctest: +SKIP
    >>> model.card.labels  # doctest: +SKIP
    ['B', 'CD14 monocyte', 'CD4 T', ...]
    """
    path = Path(directory)
    if not (path / "rvqa.json").is_file():
        what = "has no rvqa.json" if path.is_dir() else "is not a directory"
        raise InputError(f"{path} is no rvqa model: it {what}. Give the directory that `rvqa fit` wrote.")
    try:
        card = json.loads((path / "rvqa.json").read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{path / 'rvqa.json'} is not valid JSON: {error}") from error
    if card.get("format_version") != FORMAT_VERSION:
        raise InputError(
            f"{path} has format version {card.get('format_version')}; this rvqa reads version {FORMAT_VERSION}."
        )
    cell_tokenizer = CellTokenizer.from_pretrained(path / "cell_tokenizer")
    try:
        text_tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
        with quiet_transformers():
            language_model = AutoModelForCausalLM.from_pretrained(
                path, dtype="auto", local_files_only=True, use_safetensors=True
            )
    except (OSError, ValueError, SafetensorError) as error:
        raise InputError(f"The language model in {path} cannot be opened: {error}") from error
    vocabulary = CellVocabulary.from_tokenizer(text_tokenizer)
    if asdict(vocabulary) != card["vocabulary"]:
        raise InputError(
            f"{path}: rvqa.json puts the cell tokens at {card['vocabulary']}, the tokenizer at {vocabulary}."
        )
    require_rows(language_model, vocabulary)
    known = {key: card[key] for key in ("labels", "perturbations", "ontology_ids", "training")}
    return Model(cell_tokenizer, language_model.eval(), text_tokenizer, vocabulary, Card(**known), str(path))
