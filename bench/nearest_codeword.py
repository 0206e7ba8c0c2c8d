"""Exactly nearest codeword and its squared distance on a CPU, beside FAISS IndexFlatL2 and scikit-learn.

python -m bench.nearest_codeword [--json] [--width 64]

The floor is arithmetic: 2 K D FLOP per row at the rate of multiply-adds in registers, measured in the same run. Every
row is checked against the exact definition before timing. Rivals, where installed: `pip install rvqa[bench]`.
"""

from collections.abc import Callable
from functools import partial

import torch

from bench import harness
from bench.exactness import wrong_rows_of_one_level
from rvqa.errors import InputError
from rvqa.kernels import ops


def main() -> None:
    """Run the bench."""
    arguments = harness.parser(__doc__ or "")
    arguments.add_argument("--width", type=int, default=64)
    options = arguments.parse_args()
    torch.set_num_threads(options.threads)
    rows, figures = [], {}
    D = options.width
    for K, N in ((32, 400_000), (1_024, 40_000), (65_536, 1_536)):
        generator = torch.Generator().manual_seed(K)
        x_ND = torch.randn(N, D, generator=generator)
        codebook_KD = torch.randn(K, D, generator=generator)
        contenders: dict[str, Callable[[], object]] = {"rvqa": partial(ops.nearest_codeword, x_ND, codebook_KD)}
        if harness.find_distribution("faiss-cpu"):
            import faiss

            index = faiss.IndexFlatL2(D)
            index.add(codebook_KD.numpy())
            contenders["faiss"] = partial(index.search, x_ND.numpy(), 1)
        if harness.find_distribution("scikit-learn"):
            from sklearn.metrics import pairwise_distances_argmin_min

            contenders["scikit-learn"] = partial(pairwise_distances_argmin_min, x_ND.numpy(), codebook_KD.numpy())
        index_N, _ = ops.nearest_codeword(x_ND, codebook_KD)
        if wrong := wrong_rows_of_one_level(x_ND, codebook_KD, index_N):
            raise InputError(f"{wrong} rows are wrong at K={K}; nothing was timed")
        floor = 2 * N * K * D / harness.fma_rate(3)
        timings = harness.interleave(contenders, options.repeats)
        ours = timings["rvqa"].median
        for name, timing in timings.items():
            rows.append(
                harness.Row(f"K={K:,}", name, N / timing.median, "rows/s", timing.spread, floor / timing.median)
            )
            if name != "rvqa":
                figures[f"ratio_{name.replace('scikit-learn', 'sklearn')}_K{K}"] = timing.median / ours
        figures[f"fma_peak_share_K{K}"] = floor / ours
    for name in ("faiss", "sklearn"):
        ratios = [value for key, value in figures.items() if key.startswith(f"ratio_{name}_")]
        if ratios:
            figures[f"ratio_{name}"] = min(ratios)
    harness.report("nearest_codeword", rows, figures, as_json=options.json)


if __name__ == "__main__":
    main()
