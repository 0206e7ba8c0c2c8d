"""CellTokenizer: codes depend only on the cell and the model; save and load are exact; bad files are rejected."""

import json

import numpy as np
import pytest
import scipy.sparse as sp
import torch

from rvqa.data.alignment import CoverageWarning, align, map_columns
from rvqa.data.depth import log1p_normalise
from rvqa.encoding import cell_codes
from rvqa.errors import InputError
from rvqa.language.vocabulary import CellVocabulary
from rvqa.tokenizer.model import CellTokenizer

pytestmark = pytest.mark.filterwarnings("ignore::rvqa.data.alignment.CoverageWarning")


def codes_of(adata, tokenizer):
    return cell_codes(adata, tokenizer)[0]


def test_every_data_file_encodes_and_survives_text_and_ids(pbmc_tokenizer, read, data_file):
    adata = read(data_file)
    codes = codes_of(adata, pbmc_tokenizer)
    assert codes.shape == (adata.n_obs, 8)
    assert codes.dtype == np.uint8
    assert codes.max() < 32
    vocabulary = CellVocabulary(base=1000)
    ids = vocabulary.ids(codes)
    assert ids.shape == (adata.n_obs, 10)
    np.testing.assert_array_equal(vocabulary.codes(ids), codes)
    np.testing.assert_array_equal(vocabulary.codes_from_texts(vocabulary.texts(codes)), codes)


def test_codes_do_not_depend_on_the_batch(pbmc_tokenizer, read):
    adata = read("zheng2017_sorted_pbmc_3500")
    whole = codes_of(adata, pbmc_tokenizer)
    for size, cells in ((1, 20), (7, 140), (1000, 3500)):
        parts = [codes_of(adata[i : i + size], pbmc_tokenizer) for i in range(0, cells, size)]
        np.testing.assert_array_equal(np.concatenate(parts), whole[:cells])
    shuffled = np.random.default_rng(0).permutation(adata.n_obs)
    np.testing.assert_array_equal(codes_of(adata[shuffled], pbmc_tokenizer), whole[shuffled])


def test_codes_do_not_depend_on_threads_or_on_the_order_of_genes(pbmc_tokenizer, read):
    adata = read("pbmc68k_reduced_700")
    whole = codes_of(adata, pbmc_tokenizer)
    order = np.random.default_rng(0).permutation(adata.n_vars)
    np.testing.assert_array_equal(codes_of(adata[:, order].copy(), pbmc_tokenizer), whole)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        np.testing.assert_array_equal(codes_of(adata, pbmc_tokenizer), whole)
    finally:
        torch.set_num_threads(threads)


def test_sparse_path_equals_the_layers_as_trained(pbmc_tokenizer, read):
    """`latent` folds standardisation and panel into weight and bias; training optimised `encode_dense`."""
    adata = read("kang2018_ifnb_pbmc_2k")[:300].copy()
    alignment = align(adata, pbmc_tokenizer.axis)
    counts = sp.csr_matrix(adata.X)
    depth = np.asarray(counts.sum(1, dtype=np.float64)).ravel()
    sparse = pbmc_tokenizer.latent(counts, alignment, depth)
    log1p = torch.from_numpy(log1p_normalise(map_columns(counts, alignment), depth).toarray())
    measured = torch.tensor(alignment.measured)
    with torch.inference_mode():
        dense = pbmc_tokenizer.encode_dense(pbmc_tokenizer.standardise(log1p, measured))
    assert (sparse - dense).abs().max() < 1e-3 * dense.abs().max()


def test_unmeasured_is_not_zero(pbmc_tokenizer, read):
    """A cell with half of its genes unmeasured stays closer to itself than with that half set to zero."""
    adata = read("pbmc3k_10x")[:400].copy()
    depth = np.asarray(adata.X.sum(1, dtype=np.float64)).ravel()
    keep = np.random.default_rng(0).random(adata.n_vars) < 0.5
    half = adata[:, keep].copy()
    zeroed = adata.copy()
    zeroed.X = sp.csr_matrix(sp.csr_matrix(adata.X).multiply(keep[None, :]))

    def latent(each):
        return pbmc_tokenizer.latent(sp.csr_matrix(each.X), align(each, pbmc_tokenizer.axis), depth)

    whole = latent(adata)
    assert (latent(half) - whole).square().sum() < 0.8 * (latent(zeroed) - whole).square().sum()


def test_save_and_load_are_exact(pbmc_tokenizer, read, tmp_path):
    adata = read("pbmc3k_10x")[:500].copy()
    pbmc_tokenizer.save_pretrained(tmp_path / "tokenizer")
    loaded = CellTokenizer.from_pretrained(tmp_path / "tokenizer")
    assert loaded.axis == pbmc_tokenizer.axis
    assert loaded.config == pbmc_tokenizer.config
    for name, tensor in pbmc_tokenizer.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    codes = codes_of(adata, pbmc_tokenizer)
    np.testing.assert_array_equal(codes_of(adata, loaded), codes)
    share = next(pbmc_tokenizer.share_blocks(codes))[1]
    np.testing.assert_array_equal(next(loaded.share_blocks(codes))[1], share)
    assert sorted(path.name for path in (tmp_path / "tokenizer").iterdir()) == [
        "config.json",
        "genes.parquet",
        "model.safetensors",
    ]


def test_tables_are_kept_until_a_codeword_changes(pbmc_tokenizer, tmp_path, monkeypatch):
    """A change counts in place, under inference mode, hidden from autograd, from a file, or by another backend."""
    pbmc_tokenizer.save_pretrained(tmp_path)
    tokenizer = CellTokenizer.from_pretrained(tmp_path)
    codes = np.zeros((1, 8), dtype=np.uint8)
    expected = pbmc_tokenizer.codebooks_MKD[:, 0].sum(0).numpy()
    first = tokenizer.tables
    assert tokenizer.tables is first

    def copied(codebooks):
        codebooks.data.copy_(2 * codebooks)

    def filled(codebooks):
        with torch.inference_mode():
            codebooks.mul_(2)

    def replaced(codebooks):
        tokenizer.codebooks_MKD = 2 * codebooks

    def shared(codebooks):
        codebooks.numpy()[:] *= 2

    for times, change in enumerate((lambda codebooks: codebooks.mul_(2), copied, filled, replaced, shared), start=1):
        change(tokenizer.codebooks_MKD)
        np.testing.assert_allclose(tokenizer.quantized_latent(codes)[0], 2**times * expected, rtol=1e-5, atol=1e-6)
        assert tokenizer.tables is tokenizer.tables is not first
    tokenizer.load_state_dict(pbmc_tokenizer.state_dict())
    np.testing.assert_array_equal(tokenizer.quantized_latent(codes), pbmc_tokenizer.quantized_latent(codes))
    native = tokenizer.tables
    monkeypatch.setenv("RVQA_BACKEND", "reference")
    assert tokenizer.tables is not native
    tokenizer.codebooks_MKD[0, 0, 0] = torch.nan
    with pytest.raises(InputError, match="codebooks"):
        tokenizer.tables  # noqa: B018


def test_damaged_directories_are_refused(pbmc_tokenizer, tmp_path):
    with pytest.raises(InputError, match=r"no config\.json"):
        CellTokenizer.from_pretrained(tmp_path)
    pbmc_tokenizer.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "format_version": 99}))
    with pytest.raises(InputError, match="version 99"):
        CellTokenizer.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({**config, "latent": 16}))
    with pytest.raises(InputError, match="does not fit"):
        CellTokenizer.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config))
    whole = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match="is damaged"):
        CellTokenizer.from_pretrained(tmp_path)


def test_few_genes_warn_and_too_few_are_refused(pbmc_tokenizer, read):
    adata = read("papalexi2021_eccite_thp1_299genes")[:20].copy()
    with pytest.warns(CoverageWarning):
        codes_of(adata, pbmc_tokenizer)
    measured = np.flatnonzero(align(adata, pbmc_tokenizer.axis).column_map >= 0)
    with pytest.raises(InputError, match="49"):
        codes_of(adata[:, measured[:49]].copy(), pbmc_tokenizer)


def test_decoded_profiles_follow_their_cells(pbmc_tokenizer, read):
    """Types decode to their own mean profiles, better than to the mean of all cells."""
    adata = read("pbmc3k_10x")
    codes = codes_of(adata, pbmc_tokenizer)
    alignment = align(adata, pbmc_tokenizer.axis)
    counts = map_columns(sp.csr_matrix(adata.X), alignment)
    depth = np.asarray(adata.X.sum(1, dtype=np.float64)).ravel()
    everyone = np.asarray(counts.sum(0)).ravel() / depth.sum()
    for name in ("B", "NK", "CD14+ Mono"):
        rows = np.flatnonzero(adata.obs["cell_type"] == name)
        true = np.asarray(counts[rows].sum(0)).ravel() / depth[rows].sum()
        decoded = pbmc_tokenizer.share_sum(codes[rows], depth[rows]) / depth[rows].sum()
        measured = alignment.measured & (everyone > 1e-5)
        change = np.log(true[measured] + 1e-6) - np.log(everyone[measured] + 1e-6)
        predicted = np.log(decoded[measured] + 1e-6) - np.log(everyone[measured] + 1e-6)
        assert np.corrcoef(change, predicted)[0, 1] > 0.6, name
