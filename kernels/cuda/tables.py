"""Tables that the CUDA kernels derive from codebooks: float16 codewords and the bound of their certificate.

With r the residual in float32, the score of a codeword from float16 operands is off by at most half of

    tau = alpha_m (|r| + |r - r16|) + kappa_m (|r - r16| + drift) + beta_m      drift: of r from the exact residual

in whatever order tensor cores add, and even if they truncate: bound (5), proven in docs/exactness.md.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from rvqa.kernels import reference

CHUNK = 32
"""Number of codewords scored together (`csrc/cuda/codes.h`)."""

_MOST_SHIFT = 100
"""Largest power of two, up or down, that brings codewords into the range of float16 with a certificate."""

_UNIT = 2.0**-24
"""Unit roundoff of float32."""


class Tables(NamedTuple):
    """Tensors on the device of the codebooks, in the order in which the kernels take them."""

    codebooks_MKD: Tensor
    half: Tensor
    """float16 [M, K', D'], codewords times 2^shift; K and D are rounded up to 32 and 16 with zeros."""
    shift_M: Tensor
    bias: Tensor
    """|c|^2 in float32 [M, K']; infinity for codewords that are absent or repeat one of lower index."""
    bound_M3: Tensor
    """alpha, kappa and beta of every level, rounded up to float32."""
    norm_MK: Tensor
    """|c| in float64."""


def prepare_tables(codebooks_MKD: Tensor, levels: int) -> Tables:
    """Make tables of the leading levels of float32 codebooks, on their device."""
    codebooks_MKD = codebooks_MKD[:levels].contiguous()
    (M, K, D), device = codebooks_MKD.shape, codebooks_MKD.device
    wide, padded = -(-K // CHUNK) * CHUNK, -(-D // 16) * 16
    c_MKD = codebooks_MKD.double()
    square_MK, norm_MK = (c_MKD * c_MKD).sum(2), c_MKD.norm(dim=2)
    repeated_MK = torch.stack([reference._repeated(c_KD) for c_KD in codebooks_MKD])
    largest_M = codebooks_MKD.abs().amax((1, 2)).double()
    exponent_M = torch.frexp(largest_M).exponent - 1
    shift_M = torch.where(largest_M > 0, 14 - exponent_M, 0).to(torch.int32)
    able = bool((shift_M.abs() <= _MOST_SHIFT).all())
    shift_M = shift_M.clamp(-_MOST_SHIFT, _MOST_SHIFT)
    scale_M11 = torch.ldexp(torch.ones(M, dtype=torch.float64, device=device), shift_M)[:, None, None]
    half = torch.zeros(M, wide, padded, dtype=torch.float16, device=device)
    half[:, :K, :D] = (c_MKD * scale_M11).half()
    lost_MK = (c_MKD - half[:, :K, :D].double() / scale_M11).norm(dim=2)
    bias = torch.full((M, wide), math.inf, dtype=torch.float32, device=device)
    bias[:, :K] = square_MK.float().masked_fill(repeated_MK, math.inf)
    table_M = square_MK.amax(1)
    bound_M3 = error_bound(D, norm_MK.amax(1), lost_MK.amax(1), table_M)
    if not able or not bool((table_M < 2.0**124).all()):
        bound_M3 = torch.full_like(bound_M3, math.inf)
    return Tables(codebooks_MKD, half, shift_M, bias, _round_up(bound_M3), norm_MK)


def error_bound(D: int, norm_M: Tensor, lost_M: Tensor, table_M: Tensor) -> Tensor:
    """Float64 alpha, kappa and beta [M, 3] of bound (5).

    Parameters
    ----------
    D
        Latent width.
    norm_M
        Largest |c| of each level.
    lost_M
        Largest |c - c16| of each level.
    table_M
        Largest |c|^2 of each level.
    """
    u, v = _UNIT, 2.0**-53
    norm_M, lost_M, table_M = (each * (1 + 1e-9) for each in (norm_M, lost_M, table_M))
    adding = 3 * u / (1 - 3 * u)
    chain = (D + -(-D // 16) + 4) * 2.0**-23  # of a dot product on tensor cores, over the sum of |products|
    slack = 2 * (1 + 2.0**-20)
    reach_M = norm_M + lost_M
    alpha_M = slack * (2 * lost_M + 2 * chain * reach_M + 2 * adding * (1 + chain) * reach_M)
    kappa_M = slack * 2 * norm_M
    rounded_M = 4 * (D + 8) * v * norm_M**2  # of the table in float64
    beta_M = slack * ((u + adding) * table_M + rounded_M + 2.0**-126 * (4 * D + 16))
    return torch.stack([alpha_M, kappa_M, beta_M], 1)


def _round_up(value: Tensor) -> Tensor:
    near = value.float()
    return torch.where(near.double() < value, torch.nextafter(near, torch.full_like(near, math.inf)), near)
