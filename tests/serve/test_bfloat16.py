"""Labels in bfloat16: vLLM's are Hugging Face's in float32 for 99.5 % of held-out cells and more."""

import numpy as np
from vllm import LLM

import rvqa
from rvqa.annotation import label_scores
from rvqa.serving.offline import Offline
from rvqa.serving.vllm import CellSpans
from tests.serve.settings import TIGHT


def test_labels_in_bfloat16(model_dir, held_out_all):
    model = rvqa.load(model_dir)
    codes = rvqa.encode(held_out_all, model, copy=True).obsm["rvqa_codes"]
    llm = LLM(model=str(model_dir), dtype="bfloat16", logits_processors=[CellSpans], **TIGHT)
    full, _ = label_scores(model, codes, model.card.labels)
    half, _ = label_scores(model, codes, model.card.labels, engine=Offline(model, llm))
    agreement = (full.argmax(1) == half.argmax(1)).mean()
    print(
        f"{agreement:.4f} of {len(codes):,} labels, scores differ by {np.abs(full - half).mean():.3f} nats in the mean"
    )
    assert agreement >= 0.995
