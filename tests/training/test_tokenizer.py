"""Fitting a cell tokenizer: deterministic, codes in use, gene choice as told, bad references refused."""

import numpy as np
import pytest
import torch
from anndata import AnnData

from rvqa.codes import cell_codes
from rvqa.errors import InputError
from rvqa.evaluation.metrics import perplexity
from rvqa.training.reference import read_reference
from rvqa.training.tokenizer import TokenizerSettings, fit_tokenizer, select_genes
from rvqa.training.tokenizer_run import k_means


@pytest.fixture(scope="module")
def reference(shipped):
    return read_reference(shipped.references[0], labels="label", library_size_key="depth")


def test_the_same_seed_gives_the_same_tokenizer(reference):
    settings = TokenizerSettings(epochs=6, n_top_genes=300)
    torch.manual_seed(1)
    first = fit_tokenizer([reference], settings, progress=False)
    torch.manual_seed(2)
    second = fit_tokenizer([reference], settings, progress=False)
    third = fit_tokenizer([reference], TokenizerSettings(epochs=6, n_top_genes=300, seed=1), progress=False)
    for name, tensor in first.state_dict().items():
        assert torch.equal(second.state_dict()[name], tensor), name
    assert not torch.equal(third.codebooks_MKD, first.codebooks_MKD)
    assert len(first.axis) == 300


def test_no_code_is_dead(pbmc_tokenizer, read):
    """Every code of every level stands for some cell of the fit, and all levels are used evenly.

    Level 2, which details all kinds of cells of level 1 at once, is used less evenly than those after it.
    """
    codes = np.concatenate(
        [
            cell_codes(read(name), pbmc_tokenizer, layer=None, library_size_key=None)[0]
            for name in ("pbmc3k_10x", "kang2018_ifnb_pbmc_2k")
        ]
    )
    for level in range(8):
        assert len(np.unique(codes[:, level])) == 32, level
    used = perplexity(codes, 32)
    assert used[0] >= 12
    assert used[1] >= 20
    assert (used[2:] >= 26).all()


@pytest.mark.filterwarnings("ignore::rvqa.genes.CoverageWarning")
def test_genes_are_chosen_over_files_with_different_panels(reference, read):
    other = read_reference(read("pbmc3k_10x"), labels="cell_type")
    axis = select_genes([reference, other], 500)
    assert len(axis) == 500
    rare = np.asarray((other.counts > 0).sum(0)).ravel() < 10
    chosen = set(axis.symbols) - set(reference.axis.symbols)
    assert not chosen & set(np.array(other.axis.symbols)[rare])


def test_k_means_places_codewords_on_separate_groups():
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(6, 4, generator=generator) * 20
    rows = centres.repeat_interleave(30, 0) + 0.1 * torch.randn(180, 4, generator=generator)
    found = k_means(rows, 6, np.random.default_rng(0))
    assert torch.cdist(centres, found).amin(1).max() < 0.5


def test_too_few_cells_or_genes_are_refused(reference):
    few = reference.adata[:20].copy()
    with pytest.raises(InputError, match="50"):
        fit_tokenizer([read_reference(few[:5].copy(), labels="label")], progress=False)
    dense = AnnData(np.ones((20, 60), np.float32))
    dense.var_names = list(reference.axis.symbols[:60])
    with pytest.raises(InputError, match="20 cells"):
        fit_tokenizer([read_reference(dense)], progress=False)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"labels": "lable"}, "'label'"),
        ({"labels": "label", "condition": "condition", "control": "ctrl"}, "has no 'ctrl'"),
        ({"labels": "label", "condition": "condition"}, "go together"),
        ({"layer": "counts"}, "counts"),
    ],
)
def test_wrong_columns_are_refused(shipped, options, message):
    with pytest.raises(InputError, match=message):
        read_reference(shipped.references[0], **options)


def test_unlabelled_cells_and_ontology_ids(shipped):
    adata = shipped.references[0][:50].copy()
    adata.obs["label"] = ["unlabeled", *adata.obs["label"].astype(str)[1:]]
    adata.obs["cell_type_ontology_term_id"] = "CL:0000084"
    found = read_reference(adata, labels="label")
    assert found.labels[0] == ""
    assert "unlabeled" not in found.ontology_ids
    assert set(found.ontology_ids.values()) == {"CL:0000084"}
