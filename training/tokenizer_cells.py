"""The cells a tokenizer is fitted on, all files on one axis, and their latents."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import scipy.sparse as sp
import torch
from torch import Tensor

from rvqa.counts import log1p_normalise
from rvqa.errors import about
from rvqa.genes import GeneAxis
from rvqa.tokenizer import CellTokenizer
from rvqa.training.reference import Reference


@dataclass(frozen=True)
class TokenizerCells:
    """Cells on one axis: counts int-valued float32 CSR [N, G], library sizes [N], measured genes and labels by cell."""

    counts: sp.csr_matrix
    library_size: np.ndarray
    measured_FG: np.ndarray
    """bool, one row a file."""
    file_N: np.ndarray
    label_N: np.ndarray
    """Index of the label, -1 where unlabelled."""
    n_labels: int
    condition_N: np.ndarray
    """Perturbation, object [N]; "" for control cells."""


def gather(references: Sequence[Reference], axis: GeneAxis) -> TokenizerCells:
    """Put the cells of several files on one axis.

    Raises
    ------
    rvqa.errors.InputError
        A file with too few genes of the axis.
    """
    mapped = []
    for reference in references:
        with about(reference.name):
            mapped.append(reference.on(axis))
    names = sorted({label for reference in references for label in reference.labels if label})
    index = {name: i for i, name in enumerate(names)} | {"": -1}
    return TokenizerCells(
        counts=sp.vstack([counts for counts, _ in mapped], format="csr"),
        library_size=np.concatenate([reference.library_size for reference in references]),
        measured_FG=np.stack([alignment.measured for _, alignment in mapped]),
        file_N=np.repeat(np.arange(len(references)), [counts.shape[0] for counts, _ in mapped]),
        label_N=np.array([index[label] for reference in references for label in reference.labels]),
        n_labels=len(names),
        condition_N=np.concatenate([np.asarray(reference.conditions, dtype=object) for reference in references]),
    )


@torch.inference_mode()
def latent_blocks(
    tokenizer: CellTokenizer, cells: TokenizerCells, which: slice | None = None
) -> Iterator[tuple[slice, Tensor]]:
    """Latents [B, D] of rows by the layers as trained (dense); equal to `CellTokenizer.latent` up to rounding."""
    tokenizer.eval()
    first, last, _ = (which or slice(None)).indices(len(cells.library_size))
    device = tokenizer.gene_mean_G.device
    for start in range(first, last, 1024):
        rows = slice(start, min(start + 1024, last))
        measured_BG = torch.from_numpy(cells.measured_FG[cells.file_N[rows]]).to(device)
        log1p_BG = torch.from_numpy(log1p_normalise(cells.counts[rows], cells.library_size[rows]).toarray()).to(device)
        yield rows, tokenizer.encode_dense(tokenizer.standardise(log1p_BG, measured_BG))


def latents(tokenizer: CellTokenizer, cells: TokenizerCells) -> Tensor:
    """Latents [N, D] of all cells."""
    return torch.cat([latent_BD for _, latent_BD in latent_blocks(tokenizer, cells)])
