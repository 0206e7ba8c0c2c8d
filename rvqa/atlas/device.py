"""Rows of counts on their way from a file to where they are encoded.

To a GPU, columns and counts travel as 16-bit numbers where they fit, 4 bytes an entry rather than 8, from pinned memory
on a stream of each thread: while one thread's rows are copied, another's are computed. Not yet measured on a GPU.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

from rvqa.data.files.matrices import Rows
from rvqa.errors import InputError

_COUNTS = {np.dtype(kind) for kind in (np.float32, np.float64, np.int32, np.uint8, np.uint16, np.uint32)}


class Lanes:
    """Where rows are encoded, and the stream of each thread that brings them there.

    Parameters
    ----------
    device
        "cpu" or "cuda".

    Raises
    ------
    rvqa.errors.InputError
        A device that is not there.
    """

    def __init__(self, device: str | torch.device) -> None:
        try:
            self.device = torch.device(device)
            torch.empty(0, device=self.device)
        except (RuntimeError, AssertionError) as error:
            reason = str(error).splitlines()[0]
            raise InputError(f"Device {str(device)!r} cannot be used here ({reason}). Use 'cpu' or 'cuda'.") from error
        self._local = threading.local()

    @contextmanager
    def mine(self) -> Iterator[None]:
        """Compute on the stream of this thread."""
        if self.device.type != "cuda":
            yield
            return
        if not hasattr(self._local, "stream"):
            self._local.stream = torch.cuda.Stream(self.device)
        with torch.cuda.stream(self._local.stream):
            yield

    def bring(self, rows: Rows) -> tuple[Tensor, Tensor, Tensor]:
        """Pointers, columns and counts as tensors that the kernels read; no value changes."""
        indptr, indices, data = countable(rows)
        if self.device.type == "cpu":
            return as_tensor(indptr), as_tensor(indices), as_tensor(data)
        return self._copied(indptr), widened(self._copied(narrow(indices))), widened(self._copied(narrow(data)))

    def _copied(self, array: np.ndarray) -> Tensor:
        tensor = as_tensor(array)
        return tensor.pin_memory().to(self.device, non_blocking=True) if self.device.type == "cuda" else tensor


def countable(rows: Rows) -> Rows:
    """Rows with dtypes that the kernels read: no value changes."""
    indptr, indices, data = rows
    if indices.dtype not in (np.dtype(np.int32), np.dtype(np.int64)):
        indices = indices.astype(np.int64)
    if data.dtype not in _COUNTS:
        small = (
            data.dtype.kind in "bu" or (data.dtype.kind == "i" and data.dtype.itemsize < 4) or data.dtype.itemsize == 2
        )
        data = data.astype(np.float32 if small and data.dtype.itemsize <= 2 else np.float64)
    return Rows(indptr, indices, data)


def narrow(values: np.ndarray) -> np.ndarray:
    """Whole numbers from 0 to 65,535 in 16 bits, as int16 of the same bits; other values as they are."""
    if values.dtype.itemsize <= 2:
        return values
    with np.errstate(invalid="ignore"):  # NaN and what is out of range differs from what it becomes
        small = values.astype(np.uint16)
    return small.view(np.int16) if np.array_equal(small, values) else values


def widened(tensor: Tensor) -> Tensor:
    """The int32 values that `narrow` put into int16; other tensors as they are."""
    return tensor.int().bitwise_and_(0xFFFF) if tensor.dtype == torch.int16 else tensor


def as_tensor(array: np.ndarray) -> Tensor:
    """Tensor on the memory of an array, or of a copy where PyTorch may not have that."""
    return torch.from_numpy(array if array.flags.writeable else array.copy())
