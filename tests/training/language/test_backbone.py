"""One code path loads a pretrained model or makes the small one; both then have cell tokens and their rows."""

import pytest
import torch

from rvqa.errors import InputError
from rvqa.training.language.backbone import load_backbone
from tests import qwen_fixture


def codebooks():
    return torch.randn(8, 32, 16, generator=torch.Generator().manual_seed(0))


def test_the_small_model():
    model, tokenizer, vocabulary = load_backbone(None, ["Cell type: B. Condition: control."], codebooks(), seed=0)
    again, _, _ = load_backbone(None, ["Cell type: B. Condition: control."], codebooks(), seed=0)
    assert sum(parameter.numel() for parameter in model.parameters()) <= 1_500_000
    assert model.dtype == torch.float32
    assert model.config.model_type == "qwen3"
    assert vocabulary.closer < model.get_input_embeddings().weight.shape[0]
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    text = "any text: β-cells, 100 %\n"
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_a_qwen3_directory_keeps_its_size_and_its_other_rows(ref_dir, tmp_path):
    qwen_fixture.save_qwen(ref_dir, tmp_path / "qwen")
    from transformers import AutoModelForCausalLM

    before = AutoModelForCausalLM.from_pretrained(tmp_path / "qwen").get_input_embeddings().weight.detach()
    model, tokenizer, vocabulary = load_backbone(tmp_path / "qwen", [], codebooks(), seed=0)
    after = model.get_input_embeddings().weight.detach()
    assert (vocabulary.opener, vocabulary.closer) == (151_669, 151_926)
    assert after.shape == before.shape == (151_936, 64)
    changed = torch.nonzero((after != before).any(1)).flatten()
    assert changed.tolist() == list(range(151_669, 151_927))
    assert tokenizer.encode("<|c7_31|>") == [151_925]


def test_what_is_no_model_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"config\.json is missing"):
        load_backbone(tmp_path, [], codebooks(), seed=0)
