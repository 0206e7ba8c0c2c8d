"""The one door to the kernels: four functions, each a `torch.library` operator `rvqa::...` behind a checked wrapper.

What is known without reading a tensor (shapes, dtypes) is checked in the wrappers; what needs its values (NaN, ranges)
inside the operators, which `torch.compile` does not look into. Backends get valid, contiguous input and are chosen by
`rvqa.kernels.registry`. No operator has a gradient. Shape letters: see `rvqa.kernels.reference`, which also defines
every result; all backends on a CPU return the same bits.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from rvqa.errors import InputError
from rvqa.kernels import registry

MAX_LEVELS = 256
MAX_CODEWORDS = 256
"""Largest codebook of `residual_quantize`, whose codes are uint8."""

MAX_NEAREST = 65_536
"""Largest codebook of `nearest_codeword`."""

MIN_COUNT, MAX_COUNT = 2.0**-149, 2.0**53
"""Range of a count that is not zero: the smallest float32, and the last point where float64 knows all integers."""

_LATENT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_INDEX_DTYPES = (torch.int32, torch.int64)
_UNSIGNED = (torch.uint8, torch.uint16)
_COUNT_DTYPES = (torch.float32, torch.float64, torch.int32, *_UNSIGNED)


class Tables(NamedTuple):
    """Codebooks made ready by `prepare`; pass it on as it is."""

    codebooks_MKD: Tensor
    """Codewords, float32 [M, K, D], contiguous and finite."""


def prepare(codebooks: Tensor) -> Tables:
    """Check codebooks and make them ready for `residual_quantize` and `decode`.

    Parameters
    ----------
    codebooks
        Codewords of every level, float32 [M, K, D] with 1 <= M <= 256 and 1 <= K <= 256, on the device of later calls.

    Returns
    -------
    Tables
        Independent of later changes to `codebooks`.

    Raises
    ------
    rvqa.errors.InputError
        A `ValueError`: wrong type, dtype or shape, or values that are not finite.
    """
    _require_dtype("codebooks", codebooks, (torch.float32,))
    if codebooks.ndim != 3:
        raise InputError(f"codebooks have shape {tuple(codebooks.shape)}; expected three axes [M, K, D]")
    M, K, D = codebooks.shape
    if not (1 <= M <= MAX_LEVELS and 1 <= K <= MAX_CODEWORDS and D >= 1):
        raise InputError(
            f"codebooks have shape [M={M}, K={K}, D={D}]; expected 1 <= M <= {MAX_LEVELS} levels, "
            f"1 <= K <= {MAX_CODEWORDS} codewords and D >= 1"
        )
    _require_finite("codebooks", codebooks.reshape(M * K, D), "codeword (level * K + index)")
    return Tables(codebooks.detach().clone(memory_format=torch.contiguous_format))


def residual_quantize(x: Tensor, tables: Tables, levels: int | None = None) -> Tensor:
    """Codes of latents: at every level the exactly nearest codeword to what the earlier levels left over.

    Parameters
    ----------
    x
        Latents [N, D], float32, or bfloat16 / float16 taken as the float32 values they stand for. Any strides.
    tables
        Result of `prepare`.
    levels
        Number of leading levels to encode; all M by default.

    Returns
    -------
    torch.Tensor
        Codes, uint8 [N, levels]: the argmin in exact real arithmetic, the lowest index on a tie. A row's codes depend
        on that row and the codebooks alone, whatever the batch, backend or thread count.

    Raises
    ------
    rvqa.errors.InputError
        A `ValueError`: wrong dtype or shape, `levels` outside 1..M, or NaN or infinity (number of rows, first row).

    Notes
    -----
    Greedy residual quantization (Chen, Guan & Wang, Sensors 2010), with certified arithmetic: docs/exactness.md.
    """
    M, _, D = tables.codebooks_MKD.shape
    _require_dtype("x", x, _LATENT_DTYPES)
    _require_width("x", x, D)
    _require_device("x", x, tables.codebooks_MKD)
    return torch.ops.rvqa.residual_quantize(x, tables.codebooks_MKD, _level_count(levels, M))


def nearest_codeword(x: Tensor, codebook: Tensor) -> tuple[Tensor, Tensor]:
    """Exactly nearest codeword of every row, and its squared distance.

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
        A `ValueError`: wrong dtype or shape, or values that are not finite.
    """
    _require_dtype("codebook", codebook, (torch.float32,))
    if codebook.ndim != 2 or not 1 <= codebook.shape[0] <= MAX_NEAREST or codebook.shape[1] < 1:
        raise InputError(f"codebook has shape {tuple(codebook.shape)}; expected [K, D] with 1 <= K <= {MAX_NEAREST:,}")
    _require_dtype("x", x, _LATENT_DTYPES)
    _require_width("x", x, codebook.shape[1])
    _require_device("x", x, codebook)
    return torch.ops.rvqa.nearest_codeword(x, codebook)


def decode(codes: Tensor, tables: Tables, levels: int | None = None) -> Tensor:
    """Latents of codes: the sum of the chosen codewords.

    Parameters
    ----------
    codes
        uint8 [N, L] with 1 <= L <= M, as `residual_quantize` gives them.
    tables
        Result of `prepare`.
    levels
        Number of leading levels to add up; all L by default.

    Returns
    -------
    torch.Tensor
        float32 [N, D], added in float32 level by level, so the same bits everywhere.

    Raises
    ------
    rvqa.errors.InputError
        A `ValueError`: wrong dtype or shape, `levels` outside 1..L, or a code that is not below K (number and first).
    """
    M = tables.codebooks_MKD.shape[0]
    _require_dtype("codes", codes, (torch.uint8,))
    if codes.ndim != 2 or not 1 <= codes.shape[1] <= M:
        raise InputError(f"codes have shape {tuple(codes.shape)}; expected [N, levels] with 1 to {M} levels")
    _require_device("codes", codes, tables.codebooks_MKD)
    return torch.ops.rvqa.decode(codes, tables.codebooks_MKD, _level_count(levels, codes.shape[1]))


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
        Row pointers, int32 or int64 [N + 1], non-decreasing, into `indices` and `data`; need not start at 0, so a slice
        of the pointers of a larger matrix will do.
    indices
        Column of every stored entry, int32 or int64 [E], in any order; repeated columns are added up.
    data
        Raw counts, float32, float64, int32, uint8 or uint16 [E]; zero, or between 2^-149 and 2^53.
    weight
        float32 [G, H]. Standardisation of genes is folded into it.
    bias
        float32 [H].
    target_sum
        Counts a cell is scaled to.
    column_map
        int32 or int64, one entry per column of the counts: its row of `weight`, or -1 for a gene that counts only in
        the library size. Without it, columns are rows of `weight`.
    library_size
        Counts per cell [N], float32 or float64; by default the sum over **all** stored entries of a row, mapped or not.

    Returns
    -------
    torch.Tensor
        float32 [N, H]; `bias` for a row without counts. A row's bits depend on that row alone: not on the batch, the
        order of its entries, the index dtype, the backend (on a CPU) or the thread count.

    Raises
    ------
    rvqa.errors.InputError
        A `ValueError`: wrong dtype or shape, pointers or columns out of range, counts that are negative or not finite,
        or a library size that is negative, not finite, or 0 in a row with counts.
    """
    _require_dtype("indptr", indptr, _INDEX_DTYPES)
    _require_dtype("indices", indices, _INDEX_DTYPES)
    _require_dtype("data", data, _COUNT_DTYPES)
    _require_dtype("weight", weight, (torch.float32,))
    _require_dtype("bias", bias, (torch.float32,))
    tensors = {"indptr": indptr, "indices": indices, "data": data, "bias": bias}
    if column_map is not None:
        _require_dtype("column_map", column_map, _INDEX_DTYPES)
        tensors["column_map"] = column_map
    if library_size is not None:
        _require_dtype("library_size", library_size, (torch.float32, torch.float64))
        tensors["library_size"] = library_size
    for name, tensor in tensors.items():
        _require_device(name, tensor, weight)
        if tensor.ndim != 1:
            raise InputError(f"{name} has shape {tuple(tensor.shape)}; expected one axis")
    if weight.ndim != 2 or bias.shape[0] != weight.shape[1]:
        raise InputError(f"weight {tuple(weight.shape)} and bias {tuple(bias.shape)} do not fit as [G, H] and [H]")
    if indptr.shape[0] < 1 or indices.shape != data.shape:
        raise InputError(
            f"indptr {tuple(indptr.shape)}, indices {tuple(indices.shape)}, data {tuple(data.shape)} are not the parts "
            "of one CSR matrix; expected [N + 1], [E] and [E]"
        )
    if library_size is not None and library_size.shape[0] != indptr.shape[0] - 1:
        raise InputError(f"library_size has {library_size.shape[0]} entries for {indptr.shape[0] - 1} rows")
    if not 0 < target_sum <= MAX_COUNT:
        raise InputError(f"target_sum is {target_sum}; expected a number of counts above 0, such as 1e4")
    return torch.ops.rvqa.csr_project(indptr, indices, data, weight, bias, float(target_sum), column_map, library_size)


@torch.library.custom_op("rvqa::residual_quantize", mutates_args=())
def _residual_quantize(x: Tensor, codebooks: Tensor, levels: int) -> Tensor:
    x_ND = x.detach().float().contiguous()
    _require_finite("x", x_ND, "row")
    return registry.dispatch("residual_quantize", x.device)(x_ND, codebooks.detach(), levels)


@_residual_quantize.register_fake
def _(x: Tensor, codebooks: Tensor, levels: int) -> Tensor:
    return x.new_empty((x.shape[0], levels), dtype=torch.uint8)


@torch.library.custom_op("rvqa::nearest_codeword", mutates_args=())
def _nearest_codeword(x: Tensor, codebook: Tensor) -> tuple[Tensor, Tensor]:
    x_ND, codebook_KD = x.detach().float().contiguous(), codebook.detach().contiguous()
    _require_finite("x", x_ND, "row")
    _require_finite("codebook", codebook_KD, "codeword")
    return registry.dispatch("nearest_codeword", x.device)(x_ND, codebook_KD)


@_nearest_codeword.register_fake
def _(x: Tensor, codebook: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape[0], dtype=torch.int64), x.new_empty(x.shape[0], dtype=torch.float32)


@torch.library.custom_op("rvqa::decode", mutates_args=())
def _decode(codes: Tensor, codebooks: Tensor, levels: int) -> Tensor:
    codes_NM = codes[:, :levels].contiguous()
    K = codebooks.shape[1]
    wrong_NM = codes_NM > K - 1
    if bool(wrong_NM.any()):
        row, level = torch.nonzero(wrong_NM)[0].tolist()
        raise InputError(
            f"{int(wrong_NM.sum()):,} codes are not below K={K}; the first is {int(codes_NM[row, level])} in row {row} "
            f"at level {level}. Were they made with another model? Encode the cells again."
        )
    return registry.dispatch("decode", codes.device)(codes_NM, codebooks.detach(), levels)


@_decode.register_fake
def _(codes: Tensor, codebooks: Tensor, levels: int) -> Tensor:
    return codebooks.new_empty((codes.shape[0], codebooks.shape[2]))


@torch.library.custom_op("rvqa::csr_project", mutates_args=())
def _csr_project(
    indptr: Tensor,
    indices: Tensor,
    data: Tensor,
    weight: Tensor,
    bias: Tensor,
    target_sum: float,
    column_map: Tensor | None,
    library_size: Tensor | None,
) -> Tensor:
    indptr, indices, data = indptr.long().contiguous(), indices.contiguous(), data.contiguous()
    weight, bias = weight.detach().contiguous(), bias.detach().contiguous()
    if column_map is not None:
        column_map = column_map.long().contiguous()
        _require_range("column_map", column_map, -1, len(weight) - 1, "rows of weight, or -1")
    _require_rows(indptr, len(data))
    used = slice(int(indptr[0]), int(indptr[-1]))
    columns = len(weight) if column_map is None else len(column_map)
    _require_range("indices", indices[used], 0, columns - 1, "columns")
    _require_counts("data", data[used])
    if library_size is not None:
        library_size = library_size.double().contiguous()
        _require_counts("library_size", library_size)
        for row in torch.nonzero(library_size == 0).flatten().tolist():
            if bool((data[int(indptr[row]) : int(indptr[row + 1])] > 0).any()):
                raise InputError(f"library_size is 0 in row {row}, which has counts; expected its total counts")
    return registry.dispatch("csr_project", weight.device)(
        indptr, indices, data, weight, bias, target_sum, column_map, library_size
    )


@_csr_project.register_fake
def _(
    indptr: Tensor,
    indices: Tensor,
    data: Tensor,
    weight: Tensor,
    bias: Tensor,
    target_sum: float,
    column_map: Tensor | None,
    library_size: Tensor | None,
) -> Tensor:
    return weight.new_empty((indptr.shape[0] - 1, weight.shape[1]))


def _level_count(levels: int | None, available: int) -> int:
    if levels is None:
        return available
    if not 1 <= levels <= available:
        raise InputError(f"levels is {levels}; expected 1 to {available}")
    return levels


def _require_dtype(name: str, value: Tensor, allowed: tuple[torch.dtype, ...]) -> None:
    if not isinstance(value, Tensor):
        raise InputError(f"{name} is a {type(value).__name__}; expected a torch.Tensor")
    if value.dtype not in allowed:
        names = " or ".join(str(dtype).removeprefix("torch.") for dtype in allowed)
        raise InputError(f"{name} has dtype {str(value.dtype).removeprefix('torch.')}; expected {names}")


def _require_width(name: str, value: Tensor, width: int) -> None:
    if value.ndim != 2 or value.shape[1] != width:
        raise InputError(f"{name} has shape {tuple(value.shape)}; expected [N, {width}], the width of the codewords")


def _require_device(name: str, value: Tensor, other: Tensor) -> None:
    if value.device != other.device:
        raise InputError(f"{name} is on {value.device}, the parameters on {other.device}; move one of them with .to()")


def _require_finite(name: str, value_ND: Tensor, row: str) -> None:
    wrong_N = ~torch.isfinite(value_ND).all(1)
    if bool(wrong_N.any()):
        first = int(wrong_N.nonzero()[0])
        raise InputError(
            f"{name} has NaN or infinity in {int(wrong_N.sum())} of {len(wrong_N)} rows, first in {row} {first}"
        )


def _require_range(name: str, value: Tensor, low: int, high: int, meaning: str) -> None:
    if len(value) == 0:
        return
    least, most = (int(v) for v in torch.aminmax(value))
    if least < low or most > high:
        raise InputError(f"{name} has values from {least} to {most}; expected {low} to {high} ({meaning})")


def _require_rows(indptr: Tensor, entries: int) -> None:
    if bool((indptr[1:] < indptr[:-1]).any()) or int(indptr[0]) < 0 or int(indptr[-1]) > entries:
        raise InputError(
            f"indptr runs from {int(indptr[0])} to {int(indptr[-1])} for {entries} entries; expected non-decreasing "
            "row pointers within them"
        )


def _require_counts(name: str, value: Tensor) -> None:
    if value.dtype in _UNSIGNED or len(value) == 0:
        return
    least, most = (float(v) for v in torch.aminmax(value))
    tiny = value.dtype == torch.float64 and bool(((value > 0) & (value < MIN_COUNT)).any())
    if least >= 0 and most <= MAX_COUNT and not tiny:
        return
    wrong = ~((value == 0) | ((value >= MIN_COUNT) & (value <= MAX_COUNT)))
    first = int(wrong.nonzero()[0])
    raise InputError(
        f"{name} has {int(wrong.sum())} values that are negative, not finite or no counts; the first is "
        f"{value[first].item()} at position {first}. Expected raw counts: 0, or between 2^-149 and 2^53"
    )
