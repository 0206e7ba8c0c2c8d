"""Known types against a model's labels: common names from a file or a table, and a report of what was compared."""

import json

import numpy as np
import pytest

import rvqa
from rvqa.errors import InputError
from rvqa.evaluation.label_names import compare_labels, read_label_map
from rvqa.report import annotation_report, figures

SORTED = {"CD19+ B": "B cell", "CD14+ Monocyte": "Mono", "CD56+ NK": "NK cell"}


def texts(*names):
    return np.array(names, dtype=object)


@pytest.fixture
def without_table(monkeypatch, tmp_path):
    monkeypatch.setenv("RVQA_REF_DIR", str(tmp_path))


@pytest.fixture(scope="module")
def annotated(shipped, model):
    """Real cells with known types, named as in other studies."""
    patch = pytest.MonkeyPatch()
    patch.setattr(figures, "_FEWEST_UMAP", 10**9)
    adata = next(iter(shipped.tests.values())).copy()
    rvqa.annotate(adata, model, library_size_key="depth", progress=False)
    labels = adata.obs["label"].astype(str)
    adata.obs["invented"] = [f"group {name}" for name in labels]
    adata.obs["sorted"] = [SORTED.get(name, "") for name in labels]
    coarse = {"CD4+/CD25 T Reg": "CD4 T cells", "CD4+/CD45RO+ Memory": "CD4 T cells", "CD19+ B": "B cells"}
    adata.obs["other words"] = [coarse.get(name, name) for name in labels]
    yield adata
    patch.undo()


def words(adata, path, **options):
    annotation_report(adata, path, **options)
    return path.read_text(encoding="utf-8").replace("&#x27;", "'")


def test_names_that_agree_are_compared_as_they_are(annotated, ref_dir):
    """The reference table would join six labels into two here, so it is not used."""
    truth_N = annotated.obs["label"].to_numpy(dtype=object)
    predicted_N = annotated.obs["rvqa_cell_type"].to_numpy(dtype=object)
    found = compare_labels(truth_N, predicted_N, list(annotated.uns["rvqa"]["labels"]))
    np.testing.assert_array_equal(found.truth_N, truth_N)
    np.testing.assert_array_equal(found.predicted_N, predicted_N)
    assert found.sentence == "Names are compared as they are."
    assert found.sensible
    assert not found.changed


def test_the_reference_table_joins_labels_and_says_so(annotated, ref_dir, monkeypatch, tmp_path):
    monkeypatch.setenv("RVQA_REF_DIR", str(ref_dir))
    labels = list(annotated.uns["rvqa"]["labels"])
    truth_N = annotated.obs["other words"].to_numpy(dtype=object)
    predicted_N = annotated.obs["rvqa_cell_type"].to_numpy(dtype=object)
    found = compare_labels(truth_N, predicted_N, labels)
    assert "through label_to_cl.json" in found.sentence
    assert "joins labels of the model" in found.sentence
    assert "'CD4+/CD25 T Reg'" in found.sentence
    assert found.labels.count("CD4 T") == 1
    assert len(found.labels) < len(labels)
    assert found.can_N.all()
    accuracy = np.mean(found.truth_N == found.predicted_N)
    assert accuracy > np.mean(truth_N == predicted_N)
    html = words(annotated, tmp_path / "r.html", truth="other words")
    assert f"Accuracy {accuracy:.3f}" in html
    assert found.sentence in html


def test_no_accuracy_where_most_types_have_no_counterpart(annotated, without_table, tmp_path):
    html = words(annotated, tmp_path / "r.html", truth="invented")
    n_types = annotated.obs["invented"].nunique()
    assert f"{n_types} of {n_types} known types have no counterpart among the model's labels" in html
    assert "--label-map" in html
    assert "Accuracy 0" not in html
    assert "macro-F1" not in html
    assert "precision" not in html
    assert "group CD19+ B †" in html  # the page has the cross table


def test_a_file_of_names(annotated, without_table, tmp_path):
    names = tmp_path / "names.tsv"
    names.write_text("".join(f"{new}\t{old}\n" for old, new in SORTED.items()))
    labels = list(annotated.uns["rvqa"]["labels"])
    truth_N = annotated.obs["sorted"].to_numpy(dtype=object)
    predicted_N = annotated.obs["rvqa_cell_type"].to_numpy(dtype=object)
    assert not compare_labels(truth_N, predicted_N, labels).sensible
    found = compare_labels(truth_N, predicted_N, labels, label_map=names)
    assert found.sentence == "Names are compared through names.tsv."
    assert set(found.truth_N) == {"", *SORTED}
    known = truth_N != ""
    right = annotated.obs["label"].to_numpy(dtype=object) == predicted_N
    expected = f"Accuracy {right[known].mean():.3f}"
    assert expected in words(annotated, tmp_path / "r.html", truth="sorted", label_map=names)
    with pytest.raises(InputError, match=r"names\.csv cannot be read"):
        annotation_report(annotated, tmp_path / "s.html", truth="sorted", label_map=tmp_path / "names.csv")
    assert not (tmp_path / "s.html").exists()


def test_some_types_without_counterpart(without_table):
    """Types without a counterpart count as wrong, and the sentence names them."""
    truth_N = texts("B", "NK", "T", "mast", "")
    found = compare_labels(truth_N, texts("B", "NK", "T", "B", "B"), ["B", "NK", "T"])
    assert found.sensible
    assert found.can_N.tolist() == [True, True, True, False, False]
    assert "1 of 4 known types has no counterpart among the model's labels ('mast')" in found.sentence
    most = compare_labels(texts("B", *["mast"] * 3), texts(*"BBBB"), ["B", "NK"])
    assert not most.sensible  # one of two types, but with most of the cells


def test_names_of_names_and_joined_types(without_table):
    names = {"naive B": "B", "memory B": "B", "B cell": "B"}
    found = compare_labels(texts("naive B", "memory B"), texts("B cell", "B"), ["B cell", "B", "T"], label_map=names)
    assert found.truth_N.tolist() == found.predicted_N.tolist() == ["B", "B"]
    assert found.labels == ["B", "T"]
    assert "joins labels of the model: 'B cell', 'B' as 'B'" in found.sentence
    assert "joins known types: 'memory B', 'naive B' as 'B'" in found.sentence


@pytest.mark.parametrize("form", ["json", "csv", "tsv"])
def test_label_maps(tmp_path, form):
    expected = {"CD4, naive": "CD4 T", "CD4 T": "T", "B cell": "B"}
    path = tmp_path / f"map.{form}"
    if form == "json":
        path.write_text(json.dumps(expected))
    elif form == "csv":
        path.write_text('\ufeff"CD4, naive",CD4 T\nCD4 T,T\n\n B cell , B\n', encoding="utf-8")
    else:
        path.write_text("".join(f"{label}\t{name}\n" for label, name in expected.items()))
    assert read_label_map(path) == expected | {"CD4, naive": "T"}


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("map.txt", b"a,b", "not named"),
        ("map.json", b"[1]", "object of texts"),
        ("map.json", b'{"a": 1}', "object of texts"),
        ("map.json", b'{"a": {"coarse": "b"}}', "object of texts"),
        ("map.json", b'{"a"', "cannot be read"),
        ("map.json", b"[" * 100_000, "cannot be read"),
        ("map.json", b"{}", "names no label"),
        ("map.json", b'{"a": "b", "a": "c"}', "two names"),
        ("map.csv", b"a;b\n", "line 1, has 1 columns"),
        ("map.csv", b"a,b\nc,d,e\n", "line 2, has 3 columns"),
        ("map.csv", b"a,\n", "empty label or name"),
        ("map.csv", b'"a,b\n', "cannot be read"),
        ("map.tsv", b"\xff\xfe\x00", "cannot be read"),
        ("map.tsv", b"a\tb\nb\ta\n", "circle"),
    ],
)
def test_label_maps_that_cannot_be_read(tmp_path, name, content, says):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(InputError, match=says) as error:
        read_label_map(path)
    assert str(path) in str(error.value)
    with pytest.raises(InputError, match="cannot be read"):
        read_label_map(tmp_path / "none.csv")
