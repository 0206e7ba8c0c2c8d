"""Is the input what the operators promise to take? Each function raises an `InputError` that names an offender."""

import math

import torch
from torch import Tensor

from rvqa.errors import InputError

MIN_COUNT, MAX_COUNT = 2.0**-149, 2.0**53
"""Range of a count that is not zero: the smallest float32, and the last point where float64 knows all integers."""

MAX_GENES = 2**24
"""Most rows of a projection's weight."""

_UNSIGNED = (torch.uint8, torch.uint16, torch.uint32)


def require_dtype(name: str, value: Tensor, allowed: tuple[torch.dtype, ...]) -> None:
    """The value is a tensor of one of these dtypes."""
    if not isinstance(value, Tensor):
        raise InputError(f"{name} is a {type(value).__name__}; expected a torch.Tensor")
    if value.dtype not in allowed:
        names = " or ".join(str(dtype).removeprefix("torch.") for dtype in allowed)
        raise InputError(f"{name} has dtype {str(value.dtype).removeprefix('torch.')}; expected {names}")


def require_width(name: str, value: Tensor, width: int) -> None:
    """Rows are as wide as the codewords."""
    if value.ndim != 2 or value.shape[1] != width:
        raise InputError(f"{name} has shape {tuple(value.shape)}; expected [N, {width}], the width of the codewords")


def require_device(name: str, value: Tensor, other: Tensor) -> None:
    """Both tensors are on one device."""
    if value.device != other.device:
        raise InputError(f"{name} is on {value.device}, the parameters on {other.device}; move one of them with .to()")


def require_finite(name: str, value_ND: Tensor, row: str) -> None:
    """No NaN or infinity."""
    if math.isfinite(float(value_ND.sum())):
        return
    wrong_N = ~torch.isfinite(value_ND).all(1)
    if bool(wrong_N.any()):
        first = int(wrong_N.nonzero()[0])
        raise InputError(
            f"{name} has NaN or infinity in {int(wrong_N.sum())} of {len(wrong_N)} rows, first in {row} {first}"
        )


def require_range(name: str, value: Tensor, low: int, high: int, meaning: str) -> None:
    """Whole numbers from low to high."""
    if len(value) == 0:
        return
    least, most = (int(v) for v in torch.aminmax(value))
    if least < low or most > high:
        raise InputError(f"{name} has values from {least} to {most}; expected {low} to {high} ({meaning})")


def require_codes(codes_NM: Tensor, K: int) -> None:
    """Codes are below K."""
    wrong_NM = codes_NM > K - 1
    if bool(wrong_NM.any()):
        row, level = torch.nonzero(wrong_NM)[0].tolist()
        raise InputError(
            f"{int(wrong_NM.sum()):,} codes are not below K={K}; the first is {int(codes_NM[row, level])} in row {row} "
            f"at level {level}. Were they made with another model? Encode the cells again."
        )


def require_states(states_B: Tensor, S: int) -> None:
    """States are -1 or have a window; looked at on a CPU only, and not while torch.compile reads the code."""
    if states_B.device.type != "cpu" or torch.compiler.is_compiling():
        return
    wrong_B = (states_B < -1) | (states_B >= S)
    if bool(wrong_B.any()):
        row = int(wrong_B.nonzero()[0])
        raise InputError(
            f"{int(wrong_B.sum()):,} states are outside -1..{S - 1}; the first is {int(states_B[row])} in row {row}"
        )


def require_projectable(
    indptr: Tensor,
    indices: Tensor,
    data: Tensor,
    genes: int,
    column_map: Tensor | None,
    library_size: Tensor | None,
) -> None:
    """Row pointers, columns, counts and library sizes of a CSR matrix that can be projected."""
    if column_map is not None:
        require_range("column_map", column_map, -1, genes - 1, "rows of weight, or -1")
    require_rows(indptr, len(data))
    used = slice(int(indptr[0]), int(indptr[-1]))
    columns = genes if column_map is None else len(column_map)
    require_range("indices", indices[used], 0, columns - 1, "columns")
    require_counts("data", data[used])
    if library_size is not None:
        require_counts("library_size", library_size)
        for row in torch.nonzero(library_size == 0).flatten().tolist():
            if bool((data[int(indptr[row]) : int(indptr[row + 1])] > 0).any()):
                raise InputError(f"library_size is 0 in row {row}, which has counts; expected its total counts")


def require_rows(indptr: Tensor, entries: int) -> None:
    """Row pointers do not decrease and stay within the entries."""
    if bool((indptr[1:] < indptr[:-1]).any()) or int(indptr[0]) < 0 or int(indptr[-1]) > entries:
        raise InputError(
            f"indptr runs from {int(indptr[0])} to {int(indptr[-1])} for {entries} entries; expected non-decreasing "
            "row pointers within them"
        )


def require_counts(name: str, value: Tensor) -> None:
    """Counts are 0 or within the range above."""
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
