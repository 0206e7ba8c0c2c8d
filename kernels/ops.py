"""The only entry to the kernels: functions that each wrap a `torch.library` operator `rvqa::...`, with checks.

Anyone can call the operators, so they check all their arguments. They check values (NaN, ranges) when they run, and
shapes and dtypes also when `torch.compile` asks for the shapes of a result. The wrappers check the types that an
operator's schema cannot express. `rvqa.kernels.registry` chooses the backend, which gets valid, contiguous input. No
operator has a gradient. `rvqa.kernels.reference` explains the shape letters and defines every result; all backends on a
CPU return the same bits.
"""

from typing import Literal

import numpy as np
import torch
from torch import Tensor

from rvqa.errors import InputError
from rvqa.kernels import checks, registry, shapes
from rvqa.kernels import operators as _registered  # noqa: F401  what is called here
from rvqa.kernels.shapes import MAX_CODEWORDS, MAX_LEVELS, MAX_NEAREST, NO_CODE, Tables

__all__ = [
    "MAX_CODEWORDS",
    "MAX_LEVELS",
    "MAX_NEAREST",
    "NO_CODE",
    "Tables",
    "apply_span_mask_",
    "csr_project",
    "csr_totals",
    "decode",
    "nearest_codeword",
    "prepare",
    "residual_norms",
    "residual_quantize",
]


def prepare(codebooks: Tensor) -> Tables:
    """Check codebooks and make them ready for `residual_quantize` and `decode`.

    Parameters
    ----------
    codebooks
        Codewords of every level, float32 [M, K, D] with 1 <= M <= 256 and 1 <= K <= 256, on the device of later calls.

    Returns
    -------
    Tables
        Checked copy of the codebooks; later changes to `codebooks` do not affect it.

    Raises
    ------
    rvqa.errors.InputError
        A `ValueError`: a type, dtype or shape is wrong, or a value is not finite.
    """
    checks.require_tensors(codebooks=codebooks)
    shapes.require_codebooks(codebooks)
    if codebooks.is_meta:
        raise InputError("codebooks are on meta, which has no values; prepare them on the device of the latents")
    own = codebooks.detach().clone(memory_format=torch.contiguous_format)
    checks.require_finite("codebooks", own.flatten(0, 1), "codeword (level * K + index)")
    return Tables(own, registry.dispatch("pack", own.device)(own))


def residual_quantize(
    x: Tensor, tables: Tables, levels: int | None = None, *, not_finite: Literal["raise", "mark"] = "raise"
) -> Tensor:
    """Quantize latents: each level picks the codeword that is exactly nearest to the residual of the earlier levels.

    Parameters
    ----------
    x
        Latents [N, D] of any strides: float32, or bfloat16 / float16, which are widened to float32 exactly.
    tables
        Result of `prepare`.
    levels
        Number of leading levels to encode. Defaults to all M.
    not_finite
        What to do with rows with NaN or infinity: "raise" an error (the default), or "mark" them with 255 in every
        level, which `decode` rejects (K < 256 only).

    Returns
    -------
    torch.Tensor
        Codes, uint8 [N, levels]: the argmin in exact real arithmetic, the lowest index on a tie. A row's codes depend
        on that row and the codebooks alone, whatever the batch, backend or thread count.

    Raises
    ------
    rvqa.errors.InputError
        A `ValueError`: a dtype or shape is wrong, `levels` is outside 1..M, there is NaN or infinity (the message has
        the number of rows and the first), or `not_finite` is "mark" where 255 is a code.

    Notes
    -----
    Greedy residual quantization (Chen, Guan & Wang, Sensors 2010), with certified arithmetic: docs/exactness.md.
    """
    shapes.require_tables(tables)
    checks.require_tensors(x=x)
    if not isinstance(not_finite, str) or not_finite not in ("raise", "mark"):
        raise InputError("not_finite is neither 'raise' nor 'mark'; expected one of these")
    return torch.ops.rvqa.residual_quantize.default(x, *tables, shapes.whole(levels), not_finite == "mark")


def residual_norms(x: Tensor, codes: Tensor, tables: Tables) -> Tensor:
    """Return the length of the residual after each level: |x - sum of the codewords so far|.

    Parameters
    ----------
    x
        Latents [N, D], as for `residual_quantize`.
    codes
        Their codes, uint8 [N, L] with 1 <= L <= M.
    tables
        Result of `prepare`.

    Returns
    -------
    torch.Tensor
        Lengths, float32 [N, L]: residuals and squares are summed in float64, in increasing level and column, and
        rounded once. A row that is not finite gives NaN.

    Raises
    ------
    rvqa.errors.InputError
        A `ValueError`: a dtype or shape is wrong, or a code is not below K.
    """
    shapes.require_tables(tables)
    checks.require_tensors(x=x, codes=codes)
    return torch.ops.rvqa.residual_norms.default(x, codes, *tables)


def nearest_codeword(x: Tensor, codebook: Tensor) -> tuple[Tensor, Tensor]:
    """Find the exactly nearest codeword of every row, and its squared distance.

    Parameters
    ----------
    x
        Rows [N, D], float32, bfloat16 or float16. Any strides.
    codebook
        Codewords, float32 [K, D], 1 <= K <= 65,536.

    Returns
    -------
    index : torch.Tensor
        int64 [N]: the argmin in exact real arithmetic, the lowest index on a tie.
    distance : torch.Tensor
        Squared Euclidean distance, float32 [N]; infinite above 3.4e38.

    Raises
    ------
    rvqa.errors.InputError
        A `ValueError`: a dtype or shape is wrong, or a value is not finite.
    """
    checks.require_tensors(x=x, codebook=codebook)
    return torch.ops.rvqa.nearest_codeword.default(x, codebook)


def decode(codes: Tensor, tables: Tables, levels: int | None = None, *, out: Tensor | None = None) -> Tensor:
    """Return the latents of codes: the sum of the chosen codewords.

    Parameters
    ----------
    codes
        uint8 [N, L] with 1 <= L <= M, as `residual_quantize` gives them.
    tables
        Result of `prepare`.
    levels
        Number of leading levels to add up. Defaults to all L.
    out
        Contiguous float32 [N, D] to write to, in memory of its own. Fresh memory costs more than the sums, so pass
        the same tensor for every batch.

    Returns
    -------
    torch.Tensor
        `out` or a new tensor, float32 [N, D], summed in float32 level by level, so the bits are the same everywhere.

    Raises
    ------
    rvqa.errors.InputError
        A `ValueError`: a dtype or shape is wrong, `levels` is outside 1..L, or codes are not below K (number, first).
    """
    shapes.require_tables(tables)
    checks.require_tensors(codes=codes)
    levels = shapes.whole(levels)
    if out is None:
        return torch.ops.rvqa.decode.default(codes, tables.codebooks_MKD, levels)
    checks.require_tensors(out=out)
    checks.require_writable("out", out)
    torch.ops.rvqa.decode_into.default(codes, tables.codebooks_MKD, levels, out)
    return out


def csr_project(
    indptr: Tensor,
    indices: Tensor,
    data: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    target_sum: float = 1e4,
    column_map: Tensor | None = None,
    library_size: Tensor | None = None,
) -> Tensor:
    """First encoder layer straight from sparse raw counts: log1p(counts * target_sum / library) @ weight + bias.

    Parameters
    ----------
    indptr
        Row pointers into `indices` and `data`, int32 or int64 [N + 1], non-decreasing. They need not start at 0, so a
        slice of the pointers of a larger matrix is allowed.
    indices
        Column of every stored entry, int32 or int64 [E], in any order; repeated columns are added up.
    data
        Raw counts, float32, float64, int32, uint8, uint16 or uint32 [E]; zero, or between 2^-149 and 2^53.
    weight
        Weight, float32 [G, H], with the standardisation of genes folded in.
    bias
        Bias, float32 [H].
    target_sum
        Total counts that a cell is scaled to. Defaults to 1e4.
    column_map
        int32 or int64, one entry per column of the counts: its row of `weight`, or -1 for a gene that enters only the
        library size. Without it, columns are rows of `weight`.
    library_size
        Counts per cell, float32 or float64 [N]. Defaults to the sum of **all** stored entries of a row, mapped or not.

    Returns
    -------
    torch.Tensor
        float32 [N, H]; `bias` for a row without counts. A row's bits depend on that row alone, not on the batch, the
        order of its entries, the index dtype, the backend (on a CPU) or the thread count.

    Raises
    ------
    rvqa.errors.InputError
        A `ValueError`: a dtype or shape is wrong, pointers or columns are out of range, counts are negative or not
        finite, or a library size is negative, not finite, or 0 in a row with counts.
    """
    checks.require_tensors(indptr=indptr, indices=indices, data=data, weight=weight, bias=bias)
    if column_map is not None:
        checks.require_tensors(column_map=column_map)
    if library_size is not None:
        checks.require_tensors(library_size=library_size)
    if not isinstance(target_sum, (float, int, np.floating, np.integer, torch.SymFloat)):
        raise InputError(f"target_sum is a {type(target_sum).__name__}; expected a number of counts, such as 1e4")
    shapes.require_target(target_sum)
    return torch.ops.rvqa.csr_project.default(
        indptr, indices, data, weight, bias, float(target_sum), column_map, library_size
    )


def csr_totals(
    indptr: Tensor, indices: Tensor, data: Tensor, *, columns: int, known: Tensor | None = None
) -> tuple[Tensor, int]:
    """Compute totals of sparse rows, and whether every entry is a raw count, in one pass.

    Parameters
    ----------
    indptr, indices, data
        As for `csr_project`.
    columns
        Number of columns of the matrix.
    known
        Columns that enter the totals, bool [columns]. Defaults to all.

    Returns
    -------
    tuple
        Exact totals, float64 [N]; and the number of entries that are not raw counts: not whole, negative, infinite,
        above 2^24, or in a column outside the matrix. If that number is not 0, the totals are meaningless.

    Raises
    ------
    rvqa.errors.InputError
        A `ValueError`: a dtype or shape is wrong, or row pointers are out of range.
    """
    checks.require_tensors(indptr=indptr, indices=indices, data=data)
    if known is not None:
        checks.require_tensors(known=known)
    checks.require_whole("columns", columns, 0, 2**63 - 1)
    total_N, wrong = torch.ops.rvqa.csr_totals.default(indptr, indices, data, columns, known)
    if wrong.is_meta:
        raise InputError("indptr is on meta, which has no values; pass the matrix itself")
    return total_N, int(wrong)


def apply_span_mask_(logits: Tensor, states: Tensor, windows: Tensor) -> Tensor:
    """Set the logits of ids that a row may not write to -inf, in place.

    Parameters
    ----------
    logits
        float32, bfloat16 or float16 [B, V]. Columns are contiguous; the distance between rows may be any.
    states
        Window of each row, int32 or int64 [B]; -1 leaves the row as it is.
    windows
        int64 [S, 3], contiguous: lo, hi and inside. If inside is 1, only ids in [lo, hi) stay; if 0, only the others.
        An empty window has hi <= lo.

    Returns
    -------
    torch.Tensor
        The same `logits`. Logits that stay keep their bits.

    Raises
    ------
    rvqa.errors.InputError
        A `ValueError`, before anything is written: a dtype, shape or stride is wrong, logits require a gradient, or on
        a CPU a state is outside -1..S-1 (number and first). On other devices a row with such a state stays as it is,
        because reading the states would wait for the device.
    """
    checks.require_tensors(logits=logits, states=states, windows=windows)
    checks.require_writable("logits", logits)
    if logits.requires_grad and torch.is_grad_enabled():
        raise InputError("logits require a gradient, and this operator has none; use rvqa.language.masks.apply_mask_")
    torch.ops.rvqa.apply_span_mask_.default(logits, states, windows)
    return logits
