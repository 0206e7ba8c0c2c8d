"""Altered model directories are rejected in one sentence or work; no code in them is ever run."""

import json
import math
import os
import pickle
import random
import shutil
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from anndata import AnnData
from safetensors.torch import load_file, save_file

import rvqa
from rvqa.errors import InputError
from rvqa.language.model import load_tokenizer
from tests.attacks.cases import CASES, mutated, survive
from tests.attacks.odd_json import altered, written

PARTS = ("rvqa.json", "cell_tokenizer/config.json", "cell_tokenizer/genes.parquet", "cell_tokenizer/model.safetensors")
NUMBERS = (0.0, -0.0, 1.0, -1.0, 1e-45, 1e-39, 1e-30, 1e6, 1e20, 3e38, -3e38, math.inf, -math.inf, math.nan)


@cache
def whole() -> dict[str, bytes]:
    """Return the files of a model by name."""
    path = Path(os.environ["RVQA_ATTACKED_MODEL"])
    return {each.relative_to(path).as_posix(): each.read_bytes() for each in sorted(path.rglob("*")) if each.is_file()}


@cache
def cells() -> AnnData:
    """A few cells with counts in all genes of the model."""
    path = Path(os.environ["RVQA_ATTACKED_MODEL"])
    symbols = load_tokenizer(path).axis.symbols
    made = AnnData(np.random.default_rng(0).poisson(2.0, (3, len(symbols))).astype(np.float32))
    made.var_names = list(symbols)
    return made


def put(files: dict[str, bytes], folder: Path) -> Path:
    for name, data in files.items():
        path = folder / "model" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return folder / "model"


def header_altered(data: bytes, number: int) -> bytes:
    """Return a safetensors file with names, types, shapes or offsets of its header altered."""
    size = int.from_bytes(data[:8], "little")
    header = written(altered(json.loads(data[8 : 8 + size]), number))
    return len(header).to_bytes(8, "little") + header + data[8 + size :]


def values_altered(data: bytes, number: int) -> bytes:
    """Return a safetensors file with some values of a tensor overwritten."""
    import safetensors.torch

    rng, tensors = random.Random(number), safetensors.torch.load(data)
    tensor = tensors[rng.choice(sorted(tensors))]
    if tensor.is_floating_point():
        flat = tensor.reshape(-1)
        flat[:: rng.choice((1, 2, 1000))] = rng.choice(NUMBERS)
    return safetensors.torch.save(tensors)


def changed(name: str, number: int) -> bytes:
    data, how = whole()[name], number % 4
    if name.endswith(".safetensors") and how:
        return (mutated, header_altered, values_altered)[how - 1](data, number)
    if name.endswith(".json") and how:
        return written(altered(json.loads(data), number))
    return mutated(data, number)


def finite(*arrays: np.ndarray) -> None:
    for array in arrays:
        assert np.isfinite(array).all()


def cell_tokenizer(number: int, folder: Path) -> None:
    """The card and the cell tokenizer: one that is accepted must encode and decode to numbers."""
    name = PARTS[number % 4] if number % 5 else PARTS[3]
    needed = {each: data for each, data in whole().items() if each in PARTS}
    tokenizer = load_tokenizer(put(needed | {name: changed(name, number // 4)}, folder))
    adata = cells()
    rvqa.encode(adata, tokenizer, recon_error=True)
    finite(
        tokenizer.decode(adata.obsm["rvqa_codes"]),
        adata.obsm["X_rvqa"],
        adata.obs["rvqa_recon_error"],
        tokenizer.sample(adata.obsm["rvqa_codes"], np.full(3, 1e4)).data,
    )


def model(number: int, folder: Path) -> None:
    """Any file of a model: one that is accepted must annotate with probabilities."""
    name = random.Random(number).choice(sorted(whole()))
    loaded = rvqa.load(put(whole() | {name: changed(name, number)}, folder), weights=number % 3 > 0)
    if loaded.network is not None:
        adata = rvqa.annotate(cells(), loaded, copy=True, progress=False)
        finite(adata.obs["rvqa_confidence"], adata.obsm["rvqa_probabilities"])


HUGE = (
    *("hidden_size", "num_hidden_layers", "vocab_size", "max_position_embeddings", "intermediate_size", "num_labels"),
    *("num_attention_heads", "num_key_value_heads", "head_dim", "layer_types", "sliding_window", "max_window_layers"),
)


def huge_config(number: int, folder: Path) -> None:
    """A config that asks for more memory than there is does not take it."""
    key, size = HUGE[number % len(HUGE)], (10**6, 10**9, 10**12)[number // len(HUGE)]
    config = json.loads(whole()["config.json"])
    config[key] = ["full_attention"] * min(size, 10**6) if key == "layer_types" else size
    if number % 2:
        config["model_type"], config["architectures"] = "gpt2", ["GPT2LMHeadModel"]
        config |= {"n_positions": size, "n_embd": 64, "n_layer": 2, "n_head": 2}
    rvqa.load(put(whole() | {"config.json": json.dumps(config).encode()}, folder))


@pytest.fixture(autouse=True)
def attacked(model_path, monkeypatch):
    monkeypatch.setenv("RVQA_ATTACKED_MODEL", str(model_path))


def test_altered_cell_tokenizers_are_refused_or_good(tmp_path):
    survive(cell_tokenizer, tmp_path)


def test_altered_models_are_refused_or_good(tmp_path):
    """Only a tenth of the cases run, because each loads a language model."""
    survive(model, tmp_path, cases=max(100, CASES // 10))


def test_a_config_cannot_ask_for_memory(tmp_path):
    survive(huge_config, tmp_path, cases=3 * len(HUGE), grows=256)


@pytest.fixture
def copied(model_path, tmp_path):
    """Return a copy of the model, and a function that alters its card or another JSON file."""
    path = tmp_path / "model"
    shutil.copytree(model_path, path)

    def alter(name: str = "rvqa.json", **values: object) -> Path:
        file = path / name
        file.write_text(json.dumps(json.loads(file.read_text()) | values))
        return path

    return alter


@pytest.mark.parametrize("value", [0, -1, 5e-324, 1e-310, 1e-3, 101, 1e308, 10**400, math.nan, math.inf, True, "1"])
def test_calibration_is_a_temperature(copied, value):
    with pytest.raises(InputError, match=r"calibration|NaN|Infinity"):
        rvqa.load(copied(calibration=value), weights=False)


@pytest.mark.parametrize("key", ["labels", "perturbations"])
@pytest.mark.parametrize(
    ("value", "said"), [(["B", "T", "B"], "twice"), (["B", ""], "0 char"), (["x" * 10**7], "10,0")]
)
def test_names_are_names(copied, key, value, said):
    with pytest.raises(InputError, match=said) as refused:
        rvqa.load(copied(**{key: value}), weights=False)
    assert len(str(refused.value)) < 2000


def test_nothing_in_a_model_is_run(copied, tmp_path):
    """This holds for code that its config names, a pickle beside its weights, and a kernel of a repository."""
    code = f"open({str(tmp_path / 'ran')!r}, 'w')\n"
    own = {"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.Own", "AutoTokenizer": ["own.Own", "own.Own"]}

    class Runs:
        def __reduce__(self):
            return exec, (code,)

    path = copied("config.json", auto_map=own)
    copied("tokenizer_config.json", auto_map=own)
    (path / "own.py").write_text(code)
    (path / "pytorch_model.bin").write_bytes(pickle.dumps(Runs()))
    torch.save(Runs(), path / "model.pt")
    assert rvqa.load(path).network is not None
    copied("config.json", model_type="own")
    with pytest.raises(InputError, match="config"):
        rvqa.load(path)
    copied("config.json", model_type="qwen3", attn_implementation="somebody/kernel")
    with pytest.raises(InputError, match="elsewhere"):
        rvqa.load(path)
    assert not (tmp_path / "ran").exists()


def test_names_of_tokens_cannot_ask_for_memory(copied):
    path = copied()
    file = path / "tokenizer.json"
    file.write_text(file.read_text().replace("<|c7_31|>", "<|c99999999_31|>"))
    with pytest.raises(InputError, match="levels"):
        rvqa.load(path, weights=False)


def test_a_pipe_is_not_waited_for(copied):
    path = copied()
    os.mkfifo(path / "chat_template.jinja2")
    with pytest.raises(InputError, match="not a file"):
        rvqa.load(path, weights=False)


def test_links_to_files_are_followed(copied, tmp_path):
    """The Hugging Face cache stores a model as links."""
    path = copied()
    shutil.move(path / "model.safetensors", tmp_path / "elsewhere")
    (path / "model.safetensors").symlink_to(tmp_path / "elsewhere")
    assert rvqa.load(path).network is not None
    (path / "model.safetensors").unlink()
    (path / "model.safetensors").symlink_to("/etc/hostname")
    with pytest.raises(InputError, match="safetensors"):
        rvqa.load(path)


@pytest.mark.parametrize(("name", "value"), [("gene_scale_G", 1e-45), ("dispersion_G", -1.0), ("codebooks_MKD", 1e30)])
def test_values_that_no_fit_ends_with(copied, name, value):
    path = copied()
    file = path / "cell_tokenizer/model.safetensors"
    tensors = load_file(file)
    tensors[name].view(-1)[0] = value
    save_file(tensors, file)
    with pytest.raises(InputError, match=name):
        load_tokenizer(path)
