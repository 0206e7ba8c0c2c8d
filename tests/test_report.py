"""Reports: their content, untrusted names that stay text, and rendering in a real browser, narrow and wide."""

import base64
import json
import os
import re
import shutil
import subprocess
from html.parser import HTMLParser
from itertools import combinations

import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import confusion_matrix, precision_recall_fscore_support

import rvqa
from rvqa.cli import app
from rvqa.data.columns import as_text
from rvqa.demo import SIMULATED
from rvqa.errors import InputError
from rvqa.evaluation.metrics import classification, confusion, per_class
from rvqa.report import annotation_report, colours, figures, perturbation_report
from rvqa.report.annotation import add_annotation
from rvqa.report.page import Report, el, is_report, text

HOSTILE = "</script><script>document.documentElement.dataset.owned=1</script>\u2028<img src=x onerror=alert(1)>&\"'"
COLUMNS = {"cell_type_key": "label", "control_key": "condition", "control_value": "control"}
READING = {"library_size_key": "depth"}


class Page(HTMLParser):
    """Text, tags, attributes and tables of a report."""

    def __init__(self, html):
        super().__init__()
        self.tags, self.attributes, self.words, self.rows, self.data, self.open = [], [], [], [], "", False
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes.append((tag, dict(attrs)))
        if tag == "tr":
            self.rows.append([])
        elif tag in {"th", "td"}:
            self.rows[-1].append("")
            self.open = True

    def handle_endtag(self, tag):
        self.open = tag not in {"th", "td", "caption"} and self.open

    def handle_data(self, data):
        if data.startswith('{"themes"'):
            self.data = json.loads(data)
        elif not data.startswith((":root", '"use strict"')):
            self.words.append(data)
            if self.open:
                self.rows[-1][-1] += data

    def row(self, name):
        return next(row for row in self.rows if row and row[0] == name)


@pytest.fixture(scope="module", autouse=True)
def principal_components():
    """Return positions without UMAP, which compiles for half a minute."""
    patch = pytest.MonkeyPatch()
    patch.setattr(figures, "_FEWEST_UMAP", 10**9)
    yield
    patch.undo()


@pytest.fixture(scope="module")
def annotated(shipped, model):
    adata = next(iter(shipped.tests.values())).copy()
    rvqa.annotate(adata, model, library_size_key="depth", progress=False)
    truth = adata.obs["label"].astype(str).to_numpy(dtype=object)
    truth[:3], truth[3:8] = "", HOSTILE
    adata.obs[f"known {HOSTILE}"] = truth
    return adata


@pytest.fixture(scope="module")
def perturbed_cells(shipped, model):
    cells = shipped.contexts.copy()
    cells = cells[cells.obs["label"].isin(["CD14+ Monocyte", "CD56+ NK", "Dendritic"])].copy()
    predicted = rvqa.perturb(cells, model, perturbation=SIMULATED, n_samples=2, progress=False, **COLUMNS, **READING)
    return cells, predicted


@pytest.fixture(scope="module")
def reports(annotated, perturbed_cells, model, shipped, tmp_path_factory):
    """Paths of the three kinds of reports, hostile names in each."""
    folder = tmp_path_factory.mktemp("reports")
    paths = {kind: folder / f"{kind}.html" for kind in ("annotate", "perturb", "demo")}
    annotation_report(
        annotated, paths["annotate"], title=HOSTILE, truth=f"known {HOSTILE}", command=f"rvqa annotate '{HOSTILE}'"
    )
    cells, predicted = perturbed_cells
    perturbation_report(cells, predicted, model, paths["perturb"], title=HOSTILE, **COLUMNS, **READING)
    demo_like(shipped, model, paths["demo"])
    return paths


def demo_like(shipped, model, path):
    """The demo's own sections, on the briefly fitted model."""
    from io import StringIO

    from rvqa.demo import new_report, show_annotation, show_perturbation

    report = new_report(model, shipped, path.parent / "model")
    show_annotation(model, shipped, StringIO(), report, progress=False)
    show_perturbation(model, shipped, StringIO(), report, seed=0, progress=False)
    report.write(path)


# ---- what it says --------------------------------------------------------------------------------------------------


def test_metrics_are_those_of_scikit_learn():
    rng = np.random.default_rng(0)
    classes = ["a", "b", "c", "d"]
    true, predicted = (rng.choice(classes[:n], 200).astype(object) for n in (4, 3))
    precision, recall, f1, _ = precision_recall_fscore_support(true, predicted, labels=classes, zero_division=0)
    for name, expected in {"precision": precision, "recall": recall, "f1": f1}.items():
        np.testing.assert_allclose(per_class(true, predicted, classes)[name], expected)
    expected = confusion_matrix(true, predicted, labels=classes)
    np.testing.assert_array_equal(confusion(true, predicted, classes, classes), expected)
    assert classification(true, predicted)["macro_f1"] == pytest.approx(f1.mean())


def test_annotation_report_shows_the_annotation(annotated, reports):
    html = reports["annotate"].read_text(encoding="utf-8")
    page = Page(html)
    truth = annotated.obs[f"known {HOSTILE}"].to_numpy(dtype=object)
    predicted = annotated.obs["rvqa_cell_type"].astype(str).to_numpy(dtype=object)
    known = truth != ""
    scores = classification(truth[known], predicted[known])
    words = "".join(page.words)
    assert f"Accuracy {scores['accuracy']:.3f}, macro-F1 {scores['macro_f1']:.3f} over {known.sum():,} cells." in words
    assert "5 cells have a label the model cannot give" in words
    assert rvqa.__version__ in words
    measured = annotated.uns["rvqa"]["coverage"]["n_measured"]
    assert f"{measured:,} of {annotated.uns['rvqa']['coverage']['n_axis']:,}" in words
    for name, n in annotated.obs["rvqa_cell_type"].value_counts().items():
        if n:
            assert page.row(name)[1] == f"{n:,}"
    hostile = page.row(f"{as_text(HOSTILE)} †")  # the line separator has become a blank
    assert sum(int(cell) for cell in hostile[1:-1] if cell != "·") == int(hostile[-1]) == 5
    codes = page.data["figures"][0]["panels"][1]["index"]
    drawn = np.frombuffer(base64.b64decode(codes), dtype="<u2")
    np.testing.assert_array_equal(np.sort(drawn), np.sort(annotated.obsm["rvqa_codes"][:, 0]))
    assert page.tags.count("rect") >= 8 * 32
    for tag, attributes in page.attributes:
        if tag == "canvas" or attributes.get("role") in {"img", "region"}:
            assert attributes["aria-label"]


def test_perturbation_report_compares_where_cells_were_measured(perturbed_cells, model, reports, tmp_path):
    cells, predicted = perturbed_cells
    page = Page(reports["perturb"].read_text(encoding="utf-8"))
    measured = cells[cells.obs["condition"] == SIMULATED]
    for name, n in measured.obs["label"].value_counts().items():
        row = page.row(name)
        assert row[3] == str(n)
        assert float(row[-1]) == pytest.approx(float(row[-1]))
    alone = cells[cells.obs["condition"] == "control"].copy()
    perturbation_report(alone, predicted, model, tmp_path / "alone.html", **COLUMNS, **READING)
    words = "".join(Page((tmp_path / "alone.html").read_text(encoding="utf-8")).words)
    assert "No measured cells were compared" in words
    assert "The 30 genes predicted to rise most" in words


def test_the_demos_report_has_every_section(reports, shipped):
    words = "".join(Page(reports["demo"].read_text(encoding="utf-8")).words)
    for expected in (
        *(f"Annotation: {name}" for name in shipped.tests),
        "logistic regression on expression",
        "Predicted against known types",
        "Codebook use",
        "nearest context",
        "tokenizer ceiling",
        "Predicted against true shift",
        SIMULATED,
    ):
        assert expected in words


def test_positions_come_from_the_file_else_from_the_codes(annotated):
    own = np.random.default_rng(0).normal(size=(annotated.n_obs, 2))
    latent = annotated.obsm["X_rvqa"]
    found, how = figures.coordinates(latent, own)
    np.testing.assert_array_equal(found, own)
    assert "X_umap" in how
    own[0, 0] = np.nan
    for ready in (own, own[:, :1], own.astype(object), None):
        found, how = figures.coordinates(latent, ready)
        assert "principal components" in how
        assert found.shape == (annotated.n_obs, 2)
    for few in (1, 2):
        assert np.isfinite(figures.coordinates(latent[:few])[0]).all()


def test_many_cells_and_types_make_a_small_file(tmp_path):
    """Of 30,000 cells 20,000 are drawn, and 80 types with long names fit."""
    rng = np.random.default_rng(0)
    names = [f"type {i} with a rather long descriptive name" for i in range(80)]
    import anndata

    n = 30_000
    adata = anndata.AnnData(np.zeros((n, 1), dtype=np.float32))
    types = pd.Categorical.from_codes(rng.integers(0, 80, n), names)
    adata.obs["rvqa_cell_type"], adata.obs["rvqa_confidence"] = types, rng.random(n).astype(np.float32)
    adata.obsm["rvqa_codes"] = rng.integers(0, 32, (n, 8)).astype(np.uint8)
    adata.obsm["X_rvqa"] = adata.obsm["X_umap"] = rng.normal(size=(n, 2)).astype(np.float32)
    adata.uns["rvqa"] = {"labels": np.array(names)}
    adata.obs["truth"] = types
    path = tmp_path / "many.html"
    annotation_report(adata, path, truth="truth")
    assert path.stat().st_size < 3_000_000
    words = "".join(Page(path.read_text(encoding="utf-8")).words)
    assert "20,000 of 30,000 cells" in words
    assert "Accuracy 1.000" in words


def test_no_cells_and_no_annotation(annotated, tmp_path):
    report = Report("empty", lead="", facts={})
    add_annotation(report, annotated[:0].copy(), heading="none")
    assert "There are no cells." in report.html()
    with pytest.raises(InputError, match="annotate"):
        annotation_report(annotated, tmp_path / "a.html", key_added="other")
    with pytest.raises(InputError, match="'labl'"):
        annotation_report(annotated, tmp_path / "a.html", truth="labl")
    assert not list(tmp_path.iterdir())


def test_written_whole_and_not_over_another_file(tmp_path):
    report = Report("title", lead="lead", facts={})
    with pytest.raises(InputError, match="html"):
        report.write(tmp_path / "report.txt")
    path = tmp_path / "report.html"
    path.write_text("mine")
    assert not is_report(path)
    with pytest.raises(InputError, match="--force"):
        report.write(path)
    assert path.read_text() == "mine"
    report.write(path, force=True)
    assert is_report(path)
    assert [each.name for each in tmp_path.iterdir()] == ["report.html"]


def test_command_line_refuses_before_the_work(tmp_path):
    from typer.testing import CliRunner

    taken = tmp_path / "taken.html"
    taken.write_text("mine")
    for options, word in (
        (["--report", str(taken)], "--force"),
        (["--report", str(tmp_path / "r.txt")], ".html"),
        (["--truth", "label"], "--report"),
    ):
        arguments = ["annotate", "no.h5ad", "-m", "none", "-o", str(tmp_path / "out.h5ad"), *options]
        result = CliRunner().invoke(app, arguments)
        assert isinstance(result.exception, InputError)
        assert word in str(result.exception)
    assert taken.read_text() == "mine"


# ---- untrusted names -----------------------------------------------------------------------------------------------


def test_markup_escapes_whatever_is_no_markup():
    assert str(text("<b>")) == "&lt;b&gt;"
    assert str(el("p", "<b>", el("i", "x"), title='">')) == '<p title="&quot;&gt;">&lt;b&gt;<i>x</i></p>'


@pytest.mark.parametrize("kind", ["annotate", "perturb", "demo"])
def test_nothing_foreign_runs_or_loads(reports, kind):
    html = reports[kind].read_text(encoding="utf-8")
    page = Page(html)
    assert page.tags.count("script") == 2
    assert page.tags.count("style") == 1
    assert "img" not in page.tags
    assert not re.search(r"(src|href)=\"(?!#)", html)
    assert "\u2028" not in html.split('id="data">')[1]
    assert not any(name.startswith("on") or name == "style" for _, attributes in page.attributes for name in attributes)
    policy = next(a["content"] for t, a in page.attributes if t == "meta" and "http-equiv" in a)
    assert policy.startswith("default-src 'none'")
    assert "unsafe" not in policy


# ---- colour --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("theme", colours.THEMES)
def test_text_and_markers_stand_out(theme):
    names = colours.THEMES[theme]
    for ink in ("ink", "muted", "link"):
        for ground in ("ground", "panel"):
            assert colours.contrast(names[ink], names[ground]) >= 4.5
    for fill in colours.fills(theme):
        assert colours.contrast(colours.outline(fill, theme), names["panel"]) >= 3
    for step, ink in colours.scale(theme):
        assert colours.contrast(step, ink) >= 4.5


def test_sequential_scale_goes_one_way_in_lightness():
    for theme, sign in (("light", -1), ("dark", 1)):
        light = [colours.luminance(step) for step, _ in colours.scale(theme)]
        assert (sign * np.diff(light) > 0).all()


def test_series_differ_without_colour():
    """The first eight differ by shape; within a shape, the lightness of the fill or the label differs."""
    pairs = [colours.series(at) for at in range(64)]
    assert len(set(pairs)) == 64
    assert len({shape for _, shape in pairs[:8]}) == 8
    assert len(set(colours.SHAPES.values())) == 8


def test_palette_survives_simulated_colour_blindness():
    """Okabe and Ito's colours stay apart for readers without red, green or blue cones (Viénot; Brettel for blue)."""
    simulations = {
        "protan": [[0.11238, 0.88762, 0], [0.11238, 0.88762, 0], [0.00401, -0.00401, 1]],
        "deutan": [[0.29275, 0.70725, 0], [0.29275, 0.70725, 0], [-0.02234, 0.02234, 1]],
    }
    rgb = np.array([[int(c[i : i + 2], 16) / 255 for i in (1, 3, 5)] for c in colours.OKABE_ITO])
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    for matrix in simulations.values():
        seen = np.clip(linear @ np.array(matrix).T, 0, 1) ** (1 / 2.4)
        apart = min(np.linalg.norm(seen[i] - seen[j]) for i, j in combinations(range(8), 2))
        assert apart > 0.1


# ---- in a browser --------------------------------------------------------------------------------------------------

EARLY = """
window.probe = {errors: []};
addEventListener("error", (e) => probe.errors.push(e.message));
addEventListener("securitypolicyviolation", (e) => probe.errors.push("blocked " + e.violatedDirective));
window.alert = () => probe.errors.push("alert");
"""
LATE = """
addEventListener("load", () => setTimeout(() => {
  const root = document.documentElement, canvases = [...document.querySelectorAll("canvas")];
  const inked = canvases.map((c) => {
    const seen = new Set(), pixels = c.getContext("2d").getImageData(0, 0, c.width, c.height).data;
    let some = 0;
    for (let i = 0; i < pixels.length; i += 4) if (pixels[i + 3] > 128) {
      some++;
      seen.add((pixels[i] >> 4) * 256 + (pixels[i + 1] >> 4) * 16 + (pixels[i + 2] >> 4));
    }
    return [some / (pixels.length / 4), seen.size];
  });
  const button = document.querySelector(".legend button");
  button.click();
  const pressed = button.getAttribute("aria-pressed");
  button.click();
  const first = canvases[0], box = first.getBoundingClientRect();
  let tip = "";
  for (let x = 10; x < box.width && !tip; x += 8) for (let y = 10; y < box.height && !tip; y += 8) {
    first.dispatchEvent(new PointerEvent("pointermove", {clientX: box.left + x, clientY: box.top + y}));
    tip = first.nextElementSibling.hidden ? "" : first.nextElementSibling.textContent;
  }
  parent.postMessage({
    ready: root.dataset.ready, errors: probe.errors.concat(root.dataset.errors || []), owned: root.dataset.owned,
    width: innerWidth, over: root.scrollWidth - root.clientWidth, inked, tip, pressed,
    points: canvases.map((c) => Number(c.dataset.points)), labels: canvases.map((c) => Number(c.dataset.labels)),
    small: [...document.querySelectorAll("p,td,th,dd,dt,figcaption,button")]
      .filter((e) => parseFloat(getComputedStyle(e).fontSize) < 11).length,
    background: getComputedStyle(root).backgroundColor,
  }, "*");
}, 200));
"""


@pytest.fixture(scope="module")
def browser():
    named = os.environ.get("RVQA_BROWSER")
    found = named or next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if found is None:
        assert "RVQA_REQUIRE_BROWSER" not in os.environ, "RVQA_REQUIRE_BROWSER is set, and there is no browser"
        pytest.skip("no browser: install chromium, or set RVQA_BROWSER to one")
    return found


def browse(browser, url, tmp_path, *options):
    names = ("headless", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run", "disable-background-networking")
    names += ("disable-component-update", "disable-sync", "hide-scrollbars", "virtual-time-budget=5000")
    command = [
        browser,
        *(f"--{name}" for name in names),
        f"--user-data-dir={tmp_path / 'profile'}",
        *options,
        url.as_uri(),
    ]
    return subprocess.run(command, capture_output=True, text=True, timeout=90, check=True).stdout


def probed(html, folder, width):
    """Return the report with two probes that its policy allows by hash, in a frame of some width."""
    hashes = [f"'{_digest(script)}'" for script in (EARLY, LATE)]
    html = html.replace("script-src ", f"script-src {' '.join(hashes)} ", 1)
    html = html.replace("<title>", f"<script>{EARLY}</script><title>", 1)
    html = html.replace("</body>", f"<script>{LATE}</script></body>", 1)
    (folder / "probed.html").write_text(html, encoding="utf-8")
    frame = folder / "frame.html"
    frame.write_text(
        "<!doctype html><body><script>addEventListener('message', (e) => {"
        "document.documentElement.dataset.result = encodeURIComponent(JSON.stringify(e.data))})</script>"
        f"<iframe src=probed.html width={width} height=900 style='border:0'></iframe>"
    )
    return frame


def _digest(script):
    import hashlib

    return "sha256-" + base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()


@pytest.mark.parametrize(
    ("kind", "width", "dark"),
    [
        ("annotate", 400, False),
        ("annotate", 1280, True),
        ("perturb", 400, True),
        ("perturb", 1280, False),
        ("demo", 400, False),
        ("demo", 1280, False),
    ],
)
def test_renders_in_a_browser(browser, reports, kind, width, dark, tmp_path):
    from urllib.parse import unquote

    frame = probed(reports[kind].read_text(encoding="utf-8"), tmp_path, width)
    options = ["--window-size=1400,1000", "--dump-dom", *(["--force-dark-mode"] if dark else [])]
    dom = browse(browser, frame, tmp_path, *options)
    found = re.search(r'data-result="([^"]*)"', dom)
    assert found, dom[:2000]
    result = json.loads(unquote(found[1]))
    assert result["ready"] == "true"
    assert result["errors"] == []
    assert "owned" not in result
    assert result["width"] == width
    assert result["over"] <= 0
    assert result["small"] == 0
    assert result["background"] == ("rgb(15, 20, 25)" if dark else "rgb(255, 255, 255)")
    assert len(result["points"]) == {"annotate": 3, "perturb": 4, "demo": 6}[kind]
    for (share, tones), points, labels in zip(result["inked"], result["points"], result["labels"], strict=True):
        assert points > 0
        assert labels > 0
        assert share > 0.005
        assert tones > 10
    assert result["tip"]
    assert result["pressed"] == "true"


def test_the_page_as_written_is_painted(browser, reports, tmp_path):
    """Without a probe, a screenshot of the file itself has all colours of its markers."""
    from PIL import Image

    shot = tmp_path / "shot.png"
    browse(browser, reports["annotate"], tmp_path, "--window-size=1280,1200", f"--screenshot={shot}")
    pixels = np.asarray(Image.open(shot).convert("RGB")).reshape(-1, 3)
    seen = {"#{:02x}{:02x}{:02x}".format(*colour) for colour in np.unique(pixels, axis=0)}
    assert set(colours.OKABE_ITO[:6]) <= seen
