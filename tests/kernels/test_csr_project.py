"""Every backend equals the projection's definition, written in Python floats and numpy float32, to the bit."""

import math
from decimal import Decimal, localcontext
from itertools import pairwise

import numpy as np
import pytest
import torch

from rvqa.kernels import ops, reference
from tests.kernels.exact import fused

GENES, HIDDEN = 50, 19
COUNT_DTYPES = [torch.float32, torch.float64, torch.int32, torch.uint8, torch.uint16, torch.uint32]


def parameters(genes=GENES, hidden=HIDDEN):
    g = torch.Generator().manual_seed(0)
    return torch.randn(genes, hidden, generator=g), torch.randn(hidden, generator=g)


def counts(N, columns=GENES, density=0.3, seed=0, fractions=False):
    """Return random CSR parts with unsorted columns, empty rows and stored zeros."""
    rng = np.random.default_rng(seed)
    dense = rng.integers(0, 40, (N, columns)) * (rng.random((N, columns)) < density)
    dense[4::5] = 0
    indices, data, indptr = [], [], [0]
    for row in dense:
        stored = rng.permutation(np.flatnonzero(row | (rng.random(columns) < 0.05)))
        indices.append(stored)
        data.append(row[stored] * (0.1 if fractions else 1))
        indptr.append(indptr[-1] + len(stored))
    parts = (np.array(indptr), np.concatenate([[], *indices]).astype(np.int64), np.concatenate([[], *data]))
    return tuple(torch.from_numpy(part) for part in parts)


def expected(indptr, indices, data, weight, bias, target_sum=1e4, column_map=None, library_size=None):
    """Follow the definition of `rvqa.kernels.reference`, one row and one operation at a time."""
    out = np.empty((len(indptr) - 1, len(bias)), dtype=np.float32)
    W, indptr, indices, data = weight.numpy(), indptr.tolist(), indices.tolist(), data.double().tolist()
    for n in range(len(out)):
        stored = range(indptr[n], indptr[n + 1])
        size = math.fsum(data[e] for e in stored) if library_size is None else float(library_size[n])
        by_column: dict[int, list[float]] = {}
        for e in stored:
            column = indices[e] if column_map is None else int(column_map[indices[e]])
            by_column.setdefault(column, []).append(data[e])
        hidden = bias.numpy().copy()
        for column in sorted(by_column):
            count = math.fsum(by_column[column])
            if column >= 0 and count > 0:
                value = np.float32(math.log1p(count * (target_sum / size)))
                hidden = fused(value, W[column], hidden)
        out[n] = hidden
    return out


def same_bits(result, right):
    return result.numpy().tobytes() == np.ascontiguousarray(right).tobytes()


def test_fma_rounds_once():
    """Operands are random, subnormal, or give a float64 sum half way between two float32: rounding twice fails."""
    g = torch.Generator().manual_seed(0)
    a, b = torch.randn(20_000, generator=g), torch.randn(20_000, generator=g)
    c = torch.randn(20_000, generator=g) * 2.0 ** torch.randint(-40, 8, (20_000,), generator=g)
    odd = 1 + (2 * torch.randint(0, 2**22, (1_000,), generator=g) + 1) * 2.0**-23
    cases = [
        (a, b, c),
        (a * 2.0**-70, b * 2.0**-70, c * 2.0**-140),
        # odd + 2^-24 is half way and would go up; a * b is 2^-24 (1 - 2^-46): 2^-70 decides, beyond float64
        ((1 + 2.0**-23) * torch.ones(1_000), (1 - 2.0**-23) * torch.ones(1_000) * 2.0**-24, odd),
    ]
    twice = 0
    for x, y, z in cases:
        right = np.array(
            [fused(p, q[None], r[None])[0] for p, q, r in zip(x.numpy(), y.numpy(), z.numpy(), strict=True)]
        )
        assert same_bits(reference.fma(x, y, z), right)
        twice += int((((x.double() * y + z.double()).float().numpy()) != right).sum())
    assert twice > 100  # the test would notice rounding twice


@pytest.mark.parametrize("N", [0, 1, 7, 33, 129])
@pytest.mark.parametrize("dtype", COUNT_DTYPES)
def test_bits(backend, N, dtype):
    indptr, indices, data = counts(N)
    right = expected(indptr, indices, data, *parameters())
    result = ops.csr_project(indptr, indices, data.to(dtype), *parameters())
    assert result.dtype == torch.float32
    assert same_bits(result, right)
    int32 = ops.csr_project(indptr.int(), indices.int(), data.to(dtype), *parameters())
    assert same_bits(int32, right)


@pytest.mark.parametrize("fractions", [False, True])
def test_column_map_adds_and_drops(backend, fractions):
    """Several columns of one axis gene are summed; -1 drops an entry from the projection, not the library size."""
    indptr, indices, data = counts(60, columns=200, fractions=fractions)
    column_map = torch.randint(-1, GENES, (200,), generator=torch.Generator().manual_seed(1), dtype=torch.int32)
    for values in (data, data.float()):
        right = expected(indptr, indices, values, *parameters(), column_map=column_map)
        assert same_bits(ops.csr_project(indptr, indices, values, *parameters(), column_map=column_map), right)


def test_repeated_columns_add_up(backend):
    once = ops.csr_project(torch.tensor([0, 2]), torch.tensor([3, 8]), torch.tensor([6.0, 1.0]), *parameters())
    split = (torch.tensor([0, 4]), torch.tensor([3, 8, 3, 3]), torch.tensor([1.0, 1.0, 3.0, 2.0]))
    assert torch.equal(ops.csr_project(*split, *parameters()), once)


def test_library_size_and_target_sum(backend):
    indptr, indices, data = counts(30)
    library = torch.rand(30, generator=torch.Generator().manual_seed(2), dtype=torch.float64) * 1000 + 1
    for given in (library, library.float()):
        right = expected(indptr, indices, data, *parameters(), target_sum=333.3, library_size=given)
        result = ops.csr_project(indptr, indices, data, *parameters(), target_sum=333.3, library_size=given)
        assert same_bits(result, right)


@pytest.mark.parametrize("fractions", [False, True])
def test_the_order_of_genes_leaves_no_trace(backend, fractions):
    indptr, indices, data = counts(40, fractions=fractions)
    permutation = torch.randperm(GENES, generator=torch.Generator().manual_seed(3))
    result = ops.csr_project(indptr, indices, data, *parameters())
    renamed = ops.csr_project(indptr, torch.argsort(permutation)[indices], data, *parameters(), column_map=permutation)
    assert same_bits(renamed, result.numpy())
    order = torch.cat([torch.arange(a, b).flip(0) for a, b in pairwise(indptr.tolist())])
    assert same_bits(ops.csr_project(indptr, indices[order], data[order], *parameters()), result.numpy())


def test_a_row_does_not_see_its_batch(backend):
    indptr, indices, data = counts(64)
    result = ops.csr_project(indptr, indices, data, *parameters()).numpy()
    for size in (1, 7):
        parts = [
            ops.csr_project(indptr[start : start + size + 1], indices, data, *parameters())
            for start in range(0, 64, size)
        ]
        assert same_bits(torch.cat(parts), result)


def test_threads_do_not_matter(backend):
    indptr, indices, data = counts(100)
    before, results = torch.get_num_threads(), []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        results.append(ops.csr_project(indptr, indices, data, *parameters()))
    torch.set_num_threads(before)
    assert torch.equal(*results)


def test_rows_without_counts_give_the_bias(backend):
    weight, bias = parameters()
    empty = ops.csr_project(torch.tensor([0, 0, 2]), torch.tensor([1, 4]), torch.zeros(2), weight, bias)
    assert same_bits(empty, bias.repeat(2, 1).numpy())
    unmapped = ops.csr_project(
        torch.tensor([0, 1]), torch.tensor([0]), torch.ones(1), weight, bias, column_map=torch.tensor([-1])
    )
    assert same_bits(unmapped, bias[None].numpy())


def test_counts_at_the_ends_of_their_range(backend):
    """Sums beyond 2^53 and the smallest counts are still rounded once."""
    indptr, indices = torch.tensor([0, 4, 7]), torch.tensor([0, 1, 1, 2, 0, 1, 2])
    data = torch.tensor([2.0**53, 1.0, 2.0**53, 3.0, 2.0**-149, 2.0**-140, 0.1], dtype=torch.float64)
    right = expected(indptr, indices, data, *parameters())
    assert same_bits(ops.csr_project(indptr, indices, data, *parameters()), right)


@pytest.mark.parametrize("values", [[0.1] * 10, [1.0, 2.0**-53, 2.0**-106]])
@pytest.mark.parametrize("merged", [False, True])
def test_sums_are_rounded_once(backend, values, merged):
    """The last bit of a library size or merged count shows at a target sum where float32(log1p) steps."""
    total, n = math.fsum(values), len(values)

    def step(target_sum):
        y = total * (target_sum / 1.0) if merged else values[0] * (target_sum / total)
        return float(reference.log1p(torch.tensor([y], dtype=torch.float64)).float())

    low, high = 1e4 / values[0], 1.001e4 / values[0]
    bottom = step(low)
    while math.nextafter(low, high) < high:
        middle = (low + high) / 2
        low, high = (middle, high) if step(middle) == bottom else (low, middle)
    assert step(low) != step(high)
    column_map = torch.zeros(n, dtype=torch.int64)
    column_map[1:] = 0 if merged else -1
    for target_sum in (low, high):
        result = ops.csr_project(
            torch.tensor([0, n]),
            torch.arange(n),
            torch.tensor(values, dtype=torch.float64),
            torch.ones(1, 1),
            torch.zeros(1),
            target_sum=target_sum,
            column_map=column_map,
            library_size=torch.ones(1) if merged else None,
        )
        assert result.item() == step(target_sum)


def log1p_points():
    g = torch.Generator().manual_seed(4)
    draw = torch.rand(2000, generator=g, dtype=torch.float64)
    whole = torch.arange(0, 500, dtype=torch.float64)
    near = torch.tensor([math.sqrt(2) - 1, math.sqrt(0.5), 1.0, 3.0, 2.0**52, 2.0**53], dtype=torch.float64)
    edges = torch.cat([near, torch.nextafter(near, torch.zeros(1).double()), torch.nextafter(near, 2 * near)])
    return torch.cat([10 ** (draw * 34 - 18), draw * 3, whole, edges])


def test_log1p_is_within_one_ulp():
    y = log1p_points()
    result = reference.log1p(y)
    with localcontext() as context:
        context.prec = 60
        for argument, value in zip(y.tolist(), result.tolist(), strict=True):
            truth = (1 + Decimal(argument)).ln()
            assert abs(Decimal(value) - truth) <= Decimal(math.ulp(float(truth))), argument
            assert abs(value - math.log1p(argument)) <= 2 * math.ulp(value)


def float32_steps(y):
    """Return neighbouring float64 arguments above y between which float32(log1p) steps, so log1p's last bit shows."""

    def rounded(bits):
        return reference.log1p(bits.view(torch.float64)).float()

    low, high = y.view(torch.int64), (y * 1.001).view(torch.int64)
    bottom = rounded(low)
    while bool((high - low > 1).any()):
        middle = low + (high - low) // 2
        below = rounded(middle) == bottom
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    return torch.cat([low, high]).view(torch.float64)


def test_every_backend_has_the_same_log1p(backend):
    """With one gene of weight 1, no bias and a size factor of 1, the output is the value itself."""
    y = log1p_points()
    y = torch.cat([y, float32_steps(y[y > 0])])
    y = y[y < 2.0**53]
    rows = torch.arange(len(y) + 1)
    one_gene = torch.zeros(len(y), dtype=torch.int64), y, torch.ones(1, 1), torch.zeros(1)
    result = ops.csr_project(rows, *one_gene, target_sum=1.0, library_size=torch.ones(len(y)))
    assert same_bits(result[:, 0], reference.log1p(y).float().numpy())


def test_refuses(backend):
    indptr, indices, data = torch.tensor([0, 2, 3]), torch.tensor([0, 4, 1]), torch.tensor([1.0, 2.0, 3.0])
    weight, bias = parameters()
    good = {"indptr": indptr, "indices": indices, "data": data, "weight": weight, "bias": bias}
    ops.csr_project(**good)
    for change, message in [
        ({"data": -data}, "3 values that are negative.*first is -1.0 at position 0"),
        ({"data": data / 0}, "not finite"),
        ({"data": torch.tensor([1.0, float("nan"), 3.0])}, "1 values.*nan at position 1"),
        ({"data": torch.tensor([1, -2, 3], dtype=torch.int32)}, "-2 at position 1"),
        ({"data": data.double() * 1e-60}, "no counts"),
        ({"data": data.long()}, "data has dtype int64"),
        ({"data": data[:2]}, "parts of one CSR matrix"),
        ({"indices": indices + GENES}, f"from {GENES} to {GENES + 4}; expected 0 to {GENES - 1}"),
        ({"indices": indices - 1}, "from -1"),
        ({"indptr": torch.tensor([0, 3, 2])}, "non-decreasing"),
        ({"indptr": torch.tensor([0, 4])}, "from 0 to 4 for 3 entries"),
        ({"indptr": indptr.float()}, "indptr has dtype float32"),
        ({"weight": weight.double()}, "weight has dtype float64"),
        ({"bias": bias[:3]}, "do not fit"),
        ({"column_map": torch.tensor([0, 1, GENES])}, "column_map has values from 0 to 50"),
        ({"column_map": torch.tensor([0, 1])}, "indices has values from 0 to 4; expected 0 to 1"),
        ({"library_size": torch.tensor([1.0, 0.0])}, "library_size is 0 in row 1"),
        ({"library_size": torch.tensor([1.0, 0.0]), "data": data.to(torch.uint16)}, "library_size is 0 in row 1"),
        ({"library_size": torch.tensor([1.0, 0.0]), "data": data.to(torch.uint32)}, "library_size is 0 in row 1"),
        ({"library_size": torch.tensor([1.0, -0.0])}, "library_size is 0 in row 1"),
        ({"library_size": torch.zeros(2), "column_map": torch.full((GENES,), -1)}, "library_size is 0 in row 0"),
        ({"library_size": torch.tensor([1.0, -1.0])}, "library_size has 1 values"),
        ({"library_size": torch.ones(3)}, "3 entries for 2 rows"),
        ({"target_sum": 0.0}, "target_sum is 0"),
        ({"target_sum": float("nan")}, "target_sum is nan"),
        ({"target_sum": "1e4"}, "target_sum is a str"),
        ({"target_sum": 10**5000}, "target_sum is beyond 64 bits"),
    ]:
        with pytest.raises(ValueError, match=message):
            ops.csr_project(**{**good, **change})
