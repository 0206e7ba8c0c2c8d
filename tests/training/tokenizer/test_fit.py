"""Fitting a cell tokenizer: deterministic, all codes used, documented gene choice, bad references rejected."""

import numpy as np
import pytest
import torch
from anndata import AnnData

from rvqa.data.reading import Reading
from rvqa.encoding import cell_codes
from rvqa.errors import InputError, InputWarning
from rvqa.kernels import ops
from rvqa.training.references import read_reference
from rvqa.training.tokenizer.codebooks import fill_codebooks, k_means
from rvqa.training.tokenizer.fit import fit_tokenizer, select_genes
from rvqa.training.tokenizer.run import Run
from rvqa.training.tokenizer.settings import TokenizerSettings


@pytest.fixture(scope="module")
def reference(shipped):
    return read_reference(shipped.references[0], labels="label", reading=Reading(library_size_key="depth"))


def test_the_same_seed_gives_the_same_tokenizer(reference, one_thread):
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


# Every code in use


def test_every_code_is_the_code_of_some_cell_of_the_fit(pbmc_tokenizer, read):
    """This holds for every fit, because codewords that no cell uses move to cells after the last step."""
    codes = np.concatenate(
        [cell_codes(read(name), pbmc_tokenizer)[0] for name in ("pbmc3k_10x", "kang2018_ifnb_pbmc_2k")]
    )
    assert used(codes) == [32] * 8


def used(codes_NM):
    """Return the number of different codes at each level."""
    return [len(np.unique(codes_N)) for codes_N in np.asarray(codes_NM).T]


def filled(codebooks, latent):
    """Return codebooks after `fill_codebooks`, and the codes of the latents."""
    own = codebooks.clone()
    fill_codebooks(own, latent)
    again = codebooks.clone()
    fill_codebooks(again, latent)
    assert torch.equal(own, again)
    return own, ops.residual_quantize(latent, ops.prepare(own))


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


UNUSED = {
    "all far away": 1e6 + normal(4, 32, 6, seed=1),
    "far away on all sides": 1e6 * normal(4, 32, 6, seed=1),
    "all the same": torch.ones(4, 32, 6),
    "all but one far away": torch.cat([normal(4, 1, 6), 1e6 * normal(4, 31, 6)], dim=1),
    "one far away": torch.cat([normal(4, 31, 6), torch.full((4, 1, 6), 1e6)], dim=1),
    "too small": 1e-20 * normal(4, 32, 6),
}


@pytest.mark.parametrize("codebooks", UNUSED.values(), ids=UNUSED.keys())
@pytest.mark.parametrize("cells", [200, 3000])
def test_unused_codewords_are_moved_until_none_is_left(codebooks, cells):
    own, codes = filled(codebooks, normal(cells, 6))
    assert used(codes) == [32] * 4
    moved = (own != codebooks).any(2)
    assert moved.any(1).all()


@pytest.mark.parametrize("outlier", [1.0, 1e6])
def test_cells_that_come_in_copies_and_outliers_use_every_code(outlier):
    latent = normal(300, 6).repeat_interleave(7, 0)
    latent[:7] *= outlier
    assert used(filled(UNUSED["all far away"], latent)[1]) == [32] * 4


def test_no_latent_comes_to_lie_farther_from_its_codewords():
    """This holds for one level; codebooks whose codes are all used stay as they are."""
    latent, codebooks = normal(2000, 6), UNUSED["one far away"][:1]
    own, codes = filled(codebooks, latent)
    before = ops.nearest_codeword(latent, codebooks[0])[1]
    assert (ops.nearest_codeword(latent, own[0])[1] <= before).all()
    assert torch.equal(own[0, :31], codebooks[0, :31])
    assert used(codes) == [32]
    assert torch.equal(filled(own, latent)[0], own)


@pytest.mark.parametrize("distinct", [1, 2, 20, 32])
def test_fewer_different_cells_than_codewords_leave_codes_unused(distinct):
    """Each different cell has its own codeword at level 1, which leaves residuals of zero."""
    codebooks = UNUSED["far away on all sides"]
    own, codes = filled(codebooks, normal(distinct, 6).repeat(50, 1))
    assert used(codes) == [distinct, 1, 1, 1]
    assert torch.isfinite(own).all()


@pytest.mark.parametrize("settings", [{}, {"quantize": False}, {"epochs": 1}], ids=str)
@pytest.mark.parametrize("stored", [False, True])
def test_a_fit_that_ends_with_unused_codewords_fills_them(shipped, reference, tmp_path, monkeypatch, settings, stored):
    """This holds for the codes of `encode`, bit for bit, with cells in memory and on disk."""
    run = Run.run

    def ends_badly(self, **options):
        run(self, **options)
        self.tokenizer.codebooks_MKD[:, 5:] += 1e3

    monkeypatch.setattr(Run, "run", ends_badly)
    settings = TokenizerSettings(**{"epochs": 4, "n_top_genes": 300, "levels": 4, **settings})
    tokenizer = fit_tokenizer([reference], settings, scratch=tmp_path if stored else None, progress=False)
    codes, _ = cell_codes(shipped.references[0], tokenizer, Reading(library_size_key="depth"))
    assert used(codes) == [32] * 4


def test_cells_that_are_too_alike_are_told(shipped):
    same = shipped.references[0][[0] * 40].copy()
    same.obs_names_make_unique()
    settings = TokenizerSettings(epochs=1, levels=2)
    with pytest.warns(InputWarning, match="use 1, 1 of 32 codes at the levels 1 to 2: they are too alike"):
        fit_tokenizer([read_reference(same, reading=Reading(library_size_key="depth"))], settings, progress=False)


# Genes, k-means, bad references


@pytest.mark.filterwarnings("ignore::rvqa.data.alignment.CoverageWarning")
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


def test_too_few_cells_or_genes_are_refused(shipped, reference):
    few = shipped.references[0][:20].copy()
    with pytest.raises(InputError, match="50"):
        fit_tokenizer([read_reference(few[:5].copy(), labels="label")], progress=False)
    dense = AnnData(np.random.default_rng(0).poisson(3.0, (20, 60)).astype(np.float32))
    dense.var_names = list(reference.axis.symbols[:60])
    with pytest.raises(InputError, match="20 cells"):
        fit_tokenizer([read_reference(dense)], progress=False)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"labels": "lable"}, "'label'"),
        ({"labels": "label", "condition": "condition", "control": "ctrl"}, "has no 'ctrl'"),
        ({"labels": "label", "condition": "condition"}, "go together"),
        ({"reading": Reading("counts")}, "counts"),
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
    assert found.label_N[0] == ""
    assert "unlabeled" not in found.ontology_ids
    assert set(found.ontology_ids.values()) == {"CL:0000084"}
