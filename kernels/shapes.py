"""Checks of the operators that read no tensor (types, shapes, devices, limits), and `Tables`, which they take.

`rvqa.kernels.checks` has the checks of single tensors.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from rvqa.errors import InputError
from rvqa.kernels import checks

MAX_LEVELS = 256
MAX_CODEWORDS = 256
"""Largest codebook of `residual_quantize`, whose codes are uint8."""

NO_CODE = 255
"""Code in every level of a row with NaN or infinity that `residual_quantize` marks."""

MAX_NEAREST = 65_536
"""Largest codebook of `nearest_codeword`."""

_LATENT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_INDEX_DTYPES = (torch.int32, torch.int64)
_COUNT_DTYPES = (torch.float32, torch.float64, torch.int32, torch.uint8, torch.uint16, torch.uint32)

_MOST_COLUMNS = 2**31 - 1
"""Most columns of a matrix, because vector instructions gather by 32 bits."""


class Tables(NamedTuple):
    """Codebooks made ready by `prepare`; pass them on unchanged."""

    codebooks_MKD: Tensor
    """Codewords, float32 [M, K, D], contiguous and finite."""

    packed: Tensor
    """Form that the backend makes of them, uint8, in a layout of its own; empty if it needs none."""


def require_tables(tables: object) -> None:
    """Check that `tables` is a `Tables` of tensors."""
    if not isinstance(tables, Tables):
        raise InputError(f"tables is a {type(tables).__name__}; expected what rvqa.kernels.ops.prepare returns")
    codebooks_MKD, packed = tables
    checks.require_tensors(codebooks=codebooks_MKD, packed=packed)


def require_target(target_sum: float) -> None:
    """Check that `target_sum` is a number of counts."""
    if not 0 < target_sum <= checks.MAX_COUNT:
        raise InputError(f"target_sum is {checks.said(target_sum)}; expected a number of counts above 0, such as 1e4")


def require_codebooks(codebooks: Tensor, narrowest: int = 1) -> tuple[int, int, int]:
    """Check that codebooks are float32 [M, K, D]; return M, K and D."""
    checks.require_dtype("codebooks", codebooks, (torch.float32,))
    if codebooks.ndim != 3:
        raise InputError(f"codebooks have shape {tuple(codebooks.shape)}; expected three axes [M, K, D]")
    M, K, D = codebooks.shape
    if not (1 <= M <= MAX_LEVELS and 1 <= K <= MAX_CODEWORDS and narrowest <= D):
        raise InputError(
            f"codebooks have shape [M={M}, K={K}, D={D}]; expected 1 <= M <= {MAX_LEVELS} levels, "
            f"1 <= K <= {MAX_CODEWORDS} codewords and D >= {narrowest}"
        )
    return M, K, D


def require_latents(x: Tensor, codebook: Tensor, D: int) -> None:
    """Check that latents are floats [N, D] on the device of the codebook."""
    checks.require_dtype("x", x, _LATENT_DTYPES)
    checks.require_width("x", x, D)
    checks.require_device("x", x, codebook)


def check_tables(x: Tensor, codebooks: Tensor, packed: Tensor) -> tuple[int, int, int]:
    """Check that latents fit the tables; return M, K and D."""
    M, K, D = require_codebooks(codebooks)
    require_latents(x, codebooks, D)
    checks.require_dtype("packed", packed, (torch.uint8,))
    checks.require_device("packed", packed, codebooks)
    if packed.ndim != 1 or not packed.is_contiguous():
        raise InputError("packed is not what rvqa.kernels.ops.prepare made; prepare the codebooks again")
    return M, K, D


def check_codes(codes: Tensor, codebooks: Tensor, levels: int | None = None) -> int:
    """Check codes; return the number of levels that are asked for."""
    M, _, _ = require_codebooks(codebooks, 0)
    checks.require_dtype("codes", codes, (torch.uint8,))
    sizes = codes.shape
    if len(sizes) != 2 or not 1 <= sizes[1] <= M:
        raise InputError(f"codes have shape {tuple(sizes)}; expected [N, levels] with 1 to {M} levels")
    checks.require_device("codes", codes, codebooks)
    return level_count(levels, sizes[1])


def check_norms(x: Tensor, codes: Tensor, codebooks: Tensor, packed: Tensor) -> None:
    """Check that latents, codes and tables fit each other."""
    check_tables(x, codebooks, packed)
    check_codes(codes, codebooks)
    if codes.shape[0] != x.shape[0]:
        raise InputError(f"codes have {codes.shape[0]} rows, x has {x.shape[0]}")


def check_out(codes: Tensor, codebooks: Tensor, out: Tensor) -> None:
    """Check that `out` can hold the result of `decode`."""
    checks.require_dtype("out", out, (torch.float32,))
    checks.require_device("out", out, codes)
    if out.shape != (codes.shape[0], codebooks.shape[2]) or not out.is_contiguous():
        raise InputError(f"out has shape {tuple(out.shape)}; expected contiguous [N, D] for these codes and tables")


def check_nearest(x: Tensor, codebook: Tensor) -> None:
    """Check that latents fit one codebook [K, D]."""
    checks.require_dtype("codebook", codebook, (torch.float32,))
    if codebook.ndim != 2 or not 1 <= codebook.shape[0] <= MAX_NEAREST or codebook.shape[1] < 1:
        raise InputError(f"codebook has shape {tuple(codebook.shape)}; expected [K, D] with 1 <= K <= {MAX_NEAREST:,}")
    require_latents(x, codebook, codebook.shape[1])


def check_rows(indptr: Tensor, indices: Tensor, data: Tensor) -> None:
    """Check that three tensors are the parts of one CSR matrix."""
    checks.require_dtype("indptr", indptr, _INDEX_DTYPES)
    checks.require_dtype("indices", indices, _INDEX_DTYPES)
    checks.require_dtype("data", data, _COUNT_DTYPES)
    if indptr.ndim != 1 or indptr.shape[0] < 1 or indices.ndim != 1 or indices.shape != data.shape:
        raise InputError(
            f"indptr {tuple(indptr.shape)}, indices {tuple(indices.shape)}, data {tuple(data.shape)} are not the parts "
            "of one CSR matrix; expected [N + 1], [E] and [E]"
        )
    checks.require_device("indices", indices, indptr)
    checks.require_device("data", data, indptr)


def check_projection(
    indptr: Tensor,
    indices: Tensor,
    data: Tensor,
    weight: Tensor,
    bias: Tensor,
    target_sum: float,
    column_map: Tensor | None,
    library_size: Tensor | None,
) -> None:
    """Check the arguments of `csr_project`."""
    check_rows(indptr, indices, data)
    checks.require_dtype("weight", weight, (torch.float32,))
    checks.require_dtype("bias", bias, (torch.float32,))
    if weight.ndim != 2 or bias.ndim != 1 or bias.shape[0] != weight.shape[1]:
        raise InputError(f"weight {tuple(weight.shape)} and bias {tuple(bias.shape)} do not fit as [G, H] and [H]")
    if weight.shape[0] > checks.MAX_GENES:
        raise InputError(f"weight has {weight.shape[0]:,} rows; expected at most {checks.MAX_GENES:,}")
    checks.require_device("indptr", indptr, weight)
    checks.require_device("bias", bias, weight)
    if column_map is not None:
        checks.require_dtype("column_map", column_map, _INDEX_DTYPES)
        checks.require_device("column_map", column_map, weight)
        if column_map.ndim != 1 or column_map.shape[0] > _MOST_COLUMNS:
            raise InputError(f"column_map has shape {tuple(column_map.shape)}; expected one axis of at most 2^31 - 1")
    if library_size is not None:
        checks.require_dtype("library_size", library_size, (torch.float32, torch.float64))
        checks.require_device("library_size", library_size, weight)
        if library_size.ndim != 1 or library_size.shape[0] != indptr.shape[0] - 1:
            raise InputError(
                f"library_size of shape {tuple(library_size.shape)} has {library_size.numel()} entries for "
                f"{indptr.shape[0] - 1} rows; expected one axis with one for each"
            )
    require_target(target_sum)


def check_totals(indptr: Tensor, indices: Tensor, data: Tensor, columns: int, known: Tensor | None) -> None:
    """Check the arguments of `csr_totals`."""
    check_rows(indptr, indices, data)
    if columns < 0:
        raise InputError(f"columns is {columns}; expected the number of columns of the matrix")
    if known is not None:
        checks.require_dtype("known", known, (torch.bool,))
        checks.require_device("known", known, indptr)
        if known.shape != (columns,):
            raise InputError(f"known has shape {tuple(known.shape)} for {columns} columns; expected one entry for each")


def check_mask(logits: Tensor, states: Tensor, windows: Tensor) -> None:
    """Check the arguments of `apply_span_mask_`."""
    checks.require_dtype("logits", logits, _LATENT_DTYPES)
    checks.require_dtype("states", states, _INDEX_DTYPES)
    checks.require_dtype("windows", windows, (torch.int64,))
    sizes, table = logits.shape, windows.shape
    if len(sizes) != 2 or states.shape != sizes[:1] or len(table) != 2 or table[1] != 3:
        raise InputError(
            f"logits {tuple(sizes)}, states {tuple(states.shape)} and windows {tuple(table)} do not fit as [B, V], [B] "
            "and [S, 3]"
        )
    (B, V), (row, column) = sizes, logits.stride()
    if (B > 1 and row < V) or (V > 1 and column != 1) or not windows.is_contiguous():
        raise InputError(
            f"logits {tuple(sizes)} have strides {logits.stride()}, windows {windows.stride()}; expected contiguous "
            "columns in rows that do not overlap, and contiguous windows"
        )
    device = logits.device
    if states.device != device or windows.device != device:
        raise InputError(
            f"logits are on {device}, states on {states.device}, windows on {windows.device}; expected one device"
        )


def whole(levels: int | None) -> int | None:
    """Check that `levels` is None or a whole number of levels that codebooks can have."""
    if levels is not None:
        checks.require_whole("levels", levels, 1, MAX_LEVELS)
    return levels


def level_count(levels: int | None, available: int) -> int:
    """Return the number of levels that are asked for, or all that are available."""
    if levels is None:
        return available
    if not 1 <= levels <= available:
        raise InputError(f"levels is {levels}; expected 1 to {available}")
    return levels
