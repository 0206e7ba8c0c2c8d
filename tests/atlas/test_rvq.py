import numpy as np
import pyarrow as pa
import pytest

from rvqa.atlas import rvq
from rvqa.errors import InputError


def written(path, cells, *, levels=8, entries=32, parts=1, seed=0):
    codes_NM = np.random.default_rng(seed).integers(0, entries, (cells, levels)).astype(np.uint8)
    cuts = np.array_split(np.arange(cells), parts)
    tables = [pa.table({"cell": [f"cell{i}" for i in cut], "n": pa.array(cut)}) for cut in cuts]
    sizes = {"cells": cells, "levels": levels, "entries": entries}
    rvq.write(path, [codes_NM[cut] for cut in cuts], tables, {"of": "a test", "µ": [1, None]}, **sizes)
    return codes_NM


@pytest.mark.parametrize(("levels", "entries", "size"), [(8, 32, 5), (8, 256, 8), (1, 2, 1), (3, 20, 2), (7, 32, 5)])
def test_packing(levels, entries, size):
    codes_NM = np.random.default_rng(1).integers(0, entries, (1000, levels)).astype(np.uint8)
    packed = rvq.pack(codes_NM, entries)
    assert packed.shape == (1000, size) == (1000, rvq.cell_bytes(levels, entries))
    assert np.array_equal(rvq.unpack(packed, levels, entries), codes_NM)


def test_the_layout_is_that_of_the_documentation(tmp_path):
    """The test reads the file by the module's documentation alone."""
    codes_NM = written(tmp_path / "a.rvq", 70_000)
    stored = (tmp_path / "a.rvq").read_bytes()
    assert stored[:8] == b"\x93RVQ\r\n\x1a\n"
    assert np.frombuffer(stored, "<u8", 1, 16)[0] == 70_000
    for cell in (0, 1, 65_535, 65_536, 69_999):
        bits = int.from_bytes(stored[128 + 5 * cell : 133 + 5 * cell], "little")
        assert [(bits >> (5 * level)) & 31 for level in range(8)] == codes_NM[cell].tolist()
    table, text = np.frombuffer(stored, "<u8", 2, 32).tolist()
    assert len(stored) == 128 + 5 * 70_000 + 4 * 2 + table + text


@pytest.mark.parametrize("cells", [0, 1, 65_535, 65_536, 65_537, 140_000])
def test_read_back(tmp_path, cells):
    codes_NM = written(tmp_path / "a.rvq", cells, parts=3)
    file = rvq.RvqFile.open(tmp_path / "a.rvq")
    file.verify()
    assert np.array_equal(file.codes(slice(None)), codes_NM)
    some = np.random.default_rng(2).integers(0, max(cells, 1), 20) if cells else np.zeros(0, int)
    assert np.array_equal(file.codes(some), codes_NM[some])
    assert file.manifest == {"of": "a test", "µ": [1, None]}
    assert file.table()["n"].to_pylist() == list(range(cells))


def test_parts_do_not_show(tmp_path):
    for parts in (1, 2, 7):
        written(tmp_path / f"{parts}.rvq", 140_000, parts=parts)
    one, two, seven = (rvq.RvqFile.open(tmp_path / f"{n}.rvq") for n in (1, 2, 7))
    assert bytes(one.packed) == bytes(two.packed) == bytes(seven.packed)
    written(tmp_path / "again.rvq", 140_000, parts=7)
    assert (tmp_path / "again.rvq").read_bytes() == (tmp_path / "7.rvq").read_bytes()


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    path = tmp_path_factory.mktemp("rvq") / "a.rvq"
    written(path, 1000)
    return path.read_bytes()


def test_every_changed_byte_is_seen(whole, tmp_path):
    """One bit flips in each byte in turn, at random places of every part."""
    rng = np.random.default_rng(0)
    places = [*range(128), *rng.integers(128, len(whole), 300).tolist(), len(whole) - 1]
    for at in places:
        spoilt = bytearray(whole)
        spoilt[at] ^= 1 << int(rng.integers(8))
        (tmp_path / "b.rvq").write_bytes(spoilt)
        with pytest.raises(InputError):
            rvq.RvqFile.open(tmp_path / "b.rvq").verify()


def test_every_length_but_the_right_one_is_refused(whole, tmp_path):
    for size in [*range(140), 4000, len(whole) - 1, len(whole) + 1]:
        (tmp_path / "b.rvq").write_bytes((whole + b"x")[:size])
        with pytest.raises(InputError, match=r"cut short|not a \.rvq file"):
            rvq.RvqFile.open(tmp_path / "b.rvq")


def test_other_files(tmp_path):
    with pytest.raises(InputError, match="does not exist"):
        rvq.RvqFile.open(tmp_path / "none.rvq")
    (tmp_path / "text.rvq").write_text("codes, of a kind" * 100)
    with pytest.raises(InputError, match=r"not a \.rvq file"):
        rvq.RvqFile.open(tmp_path / "text.rvq")


def test_too_many_levels():
    with pytest.raises(InputError, match=r"take 9 bytes"):
        rvq.cell_bytes(9, 256)


def test_fewer_cells_than_announced(tmp_path):
    with pytest.raises(ValueError, match="3 cells were given, 4 announced"):
        rvq.write(tmp_path / "a.rvq", [np.zeros((3, 8), np.uint8)], [], {}, cells=4, levels=8, entries=32)
