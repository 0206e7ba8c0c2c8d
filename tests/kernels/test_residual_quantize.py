"""Every backend against exact integers, on awkward sizes and on rows that mislead floating point."""

from functools import cache

import pytest
import torch

from rvqa.kernels import ops, reference
from tests.kernels.exact import FAMILIES, exact_codes, natural

SIZES = (1, 31, 33, 129, 1025)
WIDTHS = (8, 33, 64, 100)


@cache
def expected(family: str) -> torch.Tensor:
    return exact_codes(*FAMILIES[family]())


@cache
def expected_natural(D: int) -> torch.Tensor:
    return exact_codes(*natural(max(SIZES), 3, 10, D))


@pytest.mark.parametrize("D", WIDTHS)
@pytest.mark.parametrize("N", SIZES)
def test_natural_rows_are_exact(backend, N, D):
    x, codebooks = natural(max(SIZES), 3, 10, D)
    codes = ops.residual_quantize(x[:N], ops.prepare(codebooks))
    assert codes.dtype == torch.uint8
    assert torch.equal(codes.long(), expected_natural(D)[:N])


@pytest.mark.parametrize("family", FAMILIES)
def test_adversarial_rows_are_exact(backend, family):
    x, codebooks = FAMILIES[family]()
    assert torch.equal(ops.residual_quantize(x, ops.prepare(codebooks)).long(), expected(family))


def test_families_mislead_floating_point():
    """Plain arithmetic must fail on these rows; otherwise they test nothing."""
    x, codebooks = FAMILIES["midpoints"]()
    plain = (codebooks[0].square().sum(1) - 2 * x @ codebooks[0].T).argmin(1)
    assert (plain != expected("midpoints")[:, 0]).sum() >= 5
    x, codebooks = FAMILIES["permuted"]()
    double = (x.double()[:, None] - codebooks[0].double()).square().sum(2).argmin(1)
    assert (double != expected("permuted")[:, 0]).any()


@pytest.mark.parametrize(("M", "K", "D"), [(8, 32, 64), (2, 256, 16), (1, 1, 1), (256, 2, 3)])
def test_backends_agree(backend, M, K, D):
    x, codebooks = natural(700, M, K, D, seed=20)
    tables = ops.prepare(codebooks)
    right, _, _ = reference.residual_quantize(x, tables, M)
    assert torch.equal(ops.residual_quantize(x, tables), right)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_means_its_float32_values(backend, dtype):
    x, codebooks = natural(65, 3, 32, 33)
    x = x.to(dtype)
    tables = ops.prepare(codebooks)
    assert torch.equal(ops.residual_quantize(x, tables), ops.residual_quantize(x.float(), tables))


def test_strides_do_not_matter(backend):
    x, codebooks = natural(64, 3, 32, 64)
    tables = ops.prepare(codebooks.transpose(1, 2).contiguous().transpose(1, 2))
    codes = ops.residual_quantize(x, tables)
    assert torch.equal(ops.residual_quantize(x.T.contiguous().T, tables), codes)
    assert torch.equal(ops.residual_quantize(x[::3], tables), codes[::3])
    wide = torch.zeros(64, 100)
    wide[:, 5:69] = x
    assert torch.equal(ops.residual_quantize(wide[:, 5:69], tables), codes)


def test_a_row_does_not_see_its_batch(backend):
    x, codebooks = natural(600, 8, 32, 64, seed=21)
    tables = ops.prepare(codebooks)
    codes = ops.residual_quantize(x, tables)
    assert torch.equal(torch.cat([ops.residual_quantize(row[None], tables) for row in x[:50]]), codes[:50])
    assert torch.equal(torch.cat([ops.residual_quantize(rows, tables) for rows in x.split(7)]), codes)
    assert torch.equal(ops.residual_quantize(x.flip(0), tables).flip(0), codes)


def test_threads_do_not_matter(backend):
    x, codebooks = natural(1500, 4, 32, 33, seed=22)
    tables, before = ops.prepare(codebooks), torch.get_num_threads()
    codes = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        codes.append(ops.residual_quantize(x, tables))
    torch.set_num_threads(before)
    assert torch.equal(codes[0], codes[1])
    assert torch.equal(codes[0], codes[2])


def test_flushing_denormals_does_not_matter(backend):
    if backend in ("reference", "cuda"):
        pytest.skip("torch makes tables, or codes, in the environment that this sets; on a GPU it does not reach them")
    x, codebooks = FAMILIES["denormal"]()
    tables, right = ops.prepare(codebooks), expected("denormal")
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor cannot flush denormals")
    try:
        codes = ops.residual_quantize(x, tables)
    finally:
        torch.set_flush_denormal(False)
    assert torch.equal(codes.long(), right)


def test_fewer_levels_are_a_prefix(backend):
    x, codebooks = natural(40, 5, 16, 8)
    tables = ops.prepare(codebooks)
    assert torch.equal(ops.residual_quantize(x, tables, levels=2), ops.residual_quantize(x, tables)[:, :2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_more_than_2_to_the_31_elements(backend, dtype):
    """One row is repeated by a stride of 0; at the last one, 32-bit offsets would wrap."""
    if backend != "cpu":
        pytest.skip("too slow")
    row, codebooks = natural(1, 1, 32, 1024)
    x = row.to(dtype).expand(2**21 + 100, 1024)
    tables = ops.prepare(codebooks)
    codes = ops.residual_quantize(x, tables)
    assert x.numel() > 2**31
    assert torch.equal(codes, ops.residual_quantize(x[:1], tables).expand(len(x), 1))


def test_norms_of_what_is_left(backend):
    x, codebooks = natural(70, 4, 32, 33)
    tables = ops.prepare(codebooks)
    codes = ops.residual_quantize(x, tables)
    norms = ops.residual_norms(x, codes, tables)
    residual = x.double()
    for m in range(4):
        residual = residual - codebooks[m].double()[codes[:, m].long()]
        torch.testing.assert_close(norms[:, m], residual.norm(dim=1).float(), rtol=1e-6, atol=0)
    right = reference.residual_norms(x, codes, tables)
    assert torch.equal(norms, right)
    assert torch.equal(ops.residual_norms(x, codes[:, :2], tables), right[:, :2])
    with pytest.raises(ValueError, match="not below K=32"):
        ops.residual_norms(x, codes + 100, tables)
    with pytest.raises(ValueError, match="codes have 3 rows, x has 70"):
        ops.residual_norms(x, codes[:3], tables)


def test_rows_that_are_not_finite_can_be_marked(backend):
    x, codebooks = natural(40, 2, 4, 8)
    x[3, 1], x[17, 0] = float("nan"), float("-inf")
    tables = ops.prepare(codebooks)
    codes = ops.residual_quantize(x, tables, not_finite="mark")
    whole = torch.isfinite(x).all(1)
    assert codes[~whole].eq(255).all()
    assert torch.equal(codes[whole], ops.residual_quantize(x[whole], tables))
    assert ops.residual_norms(x[whole], codes[whole], tables).isfinite().all()
    with pytest.raises(ValueError, match="255"):
        ops.decode(codes, tables)
    with pytest.raises(ValueError, match="K=256"):
        ops.residual_quantize(x, ops.prepare(torch.ones(1, 256, 8)), not_finite="mark")


def test_no_rows(backend):
    assert ops.residual_quantize(torch.empty(0, 8), ops.prepare(torch.ones(3, 4, 8))).shape == (0, 3)


def test_prepared_tables_keep_their_values():
    codebooks = torch.ones(1, 2, 3)
    tables = ops.prepare(codebooks)
    codebooks.zero_()
    assert tables.codebooks_MKD.sum() == 6


@pytest.mark.parametrize(
    ("codebooks", "message"),
    [
        (torch.ones(2, 3, 4, dtype=torch.float64), "dtype float64"),
        (torch.ones(3, 4), r"shape \(3, 4\)"),
        (torch.ones(1, 257, 4), "K=257"),
        (torch.ones(257, 1, 1), "M=257"),
        (torch.ones(1, 0, 4), "K=0"),
        (torch.tensor([[[1.0], [float("nan")]]]), "first in codeword .* 1"),
    ],
)
def test_prepare_refuses(codebooks, message):
    with pytest.raises(ValueError, match=message):
        ops.prepare(codebooks)


def test_refuses_rows_that_are_not_finite(backend):
    x, codebooks = natural(9, 2, 4, 8)
    x[3, 1], x[7, 0] = float("nan"), float("-inf")
    with pytest.raises(ValueError, match="2 of 9 rows, first in row 3"):
        ops.residual_quantize(x, ops.prepare(codebooks))


def test_refuses_wrong_arguments():
    tables = ops.prepare(torch.ones(2, 3, 4))
    for x, levels, message in [
        (torch.ones(5, 3), None, r"\(5, 3\).*\[N, 4\]"),
        (torch.ones(5, 4, dtype=torch.int32), None, "dtype int32"),
        (torch.ones(5, 4), 3, "levels is 3; expected 1 to 2"),
        (torch.ones(5, 4), 0, "levels is 0"),
    ]:
        with pytest.raises(ValueError, match=message):
            ops.residual_quantize(x, tables, levels)
