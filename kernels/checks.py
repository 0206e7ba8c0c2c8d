"""Checks of single inputs of the operators. Each function raises an `InputError` that names a wrong value."""

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rvqa.errors import InputError

MIN_COUNT, MAX_COUNT = 2.0**-149, 2.0**53
"""Range of a non-zero count: from the smallest float32 to the largest number up to which float64 has all integers."""

MAX_GENES = 2**24
"""Most rows of a projection's weight."""

_UNSIGNED = (torch.uint8, torch.uint16, torch.uint32)


def require_tensors(**values: object) -> None:
    """Check that all are tensors and none is nested; torch passes no nested tensor to an operator."""
    for name, value in values.items():
        if not isinstance(value, Tensor) or value.is_nested:
            kind = type(value).__name__ if not isinstance(value, Tensor) else "nested tensor"
            raise InputError(f"{name} is a {kind}; expected a torch.Tensor with one value at every index")


def require_dtype(name: str, value: Tensor, allowed: tuple[torch.dtype, ...]) -> None:
    """Check that the tensor is dense and has one of these dtypes."""
    if value.dtype not in allowed:
        names = " or ".join(str(dtype).removeprefix("torch.") for dtype in allowed)
        raise InputError(f"{name} has dtype {str(value.dtype).removeprefix('torch.')}; expected {names}")
    if value.layout is not torch.strided:
        raise InputError(f"{name} has layout {value.layout}; expected a dense tensor, such as {name}.to_dense()")


def require_writable(name: str, value: Tensor) -> None:
    """Check that memory holds the values; torch keeps the sign of a conjugate's imaginary part apart."""
    if not torch.compiler.is_compiling() and value.is_neg():
        raise InputError(f"{name} is a negative view of other memory; pass {name}.resolve_neg()")


def require_whole(name: str, value: Any, low: int, high: int) -> None:
    """Check that the value is a whole number from low to high."""
    if not isinstance(value, (int, np.integer, torch.SymInt)):
        raise InputError(f"{name} is a {type(value).__name__}; expected a whole number")
    if not low <= value <= high:
        raise InputError(f"{name} is {said(value)}; expected {low} to {high}")


def said(value: Any) -> str:
    """Return a number as text for an error; Python cannot print one of thousands of digits."""
    return "beyond 64 bits" if isinstance(value, int) and abs(value) > 2**64 else str(value)


def require_width(name: str, value: Tensor, width: int) -> None:
    """Check that rows are as wide as the codewords."""
    shape = value.shape
    if len(shape) != 2 or shape[1] != width:
        raise InputError(f"{name} has shape {tuple(shape)}; expected [N, {width}], the width of the codewords")


def require_device(name: str, value: Tensor, other: Tensor) -> None:
    """Check that both tensors are on one device."""
    if value.device != other.device:
        raise InputError(f"{name} is on {value.device}, the parameters on {other.device}; move one of them with .to()")


def require_apart(name: str, value: Tensor, **others: Tensor) -> None:
    """Check that an output shares no memory with inputs; all are contiguous."""
    begin, end = value.data_ptr(), value.data_ptr() + value.nbytes
    for other_name, other in others.items():
        if other.data_ptr() < end and begin < other.data_ptr() + other.nbytes:
            raise InputError(f"{name} shares memory with {other_name}; expected memory of its own")


def require_finite(name: str, value_ND: Tensor, row: str) -> None:
    """Check that there is no NaN or infinity."""
    if math.isfinite(float(value_ND.sum())):
        return
    wrong_N = ~torch.isfinite(value_ND).all(1)
    if bool(wrong_N.any()):
        first = int(wrong_N.nonzero()[0])
        raise InputError(
            f"{name} has NaN or infinity in {int(wrong_N.sum())} of {len(wrong_N)} rows, first in {row} {first}"
        )


def require_range(name: str, value: Tensor, low: int, high: int, meaning: str) -> None:
    """Check that all values are whole numbers from low to high."""
    if len(value) == 0:
        return
    least, most = (int(v) for v in torch.aminmax(value))
    if least < low or most > high:
        raise InputError(f"{name} has values from {least} to {most}; expected {low} to {high} ({meaning})")


def require_codes(codes_NM: Tensor, K: int) -> None:
    """Check that all codes are below K."""
    wrong_NM = codes_NM > K - 1
    if bool(wrong_NM.any()):
        row, level = torch.nonzero(wrong_NM)[0].tolist()
        raise InputError(
            f"{int(wrong_NM.sum()):,} codes are not below K={K}; the first is {int(codes_NM[row, level])} in row {row} "
            f"at level {level}. Were they made with another model? Encode the cells again."
        )


def require_states(states_B: Tensor, S: int) -> None:
    """Check that states are -1 or have a window, but only on a CPU and not while torch.compile traces the code."""
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
    """Check row pointers, columns, counts and library sizes of a CSR matrix to be projected."""
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
            # torch cannot compare uint16 or uint32.
            if bool((data[int(indptr[row]) : int(indptr[row + 1])].double() > 0).any()):
                raise InputError(f"library_size is 0 in row {row}, which has counts; expected its total counts")


def require_rows(indptr: Tensor, entries: int) -> None:
    """Check that row pointers are within the entries."""
    if not are_within(indptr, entries):
        raise InputError(
            f"indptr runs from {int(indptr[0])} to {int(indptr[-1])} for {entries} entries; expected non-decreasing "
            "row pointers within them, fewer than 2^31 entries a row"
        )


def are_within(indptr: Tensor, entries: int) -> bool:
    """Return whether row pointers never decrease, stay within the entries and give rows of fewer than 2^31."""
    if int(indptr[0]) < 0 or int(indptr[-1]) > entries or bool((indptr[1:] < indptr[:-1]).any()):
        return False
    return not bool((indptr.diff() > 2**31 - 1).any())


def require_counts(name: str, value: Tensor) -> None:
    """Check that counts are 0 or between `MIN_COUNT` and `MAX_COUNT`."""
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
