"""Totals of sparse rows and numbers of entries that are not raw counts, against sums of Python numbers."""

import math

import numpy as np
import pytest
import torch

from rvqa.errors import InputError
from rvqa.kernels import ops
from tests.kernels.test_csr_project import COUNT_DTYPES, GENES, counts

MOST = 2**24


def right(indptr, data, indices, known=None):
    data, indices = data.double().tolist(), indices.tolist()
    kept = [value if known is None or known[column] else 0 for value, column in zip(data, indices, strict=True)]
    return [math.fsum(kept[a:b]) for a, b in zip(indptr[:-1].tolist(), indptr[1:].tolist(), strict=True)]


@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("dtype", COUNT_DTYPES)
def test_totals(backend, dtype, index_dtype):
    indptr, indices, data = counts(3000, seed=1)
    data, indices = data.to(dtype), indices.to(index_dtype)
    known = torch.from_numpy(np.random.default_rng(2).random(GENES) < 0.6)
    for chosen in (None, known):
        total, wrong = ops.csr_totals(indptr, indices, data, columns=GENES, known=chosen)
        assert (total.dtype, wrong) == (torch.float64, 0)
        assert total.tolist() == right(indptr, data, indices, chosen)


def test_a_slice_of_the_pointers_reads_only_its_rows(backend):
    indptr, indices, data = counts(50)
    data[: indptr[10]] = -1.0
    data[indptr[40] :] = 0.5
    total, wrong = ops.csr_totals(indptr[10:41], indices, data, columns=GENES)
    assert wrong == 0
    assert total.tolist() == right(indptr[10:41], data, indices)


@pytest.mark.parametrize("at", [0, 5, 41, 99])
@pytest.mark.parametrize(
    ("value", "dtype", "is_count"),
    [
        (0.5, torch.float32, False),
        (1.5, torch.float64, False),
        (1 + 2**-23, torch.float32, False),
        (2.0**22 + 0.5, torch.float32, False),
        (2.0**-149, torch.float32, False),
        (1e-300, torch.float64, False),
        (MOST - 2.0**-28, torch.float64, False),
        (-1, torch.float32, False),
        (-1, torch.float64, False),
        (-1, torch.int32, False),
        (math.nan, torch.float32, False),
        (math.inf, torch.float32, False),
        (-math.inf, torch.float64, False),
        (MOST + 2, torch.float32, False),
        (MOST + 1, torch.float64, False),
        (MOST + 1, torch.int32, False),
        (MOST + 1, torch.uint32, False),
        (2**32 - 1, torch.uint32, False),
        (-0.0, torch.float32, True),
        (MOST, torch.float32, True),
        (MOST - 1, torch.float32, True),
        (2**23 + 1, torch.float32, True),
        (MOST, torch.float64, True),
        (MOST, torch.int32, True),
        (MOST, torch.uint32, True),
        (65_535, torch.uint16, True),
        (255, torch.uint8, True),
    ],
)
def test_what_is_a_raw_count(backend, value, dtype, is_count, at):
    """One of 100 entries is wrong, at every position, because loops over eights have tails."""
    data = torch.ones(100, dtype=dtype)
    data[at] = value
    indptr, indices = torch.tensor([0, 42, 100]), torch.arange(100, dtype=torch.int32)
    total, wrong = ops.csr_totals(indptr, indices, data, columns=100)
    assert wrong == (0 if is_count else 1)
    if is_count:
        assert total.sum().item() == 99 + value


@pytest.mark.parametrize("column", [-1, 7, 2**31 - 1, -(2**31)])
def test_columns_outside_the_matrix(backend, column):
    indices = torch.tensor([0, column, 6], dtype=torch.int32)
    for known in (None, torch.ones(7, dtype=torch.bool)):
        assert ops.csr_totals(torch.tensor([0, 3]), indices, torch.ones(3), columns=7, known=known)[1] == 1


@pytest.mark.parametrize("indptr", [[0, 2, 1], [0, 4], [-1, 3], [2, 1, 3]])
def test_pointers_that_leave_the_entries(backend, indptr):
    with pytest.raises(InputError, match="indptr"):
        ops.csr_totals(torch.tensor(indptr), torch.zeros(3, dtype=torch.int32), torch.ones(3), columns=1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"data": torch.ones(3, dtype=torch.int64)}, "dtype int64"),
        ({"data": torch.ones(4)}, "not the parts"),
        ({"indptr": torch.ones(1, 2, dtype=torch.int64)}, "not the parts"),
        ({"columns": -1}, "columns is -1"),
        ({"columns": 7.0}, "columns is a float"),
        ({"columns": 2**70}, "columns is beyond 64 bits"),
        ({"data": torch.ones(3).to_sparse()}, "layout torch.sparse_coo"),
        ({"known": torch.ones(7)}, "known has dtype float32"),
        ({"known": torch.ones(6, dtype=torch.bool)}, "for 7 columns"),
    ],
)
def test_wrong_arguments(change, message):
    given = {"indptr": torch.tensor([0, 3]), "indices": torch.zeros(3, dtype=torch.int32), "data": torch.ones(3)}
    given |= {"columns": 7, "known": None} | change
    with pytest.raises(InputError, match=message):
        ops.csr_totals(**given)


def test_a_matrix_without_columns(backend):
    entries = torch.zeros(2, dtype=torch.int32), torch.ones(2)
    for known in (None, torch.zeros(0, dtype=torch.bool)):
        assert ops.csr_totals(torch.tensor([0, 2]), *entries, columns=0, known=known)[1] == 2


def test_no_rows_and_empty_rows(backend):
    none = torch.zeros(0, dtype=torch.int32), torch.zeros(0)
    assert ops.csr_totals(torch.tensor([0]), *none, columns=5)[0].tolist() == []
    assert ops.csr_totals(torch.tensor([0, 0, 0]), *none, columns=5)[0].tolist() == [0.0, 0.0]
