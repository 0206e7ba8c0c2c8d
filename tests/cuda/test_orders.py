"""On real latents and counts the kernels give the CPU's bits, in any order of a GPU's threads."""

import numpy as np
import pytest
import torch

from rvqa.data.alignment import map_columns
from rvqa.data.counts import read_counts
from rvqa.kernels import ops, reference
from tests.cuda import emulated
from tests.kernels.exact import natural

ORDERS = [("forward", 0, "Hopper"), ("reversed", 0, "Ampere"), ("shuffled", 1, "Hopper"), ("shuffled", 2, "Ampere")]


@pytest.fixture(params=ORDERS, ids=lambda order: "-".join(map(str, order)))
def order(request, monkeypatch):
    emulated.require()
    from rvqa.kernels.cuda import backend

    backend._native.emulate(*request.param)
    monkeypatch.setenv("RVQA_BACKEND", "cuda")
    yield request.param
    backend._native.emulate("forward", 0, "Hopper")


@pytest.fixture(scope="module")
def real(pbmc_tokenizer, read):
    """Latents, codes, CSR parts of the counts and hidden units of 400 cells, computed by the CPU."""
    adata = read("pbmc3k_10x")[:400].copy()
    cells = read_counts(adata)
    alignment = cells.alignment(pbmc_tokenizer.axis)
    counts = map_columns(cells.counts, alignment)
    parts = [torch.from_numpy(np.ascontiguousarray(each)) for each in (counts.indptr, counts.indices, counts.data)]
    depth = cells.depth(pbmc_tokenizer.shares)
    latent = torch.as_tensor(pbmc_tokenizer.latent(cells.counts, alignment, depth))
    weight, bias = torch.randn(counts.shape[1], 40, generator=torch.Generator().manual_seed(0)), torch.zeros(40)
    hidden = ops.csr_project(*parts, weight, bias, library_size=torch.from_numpy(depth))
    return latent, parts, weight, bias, torch.from_numpy(depth), hidden


def test_codes_of_real_latents(order, real, pbmc_tokenizer, monkeypatch):
    latent, codebooks = real[0], pbmc_tokenizer.codebooks_MKD
    codes = ops.residual_quantize(latent, ops.prepare(codebooks))
    monkeypatch.setenv("RVQA_BACKEND", "cpu")
    assert torch.equal(codes, ops.residual_quantize(latent, ops.prepare(codebooks)))


def test_hidden_units_of_real_counts(order, real):
    _, parts, weight, bias, depth, hidden = real
    rows = [parts[0][:101], *parts[1:]]
    found = ops.csr_project(*rows, weight, bias, library_size=depth[:100])
    assert torch.equal(found, hidden[:100])


def test_nearest_codewords_and_totals_of_real_cells(order, real, pbmc_tokenizer, monkeypatch):
    latent, parts = real[0][:200], real[1]
    codebook = real[0][200:].contiguous()
    found = [*ops.nearest_codeword(latent, codebook), ops.csr_totals(*parts, columns=len(real[2]))[0]]
    monkeypatch.setenv("RVQA_BACKEND", "cpu")
    right = [*ops.nearest_codeword(latent, codebook), ops.csr_totals(*parts, columns=len(real[2]))[0]]
    assert all(torch.equal(*pair) for pair in zip(found, right, strict=True))


@pytest.mark.parametrize(("K", "D"), [(32, 200), (40, 500), (32, 1000)])
def test_codes_of_rows_that_several_warps_share(order, K, D):
    x, codebooks = natural(19, 3, K, D)
    codes = ops.residual_quantize(x, ops.prepare(codebooks))
    assert torch.equal(codes, reference.residual_quantize(x, (codebooks, codebooks), 3)[0])
