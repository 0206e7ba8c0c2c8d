"""Triton kernels for the first layer from CSR counts: first the values of all entries, then the sum of rows of W.

A row's bits depend on that row alone. They equal the reference's if counts are whole and axis columns increase as
stored; otherwise the order of the sum or the last bit of a library size may differ. The kernels were not timed.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from rvqa.kernels import reference


@triton.jit
def _log1p(y, constant_ptr):
    """Compute the reference's log1p, operation by operation; constants: ln 2 in two parts, sqrt(1/2), series."""
    w = 1.0 + y
    bits = w.to(tl.int64, bitcast=True)
    k = (bits >> 52) - 1022
    mantissa = ((bits & 0xFFFFFFFFFFFFF) | 0x3FE0000000000000).to(tl.float64, bitcast=True)
    low = mantissa < tl.load(constant_ptr + 2)
    mantissa = tl.where(low, mantissa * 2.0, mantissa)
    k = (k - low.to(tl.int64)).to(tl.float64)
    unscaled = k == 0.0
    f = tl.where(unscaled, y, mantissa - 1.0)
    lost = tl.where(y < 1.0, y - (w - 1.0), 1.0 - (w - y))
    correction = tl.where(unscaled, 0.0, lost / w)
    s = f / (2.0 + f)
    z = s * s
    poly = z * 0.0 + tl.load(constant_ptr + 3)
    for i in tl.static_range(4, 14):
        poly = poly * z + tl.load(constant_ptr + i)
    rest = s * (f - z * poly) - (k * tl.load(constant_ptr + 1) + correction)
    return k * tl.load(constant_ptr) + (f - rest)


@triton.jit
def _fma(a, b, c, INTERPRETED: tl.constexpr):
    """float32(a * b + c), rounded once. The interpreter's fma rounds twice, so the reference's `fma` replaces it."""
    if INTERPRETED:
        product, addend = a.to(tl.float64) * b.to(tl.float64), c.to(tl.float64)
        total = product + addend
        back = total - product
        lost = (product - (total - back)) + (addend - back)
        bits = total.to(tl.int64, bitcast=True)
        step = tl.where((lost > 0.0) == (total > 0.0), 1, -1)
        odd = (lost != 0.0) & ((bits & 1) == 0)
        return (bits + tl.where(odd, step, 0)).to(tl.float64, bitcast=True).to(tl.float32)
    else:
        return tl.fma(a, b, c)


@triton.jit(do_not_specialize=["base"])
def _values_kernel(
    indptr_ptr, index_ptr, data_ptr, map_ptr, shared_ptr, constant_ptr, library_ptr, value_ptr, open_ptr, base,
    GIVEN: tl.constexpr, MAPPED: tl.constexpr, BE: tl.constexpr,
):  # fmt: skip
    """Compute library size and float32(log1p) of one row, 0 for unmapped entries; open = 1 if columns may repeat.

    They cannot repeat if stored columns increase and at most one is `shared`, that is, has another column's target.
    """
    n = tl.program_id(0).to(tl.int64)
    first, stop = tl.load(indptr_ptr + n).to(tl.int64), tl.load(indptr_ptr + n + 1).to(tl.int64)
    if GIVEN:
        library = tl.load(library_ptr + n)
    else:
        total = tl.zeros([BE], tl.float64)
        for start in range(first, stop, BE):
            at = start + tl.arange(0, BE)
            total += tl.load(data_ptr + at, mask=at < stop, other=0).to(tl.float64)
        library = tl.sum(total, 0)
        tl.store(library_ptr + n, library)
    # A row of stored zeros must not multiply them by infinity.
    scale = tl.where(library > 0.0, tl.load(constant_ptr + 14) / library, 0.0)
    falling = tl.zeros([BE], tl.int32)
    joint = tl.zeros([BE], tl.int32)
    for start in range(first, stop, BE):
        at = start + tl.arange(0, BE)
        kept = at < stop
        column = tl.load(index_ptr + at, mask=kept, other=0).to(tl.int64)
        before = tl.load(index_ptr + at - 1, mask=kept & (at > first), other=-1).to(tl.int64)
        falling += (kept & (column <= before)).to(tl.int32)
        if MAPPED:
            joint += tl.load(shared_ptr + column, mask=kept, other=0).to(tl.int32)
            kept = kept & (tl.load(map_ptr + column, mask=kept, other=-1) >= 0)
        count = tl.load(data_ptr + at, mask=kept, other=0).to(tl.float64)
        # log1p(0) is 0, so dropped entries add nothing.
        tl.store(value_ptr + at - base, _log1p(count * scale, constant_ptr).to(tl.float32), mask=at < stop)
    tl.store(open_ptr + n, ((tl.sum(falling, 0) > 0) | (tl.sum(joint, 0) > 1)).to(tl.uint8))


@triton.jit(do_not_specialize=["base"])
def _gather_kernel(
    indptr_ptr, index_ptr, map_ptr, value_ptr, w_ptr, bias_ptr, out_ptr, base, H,
    MAPPED: tl.constexpr, BH: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Compute BH hidden units of one row, one entry after another."""
    n = tl.program_id(0).to(tl.int64)
    first, stop = tl.load(indptr_ptr + n).to(tl.int64), tl.load(indptr_ptr + n + 1).to(tl.int64)
    h = tl.program_id(1) * BH + tl.arange(0, BH)
    inside = h < H
    # The interpreter cannot combine the masks of a block and a scalar; adding this turns the scalar into a block.
    zero = tl.full([BH], 0.0, tl.float32)
    hidden = tl.load(bias_ptr + h, mask=inside, other=0.0)
    for start in range(first, stop, 8):
        # The loop is unrolled, so that eight rows of W load at a time.
        for i in tl.static_range(8):
            at = start + i
            column = tl.load(index_ptr + at, mask=at < stop, other=0).to(tl.int64)
            if MAPPED:
                column = tl.load(map_ptr + column, mask=at < stop, other=-1)
            value = tl.load(value_ptr + at - base, mask=at < stop, other=0.0)
            weight = tl.load(w_ptr + column * H + h, mask=inside & (value + zero > 0.0), other=0.0)
            hidden = tl.where(value + zero > 0.0, _fma(value + zero, weight, hidden, INTERPRETED), hidden)
    tl.store(out_ptr + n * H + h, hidden, mask=inside)


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
    """Rows of counts to float32 [N, H].

    A column map that reorders columns leaves the sum in stored order. Library sizes of fractional counts are summed
    in float64 and not correctly rounded. Rows where columns may repeat or decrease are merged and sorted first. All
    this is decided row by row, so a row does not depend on its batch.
    """
    W_GH, bias_H, shared = W_GH.contiguous(), bias_H.contiguous(), None
    if column_map is not None:
        column_map = column_map.long()
        targets = torch.bincount(column_map[column_map >= 0], minlength=len(W_GH))
        shared = ((column_map >= 0) & (targets[column_map.clamp(min=0)] > 1)).to(torch.uint8)
    hidden_NH = torch.empty(len(indptr) - 1, len(bias_H), dtype=torch.float32, device=W_GH.device)
    given = None if library_size is None else library_size.double().contiguous()
    parts = (indptr.contiguous(), indices.contiguous(), data.contiguous())
    open_N, library_N = _project(parts, (column_map, shared), W_GH, bias_H, target_sum, given, hidden_NH)
    for rows in torch.nonzero(open_N).flatten().split(4096):
        merged, part = _merge(rows, *parts, column_map, len(W_GH)), hidden_NH[rows]
        _project(merged, (None, None), W_GH, bias_H, target_sum, library_N[rows], part)
        hidden_NH[rows] = part
    return hidden_NH


def _project(
    parts: tuple[Tensor, Tensor, Tensor],
    maps: tuple[Tensor | None, Tensor | None],
    W_GH: Tensor,
    bias_H: Tensor,
    target_sum: float,
    library_size: Tensor | None,
    hidden_NH: Tensor,
) -> tuple[Tensor, Tensor]:
    """Fill hidden [N, H]; return the flags of rows where columns may repeat, and the library sizes."""
    (N, H), device, (indptr, indices, data) = hidden_NH.shape, hidden_NH.device, parts
    open_N = torch.zeros(N, dtype=torch.uint8, device=device)
    library_N = torch.empty(N, dtype=torch.float64, device=device) if library_size is None else library_size
    # target_sum goes in a tensor, because Triton passes a Python float as float32.
    constants = [reference._LN2_HI, reference._LN2_LO, reference._SQRT_HALF, *reference._ATANH[::-1], target_sum]
    constant = torch.tensor(constants, dtype=torch.float64, device=device)
    base, end = indptr[[0, -1]].tolist()
    value_E = torch.empty(end - base, dtype=torch.float32, device=device)
    BH, mapped = min(1024, max(16, triton.next_power_of_2(H))), maps[0] is not None
    if N and H:
        with torch.cuda.device_of(hidden_NH):
            _values_kernel[(N,)](
                indptr, indices, data, *maps, constant, library_N, value_E, open_N, base,
                GIVEN=library_size is not None, MAPPED=mapped, BE=128, enable_fp_fusion=False,
            )  # fmt: skip
            _gather_kernel[(N, triton.cdiv(H, BH))](
                indptr, indices, maps[0], value_E, W_GH, bias_H, hidden_NH, base, H,
                MAPPED=mapped, BH=BH, INTERPRETED=bool(triton.knobs.runtime.interpret), enable_fp_fusion=False,
            )  # fmt: skip
    return open_N, library_N


def _merge(
    rows: Tensor, indptr: Tensor, indices: Tensor, data: Tensor, column_map: Tensor | None, G: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Return CSR parts of some rows: no zeros or unmapped columns, columns increasing, repeated ones summed."""
    stored = indptr[rows + 1] - indptr[rows]
    ends = torch.cumsum(stored, 0)
    row_E = torch.repeat_interleave(torch.arange(len(rows), device=rows.device), stored)
    at_E = torch.arange(len(row_E), device=rows.device) + (indptr[rows] - ends + stored)[row_E]
    column_E = indices[at_E].long()
    # torch cannot gather uint16 on a CUDA device.
    wide = data.view(torch.int16)[at_E].int() & 0xFFFF if data.dtype == torch.uint16 else data[at_E]
    count_E = wide.double()
    if column_map is not None:
        column_E = column_map[column_E]
    kept_E = (column_E >= 0) & (count_E > 0)
    key_E, order_E = torch.sort(row_E[kept_E] * G + column_E[kept_E])
    key_E, copies_E = torch.unique_consecutive(key_E, return_counts=True)
    count_E = reference._segment_sum(count_E[kept_E][order_E], copies_E)
    starts = torch.cumsum(torch.bincount(key_E // G, minlength=len(rows)), 0)
    return torch.cat([starts.new_zeros(1), starts]), key_E % G, count_E
