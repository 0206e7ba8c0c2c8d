"""A model's directory: transformers alone opens it, loading is exact, it is written whole, damage is rejected."""

import json

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import rvqa
from rvqa.errors import InputError
from rvqa.io.model_directory import require_new_directory
from tests.conftest import fit_shipped


@pytest.fixture(scope="module")
def fitted(shipped):
    """A model after a fit of two steps, not read from a directory."""
    from rvqa.training.fit import FitSettings
    from rvqa.training.language.cpt import LanguageSettings
    from rvqa.training.tokenizer.settings import TokenizerSettings

    settings = FitSettings(tokenizer=TokenizerSettings(epochs=4), language=LanguageSettings(steps=2, batch_size=32))
    return fit_shipped(shipped, settings)


@pytest.fixture(scope="module")
def fitted_path(fitted, tmp_path_factory):
    """Directory in which it was saved."""
    path = tmp_path_factory.mktemp("fitted") / "model"
    fitted.save_pretrained(path)
    return path


def test_load_gives_the_same_answers(fitted, fitted_path, shipped):
    loaded = rvqa.load(fitted_path)
    assert loaded.card == fitted.card
    assert loaded.vocabulary == fitted.vocabulary
    assert loaded.cell_tokenizer.axis == fitted.cell_tokenizer.axis
    assert loaded.cell_tokenizer.config == fitted.cell_tokenizer.config
    for name, tensor in fitted.cell_tokenizer.state_dict().items():  # as they left the fit
        assert torch.equal(loaded.cell_tokenizer.state_dict()[name], tensor), name
    cells = next(iter(shipped.tests.values())).copy()
    first, second = (
        rvqa.annotate(cells, each, library_size_key="depth", copy=True, progress=False) for each in (fitted, loaded)
    )
    np.testing.assert_array_equal(first.obsm["rvqa_codes"], second.obsm["rvqa_codes"])
    np.testing.assert_array_equal(first.obsm["rvqa_probabilities"], second.obsm["rvqa_probabilities"])


def test_transformers_opens_it_without_rvqa(fitted, fitted_path):
    language_model = AutoModelForCausalLM.from_pretrained(fitted_path, local_files_only=True)
    tokenizer = AutoTokenizer.from_pretrained(fitted_path, local_files_only=True)
    assert tokenizer.convert_tokens_to_ids("<|cell|>") == fitted.vocabulary.opener
    assert tokenizer.convert_tokens_to_ids("<|/cell|>") == fitted.vocabulary.closer
    for name, tensor in fitted.language_model.state_dict().items():
        assert torch.equal(language_model.state_dict()[name], tensor), name
    assert sum(parameter.numel() for parameter in language_model.parameters()) <= 1_500_000
    assert not list(fitted_path.rglob("*.bin"))
    assert not list(fitted_path.rglob("*.pt"))


def test_card_says_where_the_model_comes_from(model_path):
    card = json.loads((model_path / "rvqa.json").read_text())
    assert card["training"]["references"][0]["name"] == "pbmc68k_reduced"
    assert card["training"]["settings"]["language"]["steps"] == 150
    assert set(card["training"]["loss"]) == {"annotate", "generate", "perturb"}


def test_an_existing_directory_is_kept(model, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    for force in (False, True):
        with pytest.raises(InputError, match="exists"):
            model.save_pretrained(tmp_path, force=force)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
    target = tmp_path / "model"
    model.save_pretrained(target)
    with pytest.raises(InputError, match="--force"):
        require_new_directory(target, force=False)
    model.save_pretrained(target, force=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "notes.txt"]


def test_what_is_no_model_is_refused(model, tmp_path):
    with pytest.raises(InputError, match="does not exist"):
        rvqa.load(tmp_path / "nowhere")
    with pytest.raises(InputError, match=r"no rvqa\.json"):
        rvqa.load(tmp_path)
    path = tmp_path / "model"
    model.save_pretrained(path)
    card = json.loads((path / "rvqa.json").read_text())
    (path / "rvqa.json").write_text(json.dumps({**card, "format_version": 2}))
    with pytest.raises(InputError, match="version 2"):
        rvqa.load(path)
    (path / "rvqa.json").write_text(json.dumps({**card, "vocabulary": {**card["vocabulary"], "base": 7}}))
    with pytest.raises(InputError, match="cell tokens"):
        rvqa.load(path)
    (path / "rvqa.json").write_text(json.dumps(card))
    (path / "model.safetensors").unlink()
    with pytest.raises(InputError, match=r"no model\.safetensors"):
        rvqa.load(path)


def test_a_request_to_stop_is_not_damage(fitted_path, monkeypatch):
    from rvqa.cli.terminal import Stopped, stop

    monkeypatch.setattr("rvqa.language.opening.Tokenizer.from_file", lambda path: stop(2, None), raising=False)
    with pytest.raises(Stopped):
        rvqa.load(fitted_path)
