"""The `backend` fixture: it runs a test once on each backend that a CPU can run, forced by RVQA_BACKEND.

With RVQA_TEST_CUDA=1 (`make test-cuda`) these include CUDA C++, under the emulation of tests/cuda.
"""

import os

import pytest

from rvqa.kernels import registry
from tests.cuda import emulated

BACKENDS = ["reference", "cpu", *(["cuda"] if os.environ.get("RVQA_TEST_CUDA") == "1" else [])]


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "cuda":
        emulated.require()
    elif (reason := registry.backends()[request.param]) is not None:
        pytest.skip(f"backend {request.param} is not live: {reason}")
    monkeypatch.setenv("RVQA_BACKEND", request.param)
    return request.param
