"""Exact residual quantization, 8 levels of 32 codewords: cells per second of every live backend on a CPU.

python -m bench.residual_quantize [--json] [--cells 20000] [--widths 64 128 256]

The floor is arithmetic: 512 D FLOP a cell (the product with all 256 codewords) at the rate of a large float32 matrix
product on the same threads, measured in the same run. Backends must agree on all codes before they are timed.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from bench import harness
from rvqa.errors import InputError
from rvqa.kernels import ops, registry

LEVELS, CODEWORDS = 8, 32


def problem(N: int, D: int) -> tuple[Tensor, Tensor]:
    """Gaussian rows x_ND, and codebooks_MKD drawn like the residuals that the levels meet."""
    generator = torch.Generator().manual_seed(D)
    x_ND = torch.randn(N, D, generator=generator)
    codebooks_MKD = torch.empty(LEVELS, CODEWORDS, D)
    residual_ND = x_ND[:2048]
    for m in range(LEVELS):
        codebooks_MKD[m] = residual_ND[torch.randperm(len(residual_ND), generator=generator)[:CODEWORDS]] / 2
        index_N, _ = ops.nearest_codeword(residual_ND, codebooks_MKD[m])
        residual_ND = residual_ND - codebooks_MKD[m][index_N]
    return x_ND, codebooks_MKD


def main() -> None:
    """Run the bench."""
    arguments = harness.parser(__doc__ or "")
    arguments.add_argument("--cells", type=int, default=20_000)
    arguments.add_argument("--widths", type=int, nargs="+", default=[64, 128, 256])
    options = arguments.parse_args()
    torch.set_num_threads(options.threads)
    peak = harness.matmul_rate()
    rows = [harness.Row("float32 matmul", "torch", peak / 1e9, "GFLOP/s", 0.0, None)]
    figures = {"matmul_gflops": peak / 1e9}
    for D in options.widths:
        x_ND, codebooks_MKD = problem(options.cells, D)
        contenders: dict[str, Callable[[], Tensor]] = {
            name: partial(registry.function(name, "residual_quantize"), x_ND, codebooks_MKD, LEVELS)
            for name, reason in registry.backends().items()
            if reason is None
        }
        codes = {name: run() for name, run in contenders.items()}
        for name in codes:
            if not torch.equal(codes[name], codes["reference"]):
                raise InputError(f"{name} and reference differ at D={D}: nothing was timed")
        floor = options.cells * 2 * LEVELS * CODEWORDS * D / peak
        for name, timing in harness.interleave(contenders, options.repeats).items():
            rate = options.cells / timing.median
            case = f"D={D} N={options.cells}"
            rows.append(harness.Row(case, name, rate, "cells/s", timing.spread, floor / timing.median))
            figures[f"{name}_cells_per_s_D{D}"] = rate
            figures[f"{name}_matmul_share_D{D}"] = floor / timing.median
    harness.report("residual_quantize", rows, figures, as_json=options.json)


if __name__ == "__main__":
    main()
