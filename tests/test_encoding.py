"""`encode` and `decode`: documented keys, nothing else changed, one sentence for input that cannot be used."""

import warnings

import anndata
import numpy as np
import pytest

import rvqa
from rvqa.errors import InputError


@pytest.fixture
def cells(shipped):
    return next(iter(shipped.tests.values())).copy()


def test_encode_writes_the_keys_of_the_contract_and_nothing_else(cells, model):
    before = cells.copy()
    assert rvqa.encode(cells, model, library_size_key="depth") is None
    assert cells.obsm["rvqa_codes"].dtype == np.uint8
    assert cells.obsm["rvqa_codes"].shape == (cells.n_obs, 8)
    assert cells.obsm["X_rvqa"].dtype == np.float32
    assert cells.uns["rvqa"]["coverage"]["n_axis"] == len(model.cell_tokenizer.axis)
    assert set(cells.obsm) - set(before.obsm) == {"rvqa_codes", "X_rvqa"}
    assert list(cells.obs) == list(before.obs)
    assert (cells.X != before.X).nnz == 0


def test_copy_and_key_added(cells, model):
    result = rvqa.encode(cells, model, library_size_key="depth", key_added="mine", copy=True)
    assert "mine_codes" not in cells.obsm
    assert {"mine_codes", "X_mine"} <= set(result.obsm)
    assert "mine" in result.uns


def test_a_cell_tokenizer_alone_will_do(cells, model):
    alone = rvqa.encode(cells, model.cell_tokenizer, library_size_key="depth", copy=True)
    whole = rvqa.encode(cells, model, library_size_key="depth", copy=True)
    np.testing.assert_array_equal(alone.obsm["rvqa_codes"], whole.obsm["rvqa_codes"])


def test_quantized_latent_is_the_sum_of_codewords(cells, model):
    rvqa.encode(cells, model, library_size_key="depth")
    codebooks = model.cell_tokenizer.codebooks_MKD.numpy()
    expected = sum(codebooks[m][cells.obsm["rvqa_codes"][:, m]].astype(np.float64) for m in range(8))
    np.testing.assert_allclose(cells.obsm["X_rvqa"], expected, rtol=0, atol=1e-5 * np.abs(codebooks).max())


def test_layers_and_formats_give_the_same_codes(cells, model):
    rvqa.encode(cells, model, library_size_key="depth")
    other = cells.copy()
    other.layers["counts"] = cells.X.astype(np.int32).tocsc()
    other.X = np.log1p(cells.X.toarray())
    rvqa.encode(other, model, library_size_key="depth", layer="counts")
    np.testing.assert_array_equal(other.obsm["rvqa_codes"], cells.obsm["rvqa_codes"])
    with pytest.raises(InputError, match="counts"):
        rvqa.encode(other, model, library_size_key="depth")


@pytest.mark.parametrize("dtype", [np.uint16, np.int16, np.uint32, np.int64, np.float64])
def test_any_number_type_gives_the_same_codes(cells, model, dtype):
    rvqa.encode(cells, model, library_size_key="depth")
    other = cells.copy()
    other.X = cells.X.astype(dtype)
    rvqa.encode(other, model, library_size_key="depth")
    np.testing.assert_array_equal(other.obsm["rvqa_codes"], cells.obsm["rvqa_codes"])


def test_written_and_read_back(cells, model, tmp_path):
    rvqa.encode(cells, model, library_size_key="depth")
    cells.write_h5ad(tmp_path / "cells.h5ad")
    back = anndata.read_h5ad(tmp_path / "cells.h5ad")
    np.testing.assert_array_equal(back.obsm["rvqa_codes"], cells.obsm["rvqa_codes"])
    assert back.uns["rvqa"]["version"] == rvqa.__version__


def test_what_stood_in_uns_is_kept_if_it_is_a_mapping(cells, model):
    cells.uns["rvqa"] = {"mine": 1}
    rvqa.encode(cells, model, library_size_key="depth")
    assert {"mine", "version"} <= set(cells.uns["rvqa"])
    cells.uns["rvqa"] = "a note"
    rvqa.encode(cells, model, library_size_key="depth")
    assert cells.uns["rvqa"]["version"] == rvqa.__version__


def test_a_backed_file_is_copied_into_memory(cells, model, tmp_path):
    cells.write_h5ad(tmp_path / "cells.h5ad")
    backed = anndata.read_h5ad(tmp_path / "cells.h5ad", backed="r")
    result = rvqa.encode(backed, model, library_size_key="depth", copy=True)
    assert not result.isbacked
    assert "rvqa_codes" not in backed.obsm
    backed.file.close()


def test_empty_cells_are_refused_by_name(cells, model):
    cells.X.data[cells.X.indptr[3] : cells.X.indptr[4]] = 0
    with pytest.raises(InputError, match=cells.obs_names[3]):
        rvqa.encode(cells, model)


def test_decode_gives_expected_counts_per_ten_thousand(cells, model):
    rvqa.encode(cells, model, library_size_key="depth")
    codes = cells.obsm["rvqa_codes"]
    whole = rvqa.decode(codes, model)
    symbols = model.cell_tokenizer.axis.symbols
    assert whole.shape == (cells.n_obs, len(symbols))
    assert whole.dtype == np.float32
    assert (whole >= 0).all()
    # Decoded and measured counts of all cells together agree, gene by gene, where there are many.
    depth = cells.obs["depth"].to_numpy()
    expected = (whole.astype(np.float64) * depth[:, None] / 1e4).sum(0)
    measured = np.asarray(cells[:, list(symbols)].X.sum(0)).ravel()
    many = measured >= 100
    assert many.sum() > 50
    assert np.median(np.abs(np.log(expected[many] / measured[many]))) < np.log(1.5)
    chosen = [symbols[5], symbols[2]]
    np.testing.assert_array_equal(rvqa.decode(codes, model, genes=chosen), whole[:, [5, 2]])
    np.testing.assert_allclose(rvqa.decode(codes, model, target_sum=1e6), whole * 100, rtol=1e-6)


def test_read_only_and_reversed_codes_decode_without_a_warning(cells, model):
    rvqa.encode(cells, model, library_size_key="depth")
    codes = cells.obsm["rvqa_codes"][:1]
    expected = rvqa.decode(codes, model, levels=1)
    frozen, reversed_rows = codes.copy(), codes[:, ::-1].copy()[::-1, ::-1]
    frozen.setflags(write=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for other in (frozen, reversed_rows):
            np.testing.assert_array_equal(rvqa.decode(other, model, levels=1), expected)


def test_a_prefix_of_levels_decodes_to_less_detail(cells, model):
    """Later codes do not change how a prefix decodes, so cells with the same first code have one profile."""
    rvqa.encode(cells, model, library_size_key="depth")
    codes = cells.obsm["rvqa_codes"]
    for levels in (1, 2, 7):
        prefix, others = rvqa.decode(codes, model, levels=levels), codes.copy()
        others[:, levels:] = (others[:, levels:] + 1) % 32
        np.testing.assert_array_equal(rvqa.decode(others, model, levels=levels), prefix)
        assert (rvqa.decode(others, model) != rvqa.decode(codes, model)).any(1).all()
    rows = np.flatnonzero(codes[:, 0] == np.bincount(codes[:, 0]).argmax())
    one, all_ = (rvqa.decode(codes[rows], model, levels=levels) for levels in (1, 8))
    np.testing.assert_allclose(one, one[[0] * len(rows)], rtol=1e-5)
    assert not np.allclose(all_, all_[[0] * len(rows)], rtol=1e-3)


@pytest.mark.parametrize(
    ("codes", "options", "message"),
    [
        (np.zeros((3, 7), np.uint8), {}, r"shape \(3, 7\)"),
        (np.zeros((3, 8), np.int64), {}, "int64"),
        (np.full((3, 8), 32, np.uint8), {}, "32"),
        (np.zeros((3, 8), np.uint8), {"levels": 9}, "1 to 8"),
        (np.zeros((3, 8), np.uint8), {"levels": 2.0}, "whole number"),
        (np.zeros((3, 8), np.uint8), {"target_sum": np.nan}, "target_sum is nan"),
        (np.zeros((3, 8), np.uint8), {"target_sum": 1e300}, "target_sum is 1e\\+300"),
        (np.zeros((3, 8), np.uint8), {"genes": ["CD74x", 3]}, "Nearest|Known"),
        ([[0] * 8, [0]], {}, "not an array"),
        (np.zeros((3, 8), np.uint8), {"genes": ["CD74x"]}, "CD74"),
    ],
)
def test_decode_refuses(codes, options, message, model):
    with pytest.raises(InputError, match=message):
        rvqa.decode(codes, model, **options)


def test_drawn_counts(model, shipped):
    """Counts are whole, vary around the expectation at the given library sizes, and depend only on the seed."""
    adata = next(iter(shipped.tests.values())).copy()
    rvqa.encode(adata, model, library_size_key="depth", recon_error=True)
    codes = np.repeat(adata.obsm["rvqa_codes"][:1], 2000, axis=0)
    expected = rvqa.decode(codes[:1], model, target_sum=5e3)[0]
    drawn = rvqa.decode(codes, model, sample=True, library_size=np.full(2000, 5e3), seed=3)
    assert (drawn.data == np.floor(drawn.data)).all()
    top = np.argsort(-expected)[:20]
    dispersion = model.cell_tokenizer.dispersion_G.numpy()[top]
    error = np.sqrt((expected[top] + dispersion * expected[top] ** 2) / 2000)
    assert (np.abs(np.asarray(drawn.mean(0)).ravel()[top] - expected[top]) < 5 * error).all()
    again = rvqa.decode(codes, model, sample=True, library_size=5e3, seed=3)
    assert (again != drawn).nnz == 0
    assert (rvqa.decode(codes, model, sample=True, library_size=5e3, seed=4) != drawn).nnz > 0
    two = rvqa.decode(codes[:5], model, sample=True, genes=list(model.cell_tokenizer.axis.symbols[:2]))
    assert two.shape == (5, 2)
    for wrong in (np.ones(3), -1.0, np.nan):
        with pytest.raises(InputError, match="library_size"):
            rvqa.decode(codes, model, sample=True, library_size=wrong)
    with pytest.raises(InputError, match="sample=True"):
        rvqa.decode(codes, model, library_size=1.0)


def test_reconstruction_error(model, shipped):
    """The error is about 1 for cells of the fit, and far more if counts do not belong to the codes."""
    adata = shipped.references[0].copy()
    rvqa.encode(adata, model, library_size_key="depth", recon_error=True)
    error = adata.obs["rvqa_recon_error"].to_numpy()
    assert 0.7 < np.median(error) < 1.3
    rng = np.random.default_rng(0)
    shuffled = adata.copy()
    shuffled.X = adata.X[:, rng.permutation(adata.n_vars)].tocsr()
    rvqa.encode(shuffled, model, library_size_key="depth", recon_error=True)
    assert np.median(shuffled.obs["rvqa_recon_error"]) > 2 * np.median(error)


@pytest.mark.parametrize("option", [{"obs": ["label"]}, {"in_place": True}, {"append": True}, {"device": "cuda"}])
def test_reading_whole_files_takes_no_options_of_parts(cells, model, tmp_path, option):
    cells.write_h5ad(tmp_path / "cells.h5ad")
    with pytest.raises(InputError, match=f"which {next(iter(option))} cannot be combined with"):
        rvqa.encode(tmp_path / "cells.h5ad", model, out=tmp_path / "out.h5ad", recon_error=True, **option)
    assert [each.name for each in tmp_path.iterdir()] == ["cells.h5ad"]
