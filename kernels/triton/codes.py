"""Triton kernels for codes: float32 proposes, a bound certifies, and float64 or the reference settles the rest.

The float32 score of a codeword is off by at most half of tau = alpha_m |x| + beta_m, in any order of summation, with
or without fused multiply-adds (`_error_bound`; proof in docs/exactness.md). Rows whose second best score lies within
tau of the best go to a float64 kernel with the reference's own bound. Rows that this leaves open go to the reference.
No code depends on how Triton orders a sum.

The kernels were not timed: the block sizes are guesses that compile for sm_90 without spills.
"""

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from rvqa.kernels import reference
from rvqa.kernels.checks import require_apart

_MAX_GRAM = 4096
"""Most codewords of all levels for which a Gram table is made (64 MB); above, all rows take the float64 kernel."""

_FLOAT64_BLOCK = (64, 1 << 19) if triton.knobs.runtime.interpret else (4, 4096)
"""Rows of a program of the float64 kernel, and products it holds; the interpreter takes time per operation."""


class Tables(NamedTuple):
    """Tables that the code kernels derive from codebooks; make them once with `prepare_tables` and pass them on."""

    bias_MK: Tensor
    """|c|^2 in float32; +inf for a codeword that repeats one of lower index, so that it can never win."""
    gram: Tensor
    """2 <c_jk, c_mi> in float32, [M * K, M * K]; empty for one level or for more than `_MAX_GRAM` codewords."""
    bound_M2: Tensor
    """alpha and beta of every level, rounded up to float32."""
    longest_1: Tensor
    """Largest |x|, float32, for which nothing overflows; -1 if the bound holds for no row."""
    square_MK: Tensor
    """|c|^2 in float64."""
    norm_MK: Tensor
    """|c| in float64."""
    repeated_MK: Tensor
    """uint8: 1 for codewords that can never win."""
    unit_M: Tensor
    """Float64 error of a score over |c| (|c| + 2 reach), bound (1) of docs/exactness.md."""


def prepare_tables(codebooks_MKD: Tensor, levels: int) -> Tables:
    """Make tables of the leading levels of float32 codebooks, on their device."""
    codebooks_MKD = codebooks_MKD[:levels]
    M, K, D = codebooks_MKD.shape
    c_MKD = codebooks_MKD.double()
    square_MK, norm_MK = (c_MKD * c_MKD).sum(2), c_MKD.norm(dim=2)
    repeated_MK = torch.stack([reference._repeated(c_KD) for c_KD in codebooks_MKD])
    few = M == 1 or M * K <= _MAX_GRAM
    flat = c_MKD.reshape(M * K, D)
    gram = 2.0 * (flat @ flat.T) if few and M > 1 else flat.new_zeros(0)
    largest_MM = gram.abs().reshape(M, K, M, K).amax((1, 3)).tril(-1) if len(gram) else gram.new_zeros(M, M)
    bound_M2, longest = _error_bound(D, norm_MK.amax(1), square_MK.amax(1) + largest_MM.sum(1))
    level_M = torch.arange(M, dtype=torch.float64, device=flat.device)
    return Tables(
        bias_MK=square_MK.float().masked_fill(repeated_MK, math.inf),
        gram=gram.float(),
        bound_M2=_round_up(bound_M2),
        longest_1=longest.float()[None] if few else torch.full([1], -1.0, device=flat.device),
        square_MK=square_MK,
        norm_MK=norm_MK,
        repeated_MK=repeated_MK.to(torch.uint8),
        unit_M=1.0001 * (D + level_M + 6) * 2.0**-53,
    )


def _error_bound(D: int, norm_M: Tensor, table_M: Tensor) -> tuple[Tensor, Tensor]:
    """Return float64 alpha and beta [M, 2], and the longest row for which they hold.

    norm = max |c_mk|; table = max |b_k| + sum over earlier levels of max |Gram|. Twice the error of a score is at most
    alpha |x| + beta: bound (4) of docs/exactness.md. The underflow term is 4D instead of D for two reasons: the
    product with c is doubled after the sum, and the bound covers products and sums that are flushed one by one.
    """
    u, v = 2.0**-24, 2.0**-53
    norm_M = norm_M * (1 + 1e-9)
    m = torch.arange(len(norm_M), dtype=torch.float64, device=norm_M.device)
    past_M = torch.cumsum(norm_M, 0) - norm_M
    gamma, gamma_M = D * u / (1 - D * u), (m + 2) * u / (1 - (m + 2) * u)
    underflow_M = 2.0**-126 * (4 * D + 4 * m + 16) + 2.0**-124 * math.sqrt(D) * norm_M
    rounded_M = 4 * (D + 8) * v * (norm_M**2 + 2 * norm_M * past_M)
    slack = 2 * (1 + 2.0**-20) * (1 + 1e-9)
    product_M = 2 * gamma * norm_M + 2 * gamma_M * norm_M * (1 + gamma) + 2.0**-125 * math.sqrt(D)
    alpha_M = slack * (1 + (D + 4) * u) * product_M
    beta_M = slack * ((u + gamma_M) * table_M + underflow_M + rounded_M) + alpha_M * math.sqrt(D) * 2.0**-62
    longest = ((1 - 1e-6) * 2.0**124 / norm_M).clamp(max=2.0**126).amin()
    longest = torch.where((table_M < 2.0**124).all(), longest, -torch.ones_like(longest))
    return torch.stack([alpha_M, beta_M], 1), longest


def _round_up(value: Tensor) -> Tensor:
    near = value.float()
    return torch.where(near.double() < value, torch.nextafter(near, torch.full_like(near, math.inf)), near)


@triton.jit
def _lowest_two(score, k, K, best, second, code):
    """Update the lowest and second lowest score of every row, and the index of the lowest, with one more block."""
    low = tl.min(score, 1)
    where = tl.min(tl.where(score == low[:, None], k[None, :], K), 1)
    other = tl.min(tl.where(k[None, :] == where[:, None], float("inf"), score), 1)
    second = tl.minimum(tl.maximum(best, low), tl.minimum(second, other))
    return tl.minimum(best, low), second, tl.where(low < best, where, code)


@triton.jit(do_not_specialize=["N"])
def _propose_kernel(
    x_ptr, c_ptr, bias_ptr, gram_ptr, bound_ptr, longest_ptr, codes_ptr, open_ptr, N, D, K, levels,
    BN: tl.constexpr, BK: tl.constexpr, BD: tl.constexpr, LEVELS: tl.constexpr,
):  # fmt: skip
    """Codes of BN rows from float32 scores; open = 1 where the bound does not certify all of them."""
    n = tl.program_id(0).to(tl.int64) * BN + tl.arange(0, BN)
    inside = n < N
    row = n[:, None] * D
    d0 = tl.arange(0, BD)
    square = tl.zeros([BN], tl.float32)
    for start in range(0, D, BD):
        d = start + d0
        x = tl.load(x_ptr + row + d[None, :], mask=inside[:, None] & (d < D)[None, :], other=0.0)
        square += tl.sum(x * x, 1)
    length = tl.sqrt_rn(square)
    certain = length <= tl.load(longest_ptr)
    slot = tl.arange(0, LEVELS)[None, :]
    picked = tl.zeros([BN, LEVELS], tl.int32)
    for m in range(levels):
        best = tl.full([BN], float("inf"), tl.float32)
        second = tl.full([BN], float("inf"), tl.float32)
        code = tl.zeros([BN], tl.int32)
        for k0 in range(0, K, BK):
            k = k0 + tl.arange(0, BK)
            valid = k < K
            column = (m * K + k).to(tl.int64) * D
            dot = tl.zeros([BN, BK], tl.float32)
            for start in range(0, D, BD):
                d = start + d0
                x = tl.load(x_ptr + row + d[None, :], mask=inside[:, None] & (d < D)[None, :], other=0.0)
                c = tl.load(c_ptr + column[None, :] + d[:, None], mask=valid[None, :] & (d < D)[:, None], other=0.0)
                # "ieee" is plain float32; the default would be TF32, which the bound does not cover.
                dot = tl.dot(x, c, dot, input_precision="ieee")
            score = tl.load(bias_ptr + m * K + k, mask=valid, other=float("inf"))[None, :] - 2.0 * dot
            for j in range(m):
                past = tl.sum(tl.where(slot == j, picked, 0), 1).to(tl.int64)
                at = past[:, None] * (levels * K) + (m * K + k)[None, :]
                score += tl.load(gram_ptr + at, mask=valid[None, :], other=0.0)
            best, second, code = _lowest_two(score, k, K, best, second, code)
        # The comparison leaves a row with NaN open; a row beyond `longest` is open whatever its scores are.
        certain = certain & (second > best + (tl.load(bound_ptr + 2 * m) * length + tl.load(bound_ptr + 2 * m + 1)))
        # After NaN the code may be K, which would index outside the Gram table.
        code = tl.minimum(code, K - 1)
        picked = tl.where(slot == m, (m * K + code)[:, None], picked)
        tl.store(codes_ptr + n * levels + m, code.to(codes_ptr.dtype.element_ty), mask=inside)
    tl.store(open_ptr + n, tl.where(certain, 0, 1).to(tl.uint8), mask=inside)


@triton.jit(do_not_specialize=["R"])
def _verify_kernel(
    row_ptr, x_ptr, c_ptr, square_ptr, norm_ptr, repeated_ptr, unit_ptr, codes_ptr, open_ptr, R, D, K, levels,
    BR: tl.constexpr, BK: tl.constexpr, DP: tl.constexpr,
):  # fmt: skip
    """Codes of BR of the R listed rows from float64 residuals; open = 1 where bound (1) still does not certify them.

    With [low_k, high_k] around score k, the candidates are those with low_k <= min high. There is one candidate if the
    second lowest low is above min high.
    """
    i = tl.program_id(0) * BR + tl.arange(0, BR)
    inside = i < R
    n = tl.load(row_ptr + i, mask=inside, other=0)
    d = tl.arange(0, DP)
    x = tl.load(x_ptr + n[:, None] * D + d[None, :], mask=inside[:, None] & (d < D)[None, :], other=0.0)
    r = x.to(tl.float64)
    reach = tl.sqrt(tl.sum(r * r, 1))
    certain = inside
    for m in range(levels):
        best = tl.full([BR], float("inf"), tl.float64)
        second, limit = best, best
        code = tl.zeros([BR], tl.int32)
        for k0 in range(0, K, BK):
            k = k0 + tl.arange(0, BK)
            valid = k < K
            at = m * K + k
            c = tl.load(
                c_ptr + at[:, None].to(tl.int64) * D + d[None, :], mask=valid[:, None] & (d < D)[None, :], other=0.0
            ).to(tl.float64)
            dot = tl.sum(r[:, None, :] * c[None, :, :], 2)
            score = tl.load(square_ptr + at, mask=valid, other=0.0)[None, :] - 2.0 * dot
            norm = tl.load(norm_ptr + at, mask=valid, other=0.0)[None, :]
            error = tl.load(unit_ptr + m) * norm * (norm + 2.0 * reach[:, None])
            able = (tl.load(repeated_ptr + at, mask=valid, other=1) == 0)[None, :]
            limit = tl.minimum(limit, tl.min(tl.where(able, score + error, float("inf")), 1))
            best, second, code = _lowest_two(tl.where(able, score - error, float("inf")), k, K, best, second, code)
        certain = certain & (second > limit)
        tl.store(codes_ptr + n * levels + m, code.to(codes_ptr.dtype.element_ty), mask=inside)
        at = m * K + code
        c = tl.load(c_ptr + at[:, None].to(tl.int64) * D + d[None, :], mask=(d < D)[None, :], other=0.0)
        r -= c.to(tl.float64)
        reach += tl.load(norm_ptr + at)
    tl.store(open_ptr + n, tl.where(certain, 0, 1).to(tl.uint8), mask=inside)


@triton.jit(do_not_specialize=["N"])
def _decode_kernel(codes_ptr, c_ptr, out_ptr, N, D, K, stride, levels, BN: tl.constexpr, BD: tl.constexpr):
    """Sum of codewords of a tile of BN rows and BD coordinates, level by level."""
    n = tl.program_id(0).to(tl.int64) * BN + tl.arange(0, BN)
    d = tl.program_id(1) * BD + tl.arange(0, BD)
    inside = n < N
    mask = inside[:, None] & (d < D)[None, :]
    code = tl.load(codes_ptr + n * stride, mask=inside, other=0).to(tl.int64)
    # The sum starts at the first codeword, because 0 + -0 would lose the sign.
    total = tl.load(c_ptr + code[:, None] * D + d[None, :], mask=mask, other=0.0)
    for m in range(1, levels):
        code = tl.load(codes_ptr + n * stride + m, mask=inside, other=0).to(tl.int64) + m * K
        total += tl.load(c_ptr + code[:, None] * D + d[None, :], mask=mask, other=0.0)
    tl.store(out_ptr + n[:, None] * D + d[None, :], total, mask=mask)


def code_blocks(K: int) -> dict[str, int]:
    """Return block sizes of the float32 kernel: guesses that give each thread 16 to 32 sums of the product."""
    if K <= 32:
        return {"BN": 64, "BK": 32, "BD": 16, "num_warps": 4, "num_stages": 2}
    return {"BN": 128, "BK": 64, "BD": 16, "num_warps": 8, "num_stages": 2}


def _certified(x_ND: Tensor, codebooks_MKD: Tensor, codes_NM: Tensor, tables: Tables) -> Tensor:
    """Fill codes of all rows by both kernels; return the rows that neither certifies."""
    (N, levels), (_, K, D) = codes_NM.shape, codebooks_MKD.shape
    assert len(tables.unit_M) == levels, "tables of another number of levels"
    open_N = torch.empty(N, dtype=torch.uint8, device=x_ND.device)
    blocks = code_blocks(K)
    with torch.cuda.device_of(x_ND):
        if len(tables.gram) or levels == 1:
            _propose_kernel[(triton.cdiv(N, blocks["BN"]),)](
                x_ND, codebooks_MKD, tables.bias_MK, tables.gram, tables.bound_M2, tables.longest_1, codes_NM, open_N,
                N, D, K, levels, LEVELS=triton.next_power_of_2(levels), **blocks,
            )  # fmt: skip
        else:
            open_N.fill_(1)
        rows = torch.nonzero(open_N).flatten()
        if len(rows):
            DP = triton.next_power_of_2(D)
            BR, tile = max(1, min(_FLOAT64_BLOCK[0], 4096 // DP)), _FLOAT64_BLOCK[1]
            BK = min(triton.next_power_of_2(K), max(1, tile // (BR * DP)))
            _verify_kernel[(triton.cdiv(len(rows), BR),)](
                rows, x_ND, codebooks_MKD, tables.square_MK, tables.norm_MK, tables.repeated_MK, tables.unit_M,
                codes_NM, open_N, len(rows), D, K, levels, BR=BR, BK=BK, DP=DP,
            )  # fmt: skip
            rows = torch.nonzero(open_N).flatten()
    return rows


def residual_quantize(x_ND: Tensor, codebooks_MKD: Tensor, levels: int, tables: Tables | None = None) -> Tensor:
    """Return exact greedy codes, uint8 [N, levels]; `tables` are made from the codebooks unless given."""
    # Rows are widened here because one Triton release computed products of values upcast in the kernel as TF32.
    x_ND, codebooks_MKD = x_ND.float().contiguous(), codebooks_MKD[:levels].contiguous()
    codes_NM = torch.empty(len(x_ND), levels, dtype=torch.uint8, device=x_ND.device)
    if len(x_ND):
        rows = _certified(x_ND, codebooks_MKD, codes_NM, tables or prepare_tables(codebooks_MKD, levels))
        if len(rows):
            codes_NM[rows] = reference.residual_quantize(x_ND[rows], (codebooks_MKD, codebooks_MKD), levels)[0]
    return codes_NM


def nearest_codeword(x_ND: Tensor, codebook_KD: Tensor, tables: Tables | None = None) -> tuple[Tensor, Tensor]:
    """Index int64 [N] of the exactly nearest codeword and its squared distance float32 [N]."""
    x_ND, codebook_KD = x_ND.float().contiguous(), codebook_KD.contiguous()
    index_N1 = torch.empty(len(x_ND), 1, dtype=torch.int64, device=x_ND.device)
    if len(x_ND):
        tables = tables or prepare_tables(codebook_KD[None], 1)
        rows = _certified(x_ND, codebook_KD[None], index_N1, tables)
        if len(rows):
            index_N1[rows, 0] = reference.nearest_codeword(x_ND[rows], codebook_KD)[0]
    index_N = index_N1[:, 0]
    return index_N, reference.distance(x_ND, codebook_KD, index_N)


def decode(codes_NM: Tensor, codebooks_MKD: Tensor, levels: int, out_ND: Tensor | None = None) -> Tensor:
    """Sum of codewords, float32 [N, D], added level by level."""
    codes_NM, codebooks_MKD = codes_NM.contiguous(), codebooks_MKD.contiguous()
    (N, stride), (_, K, D) = codes_NM.shape, codebooks_MKD.shape
    if out_ND is None:
        out_ND = torch.empty(N, D, dtype=torch.float32, device=codebooks_MKD.device)
    else:
        require_apart("out", out_ND, codes=codes_NM, codebooks=codebooks_MKD)
    BD = min(256, max(16, triton.next_power_of_2(D)))
    BN = 2048 // BD
    if N and D:
        with torch.cuda.device_of(out_ND):
            _decode_kernel[(triton.cdiv(N, BN), triton.cdiv(D, BD))](
                codes_NM, codebooks_MKD, out_ND, N, D, K, stride, levels, BN=BN, BD=BD
            )
    return out_ND
