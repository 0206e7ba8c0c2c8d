"""vLLM in bfloat16: at least 99.5 % of labels equal Hugging Face's in float32, and draws follow the seed."""

import numpy as np
import pytest
from vllm import LLM
from vllm.distributed import cleanup_dist_env_and_memory

import rvqa
from rvqa.annotation import label_scores
from rvqa.perturbation import perturbed_codes
from rvqa.serving.offline import Offline
from rvqa.serving.vllm import CellSpans
from tests.vllm.settings import TIGHT


@pytest.fixture(scope="module")
def model(model_dir):
    return rvqa.load(model_dir)


@pytest.fixture(scope="module")
def llm(model_dir):
    # Seeded requests crash the CPU build if their prompts come in parts, so these come whole.
    settings = {**TIGHT, "max_num_batched_tokens": 2048}
    yield LLM(model=str(model_dir), dtype="bfloat16", logits_processors=[CellSpans], **settings)
    cleanup_dist_env_and_memory()


def test_labels_in_bfloat16(llm, model, held_out_all):
    codes = rvqa.encode(held_out_all, model, copy=True).obsm["rvqa_codes"]
    full, _ = label_scores(model, codes, model.card.labels)
    half, _ = label_scores(model, codes, model.card.labels, engine=Offline(model, llm))
    agreement = (full.argmax(1) == half.argmax(1)).mean()
    print(
        f"{agreement:.4f} of {len(codes):,} labels, scores differ by {np.abs(full - half).mean():.3f} nats in the mean"
    )
    assert agreement >= 0.995


def test_draws_follow_the_seed(llm, model, held_out):
    codes = rvqa.encode(held_out[:20], model, copy=True).obsm["rvqa_codes"]
    types = held_out[:20].obs["cell_type"].astype(str).to_numpy()
    first, again, other = (
        perturbed_codes(model, codes, types, "IFN-beta", 1.0, seed, engine=Offline(model, llm)) for seed in (1, 1, 2)
    )
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()
