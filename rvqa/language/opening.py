"""Opens language models and text tokenizers from a directory, checked before anything is built."""

import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from tokenizers import Tokenizer
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from rvqa.errors import InputError
from rvqa.io.files import sentence
from rvqa.io.json_text import LARGEST, shown
from rvqa.io.tensors import REPAIR, dtypes, read_json, require_finite, shapes

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
    except BaseException as error:  # the tokenizers library raises plain Exception, and panics beside it
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise  # a request to stop
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
        Reject tensors that do not belong to the model or are of another type, too, as where rvqa wrote them.

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
    """Reject a folder whose files next to its weights no library should be given: no JSON, too large, or not files.

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
    """Reject a config that would have a library make long lists or fetch code, before one sees it."""
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
