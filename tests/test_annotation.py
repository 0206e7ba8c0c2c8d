"""`annotate`: one pass scores each label as it would alone; documented keys; far better than chance."""

import warnings

import anndata
import numpy as np
import pytest
import torch

import rvqa
from rvqa.annotation import beginnings, label_scores
from rvqa.errors import InputError
from rvqa.language.prompts import ANNOTATE
from rvqa.serving.asks import Ask
from rvqa.serving.hf import HuggingFace
from rvqa.serving.replies import gather
from rvqa.serving.scoring import AnswerTree


@pytest.fixture
def cells(shipped):
    return next(iter(shipped.tests.values())).copy()


def test_keys_of_the_contract(cells, model, tmp_path):
    assert rvqa.annotate(cells, model, library_size_key="depth", progress=False) is None
    obs, probabilities = cells.obs, cells.obsm["rvqa_probabilities"]
    occurring = set(obs["rvqa_cell_type"])
    assert list(obs["rvqa_cell_type"].cat.categories) == [label for label in model.card.labels if label in occurring]
    assert probabilities.shape == (cells.n_obs, len(model.card.labels))
    np.testing.assert_allclose(probabilities.sum(axis=1), 1, atol=1e-5)
    assert [model.card.labels[best] for best in probabilities.argmax(axis=1)] == list(obs["rvqa_cell_type"])
    np.testing.assert_array_equal(obs["rvqa_confidence"], probabilities.max(axis=1))
    assert (obs["rvqa_alternative"].astype(str) != obs["rvqa_cell_type"].astype(str)).all()
    assert "rvqa_ontology_id" in obs
    assert {"rvqa_codes", "X_rvqa"} <= set(cells.obsm)
    assert cells.uns["rvqa"]["labels"] == model.card.labels
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # these labels have slashes, which names in HDF5 files cannot have
        cells.write_h5ad(tmp_path / "cells.h5ad")
    back = anndata.read_h5ad(tmp_path / "cells.h5ad")
    np.testing.assert_array_equal(back.obs["rvqa_cell_type"], obs["rvqa_cell_type"])


def test_one_forward_pass_scores_as_each_answer_alone(cells, model):
    """The tree of attention equals the plain way: log probability of one answer's tokens after the prompt."""
    codes = rvqa.encode(cells, model, library_size_key="depth", copy=True).obsm["rvqa_codes"][:5]
    labels = [*model.card.labels, "a label it was never taught", "B"]
    answers = [model.prompts.answer(ANNOTATE.answer, label=label)[0].tolist() for label in labels]
    prompt = torch.from_numpy(model.prompts.ids(ANNOTATE.prompt, codes))
    for several in (answers, beginnings(answers)):
        together = AnswerTree(model.language_model, several).scores(prompt)
        padded = torch.full((5, prompt.shape[1] + 3), 7)  # padding on the left changes nothing
        padded[:, 3:] = prompt
        shifted = AnswerTree(model.language_model, several).scores(padded, torch.full((5,), 3))
        alone = []
        for answer in map(torch.tensor, several):
            ids = torch.cat([prompt, answer.expand(len(prompt), -1)], dim=1)
            with torch.inference_mode():
                log = model.language_model(input_ids=ids).logits.double().log_softmax(-1)
            before = log[:, prompt.shape[1] - 1 : -1]
            alone.append(before.gather(2, ids[:, prompt.shape[1] :, None])[..., 0].sum(1))
        np.testing.assert_allclose(together, torch.stack(alone, dim=1), atol=1e-4)
        np.testing.assert_allclose(shifted, together, atol=1e-4)
    np.testing.assert_allclose(label_scores(model, codes, labels)[0], together, atol=1e-5)


def test_prompts_of_several_lengths_at_once(cells, model):
    """Rows of a batch are padded to the longest; each gets the same scores as alone."""
    vocabulary, prompts = model.vocabulary, model.prompts
    codes = rvqa.encode(cells, model, library_size_key="depth", copy=True).obsm["rvqa_codes"][:6]
    answers = beginnings([prompts.answer(ANNOTATE.answer, label=label)[0].tolist() for label in model.card.labels])
    asks = [
        Ask(
            (
                *vocabulary.ids(codes[: 1 + i % 3]).ravel().tolist(),
                *prompts.ids(ANNOTATE.prompt, codes[i : i + 1])[0].tolist(),
            ),
            answers,
        )
        for i in range(6)
    ]
    together = gather(model, HuggingFace(model), asks)
    for ask, reply in zip(asks, together, strict=True):
        (alone,) = gather(model, HuggingFace(model), [ask])
        np.testing.assert_allclose(alone.scores, reply.scores, atol=1e-4)


def test_beginnings_are_the_fewest_ids_that_tell_answers_apart():
    assert beginnings([[1, 2, 9], [1, 3, 4, 9], [5, 6, 9]]) == ((1, 2), (1, 3), (5,))
    assert beginnings([[1, 9], [1, 2, 9]]) == ((1, 9), (1, 2))  # one label begins the other, so its end decides
    assert beginnings([[1, 2, 9]]) == ((1,),)
    assert beginnings([[1, 2, 9], [1, 2, 9]]) == ((1, 2, 9), (1, 2, 9))


def test_held_out_cells_are_annotated_far_above_the_majority_class(cells, model):
    rvqa.annotate(cells, model, library_size_key="depth", progress=False)
    right = (cells.obs["rvqa_cell_type"].astype(str) == cells.obs["label"]).mean()
    assert right > cells.obs["label"].value_counts(normalize=True).max() + 0.1


def test_a_closed_set_of_labels(cells, model):
    chosen = ["CD19+ B", "CD14+ Monocyte"]
    rvqa.annotate(cells, model, labels=chosen, library_size_key="depth", progress=False)
    assert set(cells.obs["rvqa_cell_type"]) <= set(chosen)
    one = rvqa.annotate(cells, model, labels=chosen[:1], library_size_key="depth", copy=True, progress=False)
    assert (one.obs["rvqa_confidence"] == 1).all()


@pytest.mark.parametrize(
    ("labels", "message"),
    [(["CD19 B"], "'CD19\\+ B'"), ([], "0 entries"), (["CD19+ B", "CD19+ B"], "1 of them different")],
)
def test_wrong_labels_are_refused(cells, model, labels, message):
    with pytest.raises(InputError, match=message):
        rvqa.annotate(cells, model, labels=labels, library_size_key="depth", progress=False)
    assert "rvqa_codes" not in cells.obsm
