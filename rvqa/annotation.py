"""`annotate`: cell types of cells, chosen by the language model from a closed set of labels.

The score of a label is the log probability that the model's answer begins as only this label does: that of the fewest
of its tokens that no other label begins with (of a label that begins another one, its end token is among them). What
follows is certain among the labels, and costs nothing. A softmax over the labels, at the temperature that the model was
calibrated with, gives probabilities. In this process all labels are scored in one forward pass
(`rvqa.serving.scoring`); vLLM scores each as the end of a prompt.

Legend: N cells, M levels, C labels.
"""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from anndata import AnnData
from tqdm import tqdm

from rvqa.data.files.keys import Keys, copied, require_copy, require_free
from rvqa.data.files.memory import limited
from rvqa.data.reading import Reading
from rvqa.encoding import cell_codes, code_arrays, code_names, codes_of_file, copy_of, in_memory
from rvqa.errors import InputError, require_known
from rvqa.language.grammar import Rule
from rvqa.language.model import Model
from rvqa.language.prompts import ANNOTATE, EVIDENCE
from rvqa.serving.asks import BLOCK, Ask, Engine
from rvqa.serving.engines import open_engine
from rvqa.serving.replies import gather


def annotate(
    adata: AnnData | str | Path,
    model: Model,
    *,
    out: str | Path | None = None,
    labels: Sequence[str] | None = None,
    layer: str | None = None,
    library_size_key: str | None = None,
    recover: bool = False,
    key_added: str = "rvqa",
    copy: bool = False,
    engine: str | Engine = "hf",
    reasoning: int = 0,
    resume: str | Path | None = None,
    force: bool = False,
    memory: int | str | None = None,
    progress: bool = True,
) -> AnnData | None:
    """Annotate cells with cell types.

    Parameters
    ----------
    adata
        Raw counts, or the path of a file, as for `rvqa.encode`; encoded on the way.
    model
        From `rvqa.load`.
    out
        With a path: file to write, a copy with the keys below in which all else stays as it is stored: `.h5ad`, or of
        its own kind for a `.zarr` or `.h5mu` file. Memory does not grow with the counts of the file.
    labels
        Closed set to choose from; by default every label the model was taught. A subset is allowed.
    layer, library_size_key, recover, key_added, copy
        As for `rvqa.encode`.
    engine
        What runs the language model: "hf" in this process (all labels in one forward pass), "vllm" in this process, or
        the address of a vLLM server, "http://host:8000" (docs/serving.md). All give the same labels.
    reasoning
        0: the label at once. Else the model first writes up to so many tokens of evidence, and labels are scored after
        them. Slower by far, and of use only with a model that was taught to.
    resume
        File that keeps replies as they come (made where it is missing): when the engine or this process stops, the same
        call goes on from it.
    force
        Replace an output that exists.
    memory
        Most memory that reading a file may take, as for `rvqa.encode`.
    progress
        Show a progress bar.

    Returns
    -------
    AnnData or None
        With `copy`, or with a path and no `out`, the new object; else None and `adata`, or the file, gains what
        `rvqa.encode` writes and
        `obs["rvqa_cell_type"]`, categorical over the labels that occur;
        `obs["rvqa_confidence"]`, float32: probability of that label among the set;
        `obs["rvqa_alternative"]`, categorical: the second likeliest label (absent with one label);
        `obs["rvqa_ontology_id"]`, categorical: Cell Ontology id of the label, "" where the model knows none;
        `obsm["rvqa_probabilities"]`, float32 [N, labels], its columns named by `uns["rvqa"]["labels"]`;
        with `reasoning`, `obs["rvqa_reasoning"]`: the words, as the model wrote them; nothing has checked them.

    Raises
    ------
    rvqa.errors.InputError
        As for `rvqa.encode`; no labels, a repeated one, or one the model was not taught; an engine that is not there.
    rvqa.errors.EngineError
        A server that stopped answering.

    Examples
    --------
    >>> rvqa.annotate(adata, model)  # doctest: +SKIP
    >>> adata.obs[["rvqa_cell_type", "rvqa_confidence"]].head()  # doctest: +SKIP
    """
    chosen = list(model.card.labels if labels is None else labels)
    if not chosen or len(set(chosen)) < len(chosen):
        raise InputError(
            f"labels has {len(chosen)} entries, {len(set(chosen))} of them different; give each label once."
        )
    require_known("label of this model", chosen, model.card.labels)
    if not isinstance(reasoning, int) or reasoning < 0:
        raise InputError(f"reasoning is {reasoning!r}; expected a number of tokens, 0 for none.")
    runs = open_engine(model, engine)

    def keys_of(codes_NM: np.ndarray, coverage: dict[str, Any]) -> Keys:
        score_NC, words = label_scores(
            model, codes_NM, chosen, engine=runs, reasoning=reasoning, resume=resume, progress=progress
        )
        probability_NC = label_probabilities(model, score_NC)
        obs, obsm = _columns(model, chosen, probability_NC, key_added)
        if reasoning:
            obs[f"{key_added}_reasoning"] = np.array(words, dtype=object)
        obsm |= code_arrays(model.cell_tokenizer, codes_NM, key_added)
        return Keys(obs, obsm, {"coverage": coverage, "model": model.source, "labels": chosen}, key_added)

    with limited(memory):
        reading = Reading(layer, library_size_key, recover)
        if out is not None:
            if isinstance(adata, AnnData) or copy or key_added != "rvqa":
                raise InputError(
                    "out is for the path of a file, without copy and key_added. Write an AnnData yourself."
                )
            path, target = Path(adata), require_copy(adata, out, force=force)
            with copied(path, target) as root:
                keys_of(*codes_of_file(path, model.cell_tokenizer, reading)).add_to_file(root)
            return None
        given = in_memory(adata, layer=layer)
        taken = {"obs": [f"{key_added}_{name}" for name in (*COLUMNS, *(["reasoning"] if reasoning else []))]}
        require_free(given, key_added, taken | {"obsm": [f"{key_added}_probabilities", *code_names(key_added)]})
        keys = keys_of(*cell_codes(given, model.cell_tokenizer, reading))
        target_cells = copy_of(given) if copy and given is adata else given
        keys.add_to(target_cells)
        return target_cells if copy or given is not adata else None


COLUMNS = ("cell_type", "confidence", "alternative", "ontology_id")
"""What `annotate` adds to `obs`, behind its prefix."""


def _columns(
    model: Model, chosen: list[str], probability_NC: np.ndarray, key_added: str
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Columns of `obs` and arrays of `obsm` that say what cells were called."""
    order_NC = np.argsort(-probability_NC, axis=1, kind="stable")
    names = np.array(chosen, dtype=object)
    terms = np.array([model.card.ontology_ids.get(label, "") for label in chosen], dtype=object)
    best_N = order_NC[:, 0]
    obs: dict[str, Any] = {
        f"{key_added}_cell_type": _used(names[best_N], chosen),
        f"{key_added}_confidence": probability_NC[np.arange(len(best_N)), best_N],
    }
    if len(chosen) > 1:
        obs[f"{key_added}_alternative"] = _used(names[order_NC[:, 1]], chosen)
    obs[f"{key_added}_ontology_id"] = pd.Categorical(terms[best_N])
    return obs, {f"{key_added}_probabilities": probability_NC}


def _used(labels_N: np.ndarray, chosen: list[str]) -> pd.Categorical:
    """Categorical over the labels that occur, in the given order: scanpy's plots fail on categories without cells."""
    return pd.Categorical(labels_N, categories=chosen).remove_unused_categories()


def label_probabilities(model: Model, score_NC: np.ndarray) -> np.ndarray:
    """Calibrated probabilities of labels, float32 [N, C], from their scores: rows add up to 1."""
    return (torch.from_numpy(score_NC) / model.card.calibration).softmax(-1).numpy()


def label_scores(
    model: Model,
    codes_NM: np.ndarray,
    labels: Sequence[str],
    *,
    engine: str | Engine = "hf",
    reasoning: int = 0,
    resume: str | Path | None = None,
    progress: bool = False,
) -> tuple[np.ndarray, list[str]]:
    """Log probability of every label for every cell, and the words before them.

    Parameters
    ----------
    model
        From `rvqa.load`.
    codes_NM
        Codes uint8 [N, M].
    labels
        Texts to score; the model need not have been taught them.
    engine, reasoning, resume, progress
        As for `annotate`.

    Returns
    -------
    tuple
        Nats, float32 [N, C]; and N texts, empty without `reasoning`.
    """
    prompts = model.prompts
    runs = open_engine(model, engine)
    answers = beginnings([prompts.answer(ANNOTATE.answer, label=label)[0].tolist() for label in labels])
    score_NC = np.empty((len(codes_NM), len(labels)), dtype=np.float32)
    words: list[str] = []
    n_asks = len(codes_NM) * (2 if reasoning else 1)
    with tqdm(total=n_asks, desc="annotate", unit="cell", disable=None if progress else True) as bar:
        for start in range(0, len(codes_NM), BLOCK):
            block = slice(start, start + BLOCK)
            task = EVIDENCE if reasoning else ANNOTATE
            rows = [tuple(row) for row in prompts.ids(task.prompt, codes_NM[block]).tolist()]
            if reasoning:
                asks = [Ask(row, rule=Rule("text"), max_tokens=reasoning) for row in rows]
                replies = gather(model, runs, asks, resume=resume, bar=bar)
                outputs = [[each for each in reply.ids if each != prompts.end] for reply in replies]
                words += [str(prompts.tokenizer.decode(output)).strip() for output in outputs]
                then = tuple(prompts.ids(task.answer)[0].tolist())
                rows = [(*row, *output, *then) for row, output in zip(rows, outputs, strict=True)]
            asks = [Ask(row, answers=answers) for row in rows]
            score_NC[block] = [reply.scores for reply in gather(model, runs, asks, resume=resume, bar=bar)]
    return score_NC, words


def beginnings(answers: Sequence[Sequence[int]]) -> tuple[tuple[int, ...], ...]:
    """Fewest ids of each answer that no other begins with; all of them for answers that are equal."""
    seen = Counter(tuple(answer[:size]) for answer in answers for size in range(1, len(answer) + 1))
    sizes = [
        next((size for size in range(1, len(answer)) if seen[tuple(answer[:size])] == 1), len(answer))
        for answer in answers
    ]
    return tuple(tuple(answer[:size]) for answer, size in zip(answers, sizes, strict=True))
