"""The encoder of one file: its panel's bias folded once, rows to codes after that."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from rvqa.data.alignment import GeneAlignment
from rvqa.data.depth import TARGET_SUM
from rvqa.kernels import ops

if TYPE_CHECKING:
    from rvqa.tokenizer.model import CellTokenizer

TILE = 256
"""Rows of one matrix product after `csr_project`. Always this many, padded: a library picks its summation order by the
shape it sees, so a fixed shape makes a cell's latent depend on that cell alone."""


class PanelEncoder:
    """A tokenizer made ready for the cells of one file; several threads may use it at once.

    Parameters
    ----------
    tokenizer
        Not changed afterwards: its weights are taken now.
    alignment
        Result of `rvqa.data.alignment.align` for the file and the tokenizer's axis.
    """

    @torch.inference_mode()
    def __init__(self, tokenizer: CellTokenizer, alignment: GeneAlignment) -> None:
        project, scale_G = tokenizer.project, tokenizer.gene_scale_G.double()
        self.weight_GH = (project.weight.double() / scale_G).float().T.contiguous()
        self.bias_H = tokenizer.panel_bias(alignment.measured)
        self.column_map = torch.tensor(alignment.column_map, device=project.weight.device)
        self.tail, self.latent_width, self.tables = tokenizer.eval().tail, tokenizer.config.latent, tokenizer.tables

    @torch.inference_mode()
    def latent(self, indptr: Tensor, indices: Tensor, data: Tensor, depth: Tensor) -> Tensor:
        """Latents float32 [N, D] of the rows of a CSR matrix and their depth; see `ops.csr_project` and `tail`."""
        hidden_NH = ops.csr_project(
            indptr,
            indices,
            data,
            self.weight_GH,
            self.bias_H,
            target_sum=TARGET_SUM,
            column_map=self.column_map,
            library_size=depth,
        )
        latent_ND = hidden_NH.new_empty(len(hidden_NH), self.latent_width)
        for start in range(0, len(hidden_NH), TILE):
            rows_BH = hidden_NH[start : start + TILE]
            if len(rows_BH) < TILE:
                tile_TH = hidden_NH.new_zeros(TILE, hidden_NH.shape[1])
                tile_TH[: len(rows_BH)] = rows_BH
                latent_ND[start:] = self.tail(tile_TH)[: len(rows_BH)]
            else:
                latent_ND[start : start + TILE] = self.tail(rows_BH)
        return latent_ND

    def codes(self, indptr: Tensor, indices: Tensor, data: Tensor, depth: Tensor) -> np.ndarray:
        """Codes uint8 [N, M]; arguments as for `latent`."""
        return ops.residual_quantize(self.latent(indptr, indices, data, depth), self.tables).cpu().numpy()
