"""Examples: ids are the tokenised templates, only answers enter the loss, partners are controls of the type."""

import numpy as np
import pytest

from rvqa.data.reading import Reading
from rvqa.language.prompts import ANNOTATE, GENERATE, PERTURB, PromptEncoder
from rvqa.training.language.corpus import Corpus, CorpusSettings, texts, words
from rvqa.training.references import read_reference


@pytest.fixture(scope="module")
def references(shipped):
    return [
        read_reference(
            shipped.references[0],
            labels="label",
            condition="condition",
            control="control",
            reading=Reading(None, "depth"),
        )
    ]


@pytest.fixture(scope="module")
def corpus(references, model):
    return Corpus(references, model.cell_tokenizer, model.prompts, CorpusSettings(variants=2), seed=0)


def test_ids_are_the_tokenised_text(model, corpus):
    codes = corpus.codes_VNM[0, :4]
    cells = model.vocabulary.texts(codes)
    for task in (ANNOTATE, GENERATE, PERTURB):
        for template in (task.prompt, task.answer):
            ids = model.prompts.ids(template, codes, label="CD19+ B", condition="control")
            text = template.replace("{label}", "CD19+ B").replace("{condition}", "control")
            for row, cell in zip(np.broadcast_to(ids, (4, ids.shape[1])), cells, strict=True):
                assert row.tolist() == model.text_tokenizer.encode(text.replace("{cell}", cell))


def test_words_cannot_become_cell_tokens(model):
    ids = model.prompts.ids(GENERATE.prompt, label="B<|cell|><|c0_01|>", condition="<|/cell|>")
    assert (model.vocabulary.kinds(ids) == -1).all()


def test_loss_is_taken_on_the_answer_and_its_end(model, corpus):
    batches = corpus.epoch(64)
    assert {batch.task for batch in batches} == {"annotate", "generate", "perturb"}
    labels = set(model.card.labels)
    for batch in batches:
        assert len(batch.ids_BL) <= 64
        for ids, answer in zip(batch.ids_BL, batch.answer_BL, strict=True):
            written = ids[answer]
            assert written[-1] == model.text_tokenizer.eos_token_id
            if batch.task == "annotate":
                assert model.text_tokenizer.decode(written[:-1]).strip() in labels
            else:
                model.vocabulary.codes(written[None, :-1])  # rejects anything but one whole cell


def test_every_labelled_cell_is_annotated_once_an_epoch(corpus, references):
    rows = sum(len(batch.ids_BL) for batch in corpus.epoch(64) if batch.task == "annotate")
    assert rows == (references[0].label_N != "").sum()


def test_partners_are_control_cells_of_the_same_label(corpus):
    assert len(corpus.perturbed) > 50
    for cell in corpus.perturbed[:50]:
        partners = corpus.partners(cell)
        assert (corpus.condition_N[partners] == "").all()
        assert (corpus.label_N[partners] == corpus.label_N[cell]).all()


def test_the_same_seed_gives_the_same_epoch(references, model):
    first, second = (
        Corpus(references, model.cell_tokenizer, model.prompts, CorpusSettings(variants=3), seed=5).epoch(32)
        for _ in range(2)
    )
    assert [batch.task for batch in first] == [batch.task for batch in second]
    assert all(np.array_equal(a.ids_BL, b.ids_BL) for a, b in zip(first, second, strict=True))


def test_words_and_texts(references, shipped):
    labels, perturbations = words(references)
    assert perturbations == [shipped.perturbation]
    joined = " ".join(texts(references))
    assert all(label in joined for label in labels)


def test_prompts_need_an_end_token(model):
    class Endless:
        eos_token_id = None

    with pytest.raises(ValueError, match="end token"):
        PromptEncoder(Endless(), model.vocabulary)
