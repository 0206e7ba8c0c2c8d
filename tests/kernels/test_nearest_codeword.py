"""Exactly nearest codewords, up to codebooks of 65,536, and their squared distances bit for bit."""

import numpy as np
import pytest
import torch

from rvqa.kernels import ops, reference
from tests.kernels.exact import FAMILIES, exact_codes, natural


def defined_distance(x_D: torch.Tensor, c_D: torch.Tensor) -> np.float32:
    """Follow the definition of the distance: Python floats are float64, and each operation rounds once."""
    total = [0.0] * 8
    for d, (x, c) in enumerate(zip(x_D.tolist(), c_D.tolist(), strict=True)):
        total[d % 8] += (x - c) * (x - c)
    with np.errstate(over="ignore"):
        return np.float32(
            ((total[0] + total[4]) + (total[2] + total[6])) + ((total[1] + total[5]) + (total[3] + total[7]))
        )


@pytest.mark.parametrize("N", [1, 33, 129, 1025])
@pytest.mark.parametrize("D", [8, 33])
def test_natural_rows_are_exact(backend, N, D):
    x, codebooks = natural(N, 1, 40, D)
    index, distance = ops.nearest_codeword(x, codebooks[0])
    assert (index.dtype, distance.dtype) == (torch.int64, torch.float32)
    assert torch.equal(index, exact_codes(x, codebooks)[:, 0])
    right = [defined_distance(row, codebooks[0, k]) for row, k in zip(x, index.tolist(), strict=True)]
    assert distance.numpy().tobytes() == np.array(right, dtype=np.float32).tobytes()


@pytest.mark.parametrize("family", FAMILIES)
def test_adversarial_rows_are_exact(backend, family):
    x, codebooks = FAMILIES[family]()
    index, distance = ops.nearest_codeword(x, codebooks[0])
    assert torch.equal(index, exact_codes(x, codebooks[:1])[:, 0])
    right = [defined_distance(row, codebooks[0, k]) for row, k in zip(x, index.tolist(), strict=True)]
    assert distance.numpy().tobytes() == np.array(right, dtype=np.float32).tobytes()


def test_large_codebook(backend):
    _, codebooks = natural(0, 1, 65_536, 8, seed=30)
    codebook = codebooks[0]
    codebook[60_000] = codebook[300]
    chosen = torch.tensor([65_535, 300, 60_000, 12_345, 0])
    index, distance = ops.nearest_codeword(codebook[chosen], codebook)
    assert index.tolist() == [65_535, 300, 300, 12_345, 0]
    assert not distance.any()
    x, _ = natural(40, 1, 1, 8, seed=31)
    assert torch.equal(ops.nearest_codeword(x, codebook)[0], reference.nearest_codeword(x, codebook)[0])


def test_one_level_is_nearest_codeword(backend):
    x, codebooks = natural(200, 1, 32, 33)
    codes = ops.residual_quantize(x, ops.prepare(codebooks))[:, 0]
    assert torch.equal(ops.nearest_codeword(x, codebooks[0])[0], codes.long())
    assert torch.equal(ops.nearest_codeword(x.T.contiguous().T, codebooks[0].T.contiguous().T)[0], codes.long())


def test_no_rows(backend):
    index, distance = ops.nearest_codeword(torch.empty(0, 8), torch.ones(4, 8))
    assert index.shape == distance.shape == (0,)


def test_refuses(backend):
    ones = torch.ones
    for x, codebook, message in [
        (ones(2, 3), ones(65_537, 3), "65,536"),
        (ones(2, 3), ones(3), r"shape \(3,\)"),
        (ones(2, 4), ones(5, 3), r"\[N, 3\]"),
        (ones(2, 3).double(), ones(5, 3), "dtype float64"),
        (torch.full((2, 3), float("nan")), ones(5, 3), "2 of 2 rows"),
        (ones(2, 3), torch.full((5, 3), float("inf")), "5 of 5 rows, first in codeword 0"),
    ]:
        with pytest.raises(ValueError, match=message):
            ops.nearest_codeword(x, codebook)
