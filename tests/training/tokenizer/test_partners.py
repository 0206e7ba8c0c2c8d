from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from anndata import AnnData

from rvqa.data.genes import GeneAxis
from rvqa.training.references import read_reference
from rvqa.training.tokenizer import partners as tokenizer_partners
from rvqa.training.tokenizer.cells import gather
from rvqa.training.tokenizer.partners import find_partners

GENES = 120


def file(seed, kinds, *, genes=None, shift=0.0):
    """Return cells of known kinds; `shift` scales each gene by its own factor, as another laboratory would."""
    profiles = np.random.default_rng(0).gamma(0.4, 1.0, (max(kinds) + 1, GENES)) + 0.02
    rng = np.random.default_rng(seed)
    mean = profiles[kinds] * np.exp(shift * rng.normal(size=GENES))
    counts = rng.poisson(2_000 * mean / mean.sum(1, keepdims=True)).astype(np.float32)
    genes = np.arange(GENES) if genes is None else genes
    adata = AnnData(sp.csr_matrix(counts[:, genes]), var=pd.DataFrame(index=[f"GENE{i}" for i in genes]))
    adata.obs["label"] = [f"kind {kind}" for kind in kinds]
    return read_reference(adata, name=f"file {seed}", labels="label")


def cells_of(*files):
    return gather(files, GeneAxis.union([each.axis for each in files]))


def pairs(partners):
    return np.repeat(np.arange(len(partners.pointers) - 1), np.diff(partners.pointers)), partners.rows


@pytest.fixture(scope="module")
def three():
    kinds = np.repeat(np.arange(4), 40)
    return cells_of(file(1, kinds), file(2, kinds, shift=1.0), file(3, kinds, genes=np.arange(80), shift=1.0))


def test_partners_are_mutual_of_other_files_and_of_one_kind(three):
    one, other = pairs(find_partners(three, seed=0))
    assert len(one) > 500
    assert (three.file_N[one] != three.file_N[other]).all()
    assert set(zip(one, other, strict=True)) == set(zip(other, one, strict=True))
    assert np.mean(three.label_N[one] == three.label_N[other]) > 0.95
    for pair in ({0, 1}, {0, 2}, {1, 2}):
        assert any(set(both) == pair for both in zip(three.file_N[one], three.file_N[other], strict=True))


def test_partners_are_those_of_brute_force(three):
    """Brute force takes the ten nearest both ways, by an SVD of the whole product."""
    both_G = three.measured_FG[:2].all(0)
    x, y = (
        tokenizer_partners._standardised(three, np.flatnonzero(three.file_N == f), both_G).astype(np.float64)
        for f in (0, 1)
    )
    u, s, vt = np.linalg.svd(x @ y.T)
    k = tokenizer_partners.DIMENSIONS
    u, v = u[:, :k] * np.sqrt(s[:k]), vt[:k].T * np.sqrt(s[:k])
    near = (u / np.linalg.norm(u, axis=1)[:, None]) @ (v / np.linalg.norm(v, axis=1)[:, None]).T
    expected = set()
    for i in range(len(near)):
        for j in np.argsort(-near[i])[:10]:
            if i in np.argsort(-near[:, j])[:10]:
                expected.add((i, int(j) + int((three.file_N == 0).sum())))
    one, other = pairs(find_partners(three, seed=0))
    chosen = (three.file_N[one] == 0) & (three.file_N[other] == 1)
    found = set(zip(one[chosen].tolist(), other[chosen].tolist(), strict=True))
    assert len(found & expected) / len(found | expected) > 0.99  # in single precision a tie may fall otherwise


def test_a_kind_of_one_file_alone_has_few_partners():
    shared, alone = np.repeat([0, 1, 2], 50), np.repeat([0, 1, 2, 3], 50)
    cells = cells_of(file(4, shared), file(5, alone, shift=0.5))
    one, _ = pairs(find_partners(cells, seed=0))
    share = [np.isin(np.flatnonzero(cells.label_N == kind), one).mean() for kind in range(4)]
    assert share[3] < 0.5 < min(share[:3])


def test_perturbed_cells_have_partners_among_those_perturbed_alike(three):
    """A near control cell of another study is never a partner, because it would erase the response."""
    perturbed = np.arange(len(three.file_N)) % 2 == 0
    perturbed &= three.file_N != 2
    cells = replace(three, condition_N=np.where(perturbed, "drug", "").astype(object))
    one, other = pairs(find_partners(cells, seed=0))
    assert (perturbed[one] == perturbed[other]).all()
    assert np.mean(perturbed[one]) > 0.1
    assert not set(three.file_N[other[perturbed[one]]]) & {2}


def test_draws_come_from_the_partners(three):
    partners = find_partners(three, seed=0)
    rows = np.arange(0, len(three.file_N), 3)
    having, drawn = partners.draw(rows, np.random.default_rng(0))
    own = [set(partners.rows[a:b]) for a, b in zip(partners.pointers[:-1], partners.pointers[1:], strict=True)]
    assert [at for at, row in enumerate(rows) if own[row]] == having.tolist()
    assert all(other in own[row] for row, other in zip(rows[having], drawn, strict=True))


def test_no_partners_without_another_file_or_shared_genes():
    kinds = np.repeat([0, 1], 30)
    for cells in (
        cells_of(file(6, kinds)),
        cells_of(file(6, kinds, genes=np.arange(60)), file(7, kinds, genes=np.arange(40, GENES))),
    ):
        partners = find_partners(cells, seed=0)
        assert len(partners.rows) == 0
        assert partners.draw(np.arange(5), np.random.default_rng(0))[0].tolist() == []


def test_large_files_are_drawn_from_and_many_files_compared_in_turn(monkeypatch):
    monkeypatch.setattr(tokenizer_partners, "MOST_CELLS", 30)
    monkeypatch.setattr(tokenizer_partners, "MOST_FILES", 1)
    kinds = np.repeat([0, 1], 40)
    cells = cells_of(*(file(seed, kinds) for seed in range(10, 14)))
    one, other = pairs(find_partners(cells, seed=0))
    seen = set(zip(cells.file_N[one].tolist(), cells.file_N[other].tolist(), strict=True))
    assert seen == {(a, (a + step) % 4) for a in range(4) for step in (1, 3)}
    assert max(len(set(one[cells.file_N[one] == f])) for f in range(4)) <= 30
    same = find_partners(cells, seed=0)
    assert (same.rows.tolist(), find_partners(cells, seed=1).rows.tolist()) != (same.rows.tolist(), same.rows.tolist())
