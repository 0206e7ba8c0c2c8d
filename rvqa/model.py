"""A model is one directory: a Hugging Face causal language model, the cell tokenizer, and what rvqa knows about both.

config.json model.safetensors tokenizer.json ...      opened by AutoModelForCausalLM and AutoTokenizer without rvqa
cell_tokenizer/{config.json,model.safetensors,genes.parquet}
rvqa.json                                             format version, token ids, labels, perturbations, provenance
"""

import hashlib
import json
import math
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from tokenizers import Tokenizer
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

import rvqa
from rvqa.checkpoint import OTHER_VERSION, REPAIR, dtypes, read_json, require_finite, require_names, shapes
from rvqa.errors import InputError, about
from rvqa.files import require_folder, sentence, whole_directory
from rvqa.json_text import LARGEST, shown
from rvqa.prompts import PromptEncoder
from rvqa.tokenizer import CellTokenizer
from rvqa.vocabulary import CellVocabulary, require_rows

FORMAT_VERSION = 1

COLDEST, HOTTEST = 0.01, 100.0
"""Temperatures that probabilities can be read at; a fit ends between 0.2 and 5."""

MOST_PARTS = 2**17
"""Most layers, heads, experts or labels that a config may ask for: libraries make lists of that length."""

_COUNTS = re.compile(r"layer|head|expert|label|(^|_)(num|n)_")
"""Fields of a config that say how many; `pad_token_id` is none of them."""

BUFFERS = 2**26
"""Numbers that a model may make for itself, such as masks, besides twice those that are stored."""

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
"""Types of weights."""

# What transformers raises for a directory that holds no model it can build; each was seen on an altered config.json.
NO_MODEL = (
    *(OSError, ValueError, TypeError, KeyError, AttributeError, RuntimeError, ZeroDivisionError, AssertionError),
    *(ImportError, StrictDataclassError, SafetensorError),
)


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


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """No progress bars and reports of transformers for reading and writing weights; as they were afterwards."""
    shown, verbosity = transformers_logging.is_progress_bar_enabled(), transformers_logging.get_verbosity()
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if shown:
            transformers_logging.enable_progress_bar()


def require_new_directory(directory: str | Path, *, force: bool, kind: str = "model", mark: str = "rvqa.json") -> Path:
    """Refuse an output directory that exists, unless it is empty, or `force` is set and it holds what `mark` is of.

    One that holds anything else beside it is refused as well: all of it would be gone.

    Raises
    ------
    InputError
        Says what to do.
    """
    path = Path(directory)
    above = path.absolute().parent
    while not os.path.exists(above):  # made on the way
        above = above.parent
    require_folder(above)
    empty = os.path.isdir(path) and not any(path.iterdir())
    earlier = (path / mark).is_file() and (mark == "rvqa.json" or not (path / "rvqa.json").exists())
    if os.path.exists(path) and not empty and not (force and earlier):
        hint = "" if force else f", or pass --force (force=True) to replace an earlier {kind}"
        raise InputError(f"{path} exists. Choose a new directory{hint}.")
    inside = [each.relative_to(path).as_posix() for each in sorted(path.rglob("*")) if earlier]
    if foreign := [name for name in inside if not _OF_A_MODEL.fullmatch(name)]:
        raise InputError(
            f"{path / foreign[0]} is no part of the {kind} {path}, which is to be replaced. Move it away, or choose "
            "another directory."
        )
    return path


_OF_A_MODEL = re.compile(
    r"(rvqa|fit|config|generation_config|tokenizer|tokenizer_config|special_tokens_map|added_tokens|vocab"
    r"|processor_config|preprocessor_config|chat_template)\.json"
    r"|model.*\.safetensors(\.index\.json)?|genes\.parquet|split\.parquet|vocab\.txt|merges\.txt"
    r"|(additional_chat_templates(/.*)?)|.*\.(jinja|model)|cell_tokenizer(/(config\.json|model\.safetensors|genes\.parquet))?"
)
"""Files that rvqa, or transformers for it, writes into a directory of a model or a tokenizer."""


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
        raise InputError(f"{path} is no rvqa model: it {_absent(path)}. Give the directory that `rvqa fit` wrote.")
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
        PromptEncoder(text_tokenizer, vocabulary)  # refuses a tokenizer without an end token
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
    raise InputError(f"{path} is no rvqa model: it {_absent(path)}. Give the directory that `rvqa fit` wrote.")


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


def open_text_tokenizer(path: Path) -> PreTrainedTokenizerBase:
    """Open the tokenizer of a directory: no code of its own.

    Raises
    ------
    InputError
        No tokenizer, or a damaged one.
    """
    _require_files(path)
    try:
        if (path / "tokenizer.json").exists():
            Tokenizer.from_file(str(path / "tokenizer.json"))
    except BaseException as error:  # the tokenizers library has nothing more special, and panics
        if isinstance(error, KeyboardInterrupt):
            raise
        raise InputError(f"{path / 'tokenizer.json'} is JSON, but not of a tokenizer. {REPAIR}") from error
    with quiet_transformers():
        try:
            opened = AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False)
            opened.decode(opened.encode("a cell", add_special_tokens=False))  # as its settings may not let it
            return opened
        except NO_MODEL as error:
            raise InputError(f"The tokenizer in {path} cannot be opened: {sentence(error)} {REPAIR}") from error


def open_language_model(path: Path, *, exact: bool) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Open the language model of a directory: no code of its own, no pickle, no tensor made up.

    Parameters
    ----------
    path
        The directory.
    exact
        Refuse tensors that do not belong to the model or are of another type, too, as where rvqa wrote them.

    Raises
    ------
    InputError
        No language model, or a damaged one.
    """
    _require_files(path)
    _require_config(path / "config.json")
    weights = sorted(path.glob("*.safetensors"))
    if not weights:
        pickles = sorted(each.name for each in path.glob("*.bin"))
        instead = f"; {pickles[0]} may hold a pickle, which rvqa never opens" if pickles else ""
        raise InputError(f"{path} has no model.safetensors{instead}. {REPAIR}")
    stored = [shape for file in weights for shape in shapes(file).values()]
    n_stored = sum(map(math.prod, stored))
    with quiet_transformers():
        try:
            config = AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
            with torch.device("meta"), _few_parameters(2 * len(stored) + 100):
                described = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
        except NO_MODEL as error:
            file = path / "config.json"
            raise InputError(f"{file} describes no language model: {sentence(error)} {REPAIR}") from error
    tokenizer = open_text_tokenizer(path)
    n_described = sum(parameter.numel() for parameter in described.parameters())
    n_buffers = sum(buffer.numel() for buffer in described.buffers())
    if n_buffers > 2 * n_stored + BUFFERS:
        raise InputError(
            f"{path / 'config.json'} describes a model of {n_buffers:,} numbers besides its weights. {REPAIR}"
        )
    if n_described > 2 * n_stored:  # before any memory is taken for it
        raise InputError(
            f"{path / 'config.json'} describes a model of {n_described:,} numbers, but {n_stored:,} are stored: it "
            f"does not fit. {REPAIR}"
        )
    try:
        with quiet_transformers():
            opened: Any = AutoModelForCausalLM.from_pretrained(
                path,
                dtype="auto",
                local_files_only=True,
                trust_remote_code=False,
                use_safetensors=True,
                ignore_mismatched_sizes=True,
                output_loading_info=True,
            )
    except NO_MODEL as error:
        raise InputError(f"The language model in {path} cannot be opened: {sentence(error)} {REPAIR}") from error
    model, facts = opened
    for kind, seen in (
        ("mismatched_keys", "has another shape than config.json makes it"),
        ("missing_keys", "is missing"),
        ("unexpected_keys", "does not belong to this model"),
    ):
        if facts[kind] and (exact or kind != "unexpected_keys"):
            name = sorted(each if isinstance(each, str) else each[0] for each in facts[kind])[0]
            raise InputError(f"{path}: the tensor {shown(name)} {seen}; {weights[0].name} does not fit. {REPAIR}")
    loaded = model.state_dict()
    if other := [name for name, tensor in loaded.items() if tensor.is_floating_point() and tensor.dtype not in FLOATS]:
        raise InputError(f"{path}: {other[0]!r} holds {loaded[other[0]].dtype}; expected {FLOATS}. {REPAIR}")
    for file in weights if exact else []:
        for name, dtype in dtypes(file).items():
            if name in loaded and loaded[name].dtype != dtype:
                wanted = str(loaded[name].dtype).removeprefix("torch.")
                raise InputError(f"{file}: {shown(name)} does not hold {wanted}, as config.json says. {REPAIR}")
    require_finite(weights[0] if len(weights) == 1 else path, loaded)
    return model.eval(), tokenizer


def _require_files(path: Path) -> None:
    """Refuse a folder whose files next to its weights no library should be given: no JSON, too large, or not files.

    A link is followed, as Hugging Face's cache is made of them, to a file; a device or a pipe is not read.
    """
    for file in sorted(path.iterdir()):
        if file.is_dir():
            continue
        if not file.is_file():
            raise InputError(f"{file} is not a file, or a link to nothing. {REPAIR}")
        if file.suffix in (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".onnx"):
            continue
        if (size := file.stat().st_size) > LARGEST:
            raise InputError(f"{file} has {size:,} bytes; at most {LARGEST:,} are read. {REPAIR}")
        if file.suffix == ".json" and file.name != "vocab.json":
            read_json(file)


def _require_config(file: Path) -> None:
    """Refuse a config that would have a library make long lists or fetch code, before one sees it."""
    ahead: list[tuple[str, Any]] = [("", read_json(file))]
    while ahead:
        key, value = ahead.pop()
        if isinstance(value, dict):
            ahead += value.items()
        elif isinstance(value, list):
            ahead += ((key, each) for each in value)
        elif isinstance(value, int) and _COUNTS.search(key):
            if not -1 <= value <= MOST_PARTS:
                raise InputError(f"{file}: {shown(key)} is {shown(value)}; at most {MOST_PARTS:,}. {REPAIR}")
        elif isinstance(value, str) and "implementation" in key and ("/" in value or "|" in value):
            raise InputError(f"{file}: {shown(key)} names code that is elsewhere: {shown(value)}. {REPAIR}")


@contextmanager
def _few_parameters(most: int) -> Iterator[None]:
    """Stop a model that is being made at more parameters than its weights are for."""
    made = 0

    def count(*_: Any) -> None:
        nonlocal made
        made += 1
        if made > most:
            raise ValueError(f"it has more than {most:,} tensors, twice those that are stored")

    handle = torch.nn.modules.module.register_module_parameter_registration_hook(count)
    try:
        yield
    finally:
        handle.remove()
