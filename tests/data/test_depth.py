import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from anndata import AnnData

import rvqa
from rvqa.data.counts import read_counts
from rvqa.data.depth import GeneShares
from rvqa.data.genes import GeneAxis
from rvqa.data.reading import Reading
from rvqa.errors import InputError
from rvqa.tokenizer.model import CellTokenizer, CellTokenizerConfig
from rvqa.training.references import read_reference
from rvqa.training.tokenizer.fit import gene_shares


def drawn(seed, share_G, genes, *, cells=400, depth=5_000):
    """Draw counts of cells from shares and keep some genes; a column has the depth over all genes."""
    rng = np.random.default_rng(seed)
    sizes = rng.integers(depth // 2, 2 * depth, cells)
    counts = rng.poisson(sizes[:, None] * share_G).astype(np.float32)
    names = np.array([f"GENE{i}" for i in range(len(share_G))])
    return AnnData(
        sp.csr_matrix(counts[:, genes]),
        obs=pd.DataFrame({"depth": counts.sum(1)}, index=[f"cell{i}" for i in range(cells)]),
        var=pd.DataFrame(index=names[genes]),
    )


@pytest.fixture(scope="module")
def share_G():
    share = np.random.default_rng(0).lognormal(0, 1.5, 600)
    return share / share.sum()


def test_shares_of_files_that_measured_different_genes(share_G):
    """The true shares are known; every group of genes is common to two of the files."""
    panels = [np.arange(0, 450), np.arange(150, 600), np.r_[0:100, 500:600]]
    files = [drawn(seed, share_G, panel) for seed, panel in enumerate(panels)]
    shares = gene_shares([read_reference(each, name=f"file {i}") for i, each in enumerate(files)])
    order = [int(name.removeprefix("GENE")) for name in shares.axis.symbols]
    least = min(file.obs["depth"].sum() for file in files)  # at least one file measures each gene
    standard_error_G = np.sqrt(share_G[order] / least)
    assert (np.abs(shares.share_G - share_G[order]) < 5 * standard_error_G).all()
    for file, panel in zip(files, panels, strict=True):
        depth_N = read_counts(file).depth(shares)
        assert depth_N.sum() == pytest.approx(file.obs["depth"].sum(), rel=0.01)
        assert np.corrcoef(depth_N, file.obs["depth"])[0, 1] > 0.95
        assert np.asarray(file.X.sum(1)).sum() < 0.9 * depth_N.sum(), "the panel had lost counts"
        assert len(panel) < 600


def test_totals_that_a_file_gives_are_believed(share_G):
    """A single file of a panel does not show how many counts are missing, but its column of totals does."""
    file = drawn(3, share_G, np.arange(200))
    told = gene_shares(
        [
            read_reference(file, name="file", reading=Reading(library_size_key="depth")),
            read_reference(drawn(4, share_G, np.arange(600)), name="whole"),
        ]
    )
    found = dict(zip(told.axis.symbols, told.share_G, strict=True))
    assert found["GENE5"] == pytest.approx(share_G[5], rel=0.1)
    given = read_counts(file, Reading(library_size_key="depth"))
    assert given.given
    assert given.depth(told).tolist() == file.obs["depth"].tolist()


def test_a_file_with_all_genes_has_the_depth_it_stores(share_G):
    file = drawn(5, share_G, np.arange(600))
    cells = read_counts(file)
    shares = gene_shares([read_reference(file, name="file")])
    assert not cells.given
    assert cells.depth(shares).tolist() == np.asarray(file.X.sum(1)).ravel().tolist()


def test_genes_the_fit_does_not_know_add_no_depth(share_G):
    whole, part = drawn(6, share_G, np.arange(600)), drawn(7, share_G, np.arange(300))
    shares = gene_shares([read_reference(part, name="part")])
    stored = np.asarray(whole.X[:, :300].sum(1), dtype=np.float64).ravel()
    assert read_counts(whole).depth(shares).tolist() == stored.tolist()


def test_codes_of_a_file_cut_to_a_panel_are_those_of_its_depth(share_G):
    whole = drawn(8, share_G, np.arange(600))
    shares = gene_shares([read_reference(whole, name="whole")])
    tokenizer = CellTokenizer(shares.axis, CellTokenizerConfig(hidden=16, latent=8), shares)
    with_column, without = whole[:, ::4].copy(), whole[:, ::4].copy()
    rvqa.encode(without, tokenizer)
    estimated = np.asarray(without.X.sum(1), dtype=np.float64).ravel() / share_G[::4].sum()
    assert read_counts(without).depth(shares) == pytest.approx(estimated, rel=0.02)
    with_column.obs["estimate"] = read_counts(without).depth(shares)
    rvqa.encode(with_column, tokenizer, library_size_key="estimate")
    assert np.array_equal(with_column.obsm["rvqa_codes"], without.obsm["rvqa_codes"])


def test_cells_without_any_known_gene(share_G):
    file = drawn(9, share_G, np.arange(600))
    shares = GeneShares(GeneAxis.from_adata(file).subset(np.arange(100)), np.full(100, 0.01))
    counts = file.X.toarray()
    counts[[3, 8], :100] = 0
    file.X = sp.csr_matrix(counts)
    with pytest.raises(InputError, match=r"2 of 400 cells have no counts in any of the file's 100 genes.*'3', '8'"):
        read_counts(file).depth(shares)


class TestFiles:
    def test_shares_are_saved_with_the_tokenizer(self, share_G, tmp_path):
        """The axis keeps its order, and genes outside it are kept."""
        shares = gene_shares([read_reference(drawn(10, share_G, np.arange(600)), name="file")])
        axis = shares.axis.subset(np.arange(599, 400, -2))
        CellTokenizer(axis, CellTokenizerConfig(), shares).save_pretrained(tmp_path)
        loaded = CellTokenizer.from_pretrained(tmp_path)
        assert loaded.axis == axis
        assert dict(zip(loaded.shares.axis.symbols, loaded.shares.share_G, strict=True)) == dict(
            zip(shares.axis.symbols, shares.share_G, strict=True)
        )

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda frame: frame.drop(columns="share"), "no share and on_axis"),
            (lambda frame: frame.assign(on_axis=1), "no share and on_axis"),
            (lambda frame: frame.assign(share=frame["share"] * 2), "positive numbers that add up to 1"),
            (lambda frame: frame.assign(share=np.nan), "positive numbers that add up to 1"),
            (lambda frame: frame.iloc[:-1], "positive numbers that add up to 1"),
        ],
    )
    def test_a_damaged_table_is_refused(self, share_G, tmp_path, change, message):
        shares = gene_shares([read_reference(drawn(11, share_G, np.arange(600)), name="file")])
        CellTokenizer(shares.axis, CellTokenizerConfig(), shares).save_pretrained(tmp_path)
        file = tmp_path / "genes.parquet"
        change(pd.read_parquet(file)).to_parquet(file, index=False)
        with pytest.raises(InputError, match=message):
            CellTokenizer.from_pretrained(tmp_path)
