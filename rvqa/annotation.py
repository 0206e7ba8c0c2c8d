"""`annotate`: cell types of cells, chosen by the language model from a closed set of labels.

All labels are scored in one forward pass a batch. The labels' tokens stand side by side behind the prompt; each label
sees the prompt and itself alone, at the positions it would have if it stood there alone (a tree of attention). The
score of a label is the log probability of its tokens and the end token; a softmax over the labels gives
probabilities.

Shapes: B cells, P prompt ids, T ids of all labels, C labels, H hidden width, V vocabulary.
"""

from collections.abc import Sequence

import numpy as np
import pandas as pd
import torch
from anndata import AnnData
from tqdm import tqdm

from rvqa.codes import cell_codes, copy_of, record, write_codes
from rvqa.errors import InputError
from rvqa.model import Model
from rvqa.obs import require_known
from rvqa.prompts import ANNOTATE

_LOGITS = 50_000_000
"""Entries of the largest block of logits, B x T x V."""


def annotate(
    adata: AnnData,
    model: Model,
    *,
    labels: Sequence[str] | None = None,
    layer: str | None = None,
    library_size_key: str | None = None,
    recover: bool = False,
    key_added: str = "rvqa",
    copy: bool = False,
    progress: bool = True,
) -> AnnData | None:
    """Annotate cells with cell types.

    Parameters
    ----------
    adata
        Raw counts, as for `rvqa.encode`; encoded on the way.
    model
        From `rvqa.load`.
    labels
        Closed set to choose from; by default every label the model was taught. A subset is allowed.
    layer, library_size_key, recover, key_added, copy
        As for `rvqa.encode`.
    progress
        Show a progress bar.

    Returns
    -------
    AnnData or None
        With `copy`, the new object; else None and `adata` gains what `rvqa.encode` writes and
        `obs["rvqa_cell_type"]`, categorical over the labels that occur;
        `obs["rvqa_confidence"]`, float32: probability of that label among the set;
        `obs["rvqa_alternative"]`, categorical: the second likeliest label (absent with one label);
        `obs["rvqa_ontology_id"]`, categorical: Cell Ontology id of the label, "" where the model knows none;
        `obsm["rvqa_probabilities"]`, float32 [N, labels], its columns named by `uns["rvqa"]["labels"]`.

    Raises
    ------
    rvqa.errors.InputError
        As for `rvqa.encode`; no labels, a repeated one, or one the model was not taught.

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
    codes_NM, alignment = cell_codes(
        adata, model.cell_tokenizer, layer=layer, library_size_key=library_size_key, recover=recover
    )
    probability_NC = label_probabilities(model, codes_NM, chosen, progress=progress)

    target = copy_of(adata) if copy else adata
    write_codes(target, model.cell_tokenizer, codes_NM, key_added)
    order_NC = np.argsort(-probability_NC, axis=1, kind="stable")
    names = np.array(chosen, dtype=object)
    terms = np.array([model.card.ontology_ids.get(label, "") for label in chosen], dtype=object)
    best_N = order_NC[:, 0]
    target.obs[f"{key_added}_cell_type"] = _used(names[best_N], chosen)
    target.obs[f"{key_added}_confidence"] = probability_NC[np.arange(len(best_N)), best_N]
    if len(chosen) > 1:
        target.obs[f"{key_added}_alternative"] = _used(names[order_NC[:, 1]], chosen)
    target.obs[f"{key_added}_ontology_id"] = pd.Categorical(terms[best_N])
    target.obsm[f"{key_added}_probabilities"] = probability_NC
    record(target, key_added, {"coverage": alignment.report(), "model": model.source, "labels": chosen})
    return target if copy else None


def _used(labels_N: np.ndarray, chosen: list[str]) -> pd.Categorical:
    """Categorical over the labels that occur, in the given order: scanpy's plots fail on categories without cells."""
    return pd.Categorical(labels_N, categories=chosen).remove_unused_categories()


@torch.inference_mode()
def label_probabilities(
    model: Model, codes_NM: np.ndarray, labels: Sequence[str], *, progress: bool = False
) -> np.ndarray:
    """Probability of every label for every cell, float32 [N, C]; rows add up to 1.

    Parameters
    ----------
    model
        From `rvqa.load`.
    codes_NM
        Codes uint8 [N, M].
    labels
        Texts to score; the model need not have been taught them.
    progress
        Show a progress bar.
    """
    if not len(codes_NM):
        return np.zeros((0, len(labels)), dtype=np.float32)
    prompts, network = model.prompts, model.language_model
    device, dtype = network.device, network.dtype
    answers = [torch.from_numpy(prompts.answer(ANNOTATE.answer, label=label)[0]) for label in labels]
    label_T = torch.repeat_interleave(torch.tensor([len(answer) for answer in answers])).to(device)
    answer_T = torch.cat(answers).to(device)
    offset_T = torch.cat([torch.arange(len(answer)) for answer in answers]).to(device)
    T = len(answer_T)
    P = prompts.ids(ANNOTATE.prompt, codes_NM[:1]).shape[1]

    sees_SS = torch.ones(P + T, P + T, dtype=torch.bool, device=device).tril()
    sees_SS[P:, P:] &= label_T[:, None] == label_T[None, :]
    mask_11SS = torch.zeros(1, 1, P + T, P + T, dtype=dtype, device=device)
    mask_11SS.masked_fill_(~sees_SS, torch.finfo(dtype).min)
    position_1S = torch.cat([torch.arange(P, device=device), P + offset_T])[None]
    # The id at T is predicted one step before it: at the label's previous id, or at the end of the prompt.
    predicts_T = torch.where(offset_T == 0, P - 1, P + torch.arange(T, device=device) - 1)

    output = network.get_output_embeddings()
    size = int(max(1, min(256, _LOGITS // (T * output.weight.shape[0]))))
    probability_NC = np.empty((len(codes_NM), len(labels)), dtype=np.float32)
    for start in tqdm(range(0, len(codes_NM), size), desc="annotate", unit="batch", disable=None if progress else True):
        prompt_BP = torch.from_numpy(prompts.ids(ANNOTATE.prompt, codes_NM[start : start + size])).to(device)
        B = len(prompt_BP)
        hidden_BSH = network.get_decoder()(
            input_ids=torch.cat([prompt_BP, answer_T.expand(B, T)], dim=1),
            attention_mask=mask_11SS.expand(B, 1, P + T, P + T),
            position_ids=position_1S.expand(B, P + T),
            use_cache=False,
        ).last_hidden_state
        log_BTV = output(hidden_BSH[:, predicts_T]).float().log_softmax(-1)
        log_BT = log_BTV.gather(2, answer_T.expand(B, T)[..., None])[..., 0]
        score_BC = log_BT.new_zeros(B, len(labels)).index_add_(1, label_T, log_BT)
        probability_NC[start : start + size] = score_BC.softmax(-1).cpu().numpy()
    return probability_NC
