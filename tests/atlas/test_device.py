"""Packing rows for a device changes no value of any type; these tests need no GPU."""

import numpy as np
import pytest
import torch

from rvqa.atlas import device
from rvqa.atlas.device import Lanes, countable, narrow, widened
from rvqa.atlas.encoder import Settings
from rvqa.atlas.run import encode_files
from rvqa.data.files.matrices import Rows
from rvqa.errors import InputError


@pytest.mark.parametrize("dtype", [np.int32, np.int64, np.float32, np.float64, np.uint32])
@pytest.mark.parametrize("highest", [65_535, 65_536])
def test_numbers_travel_in_16_bits_where_they_fit(dtype, highest):
    values = np.array([0, 1, 32_767, 32_768, highest], dtype=dtype)
    packed = narrow(values)
    assert (packed.dtype == np.int16) == (highest == 65_535)
    assert np.array_equal(widened(torch.from_numpy(packed)).numpy(), values)


@pytest.mark.parametrize("odd", [-1.0, 0.5, np.nan, np.inf, 2.0**24 + 2])
def test_what_is_no_count_arrives_as_it_is(odd):
    values = np.array([3.0, odd], dtype=np.float32)
    assert narrow(values) is values


def test_small_and_odd_types_are_made_readable():
    rows = Rows(np.array([0, 2]), np.array([1, 3], dtype=np.uint16), np.array([4, 5], dtype=np.int8))
    _, indices, data = countable(rows)
    assert (indices.dtype, data.dtype) == (np.int64, np.float32)
    assert (indices.tolist(), data.tolist()) == ([1, 3], [4.0, 5.0])


def test_codes_of_packed_rows_are_those_of_rows_as_they_are(cells, right, pbmc_tokenizer, tmp_path, monkeypatch):
    """The rows that would go to a GPU are encoded here."""
    cells.write_h5ad(tmp_path / "cells.h5ad")
    monkeypatch.setattr(
        Lanes,
        "bring",
        lambda self, rows: (
            torch.from_numpy(rows.indptr),
            *(widened(torch.from_numpy(device.narrow(each))) for each in (rows.indices, rows.data)),
        ),
    )
    encode_files(tmp_path / "cells.h5ad", pbmc_tokenizer, tmp_path / "a.rvq", settings=Settings())
    import rvqa

    assert np.array_equal(rvqa.open_codes(tmp_path / "a.rvq")[:], right)


def test_a_device_that_is_not_there(cells, pbmc_tokenizer, tmp_path):
    cells[:50].write_h5ad(tmp_path / "cells.h5ad")
    with pytest.raises(InputError, match="Device 'nowhere' cannot be used"):
        encode_files(tmp_path / "cells.h5ad", pbmc_tokenizer, tmp_path / "a.rvq", settings=Settings(), device="nowhere")
    assert not (tmp_path / "a.rvq.parts").exists()
