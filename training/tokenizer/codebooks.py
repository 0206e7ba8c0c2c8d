"""Codebooks of a fit: k-means at the start, then moving averages, and at the end every unused codeword moves."""

import numpy as np
import torch
from torch import Tensor

from rvqa.kernels import ops
from rvqa.tokenizer.model import CellTokenizer
from rvqa.training.distributed import Processes
from rvqa.training.tokenizer.cells import Gathered, latents
from rvqa.training.tokenizer.settings import TokenizerSettings

_ROUNDING = 1e-5
"""Distance from a codeword, relative to a latent's length, below which a latent only repeats the codeword. It is some
hundred times the difference of latents between machines."""


class MovingCodebooks:
    """Codebooks of a tokenizer while they move with the batches.

    Parameters
    ----------
    tokenizer
        Tokenizer whose codebooks change in place.
    settings
        Decay of the averages, and the usage below which a codeword is replaced.
    processes
        Processes that share the work. Rank 0 makes all random draws.
    rng
        Generator of k-means and of the residuals that replace codewords.
    """

    def __init__(
        self,
        tokenizer: CellTokenizer,
        settings: TokenizerSettings,
        processes: Processes,
        rng: np.random.Generator,
    ) -> None:
        self.tokenizer, self.settings, self.processes, self.rng = tokenizer, settings, processes, rng
        shape, device = (settings.levels, settings.entries), processes.device
        self.usage_MK = torch.ones(shape, device=device)
        self.sum_MKD = torch.zeros(*shape, settings.latent, device=device)

    def start(self, cells: Gathered) -> None:
        """Start each level by k-means++ and 15 rounds of Lloyd on its residuals, over at most 20,000 cells."""
        codebooks_MKD = torch.zeros(self.tokenizer.codebooks_MKD.shape)
        if self.processes.first:
            residual_ND = latents(self.tokenizer, cells).cpu()
            if len(residual_ND) > 20_000:
                residual_ND = residual_ND[self.rng.choice(len(residual_ND), 20_000, replace=False)]
            for level in range(self.settings.levels):
                codebook_KD = k_means(residual_ND, self.settings.entries, self.rng)
                codebooks_MKD[level] = codebook_KD
                residual_ND = residual_ND - codebook_KD[ops.nearest_codeword(residual_ND, codebook_KD)[0]]
        self.tokenizer.codebooks_MKD.copy_(self.processes.broadcast_(codebooks_MKD.to(self.processes.device)))
        self.sum_MKD.copy_(self.tokenizer.codebooks_MKD)

    @torch.no_grad()
    def quantize(self, latent_BD: Tensor) -> tuple[Tensor, Tensor]:
        """Quantize, then move the codebooks; return the full sums, and sums that stop at a random depth for half."""
        settings, codebooks_MKD = self.settings, self.tokenizer.codebooks_MKD
        codes_BM = ops.residual_quantize(latent_BD, self.tokenizer.tables).long()
        full_depth = torch.rand(len(latent_BD)) < 0.5  # drawn on the CPU, whatever the device
        depth_B = torch.where(full_depth, settings.levels, torch.randint(1, settings.levels + 1, (len(latent_BD),)))
        depth_B = depth_B.to(latent_BD.device)
        residual_BD, prefix_BD = latent_BD.clone(), torch.zeros_like(latent_BD)
        residual_MBD = []
        used_MK, sum_MKD = torch.zeros_like(self.usage_MK), torch.zeros_like(self.sum_MKD)
        for level in range(settings.levels):
            codes_B = codes_BM[:, level]
            chosen_BD = codebooks_MKD[level, codes_B]
            residual_MBD.append(residual_BD.clone())
            used_MK[level] = torch.bincount(codes_B, minlength=settings.entries)
            sum_MKD[level].index_add_(0, codes_B, residual_BD)
            residual_BD -= chosen_BD
            prefix_BD += chosen_BD * (depth_B > level)[:, None]
        self._move(used_MK, sum_MKD, residual_MBD)
        return latent_BD - residual_BD, prefix_BD

    def _move(self, used_MK: Tensor, sum_MKD: Tensor, residual_MBD: list[Tensor]) -> None:
        """Update moving averages over all processes; rank 0 draws residuals that replace unused codewords."""
        settings = self.settings
        self.usage_MK.lerp_(self.processes.sum_(used_MK), 1 - settings.decay)
        self.sum_MKD.lerp_(self.processes.sum_(sum_MKD), 1 - settings.decay)
        unused = torch.nonzero(self.usage_MK < settings.dead_below)
        if len(unused):
            drawn_ND = torch.zeros(len(unused), settings.latent, device=self.processes.device)
            if self.processes.first:
                for row, level in enumerate(unused[:, 0].tolist()):
                    drawn_ND[row] = residual_MBD[level][int(self.rng.integers(len(residual_MBD[level])))]
            self.sum_MKD[unused[:, 0], unused[:, 1]] = self.processes.broadcast_(drawn_ND)
            self.usage_MK[unused[:, 0], unused[:, 1]] = 1.0
        self.tokenizer.codebooks_MKD.copy_(self.sum_MKD / self.usage_MK[:, :, None])


def k_means(rows_ND: Tensor, n_clusters: int, rng: np.random.Generator, *, rounds: int = 15) -> Tensor:
    """Return codewords [K, D] by k-means++ and Lloyd; a cluster that loses all its rows keeps its centre."""
    first = int(rng.integers(len(rows_ND)))
    codebook_KD = rows_ND[[first]]
    distance_N = ((rows_ND - codebook_KD) ** 2).sum(1)
    while len(codebook_KD) < n_clusters:
        weight = distance_N.double().numpy() + 1e-12
        following = rows_ND[[int(rng.choice(len(weight), p=weight / weight.sum()))]]
        distance_N = torch.minimum(distance_N, ((rows_ND - following) ** 2).sum(1))
        codebook_KD = torch.cat([codebook_KD, following])
    for _ in range(rounds):
        index_N, _ = ops.nearest_codeword(rows_ND, codebook_KD)
        count_K = torch.bincount(index_N, minlength=n_clusters)[:, None]
        sum_KD = torch.zeros_like(codebook_KD).index_add_(0, index_N, rows_ND)
        codebook_KD = torch.where(count_K > 0, sum_KD / count_K.clamp_min(1), codebook_KD)
    return codebook_KD


@torch.no_grad()
def fill_codebooks(codebooks_MKD: Tensor, latent_ND: Tensor) -> None:
    """Move unused codewords, in place, so that every code of every level is the code of at least one latent.

    Levels are filled in order, because a codeword changes the residuals of later levels only. At each level an unused
    codeword moves onto the residual that lies farthest from all codewords, until every codeword is used. No distance
    ever grows, because an unused codeword is nearest to no residual.

    A level ends after at most K rounds, because every round fixes at least one codeword: the residual that it moved
    onto keeps it in use, and later codewords land elsewhere. Codewords stay unused only where every residual lies on a
    codeword already, that is, where a level has fewer distinct residuals than codewords.

    Parameters
    ----------
    codebooks_MKD
        Codewords, float32, on the CPU.
    latent_ND
        Latents, float32, on the CPU.
    """
    levels, entries, _ = codebooks_MKD.shape
    residual_ND, length_N = latent_ND.clone(), latent_ND.square().sum(1)
    for level in range(levels):
        least_N = _ROUNDING**2 * torch.maximum(length_N, residual_ND.square().sum(1))
        for _ in range(entries + 1):
            codes_N = ops.residual_quantize(latent_ND, ops.prepare(codebooks_MKD), level + 1)[:, level].long()
            if not _move_unused(codebooks_MKD[level], codes_N, residual_ND, least_N):
                break
        residual_ND -= codebooks_MKD[level, codes_N]


def _move_unused(codebook_KD: Tensor, codes_N: Tensor, residual_ND: Tensor, least_N: Tensor) -> bool:
    """Move each unused codeword onto the farthest residual; returns whether any codeword moved."""
    moved = False
    distance_N = (residual_ND - codebook_KD[codes_N]).square().sum(1)
    for code in torch.nonzero(torch.bincount(codes_N, minlength=len(codebook_KD)) == 0).flatten().tolist():
        farthest = int(torch.where(distance_N > least_N, distance_N, 0.0).argmax())
        if distance_N[farthest] <= least_N[farthest]:
            break
        codebook_KD[code] = residual_ND[farthest]
        distance_N = torch.minimum(distance_N, (residual_ND - residual_ND[farthest]).square().sum(1))
        moved = True
    return moved
