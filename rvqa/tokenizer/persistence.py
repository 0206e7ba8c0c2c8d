"""What is read of a tokenizer's directory, checked."""

from pathlib import Path

import numpy as np
from torch import Tensor

from rvqa.data.depth import GeneShares
from rvqa.data.genes import GeneAxis
from rvqa.errors import InputError, about
from rvqa.io import cell_tables
from rvqa.io.json_text import shown
from rvqa.io.tensors import LARGEST_VALUE, LONGEST_NAME, REPAIR


def read_genes(path: Path) -> tuple[GeneAxis, GeneShares]:
    """The axis of a tokenizer, and the shares of counts of all genes that the fit knew."""
    with cell_tables.reading(path, "a table of genes"):
        # Without pandas' own notes in the file: nothing but its four columns is wanted.
        frame = cell_tables.whole_parquet(path).to_pandas(ignore_metadata=True)
    longest = max((len(text) for name in frame for text in frame[name] if isinstance(text, str)), default=0)
    if longest > LONGEST_NAME:
        raise InputError(f"{path} holds a text of {longest:,} characters; at most {LONGEST_NAME:,}. {REPAIR}")
    with about(path):
        known = GeneAxis.from_frame(frame)
        kinds = {name: frame[name].dtype.kind if name in frame else "" for name in ("share", "on_axis")}
        if kinds != {"share": "f", "on_axis": "b"}:
            raise InputError(
                f"The table of genes has the columns {shown(list(frame.columns))}, but no share and on_axis. {REPAIR}"
            )
        share_G = frame["share"].to_numpy(dtype=np.float64)
        if not (np.isfinite(share_G).all() and (share_G > 0).all() and abs(share_G.sum() - 1) < 1e-6):
            raise InputError(f"The shares of the genes are not positive numbers that add up to 1. {REPAIR}")
        return known.subset(frame["on_axis"].to_numpy()), GeneShares(known, share_G)


def require_values(path: Path, tensors: dict[str, Tensor]) -> None:
    """Reject values that no fit ends with, and that would make latents, codes or counts infinite or NaN."""
    for name, tensor in tensors.items():
        low, high = {"gene_scale_G": (1 / LARGEST_VALUE, LARGEST_VALUE), "dispersion_G": (0.0, LARGEST_VALUE)}.get(
            name, (-LARGEST_VALUE, LARGEST_VALUE)
        )
        seen = (float(tensor.min()), float(tensor.max()))
        if not low <= seen[0] <= seen[1] <= high:
            raise InputError(
                f"{path}: {name!r} holds values from {seen[0]:g} to {seen[1]:g}; expected {low:g} to {high:g}. {REPAIR}"
            )
