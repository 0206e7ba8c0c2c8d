"""Backend `cuda`: CUDA C++ kernels of `rvqa._cuda`, with the functions of `rvqa.kernels.reference`.

All results equal the reference's to the bit. Measured on an H100: docs/performance.md, On a GPU.
RVQA_CUDA_EMULATED names a module that runs the same sources on a CPU, for tests only (`tests/cuda`).

Importing this file raises ImportError where the backend cannot run; `rvqa.kernels.registry` reports it.
"""

import os
from importlib.machinery import ExtensionFileLoader
from importlib.util import module_from_spec, spec_from_loader
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from rvqa.kernels import reference
from rvqa.kernels.checks import require_apart, require_codes, require_projectable, require_states
from rvqa.kernels.cuda.tables import Tables, prepare_tables
from rvqa.kernels.reference import pack, residual_norms

__all__ = [
    "EMULATED",
    "apply_span_mask_",
    "csr_project",
    "csr_totals",
    "decode",
    "nearest_codeword",
    "pack",
    "residual_norms",
    "residual_quantize",
]


def _module() -> ModuleType:
    if path := os.environ.get("RVQA_CUDA_EMULATED"):
        loader = ExtensionFileLoader("_cuda_emulated", path)
        spec = spec_from_loader("_cuda_emulated", loader)
        assert spec is not None
        module = module_from_spec(spec)
        loader.exec_module(module)
        return module
    try:
        from rvqa import _cuda
    except ImportError as error:
        raise ImportError(
            f"{error}; the CUDA module was not built: reinstall rvqa with RVQA_BUILD=cuda where there is nvcc"
        ) from error
    return _cuda


_native = _module()
EMULATED: bool = _native.EMULATED

if not EMULATED and not (torch.cuda.is_available() and torch.version.cuda is not None):
    raise ImportError("there is no CUDA device")

_derived: WeakIdKeyDictionary = WeakIdKeyDictionary()
"""`Tables` of codebooks by the number of levels, for as long as the codebooks live."""


def _stream(tensor: Tensor) -> int:
    return 0 if EMULATED else int(torch.cuda.current_stream(tensor.device).cuda_stream)


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _rows(x_ND: Tensor) -> tuple[Tensor, tuple[int, int, int, str]]:
    """Return rows with contiguous values, and the arguments that describe them to the kernels."""
    x_ND = x_ND if x_ND.stride(1) == 1 or x_ND.shape[1] == 1 else x_ND.contiguous()
    return x_ND, (x_ND.data_ptr(), len(x_ND), x_ND.stride(0), str(x_ND.dtype).removeprefix("torch."))


def _made(tables: Tables) -> list[int]:
    return [each.data_ptr() if each.numel() else 0 for each in tables]


def _found(x_ND: Tensor) -> Tensor:
    """Return counters for rows with NaN or infinity, the first such row, and levels that were settled."""
    found = torch.full((3,), torch.iinfo(torch.int64).max, dtype=torch.int64, device=x_ND.device)
    found[::2].zero_()  # set on the device: a CUDA graph cannot capture a copy from the host
    return found


def _open(x_ND: Tensor) -> Tensor:
    """Return memory for the list of rows that the certificate leaves open; it begins with their number, 0."""
    open_ = torch.empty(len(x_ND) + 1, dtype=torch.int64, device=x_ND.device)
    open_[:1].zero_()
    return open_


def _wrong(found: Tensor) -> tuple[int, int]:
    wrong, first, _ = found.tolist()
    return wrong, first if wrong else -1


def residual_quantize(x_ND: Tensor, tables: tuple[Tensor, Tensor], levels: int) -> tuple[Tensor, int, int]:
    """Exact greedy codes, uint8 [N, levels]; the number of rows with NaN or infinity, coded 255, and the first."""
    codes_NM, found = quantize(x_ND, tables[0], levels)
    return codes_NM, *_wrong(found)


def quantize(x_ND: Tensor, codebooks_MKD: Tensor, levels: int) -> tuple[Tensor, Tensor]:
    """Run `residual_quantize` without waiting for the device; return codes, and `_found` as a tensor."""
    made = _derived.setdefault(codebooks_MKD, {})
    if levels not in made:
        made[levels] = prepare_tables(codebooks_MKD, levels)
    x_ND, rows = _rows(x_ND)
    codes_NM = torch.empty(len(x_ND), levels, dtype=torch.uint8, device=x_ND.device)
    found, open_ = _found(x_ND), _open(x_ND)
    sizes = (levels, *codebooks_MKD.shape[1:], made[levels].codebooks.shape[2])
    with torch.cuda.device_of(x_ND):
        _native.residual_quantize(
            rows,
            _made(made[levels]),
            sizes,
            codes_NM.data_ptr(),
            open_.data_ptr(),
            found.data_ptr(),
            _stream(x_ND),
        )
    return codes_NM, found


def nearest_codeword(x_ND: Tensor, codebook_KD: Tensor) -> tuple[Tensor, Tensor, int, int]:
    """Index int64 [N] of the exactly nearest codeword, its squared distance float32 [N], wrong rows and the first."""
    x_ND, rows = _rows(x_ND)
    made = prepare_tables(codebook_KD[None], 1)
    index_N = torch.empty(len(x_ND), dtype=torch.int64, device=x_ND.device)
    distance_N = torch.empty(len(x_ND), dtype=torch.float32, device=x_ND.device)
    found, open_ = _found(x_ND), _open(x_ND)
    with torch.cuda.device_of(x_ND):
        _native.nearest_codeword(
            rows, _made(made), (1, *codebook_KD.shape, made.codebooks.shape[2]), index_N.data_ptr(),
            distance_N.data_ptr(), open_.data_ptr(), found.data_ptr(), _stream(x_ND),
        )  # fmt: skip
    return index_N, distance_N, *_wrong(found)


def decode(codes_NM: Tensor, codebooks_MKD: Tensor, levels: int, out_ND: Tensor | None = None) -> Tensor:
    """Sum of codewords, float32 [N, D], added level by level."""
    require_codes(codes_NM, codebooks_MKD.shape[1])
    codes_NM, codebooks_MKD = codes_NM.contiguous(), codebooks_MKD.contiguous()
    (N, stride), (_, K, D) = codes_NM.shape, codebooks_MKD.shape
    if out_ND is None:
        out_ND = torch.empty(N, D, dtype=torch.float32, device=codebooks_MKD.device)
    else:
        require_apart("out", out_ND, codes=codes_NM, codebooks=codebooks_MKD)
    with torch.cuda.device_of(out_ND):
        _native.decode(
            codes_NM.data_ptr(), stride, N, levels, codebooks_MKD.data_ptr(), K, D, out_ND.data_ptr(), _stream(out_ND)
        )
    return out_ND


def _matrix(indptr: Tensor, indices: Tensor, data: Tensor) -> tuple[Any, ...]:
    wide = (indptr.dtype == torch.int64, indices.dtype == torch.int64)
    dtype = str(data.dtype).removeprefix("torch.")
    return (indptr.data_ptr(), indices.data_ptr(), data.data_ptr(), *wide, dtype, len(indptr) - 1)


def csr_totals(
    indptr: Tensor, indices: Tensor, data: Tensor, columns: int, known_C: Tensor | None
) -> tuple[Tensor, int]:
    """Sum of each row over known columns, float64 [N], and how many entries are not raw counts; -1 for bad pointers."""
    total_N = torch.zeros(len(indptr) - 1, dtype=torch.float64, device=data.device)
    if not reference.are_within(indptr, len(data)):
        return total_N, -1
    indptr, indices, data = indptr.contiguous(), indices.contiguous(), data.contiguous()
    known_C = None if known_C is None else known_C.contiguous()
    wrong = torch.zeros(1, dtype=torch.int64, device=data.device)
    with torch.cuda.device_of(data):
        _native.csr_totals(
            _matrix(indptr, indices, data), columns, _address(known_C), total_N.data_ptr(), wrong.data_ptr(),
            _stream(data),
        )  # fmt: skip
    n_wrong = int(wrong)
    return total_N.zero_() if n_wrong else total_N, n_wrong


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
    """Rows of counts to float32 [N, H]; rows with several fractional counts in one column go to the reference."""
    require_projectable(indptr, indices, data, len(W_GH), column_map, library_size)
    indptr, indices, data = indptr.contiguous(), indices.contiguous(), data.contiguous()
    W_GH, bias_H = W_GH.contiguous(), bias_H.contiguous()
    column_map = None if column_map is None else column_map.long().contiguous()
    library_size = None if library_size is None else library_size.double().contiguous()
    hidden_NH = torch.empty(len(indptr) - 1, len(bias_H), dtype=torch.float32, device=W_GH.device)
    open_N = torch.zeros(len(hidden_NH), dtype=torch.uint8, device=W_GH.device)
    with torch.cuda.device_of(hidden_NH):
        _native.csr_project(
            _matrix(indptr, indices, data), _address(column_map), _address(library_size), target_sum, W_GH.data_ptr(),
            bias_H.data_ptr(), *W_GH.shape, hidden_NH.data_ptr(), open_N.data_ptr(), _stream(hidden_NH),
        )  # fmt: skip
    for row in torch.nonzero(open_N).flatten().tolist() if data.dtype.is_floating_point else ():
        size = None if library_size is None else library_size[row : row + 1]
        hidden_NH[row] = reference.csr_project(
            indptr[row : row + 2], indices, data, W_GH, bias_H, target_sum, column_map, size
        )[0]
    return hidden_NH


def apply_span_mask_(logits_BV: Tensor, states_B: Tensor, windows_S3: Tensor) -> None:
    """Set ids that a row may not write to -inf, in place; the host reads no value."""
    require_states(states_B, len(windows_S3))
    states_B, windows_S3 = states_B.long().contiguous(), windows_S3.long().contiguous()
    dtype = str(logits_BV.dtype).removeprefix("torch.")
    with torch.cuda.device_of(logits_BV):
        _native.apply_span_mask(
            logits_BV.data_ptr(), logits_BV.stride(0), *logits_BV.shape, dtype, states_B.data_ptr(),
            windows_S3.data_ptr(), len(windows_S3), _stream(logits_BV),
        )  # fmt: skip
