"""Opens the program that runs the language model."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rvqa.errors import InputError
from rvqa.serving.asks import Engine, without_password

if TYPE_CHECKING:
    from rvqa.language.model import Model


def open_engine(model: Model, engine: str | Engine) -> Engine:
    """Return the engine of a name: "hf", "vllm", or the address of a server, "http://..."; an engine as it is.

    Raises
    ------
    InputError
        Another name, no vLLM, or a server that is not there or serves another model.
    """
    if not isinstance(engine, str):
        return engine
    if engine == "hf":
        from rvqa.serving.hf import HuggingFace

        return HuggingFace(model)
    if engine == "vllm":
        from rvqa.serving.offline import Offline

        return Offline(model)
    if engine.startswith(("http://", "https://")):
        from rvqa.serving.client import Client

        return Client(model, engine)
    raise InputError(
        f"There is no engine {without_password(engine)!r}; expected hf, vllm, or a server's address, such as "
        "http://host:8000."
    )
