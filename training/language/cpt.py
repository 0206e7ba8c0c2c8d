"""Continued pretraining: the language model learns to read and write the cell tokens, with all tasks mixed.

The loss is the cross-entropy of the answers' tokens, in nats per token.
"""

from collections import defaultdict
from dataclasses import dataclass, field

import torch
from tqdm import tqdm
from transformers import PreTrainedModel

from rvqa.training.engine import Engine, OptimiserSettings
from rvqa.training.language.corpus import Corpus


@dataclass(frozen=True)
class LanguageSettings:
    """Everything that decides a run, apart from the corpus and the model it starts from; saved with the model."""

    steps: int = 600
    batch_size: int = 128
    optimiser: OptimiserSettings = field(default_factory=OptimiserSettings)
    label_smoothing: float = 0.0


def pretrain(
    model: PreTrainedModel, corpus: Corpus, settings: LanguageSettings, *, progress: bool = True
) -> dict[str, float]:
    """Train in place; return the mean loss by task over the last tenth of the steps, in nats per token.

    Parameters
    ----------
    model
        Model with rows for the cell tokens.
    corpus
        Source of the examples, one epoch after another.
    settings
        Settings of the run; see `LanguageSettings`.
    progress
        Whether to show a progress bar.
    """
    model.train()
    recent: dict[str, list[float]] = defaultdict(list)
    engine = Engine(model, settings.optimiser, total_steps=settings.steps, batch_size=settings.batch_size)
    try:
        step = 0
        with tqdm(total=settings.steps, desc="language model", unit="step", disable=None if progress else True) as bar:
            while step < settings.steps:
                for batch in corpus.epoch(settings.batch_size)[: settings.steps - step]:
                    ids_BL = torch.from_numpy(batch.ids_BL).to(model.device)
                    answer_BL = torch.from_numpy(batch.answer_BL).to(model.device)
                    logits_BLV = engine(input_ids=ids_BL, use_cache=False).logits[:, :-1]
                    target_BL = ids_BL[:, 1:].masked_fill(~answer_BL[:, 1:], -100)
                    loss = torch.nn.functional.cross_entropy(
                        logits_BLV.flatten(0, 1).float(),
                        target_BL.flatten(),
                        label_smoothing=settings.label_smoothing,
                    )
                    engine.step(loss)
                    step += 1
                    bar.update()
                    if step > 0.9 * settings.steps:
                        recent[batch.task].append(loss.item())
                    if step % 20 == 0:
                        bar.set_postfix(loss=f"{loss.item():.3f}")
    finally:
        engine.close()
    model.eval()
    return {task: sum(losses) / len(losses) for task, losses in sorted(recent.items())}
