"""Every data file in every form it may have: equal information gives the same codes, anything else an error."""

from itertools import pairwise

import anndata
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from anndata import AnnData

import rvqa
from rvqa.data.aliases import AliasTable, alias_table
from rvqa.data.alignment import match_columns
from rvqa.data.depth import log1p_normalise
from rvqa.data.genes import GeneAxis
from rvqa.data.reading import Reading
from rvqa.data.recovery import MIN_VALUES
from rvqa.encoding import cell_codes
from rvqa.errors import InputError

pytestmark = [
    pytest.mark.filterwarnings("ignore::rvqa.data.alignment.CoverageWarning"),
    pytest.mark.filterwarnings("ignore:(Variable|Observation) names are not unique"),
]


@pytest.fixture(scope="module", autouse=True)
def tables(ref_dir):
    """The table of aliases for all tests of this file: names are made from it, and depth depends on it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RVQA_REF_DIR", str(ref_dir))
        yield


@pytest.fixture(scope="module")
def cells(read, data_file, pbmc_tokenizer, tables) -> AnnData:
    """Some 80 evenly spaced cells of a data file, with the genes that they have and a tenth of the others.

    Tests must not change them.

    A few genes are left out: their name is an alias of an axis gene and also the name of another gene of the fit. If
    such a gene is renamed after one of the two, it becomes another gene.
    """
    adata = read(data_file)
    axis, known = pbmc_tokenizer.axis, pbmc_tokenizer.shares.axis
    on_axis, at = match_columns(adata.var, axis), match_columns(adata.var, known)
    one = [
        known.symbols[j] == axis.symbols[i] if i >= 0 and j >= 0 else i < 0 for i, j in zip(on_axis, at, strict=True)
    ]
    assert np.mean(one) > 0.99
    few = adata[:: max(1, adata.n_obs // 80)]
    kept = np.asarray(few.X.sum(axis=0)).ravel() > 0
    kept[::10] = True
    return few[:, kept & one].copy()


@pytest.fixture(scope="module")
def codes(cells, pbmc_tokenizer) -> np.ndarray:
    return codes_of(cells, pbmc_tokenizer)


def codes_of(adata, tokenizer, *, layer=None, library_size_key=None, recover=False) -> np.ndarray:
    return cell_codes(adata, tokenizer, Reading(layer, library_size_key, recover))[0]


def depth_of(adata: AnnData) -> np.ndarray:
    return np.asarray(adata.X.sum(axis=1, dtype=np.float64)).ravel()


def unsorted(x: sp.csr_matrix) -> sp.csr_matrix:
    data, indices = x.data.copy(), x.indices.copy()
    for start, end in pairwise(x.indptr):
        data[start:end], indices[start:end] = data[start:end][::-1].copy(), indices[start:end][::-1].copy()
    return sp.csr_matrix((data, indices, x.indptr.copy()), shape=x.shape)


def in_two_parts(x: sp.csr_matrix) -> sp.csr_matrix:
    """Return every count as two entries, one of which may be a stored zero."""
    data = np.stack([np.floor(x.data / 3), x.data - np.floor(x.data / 3)], axis=1).ravel()
    return sp.csr_matrix((data, np.repeat(x.indices, 2), x.indptr * 2), shape=x.shape)


def with_zeros(x: sp.csr_matrix) -> sp.csr_matrix:
    """Return the matrix with every tenth absent count stored as 0."""
    extra = sp.csr_matrix((np.arange(x.shape[0] * x.shape[1]) % 10 == 0).reshape(x.shape))
    stored = (x + extra).tocsr()
    stored.data = np.asarray(x[stored.nonzero()]).ravel()
    return stored


def of_wide_indices(x: sp.csr_matrix) -> sp.csr_matrix:
    wide = x.copy()
    wide.indices, wide.indptr = x.indices.astype(np.int64), x.indptr.astype(np.int64)
    return wide


def read_only(x: sp.csr_matrix) -> sp.csr_matrix:
    frozen = x.copy()
    for part in (frozen.data, frozen.indices, frozen.indptr):
        part.setflags(write=False)
    return frozen


FORMS = {
    "csc": sp.csc_matrix,
    "csr_array": sp.csr_array,
    "csc_array": sp.csc_array,
    "dense": lambda x: x.toarray(),
    "fortran": lambda x: np.asfortranarray(x.toarray()),
    "big-endian": lambda x: x.toarray().astype(">f4"),
    "masked nowhere": lambda x: np.ma.masked_array(x.toarray()),
    "unsorted": unsorted,
    "in two parts": in_two_parts,
    "with zeros": with_zeros,
    "wide": of_wide_indices,
    "read-only": read_only,
    **{dtype: lambda x, dtype=dtype: x.astype(dtype) for dtype in ("int32", "int64", "uint16", "uint32", "float64")},
    **{f"dense {dtype}": lambda x, dtype=dtype: x.toarray().astype(dtype) for dtype in ("int16", "int64", "float64")},
}


@pytest.mark.parametrize("form", FORMS)
def test_storage(cells, codes, pbmc_tokenizer, form):
    other = AnnData(FORMS[form](cells.X), obs=cells.obs, var=cells.var)
    np.testing.assert_array_equal(codes_of(other, pbmc_tokenizer), codes)


def test_half_precision_where_it_is_exact(cells, codes, pbmc_tokenizer):
    exact = cells[np.asarray(cells.X.max(axis=1).todense()).ravel() <= 2048]
    other = AnnData(exact.X.toarray().astype(np.float16), obs=exact.obs, var=exact.var)
    np.testing.assert_array_equal(codes_of(other, pbmc_tokenizer), codes[cells.obs_names.isin(exact.obs_names)])


def test_order_and_views(cells, codes, pbmc_tokenizer):
    rng = np.random.default_rng(0)
    rows, columns = rng.permutation(cells.n_obs), rng.permutation(cells.n_vars)
    np.testing.assert_array_equal(codes_of(cells[:, columns].copy(), pbmc_tokenizer), codes)
    np.testing.assert_array_equal(codes_of(cells[rows, columns].copy(), pbmc_tokenizer), codes[rows])
    view = cells[::2, columns]
    assert view.is_view
    encoded = rvqa.encode(view, pbmc_tokenizer, copy=True)
    np.testing.assert_array_equal(encoded.obsm["rvqa_codes"], codes[::2])
    assert view.is_view
    np.testing.assert_array_equal(codes_of(cells[[7]], pbmc_tokenizer), codes[[7]])


def test_layer_and_raw(cells, codes, pbmc_tokenizer):
    other = AnnData(np.log1p(cells.X), obs=cells.obs, var=cells.var, layers={"counts": cells.X.tocsc()})
    np.testing.assert_array_equal(codes_of(other, pbmc_tokenizer, layer="counts"), codes)
    del other.layers["counts"]
    other.raw = cells
    np.testing.assert_array_equal(codes_of(other[:, :60].copy(), pbmc_tokenizer, layer="raw"), codes)


@pytest.mark.parametrize("compression", [None, "gzip", "lzf"])
def test_files(cells, codes, pbmc_tokenizer, tmp_path, compression):
    path = tmp_path / "cells.h5ad"
    cells.write_h5ad(path, compression=compression)
    np.testing.assert_array_equal(codes_of(anndata.read_h5ad(path), pbmc_tokenizer), codes)


@pytest.mark.parametrize("form", [sp.csr_matrix, sp.csc_matrix, sp.csr_matrix.toarray])
def test_backed(cells, codes, pbmc_tokenizer, tmp_path, form):
    AnnData(form(cells.X), obs=cells.obs, var=cells.var).write_h5ad(tmp_path / "cells.h5ad")
    backed = anndata.read_h5ad(tmp_path / "cells.h5ad", backed="r")
    in_memory = rvqa.encode(backed, pbmc_tokenizer, copy=True)
    assert not in_memory.isbacked
    np.testing.assert_array_equal(in_memory.obsm["rvqa_codes"], codes)
    assert rvqa.encode(backed, pbmc_tokenizer) is None
    np.testing.assert_array_equal(backed.obsm["rvqa_codes"], codes)
    backed.file.close()


# Names. A gene that the model does not have gets an unknown name, so that depth does not change.


def old_names(table: AliasTable, axis: GeneAxis) -> dict[int, str]:
    """Return a previous symbol or alias for axis genes that have one of their own."""
    genes = table.genes(axis.symbols, axis.ensembl_ids)
    rows, times = np.unique(genes[genes >= 0], return_counts=True)
    once = set(rows[times == 1].tolist())
    at = {gene: place for place, gene in enumerate(genes.tolist()) if gene in once}
    own = set(axis.symbols)
    return {at[gene]: name for name, gene in table._by_name.items() if gene in at and name not in own}


@pytest.fixture(scope="module")
def names(cells, pbmc_tokenizer, ref_dir) -> dict[str, list[str]]:
    """Return lists of names that all denote the same genes."""
    axis = pbmc_tokenizer.shares.axis  # all genes of the fit, because those outside the model's axis affect the depth
    found = match_columns(cells.var, axis)
    symbols = [axis.symbols[at] if at >= 0 else f"unknown{i}" for i, at in enumerate(found)]
    ids = [axis.ensembl_ids[at] if at >= 0 else "" for at in found]
    ids = [name or symbol for name, symbol in zip(ids, symbols, strict=True)]
    versions = [f"{name}.{i % 20}" if name.startswith("ENSG") else name for i, name in enumerate(ids)]
    old = old_names(alias_table(ref_dir), axis)
    # If one column names an axis gene exactly, no other column joins it by an alias.
    times = np.bincount(found[found >= 0], minlength=len(axis))
    aliases = [
        old.get(at, symbol) if at >= 0 and times[at] == 1 else symbol
        for at, symbol in zip(found.tolist(), symbols, strict=True)
    ]
    assert sum(name != symbol for name, symbol in zip(aliases, symbols, strict=True)) > 0.3 * np.count_nonzero(times)
    lists = {"symbols": symbols, "ids": ids, "versions": versions, "aliases": aliases}
    return lists | {"mixed": [each[i % 4] for i, each in enumerate(zip(*lists.values(), strict=True))]}


def renamed(cells: AnnData, names, **columns) -> AnnData:
    return AnnData(cells.X, obs=cells.obs, var=pd.DataFrame(columns, index=pd.Index(names, dtype=object)))


@pytest.mark.parametrize("kind", ["symbols", "ids", "versions", "aliases", "mixed"])
def test_names(cells, codes, pbmc_tokenizer, names, kind):
    np.testing.assert_array_equal(codes_of(renamed(cells, names[kind]), pbmc_tokenizer), codes)


def test_names_in_columns(cells, codes, pbmc_tokenizer, names):
    rows = [str(i) for i in range(cells.n_vars)]
    for columns in (
        {"feature_name": pd.Categorical(names["versions"])},
        {"feature_name": names["symbols"], "gene_ids": names["ids"]},
        {"Symbol": [f" {name} " for name in names["symbols"]]},
        {"gene_name": [name.encode() for name in names["symbols"]]},
    ):
        np.testing.assert_array_equal(codes_of(renamed(cells, rows, **columns), pbmc_tokenizer), codes)


def test_names_made_unique_beside_a_column_of_symbols(cells, codes, pbmc_tokenizer, names):
    other = renamed(cells, [f"~{name[:2]}" for name in names["symbols"]], gene_symbols=names["symbols"])
    other.var_names_make_unique()
    assert other.var_names.is_unique
    np.testing.assert_array_equal(codes_of(other, pbmc_tokenizer), codes)


def test_genes_that_do_not_matter(cells, codes, pbmc_tokenizer, names):
    known = np.array([not name.startswith("unknown") for name in names["symbols"]])
    part = renamed(cells, names["symbols"])
    part.obs["depth"] = depth_of(cells)
    given = codes_of(part, pbmc_tokenizer, library_size_key="depth")
    part = part[:, known].copy()
    filled = depth_of(part) > 0
    found = codes_of(part[filled].copy(), pbmc_tokenizer, library_size_key="depth")
    np.testing.assert_array_equal(found, given[filled])
    np.testing.assert_array_equal(codes_of(part[filled].copy(), pbmc_tokenizer), codes[filled])
    more = AnnData(
        sp.hstack([cells.X, sp.csr_matrix((cells.n_obs, 30), dtype=np.float32)], format="csr"),
        var=pd.DataFrame(index=[*names["symbols"], *(f"extra{i}" for i in range(30))]),
    )
    np.testing.assert_array_equal(codes_of(more, pbmc_tokenizer), codes)


# Counts that were normalised and recovered.


@pytest.mark.parametrize("target", [1e4, None])
def test_recovered(cells, codes, pbmc_tokenizer, target):
    scanpy = pytest.importorskip("scanpy")
    logs = cells.copy()
    logs.obs["depth"] = depth_of(cells)
    given = codes_of(AnnData(cells.X, obs=logs.obs, var=cells.var), pbmc_tokenizer, library_size_key="depth")
    scanpy.pp.normalize_total(logs, target_sum=target)
    scanpy.pp.log1p(logs)
    assert logs.X.dtype == np.float32
    with pytest.raises(InputError, match=r"X looks log1p-normalised .*recover=True"):
        codes_of(logs, pbmc_tokenizer)
    found = codes_of(logs, pbmc_tokenizer, library_size_key="depth", recover=True)
    np.testing.assert_array_equal(found, given)
    enough = np.diff(cells.X.indptr) >= 2 * MIN_VALUES
    if enough.sum() >= 2:
        found = codes_of(logs[enough].copy(), pbmc_tokenizer, recover=True)
        np.testing.assert_array_equal(found, codes[enough])


# Input that must be rejected.


def zscored(x: np.ndarray) -> np.ndarray:
    return (x - x.mean(axis=0)) / (x.std(axis=0) + 1e-6)


def with_one(x: sp.csr_matrix, value: float) -> sp.csr_matrix:
    other = x.copy()
    other.data[other.nnz // 2] = value
    return other


def test_values_that_are_no_counts(cells, pbmc_tokenizer):
    logs = log1p_normalise(cells.X, depth_of(cells))
    masked = np.ma.masked_array(cells.X.toarray(), mask=np.arange(cells.n_vars)[None, :] % 50 + cells.X.toarray() == 3)
    for X, said in (
        (logs, r"^X looks log1p-normalised \(.*rows sum to 10,000 after expm1\)"),
        (zscored(logs.toarray()), "^X looks scaled or centred: it holds negative values"),
        (logs.expm1(), r"^X looks normalised \(.*rows sum to 10,000\)"),
        (with_one(cells.X, -1), "^X .*negative values"),
        (with_one(cells.X, np.nan), r"^X holds NaN or infinite values \(1 of"),
        (with_one(cells.X, np.inf), r"^X holds NaN or infinite values \(1 of"),
        (with_one(cells.X, 2.5), "^X looks normalised, corrected or estimated .*1 of"),
        (masked, "^X holds NaN or infinite values"),
    ):
        with pytest.raises(InputError, match=said):
            codes_of(AnnData(X, obs=cells.obs, var=cells.var), pbmc_tokenizer)


def test_transposed(cells, pbmc_tokenizer, names):
    for adata in (cells, renamed(cells, names["ids"]), AnnData(np.log1p(cells.X), obs=cells.obs, var=cells.var)):
        with pytest.raises(InputError, match=r"^The file looks transposed: .* Transpose it with adata\.T"):
            rvqa.encode(adata.T, pbmc_tokenizer)
    turned = cells.T
    turned.raw = turned
    with pytest.raises(InputError, match="looks transposed"):
        rvqa.encode(turned, pbmc_tokenizer, layer="raw")


@pytest.mark.parametrize("prefix", ["GRCh38_", "GRCh38-", "GRCh38______", "hg19_"])
def test_the_name_of_the_human_genome_before_names_is_read_past(cells, codes, pbmc_tokenizer, names, prefix):
    assert np.array_equal(
        codes_of(renamed(cells, [f"{prefix}{name}" for name in names["symbols"]]), pbmc_tokenizer), codes
    )


def test_names_of_other_kinds(cells, pbmc_tokenizer, names):
    known = [not name.startswith("unknown") for name in names["symbols"]]
    first = np.cumsum(known) <= 40
    few = [name if here else f"unknown{i}" for i, (name, here) in enumerate(zip(names["symbols"], first, strict=True))]
    entrez = [str(1000 + 7 * i) for i in range(cells.n_vars)]
    for genes, said in (
        (few, r"^\d+ of the model's [\d,]+ genes found among .*; at least 50 are needed"),
        ([name.capitalize() for name in names["symbols"]], "These look like mouse genes .* orthologues first"),
        ([f"ENSMUSG{i:011d}" for i in range(cells.n_vars)], "These look like mouse genes"),
        (entrez, "These look like Entrez ids or other numbers, which are not read.*Put human gene symbols or Ensembl"),
        ([str(i) for i in range(cells.n_vars)], "These look like row numbers"),
        ([str(i + 1) for i in range(cells.n_vars)], "These look like row numbers"),
    ):
        with pytest.raises(InputError, match=said):
            codes_of(renamed(cells, genes), pbmc_tokenizer)
