"""Tests of a real vLLM: `make test-serve` runs them, in an environment of its own; elsewhere they are not collected."""

import os
from importlib.util import find_spec
from pathlib import Path

import pytest

if find_spec("vllm") is None:
    collect_ignore_glob = ["test_*.py"]

# Read when vLLM is imported: a small cache, no downloads, the engine in this process.
os.environ.update(VLLM_CPU_KVCACHE_SPACE="1", HF_HUB_OFFLINE="1", VLLM_ENABLE_V1_MULTIPROCESSING="0")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")


@pytest.fixture(scope="session")
def model_dir():
    """The model that tests/vllm/model.py fitted, in an environment with what training needs."""
    return Path(os.environ["RVQA_SERVE_MODEL"])


@pytest.fixture(scope="session")
def held_out_all(read):
    """Cells of donors that the model has not seen."""
    cells = read("kang2018_ifnb_pbmc_2k")
    return cells[cells.obs["donor"].astype(str).isin(["1244", "1256"])].copy()


@pytest.fixture(scope="session")
def held_out(held_out_all):
    """The control cells among them."""
    return held_out_all[held_out_all.obs["perturbation"] == "control"].copy()
