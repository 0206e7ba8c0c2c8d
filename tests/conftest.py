"""Fixtures shared by all tests: the real data files, where this machine has them."""

import os
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():  # before anything imports triton
    os.environ.setdefault("TRITON_INTERPRET", "1")

DATA_FILES = (
    "pbmc3k_10x",
    "kang2018_ifnb_pbmc_2k",
    "kang2018_ctrl_pbmc_12k_1287genes",
    "zheng2017_sorted_pbmc_3500",
    "pbmc5k_citeseq_4000genes",
    "pbmc68k_reduced_700",
    "he2020_bone_marrow_421genes",
    "tian2019_lung_cancer_lines",
    "papalexi2021_eccite_thp1_299genes",
)


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder of .h5ad files: RVQA_DATA_DIR, else ../shared/data beside the repository."""
    beside = Path(__file__).resolve().parents[2] / "shared" / "data"
    folder = Path(os.environ.get("RVQA_DATA_DIR", beside))
    if not folder.is_dir():
        pytest.skip(f"no real data: {folder} does not exist; set RVQA_DATA_DIR to the folder of .h5ad files")
    return folder


@pytest.fixture(scope="session")
def ref_dir(data_dir: Path) -> Path:
    """The folder of reference tables (Cell Ontology, HGNC): RVQA_REF_DIR, else ref beside the data."""
    folder = Path(os.environ.get("RVQA_REF_DIR", data_dir.parent / "ref"))
    if not folder.is_dir():
        pytest.skip(f"no reference tables: {folder} does not exist; set RVQA_REF_DIR")
    return folder


@pytest.fixture(scope="session")
def read(data_dir: Path) -> Callable:
    """`read(name)`: an AnnData of its own for each call, from a file that is read once."""
    import anndata

    @cache
    def stored(name: str) -> anndata.AnnData:
        path = data_dir / f"{name}.h5ad"
        if not path.is_file():
            pytest.skip(f"no {path.name} in {data_dir}")
        return anndata.read_h5ad(path)

    return lambda name: stored(name).copy()


@pytest.fixture(scope="session", params=DATA_FILES)
def data_file(request: pytest.FixtureRequest) -> str:
    """The name of each data file in turn."""
    return request.param


@pytest.fixture(scope="session")
def pbmc_tokenizer(read: Callable):
    """A tokenizer fitted briefly on real PBMC, of two studies with different genes."""
    from rvqa.tokenizer import CellTokenizer
    from rvqa.training.reference import read_reference
    from rvqa.training.tokenizer import TokenizerSettings

    references = [
        read_reference(read("pbmc3k_10x"), name="pbmc3k", labels="cell_type"),
        read_reference(read("kang2018_ifnb_pbmc_2k"), name="kang", labels="cell_type"),
    ]
    return CellTokenizer.fit(references, TokenizerSettings(epochs=30), progress=False)


@pytest.fixture(scope="session")
def shipped(tmp_path_factory: pytest.TempPathFactory):
    """The demo's case without a data folder: 700 real PBMC of scanpy with a simulated response."""
    from rvqa.demo import shipped_case

    return shipped_case(seed=0)


@pytest.fixture(scope="session")
def model(shipped):
    """A model fitted briefly on those cells: real, small, not good."""
    from rvqa.training.cpt import LanguageSettings
    from rvqa.training.fit import FitSettings, fit_files
    from rvqa.training.tokenizer import TokenizerSettings

    return fit_files(
        shipped.references,
        names=shipped.names,
        labels="label",
        condition="condition",
        control="control",
        library_size_key="depth",
        settings=FitSettings(tokenizer=TokenizerSettings(epochs=60), language=LanguageSettings(steps=150)),
        progress=False,
    )


@pytest.fixture(scope="session")
def model_path(model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory that model was saved in."""
    path = tmp_path_factory.mktemp("saved") / "model"
    model.save_pretrained(path)
    return path
