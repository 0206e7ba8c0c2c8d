"""Raw counts: which input passes, which is rejected with what message, and the normalisation of counts."""

import math
from types import SimpleNamespace

import anndata
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from anndata import AnnData
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rvqa.data.depth import empty_cells, library_size, log1p_normalise
from rvqa.data.kinds import MAX_COUNT, MatrixKind, canonical_csr, classify, inspect_matrix
from rvqa.errors import InputError
from tests.raw_counts import counts_and_var, raw_counts

pytestmark = pytest.mark.filterwarnings("ignore:the matrix subclass:PendingDeprecationWarning")
quick = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
seeds = st.integers(0, 2**32 - 1)
FORMS = {
    "dense": lambda x: x,
    "fortran": np.asfortranarray,
    "csr": sp.csr_matrix,
    "csc": sp.csc_matrix,
    "csr_array": sp.csr_array,
    "csc_array": sp.csc_array,
}
# anndata does not store these, but a caller may pass them.
ALL_FORMS = FORMS | {"matrix": np.matrix, "coo": sp.coo_matrix, "strided": lambda x: np.repeat(x, 2, axis=1)[:, ::2]}


def cells(seed: int, n_cells: int | None = None, n_genes: int | None = None) -> np.ndarray:
    """Counts like real ones: overdispersed, mostly zero, at very different depths; no cell is empty."""
    rng = np.random.default_rng(seed)
    n_cells, n_genes = n_cells or int(rng.integers(5, 60)), n_genes or int(rng.integers(60, 200))
    depth = rng.uniform(0.5, 4, (n_cells, 1))
    counts = rng.poisson(depth * rng.gamma(0.4, 2.0, (n_cells, n_genes))).astype(np.float64)
    counts[np.arange(n_cells), rng.integers(0, n_genes, n_cells)] += 1
    return counts


def normalised(counts: np.ndarray, target: float = 1e4) -> np.ndarray:
    return counts / counts.sum(axis=1, keepdims=True) * target


def scaled(x: np.ndarray) -> np.ndarray:
    return (x - x.mean(axis=0)) / (x.std(axis=0) + 1e-6)


def same(a: sp.csr_matrix, b: sp.csr_matrix) -> bool:
    parts = [(a.data, b.data), (a.indices, b.indices), (a.indptr, b.indptr)]
    return a.shape == b.shape and all(x.dtype == y.dtype and np.array_equal(x, y) for x, y in parts)


class TestClassify:
    @quick
    @given(
        seeds,
        st.sampled_from(sorted(ALL_FORMS)),
        st.sampled_from(["float32", "float64", "int16", "int32", "int64", "uint16"]),
    )
    def test_counts(self, seed, form, dtype):
        facts = inspect_matrix(ALL_FORMS[form](cells(seed).astype(dtype)))
        assert facts.kind is MatrixKind.COUNTS
        assert facts.share_integer == 1
        assert (facts.minimum, facts.maximum) == (1, cells(seed).max())

    @quick
    @given(
        seeds,
        st.sampled_from(sorted(ALL_FORMS)),
        st.sampled_from(["float32", "float64"]),
        st.sampled_from([1e3, 1e4, 1e6]),
        st.booleans(),
    )
    def test_log1p(self, seed, form, dtype, target, subset):
        x = np.log1p(normalised(cells(seed), target)).astype(dtype)
        x = (
            x[:, : x.shape[1] // 2] if subset else x
        )  # e.g. highly variable genes only: rows no longer sum to the target
        facts = inspect_matrix(ALL_FORMS[form](x))
        assert facts.kind is MatrixKind.LOG1P
        assert subset or facts.row_total == pytest.approx(target, rel=1e-3)
        assert facts.share_integer < 0.5

    @quick
    @given(seeds, st.sampled_from(sorted(ALL_FORMS)), st.sampled_from(["float32", "float64"]), st.booleans())
    def test_normalised(self, seed, form, dtype, subset):
        x = normalised(cells(seed)).astype(dtype)
        x = x[:, : x.shape[1] // 2] if subset else x
        assert classify(ALL_FORMS[form](x)) is MatrixKind.NORMALISED

    @quick
    @given(seeds, st.sampled_from(sorted(ALL_FORMS)), st.sampled_from(["float32", "float64"]))
    def test_scaled(self, seed, form, dtype):
        assert classify(ALL_FORMS[form](scaled(np.log1p(cells(seed))).astype(dtype))) is MatrixKind.SCALED

    @quick
    @given(seeds, st.sampled_from(sorted(ALL_FORMS)), st.sampled_from([np.nan, np.inf, -np.inf]))
    def test_not_finite(self, seed, form, value):
        x = cells(seed)
        x[-1, 3] = value
        facts = inspect_matrix(ALL_FORMS[form](x))
        assert (facts.kind, facts.n_nonfinite) == (MatrixKind.JUNK, 1)

    @pytest.mark.parametrize(
        ("x", "kind"),
        [
            (np.random.default_rng(0).random((30, 50)), MatrixKind.JUNK),
            (np.ones((3, 4), dtype=bool), MatrixKind.JUNK),
            (np.full((3, 4), MAX_COUNT + 1, dtype=np.int64), MatrixKind.JUNK),
            (np.full((3, 4), MAX_COUNT), MatrixKind.COUNTS),
            (cells(0) * (1 + 1e-6), MatrixKind.JUNK),
            (normalised(cells(0), 1.0), MatrixKind.NORMALISED),
            (normalised(cells(0), 0.1), MatrixKind.NORMALISED),
            (np.where(np.arange(149) == 7, 0.5, cells(0).clip(max=9)), MatrixKind.NORMALISED),  # corrected counts
            (np.log1p(cells(0)), MatrixKind.LOG1P),
            (np.log2(1 + normalised(cells(0))), MatrixKind.LOG1P),
            (cells(0) * np.random.default_rng(0).uniform(0.9, 1, cells(0).shape) * 9, MatrixKind.NORMALISED),
            (np.log1p(normalised(cells(0)))[:1], MatrixKind.LOG1P),
            (-cells(0), MatrixKind.SCALED),
            (np.zeros((3, 4)), MatrixKind.EMPTY),
            (np.zeros((0, 4)), MatrixKind.EMPTY),
            (np.zeros((3, 0)), MatrixKind.EMPTY),
            (sp.csr_matrix((3, 4)), MatrixKind.EMPTY),
        ],
    )
    def test_borders(self, x, kind):
        assert classify(x) is kind

    def test_wants_two_dimensions(self):
        with pytest.raises(InputError, match="1 dimensions"):
            classify(np.ones(4))

    @quick
    @given(st.integers(0, 299_999), st.sampled_from([0.5, -1.0, np.nan]), st.booleans())
    def test_one_bad_value_anywhere_is_seen(self, place, value, sparse):
        x = np.ones((3000, 100), dtype=np.float32)
        x.flat[place] = value
        assert classify(sp.csr_matrix(x) if sparse else x) is not MatrixKind.COUNTS


class TestRawCounts:
    @quick
    @given(seeds, st.sampled_from(sorted(FORMS)), st.sampled_from(["float32", "float64", "int32", "int64", "uint16"]))
    def test_storage_does_not_matter(self, seed, form, dtype):
        counts = raw_counts(AnnData(FORMS[form](cells(seed).astype(dtype))))
        assert type(counts) is sp.csr_matrix
        assert same(counts, sp.csr_matrix(cells(seed).astype("float32" if dtype.startswith("float") else dtype)))

    @pytest.mark.parametrize("form", ["matrix", "coo", "strided"])
    def test_forms_that_anndata_does_not_store(self, form):
        x = cells(0).astype(np.float32)
        holder = SimpleNamespace(X=ALL_FORMS[form](x), var=pd.DataFrame(index=range(x.shape[1])))
        assert same(raw_counts(holder), sp.csr_matrix(x))

    def test_untidy_csr_becomes_canonical_and_stays_as_it_was(self):
        # Unsorted, column 2 twice, a stored zero, an unused tail; arrays that raise if written to.
        data = np.array([5, 1, 2, 0, 3, 99], dtype=np.float32)
        indices, indptr = np.array([2, 0, 2, 1, 1, 0]), np.array([0, 4, 5])
        untidy = sp.csr_matrix((2, 3), dtype=np.float32)
        untidy.data, untidy.indices, untidy.indptr = data, indices, indptr
        for array in (data, indices, indptr):
            array.setflags(write=False)
        tidy = canonical_csr(untidy)
        assert same(tidy, sp.csr_matrix(np.array([[1, 0, 7], [0, 3, 0]], dtype=np.float32)))
        assert untidy.data is data
        assert untidy.indices is indices

    def test_duplicates_of_a_small_integer_type_do_not_wrap_around(self):
        twice = sp.csr_matrix((np.array([200, 200], dtype=np.uint8), np.array([1, 1]), np.array([0, 2])), shape=(1, 2))
        assert canonical_csr(twice).toarray().tolist() == [[0, 400]]
        assert canonical_csr(sp.csc_matrix(twice)).toarray().tolist() == [[0, 400]]
        unsorted = sp.csr_matrix((np.array([1, 2], dtype=np.uint8), np.array([1, 0]), np.array([0, 2])), shape=(1, 2))
        assert canonical_csr(unsorted).dtype == np.uint8

    def test_masked_values_are_missing(self):
        x = cells(0)
        assert same(raw_counts(AnnData(np.ma.masked_array(x))), sp.csr_matrix(x.astype(np.float32)))
        for dtype in (np.float32, np.int32):
            masked = np.ma.masked_array(x.astype(dtype), mask=x == x.max())
            with pytest.raises(InputError, match="X holds NaN or infinite values"):
                raw_counts(AnnData(masked))

    def test_read_only_counts_are_copied_for_pytorch(self):
        csr = sp.csr_matrix(cells(0).astype(np.float32))
        csr.data.setflags(write=False)
        assert raw_counts(AnnData(csr)).data.flags.writeable
        assert not csr.data.flags.writeable

    @pytest.mark.parametrize("form", [sp.csr_matrix, sp.csc_matrix])
    @pytest.mark.parametrize("place", ["indices", "indptr"])
    @pytest.mark.parametrize("value", [-1, 10**6])
    def test_broken_sparse_matrices_are_refused_before_compiled_code_reads_them(self, form, place, value):
        broken = form(cells(0).astype(np.float32))
        getattr(broken, place)[3] = value
        with pytest.raises(InputError, match="sparse matrix of the file is broken"):
            canonical_csr(broken)

    def test_takes_counts_without_a_copy_where_it_can(self):
        adata = AnnData(sp.csr_matrix(cells(0).astype(np.float32)))
        assert np.shares_memory(raw_counts(adata).data, adata.X.data)

    @pytest.mark.parametrize(("stored", "returned"), [(">i4", "int32"), (">f8", "float32"), ("float16", "float32")])
    def test_types_that_scipy_does_not_know(self, stored, returned):
        assert same(raw_counts(AnnData(cells(0).astype(stored))), sp.csr_matrix(cells(0).astype(returned)))

    def test_layer_raw_and_view(self):
        counts = sp.csr_matrix(cells(0, 20, 80).astype(np.float32))
        adata = AnnData(counts, var=pd.DataFrame(index=[f"G{i}" for i in range(80)]))
        adata.raw = adata.copy()
        adata = adata[:, :60].copy()
        adata.layers["counts"] = adata.X.copy()
        adata.X = np.log1p(adata.X)
        found, var = counts_and_var(adata, layer="raw")
        assert same(found, counts)
        assert len(var) == 80
        assert same(raw_counts(adata, layer="counts"), sp.csr_matrix(counts[:, :60]))
        view = adata[[3, 5], 2:40]
        assert same(raw_counts(view, layer="counts"), sp.csr_matrix(counts[[3, 5], 2:40]))
        assert same(raw_counts(view, layer="raw"), sp.csr_matrix(counts[[3, 5]]))
        adata.layers["raw"] = adata.layers["counts"] + adata.layers["counts"].sign()  # not the values of .raw
        assert raw_counts(adata, layer="raw").max() == counts[:, :60].max() + 1

    @pytest.mark.parametrize("form", ["dense", "csr", "csc"])
    def test_backed(self, tmp_path, form):
        x = cells(0).astype(np.float32)
        AnnData(FORMS[form](x)).write_h5ad(tmp_path / "cells.h5ad")
        backed = anndata.read_h5ad(tmp_path / "cells.h5ad", backed="r")
        assert same(raw_counts(backed), sp.csr_matrix(x))
        backed.file.close()

    def test_dask(self):
        array = pytest.importorskip("dask.array")
        x = cells(0).astype(np.float32)
        assert same(raw_counts(AnnData(array.from_array(x, chunks=(3, -1)))), sp.csr_matrix(x))


class TestRefusals:
    @pytest.mark.parametrize(
        ("x", "said"),
        [
            (
                np.log1p(normalised(cells(1))),
                r"^X looks log1p-normalised \(max [78]\.\d+, \d\d+ % of non-zero values are not integers; rows sum to "
                r"10,000 after expm1\)\. Pass raw counts, e\.g\. adata\.layers\['counts'\] with layer='counts'\. "
                r"Or have them recovered: recover=True, or --recover\.$",
            ),
            (
                np.log1p(normalised(cells(1)))[:, :50],
                r"^X looks log1p-.*each row is whole numbers times a factor after exp",
            ),
            (np.log2(1 + normalised(cells(1))), r"^X looks log-transformed \(max"),
            (normalised(cells(1)), r"^X looks normalised \(max .*; rows sum to 10,000\)\. Pass"),
            (
                normalised(cells(1))[:, :50],
                r"^X looks normalised \(max .*; each row is whole numbers times a factor\)\. ",
            ),
            (
                cells(1) * np.linspace(8, 9, cells(1).size).reshape(cells(1).shape),
                r"^X looks normalised, corrected or estimated \(max",
            ),
            (scaled(cells(1)), r"^X looks scaled or centred: it holds negative values \(min -"),
            (np.where(cells(1) > 6, np.nan, cells(1)), r"^X holds NaN or infinite values \(\d+ of [\d,]+ non-zero"),
            (
                cells(1) * 1e7,
                r"^X holds a value of \d+0,000,000; no gene of one cell has more than 16,777,216 counts\.",
            ),
            (cells(1) * (1 + 1e-6), r"^X holds nearly integers \(.*round them: adata\.X = adata\.X\.round\(\)\."),
            (cells(1) / 1000, r"^X holds fractions between 0 and 1|^X looks normalised"),
            (cells(1) > 0, r"^X holds values of type bool, not counts \("),
            (np.zeros((3, 4)), r"^X holds nothing but zeros \(3 cells x 4 genes\)\. Pass"),
            (np.zeros((0, 4)), r"^X has no cells \(0 cells x 4 genes\)\. Check what filtered or sliced it\.$"),
            (np.zeros((3, 0)), r"^X has no genes \(3 cells x 0 genes\)\. Check what filtered or sliced it\.$"),
        ],
    )
    def test_each_says_what_was_seen(self, x, said):
        with pytest.raises(InputError, match=said):
            raw_counts(AnnData(x))

    def test_a_single_broken_value_is_counted(self):
        x = cells(0, 50, 100)
        x[7, 7] = 0.5
        with pytest.raises(
            InputError, match=r"corrected or estimated \(max [\d.]+, 1 of [\d,]+ non-zero values are not integers\)"
        ):
            raw_counts(AnnData(x))

    def test_counts_elsewhere_in_the_object_are_named(self):
        counts, logs = cells(0), np.log1p(normalised(cells(0)))
        adata = AnnData(logs, layers={"zscore": scaled(logs), "umi": counts})
        with pytest.raises(
            InputError, match=r"But layers\['umi'\] looks like raw counts: pass layer='umi' \(--layer\)\."
        ):
            raw_counts(adata)
        adata = AnnData(counts)
        adata.raw = adata.copy()
        adata.X = scaled(logs)
        with pytest.raises(InputError, match=r"But raw\.X looks like raw counts: pass layer='raw' \(--layer\)\."):
            raw_counts(adata)
        with pytest.raises(InputError, match=r"^layers\['log'\] looks log1p.*But X looks like raw counts: leave layer"):
            raw_counts(AnnData(counts, layers={"log": logs}), layer="log")
        adata = AnnData(scaled(logs), layers={"log": logs})
        adata.raw = AnnData(logs)
        with pytest.raises(InputError, match=r"\(layers\['log'\], raw\.X looked no better\)"):
            raw_counts(adata)

    def test_a_layer_that_is_no_matrix_gives_no_advice(self):
        x = np.log1p(cells(0))
        with pytest.raises(InputError, match=r"^X looks log.*\(layers\['pair'\] looked no better\)"):
            raw_counts(AnnData(x, layers={"pair": np.stack([x, x], axis=2)}))

    def test_tiny_values_overflow_nothing(self):
        x = cells(0) * 0.3
        x[0, 0] = 5e-324
        with np.errstate(all="raise"), pytest.raises(InputError, match="X looks"):
            raw_counts(AnnData(x))

    def test_unknown_layer_lists_what_there_is(self):
        adata = AnnData(cells(0), layers={"a": cells(0), "b": cells(0)})
        with pytest.raises(InputError, match=r"no layer 'c': the AnnData has the layers 'a', 'b' and no \.raw"):
            raw_counts(adata, layer="c")
        with pytest.raises(InputError, match=r"no layer 'raw': the AnnData has no layers and no \.raw"):
            raw_counts(AnnData(cells(0)), layer="raw")

    def test_missing_x(self):
        with pytest.raises(InputError, match=r"^X is missing\. .*layers\['counts'\] looks like raw counts"):
            raw_counts(AnnData(shape=cells(0).shape, layers={"counts": cells(0)}))


class TestLibrarySize:
    def test_is_the_row_sum_exactly(self):
        counts = np.zeros((2, 40), dtype=np.float32)
        counts[:, 0], counts[0, 1:] = MAX_COUNT, 1  # float32 sums would lose the ones
        adata = AnnData(counts)
        total = library_size(adata, raw_counts(adata))
        assert total.dtype == np.float64
        assert total.tolist() == [MAX_COUNT + 39, MAX_COUNT]

    @pytest.mark.parametrize("dtype", ["float32", "int64", "Int32"])
    def test_or_a_column_that_knows_more(self, dtype):
        adata = AnnData(cells(0, 4, 60))
        adata.obs["n_counts"] = pd.array([5000, 6000, 7000, 8000], dtype=dtype)
        assert library_size(adata, raw_counts(adata), key="n_counts").tolist() == [5000, 6000, 7000, 8000]

    @pytest.mark.parametrize("key", [None, "n_counts"])
    def test_refuses_empty_cells(self, key):
        x = cells(0, 9, 60)
        x[[2, 3, 5, 7]] = 0
        adata = AnnData(x, obs=pd.DataFrame({"n_counts": 1e4}, index=[f"cell{i}" for i in range(9)]))
        counts = raw_counts(adata)
        assert empty_cells(counts).tolist() == [2, 3, 5, 7]
        with pytest.raises(
            InputError,
            match=r"4 of 9 cells have no counts .*\(first: 'cell2', 'cell3', 'cell5'\).*sc\.pp\.filter_cells",
        ):
            library_size(adata, counts, key=key)

    @pytest.mark.parametrize(
        ("values", "said"),
        [
            (["many", "few", "1e4"], r"obs\['n'\] holds object, not numbers"),
            ([1e4, np.nan, 1e4], r"obs\['n'\] is not finite and positive in 1 of 3 cells \('1'\)"),
            ([1e4, 1e4, 0], r"not finite and positive in 1 of 3 cells \('2'\)"),
            ([1e4, 1e300, 1e4], r"obs\['n'\] is up to 1e\+300 in 1 of 3 cells \('1'\), more than counts can add up to"),
            ([9.1, 8.7, 9.9], r"obs\['n'\] is below the sum of the stored counts in 3 of 3 cells .* 9\.1 against \d+"),
        ],
    )
    def test_refuses_columns_that_are_no_totals(self, values, said):
        adata = AnnData(cells(0, 3, 60), obs=pd.DataFrame({"n": values}, index=list("012")))
        with pytest.raises(InputError, match=said):
            library_size(adata, raw_counts(adata), key="n")

    def test_refuses_a_name_of_two_columns(self):
        adata = AnnData(cells(0, 3, 60), obs=pd.DataFrame(1e4, index=list("012"), columns=["n", "n"]))
        with pytest.raises(InputError, match=r"obs\['n'\] is the name of several columns"):
            library_size(adata, raw_counts(adata), key="n")

    def test_unknown_column_and_foreign_counts(self):
        adata = AnnData(cells(0, 3, 60), obs=pd.DataFrame({"a": 1, "b": 2}, index=list("012")))
        with pytest.raises(
            InputError, match=r"obs\['n'\] does not exist: name a column of total counts\. Known: 'a', 'b'"
        ):
            library_size(adata, raw_counts(adata), key="n")
        with pytest.raises(InputError, match="counts have 2 cells, the AnnData 3"):
            library_size(adata, raw_counts(adata)[:2])


class TestLog1pNormalise:
    @quick
    @given(seeds, st.sampled_from(["float32", "int32"]), st.sampled_from([1e4, 1e6]))
    def test_is_the_formula(self, seed, dtype, target):
        x = cells(seed)
        depth = x.sum(axis=1) * 1.5
        found = log1p_normalise(sp.csr_matrix(x.astype(dtype)), depth, target_sum=target)
        assert found.dtype == np.float32
        np.testing.assert_allclose(found.toarray(), np.log1p(x / depth[:, None] * target), rtol=1e-7)

    def test_is_log1p_of_counts_per_ten_thousand(self):
        found = log1p_normalise(sp.csr_matrix([[1.0, 0.0, 3.0]]), np.array([4.0]))
        assert found.toarray().tolist() == [[np.float32(math.log(2501)), 0, np.float32(math.log(7501))]]

    def test_a_cell_does_not_depend_on_its_neighbours(self):
        counts = sp.csr_matrix(cells(0, 2500, 60))  # more than two blocks of rows
        depth = np.asarray(counts.sum(axis=1)).ravel()
        whole = log1p_normalise(counts, depth)
        for at in (0, 1023, 1024, 2499):
            assert same(sp.csr_matrix(whole[at]), log1p_normalise(counts[at], depth[at : at + 1]))

    def test_leaves_its_input_alone(self):
        counts = sp.csr_matrix(cells(0))
        depth = np.asarray(counts.sum(axis=1)).ravel()
        found = log1p_normalise(counts, depth)
        for part in ("data", "indices", "indptr"):
            assert not np.shares_memory(getattr(found, part), getattr(counts, part))
        assert same(counts, sp.csr_matrix(cells(0)))

    def test_a_cell_with_no_counts_on_the_axis_is_zero(self):
        counts = sp.csr_matrix([[0.0, 0.0], [1.0, 1.0]])
        assert log1p_normalise(counts, np.array([0.0, 2.0])).toarray()[0].tolist() == [0, 0]

    @pytest.mark.parametrize("depth", [[0.0, 1.0], [np.nan, 1.0], [-1.0, 1.0], [np.inf, 1.0]])
    def test_refuses_a_useless_depth(self, depth):
        with pytest.raises(InputError, match="1 cells with counts have a library size that is not finite and positive"):
            log1p_normalise(sp.csr_matrix(np.ones((2, 2))), np.array(depth))

    def test_refuses_a_depth_for_other_cells(self):
        with pytest.raises(InputError, match=r"each of 2 cells, got shape \(3,\)"):
            log1p_normalise(sp.csr_matrix(np.ones((2, 2))), np.ones(3))


class TestRealFiles:
    def test_every_file_holds_counts_in_whatever_form(self, read, data_file):
        adata = read(data_file)
        before = adata.X.copy()
        assert inspect_matrix(adata.X).kind is MatrixKind.COUNTS
        counts = raw_counts(adata)
        assert same(counts, before)
        part = before[:400]
        for form in FORMS:
            variant = FORMS[form](part.toarray())
            assert same(raw_counts(AnnData(variant.astype(np.float64))), part)
            assert same(raw_counts(AnnData(variant.astype(np.int32))), part.astype(np.int32))
        assert same(adata.X, before)

    def test_every_file_is_refused_once_normalised_or_scaled(self, read, data_file):
        adata = read(data_file)[:600].copy()
        counts = raw_counts(adata)
        logs = log1p_normalise(counts, library_size(adata, counts))
        adata.X = logs
        with pytest.raises(InputError, match=r"^X looks log1p-normalised .*rows sum to 10,000 after expm1"):
            raw_counts(adata)
        adata = adata[:, ::3].copy()
        adata.layers["counts"] = counts[:, ::3]
        with pytest.raises(
            InputError, match=r"^X looks log.*layers\['counts'\] looks like raw counts: pass layer='count"
        ):
            raw_counts(adata)
        adata.X = scaled(logs[:, ::3].toarray()).clip(max=10)
        with pytest.raises(
            InputError, match=r"^X looks scaled or centred: it holds negative values.*pass layer='counts'"
        ):
            raw_counts(adata)
        adata.X = logs[:, ::3].expm1()
        with pytest.raises(InputError, match=r"^X looks normalised"):
            raw_counts(adata)

    @pytest.mark.parametrize(
        ("name", "key"),
        [("pbmc68k_reduced_700", "n_counts_all_genes"), ("zheng2017_sorted_pbmc_3500", "nUMI_all_genes")],
    )
    def test_depth_over_all_genes(self, read, name, key):
        adata = read(name)
        counts = raw_counts(adata)
        assert (library_size(adata, counts, key=key) >= library_size(adata, counts)).all()
