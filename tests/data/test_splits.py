"""Splits: every cell has one role, no cell of a held-out donor is fitted, and overlapping files do not leak."""

import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

from rvqa.data import splits
from rvqa.data.cells import Cells, unknown
from rvqa.data.studies import label_table, read_study, shared_axis, study_files
from rvqa.errors import InputError


def study(name, donors, cells=None):
    N = len(donors)
    columns = unknown(N) | {
        "donor_N": np.array(donors, dtype=object),
        "cell_N": np.array(cells or [f"{name}-{i}" for i in range(N)], dtype=object),
    }
    counts = sp.csr_matrix(np.ones((N, 60), dtype=np.float32))
    var = pd.DataFrame(index=[f"GENE{i}" for i in range(60)])
    return Cells(counts, var, np.full(N, 60.0), given=False, **columns, name=name)


def test_roles():
    first, second = study("first", ["a", "b", "c", ""]), study("second", ["", ""])
    split = splits.make_split([first, second], held_out=["b"], validation=["c"])
    assert split["role"].tolist() == ["fit", "held out", "validation", "", "fit", "fit"]
    assert splits.rows_of(split, first, splits.FIT).tolist() == [True, False, False, False]
    assert splits.unseen_rows(split, first).tolist() == [False, True, False, False]
    assert not splits.unseen_rows(split, second).any()


def test_the_same_donor_in_another_file_is_seen():
    """Cells of a fitted donor are left out of every other file, and so are that file's cells of unknown donors."""
    split = splits.make_split([study("first", ["a", "b", "c"])], held_out=["b"], validation=["c"])
    other = study("other", ["a", "b", "c", "d", ""])
    assert splits.unseen_rows(split, other).tolist() == [False, True, False, True, False]
    assert splits.related(split, other)
    stranger = study("stranger", ["d", "", ""])
    assert splits.unseen_rows(split, stranger).all()
    assert not splits.related(split, stranger)


def test_a_split_is_kept_as_a_file(tmp_path):
    split = splits.make_split([study("first", ["a", "b", ""])], held_out=["b"])
    splits.write_split(split, tmp_path / "split.parquet")
    pd.testing.assert_frame_equal(splits.read_split(tmp_path / "split.parquet"), split.astype(str))
    (tmp_path / "other.parquet").write_text("no table")
    with pytest.raises(InputError, match="cannot be read"):
        splits.read_split(tmp_path / "other.parquet")
    split.drop(columns="role").to_parquet(tmp_path / "short.parquet")
    with pytest.raises(InputError, match="no column 'role'"):
        splits.read_split(tmp_path / "short.parquet")


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"held_out": ["z"]}, "'z'"),
        ({"held_out": ["a"], "validation": ["a"]}, "both"),
        ({"held_out": ["a", "b"]}, "nothing is left"),
    ],
)
def test_splits_that_make_no_sense(options, says):
    with pytest.raises(InputError, match=says):
        splits.make_split([study("first", ["a", "b"])], **options)


def test_studies_of_the_data_folder(data_dir, ref_dir):
    """Checks coarse labels and total counts of cut files; labels that a model made are not used for tests."""
    table = label_table(ref_dir)
    kang = read_study(data_dir / "kang2018_ifnb_pbmc_2k.h5ad", table=table)
    assert {"CD4 T", "B"} < set(kang.label_N)
    treated = kang.condition_N == "stim"
    assert (kang.truth_N[treated] == "").mean() > 0.9
    assert (kang.label_N[treated] != "").all()
    known = kang.truth_N != ""
    assert (kang.truth_N[known] == kang.label_N[known]).all()
    cut = read_study(data_dir / "pbmc68k_reduced_700.h5ad", table=table)
    assert (cut.library_size > np.asarray(cut.counts.sum(1)).ravel()).all()
    panel = shared_axis([kang, cut])
    assert 50 < len(panel) < 765
    assert kang.cut(np.arange(10)).counts.shape == (2000, 10)


def test_files_of_folders(tmp_path):
    with pytest.raises(InputError, match=r"no \.h5ad"):
        study_files([tmp_path])
    for name in ("b.h5ad", "a.h5ad", "notes.txt"):
        (tmp_path / name).touch()
    assert [file.name for file in study_files([tmp_path])] == ["a.h5ad", "b.h5ad"]
    with pytest.raises(InputError, match="Two files"):
        study_files([tmp_path, tmp_path / "a.h5ad"])
