"""Triton kernel that sets the logits of ids a row may not write to -inf.

The kernel was not timed: the block size is a guess.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 4096


@triton.jit(do_not_specialize=["S"])
def _mask_kernel(logits_ptr, states_ptr, windows_ptr, V, S, stride, BLOCK: tl.constexpr):
    """Mask BLOCK columns of one row; write nothing if its window rules out none of them."""
    row = tl.program_id(0).to(tl.int64)
    state = tl.load(states_ptr + row).to(tl.int64)
    if (state < 0) | (state >= S):
        return
    lo = tl.minimum(tl.maximum(tl.load(windows_ptr + 3 * state), 0), V)
    hi = tl.minimum(tl.maximum(tl.load(windows_ptr + 3 * state + 1), lo), V)
    lo, hi = lo.to(tl.int32), hi.to(tl.int32)
    inside = tl.load(windows_ptr + 3 * state + 2) != 0
    first = tl.program_id(1) * BLOCK
    last = tl.minimum(first + BLOCK, V)
    within = tl.maximum(tl.minimum(hi, last) - tl.maximum(lo, first), 0)  # number of columns in the window
    ruled_out = tl.where(inside, last - first - within, within)
    if ruled_out == 0:
        return
    at = first + tl.arange(0, BLOCK)
    to = logits_ptr + row * stride + at
    infinity = tl.full([BLOCK], float("-inf"), tl.float32).to(logits_ptr.dtype.element_ty)
    if ruled_out == BLOCK:  # without a mask the stores are wide
        tl.store(to, infinity)
    else:
        mask = (((at >= lo) & (at < hi)) != inside) & (at < V)
        tl.store(to, infinity, mask=mask)


def apply_span_mask_(logits_BV: Tensor, states_B: Tensor, windows_S3: Tensor) -> None:
    """Set ids that a row may not write to -inf, in place; the host reads no value."""
    B, V = logits_BV.shape
    if B and V:
        with torch.cuda.device_of(logits_BV):
            _mask_kernel[(B, triton.cdiv(V, _BLOCK))](
                logits_BV, states_B, windows_S3, V, len(windows_S3), logits_BV.stride(0), BLOCK=_BLOCK, num_warps=8
            )
