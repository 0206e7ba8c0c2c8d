"""The specification of every kernel, in plain torch and `math.fsum`; every other backend is tested against it.

Shape letters of the package: N cells, M levels, K codewords a level, D latent width, G genes of the tokenizer's axis,
H hidden width, E stored entries of a sparse matrix.

**Codes** are defined in exact real arithmetic on the float32 values; the lowest index wins a tie:

    code_m = argmin_k |c_mk|^2 - 2<x, c_mk> + 2 sum_{j<m} <c_j, c_mk>      c_j = codeword chosen at level j
           = argmin_k |r - c_mk|^2,  r = x - sum_{j<m} c_j

Float64 scores propose a code, and a bound on their error says which codewords might still win. These are compared by
the exact sign of a sum of float32 products, each exact in float64 (at most 48 bits). `docs/exactness.md` has the proof.

**Projection** of a row of counts is defined as one fixed order of IEEE operations. So the result depends on that row
alone, and every CPU backend can be equal to the last bit:

    library   = sum of all stored counts of the row, correctly rounded to float64 (any order gives the same), or given
    count_g   = sum of the entries that map to axis column g, correctly rounded to float64; column -1 drops an entry
    value_g   = float32(log1p(count_g * (target_sum / library)))      log1p: the fixed sequence of `log1p` below
    hidden    = bias;  for g in increasing order where value_g > 0:  hidden = fma(value_g, W[g], hidden)

Every operation rounds its result; fma rounds once, float32(value_g * W[g] + hidden). A row without counts gives the
bias.

**Masking** sets the logits that a row's window rules out to -inf and touches nothing else.

**Decoding** adds codewords in float32, level by level: ((c_0 + c_1) + c_2) + ...

`rvqa.kernels.ops` has checked shapes and dtypes. Rows are processed in blocks that take about 100 MB besides the
output. The default floating-point environment is assumed (no `torch.set_flush_denormal`).
"""

import math

import numpy as np
import torch
from torch import Tensor

from rvqa.kernels.checks import are_within, require_codes, require_projectable, require_states

_BLOCK = 1 << 20
"""Elements of the largest temporary of a block of rows."""

_UNIT = 2.0**-53
"""Unit roundoff of float64."""

_LN2_HI = float.fromhex("0x1.62e42feep-1")
"""Leading 32 bits of ln 2: its product with any exponent of a float64 is exact."""

_LN2_LO = float.fromhex("0x1.a39ef35793c76p-33")
"""ln 2 - _LN2_HI, rounded."""

_SQRT_HALF = float.fromhex("0x1.6a09e667f3bcdp-1")

_ATANH = [2.0 / (2 * n + 1) for n in range(1, 12)]
"""2/3, 2/5, ... 2/23: 2 atanh(s) / s - 2 as a series in s^2 <= 0.0295; terms left out are below 2^-65 of the sum."""


def pack(codebooks_MKD: Tensor) -> Tensor:
    """Return an empty tensor, because this backend uses the codebooks as they are."""
    return torch.empty(0, dtype=torch.uint8, device=codebooks_MKD.device)


def residual_quantize(x_ND: Tensor, tables: tuple[Tensor, Tensor], levels: int) -> tuple[Tensor, int, int]:
    """Exact greedy codes, uint8 [N, levels]; the number of rows with NaN or infinity, coded 255, and the first."""
    codebooks_MKD = tables[0]
    x_ND, wrong_N, wrong, first = finite_rows(x_ND)
    codes_NM = torch.empty(x_ND.shape[0], levels, dtype=torch.uint8, device=x_ND.device)
    repeated_MK = [_repeated(codebook_KD) for codebook_KD in codebooks_MKD[:levels]]
    for rows in _row_blocks(x_ND, codebooks_MKD.shape[1]):
        r_ND = x_ND[rows].double()
        reach_N = r_ND.norm(dim=1)
        for m in range(levels):
            code_N = _argmin(x_ND[rows], r_ND, reach_N, codebooks_MKD[: m + 1], codes_NM[rows, :m], repeated_MK[m])
            codes_NM[rows, m] = code_N.to(torch.uint8)
            c_KD = codebooks_MKD[m].double()
            r_ND = r_ND - c_KD[code_N]
            reach_N = reach_N + c_KD.norm(dim=1)[code_N]
    codes_NM[wrong_N] = 255
    return codes_NM, wrong, first


def nearest_codeword(x_ND: Tensor, codebook_KD: Tensor) -> tuple[Tensor, Tensor, int, int]:
    """Index int64 [N] of the exactly nearest codeword and its squared distance float32 [N].

    The distance is the float64 sum of (x_d - c_d)^2, every operation rounded: eight sums over d % 8 in increasing d,
    then ((0 + 4) + (2 + 6)) + ((1 + 5) + (3 + 7)), rounded once to float32. Rows with NaN or infinity get -1 and NaN;
    their number and the first follow.
    """
    x_ND, wrong_N, wrong, first = finite_rows(x_ND)
    index_N = torch.empty(x_ND.shape[0], dtype=torch.int64, device=x_ND.device)
    distance_N = torch.empty(x_ND.shape[0], dtype=torch.float32, device=x_ND.device)
    repeated_K = _repeated(codebook_KD)
    for rows in _row_blocks(x_ND, codebook_KD.shape[0]):
        r_ND = x_ND[rows].double()
        no_codes_N0 = torch.empty(len(r_ND), 0, dtype=torch.uint8, device=x_ND.device)
        code_N = _argmin(x_ND[rows], r_ND, r_ND.norm(dim=1), codebook_KD[None], no_codes_N0, repeated_K)
        index_N[rows] = code_N
        distance_N[rows] = distance(x_ND[rows], codebook_KD, code_N)
    index_N[wrong_N], distance_N[wrong_N] = -1, torch.nan
    return index_N, distance_N, wrong, first


def distance(x_ND: Tensor, codebook_KD: Tensor, index_N: Tensor) -> Tensor:
    """Squared distance of every row to its codeword, float32 [N], as `nearest_codeword` defines it."""
    gap_ND = torch.nn.functional.pad(x_ND.double() - codebook_KD[index_N].double(), (0, -x_ND.shape[1] % 8))
    sum_N8 = torch.zeros(len(gap_ND), 8, dtype=torch.float64, device=x_ND.device)
    for gap_N8 in gap_ND.split(8, dim=1):
        sum_N8 = sum_N8 + gap_N8 * gap_N8
    sum_N4 = sum_N8[:, :4] + sum_N8[:, 4:]
    sum_N2 = sum_N4[:, :2] + sum_N4[:, 2:]
    return (sum_N2[:, 0] + sum_N2[:, 1]).float()


def residual_norms(x_ND: Tensor, codes_NM: Tensor, tables: tuple[Tensor, Tensor]) -> Tensor:
    """|x - sum of the codewords up to each level|, float32 [N, M]: float64, in increasing level and column."""
    r_ND = x_ND.double()
    norms_NM = torch.empty(codes_NM.shape, dtype=torch.float32, device=x_ND.device)
    for m in range(codes_NM.shape[1]):
        r_ND = r_ND - tables[0][m].double()[codes_NM[:, m].long()]
        total_N = torch.zeros_like(r_ND[:, 0])
        for r_N in r_ND.T:
            total_N = total_N + r_N * r_N
        norms_NM[:, m] = total_N.sqrt().float()
    norms_NM[~torch.isfinite(x_ND).all(1)] = torch.nan
    return norms_NM


def decode(codes_NM: Tensor, codebooks_MKD: Tensor, levels: int, out_ND: Tensor | None = None) -> Tensor:
    """Sum of codewords, float32 [N, D], added in float32 level by level."""
    require_codes(codes_NM, codebooks_MKD.shape[1])
    sum_ND = codebooks_MKD[0][codes_NM[:, 0].long()]
    for m in range(1, levels):
        sum_ND = sum_ND + codebooks_MKD[m][codes_NM[:, m].long()]
    return sum_ND if out_ND is None else out_ND.copy_(sum_ND)


def csr_project(
    indptr: Tensor,
    indices: Tensor,
    data: Tensor,
    W_GH: Tensor,
    bias_H: Tensor,
    target_sum: float = 1e4,
    column_map: Tensor | None = None,
    library_size: Tensor | None = None,
) -> Tensor:
    """Rows of counts to float32 [N, H]: size factor, log1p and first linear layer, in the order defined above."""
    require_projectable(indptr, indices, data, len(W_GH), column_map, library_size)
    hidden_NH = torch.empty(len(indptr) - 1, len(bias_H), dtype=torch.float32, device=W_GH.device)
    for start in range(0, len(hidden_NH), 1024):
        rows = slice(start, min(start + 1024, len(hidden_NH)))
        stored_N = indptr[rows.start + 1 : rows.stop + 1] - indptr[rows]
        entries = slice(int(indptr[rows.start]), int(indptr[rows.stop]))
        row_E = torch.repeat_interleave(torch.arange(len(stored_N), device=indptr.device), stored_N)
        column_E, count_E = indices[entries].long(), data[entries].double()
        library_N = _segment_sum(count_E, stored_N) if library_size is None else library_size[rows].double()
        if column_map is not None:
            column_E = column_map.long()[column_E]
        kept_E = (column_E >= 0) & (count_E > 0)
        key_E, order_E = torch.sort(row_E[kept_E] * len(W_GH) + column_E[kept_E])
        key_E, copies_E = torch.unique_consecutive(key_E, return_counts=True)
        count_E = _segment_sum(count_E[kept_E][order_E], copies_E)
        row_E, column_E = key_E // len(W_GH), key_E % len(W_GH)
        # torch.div of two tensors: a Python number as numerator would multiply by a rounded reciprocal.
        scale_N = torch.div(torch.full_like(library_N, target_sum), library_N)
        value_E = log1p(count_E * scale_N[row_E]).float()
        row_E, column_E, value_E = row_E[value_E > 0], column_E[value_E > 0], value_E[value_E > 0]
        hidden_NH[rows] = _accumulate(torch.bincount(row_E, minlength=len(stored_N)), column_E, value_E, W_GH, bias_H)
    return hidden_NH


def csr_totals(
    indptr: Tensor, indices: Tensor, data: Tensor, columns: int, known_C: Tensor | None
) -> tuple[Tensor, int]:
    """Sum of each row over known columns, float64 [N], and how many entries are not raw counts.

    Raw counts are whole numbers from 0 to 2^24 in a column of the matrix; an entry with a wrong value and a wrong
    column counts twice. The number is -1 if row pointers are not within the entries.
    """
    stored_N = indptr.diff()
    total_N = torch.zeros(len(stored_N), dtype=torch.float64, device=data.device)
    if not are_within(indptr, len(data)):
        return total_N, -1
    entries = slice(int(indptr[0]), int(indptr[-1]))
    column_E, count_E = indices[entries].long(), data[entries].double()
    outside_E = (column_E < 0) | (column_E >= columns)
    whole_E = (count_E >= 0) & (count_E <= 2**24) & (count_E == count_E.floor())
    wrong = int((~whole_E).sum()) + int(outside_E.sum())
    if not wrong:
        row_E = torch.repeat_interleave(torch.arange(len(stored_N), device=indptr.device), stored_N)
        known_E = torch.ones_like(outside_E) if known_C is None else known_C[column_E]
        total_N.index_add_(0, row_E, torch.where(known_E, count_E, 0.0))
    return total_N, wrong


def apply_span_mask_(logits_BV: Tensor, states_B: Tensor, windows_S3: Tensor) -> None:
    """Set ids that a row may not write to -inf, in place.

    Row b follows window states[b], (lo, hi, inside): if inside is not 0, only ids in [lo, hi) stay; if 0, only the
    others. A state without a window leaves its row as it is; on a CPU only -1 may be one. Gradients reach what stays.
    """
    require_states(states_B, len(windows_S3))
    if len(windows_S3) == 0:
        return
    has_window_B = (states_B >= 0) & (states_B < len(windows_S3))
    lo_B, hi_B, inside_B = windows_S3[states_B.clamp(0, len(windows_S3) - 1)].unbind(1)
    id_V = torch.arange(logits_BV.shape[1], device=logits_BV.device)
    within_BV = (id_V >= lo_B[:, None]) & (id_V < hi_B[:, None])
    logits_BV.masked_fill_((within_BV != (inside_B != 0)[:, None]) & has_window_B[:, None], -torch.inf)


def log1p(y: Tensor) -> Tensor:
    """log(1 + y) of finite float64 y >= 0 by a fixed sequence of IEEE operations, within 1 ulp.

    1 + y = 2^k (1 + f) with 1 + f in [sqrt(1/2), sqrt(2)), s = f / (2 + f), log(1 + f) = 2 atanh(s) = f - s (f - R),
    R = s^2 (2/3 + 2/5 s^2 + ...). A first-order correction makes up for the rounding of 1 + y (after fdlibm).
    """
    w = 1.0 + y
    mantissa, k = torch.frexp(w)
    low = mantissa < _SQRT_HALF
    mantissa = torch.where(low, mantissa * 2.0, mantissa)
    k = (k - low.to(k.dtype)).double()
    unscaled = k == 0
    f = torch.where(unscaled, y, mantissa - 1.0)
    lost = torch.where(y < 1.0, y - (w - 1.0), 1.0 - (w - y))
    correction = torch.where(unscaled, torch.zeros_like(y), lost / w)
    s = f / (2.0 + f)
    z = s * s
    poly = torch.full_like(z, _ATANH[-1])
    for coefficient in reversed(_ATANH[:-1]):
        poly = poly * z
        poly = poly + coefficient
    rest = s * (f - z * poly) - (k * _LN2_LO + correction)
    return k * _LN2_HI + (f - rest)


def fma(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """float32(a * b + c) of float32 tensors, rounded once.

    The product is exact in float64. Its sum with c is rounded to odd there (an inexact one that ends in an even bit
    moves to the neighbour on the other side of the true sum), after which rounding to float32 cannot go wrong: 53 bits
    are two more than 24 and a guard need (Boldo and Melquiond 2008).
    """
    product, addend = a.double() * b.double(), c.double()
    total = product + addend
    back = total - product
    lost = (product - (total - back)) + (addend - back)
    even = (total.view(torch.int64) & 1) == 0
    away = torch.where(lost > 0, torch.inf, -torch.inf).to(total.dtype)
    return torch.where((lost != 0) & torch.isfinite(lost) & even, torch.nextafter(total, away), total).float()


def finite_rows(x_ND: Tensor) -> tuple[Tensor, Tensor, int, int]:
    """Return rows as float32, zeros for those not finite; which rows these are, their number, and the first or -1."""
    x_ND = x_ND.float()
    wrong_N = ~torch.isfinite(x_ND).all(1)
    wrong = int(wrong_N.sum())
    if wrong == 0:
        return x_ND, wrong_N, 0, -1
    return x_ND.masked_fill(wrong_N[:, None], 0.0), wrong_N, wrong, int(wrong_N.nonzero()[0])


def _row_blocks(x_ND: Tensor, codewords: int) -> list[slice]:
    step = max(1, _BLOCK // max(codewords, x_ND.shape[1], 1))
    return [slice(start, min(start + step, len(x_ND))) for start in range(0, len(x_ND), step)]


def _repeated(codebook_KD: Tensor) -> Tensor:
    """Return bool [K]: codewords equal in value (-0 = +0) to one of lower index, which can never win."""
    # Adding +0 turns -0 into +0.
    _, group_K = torch.unique(codebook_KD + 0.0, dim=0, return_inverse=True)
    index_K = torch.arange(len(codebook_KD), device=codebook_KD.device)
    first_K = torch.full_like(index_K, len(codebook_KD)).scatter_reduce(0, group_K, index_K, "amin")
    return first_K[group_K] != index_K


def _argmin(
    x_ND: Tensor, r_ND: Tensor, reach_N: Tensor, codebooks_MKD: Tensor, codes_NM: Tensor, repeated_K: Tensor
) -> Tensor:
    """Return exact codes int64 [N] of level m, given those of the m earlier levels.

    codebooks has m + 1 levels, codes m; r is the residual rounded to float64, reach = |x| + sum of the chosen |c_j|.
    With B_k = |c_k| (|c_k| + 2 reach) a computed score is off by at most (D + m + 1) 2^-53 B_k (1 + 2^-20). The
    bound in use also covers the roundings of the bound itself and of the comparison.
    """
    m, D = codes_NM.shape[1], x_ND.shape[1]
    c_KD = codebooks_MKD[m].double()
    norm_K = c_KD.norm(dim=1)
    s_NK = (c_KD * c_KD).sum(1) - 2.0 * (r_ND @ c_KD.T)
    error_NK = 1.0001 * (D + m + 6) * _UNIT * norm_K * (norm_K + 2.0 * reach_N[:, None])
    best_N = s_NK.argmin(1, keepdim=True)
    limit_N = s_NK.gather(1, best_N) + error_NK.gather(1, best_N)
    contested_NK = ~(s_NK - error_NK > limit_N) & ~repeated_K
    code_N = contested_NK.to(torch.uint8).argmax(1)
    for row in torch.nonzero(contested_NK.sum(1) > 1).flatten().tolist():
        past = [codebooks_MKD[j, code] for j, code in enumerate(codes_NM[row].tolist())]
        terms = [2.0 * x_ND[row].double(), *(-2.0 * c_D.double() for c_D in past)]
        candidates = torch.nonzero(contested_NK[row]).flatten()
        code_N[row] = _settle([t.cpu().numpy() for t in terms], c_KD[candidates].cpu().numpy(), candidates.tolist())
    return code_N


def _settle(terms: list[np.ndarray], c_SD: np.ndarray, candidates: list[int]) -> int:
    """Return the exact winner among candidates in increasing order; terms are 2x and -2c_j, so their sum is 2r."""
    best = 0
    for k in range(1, len(candidates)):
        ck, ca = c_SD[k], c_SD[best]
        products = [ck * ck, -ca * ca, *(-term * ck for term in terms), *(term * ca for term in terms)]
        if math.fsum(np.concatenate(products).tolist()) < 0:
            best = k
    return candidates[best]


def _segment_sum(values_E: Tensor, lengths: Tensor) -> Tensor:
    """Correctly rounded float64 sums of consecutive segments, whatever the order inside a segment."""
    ends = torch.cumsum(lengths, 0)
    if bool((values_E == values_E.floor()).all()) and float(values_E.sum()) < 2.0**52:
        running = torch.cat([lengths.new_zeros(1), torch.cumsum(values_E.long(), 0)])
        return (running[ends] - running[ends - lengths]).double()
    values, stops, counts = values_E.tolist(), ends.tolist(), lengths.tolist()
    sums = [math.fsum(values[stop - count : stop]) for stop, count in zip(stops, counts, strict=True)]
    return torch.tensor(sums, dtype=torch.float64, device=values_E.device)


def _accumulate(nonzeros_N: Tensor, column_E: Tensor, value_E: Tensor, W_GH: Tensor, bias_H: Tensor) -> Tensor:
    """Start from the bias, then add one entry of every row at a time, in increasing column order."""
    nonzeros_N, order_N = torch.sort(nonzeros_N, descending=True, stable=True)
    first_N = torch.empty_like(nonzeros_N)
    first_N[order_N] = nonzeros_N
    first_N = (torch.cumsum(first_N, 0) - first_N)[order_N]
    hidden_NH = bias_H.repeat(len(nonzeros_N), 1)
    for step in range(int(nonzeros_N[0]) if len(nonzeros_N) else 0):
        active = int((nonzeros_N > step).sum())
        entry_N = first_N[:active] + step
        hidden_NH[:active] = fma(value_E[entry_N, None], W_GH[column_E[entry_N]], hidden_NH[:active])
    out_NH = torch.empty_like(hidden_NH)
    out_NH[order_N] = hidden_NH
    return out_NH
