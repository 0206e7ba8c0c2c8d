"""Tests of a real vLLM: `make test-serve` runs them in a separate environment; elsewhere they are not collected."""

import os
from importlib.util import find_spec
from pathlib import Path

import pytest

if find_spec("vllm") is None:
    collect_ignore_glob = ["test_*.py"]

# vLLM reads these on import: a small cache, no downloads, the engine in this process.
os.environ.update(VLLM_CPU_KVCACHE_SPACE="1", HF_HUB_OFFLINE="1", VLLM_ENABLE_V1_MULTIPROCESSING="0")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")


@pytest.fixture(scope="session")
def model_dir():
    """Directory of the model that tests/vllm/model.py fitted, in an environment that can train."""
    return Path(os.environ["RVQA_SERVE_MODEL"])


@pytest.fixture(scope="session")
def held_out_all(read):
    """Cells of donors that the fit did not use."""
    cells = read("kang2018_ifnb_pbmc_2k")
    return cells[cells.obs["donor"].astype(str).isin(["1244", "1256"])].copy()


@pytest.fixture(scope="session")
def held_out(held_out_all):
    """Control cells of those donors."""
    return held_out_all[held_out_all.obs["perturbation"] == "control"].copy()
