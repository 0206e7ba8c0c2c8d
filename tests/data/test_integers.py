"""Integers that are not counts raise doubts; no cells, genes or depths of real counts do."""

from collections.abc import Callable, Iterator

import numpy as np
import pytest
import scipy.sparse as sp
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st

from rvqa.data.integers import Doubt, doubt

N_CELLS = 512


def sample(counts: sp.csr_matrix, n_cells: int = N_CELLS) -> sp.csr_matrix:
    """Sample cells as the reader does, evenly spaced."""
    return counts[np.unique(np.linspace(0, counts.shape[0] - 1, n_cells).astype(np.int64))]


def changed(counts: sp.csr_matrix, values: np.ndarray) -> sp.csr_matrix:
    """Return other values at the same positions."""
    other = sp.csr_matrix((values, counts.indices.copy(), counts.indptr.copy()), counts.shape)
    other.eliminate_zeros()
    return other


def per(total: float, *, by_length: bool = False) -> Callable[[sp.csr_matrix], sp.csr_matrix]:
    """Return values that sum to `total` in each cell, from counts or counts per kilobase of random gene lengths."""

    def scaled(counts: sp.csr_matrix) -> sp.csr_matrix:
        kilobases = np.exp(np.random.default_rng(0).normal(0.5, 0.7, counts.shape[1]))
        values = counts.data / kilobases[counts.indices] if by_length else counts.data.astype(np.float64)
        sums = np.add.reduceat(values, counts.indptr[:-1])
        return changed(counts, values * np.repeat(total / sums, np.diff(counts.indptr)))

    return scaled


def then(first: Callable, *functions: Callable) -> Callable[[sp.csr_matrix], sp.csr_matrix]:
    """Apply functions to the values that `first` makes of counts."""

    def apply(counts: sp.csr_matrix) -> sp.csr_matrix:
        x = first(counts)
        values = x.data.astype(np.float64)
        for function in functions:
            values = function(values)
        return changed(x, values)

    return apply


def ranks(method: str, *, dense: bool = False, descending: bool = False) -> Callable[[sp.csr_matrix], sp.csr_matrix]:
    """Return the ranks of a cell's values among these, or among all its genes."""

    def rank(counts: sp.csr_matrix) -> sp.csr_matrix:
        sign = -1 if descending else 1
        if dense:
            some = sample(counts, 40).toarray()
            return sp.csr_matrix(scipy.stats.rankdata(sign * some, method=method, axis=1).astype(np.int64))
        rows = np.split(sign * counts.data, counts.indptr[1:-1])
        return changed(counts, np.concatenate([scipy.stats.rankdata(row, method=method) for row in rows]))

    return rank


def raw(counts: sp.csr_matrix) -> sp.csr_matrix:
    return counts


TIAN, MARROW = "tian2019_lung_cancer_lines", "he2020_bone_marrow_421genes"
PBMC3K, PBMC68K, PAPALEXI = "pbmc3k_10x", "pbmc68k_reduced_700", "papalexi2021_eccite_thp1_299genes"
REFUSED: dict[str, tuple[Callable, str, tuple[str, ...]]] = {
    # name: how it is made, the message, files in which it cannot be recognised
    "presence": (then(raw, np.sign), "presence or absence", ()),
    "counts x 2": (then(raw, lambda x: 2 * x), "multiples of 2", ()),
    "counts x 7": (then(raw, lambda x: 7 * x), "multiples of 7", ()),
    "CP10K": (then(per(1e4), np.rint), "times a factor", (TIAN,)),  # cells of 20,000 counts: a factor of 1/2
    "CP10K cut off": (then(per(1e4), np.floor), "times a factor", (TIAN,)),
    "CP100K": (then(per(1e5), np.rint), "times a factor", ()),
    "CPM": (then(per(1e6), np.rint), "times a factor", ()),
    "CPM cut off": (then(per(1e6), np.floor), "times a factor", ()),
    "TPM": (then(per(1e6, by_length=True), np.rint), "TPM or counts per 1,000,0|TPM or counts per 999,9", ()),
    "log1p CP10K": (then(per(1e4), np.log1p, np.rint), "logarithms", (MARROW,)),
    "log2 CP10K": (then(per(1e4), np.log1p, lambda x: x / np.log(2), np.rint), "logarithms", ()),
    "log2 CPM": (then(per(1e6), np.log1p, lambda x: x / np.log(2), np.rint), "logarithms", (TIAN,)),
    "log1p": (then(raw, np.log1p, np.rint), "logarithms", (PBMC68K, PAPALEXI)),
    "ordinal ranks": (ranks("ordinal"), "places in an order", ()),
    "min ranks": (ranks("min"), "places in an order", ()),
    "max ranks": (ranks("max"), "places in an order", ()),
    "min ranks from the highest": (ranks("min", descending=True), "places in an order", ()),
    "ordinal ranks of all genes": (ranks("ordinal", dense=True), "places in an order", ()),
    "min ranks of all genes": (ranks("min", dense=True), "places in an order", ()),
    "max ranks of all genes": (ranks("max", dense=True), "places in an order", ()),
}


class TestTold:
    @pytest.mark.parametrize("kind", REFUSED)
    def test_refused(self, read, data_file, kind):
        make, said, untold = REFUSED[kind]
        found = doubt(make(sample(read(data_file).X)))
        if data_file in untold:
            assert found is None
        else:
            assert found is not None
            assert found.certain
            assert any(words in found.text for words in said.split("|"))
            assert found.advice.endswith(".")

    def test_dense_ranks(self, read, data_file):
        found = doubt(ranks("dense")(sample(read(data_file).X)))
        assert found is not None
        assert "every number up to the largest value" in found.text
        if data_file in (TIAN, MARROW):  # the deepest cells and the shallowest
            assert found.certain == (data_file == TIAN)

    @pytest.mark.parametrize("kind", ["presence", "counts x 2", "CPM", "TPM", "ordinal ranks", "max ranks"])
    def test_ten_cells_are_enough(self, read, data_file, kind):
        found = doubt(REFUSED[kind][0](sample(read(data_file).X, 10)))
        assert found is not None
        assert found.certain

    def test_genes_missing_afterwards(self, read, data_file):
        counts = sample(read(data_file).X)
        genes = np.argsort(-np.bincount(counts.indices, minlength=counts.shape[1]))[:300]
        for kind in ("CPM", "CPM cut off", "counts x 7"):
            found = doubt(REFUSED[kind][0](counts)[:, np.sort(genes)])
            assert found is not None
            assert found.certain

    def test_types_and_no_change(self, read):
        counts = sample(read(PBMC3K).X)
        for kind in ("CPM", "presence", "max ranks", "log2 CP10K"):
            made = REFUSED[kind][0](counts)
            told = {dtype: doubt(made.astype(dtype)) for dtype in ("float32", "float64", "int32", "int64", "uint32")}
            assert isinstance(told["float32"], Doubt)
            assert len(set(told.values())) == 1
        before = made.copy()
        doubt(made)
        assert (before != made).nnz == 0

    def test_nothing_to_look_at(self):
        for x in (sp.csr_matrix((0, 5)), sp.csr_matrix((5, 0)), sp.csr_matrix((3, 4)), sp.csr_matrix([[0, 2], [0, 0]])):
            assert doubt(x) is None


def thinned(counts: sp.csr_matrix, share: float, rng: np.random.Generator) -> sp.csr_matrix:
    return changed(counts, rng.binomial(counts.data.astype(np.int64), share))


def downsampled(counts: sp.csr_matrix, total: int, rng: np.random.Generator) -> sp.csr_matrix:
    """Downsample as sc.pp.downsample_counts: cells above `total` are drawn down to it, the others stay."""
    rows = np.split(counts.data.astype(np.int64), counts.indptr[1:-1])
    drawn = [rng.multivariate_hypergeometric(row, total) if row.sum() > total else row for row in rows]
    return changed(counts, np.concatenate(drawn))


def panels(counts: sp.csr_matrix, rng: np.random.Generator) -> Iterator[sp.csr_matrix]:
    """Return all genes, and panels of the most variable, least variable, most expressed and random ones."""
    yield counts
    mean = np.asarray(counts.mean(axis=0)).ravel()
    fano = (np.asarray(counts.power(2).mean(axis=0)).ravel() - mean**2) / np.maximum(mean, 1e-9)
    order = np.argsort(-mean)
    even = order[:300][np.argsort(fano[order[:300]])[:60]]
    for genes in (order[:300], order[:50], np.argsort(-fano)[:200], even, rng.permutation(mean.size)[:200]):
        yield counts[:, np.sort(genes)]


def cells_of(x: sp.csr_matrix, rng: np.random.Generator) -> Iterator[np.ndarray]:
    """Return groups of at least ten cells: random ones, and the most extreme in what `doubt` checks."""
    lengths, totals = np.diff(x.indptr), np.asarray(x.sum(axis=1)).ravel()
    largest = x.max(axis=1).toarray().ravel()
    ones = np.bincount(np.repeat(np.arange(lengths.size), lengths)[x.data == 1], minlength=lengths.size)
    binary = np.flatnonzero(largest == 1)
    for size in (10, 64, N_CELLS):
        yield rng.permutation(lengths.size)[:size]
        yield binary[np.argsort(-lengths[binary])][:size]
        for measure in (totals, largest, ones / np.maximum(lengths, 1), largest - lengths):
            order = np.argsort(measure, kind="stable")
            start = int(rng.integers(max(lengths.size - size, 1)))
            yield from (order[:size], order[-size:], order[start : start + size])
    order = np.argsort(totals, kind="stable")
    alike = np.searchsorted(totals[order], 1.002 * totals[order], side="right") - np.arange(order.size)
    yield order[np.argmax(alike) :][: max(10, alike.max())][:N_CELLS]  # most cells have nearly the same total
    same, often = np.unique(totals, return_counts=True)
    yield np.flatnonzero(totals == same[np.argmax(often)])[:N_CELLS]


class TestRealCounts:
    def test_are_never_doubted(self, read, data_file):
        rng = np.random.default_rng(0)
        counts, n_seen = read(data_file).X, 0
        for panel in panels(counts, rng):
            shares = (0.3, 0.1, 0.03, 0.01)
            depths = (1.0, shares[n_seen % 4], float(10 ** rng.uniform(-2.5, -0.1)))
            variants = [thinned(panel, depth, rng) if depth < 1 else panel for depth in depths]
            some = panel[np.sort(rng.permutation(panel.shape[0])[:600])]
            totals = np.asarray(some.sum(axis=1)).ravel()
            variants += [downsampled(some, max(1, int(np.quantile(totals, q))), rng) for q in (0.02, 0.5)]
            for x in variants:
                for cells in cells_of(x, rng):
                    if cells.size >= 10:
                        n_seen += 1
                        assert doubt(x[np.sort(cells)]) is None
        assert n_seen > 1000

    def test_the_whole_sample_of_each_file(self, read, data_file):
        assert doubt(sample(read(data_file).X)) is None


class TestMadeUpCounts:
    @settings(max_examples=60, deadline=None)
    @given(st.integers(0, 2**32 - 1), st.floats(-2, 3), st.floats(0, 2), st.floats(0, 1))
    def test_poisson_of_any_rates_is_not_doubted(self, seed, level, genes, cells):
        rng = np.random.default_rng(seed)
        shape = int(rng.integers(10, 200)), int(rng.integers(20, 500))
        rates = np.exp(level + genes * rng.normal(size=(1, shape[1])) + cells * rng.normal(size=(shape[0], 1)))
        assert doubt(sp.csr_matrix(rng.poisson(np.minimum(rates, 1e5)))) is None
