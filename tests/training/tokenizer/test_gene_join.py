"""References that name their genes in two ways: joined if names can be, else rejected."""

from itertools import permutations

import numpy as np
import pandas as pd
import pytest
from anndata import AnnData

from rvqa.data.cells import Cells
from rvqa.data.genes import GeneAxis
from rvqa.data.shared_genes import shared_sentence
from rvqa.errors import InputError
from rvqa.training.references import read_reference
from rvqa.training.tokenizer.fit import fit_tokenizer, gene_shares, select_genes, shared_genes
from rvqa.training.tokenizer.settings import TokenizerSettings


@pytest.fixture(scope="module")
def pbmc(read) -> AnnData:
    """A third of the cells of PBMC3k, with both names of each gene."""
    adata = read("pbmc3k_10x")
    return adata[::3, adata.var["ensembl_id"] != ""].copy()


def part(adata: AnnData, third: int, names: str) -> Cells:
    """Return some of the cells, with only symbols, only Ensembl ids, or both for genes."""
    cells = adata[third::3]
    both = {"gene_symbol": cells.var["gene_symbol"].to_numpy(), "ensembl_id": cells.var["ensembl_id"].to_numpy()}
    index = [f"{i} of the file" for i in range(cells.n_vars)] if names == "both" else both[names]
    var = pd.DataFrame(both if names == "both" else {}, index=pd.Index(index, dtype=object))
    return read_reference(AnnData(cells.X, obs=cells.obs, var=var), name=f"{names}.h5ad", labels="cell_type")


@pytest.fixture
def with_table(ref_dir, monkeypatch):
    if not (ref_dir / "hgnc_complete_set.txt.gz").is_file():
        pytest.skip(f"no HGNC table in {ref_dir}")
    monkeypatch.setenv("RVQA_REF_DIR", str(ref_dir))


@pytest.fixture
def without_table(monkeypatch):
    monkeypatch.delenv("RVQA_REF_DIR", raising=False)


def test_symbols_and_ids_are_one_axis_with_the_table(with_table, pbmc):
    files = [part(pbmc, 0, "gene_symbol"), part(pbmc, 1, "ensembl_id")]
    facts = shared_genes(files)
    assert facts.n_by_file == (pbmc.n_vars, pbmc.n_vars)
    # Names that are not in the table, or now belong to another gene, stay separate.
    assert 0.99 * pbmc.n_vars < facts.n_common == 2 * pbmc.n_vars - facts.n_all
    assert shared_sentence(facts) == f"genes: {facts.n_all:,} in all, {facts.n_common:,} shared by all 2 files"
    tokenizer = fit_tokenizer(files, TokenizerSettings(epochs=2, n_top_genes=300, batch_size=128), progress=False)
    symbol_of = dict(zip(pbmc.var["ensembl_id"], pbmc.var["gene_symbol"], strict=True))
    chosen = zip(tokenizer.axis.symbols, tokenizer.axis.ensembl_ids, strict=True)
    right = [symbol_of.get(name) == symbol for symbol, name in chosen]
    assert np.mean(right) > 0.99
    both = zip(tokenizer.shares.axis.symbols, tokenizer.shares.axis.ensembl_ids, strict=True)
    assert all(symbol_of[name] == symbol for symbol, name in both if name and symbol != name)


def test_they_are_refused_without(without_table, pbmc):
    files = [part(pbmc, 0, "gene_symbol"), part(pbmc, 1, "ensembl_id")]
    said = r"ensembl_id\.h5ad shares 0 of its 11,608 genes with gene_symbol\.h5ad .*'ENSG\d+'.*RVQA_REF_DIR"
    for use in (fit_tokenizer, gene_shares, shared_genes, lambda each: select_genes(each, 300)):
        with pytest.raises(InputError, match=said):
            use(files)


@pytest.mark.parametrize("order", permutations(range(3)))
def test_a_file_with_both_names_joins_them_in_any_order(without_table, pbmc, order):
    files = [part(pbmc, i, names) for i, names in enumerate(("gene_symbol", "ensembl_id", "both"))]
    files = [files[i] for i in order]
    facts = shared_genes(files)
    assert facts.n_all == facts.n_common == pbmc.n_vars
    shares = gene_shares(files)
    assert set(zip(shares.axis.symbols, shares.axis.ensembl_ids, strict=True)) == set(
        zip(pbmc.var["gene_symbol"], pbmc.var["ensembl_id"], strict=True)
    )
    totals = dict(zip(pbmc.var["gene_symbol"], np.asarray(pbmc.X.sum(0, dtype=np.float64)).ravel(), strict=True))
    expected = np.array([totals[symbol] for symbol in shares.axis.symbols]) + 0.5
    assert np.allclose(shares.share_G, expected / expected.sum())


def test_one_file_is_its_own_axis(without_table, pbmc):
    file = part(pbmc, 0, "both")
    assert shared_sentence(shared_genes([file])) == f"genes: {pbmc.n_vars:,}"
    assert gene_shares([file]).axis == GeneAxis.from_adata(AnnData(var=file.var))


def test_counts_of_a_gene_that_a_file_names_twice_go_to_no_other_gene(without_table, pbmc):
    """One column has only a symbol, another also its Ensembl id; another file has a newer symbol first."""
    var = pbmc.var[["gene_symbol", "ensembl_id"]].astype(object).reset_index(drop=True)
    first, second = var.copy(), var.copy()
    first.loc[0, "gene_symbol"] = "NEWER"
    second.loc[1, ["gene_symbol", "ensembl_id"]] = second.loc[0, "gene_symbol"], ""
    files = [
        read_reference(AnnData(pbmc.X, var=each.set_index(each.index.map("row{}".format))), name=name)
        for name, each in (("a", first), ("b", second))
    ]
    shares = gene_shares(files)
    assert len(shares.axis) == pbmc.n_vars
    counts = np.asarray(pbmc.X.sum(0, dtype=np.float64)).ravel()
    share = counts[-1] / counts.sum()
    assert abs(shares.share_G[-1] / share - 1) < 0.02
