"""Bad input on the command line: one sentence with file, fault and remedy, exit code 2, and no traceback."""

import json
import os
import pickle
import pty
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import termios
from dataclasses import dataclass
from pathlib import Path

import anndata
import h5py
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import torch
from safetensors.torch import load_file, save_file

import rvqa
from rvqa.data.reading import Reading
from rvqa.demo import SIMULATED
from rvqa.errors import InputError

DEPTH = ["--library-size-key", "depth"]
LAYER = "model.layers.0.mlp.down_proj.weight"


@dataclass
class Place:
    """Folder of one test: cells and a model for the test to damage, and an output that must not appear."""

    folder: Path
    cells: anndata.AnnData
    model_path: Path
    small: Path
    """Written cells with nothing wrong."""

    @property
    def out(self) -> Path:
        return self.folder / "results" / "out.h5ad"

    def write(self, adata=None, name="cells.h5ad"):
        (self.cells if adata is None else adata).write_h5ad(self.folder / name)
        return self.folder / name

    def set_values(self, change, dense=False):
        """Write the cells with the given values in X."""
        self.cells.X = change(self.cells.X.toarray() if dense else self.cells.X.astype(np.float32))
        return self.write()

    def rename(self, names):
        self.cells = anndata.AnnData(self.cells.X, obs=self.cells.obs, var=pd.DataFrame(index=list(names)))
        return self.write()

    def bytes(self, change):
        file = self.folder / "cells.h5ad"
        file.write_bytes(change(self.small.read_bytes()))
        return file

    def model(self):
        copy = self.folder / "model"
        shutil.copytree(self.model_path, copy)
        return copy

    def spoil(self, name, change):
        """Copy the model with one file replaced."""
        file = self.model() / name
        file.write_bytes(change(file.read_bytes()))
        return self.annotate(self.small, "-m", self.folder / "model")

    def spoil_json(self, name, **values):
        """Copy the model with values of a JSON file changed; `...` removes a value."""

        def change(text):
            merged = {**json.loads(text), **values}
            return json.dumps({key: value for key, value in merged.items() if value is not ...}).encode()

        return self.spoil(name, change)

    def spoil_tensors(self, change, name="model.safetensors"):
        file = self.model() / name
        tensors = load_file(file)
        change(tensors)
        save_file(tensors, file, metadata={"format": "pt"})
        return self.annotate(self.small, "-m", self.folder / "model")

    def encode(self, cells, *options):
        return ["encode", cells, "-m", self.model_path, "-o", self.out, *options]

    def annotate(self, cells, *options):
        return ["annotate", cells, "-m", self.model_path, "-o", self.out, "--quiet", *DEPTH, *options]

    def perturb(self, *options):
        asked = ["-p", SIMULATED, "--cell-type-key", "label", "--quiet", *DEPTH]
        return ["perturb", self.small, "-m", self.model_path, "-o", self.out, *asked, *options]

    def decode(self, codes, *options):
        self.cells.obsm["rvqa_codes"] = codes
        return ["decode", self.write(), "-m", self.model_path, "-o", self.out, *options]

    def fit(self, *options):
        if not (self.folder / "cells.h5ad").exists():
            self.write()
        output = self.folder / "results" / "fitted"
        return ["fit", self.folder / "cells.h5ad", "-o", output, "--labels", "label", "--quiet", *DEPTH, *options]


@pytest.fixture(scope="module")
def cells(shipped):
    """Real cells: 40 control cells of scanpy's PBMC."""
    return next(iter(shipped.tests.values()))[:40].copy()


@pytest.fixture(scope="module")
def small(cells, tmp_path_factory):
    path = tmp_path_factory.mktemp("small") / "small.h5ad"
    cells.write_h5ad(path)
    return path


@pytest.fixture
def place(cells, small, model_path, tmp_path):
    (tmp_path / "results").mkdir()
    return Place(tmp_path, cells.copy(), model_path, small)


def state(folder):
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() if path.is_file() else None
        for path in sorted(folder.rglob("*"))
    }


def refused(rvqa_cli, place, arguments, *words):
    """Assert that a command is rejected as documented, and return its sentence."""
    before = state(place.folder)
    done = rvqa_cli(*arguments)
    assert done.code == 2, done.err
    assert done.err.startswith("rvqa: ")
    assert done.err.count("\n") == 1, done.err
    assert "Traceback" not in done.err
    assert len(done.err) < 400 + sum(str(argument).count("/") > 1 for argument in arguments) * len(str(place.folder))
    for word in words:
        assert word in done.err, done.err
    assert state(place.folder) == before
    return done.err


def value_at(value):
    def change(x):
        x[3, 5] = value
        return sp.csr_matrix(x)

    return change


def log1p(x):
    return np.log1p(x / x.sum(1, keepdims=True) * 1e4).astype(np.float32)


def scaled(x):
    return (log1p(x) - log1p(x).mean(0)) / (log1p(x).std(0) + 1e-6)


def no_counts_in_a_cell(x):
    x[3] = 0
    return sp.csr_matrix(x)


class Marker:
    """It makes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def pickle_only(place):
    model = place.model()
    (model / "model.safetensors").unlink()
    (model / "pytorch_model.bin").write_bytes(pickle.dumps(Marker(place.folder / "unpickled")))
    return place.annotate(place.small, "-m", model)


def pickle_as(name):
    return lambda place: place.spoil(name, lambda _: pickle.dumps(Marker(place.folder / "unpickled")))


def base_with_pickle_only(place):
    arguments = pickle_only(place)
    return place.fit("--base", arguments[-1])


def set_tensor(name, change, file="model.safetensors"):
    def spoil(tensors):
        tensors[name] = change(tensors[name])

    return lambda place: place.spoil_tensors(spoil, file)


def nan(tensor):
    tensor = tensor.clone()
    tensor.view(-1)[7] = float("nan")
    return tensor


def parquet(place, change):
    def spoilt(content):
        path = place.folder / "genes.parquet"
        path.write_bytes(content)
        change(pd.read_parquet(path)).to_parquet(path)
        return path.read_bytes()

    return place.spoil("cell_tokenizer/genes.parquet", spoilt)


def one_level_less(place):
    arguments = place.spoil_tensors(
        lambda tensors: tensors.update(codebooks_MKD=tensors["codebooks_MKD"][:7].clone()),
        "cell_tokenizer/model.safetensors",
    )
    config = place.folder / "model/cell_tokenizer/config.json"
    config.write_text(config.read_text().replace('"levels": 8', '"levels": 7'))
    return arguments


def hdf5_of_10x(place):
    with h5py.File(place.folder / "cells.h5ad", "w") as file:
        file["matrix/data"] = np.arange(3)
    return place.encode(place.folder / "cells.h5ad")


def damaged_inside(place):
    file = place.write()
    with h5py.File(file, "r+") as opened:
        del opened["X/indptr"]
    return place.encode(file)


def output_is_there(place):
    place.out.write_bytes(b"mine")
    return place.encode(place.small)


def model_is_there(place):
    (place.folder / "results/fitted").mkdir()
    (place.folder / "results/fitted/notes").write_text("mine")
    return place.fit()


def output_is_a_folder(place):
    place.out.mkdir()
    return place.encode(place.small, "--force")


def output_is_the_input(place):
    file = place.write()
    return ["encode", file, "-m", place.model_path, "-o", place.folder / "results/../cells.h5ad", "--force"]


def unlabelled(place):
    place.cells.obs["label"] = "unlabeled"
    place.write()
    return place.fit()


def only_control(place):
    place.cells.obs["condition"] = "control"
    place.write()
    return place.fit("--condition", "condition", "--control", "control")


def no_partner(place):
    """All B cells are perturbed, and no other cell is."""
    place.cells.obs["condition"] = np.where(place.cells.obs["label"] == place.cells.obs["label"].iloc[0], "LPS", "none")
    place.write()
    return place.fit("--condition", "condition", "--control", "none")


def layer_has_counts(place):
    place.cells.layers["counts"] = place.cells.X.copy()
    return place.encode(place.set_values(log1p, dense=True), "--layer", "X")


def codes(n, **change):
    made = np.zeros((n, change.get("levels", 8)), dtype=change.get("dtype", np.uint8))
    made[2, 3] = change.get("value", 0)
    return made


# Name: arguments of the command, words of its sentence.
CASES = {
    # Values.
    "negative values": (
        lambda p: p.encode(p.set_values(value_at(-2.0))),
        ["cells.h5ad", "negative", "min -2", "gene 'SRM'"],
    ),
    "NaN": (lambda p: p.encode(p.set_values(value_at(np.nan))), ["NaN", "1 of", "gene 'SRM'", "raw counts"]),
    "Inf": (lambda p: p.encode(p.set_values(value_at(np.inf), dense=True)), ["infinite", "gene 'SRM'"]),
    "an empty cell": (
        lambda p: p.encode(p.set_values(no_counts_in_a_cell, dense=True)),
        ["1 of 40 cells have no counts", "filter_cells"],
    ),
    "nothing but empty cells": (lambda p: p.encode(p.set_values(lambda x: x * 0)), ["nothing but zeros", "40 cells"]),
    "not integers": (
        lambda p: p.encode(p.set_values(value_at(0.5))),
        ["1 of", "not integers", "0.5 in cell", "gene 'SRM'"],
    ),
    "nearly integers": (lambda p: p.encode(p.set_values(lambda x: x * (1 + 1e-6))), ["nearly integers", "round()"]),
    "log1p": (lambda p: p.encode(p.set_values(log1p, dense=True)), ["log1p", "--recover"]),
    "log1p, counts in a layer": (layer_has_counts, ["log1p", "layers['counts']", "--layer"]),
    "log2, with --recover": (
        lambda p: p.encode(p.set_values(lambda x: np.log2(1 + x * 1.7), dense=True), "--recover"),
        ["cannot be recovered", "raw counts"],
    ),
    "scaled": (lambda p: p.encode(p.set_values(scaled, dense=True)), ["scaled or centred", "Pass raw counts"]),
    "text instead of numbers": (
        lambda p: p.annotate(p.small, "--library-size-key", "label"),
        ["obs['label'] holds", "not numbers"],
    ),
    # Genes.
    "no gene of the model": (
        lambda p: p.encode(p.rename(f"Q{i}X" for i in range(p.cells.n_vars))),
        ["0 of the model's 741 genes", "'Q0X'", "at least 50", "'HES4'"],
    ),
    "few genes of the model": (
        lambda p: p.encode(p.write(p.cells[:, :30].copy()), *DEPTH),
        ["29 of the model's 741 genes", "at least 50"],
    ),
    "mouse genes": (
        lambda p: p.encode(p.rename(name.capitalize() for name in p.cells.var_names)),
        ["'Hes4'", "mouse genes", "orthologues"],
    ),
    # Files.
    "0 bytes": (lambda p: p.encode(p.bytes(lambda _: b"")), ["cells.h5ad is empty", "download it again"]),
    "no cells": (lambda p: p.encode(p.write(p.cells[:0].copy())), ["cells.h5ad", "no cells", "765 genes"]),
    "no genes": (lambda p: p.encode(p.write(p.cells[:, :0].copy())), ["cells.h5ad", "no genes", "40 cells"]),
    "cut short": (lambda p: p.encode(p.bytes(lambda whole: whole[: len(whole) // 2])), ["cut short", "bytes"]),
    "not HDF5": (lambda p: p.encode(p.bytes(lambda _: b"gene,cell\nCD3D,4\n")), ["holds no HDF5", "write_h5ad"]),
    "HDF5 of another kind": (hdf5_of_10x, ["not of AnnData", "no obs and no var", "write_h5ad"]),
    "a part is missing": (damaged_inside, ["cells.h5ad is damaged"]),
    "another suffix": (lambda p: p.encode(p.write(name="cells.loom")), ["cells.loom is not named .h5ad"]),
    "no such file": (lambda p: p.encode(p.write().with_name("cell.h5ad")), ["does not exist", "'cells.h5ad'"]),
    "a folder": (lambda p: p.encode(p.folder), ["is a folder"]),
    # Models.
    "no model there": (lambda p: p.encode(p.small, "-m", p.folder / "none"), ["not an rvqa model", "does not exist"]),
    "a folder without a model": (lambda p: p.encode(p.small, "-m", p.folder), ["no rvqa.json", "rvqa fit"]),
    "a file as model": (lambda p: p.encode(p.small, "-m", p.small), ["is not a directory"]),
    "another version": (lambda p: p.spoil_json("rvqa.json", format_version=2), ["version 2", "reads version 1"]),
    "another version of the tokenizer": (
        lambda p: p.spoil_json("cell_tokenizer/config.json", format_version=99),
        ["version 99", "reads version 2"],
    ),
    "version as text": (lambda p: p.spoil_json("rvqa.json", format_version="1"), ["'format_version' is text"]),
    "labels as text": (lambda p: p.spoil_json("rvqa.json", labels="B"), ["'labels' is text", "a list"]),
    "labels as numbers": (lambda p: p.spoil_json("rvqa.json", labels=[1, 2]), ["'labels'", "a whole number"]),
    "no labels": (lambda p: p.spoil_json("rvqa.json", labels=...), ["no 'labels'"]),
    "tokens elsewhere": (
        lambda p: p.spoil_json("rvqa.json", vocabulary={"base": 7, "levels": 8, "entries": 32}),
        ["cell tokens", "'base': 7"],
    ),
    **{
        f"no JSON in {name}": (
            lambda p, name=name: p.spoil(name, lambda whole: whole[: len(whole) // 2]),
            [name, "is not valid JSON", "Copy the model again"],
        )
        for name in (
            *("rvqa.json", "cell_tokenizer/config.json", "config.json", "tokenizer.json"),
            *("tokenizer_config.json", "generation_config.json"),
        )
    },
    "bytes as JSON": (lambda p: p.spoil("rvqa.json", lambda _: b"\xff\xfe\x00"), ["rvqa.json is not valid JSON"]),
    "a list as JSON": (lambda p: p.spoil("config.json", lambda _: b"[1]"), ["config.json holds a list"]),
    "deep JSON": (lambda p: p.spoil("rvqa.json", lambda _: b"[" * 100_000), ["rvqa.json is not valid JSON"]),
    "a size as text": (lambda p: p.spoil_json("config.json", hidden_size="96"), ["config.json", "expected int"]),
    "an unknown kind of model": (lambda p: p.spoil_json("config.json", model_type="nope"), ["config.json", "nope"]),
    "other sizes": (lambda p: p.spoil_json("config.json", hidden_size=48), ["another shape"]),
    "sizes beyond memory": (lambda p: p.spoil_json("config.json", hidden_size=10**5), ["describes a model of"]),
    "no text tokenizer": (lambda p: p.spoil_json("tokenizer.json", model=5), ["not of a tokenizer"]),
    "no end token": (lambda p: p.spoil_json("tokenizer_config.json", eos_token=None), ["no end token"]),
    "7 levels for 8": (lambda p: p.spoil_json("cell_tokenizer/config.json", levels=7), ["[8, 32, 32]", "[7, 32, 32]"]),
    "7 levels in all of the tokenizer": (one_level_less, ["writes 7 levels", "reads 8"]),
    "a size of 0": (lambda p: p.spoil_json("cell_tokenizer/config.json", latent=0), ["'latent' is 0", "expected 1 to"]),
    "a size as a fraction": (
        lambda p: p.spoil_json("cell_tokenizer/config.json", latent=3.5),
        ["'latent' is a number"],
    ),
    "a setting too many": (lambda p: p.spoil_json("cell_tokenizer/config.json", depth=3), ["'depth'"]),
    "a tokenizer beyond memory": (
        lambda p: p.spoil_json("cell_tokenizer/config.json", hidden=60_000),
        ["does not fit its config"],
    ),
    "a tensor less": (lambda p: p.spoil_tensors(lambda t: t.pop(LAYER)), [LAYER, "is missing"]),
    "a tensor more": (lambda p: p.spoil_tensors(lambda t: t.update(mine=torch.ones(2))), ["'mine'", "does not belong"]),
    "a tensor of another shape": (set_tensor(LAYER, lambda t: t[:5].clone()), [LAYER, "another shape"]),
    "a tensor of another type": (set_tensor(LAYER, lambda t: t.half()), [LAYER, "does not hold float32"]),
    "NaN in a tensor": (set_tensor(LAYER, nan), [LAYER, "NaN or infinite"]),
    **{
        f"cell tokenizer, {name}": (
            lambda p, change=change: p.spoil_tensors(change, "cell_tokenizer/model.safetensors"),
            words,
        )
        for name, change, words in (
            ("a tensor less", lambda t: t.pop("gene_mean_G"), ["lacks the tensor 'gene_mean_G'"]),
            ("a tensor more", lambda t: t.update(mine=torch.ones(2)), ["'mine'"]),
            ("another shape", lambda t: t.update(gene_mean_G=torch.ones(3)), ["[3]", "[741]"]),
            ("another type", lambda t: t.update(gene_mean_G=t["gene_mean_G"].double()), ["float64; expected float32"]),
            ("NaN", lambda t: t.update(gene_mean_G=nan(t["gene_mean_G"])), ["'gene_mean_G'", "1 of 741"]),
        )
    },
    "weights cut short": (lambda p: p.spoil("model.safetensors", lambda b: b[:5000]), ["model.safetensors is damaged"]),
    "no table of genes": (
        lambda p: p.spoil("cell_tokenizer/genes.parquet", lambda b: b[:500]),
        ["genes.parquet cannot"],
    ),
    "a table of fewer genes": (lambda p: parquet(p, lambda frame: frame[:100]), ["positive numbers that add up to 1"]),
    "a table of other columns": (lambda p: parquet(p, lambda frame: frame[["ensembl_id"]]), ["lacks ['gene_symbol']"]),
    "a pickle alone": (pickle_only, ["no model.safetensors", "pytorch_model.bin", "pickle"]),
    "a pickle as safetensors": (pickle_as("model.safetensors"), ["holds no safetensors"]),
    "a pickle in the tokenizer": (pickle_as("cell_tokenizer/model.safetensors"), ["holds no safetensors"]),
    "a pickle as table": (pickle_as("cell_tokenizer/genes.parquet"), ["genes.parquet cannot be read"]),
    # Codes and names.
    "no codes": (lambda p: ["decode", p.small, "-m", p.model_path, "-o", p.out], ["no codes", "rvqa encode"]),
    "a code out of range": (lambda p: p.decode(codes(40, value=32)), ["32", "row 2 at level 3"]),
    "codes of 7 levels": (lambda p: p.decode(codes(40, levels=7)), ["(40, 7)", "[cells, 8]"]),
    "codes as fractions": (lambda p: p.decode(codes(40, dtype=np.float32)), ["float32", "uint8"]),
    "an unknown gene": (lambda p: p.decode(codes(40), "--genes", "CD74,CD79"), ["'CD79'", "Nearest", "'CD79A'"]),
    "an unknown perturbation": (lambda p: p.perturb("-p", "SIMULATED"), ["'SIMULATED' is no", "Nearest", SIMULATED]),
    "an unknown label": (lambda p: p.annotate(p.small, "--labels", "Dendrtic"), ["'Dendrtic' is no", "'Dendritic'"]),
    "an unknown layer": (lambda p: p.encode(p.small, "--layer", "counts"), ["no layer 'counts'", "no layers"]),
    "an unknown library size": (lambda p: p.encode(p.small, "--library-size-key", "dpth"), ["'dpth'", "'depth'"]),
    "unknown types": (lambda p: p.perturb("--cell-type-key", "lable"), ["no column 'lable'", "'label'"]),
    "types of another column": (lambda p: p.perturb("--cell-type-key", "condition"), ["'control' is not a cell type"]),
    "an unknown control": (
        lambda p: p.perturb("--control-key", "condition", "--control-value", "ctrl"),
        ["'ctrl' is not a value of obs['condition']", "'control'"],
    ),
    "half of a control": (lambda p: p.perturb("--control-key", "condition"), ["go together"]),
    # Outputs.
    "an output that exists": (output_is_there, ["out.h5ad exists", "--force"]),
    "an output without its folder": (lambda p: [*p.encode(p.small)[:-1], p.folder / "a/b.h5ad"], ["a does not exist"]),
    "an output of another name": (lambda p: [*p.encode(p.small)[:-1], p.folder / "b.csv"], ["b.csv is not named"]),
    "an output that is the input": (output_is_the_input, ["is the file to read", "another name"]),
    "an output that is a folder": (output_is_a_folder, ["is a folder"]),
    "a name too long": (lambda p: [*p.encode(p.small)[:-1], p.folder / f"{'x' * 300}.h5ad"], ["too long"]),
    "a place where nothing can be": (
        lambda p: [*p.encode(p.small)[:-1], "/proc/out.h5ad"],
        ["/proc cannot be written"],
    ),
    # Fitting.
    "fit: log1p": (lambda p: p.set_values(log1p, dense=True) and p.fit(), ["cells.h5ad: X looks log1p", "--recover"]),
    "fit: unlabelled": (unlabelled, ["cells.h5ad: obs['label'] labels no cell"]),
    "fit: unknown labels": (lambda p: p.fit("--labels", "lable"), ["no column 'lable'", "'label'"]),
    "fit: no control cells": (
        lambda p: p.fit("--condition", "condition", "--control", "contrl"),
        ["no 'contrl'", "no control cells", "'control'"],
    ),
    "fit: nothing perturbed": (only_control, ["'control' in all cells"]),
    "fit: no control cells of the type": (no_partner, ["'LPS' has no control cells"]),
    "fit: unknown condition": (
        lambda p: p.fit("--condition", "conditoin", "--control", "control"),
        ["'conditoin'", "'condition'"],
    ),
    "fit: condition without control": (lambda p: p.fit("--condition", "condition"), ["go together"]),
    "fit: too few cells": (
        lambda p: p.write(p.cells[:20].copy()) and p.fit(),
        ["20 cells cannot fill"],
    ),
    "fit: no such base": (lambda p: p.fit("--base", p.folder / "none"), ["no directory", "none"]),
    "fit: a base that is not a model": (lambda p: p.fit("--base", p.folder), ["config.json is missing"]),
    "fit: a base of a pickle": (base_with_pickle_only, ["pickle"]),
    "fit: an output that exists": (model_is_there, ["fitted exists", "new directory"]),
    "fit: an output in a file": (
        lambda p: [*p.fit()[:2], "-o", p.small / "fitted"],
        ["is not a folder"],
    ),
    "fit: an output where nothing can be": (lambda p: [*p.fit()[:2], "-o", "/proc/fitted"], ["cannot be written"]),
}


@pytest.mark.parametrize("name", CASES)
def test_refused(name, place, rvqa_cli):
    make, words = CASES[name]
    refused(rvqa_cli, place, make(place), *words)
    assert not (place.folder / "unpickled").exists()


# Input that looks odd but is valid.


def test_recover_on_counts_changes_nothing(place, rvqa_cli):
    assert rvqa_cli(*place.annotate(place.small)).code == 0
    plain = anndata.read_h5ad(place.out)
    assert rvqa_cli(*place.annotate(place.small, "--recover", "--force")).code == 0
    again = anndata.read_h5ad(place.out)
    np.testing.assert_array_equal(plain.obsm["rvqa_codes"], again.obsm["rvqa_codes"])


def test_repeated_barcodes_are_said_and_repeated_genes_are_added(place, rvqa_cli):
    names = ["same", "same", *place.cells.obs_names[2:]]
    place.cells.obs_names = names
    genes = place.cells.var_names.to_list()
    twice = sp.hstack([place.cells.X, place.cells.X[:, [3]]], format="csr")
    doubled = anndata.AnnData(twice, obs=place.cells.obs, var=pd.DataFrame(index=[*genes, genes[3]]))
    place.cells.X = sp.csr_matrix(place.cells.X.toarray() * (1 + (np.arange(len(genes)) == 3)))
    said = rvqa_cli(*place.encode(place.write(doubled)))
    assert said.code == 0
    warned = f"rvqa: warning: {place.folder}/cells.h5ad: 1 cells repeat the name of another (e.g. 'same')"
    assert said.err.startswith(warned)
    assert said.err.count("\n") == 1
    assert "1 repeat another and are added to it" in said.out
    added = anndata.read_h5ad(place.out).obsm["rvqa_codes"]
    assert rvqa_cli(*place.encode(place.write(), "--force")).code == 0
    np.testing.assert_array_equal(anndata.read_h5ad(place.out).obsm["rvqa_codes"], added)


@pytest.mark.parametrize("command", ["encode", "annotate", "perturb"])
def test_coverage_is_one_line(command, place, rvqa_cli):
    arguments = place.perturb() if command == "perturb" else getattr(place, command)(place.small)
    line = (
        "genes: 741 of the model's 741 genes (100.0 %) are measured; of the file's 765 genes 0 were matched by Ensembl"
    )
    assert [each.startswith(line) for each in rvqa_cli(*arguments).out.splitlines()].count(True) == 1


def test_a_pickle_beside_the_weights_is_not_opened(place, rvqa_cli):
    (place.model() / "pytorch_model.bin").write_bytes(pickle.dumps(Marker(place.folder / "unpickled")))
    assert rvqa_cli(*place.encode(place.small, "-m", place.folder / "model")).code == 0
    assert not (place.folder / "unpickled").exists()
    with pytest.raises(FileExistsError):  # the test would have noticed it
        pickle.loads(pickle.dumps(Marker(place.folder)))


@pytest.mark.parametrize("change", [lambda text: text.replace("<|c1_", "<|c0_", 1), lambda text: text[:-12]])
def test_a_text_that_is_no_cell(change, model_path):
    vocabulary = rvqa.load(model_path).vocabulary
    text = vocabulary.texts(np.zeros((1, 8), dtype=np.uint8))[0]
    with pytest.raises(InputError, match=r"^Text 0 is not one cell span: saw .*expected <\|cell\|>, 8 codes"):
        vocabulary.codes_from_texts([change(text)])


def test_one_label_is_said(place):
    from rvqa.training.fit import fit_files, settings_for

    place.cells.obs["label"] = "B"
    with pytest.warns(rvqa.errors.InputWarning, match="one label, 'B'"), pytest.raises(InputError, match="directory"):
        fit_files([place.cells], labels="label", base=place.folder / "none", settings=settings_for(0), progress=False)


def test_fit_recovers_counts(place):
    from rvqa.training.references import read_reference

    counts = read_reference(place.cells, labels="label", reading=Reading(library_size_key="depth")).counts
    depth = place.cells.obs["depth"].to_numpy()[:, None]
    place.cells.X = np.log1p(place.cells.X.toarray() / depth * 1e4).astype(np.float32)
    recovered = read_reference(place.cells, labels="label", reading=Reading(None, "depth", recover=True)).counts
    assert (recovered != counts).nnz == 0


def test_a_fault_of_rvqa_keeps_its_traceback(place, rvqa_cli, monkeypatch):
    monkeypatch.setattr(rvqa, "annotate", lambda *_, **__: 1 / 0, raising=False)
    done = rvqa_cli(*place.annotate(place.small))
    assert done.code == 1
    assert "ZeroDivisionError" in done.err
    assert "report it" in done.err.splitlines()[-1]


# Cases that need a separate process.


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 64 KiB if one can be mounted, else a limit on the size of files; and its message."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", disk]
    if shutil.which("mount") and not subprocess.run(mount, capture_output=True).returncode:
        yield disk, "the disk is full"
        subprocess.run(["umount", disk], check=True)
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (65_536, hard))
    yield disk, "larger than a file may be"
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk(small_disk, place, rvqa_cli, model):
    disk, said = small_disk
    done = rvqa_cli("encode", place.small, "-m", place.model_path, "-o", disk / "out.h5ad", *DEPTH)
    assert done.code == 2
    assert done.err.startswith(f"rvqa: {disk}/out.h5ad cannot be written: {said}")
    assert done.err.count("\n") == 1
    with pytest.raises(InputError, match=f"^{disk}/folder/model cannot be written: .*{said}"):
        model.save_pretrained(disk / "folder/model")
    assert not list(disk.iterdir())


def test_no_permission(place, rvqa_cli):
    """Root may write anywhere, so the command runs as another user."""
    locked = Path(tempfile.mkdtemp())
    locked.chmod(0o555)
    user = os.geteuid()
    try:
        if user == 0:
            os.seteuid(65534)
        done = rvqa_cli("encode", place.small, "-m", place.model_path, "-o", locked / "out.h5ad")
    finally:
        os.seteuid(user)
    assert done.code == 2
    assert (
        done.err
        == f"rvqa: {locked} cannot be written: permission denied. Choose another place or name for the output.\n"
    )
    assert not list(locked.iterdir())
    locked.rmdir()


@pytest.mark.parametrize(("command", "name"), [("perturb", "SIGINT"), ("fit", "SIGTERM")])
def test_stopped_in_the_middle(command, name, place):
    many = anndata.concat([place.cells] * 20, index_unique="-")
    place.write(many)
    work = place.perturb("--n-samples", 50) if command == "perturb" else place.fit("--steps", 10_000)
    work = [place.folder / "cells.h5ad" if each == place.small else each for each in work if each != "--quiet"]
    before = state(place.folder)
    terminal, errors = pty.openpty()  # progress bars show only on a terminal
    termios.tcsetwinsize(errors, (24, 100))
    process = subprocess.Popen(
        [sys.executable, "-m", "rvqa", *map(str, work)],
        stdout=subprocess.DEVNULL,
        stderr=errors,
        start_new_session=True,
    )
    os.close(errors)
    said = ""
    try:
        while "%" not in said:  # a progress bar shows that it has started
            said += os.read(terminal, 1000).decode()
        process.send_signal(getattr(signal, name))
        assert process.wait(timeout=60) == 1
        said += os.read(terminal, 100_000).decode()
    finally:
        process.kill()
        os.close(terminal)
    assert "Traceback" not in said
    assert "Exception ignored" not in said
    assert said.splitlines()[-1] == "rvqa: Stopped; nothing was written."
    assert state(place.folder) == before


def test_stopped_when_the_output_stands(place, rvqa_cli, monkeypatch):
    before = signal.getsignal(signal.SIGINT)  # a shell that starts the tests in the background makes them ignore it
    monkeypatch.setattr("rvqa.cli.using.show_coverage", lambda *_: signal.raise_signal(signal.SIGINT))
    done = rvqa_cli(*place.encode(place.small))
    assert done.code == 1
    assert done.err == f"rvqa: Stopped; {place.out} was complete by then.\n"
    assert signal.getsignal(signal.SIGINT) is before
