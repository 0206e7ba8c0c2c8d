"""`rvqa fit`: from labelled reference cells to a model. Fit the cell tokenizer, then teach the language model."""

import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
import transformers
from anndata import AnnData

import rvqa
from rvqa.annotation import label_scores
from rvqa.data.cells import Cells
from rvqa.data.reading import Reading
from rvqa.data.shared_genes import shared_sentence
from rvqa.errors import InputError, InputWarning, nearest, quoted
from rvqa.language.model import Card, Model
from rvqa.language.prompts import PromptEncoder
from rvqa.training.language.backbone import load_backbone, open_base
from rvqa.training.language.calibration import set_aside, temperature
from rvqa.training.language.corpus import Corpus, CorpusSettings, texts, words
from rvqa.training.language.cpt import LanguageSettings, pretrain
from rvqa.training.references import read_reference
from rvqa.training.tokenizer.fit import fit_tokenizer, shared_genes
from rvqa.training.tokenizer.settings import TokenizerSettings


@dataclass(frozen=True)
class FitSettings:
    """Settings of all parts of `fit`; saved in the model's `rvqa.json`."""

    tokenizer: TokenizerSettings = field(default_factory=TokenizerSettings)
    corpus: CorpusSettings = field(default_factory=CorpusSettings)
    language: LanguageSettings = field(default_factory=LanguageSettings)
    seed: int = 0


def settings_for(seed: int, *, steps: int | None = None) -> FitSettings:
    """Default settings with one seed for every part, and the given number of language model steps, if any."""
    language = LanguageSettings() if steps is None else LanguageSettings(steps=steps)
    return FitSettings(tokenizer=TokenizerSettings(seed=seed), language=language, seed=seed)


def fit(
    references: Sequence[Cells],
    *,
    base: str | Path | None = None,
    settings: FitSettings | None = None,
    progress: bool = True,
) -> Model:
    """Make a model from reference cells.

    Parameters
    ----------
    references
        Files read by `read_reference`; their gene panels may differ. At least one has labels.
    base
        Pretrained language model to continue from (see `rvqa.training.language.backbone`). Defaults to None, which
        trains the small one from scratch.
    settings
        Settings of the fit; see `FitSettings`. The same settings, cells and machine give the same model.
    progress
        Whether to show progress bars. Defaults to True.

    Returns
    -------
    Model
        The model in evaluation mode; `save_pretrained` writes it.

    Raises
    ------
    rvqa.errors.InputError
        There is no reference or no label, or `base` cannot be opened.

    Examples
    --------
    >>> reference = read_reference(adata, labels="cell_type")  # doctest: +SKIP
    >>> fit([reference]).save_pretrained("model")  # doctest: +SKIP
    """
    settings = settings or FitSettings()
    labels, perturbations = words(references)
    if not labels:
        raise InputError("No reference has labels. Name the column of obs with cell types: labels='cell_type'.")
    if len(labels) == 1:
        warnings.warn(f"There is one label, {labels[0]!r}: every cell will get it.", InputWarning, stacklevel=2)
    _require_partners(references, perturbations)
    pretrained = None if base is None else open_base(base)  # first, so that an error comes before the long fit
    aside_N = set_aside(np.concatenate([each.label_N for each in references]), seed=settings.seed)
    asides = np.split(aside_N, np.cumsum([len(each) for each in references])[:-1])
    hidden = [
        replace(each, label_N=np.where(aside, "", each.label_N)) for each, aside in zip(references, asides, strict=True)
    ]
    cell_tokenizer = fit_tokenizer(hidden, settings.tokenizer, progress=progress)
    language_model, text_tokenizer, vocabulary = load_backbone(
        pretrained, texts(references), cell_tokenizer.codebooks_MKD, seed=settings.seed
    )
    prompts = PromptEncoder(text_tokenizer, vocabulary)
    corpus = Corpus(references, cell_tokenizer, prompts, settings.corpus, seed=settings.seed, aside_N=aside_N)
    loss = pretrain(language_model, corpus, settings.language, progress=progress)
    ontology_ids = {label: term for each in references for label, term in each.ontology_ids.items()}
    training = {
        "references": [
            {
                "name": each.name,
                "cells": len(each),
                "genes": len(each.var),
                "counts_from": each.place,
                "left_out": dict(each.left_out),
            }
            for each in references
        ],
        "genes": shared_sentence(shared_genes(references)),
        "base": None if base is None else str(base),
        "settings": asdict(settings),
        "loss": loss,
        "versions": {"rvqa": rvqa.__version__, "torch": torch.__version__, "transformers": transformers.__version__},
    }
    card = Card(labels, perturbations, ontology_ids, training)
    model = Model(cell_tokenizer, language_model, text_tokenizer, vocabulary, card)
    if not aside_N.any():
        return model
    score_NC, _ = label_scores(model, corpus.codes_VNM[0, aside_N], labels)
    calibrated = temperature(score_NC, np.array([labels.index(label) for label in corpus.label_N[aside_N]]))
    return replace(model, card=replace(card, calibration=calibrated))


def _require_partners(references: Sequence[Cells], perturbations: Sequence[str]) -> None:
    """Reject a perturbation that cannot be learned: none of its cells has a control cell of its label in its file."""
    known = set()
    for each in references:
        controls = set(each.label_N[each.condition_N == ""]) - {""}
        known |= set(each.condition_N[np.isin(each.label_N, list(controls))])
    if lost := [name for name in perturbations if name not in known]:
        raise InputError(
            f"Perturbation {lost[0]!r} has no control cells: no file holds labelled cells of one type both with it and "
            "as control. Add such control cells, or leave its cells out."
        )


def fit_files(
    files: Sequence[AnnData],
    *,
    names: Sequence[str] | None = None,
    labels: str | None,
    condition: str | None = None,
    control: str | Sequence[str] | None = None,
    layer: str | Sequence[str | None] | None = None,
    library_size_key: str | None = None,
    recover: bool = False,
    base: str | Path | None = None,
    settings: FitSettings | None = None,
    progress: bool = True,
) -> Model:
    """Run `fit` on AnnData objects with the same column names; arguments are as for `read_reference` and `fit`.

    `layer` may be a sequence with one layer for each file.
    """
    if condition is not None and not any(condition in adata.obs for adata in files):
        known = sorted({str(key) for adata in files for key in adata.obs})
        raise InputError(f"No reference has a column {condition!r} in obs. {nearest(condition, known)}")
    layers = [layer] * len(files) if layer is None or isinstance(layer, str) else layer
    given = zip(names or [f"reference {i + 1}" for i in range(len(files))], files, layers, strict=True)
    references = [
        read_reference(
            adata,
            name=name,
            labels=labels,
            condition=condition,
            control=control,
            reading=Reading(own, library_size_key, recover),
        )
        for name, adata, own in given
    ]
    if condition is not None and not words(references)[1]:
        named = quoted([control] if isinstance(control, str) else control or ())
        raise InputError(
            f"obs[{condition!r}] is {named} in all cells: nothing is perturbed. Add perturbed cells, or leave the "
            "condition out."
        )
    return fit(references, base=base, settings=settings, progress=progress)
