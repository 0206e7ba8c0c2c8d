"""Decoding adds codewords in float32, level by level: the same bits everywhere."""

import numpy as np
import pytest
import torch

from rvqa.errors import InputError
from rvqa.kernels import ops
from tests.kernels.exact import natural


@pytest.mark.parametrize("N", [0, 1, 31, 33, 129, 1025])
@pytest.mark.parametrize("D", [8, 33, 100])
def test_bits(backend, N, D):
    _, codebooks = natural(0, 8, 32, D)
    codes = torch.randint(0, 32, (N, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    right = np.zeros((N, D), dtype=np.float32)
    for m in range(8):
        word = codebooks[m].numpy()[codes[:, m].numpy()]
        right = word if m == 0 else right + word
    assert ops.decode(codes, ops.prepare(codebooks)).numpy().tobytes() == right.tobytes()


def test_one_level_gives_codewords_as_they_are(backend):
    codebook = torch.tensor([[-0.0, 1e-45], [3e38, -3e38]])
    out = ops.decode(torch.tensor([[1], [0]], dtype=torch.uint8), ops.prepare(codebook[None]))
    assert out.numpy().tobytes() == codebook.flip(0).numpy().tobytes()


def test_fewer_levels(backend):
    _, codebooks = natural(0, 4, 8, 5)
    tables = ops.prepare(codebooks)
    codes = torch.randint(0, 8, (20, 4), dtype=torch.uint8)
    two = codebooks[0][codes[:, 0].long()] + codebooks[1][codes[:, 1].long()]
    assert torch.equal(ops.decode(codes, tables, levels=2), two)
    assert torch.equal(ops.decode(codes[:, :2], tables), two)
    assert torch.equal(ops.decode(codes.T.contiguous().T, tables), ops.decode(codes, tables))


def test_into_memory_that_is_there(backend):
    _, codebooks = natural(0, 4, 8, 40)
    tables = ops.prepare(codebooks)
    codes = torch.randint(0, 8, (20, 4), dtype=torch.uint8)
    out = torch.full((20, 40), torch.nan)
    assert ops.decode(codes, tables, out=out) is out
    assert torch.equal(out, ops.decode(codes, tables))
    for wrong in (out[:, :39], out.T, torch.empty(19, 40)):
        with pytest.raises(ValueError, match="out has shape"):
            ops.decode(codes, tables, out=wrong)
    with pytest.raises(ValueError, match="not below K=8"):
        ops.decode(codes + 8, tables, out=out)


def test_into_memory_that_holds_a_sign(backend):
    out = torch.view_as_complex(torch.zeros(2, 4, 2)).conj().imag
    with pytest.raises(InputError, match="out is a negative view"):
        ops.decode(torch.zeros(2, 2, dtype=torch.uint8), ops.prepare(torch.ones(2, 3, 4)), out=out)


@pytest.mark.parametrize("levels", [1, 3])
def test_codewords_without_columns(backend, levels):
    tables = ops.Tables(torch.ones(3, 5, 0), torch.zeros(0, dtype=torch.uint8))
    codes = torch.zeros(4, 3, dtype=torch.uint8)
    assert ops.decode(codes, tables, levels).shape == (4, 0)
    with pytest.raises(InputError, match="D >= 1"):
        ops.residual_quantize(torch.ones(4, 0), tables)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.uint8])
def test_the_operator_takes_no_other_codebooks(backend, dtype):
    codes, codebooks = torch.zeros(4, 3, dtype=torch.uint8), torch.ones(3, 5, 2, dtype=dtype)
    with pytest.raises(InputError, match="codebooks has dtype"):
        torch.ops.rvqa.decode(codes, codebooks, 3)
    with pytest.raises(InputError, match="codebooks has dtype"):
        ops.decode(codes, ops.Tables(codebooks, torch.zeros(0, dtype=torch.uint8)))


def test_refuses(backend):
    tables = ops.prepare(torch.ones(3, 5, 2))
    codes = torch.zeros(4, 3, dtype=torch.uint8)
    codes[2, 1], codes[3, 0] = 5, 200
    for wrong, levels, message in [
        (codes, None, "2 codes are not below K=5; the first is 5 in row 2 at level 1"),
        (codes.long(), None, "dtype int64"),
        (codes[:, :0], None, r"shape \(4, 0\)"),
        (codes.repeat(1, 2), None, r"shape \(4, 6\)"),
        (codes[:2], 4, "levels is 4"),
    ]:
        with pytest.raises(ValueError, match=message):
            ops.decode(wrong, tables, levels)


def test_all_256_codes(backend):
    codebook = torch.arange(256.0)[:, None]
    codes = torch.arange(256, dtype=torch.uint8)[:, None]
    assert torch.equal(ops.decode(codes, ops.prepare(codebook[None])), codebook)
