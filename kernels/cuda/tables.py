"""Tables that the CUDA kernels derive from codebooks: float16 codewords and the bound of their certificate.

With r the residual in float32, scaled like its codebook, the score of a codeword from float16 operands is off by at
most half of

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

_MOST_SHIFT = 60
"""Largest power of two, up or down, that brings codewords into the range of float16 with a certificate."""

_UNIT = 2.0**-24
"""Unit roundoff of float32."""


class Tables(NamedTuple):
    """Tensors on the device of the codebooks, in the order in which the kernels take them."""

    codebooks: Tensor
    """float32 [M, K, D']; zeros beyond D."""
    columns: Tensor
    """The same as [M, D, K']; K' is K rounded up to 32 with zeros."""
    half: Tensor
    """float16 of -2 c scale, [M, K' / 32, D' / 16, 2, 32, 8], in the order of the lanes of `csrc/cuda/certify.cu`."""
    scale_M: Tensor
    """Powers of two that bring the largest value of a codebook to [16, 32)."""
    bias: Tensor
    """|c|^2 scale^2 in float32 [M, K']; infinity for codewords that are absent or repeat one of lower index."""
    bound_M3: Tensor
    """alpha, kappa and beta of every level, for scaled rows, rounded up to float32."""
    norm_MK: Tensor
    """|c| in float64."""


def width_of(D: int) -> int:
    """Return D rounded up to a power of two of at least 16, the widths of `csrc/cuda/certify.cu`."""
    return max(16, 1 << (D - 1).bit_length())


def prepare_tables(codebooks_MKD: Tensor, levels: int) -> Tables:
    """Make tables of the leading levels of float32 codebooks, on their device."""
    codebooks_MKD = codebooks_MKD[:levels].contiguous()
    (M, K, D), device = codebooks_MKD.shape, codebooks_MKD.device
    chunks, width = -(-K // CHUNK), width_of(D)
    c_MKD = codebooks_MKD.double()
    norm_MK = c_MKD.norm(dim=2)
    repeated_MK = torch.stack([reference._repeated(c_KD) for c_KD in codebooks_MKD])
    largest_M = codebooks_MKD.abs().amax((1, 2)).double()
    exponent_M = torch.frexp(largest_M).exponent - 1
    shift_M = torch.where(largest_M > 0, 4 - exponent_M, 0).to(torch.int32)
    able_M = shift_M.abs() <= _MOST_SHIFT
    shift_M = shift_M.clamp(-_MOST_SHIFT, _MOST_SHIFT)
    scale_M = torch.ldexp(torch.ones(M, dtype=torch.float64, device=device), shift_M)
    c_MKD = c_MKD * scale_M[:, None, None]
    half_MKD = torch.zeros(M, chunks * CHUNK, width, dtype=torch.float16, device=device)
    half_MKD[:, :K, :D] = (-2 * c_MKD).half()
    square_MK, length_MK = (c_MKD * c_MKD).sum(2), c_MKD.norm(dim=2)
    lost_MK = (c_MKD + half_MKD[:, :K, :D].double() / 2).norm(dim=2)
    bias = torch.full((M, chunks * CHUNK), math.inf, dtype=torch.float32, device=device)
    finite_MK = square_MK.clamp(max=torch.finfo(torch.float32).max).float()  # the largest where scales are beyond
    bias[:, :K] = finite_MK.masked_fill(repeated_MK, math.inf)
    bound_M3 = error_bound(D, length_MK.amax(1), lost_MK.amax(1), square_MK.amax(1))
    # An infinite bound certifies nothing: scales beyond 2^-60 to 2^60, of this level or of one before it.
    bound_M3 = bound_M3.masked_fill(~able_M.cumprod(0).bool()[:, None], math.inf)
    codebooks = torch.zeros(M, K, width, dtype=torch.float32, device=device)
    codebooks[:, :, :D] = codebooks_MKD
    columns = torch.zeros(M, D, chunks * CHUNK, dtype=torch.float32, device=device)
    columns[:, :, :K] = codebooks_MKD.mT
    # Codewords by chunk, pair, one of the pair, place; columns by 16, lane, four.
    parts = half_MKD.view(M, chunks, 2, 2, 8, width // 16, 4, 4)
    half = parts.permute(0, 1, 5, 2, 4, 6, 3, 7).contiguous()
    return Tables(codebooks, columns, half, scale_M.float(), bias, _round_up(bound_M3), norm_MK)


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
    width = width_of(D)
    chain = (width + -(-width // 16) + 12) * 2.0**-23  # of the sum on tensor cores and in a team, over all |terms|
    slack = 2 * (1 + 2.0**-20)
    reach_M = norm_M + lost_M
    adding = chain + 3 * u
    alpha_M = slack * (2 * lost_M + 2 * adding * (1 + chain) * reach_M)
    kappa_M = slack * 2 * norm_M
    rounded_M = 4 * (D + 8) * v * norm_M**2  # of the table in float64
    beta_M = slack * ((2 * u + adding) * table_M + rounded_M + 2.0**-57)
    return torch.stack([alpha_M, kappa_M, beta_M], 1)


def _round_up(value: Tensor) -> Tensor:
    near = value.float()
    return torch.where(near.double() < value, torch.nextafter(near, torch.full_like(near, math.inf)), near)
