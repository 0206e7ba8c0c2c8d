"""Backend `triton`: kernels for CUDA tensors, with the functions of `rvqa.kernels.reference`.

Codes, indices, distances and decoded rows equal the reference's; `kernels/triton/csr.py` says when projections do. With
TRITON_INTERPRET=1 the kernels run in Python, for tests. Block sizes are guesses: nothing was tuned on a GPU.

Importing this file raises ImportError where the backend cannot run; `rvqa.kernels.registry` reports it.
"""

import torch
import triton
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from rvqa.kernels.checks import require_codes, require_projectable, require_states
from rvqa.kernels.reference import csr_totals, finite_rows, pack, residual_norms
from rvqa.kernels.triton import codes as triton_codes
from rvqa.kernels.triton import csr as triton_csr
from rvqa.kernels.triton import mask as triton_mask

__all__ = [
    "apply_span_mask_",
    "csr_project",
    "csr_totals",
    "decode",
    "nearest_codeword",
    "pack",
    "residual_norms",
    "residual_quantize",
]

INTERPRETED = bool(triton.knobs.runtime.interpret)

if not INTERPRETED and not (torch.cuda.is_available() and torch.version.cuda is not None):
    raise ImportError("there is no CUDA device; TRITON_INTERPRET=1 runs the kernels in Python, for tests only")

_derived: WeakIdKeyDictionary = WeakIdKeyDictionary()
"""Results of `triton_codes.prepare_tables`, kept for as long as the codebooks live."""


def residual_quantize(x_ND: Tensor, tables: tuple[Tensor, Tensor], levels: int) -> tuple[Tensor, int, int]:
    """Exact greedy codes, uint8 [N, levels]; the number of rows with NaN or infinity, coded 255, and the first."""
    x_ND, wrong_N, wrong, first = finite_rows(x_ND)
    made = _derived.setdefault(tables[0], {})
    if levels not in made:
        made[levels] = triton_codes.prepare_tables(tables[0], levels)
    codes_NM = triton_codes.residual_quantize(x_ND, tables[0], levels, made[levels])
    codes_NM[wrong_N] = 255
    return codes_NM, wrong, first


def nearest_codeword(x_ND: Tensor, codebook_KD: Tensor) -> tuple[Tensor, Tensor, int, int]:
    """Index int64 [N] of the exactly nearest codeword, its squared distance float32 [N], wrong rows and the first."""
    x_ND, wrong_N, wrong, first = finite_rows(x_ND)
    index_N, distance_N = triton_codes.nearest_codeword(x_ND, codebook_KD)
    index_N[wrong_N], distance_N[wrong_N] = -1, torch.nan
    return index_N, distance_N, wrong, first


def decode(codes_NM: Tensor, codebooks_MKD: Tensor, levels: int, out_ND: Tensor | None = None) -> Tensor:
    """Sum of codewords, float32 [N, D], added level by level."""
    require_codes(codes_NM, codebooks_MKD.shape[1])
    return triton_codes.decode(codes_NM, codebooks_MKD, levels, out_ND)


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
    """Rows of counts to float32 [N, H]; see `triton_csr.csr_project`."""
    require_projectable(indptr, indices, data, len(W_GH), column_map, library_size)
    if data.dtype == torch.uint32:  # Triton's interpreter and torch's gathers support it badly
        data = data.double()
    return triton_csr.csr_project(indptr, indices, data, W_GH, bias_H, target_sum, column_map, library_size)


def apply_span_mask_(logits_BV: Tensor, states_B: Tensor, windows_S3: Tensor) -> None:
    """Set ids that a row may not write to -inf, in place."""
    require_states(states_B, len(windows_S3))
    triton_mask.apply_span_mask_(logits_BV, states_B, windows_S3)
