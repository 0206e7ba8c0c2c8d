"""The `backend` fixture: a test that asks for it runs once on every CPU backend, forced by RVQA_BACKEND."""

import pytest

from rvqa.kernels import registry


@pytest.fixture(params=["reference", "cpu"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    reason = registry.backends()[request.param]
    if reason is not None:
        pytest.skip(f"backend {request.param} is not live: {reason}")
    monkeypatch.setenv("RVQA_BACKEND", request.param)
    return request.param
