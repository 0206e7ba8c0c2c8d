"""How often the float16 certificate of `csrc/cuda` certifies a code, and whether codes equal those of the CPU.

python -m bench.certificate [--rows 20000] [--json]       on a GPU, or with RVQA_CUDA_EMULATED on a CPU

For each width, on Gaussian rows with k-means codebooks, and on real latents if RVQA_DATA_DIR has cells, it prints:

uncertified   share of row levels that the bound leaves open, which float64 or exact sums then settle
wrong         codes that differ from those of the backend `cpu`; anything but 0 is a bug
"""

import os
from pathlib import Path

import anndata
import numpy as np
import torch
from torch import Tensor

from bench import harness
from rvqa.encoding import cells_on_axis
from rvqa.errors import InputError
from rvqa.kernels import ops, registry
from rvqa.training.references import read_reference
from rvqa.training.tokenizer.codebooks import k_means
from rvqa.training.tokenizer.fit import fit_tokenizer

WIDTHS, LEVELS, CODEWORDS = (32, 64, 128, 512), 8, 32


def gaussian(rows: int, width: int) -> tuple[Tensor, Tensor]:
    """Return rows, and codebooks by k-means on the residuals of 4,096 of them."""
    random = torch.Generator().manual_seed(width)
    x_ND = torch.randn(rows, width, generator=random)
    left_ND, rng, codebooks = torch.randn(4096, width, generator=random), np.random.default_rng(width), []
    for _ in range(LEVELS):
        codebooks.append(k_means(left_ND, CODEWORDS, rng, rounds=5))
        left_ND = left_ND - codebooks[-1][ops.nearest_codeword(left_ND, codebooks[-1])[0]]
    return x_ND, torch.stack(codebooks)


def real(rows: int) -> tuple[Tensor, Tensor]:
    """Return latents of 10x's 3k PBMC cells, repeated with noise of a hundredth of their size, and codebooks."""
    adata = anndata.read_h5ad(Path(os.environ["RVQA_DATA_DIR"]) / "pbmc3k_10x.h5ad")
    tokenizer = fit_tokenizer([read_reference(adata, labels="cell_type")], progress=False)
    cells, alignment, depth_N = cells_on_axis(adata, tokenizer)
    latent_ND = torch.as_tensor(tokenizer.latent(cells.counts, alignment, depth_N))
    random = torch.Generator().manual_seed(0)
    at = torch.arange(rows) % len(latent_ND)
    noise = torch.randn(rows, latent_ND.shape[1], generator=random) * latent_ND.std(0) / 100
    return latent_ND[at] + noise * (torch.arange(rows) >= len(latent_ND))[:, None], tokenizer.codebooks_MKD


def main() -> None:
    """Print the table."""
    arguments = harness.parser(__doc__ or "")
    arguments.add_argument("--rows", type=int, default=20_000)
    options = arguments.parse_args()
    if (reason := registry.reason_absent("cuda")) is not None:
        raise InputError(f"The backend cuda is not live: {reason}.")
    quantize = registry.function("cuda", "quantize")
    device = "cpu" if registry.function("cuda", "EMULATED") else "cuda"
    cases = {f"gaussian_{width}": gaussian(options.rows, width) for width in WIDTHS}
    if os.environ.get("RVQA_DATA_DIR"):
        cases["real_32"] = real(options.rows)
    figures: dict[str, float] = {}
    for name, (x_ND, codebooks_MKD) in cases.items():
        codes_NM, found = quantize(x_ND.to(device), codebooks_MKD.to(device).contiguous(), len(codebooks_MKD))
        right_NM = ops.residual_quantize(x_ND, ops.prepare(codebooks_MKD))
        figures[f"uncertified_{name}"] = int(found[2]) / codes_NM.numel()
        figures[f"wrong_{name}"] = float((codes_NM.cpu() != right_NM).sum())
    rows = [harness.Row(name, f"{options.rows:,} rows", value, "", 0.0, None) for name, value in figures.items()]
    harness.report("certificate", rows, figures, as_json=options.json)


if __name__ == "__main__":
    main()
