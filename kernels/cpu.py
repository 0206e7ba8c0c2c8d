"""Backend `cpu`: the native module on CPU tensors. Same functions and results as `rvqa.kernels.reference`.

Importing this file raises ImportError where the native module was not built; `rvqa.kernels.registry` reports it.
"""

from importlib import import_module

import torch
from torch import Tensor

_native = import_module("rvqa._native")


def residual_quantize(x_ND: Tensor, codebooks_MKD: Tensor, levels: int) -> Tensor:
    """Exact greedy codes, uint8 [N, levels]."""
    codes = _native.residual_quantize(x_ND.numpy(), codebooks_MKD.numpy(), levels, torch.get_num_threads())
    return torch.from_numpy(codes)


def nearest_codeword(x_ND: Tensor, codebook_KD: Tensor) -> tuple[Tensor, Tensor]:
    """Index int64 [N] of the exactly nearest codeword and its squared distance float32 [N]."""
    index, distance = _native.nearest_codeword(x_ND.numpy(), codebook_KD[None].numpy(), torch.get_num_threads())
    return torch.from_numpy(index), torch.from_numpy(distance)


def decode(codes_NM: Tensor, codebooks_MKD: Tensor, levels: int) -> Tensor:
    """Sum of codewords, float32 [N, D], added level by level."""
    codes = codes_NM[:, :levels].contiguous().numpy()
    return torch.from_numpy(_native.decode(codes, codebooks_MKD.numpy(), torch.get_num_threads()))


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
    """Rows of counts to float32 [N, H], in the reference's order of operations."""
    hidden = _native.csr_project(
        indptr.numpy(),
        indices.numpy(),
        data.numpy(),
        W_GH.numpy(),
        bias_H.numpy(),
        target_sum,
        None if column_map is None else column_map.numpy(),
        None if library_size is None else library_size.numpy(),
        torch.get_num_threads(),
    )
    return torch.from_numpy(hidden)
