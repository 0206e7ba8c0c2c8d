"""rvqa: single cells as ten tokens that a language model reads and writes.

Six functions make the public API: `load`, `encode`, `decode`, `annotate`, `perturb`, `open_codes`. They are imported on
first use, so `import rvqa` costs no torch import.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rvqa.annotation import annotate
    from rvqa.atlas.reader import open_codes
    from rvqa.encoding import decode, encode
    from rvqa.language.model import load
    from rvqa.perturbation import perturb

__version__ = "0.1.0"
__all__ = ["annotate", "decode", "encode", "load", "open_codes", "perturb"]

_HOME = {
    "annotate": "rvqa.annotation",
    "open_codes": "rvqa.atlas.reader",
    "decode": "rvqa.encoding",
    "encode": "rvqa.encoding",
    "load": "rvqa.language.model",
    "perturb": "rvqa.perturbation",
}


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    raise AttributeError(f"module 'rvqa' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
