"""Qwen3's vocabulary of 151,936 rows in a real vLLM engine, with random weights."""

from vllm import LLM, SamplingParams

from rvqa.language.grammar import Rule, is_valid_output
from rvqa.serving.vllm import CellSpans
from tests import qwen_fixture
from tests.vllm.settings import TIGHT, generate


def test_hot_outputs_of_the_real_vocabulary(ref_dir, tmp_path):
    tokenizer, vocabulary = qwen_fixture.qwen_tokenizer_with_cells(ref_dir)
    network = qwen_fixture.qwen_model(initializer_range=0.3, head_dim=32)
    network.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    llm = LLM(model=str(tmp_path), dtype="float32", logits_processors=[CellSpans], **TIGHT)
    prompt = tokenizer.encode("cells of blood:")
    params = SamplingParams(temperature=2.0, max_tokens=100, ignore_eos=True, logit_bias={vocabulary.opener: 60.0})
    cells = 0
    for output in generate(llm, [prompt] * 32, params):
        assert is_valid_output(list(output.token_ids), Rule("free"), vocabulary)
        cells += len(vocabulary.find_spans(list(output.token_ids)))
    assert cells > 30
