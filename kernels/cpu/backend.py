"""Backend `cpu`: the native module on CPU tensors. It has the functions and results of `rvqa.kernels.reference`.

Importing this file raises ImportError where the native module was not built; `rvqa.kernels.registry` reports it.
The environment variable RVQA_ISA (avx512, avx2 or portable) forces an instruction set. All give the same bits.
"""

from importlib import import_module

import torch
from torch import Tensor

from rvqa.kernels.checks import require_codes, require_finite, require_projectable, require_states

_native = import_module("rvqa._native")

_NAMES = {
    torch.float32: "float32",
    torch.float64: "float64",
    torch.bfloat16: "bfloat16",
    torch.float16: "float16",
    torch.int64: "int64",
    torch.int32: "int32",
    torch.uint32: "uint32",
    torch.uint16: "uint16",
    torch.uint8: "uint8",
}


def isa() -> str:
    """Instruction set in use: avx512, avx2 or portable.

    Raises
    ------
    rvqa.errors.InputError
        RVQA_ISA names one that this build or this CPU does not have.
    """
    return _native.isa()


def pack(codebooks_MKD: Tensor) -> Tensor:
    """Return codebooks transposed into panels, with norms and the constants of the certificate, as uint8."""
    M, K, D = codebooks_MKD.shape
    packed = torch.empty(_native.packed_size(M, K, D), dtype=torch.uint8)
    _native.prepare(codebooks_MKD.data_ptr(), M, K, D, packed.data_ptr())
    return packed


def residual_quantize(x_ND: Tensor, tables: tuple[Tensor, Tensor], levels: int) -> tuple[Tensor, int, int]:
    """Exact greedy codes, uint8 [N, levels]; the number of rows with NaN or infinity, coded 255, and the first."""
    packed = _packed(tables)
    N = x_ND.shape[0]
    codes_NM = torch.empty(N, levels, dtype=torch.uint8)
    wrong, first = _native.residual_quantize(
        x_ND.data_ptr(),
        N,
        x_ND.stride(0),
        _NAMES[x_ND.dtype],
        packed.data_ptr(),
        packed.shape[0],
        tables[0].shape,
        levels,
        torch.get_num_threads(),
        codes_NM.data_ptr(),
    )
    return codes_NM, wrong, first


def nearest_codeword(x_ND: Tensor, codebook_KD: Tensor) -> tuple[Tensor, Tensor, int, int]:
    """Index int64 [N] of the exactly nearest codeword, its squared distance float32 [N], wrong rows and the first."""
    packed = pack(codebook_KD[None])
    N = x_ND.shape[0]
    index_N, distance_N = torch.empty(N, dtype=torch.int64), torch.empty(N, dtype=torch.float32)
    wrong, first = _native.nearest_codeword(
        x_ND.data_ptr(),
        N,
        x_ND.stride(0),
        _NAMES[x_ND.dtype],
        packed.data_ptr(),
        packed.shape[0],
        (1, *codebook_KD.shape),
        torch.get_num_threads(),
        index_N.data_ptr(),
        distance_N.data_ptr(),
    )
    return index_N, distance_N, wrong, first


def residual_norms(x_ND: Tensor, codes_NM: Tensor, tables: tuple[Tensor, Tensor]) -> Tensor:
    """|x - sum of the codewords up to each level|, float32 [N, M]."""
    packed = _packed(tables)
    norms_NM = torch.empty(codes_NM.shape, dtype=torch.float32)
    _native.residual_norms(
        x_ND.data_ptr(),
        x_ND.shape[0],
        x_ND.stride(0),
        _NAMES[x_ND.dtype],
        codes_NM.data_ptr(),
        packed.data_ptr(),
        packed.shape[0],
        tables[0].shape,
        codes_NM.shape[1],
        torch.get_num_threads(),
        norms_NM.data_ptr(),
    )
    return norms_NM


def decode(codes_NM: Tensor, codebooks_MKD: Tensor, levels: int, out_ND: Tensor | None = None) -> Tensor:
    """Sum of codewords, float32 [N, D], added level by level."""
    M, K, D = codebooks_MKD.shape
    N = codes_NM.shape[0]
    out_ND = torch.empty(N, D, dtype=torch.float32) if out_ND is None else out_ND
    wrong = _native.decode(
        codes_NM.data_ptr(),
        codes_NM.stride(0),
        N,
        levels,
        codebooks_MKD.data_ptr(),
        (M, K, D),
        torch.get_num_threads(),
        out_ND.data_ptr(),
    )
    if wrong:
        require_codes(codes_NM, K)
    return out_ND


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
    """Rows of counts to float32 [N, H], in the reference's order of operations; checks while it reads."""
    G, H = W_GH.shape
    N = indptr.shape[0] - 1
    hidden_NH = torch.empty(N, H, dtype=torch.float32)
    valid = _native.csr_project(
        *_rows(indptr, indices, data),
        W_GH.data_ptr(),
        bias_H.data_ptr(),
        G,
        H,
        target_sum,
        0 if column_map is None else column_map.data_ptr(),
        G if column_map is None else column_map.shape[0],
        0 if library_size is None else library_size.data_ptr(),
        torch.get_num_threads(),
        hidden_NH.data_ptr(),
    )
    if not valid:
        require_projectable(indptr, indices, data, G, column_map, library_size)
        raise RuntimeError("the native projection rejects what the checks accept; please report this as a bug of rvqa")
    return hidden_NH


def csr_totals(
    indptr: Tensor, indices: Tensor, data: Tensor, columns: int, known_C: Tensor | None
) -> tuple[Tensor, int]:
    """Sum of each row over known columns, float64 [N], and how many entries are not raw counts, or -1."""
    N = indptr.shape[0] - 1
    total_N = torch.empty(N, dtype=torch.float64)
    wrong = _native.csr_totals(
        *_rows(indptr, indices, data),
        0 if known_C is None else known_C.data_ptr(),
        columns,
        torch.get_num_threads(),
        total_N.data_ptr(),
    )
    return total_N, wrong


def apply_span_mask_(logits_BV: Tensor, states_B: Tensor, windows_S3: Tensor) -> None:
    """Ids that a row may not write to -inf, in place; checks while it reads."""
    wrong = _native.apply_span_mask(
        logits_BV.data_ptr(),
        *logits_BV.shape,
        logits_BV.stride(0),
        _NAMES[logits_BV.dtype],
        states_B.data_ptr(),
        _NAMES[states_B.dtype],
        windows_S3.data_ptr(),
        windows_S3.shape[0],
        torch.get_num_threads(),
    )
    if wrong:
        require_states(states_B, windows_S3.shape[0])


def _rows(indptr: Tensor, indices: Tensor, data: Tensor) -> tuple[int | str, ...]:
    """Rows of a CSR matrix as the native module takes them: addresses, dtypes, numbers of entries and of rows."""
    names = _NAMES[indices.dtype], _NAMES[data.dtype]
    return indptr.data_ptr(), indices.data_ptr(), names[0], data.data_ptr(), names[1], len(data), len(indptr) - 1


def _packed(tables: tuple[Tensor, Tensor]) -> Tensor:
    """What `pack` made; made now for tables that another backend prepared."""
    if len(tables[1]):
        return tables[1]
    require_finite("codebooks", tables[0].flatten(0, 1), "codeword (level * K + index)")
    return pack(tables[0].contiguous())
