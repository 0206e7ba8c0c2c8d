"""A model is one directory: a Hugging Face causal language model, the cell tokenizer, and what rvqa knows about both.

config.json model.safetensors tokenizer.json ...      opened by AutoModelForCausalLM and AutoTokenizer without rvqa
cell_tokenizer/{config.json,model.safetensors,genes.parquet}
rvqa.json                                             format version, token ids, labels, perturbations, provenance
"""

import hashlib
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

import rvqa
from rvqa.errors import InputError, about
from rvqa.io.files import whole_directory
from rvqa.io.json_text import shown
from rvqa.io.model_directory import require_new_directory
from rvqa.io.tensors import OTHER_VERSION, REPAIR, read_json, require_names
from rvqa.language.opening import open_language_model, open_text_tokenizer, quiet_transformers
from rvqa.language.prompts import PromptEncoder
from rvqa.language.rows import require_rows
from rvqa.language.vocabulary import CellVocabulary
from rvqa.tokenizer.model import CellTokenizer

FORMAT_VERSION = 1

COLDEST, HOTTEST = 0.01, 100.0
"""Temperatures that probabilities can be read at; a fit ends between 0.2 and 5."""


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
    calibration: float = 1.0
    """Temperature of the labels' probabilities, fitted on cells whose labels it was not trained on."""


@dataclass(frozen=True)
class Model:
    """Cell tokenizer and language model that belong together."""

    cell_tokenizer: CellTokenizer
    network: PreTrainedModel | None
    """The language model; None where it was loaded without weights."""
    text_tokenizer: PreTrainedTokenizerBase
    vocabulary: CellVocabulary
    card: Card
    source: str = ""
    """Directory it was loaded from; "" for one that is only in memory."""

    @property
    def language_model(self) -> PreTrainedModel:
        """The language model itself.

        Raises
        ------
        InputError
            The model was loaded without weights.
        """
        if self.network is None:
            raise InputError(
                f"{self.source} was loaded without weights; load it with them, or name another engine: "
                'engine="vllm" or a server\'s address.'
            )
        return self.network

    @property
    def identity(self) -> str:
        """Fingerprint: card, vocabulary, codebooks, and of files of weights their sizes and some of their bytes."""
        known = json.dumps([asdict(self.card), asdict(self.vocabulary)], sort_keys=True, ensure_ascii=False)
        made = hashlib.sha256(known.encode())
        made.update(self.cell_tokenizer.codebooks_MKD.detach().cpu().contiguous().numpy().tobytes())
        for path in sorted(Path(self.source).glob("*.safetensors")) if self.source else []:
            size = path.stat().st_size
            made.update(f"{path.name} {size}".encode())
            with path.open("rb") as file:
                for part in range(64):
                    file.seek(part * size // 64)
                    made.update(file.read(4096))
        return made.hexdigest()

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
        with whole_directory(path) as whole:
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


def load(directory: str | Path, *, weights: bool = True) -> Model:
    """Load a model that `rvqa fit` (or `Model.save_pretrained`) wrote.

    Parameters
    ----------
    directory
        The model's directory.
    weights
        False leaves the language model's weights on disk: enough to encode, and to annotate and perturb with vLLM or a
        server (`engine="vllm"`, `engine="http://..."`).

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
        raise InputError(f"{path} is not an rvqa model: it {_absent(path)}. Give the directory that `rvqa fit` wrote.")
    card = _read_card(path)
    cell_tokenizer = CellTokenizer.from_pretrained(path / "cell_tokenizer")
    network = None
    if weights:
        network, text_tokenizer = open_language_model(path, exact=True)
    else:
        text_tokenizer = open_text_tokenizer(path)
    with about(path):
        vocabulary = CellVocabulary.from_tokenizer(text_tokenizer)
        if network is not None:
            require_rows(network, vocabulary)
        PromptEncoder(text_tokenizer, vocabulary)  # rejects a tokenizer without an end token
    if asdict(vocabulary) != card["vocabulary"]:
        raise InputError(
            f"{path}: rvqa.json puts the cell tokens at {shown(card['vocabulary'])}, the tokenizer at "
            f"{asdict(vocabulary)}. {REPAIR}"
        )
    config = cell_tokenizer.config
    if (config.levels, config.entries) != (vocabulary.levels, vocabulary.entries):
        raise InputError(
            f"{path}: the cell tokenizer writes {config.levels} levels of {config.entries} codes, the language model "
            f"reads {vocabulary.levels} of {vocabulary.entries}; they are of different models. {REPAIR}"
        )
    known = {key: card[key] for key in ("labels", "perturbations", "ontology_ids", "training", "calibration")}
    return Model(cell_tokenizer, network, text_tokenizer, vocabulary, Card(**known), str(path))


def load_tokenizer(directory: str | Path) -> CellTokenizer:
    """Load the cell tokenizer alone, of a model's directory or of one that `rvqa fit-tokenizer` wrote.

    Raises
    ------
    rvqa.errors.InputError
        As for `load`.
    """
    path = Path(directory)
    if (path / "rvqa.json").is_file():
        _read_card(path)
        return CellTokenizer.from_pretrained(path / "cell_tokenizer")
    if (path / "genes.parquet").is_file():
        return CellTokenizer.from_pretrained(path)
    raise InputError(f"{path} is not an rvqa model: it {_absent(path)}. Give the directory that `rvqa fit` wrote.")


def _absent(path: Path) -> str:
    return "has no rvqa.json" if path.is_dir() else "is not a directory" if path.exists() else "does not exist"


def _read_card(path: Path) -> dict[str, Any]:
    """Read and check `rvqa.json`."""
    file = path / "rvqa.json"
    version = read_json(file, {"format_version": int})["format_version"]
    if version != FORMAT_VERSION:
        raise InputError(
            f"{path} has format version {shown(version)}; this rvqa reads version {FORMAT_VERSION}. {OTHER_VERSION}"
        )
    kinds = {"vocabulary": dict, "labels": list, "perturbations": list, "ontology_ids": dict, "training": dict}
    card = read_json(file, {**kinds, "calibration": float})
    if not COLDEST <= card["calibration"] <= HOTTEST:
        raise InputError(
            f"{file}: calibration is {shown(card['calibration'])}; expected {COLDEST} to {HOTTEST}. {REPAIR}"
        )
    for key in ("labels", "perturbations"):
        require_names(file, key, card[key])
    require_names(file, "ontology_ids", card["ontology_ids"].values(), once=False)
    if not card["labels"]:
        raise InputError(f"{file} names no labels. {REPAIR}")
    return card
