"""Cells as a fit reads them: at random depths and on random panels, so that codes depend on neither."""

import numpy as np
import torch
from torch import Tensor

from rvqa.data.depth import log1p_normalise
from rvqa.tokenizer.model import CellTokenizer
from rvqa.training.tokenizer.cells import Gathered
from rvqa.training.tokenizer.settings import TokenizerSettings


class Augmentation:
    """Draws how cells are read.

    Parameters
    ----------
    tokenizer
        Tokenizer whose standardised input is made, on its device.
    cells
        Cells of the fit.
    settings
        Shares of batches that are thinned and that lose genes.
    rng
        Generator of all draws.
    """

    def __init__(
        self, tokenizer: CellTokenizer, cells: Gathered, settings: TokenizerSettings, rng: np.random.Generator
    ) -> None:
        self.tokenizer, self.cells, self.settings, self.rng = tokenizer, cells, settings, rng

    def read(self, rows: np.ndarray, *, always: bool = False) -> Tensor:
        """Return dense standardised input [B, G]; `always` thins and cuts each batch, not only a share of them."""
        settings, rng, cells = self.settings, self.rng, self.cells
        counts, library_B = cells.counts[rows], cells.library_size[rows]
        measured_BG = torch.from_numpy(cells.measured_FG[cells.file_N[rows]])
        if always or rng.random() < settings.thinning:
            keep = rng.uniform(0.3, 1.0)
            counts, library_B = counts.copy(), library_B * keep
            counts.data = rng.binomial(counts.data.astype(np.int64), keep).astype(np.float32)
        log1p_BG = torch.from_numpy(log1p_normalise(counts, library_B).toarray())
        if always or rng.random() < settings.panel_dropout:
            share = rng.uniform(0.15, 1.0)
            measured_BG = measured_BG & torch.from_numpy(rng.random(measured_BG.shape[1]) < share)
        device = self.tokenizer.gene_mean_G.device
        return self.tokenizer.standardise(log1p_BG.to(device), measured_BG.to(device))
