"""Fixtures for all tests: the real data files, if this machine has them, and models fitted on them once."""

import fcntl
import os
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import SimpleNamespace

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

LONGEST = (
    "evaluation/test_evaluate_tokenizer.py",
    "test_variants.py",
    "gpu/test_triton.py",
    "atlas/test_run.py",
    "test_bad_input.py",
    "training/tokenizer/test_run.py",
    "test_cli.py",
    "test_demo.py",
    "atlas/test_cluster.py",
)
"""Files that take 15 seconds and more. They come first, so that workers end together."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    def place(item: pytest.Item) -> int:
        name = item.path.relative_to(Path(__file__).parent).as_posix()
        return LONGEST.index(name) if name in LONGEST else len(LONGEST)

    items.sort(key=place)


@pytest.fixture(autouse=True)
def same_threads():
    """Reset torch's threads after each test, because numba sets those of OpenMP, which torch shares."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def one_thread():
    """Use one thread, for tests that compare fits bit for bit: several threads add in a varying order."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """Folder of .h5ad files: RVQA_DATA_DIR, which `make` and `.ci/run` set if data lie beside the repository."""
    folder = os.environ.get("RVQA_DATA_DIR", "")
    if not Path(folder or "nowhere").is_dir():
        pytest.skip(f"no real data: RVQA_DATA_DIR is {folder!r}; set it to the folder of .h5ad files, or use `make`")
    return Path(folder)


@pytest.fixture(scope="session")
def ref_dir(data_dir: Path) -> Path:
    """Folder of reference tables (Cell Ontology, HGNC): RVQA_REF_DIR, else `ref` beside the data."""
    folder = Path(os.environ.get("RVQA_REF_DIR", data_dir.parent / "ref"))
    if not folder.is_dir():
        pytest.skip(f"no reference tables: {folder} does not exist; set RVQA_REF_DIR")
    return folder


@pytest.fixture(scope="session")
def read(data_dir: Path) -> Callable:
    """`read(name)` gives a new AnnData for each call, from a file that is read once."""
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
def once(tmp_path_factory: pytest.TempPathFactory) -> Callable:
    """`once(name, make)` gives a path that one worker fills by `make(path)`; the other workers wait for it."""
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent  # of all workers

    def made(name: str, make: Callable[[Path], object]) -> Path:
        path = folder / name
        with (folder / f"{name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not path.exists():
                make(folder / f"{name}.part")
                (folder / f"{name}.part").rename(path)
        return path

    return made


@pytest.fixture(scope="session")
def pbmc_tokenizer(read: Callable, once: Callable):
    """A tokenizer fitted briefly on real PBMC, of two studies with different genes."""
    from rvqa.tokenizer.model import CellTokenizer
    from rvqa.training.references import read_reference
    from rvqa.training.tokenizer.settings import TokenizerSettings

    def fit(path: Path) -> None:
        references = [
            read_reference(read("pbmc3k_10x"), name="pbmc3k", labels="cell_type"),
            read_reference(read("kang2018_ifnb_pbmc_2k"), name="kang", labels="cell_type"),
        ]
        tokenizer = CellTokenizer.fit(references, TokenizerSettings(epochs=15, batch_size=128), progress=False)
        tokenizer.save_pretrained(path)

    return CellTokenizer.from_pretrained(once("pbmc_tokenizer", fit))


@pytest.fixture(scope="session")
def shipped(tmp_path_factory: pytest.TempPathFactory):
    """Case of the demo without a data folder: 700 real PBMC of scanpy with a simulated response."""
    from rvqa.demo import shipped_case

    return shipped_case(seed=0)


@pytest.fixture(scope="session")
def model_path(shipped, once: Callable) -> Path:
    """Directory of a real but small and poor model, fitted briefly on those cells."""
    from rvqa.training.fit import FitSettings
    from rvqa.training.language.cpt import LanguageSettings
    from rvqa.training.tokenizer.settings import TokenizerSettings

    settings = FitSettings(tokenizer=TokenizerSettings(epochs=60), language=LanguageSettings(steps=150, batch_size=64))
    return once("model", lambda path: fit_shipped(shipped, settings).save_pretrained(path))


@pytest.fixture(scope="session")
def model(model_path):
    """The model in that directory."""
    import rvqa

    return rvqa.load(model_path)


def fit_shipped(shipped, settings):
    """A model fitted on the cells of `shipped`."""
    from rvqa.training.fit import fit_files

    return fit_files(
        shipped.references,
        names=shipped.names,
        labels="label",
        condition="condition",
        control="control",
        library_size_key="depth",
        settings=settings,
        progress=False,
    )


@pytest.fixture
def rvqa_cli(monkeypatch, capsys):
    """Run the command line in this process; return exit code, standard output and standard error."""
    from rvqa import cli
    from rvqa.io import outcomes

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["rvqa", *map(str, arguments)])
        outcomes.written.clear()
        outcomes.resumable.clear()
        code = 0
        capsys.readouterr()
        try:
            cli.main()
        except SystemExit as end:
            code = end.code or 0
        said = capsys.readouterr()
        return SimpleNamespace(code=code, out=said.out, err=said.err)

    return run
