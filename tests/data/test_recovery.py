"""Counts from log1p data: exactly the counts, or an error."""

import numpy as np
import pytest
import scipy.sparse as sp
from anndata import AnnData
from hypothesis import given, settings
from hypothesis import strategies as st

import rvqa
from rvqa.data.counts import read_counts
from rvqa.data.reading import Reading
from rvqa.data.recovery import MIN_VALUES, recover_counts
from rvqa.errors import InputError
from tests.raw_counts import counts_and_var, raw_counts

FULL_COLUMNS = ("n_counts_all_genes", "nUMI_all_genes")


def cells(seed: int = 0, n_cells: int = 40, n_genes: int = 300) -> sp.csr_matrix:
    """Overdispersed counts of cells of very different depth, each with more than MIN_VALUES values."""
    rng = np.random.default_rng(seed)
    counts = rng.poisson(rng.uniform(1, 8, (n_cells, 1)) * rng.gamma(0.6, 2.0, (n_cells, n_genes)))
    return sp.csr_matrix(counts.astype(np.float32))


def depth_of(counts: sp.csr_matrix) -> np.ndarray:
    return np.asarray(counts.sum(axis=1, dtype=np.float64)).ravel()


def logs_of(
    counts: sp.csr_matrix,
    kind: str = "float32",
    depth: np.ndarray | None = None,
    target: float = 1e4,
) -> sp.csr_matrix:
    """As scanpy does, scale and take the logarithm in the storage dtype; "3" rounds it to 3 decimals."""
    depth = depth_of(counts) if depth is None else depth
    dtype = np.float64 if kind == "float64" else np.float32
    logs = counts.astype(dtype)
    logs.data /= np.repeat((depth / target).astype(dtype), np.diff(logs.indptr))
    np.log1p(logs.data, out=logs.data)
    if kind.isdigit():
        logs.data = np.round(logs.data, int(kind))
    return logs


def equal(a: sp.csr_matrix, b: sp.csr_matrix) -> bool:
    return a.shape == b.shape and (a != b).nnz == 0


class TestMadeUp:
    @settings(max_examples=25, deadline=None)
    @given(st.integers(0, 2**32 - 1), st.sampled_from(["float32", "float64", "3", "4"]), st.booleans())
    def test_are_the_counts(self, seed, kind, median):
        counts = cells(seed)
        target = float(np.median(depth_of(counts))) if median else 1e4
        found = recover_counts(logs_of(counts, kind, target=target))
        assert equal(found.counts, counts)
        assert found.counts.dtype == np.float32
        assert found.decimals == (int(kind) if kind.isdigit() else None)
        assert found.scale == pytest.approx(target, rel=1e-4)
        assert found.library_size.tolist() == depth_of(counts).tolist()

    @pytest.mark.parametrize("form", [np.asarray, sp.csr_matrix, sp.csc_matrix, sp.csr_array])
    def test_any_form_and_empty_cells(self, form):
        counts = cells()
        counts = sp.csr_matrix(counts.multiply(~np.isin(np.arange(40), [0, 7, 39])[:, None]))
        depth = np.maximum(depth_of(counts), 1)
        logs = form(logs_of(counts, depth=depth).toarray())
        before = logs.copy()
        found = recover_counts(logs)
        assert equal(found.counts, counts)
        assert found.library_size[[0, 7, 39]].tolist() == [0, 0, 0]
        assert np.abs(logs - before).max() == 0

    def test_float64_that_holds_float32(self):
        assert equal(recover_counts(logs_of(cells()).astype(np.float64)).counts, cells())

    def test_smallest_value_of_two_or_more_counts(self):
        counts = cells()
        counts.data[counts.data < 3] = 3
        for kind in ("float32", "3"):
            assert equal(recover_counts(logs_of(counts, kind)).counts, counts)

    def test_missing_genes_show_the_target_by_whole_library_sizes(self):
        counts = cells(0, 60, 400)
        depth = depth_of(counts)
        part = counts[:, :200]
        for kind in ("float32", "float64"):
            for target in (1e4, 1e6):
                found = recover_counts(logs_of(part, kind, depth, target))
                assert equal(found.counts, part)
                assert (found.scale, found.library_size.tolist()) == (target, depth.tolist())
        found = recover_counts(logs_of(part, "float32", depth, 7654.3))  # no usual target, so no depth is invented
        assert equal(found.counts, part)
        assert (found.scale, found.library_size.tolist()) == (None, depth_of(part).tolist())


class TestMultiples:
    def test_a_cell_of_even_counts_is_known_by_its_library_size_alone(self):
        counts = cells()
        counts[5] *= 2
        depth = depth_of(counts)
        halved = counts.copy()
        halved[5] /= 2
        # The values cannot show it; natural counts do this with a probability below 2^-values.
        assert equal(recover_counts(logs_of(counts)).counts, halved)
        assert equal(recover_counts(logs_of(counts), library_size=depth).counts, counts)

    def test_cells_with_few_values_need_a_library_size(self):
        counts = cells(0, 40, 300)
        keep = np.ones(300, dtype=bool)
        keep[MIN_VALUES:] = False
        depth, part = depth_of(counts), counts[:, keep]
        for kind in ("float32", "3"):
            logs = logs_of(part, kind, depth)
            with pytest.raises(InputError, match=r"not certain in \d+ of 40 cells: .*library_size_key"):
                recover_counts(logs)
            found = recover_counts(logs, library_size=depth)
            assert equal(found.counts, part)
            assert found.scale == pytest.approx(1e4, rel=1e-4)

    def test_a_wrong_library_size_is_refused(self):
        depth = depth_of(cells())
        for wrong in (depth[::-1], depth_of(cells(1)), np.full(40, 1e4)):
            with pytest.raises(InputError, match="not those that it was normalised with"):
                recover_counts(logs_of(cells()), library_size=wrong)
        for useless in (depth[:3], np.where(depth > depth[0], depth, np.nan), -depth):
            with pytest.raises(InputError, match="one finite library size > 0 for each of 40 cells"):
                recover_counts(logs_of(cells()), library_size=useless)


class TestRefusals:
    @pytest.mark.parametrize("kind", ["float32", "float64", "3"])
    def test_one_altered_value(self, kind):
        rng = np.random.default_rng(0)
        logs = logs_of(cells(), kind)
        # With 3 decimals, counts of 100 and more differ from the next by less than the noise added here.
        small = np.flatnonzero(cells().data < 60)
        least = [rows.start + int(np.argmin(logs.data[rows])) for rows in map(slice, logs.indptr[:-1], logs.indptr[1:])]
        for place in (*rng.choice(small, 100, replace=False), *least):
            for factor in (1.004, 0.5, 1 / 13):  # to a cell's smallest value: all others fit a finer unit
                altered = logs.copy()
                value = np.expm1(altered.data[place]) * (factor if kind == "3" or factor < 1 else 1.0001)
                altered.data[place] = np.round(np.log1p(value), 3) if kind == "3" else np.log1p(value)
                try:
                    found = recover_counts(altered)
                except InputError:
                    continue
                # Half of an even count is a count, so no other value may have changed.
                changed = np.flatnonzero(found.counts.data != cells().data)
                assert changed.tolist() == [place]
                assert found.counts.data[place] == cells().data[place] * factor

    @pytest.mark.parametrize(
        "change",
        [
            lambda x: np.log2(1 + np.expm1(x)),
            lambda x: np.sqrt(np.expm1(x)),
            lambda x: (x + np.roll(x, 1, 0) + np.roll(x, 2, 0)) / 3,  # smoothed over neighbours
            lambda x: x * np.random.default_rng(0).uniform(0.9, 1.1, x.shape[1]).astype(x.dtype),  # by gene
            lambda x: np.maximum(x + np.where(np.arange(len(x)) % 2, 0.21, 0)[:, None] * (x > 0), 0),  # by batch
            lambda x: x.astype(np.float16).astype(np.float32),
            lambda x: np.round(x, 1),
            np.expm1,
        ],
    )
    def test_values_that_are_not_counts(self, change):
        for kind in ("float32", "float64", "3"):
            changed = np.asarray(change(logs_of(cells(), kind).toarray()))
            for x in (changed, np.round(changed, 3)):
                with pytest.raises(InputError, match="recovered"):
                    recover_counts(x)

    def test_scaled_and_broken_values(self):
        logs = logs_of(cells()).toarray()
        for x in (logs - logs.mean(0), np.where(logs > 5, np.nan, logs), np.zeros((3, 4)), logs * 1e3):
            with pytest.raises(InputError, match="finite values from 0 to 30"):
                recover_counts(x)

    def test_values_too_small_to_be_anything(self):
        logs = logs_of(cells(), "float64").toarray()
        for tiny in (5e-324, 1e-310, 1e-31):
            logs[0, 0] = tiny
            with np.errstate(all="raise"), pytest.raises(InputError, match="none between 0 and 1e-30"):
                recover_counts(logs)


def log1p_of(values: sp.csr_matrix) -> sp.csr_matrix:
    """Return log1p in float32 of values that were not normalised."""
    logs = values.astype(np.float32)
    np.log1p(logs.data, out=logs.data)
    return logs


def best(counts: sp.csr_matrix, n_genes: int) -> np.ndarray:
    """Return the genes found in most cells, in their order."""
    return np.sort(np.argsort(-np.bincount(counts.indices, minlength=counts.shape[1]), kind="stable")[:n_genes])


def downsampled(counts: sp.csr_matrix, total: int) -> sp.csr_matrix:
    """Downsample as sc.pp.downsample_counts: cells above `total` are drawn down to it, the others stay."""
    rng = np.random.default_rng(0)
    drawn = counts.copy()
    for rows in map(slice, drawn.indptr[:-1], drawn.indptr[1:]):
        of = drawn.data[rows].astype(np.int64)
        if of.sum() > total:
            drawn.data[rows] = rng.multivariate_hypergeometric(of, total)
    drawn.eliminate_zeros()
    return drawn


def pbmc(read, n_cells: int = 300) -> tuple[sp.csr_matrix, np.ndarray, sp.csr_matrix]:
    """Real cells with all genes, their depths, and the same cells cut to 600 genes with enough values in each."""
    counts = read("pbmc3k_10x").X
    part = counts[:, best(counts, 600)]
    kept = np.flatnonzero(np.diff(part.indptr) >= 2 * MIN_VALUES)[:n_cells]
    return counts[kept], depth_of(counts[kept]), part[kept]


class TestInventedDepth:
    """A shared factor does not prove a target: library sizes are then sums of the counts, and `scale` is None."""

    def check(self, logs: sp.csr_matrix, counts: sp.csr_matrix, scale: float | None = None) -> None:
        found = recover_counts(logs)
        assert equal(found.counts, counts)
        assert (found.scale, found.library_size.tolist()) == (scale, depth_of(counts).tolist())

    @pytest.mark.parametrize("kind", ["float32", "float64", "3"])
    @pytest.mark.parametrize("factor", [1, 1 / 2, 3, 1 / 10, 0.7])
    def test_one_factor(self, read, kind, factor):
        counts, _, part = pbmc(read)
        for some in (counts, part, counts[:1], part[:1], part[:2]):
            # `logs_of` divides by depth / target, so this multiplies all cells by one factor.
            self.check(logs_of(some, kind, np.full(some.shape[0], 1e4), factor * 1e4), some)

    @pytest.mark.parametrize("factors", [(1, 1 / 2), (1, 1 / 4, 1 / 5, 1 / 8), tuple(1 / k for k in range(1, 21))])
    def test_one_factor_a_batch(self, read, factors):
        counts, _, part = pbmc(read)
        batch = np.resize(factors, counts.shape[0])
        for some in (counts, part):
            self.check(logs_of(some, "float64", 1 / batch, 1), some)

    @pytest.mark.parametrize("share", [0.02, 0.1, 0.5, 0.9])
    @pytest.mark.parametrize("target", [1e4, 1e6])
    def test_a_part_was_never_normalised(self, read, share, target):
        counts, depth, part = pbmc(read)
        raw = np.random.default_rng(0).permutation(depth.size) < share * depth.size
        for some in (counts, part):
            self.check(logs_of(some, "float32", np.where(raw, target, depth), target), some)

    def test_a_part_has_another_target(self, read):
        counts, depth, part = pbmc(read)
        other = np.arange(depth.size) % 2 == 0  # a factor of 1/4 would show for 100 and 5, but not for 2
        for smaller, larger in ((1e4, 1e6), (5e3, 1e4), (2e3, 1e4)):
            for some in (counts, part):
                target = np.where(other, smaller, larger)
                self.check(logs_of(some, "float32", depth / target, 1), some)

    def test_targets_below_the_usual_ones(self, read):
        _, depth, part = pbmc(read)
        for target in (2e3, 5e3, 2e4, 5e5):  # each library size times 1e4 / target or 1e6 / target is whole as well
            self.check(logs_of(part, "float64", depth, target), part)

    def test_few_different_factors(self, read):
        _, depth, part = pbmc(read)
        for n_cells in (1, 2, 5, 15):
            self.check(logs_of(part[:n_cells], "float64", depth[:n_cells]), part[:n_cells])
        found = recover_counts(logs_of(part[:60], "float32", depth[:60]))
        assert (found.scale, found.library_size.tolist()) == (1e4, depth[:60].tolist())

    def test_cells_of_equal_totals(self, read):
        counts, depth, _ = pbmc(read)
        total = int(depth.min())
        even = downsampled(counts, total)
        self.check(logs_of(even), even, scale=1e4)
        self.check(log1p_of(even), even, scale=total)  # the rows sum to this, and it is the target they were scaled to
        part = even[:, best(even, 600)]
        part = part[np.diff(part.indptr) >= 2 * MIN_VALUES]
        self.check(logs_of(part, depth=np.full(part.shape[0], float(total))), part)
        most = downsampled(counts, int(np.median(depth)))
        self.check(logs_of(most), most, scale=1e4)
        self.check(log1p_of(most), most)

    def test_targets_are_proven_as_before(self, read):
        counts, depth, part = pbmc(read)
        for target in (1e4, 1e5, 1e6):
            for kind in ("float32", "float64", "3"):
                found = recover_counts(logs_of(part, kind, depth, target))
                assert equal(found.counts, part)
                assert found.scale == target
                assert np.abs(found.library_size - depth).max() <= (2 if kind == "3" else 0)
                self.check(logs_of(counts[:60], "float32", target=target), counts[:60], scale=target)


class TestDepthColumn:
    """log1p of counts that were not normalised, with a column of library sizes: these are the cells' depths."""

    @pytest.mark.parametrize("kind", ["float32", "float64", "3"])
    @pytest.mark.parametrize("factor", [1, 1 / 2, 3])
    def test_is_kept(self, read, kind, factor):
        counts, depth, part = pbmc(read)
        few = part[:, best(part, 300)[::25]]
        assert (np.diff(few.indptr) < MIN_VALUES).all()  # no single cell is certain
        filled = np.diff(few.indptr) > 0
        for some, of in ((counts, depth), (part, depth), (few[filled], depth[filled])):
            found = recover_counts(logs_of(some, kind, np.full(of.size, 1e4), factor * 1e4), library_size=of)
            assert equal(found.counts, some)
            assert (found.scale, found.library_size.tolist()) == (None, of.tolist())

    def test_a_batch_with_a_multiple_of_the_factor_is_refused(self, read):
        _, depth, part = pbmc(read)
        few = part[:, best(part, 300)[::25]]
        filled = np.diff(few.indptr) > 0
        doubled = few[filled].copy()
        doubled[::2] *= 2  # the same values arise from these counts times 1 and those times 2
        with pytest.raises(InputError, match="not those that it was normalised with"):
            recover_counts(log1p_of(doubled), library_size=depth[filled])

    def test_below_the_counts_is_refused(self, read):
        counts, depth, _ = pbmc(read)
        depth[3] -= 1
        with pytest.raises(InputError, match="1 library sizes are below the sum of the counts of their cell"):
            recover_counts(log1p_of(counts), library_size=depth)

    def test_of_another_file_is_refused(self, read):
        counts, depth, _ = pbmc(read)
        with pytest.raises(InputError, match="not those that it was normalised with"):
            recover_counts(logs_of(counts), library_size=depth[::-1])

    def test_reaches_the_reader(self, read):
        _, depth, part = pbmc(read)
        adata = AnnData(log1p_of(part), obs={"total": depth})
        assert read_counts(adata, Reading(None, "total", recover=True)).library_size.tolist() == depth.tolist()
        assert read_counts(adata, Reading(recover=True)).library_size.tolist() == depth_of(part).tolist()
        assert not read_counts(adata, Reading(recover=True)).given


class TestWiring:
    def test_only_when_asked_and_only_log1p(self):
        counts = cells()
        adata = AnnData(logs_of(counts), layers={"umi": counts})
        with pytest.raises(InputError, match=r"pass layer='umi' \(--layer\)\.$"):
            raw_counts(adata)
        assert equal(raw_counts(adata, recover=True), counts)
        assert equal(raw_counts(adata, layer="umi", recover=True), counts)
        del adata.layers["umi"]
        with pytest.raises(InputError, match=r"with layer='counts'\. Or have them recovered: recover=True, or --rec"):
            raw_counts(adata)
        adata.raw = adata.copy()
        adata.X = adata.X.toarray() - 1  # scanpy's tutorials end with this: X scaled, .raw log1p
        with pytest.raises(
            InputError, match=r"looks scaled.*recovered from adata\.raw\.X: pass layer='raw' \(--layer\) and recover="
        ):
            raw_counts(adata, recover=True)
        assert equal(raw_counts(adata, layer="raw", recover=True), counts)

    def test_library_size(self):
        counts = cells(0, 60, 400)
        depth = depth_of(counts)
        adata = AnnData(logs_of(counts[:, :200], depth=depth), obs={"total": depth})
        assert read_counts(adata, Reading(recover=True)).library_size.tolist() == depth.tolist()
        few = adata[:, : MIN_VALUES - 2].copy()
        few = few[np.diff(few.X.indptr) > 0].copy()
        found = read_counts(few, Reading(None, "total", recover=True))
        assert equal(found.counts, counts[: few.n_obs, : MIN_VALUES - 2])
        assert (len(found.var), found.library_size.tolist()) == (MIN_VALUES - 2, few.obs["total"].tolist())
        with pytest.raises(InputError, match="library_size_key"):
            raw_counts(few, recover=True)

    def test_encode_gives_the_codes_of_the_counts(self, model, shipped):
        cells = shipped.references[0]
        logs = AnnData(
            logs_of(sp.csr_matrix(cells.X), "3", cells.obs["depth"].to_numpy()), obs=cells.obs, var=cells.var
        )
        for key in (None, "depth"):
            kept = np.diff(logs.X.indptr) >= (0 if key else 2 * MIN_VALUES)
            encoded = rvqa.encode(cells[kept].copy(), model, library_size_key="depth", copy=True)
            recovered = rvqa.encode(logs[kept].copy(), model, library_size_key=key, recover=True, copy=True)
            same = recovered.obsm["rvqa_codes"] == encoded.obsm["rvqa_codes"]
            assert same.all() if key else same.mean() > 0.99


class TestRealFiles:
    def test_the_counts_or_a_refusal(self, read, data_file):
        adata = read(data_file)
        adata = adata[:: max(1, adata.X.nnz // 500_000)]  # all cells of all files take 25 s
        counts = adata.X
        known = [key for key in FULL_COLUMNS if key in adata.obs]
        depth = adata.obs[known[0]].to_numpy(dtype=np.float64) if known else depth_of(counts)
        recovered = {}
        for kind, target in (("float32", 1e4), ("float64", 1e4), ("3", 1e4), ("float32", float(np.median(depth)))):
            logs = logs_of(counts, kind, depth, target)
            for library_size in (None, depth):
                try:
                    found = recover_counts(logs, library_size=library_size)
                except InputError:
                    recovered[kind, target, library_size is not None] = False
                else:
                    recovered[kind, target, library_size is not None] = True
                    assert equal(found.counts, counts)
                    if found.scale is None:  # not all genes, no usual target
                        assert known
                        assert target != 1e4
                        assert np.array_equal(found.library_size, depth_of(counts))
                    else:
                        assert found.scale == pytest.approx(target, rel=1e-5)
                        assert np.abs(found.library_size - depth).max() <= (2 if kind == "3" else 0)
        enough = bool((np.diff(counts.indptr) >= MIN_VALUES).all())
        full = {key: value for key, value in recovered.items() if key[0] != "3"}
        assert all(value for key, value in full.items() if enough or key[2]), recovered
        if data_file in ("pbmc3k_10x", "zheng2017_sorted_pbmc_3500", "pbmc68k_reduced_700"):  # no counts of 1,000
            assert all(recovered.values())

    def test_scanpys_pbmc68k(self, read):
        scanpy = pytest.importorskip("scanpy")
        source = scanpy.datasets.pbmc68k_reduced()
        depth = source.obs["n_counts"].to_numpy(dtype=np.float64)
        known = read("pbmc68k_reduced_700")
        assert list(known.obs_names) == list(source.obs_names)
        for found in (recover_counts(source.raw.X, library_size=depth), recover_counts(source.raw.X)):
            assert found.decimals == 3
            assert equal(found.counts, known.X)
        counts, var = counts_and_var(source, layer="raw", recover=True)
        assert equal(counts, known.X)
        assert var.equals(source.raw.var)
