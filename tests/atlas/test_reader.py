import numpy as np
import pandas as pd
import pytest

import rvqa
from rvqa.atlas import reader
from rvqa.atlas.encoder import Settings
from rvqa.atlas.run import encode_files
from rvqa.errors import InputError
from rvqa.language.vocabulary import CellVocabulary


@pytest.fixture(scope="module", params=[".rvq", ".zarr", ".parquet"])
def opened(request, cells, pbmc_tokenizer, tmp_path_factory):
    out = tmp_path_factory.mktemp("codes") / f"a{request.param}"
    encode_files(cells, pbmc_tokenizer, out, settings=Settings(cells=700, obs=("number",)))
    return rvqa.open_codes(out, verify=True)


def test_slices(opened, right):
    assert len(opened) == 2_000
    assert repr(opened).startswith("Codes of 2,000 cells in ")
    mask = np.arange(2_000) % 7 == 0
    for rows in (
        slice(None), slice(690, 710), slice(-5, None), slice(10, 5), slice(0, 2_000, 500), slice(None, None, -1),
        0, -1, 1_999, np.int64(5), [3, 1, 1_999, 3], np.array([-1, 0]), [], mask,
    ):  # fmt: skip
        assert np.array_equal(opened[rows], right[rows]), rows
    for rows, error in ((2_000, IndexError), ([5, -2_001], IndexError), ([0.5], InputError), (mask[:5], InputError)):
        with pytest.raises(error):
            opened[rows]


def test_token_ids_are_those_of_the_vocabulary(opened, right, monkeypatch):
    monkeypatch.setattr(reader, "BLOCK", 300)
    vocabulary = CellVocabulary(1_000)
    rows, ids = map(np.concatenate, zip(*opened.token_ids(vocabulary, batch_size=128), strict=True))
    assert rows.tolist() == list(range(2_000))
    assert np.array_equal(ids, vocabulary.ids(right))


def test_shuffled_shards_have_all_cells_once(opened, right, monkeypatch):
    monkeypatch.setattr(reader, "BLOCK", 300)
    vocabulary = CellVocabulary(1_000)
    seen = []
    for rank in range(3):
        batches = list(opened.token_ids(vocabulary, batch_size=64, shuffle=True, seed=1, rank=rank, world=3))
        assert all(np.array_equal(ids, vocabulary.ids(right[rows])) for rows, ids in batches)
        seen += [rows for rows, _ in batches]
    order = np.concatenate(seen)
    assert sorted(order.tolist()) == list(range(2_000))
    assert order.tolist() != sorted(order.tolist())
    one, other = (
        np.concatenate([rows for rows, _ in opened.token_ids(vocabulary, shuffle=True, seed=seed)]) for seed in (1, 2)
    )
    assert one.tolist() != other.tolist()
    assert np.abs(np.diff(one[:300])).max() < 300, "a block is read at a time"


def test_token_ids_refuse(opened):
    with pytest.raises(InputError, match="levels of 32"):
        next(opened.token_ids(CellVocabulary(0, levels=4)))
    with pytest.raises(InputError, match="rank 3 of 3"):
        next(opened.token_ids(CellVocabulary(0), rank=3, world=3))


@pytest.mark.parametrize("levels", [1, 2, 3])
def test_prefix_counts(opened, right, levels):
    counts = opened.count_prefixes(levels)
    table = pd.DataFrame(right[:, :levels]).value_counts()
    assert counts.shape == (32,) * levels
    assert counts.sum() == 2_000
    assert all(counts[prefix] == n for prefix, n in table.items())
    with pytest.raises(InputError, match="expected 1 to 4"):
        opened.count_prefixes(5)


@pytest.mark.parametrize("levels", [None, 2, 3])
def test_near_duplicates(opened, right, levels):
    expected = pd.DataFrame(right[:, :levels]).groupby(list(range(levels or 8))).groups.values()
    expected = [sorted(group) for group in expected if len(group) > 1]
    assert [group.tolist() for group in opened.near_duplicates(levels)] == expected


def test_what_is_no_codes(cells, tmp_path):
    import zarr

    zarr.open_group(tmp_path / "other.zarr", mode="w")
    pd.DataFrame({"a": [1]}).to_parquet(tmp_path / "other.parquet")
    (tmp_path / "text.parquet").write_text("codes")
    (tmp_path / "empty.zarr").mkdir()
    for name, message in (
        ("a.h5ad", r"not named \.rvq"),
        ("none.rvq", "does not exist"),
        ("none.zarr", "no zarr.json"),
        ("none.parquet", "does not exist"),
        ("other.zarr", "not of codes"),
        ("empty.zarr", "no zarr.json"),
        ("other.parquet", "not of codes"),
        ("text.parquet", "cannot be read as codes"),
    ):
        with pytest.raises(InputError, match=message):
            rvqa.open_codes(tmp_path / name)
