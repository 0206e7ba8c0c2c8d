"""`rvqa doctor`: it always gives its facts, as aligned text and as JSON, and never a traceback."""

import json
import os
import platform
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version

import pytest
import torch

from rvqa import doctor
from rvqa.kernels import registry
from tests.kernels.test_registry import forget


@pytest.fixture(autouse=True)
def bare(monkeypatch):
    """Remove this machine's settings."""
    for name in ("RVQA_BACKEND", "RVQA_DATA_DIR", "RVQA_REF_DIR"):
        monkeypatch.delenv(name, raising=False)


def command(*arguments, code, **environment):
    done = subprocess.run(
        [sys.executable, "-m", "rvqa", "doctor", *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, **environment},
    )
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    return done.stdout


def value(facts, name):
    """Return the first value beside a name in the text: the package comes before the backend of that name."""
    lines = [line for line in doctor.text(facts).splitlines() if line.startswith(f"  {name} ")]
    assert lines
    return lines[0][17:]


def test_command(rvqa_cli):
    facts = json.loads(command("--json", code=0))
    assert facts["backends"]["reference"] is None
    assert facts["packages"]["torch"] == torch.__version__
    assert facts["python"] == platform.python_version()
    done = rvqa_cli("doctor")
    assert done.code == 0
    assert done.out.endswith("usable: no problem found\n")


def test_nonsense_in_the_environment_is_told(tmp_path, monkeypatch, rvqa_cli):
    nowhere = str(tmp_path / "nowhere")
    wrong = {"RVQA_BACKEND": "nonsense", "RVQA_DATA_DIR": nowhere, "RVQA_REF_DIR": nowhere, "OMP_NUM_THREADS": "many"}
    facts = json.loads(command("--json", code=1, **wrong))
    assert "'nonsense' is not a backend" in facts["problems"][0]
    assert facts["backend"]["cpu_tensors"] is None
    assert facts["data"]["RVQA_DATA_DIR"] == {"path": nowhere, "exists": False, "h5ad": 0}
    assert "RVQA_REF_DIR" in facts["advice"][1]
    for name, text in wrong.items():
        monkeypatch.setenv(name, text)
    done = rvqa_cli("doctor")
    assert done.code == 1
    assert "PROBLEM: RVQA_BACKEND='nonsense'" in done.out
    assert done.out.count("does not exist") == 4
    assert "Traceback" not in done.err


def test_folders(tmp_path, monkeypatch):
    monkeypatch.setenv("RVQA_DATA_DIR", str(tmp_path))
    (tmp_path / "cells.h5ad").touch()
    (tmp_path / "label_to_cl.json").touch()
    facts = doctor.report()
    assert value(facts, "RVQA_DATA_DIR").endswith(": 1 .h5ad files")
    assert value(facts, "RVQA_REF_DIR") == "not set"
    monkeypatch.setenv("RVQA_REF_DIR", str(tmp_path))
    facts = doctor.report()
    assert value(facts, "RVQA_REF_DIR").endswith(": label_to_cl.json")
    assert value(facts, "gene aliases").startswith("none")
    assert facts["problems"] == []


def test_table_of_aliases(ref_dir, tmp_path, monkeypatch):
    monkeypatch.setenv("RVQA_REF_DIR", str(ref_dir))
    assert "HGNC" in value(doctor.report(), "gene aliases")
    monkeypatch.setenv("RVQA_REF_DIR", str(tmp_path))
    (tmp_path / "hgnc_complete_set.txt").write_text("not\tthat\n")
    assert "hgnc_complete_set.txt" in doctor.report()["problems"][0], "every command would stop at it"


def test_without_optional_packages(monkeypatch):
    def only_required(package):
        if package in doctor.OPTIONAL:
            raise PackageNotFoundError(package)
        return version(package)

    monkeypatch.setattr(doctor, "version", only_required)
    facts = doctor.report()
    assert {value(facts, package) for package in doctor.OPTIONAL} == {"not installed"}
    assert facts["problems"] == []


def test_without_torch(monkeypatch):
    for name in ("torch", "rvqa.kernels.registry"):
        monkeypatch.setitem(sys.modules, name, None)
    facts = doctor.report()
    assert facts["backends"] == {}
    assert "torch" in facts["problems"][0]
    assert "PROBLEM" in doctor.text(facts)


@pytest.fixture
def without_native(monkeypatch):
    forget()
    monkeypatch.setitem(registry._MODULES, "cpu", "rvqa.kernels.not_built")
    yield
    forget()


@pytest.mark.usefixtures("without_native")
def test_without_native_module(monkeypatch):
    facts = doctor.report()
    assert value(facts, "cpu").startswith("not live: No module named")
    assert value(facts, "in use").startswith("reference")
    assert "same codes, more slowly" in facts["advice"][0]
    assert facts["problems"] == []
    monkeypatch.setenv("RVQA_BACKEND", "cpu")
    assert "RVQA_BACKEND=cpu cannot be used" in doctor.report()["problems"][0]


def test_other_systems(monkeypatch, tmp_path):
    """There is no /proc, affinity or sysconf, as on macOS and elsewhere."""
    monkeypatch.setattr(doctor, "_proc", lambda path: {})
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.delattr(os, "sysconf", raising=False)
    monkeypatch.setattr(platform, "processor", lambda: "arm")
    facts = doctor.report()
    assert facts["memory_gib"] == {"total": None, "available": None}
    assert value(facts, "CPU").startswith("arm; no vector instructions known")
    assert facts["problems"] == []


class TestGpu:
    """Simulated GPUs, as torch and the driver report them."""

    @pytest.fixture(autouse=True)
    def smi(self, tmp_path, monkeypatch):
        self.monkeypatch = monkeypatch
        self.command = tmp_path / "nvidia-smi"
        monkeypatch.setattr(torch.version, "cuda", "13.0")
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        monkeypatch.setattr(doctor.shutil, "which", lambda name: str(self.command) if self.command.exists() else None)

    def install(self, script):
        self.command.write_text(f"#!/bin/sh\n{script}\n")
        self.command.chmod(0o755)

    def test_no_driver(self):
        assert value(doctor.report(), "GPU") == "none: no NVIDIA driver answers"
        self.install("exit 9")
        assert value(doctor.report(), "GPU") == "none: no NVIDIA driver answers"

    def test_torch_without_cuda(self):
        self.install("echo 580.1")
        self.monkeypatch.setattr(torch.version, "cuda", None)
        assert "without CUDA, though the driver sees a GPU" in value(doctor.report(), "GPU")

    def test_driver_too_old(self):
        self.install("echo 470.1")

        def too_old():
            doctor.warnings.warn("The NVIDIA driver is too old", stacklevel=1)
            return False

        self.monkeypatch.setattr(torch.cuda, "is_available", too_old)
        assert value(doctor.report(), "GPU") == "none: torch finds none that works: The NVIDIA driver is too old"

    def test_usable(self):
        self.install("echo 580.1")
        properties = type("Properties", (), {"name": "NVIDIA H200", "total_memory": 140 * 2**30})
        self.monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        self.monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
        self.monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
        assert value(doctor.report(), "GPU") == "NVIDIA H200, 140.0 GiB, driver 580.1"
