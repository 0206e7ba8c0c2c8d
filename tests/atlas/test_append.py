"""Cells added to a finished output give the same bytes as one run over all files."""

import numpy as np
import pytest

import rvqa
from rvqa.atlas import run
from rvqa.atlas.encoder import Settings
from rvqa.atlas.run import encode_files
from rvqa.errors import InputError
from tests.atlas.test_run import Stop, bytes_of

SETTINGS = Settings(cells=300, obs=("cell_type", "number"))


@pytest.fixture
def halves(cells, tmp_path):
    """Two files of real cells."""
    paths = [tmp_path / "first.h5ad", tmp_path / "second.h5ad"]
    for path, rows in zip(paths, (slice(0, 1100), slice(1100, 2000)), strict=True):
        cells[rows].write_h5ad(path)
    return paths


@pytest.mark.parametrize("suffix", [".rvq", ".zarr", ".parquet"])
def test_added_cells_are_those_of_one_run(halves, right, pbmc_tokenizer, tmp_path, suffix):
    whole, grown = tmp_path / f"whole{suffix}", tmp_path / f"grown{suffix}"
    encode_files(halves, pbmc_tokenizer, whole, settings=SETTINGS)
    for path in halves:  # the first run makes the output
        encode_files(path, pbmc_tokenizer, grown, settings=SETTINGS, append=True)
    assert np.array_equal(rvqa.open_codes(grown)[:], right)
    assert rvqa.open_codes(grown).obs.equals(rvqa.open_codes(whole).obs)
    assert bytes_of(grown) == bytes_of(whole)


def test_a_stopped_addition_leaves_the_output_and_goes_on(halves, right, pbmc_tokenizer, tmp_path, monkeypatch):
    out = tmp_path / "a.rvq"
    encode_files(halves[0], pbmc_tokenizer, out, settings=SETTINGS)
    before, keep = out.read_bytes(), run.Work.keep

    def fails(work, task, *given, **named):
        if task.number == 2:
            raise Stop
        keep(work, task, *given, **named)

    monkeypatch.setattr(run.Work, "keep", fails)
    with pytest.raises(Stop):
        encode_files(halves[1], pbmc_tokenizer, out, settings=SETTINGS, append=True)
    monkeypatch.undo()
    assert out.read_bytes() == before
    facts = encode_files(halves[1], pbmc_tokenizer, out, settings=SETTINGS, append=True)
    assert facts["resumed"] == 600
    assert np.array_equal(rvqa.open_codes(out)[:], right)


def test_what_does_not_belong_is_refused(halves, pbmc_tokenizer, tmp_path):
    out = tmp_path / "a.rvq"
    encode_files(halves[0], pbmc_tokenizer, out, settings=SETTINGS)
    before = out.read_bytes()
    with pytest.raises(InputError, match=r"cells of first\.h5ad are already in"):
        encode_files(halves, pbmc_tokenizer, out, settings=SETTINGS, append=True)
    with pytest.raises(InputError, match="made with another settings"):
        encode_files(halves[1], pbmc_tokenizer, out, settings=Settings(cells=300), append=True)
    with pytest.raises(InputError, match="append"):
        encode_files(halves[1], pbmc_tokenizer, out, settings=SETTINGS, append=True, force=True)
    with pytest.raises(InputError, match="exists"):
        encode_files(halves[1], pbmc_tokenizer, out, settings=SETTINGS)
    assert out.read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.rvq", "first.h5ad", "second.h5ad"]
