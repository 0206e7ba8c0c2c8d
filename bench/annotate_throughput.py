"""Cells annotated per second: ten tokens a cell, against a sentence of its 200 highest genes and against evidence.

python -m bench.annotate_throughput [--json] [--layers 28] [--width 1024]

It takes real PBMC3k cells from raw counts to one of Kang's eight labels. All sides use one language model with Qwen3's
vocabulary and tokenizer, by default of the shape of Qwen3-0.6B; its weights are random, since speed does not depend on
them. They begin with the counts and end with probabilities of the labels from the same one-pass scorer:

    ten tokens      rvqa.encode, prompt of ten tokens
    cell sentence   the 200 highest genes by name (as Cell2Sentence writes them), Qwen's BPE, prompt of that text
    evidence        ten tokens, then 100 tokens written one after another, then the labels

Needs RVQA_DATA_DIR and RVQA_REF_DIR.
"""

import os
from functools import partial
from pathlib import Path

import anndata
import numpy as np
import torch

import rvqa
from bench import harness
from rvqa.annotation import beginnings, label_scores
from rvqa.errors import InputError
from rvqa.language.model import Card, Model
from rvqa.language.prompts import ANNOTATE, PromptEncoder
from rvqa.language.rows import install_rows
from rvqa.serving.asks import Ask
from rvqa.serving.hf import HuggingFace
from rvqa.serving.replies import gather
from rvqa.tokenizer.model import CellTokenizer
from rvqa.training.references import read_reference
from rvqa.training.tokenizer.settings import TokenizerSettings
from tests import qwen_fixture

LABELS = (
    "B cell",
    "CD14+ Monocyte",
    "CD4 T cell",
    "CD8 T cell",
    "Dendritic cell",
    "FCGR3A+ Monocyte",
    "Megakaryocyte",
    "NK cell",
)
GENES = 200
EVIDENCE = 100


def make_model(cells: anndata.AnnData, ref: Path, layers: int, width: int) -> Model:
    """Fit a cell tokenizer for a few steps, and make a language model of random weights with Qwen's vocabulary."""
    reference = read_reference(cells, labels="cell_type")
    tokenizer = CellTokenizer.fit([reference], TokenizerSettings(epochs=5), progress=False)
    text_tokenizer, vocabulary = qwen_fixture.qwen_tokenizer_with_cells(ref)
    network = qwen_fixture.qwen_model(
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=layers,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=128,
        max_position_embeddings=4096,
        eos_token_id=text_tokenizer.eos_token_id,
        pad_token_id=text_tokenizer.pad_token_id,
    )
    install_rows(network, vocabulary, tokenizer.codebooks_MKD, seed=0)
    return Model(tokenizer, network, text_tokenizer, vocabulary, Card(list(LABELS), []))


def by_tokens(model: Model, cells: anndata.AnnData, size: int) -> np.ndarray:
    """Score labels from ten tokens a cell."""
    codes = rvqa.encode(cells, model, copy=True).obsm["rvqa_codes"]
    return label_scores(model, codes, LABELS, engine=HuggingFace(model, batch_size=size))[0]


def by_evidence(model: Model, cells: anndata.AnnData, size: int) -> np.ndarray:
    """Score labels after the model has written words about each cell."""
    codes = rvqa.encode(cells, model, copy=True).obsm["rvqa_codes"]
    scores, words = label_scores(model, codes, LABELS, reasoning=EVIDENCE, engine=HuggingFace(model, batch_size=size))
    if not all(words):
        raise InputError("the model wrote no evidence; nothing was timed")
    return scores


def sentences(cells: anndata.AnnData) -> list[str]:
    """Return names of the highest genes of each cell, in decreasing order; the lower column wins a tie."""
    names = cells.var_names.to_numpy()
    counts = cells.X.tocsr()
    texts = []
    for row in range(cells.n_obs):
        at = slice(counts.indptr[row], counts.indptr[row + 1])
        order = np.argsort(-counts.data[at], kind="stable")[:GENES]
        texts.append(" ".join(names[counts.indices[at][order]]))
    return texts


def by_sentence(model: Model, cells: anndata.AnnData, size: int) -> np.ndarray:
    """Score labels from a sentence of genes."""
    encoder = PromptEncoder(model.text_tokenizer, model.vocabulary)
    answers = beginnings([encoder.answer(ANNOTATE.answer, label=label)[0].tolist() for label in LABELS])
    prompts = model.text_tokenizer([f"{text} Cell type:" for text in sentences(cells)])["input_ids"]
    asks = [Ask(tuple(prompt), answers) for prompt in prompts]
    return np.array([reply.scores for reply in gather(model, HuggingFace(model, batch_size=size), asks)])


def main() -> None:
    """Run the bench."""
    arguments = harness.parser(__doc__ or "")
    arguments.add_argument("--layers", type=int, default=28)
    arguments.add_argument("--width", type=int, default=1024)
    arguments.add_argument("--cells", type=int, nargs=3, default=[64, 4, 16], help="for tokens, sentence, evidence")
    arguments.add_argument("--batches", type=int, nargs=3, default=[16, 2, 16], help="batches, as above")
    arguments.set_defaults(repeats=3)
    options = arguments.parse_args()
    torch.set_num_threads(options.threads)
    data = Path(os.environ["RVQA_DATA_DIR"])
    cells = anndata.read_h5ad(data / "pbmc3k_10x.h5ad")
    model = make_model(cells, Path(os.environ["RVQA_REF_DIR"]), options.layers, options.width)
    cells = cells[np.random.default_rng(0).permutation(cells.n_obs)].copy()

    sides = {"ten tokens": by_tokens, "cell sentence": by_sentence, "evidence": by_evidence}
    counts = dict(zip(sides, options.cells, strict=True))
    contenders = {}
    for (name, run), size in zip(sides.items(), options.batches, strict=True):
        few = cells[:2].copy()
        alone = np.concatenate([run(model, few[row].copy(), 1) for row in range(2)])
        if not np.allclose(run(model, few, 2), alone, atol=1e-3):
            raise InputError(f"{name}: scores depend on the batch; nothing was timed")
        contenders[name] = partial(run, model, cells[: counts[name]].copy(), size)
    timings = harness.interleave(contenders, options.repeats)
    rate = {name: counts[name] / timing.median for name, timing in timings.items()}
    tokens, sentence, evidence = rate.values()
    size = sum(parameter.numel() for parameter in model.language_model.parameters())
    mean = np.mean([len(ids) for ids in model.text_tokenizer(sentences(cells[:100]))["input_ids"]])
    case = f"{size / 1e9:.2f}B parameters"
    rows = [harness.Row(case, name, rate[name], "cells/s", timing.spread, None) for name, timing in timings.items()]
    rows.append(harness.Row(case, "length of a sentence", mean, "tokens", 0.0, None))
    figures = {"ratio_cell_sentence": tokens / sentence, "ratio_scorer_to_reasoning": tokens / evidence}
    harness.report("annotate_throughput", rows, figures, as_json=options.json)


if __name__ == "__main__":
    main()
