"""Raw counts to the first hidden layer on a CPU: rows of counts -> size factor -> log1p -> times W.

python -m bench.csr_project [--json] [--hidden 256] [--cells 4096]

Cases: atlas-like rows (1,460 non-zeros, genes detected with log-normal frequencies) on axes of 2,000, 5,000 and 20,000
genes, and with RVQA_DATA_DIR the cells of PBMC3k and Kang 2018. Contenders: scipy's pipeline (row sums, scaling, log1p,
CSR @ dense; scipy uses one thread), torch's CSR product after the same steps, and the floor. The floor takes the values
as given; row by row it only gathers rows of W, multiplies and adds, with sums in registers. rvqa takes 64 genes at a
time for 256 cells, so their rows of W come from the nearest cache, and it can be faster than that floor.
Results must agree to the last bit with the reference on a part of the rows, and up to rounding with scipy.
"""

import os
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

import numpy as np
import scipy.sparse as sp
import torch
from torch import Tensor

from bench import harness
from rvqa.errors import InputError
from rvqa.kernels import ops, reference

NON_ZEROS = 1_460
TARGET = 1e4


def atlas_like(cells: int, genes: int, seed: int = 0) -> sp.csr_matrix:
    """Make geometric counts of cells with about 1,460 detected genes (a quarter of a smaller axis)."""
    rng = np.random.default_rng(seed)
    wanted = min(NON_ZEROS, genes // 4)
    frequency = np.exp(1.5 * rng.standard_normal(genes))
    low, high = 0.0, 1e3 * genes / frequency.sum() + 1e3
    for _ in range(80):  # detection probability 1 - exp(-scale * frequency), scaled to the wanted number
        middle = (low + high) / 2
        low, high = (middle, high) if (1 - np.exp(-middle * frequency)).sum() < wanted else (low, middle)
    rate = low * frequency
    blocks = [
        sp.csr_matrix(rng.poisson(rate * rng.lognormal(0, 0.3, (256, 1))).astype(np.float32))
        for _ in range(-(-cells // 256))
    ]
    return sp.vstack(blocks, format="csr")[:cells]


def real(name: str) -> sp.csr_matrix | None:
    """Return counts of a file of RVQA_DATA_DIR, or None."""
    folder = os.environ.get("RVQA_DATA_DIR")
    path = Path(folder or "") / f"{name}.h5ad"
    if not folder or not path.is_file():
        return None
    import anndata

    return sp.csr_matrix(anndata.read_h5ad(path).X, dtype=np.float32)


def scipy_pipeline(counts: sp.csr_matrix, weight: np.ndarray, bias: np.ndarray) -> np.ndarray:
    """Compute row sums, scaling, log1p, product and bias."""
    scaled = counts.multiply(TARGET / np.asarray(counts.sum(1))).tocsr()
    np.log1p(scaled.data, out=scaled.data)
    return scaled @ weight + bias


def torch_pipeline(counts: sp.csr_matrix, weight: Tensor, bias: Tensor) -> Tensor:
    """Compute row sums, scaling, log1p, torch's CSR product and bias."""
    indptr, data = torch.from_numpy(counts.indptr), torch.from_numpy(counts.data)
    lengths = indptr.diff()
    sums = torch.segment_reduce(data, "sum", lengths=lengths.long())
    values = torch.log1p(data * torch.repeat_interleave(TARGET / sums, lengths))
    matrix = torch.sparse_csr_tensor(indptr, torch.from_numpy(counts.indices), values, counts.shape)
    return matrix @ weight + bias


def main() -> None:
    """Run the bench."""
    arguments = harness.parser(__doc__ or "")
    arguments.add_argument("--hidden", type=int, default=256)
    arguments.add_argument("--cells", type=int, default=4_096)
    options = arguments.parse_args()
    torch.set_num_threads(options.threads)
    native = import_module("rvqa._native")
    cases = {f"atlas G={G}": atlas_like(options.cells, G) for G in (2_000, 5_000, 20_000)}
    for name in ("pbmc3k_10x", "kang2018_ifnb_pbmc_2k"):
        counts = real(name)
        if counts is not None:
            cases[name.split("_")[0]] = counts
    rows: list[harness.Row] = []
    figures: dict[str, float] = {}
    for case, counts in cases.items():
        N, G = counts.shape
        H = options.hidden
        generator = torch.Generator().manual_seed(0)
        weight, bias = torch.randn(G, H, generator=generator) / 30, torch.randn(H, generator=generator)
        parts = [torch.from_numpy(part) for part in (counts.indptr, counts.indices, counts.data)]
        indptr = parts[0].long()
        values = torch.log1p(parts[2])
        gathered = torch.empty(N, H)

        def floor(indptr=indptr, indices=parts[1], values=values, weight=weight, out=gathered) -> Tensor:
            native.gather_multiply_add(
                *(t.data_ptr() for t in (indptr, indices, values, weight)),
                *(len(out), out.shape[1], torch.get_num_threads(), out.data_ptr()),
            )
            return out

        contenders: dict[str, Callable[[], object]] = {
            "rvqa": lambda parts=parts, weight=weight, bias=bias: ops.csr_project(*parts, weight, bias),
            "floor: gather": floor,
            "scipy": lambda counts=counts, weight=weight, bias=bias: scipy_pipeline(
                counts, weight.numpy(), bias.numpy()
            ),
            "torch CSR": lambda counts=counts, weight=weight, bias=bias: torch_pipeline(counts, weight, bias),
        }
        ours = ops.csr_project(*parts, weight, bias)
        exact = reference.csr_project(indptr[:257], parts[1], parts[2], weight, bias)
        if not torch.equal(ours[:256], exact):
            raise InputError(f"{case}: rvqa differs from the reference; nothing was timed")
        for name in ("scipy", "torch CSR"):
            other = torch.as_tensor(contenders[name]())
            if not torch.allclose(ours, other, rtol=1e-4, atol=1e-4):
                raise InputError(f"{case}: {name} differs by {float((ours - other).abs().max())}; nothing was timed")
        timings = harness.interleave(contenders, options.repeats)
        mine = timings["rvqa"].median
        for name, timing in timings.items():
            share = timings["floor: gather"].median / timing.median
            rows.append(harness.Row(case, name, N / timing.median, "cells/s", timing.spread, share))
        key = case.replace("atlas G=", "G")
        figures[f"ns_per_entry_{key}"] = mine / counts.nnz * 1e9
        figures[f"floor_share_{key}"] = timings["floor: gather"].median / mine
        figures[f"ratio_scipy_{key}"] = timings["scipy"].median / mine
        figures[f"ratio_torch_csr_{key}"] = timings["torch CSR"].median / mine
    for name in ("floor_share", "ratio_scipy", "ratio_torch_csr"):
        figures[f"{name}_min"] = min(value for key, value in figures.items() if key.startswith(f"{name}_"))
    figures["ratio_torch_csr"] = figures["ratio_torch_csr_min"]
    harness.report("csr_project", rows, figures, as_json=options.json)


if __name__ == "__main__":
    main()
