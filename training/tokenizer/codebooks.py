"""Codebooks at their start and at their end: k-means, and codewords that no cell uses."""

import numpy as np
import torch
from torch import Tensor

from rvqa.kernels import ops

_ROUNDING = 1e-5
"""Distance from a codeword, relative to a latent's length, below which a latent only repeats the codeword: some hundred
times what latents differ by between machines."""


def k_means(rows_ND: Tensor, n_clusters: int, rng: np.random.Generator, *, rounds: int = 15) -> Tensor:
    """Codewords [K, D] by k-means++ and Lloyd; a cluster that loses all its rows keeps its place."""
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

    Levels follow each other, because a codeword changes the residuals of later levels only. At each level an unused
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
