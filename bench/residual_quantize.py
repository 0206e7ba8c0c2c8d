"""Exact residual quantization, 8 levels of 32 codewords, on a CPU: speed, share of the peak, and rivals.

python -m bench.residual_quantize [--json] [--widths 32 64 128 256 512] [--latents FILE.npy]

The floor is arithmetic: 512 D FLOP per cell (the product with all codewords) at the rate of multiply-adds in registers
on the same threads, measured in the same run. All codes are checked against the exact definition before
timing; `python -m bench.exactness` checks many more. Rivals, where installed (`pip install rvqa[bench]`): FAISS
(ResidualQuantizer, beam 1, with and without its look-up table) and vector-quantize-pytorch (ResidualVQ in eval mode).
They get the same codebooks. Both round, so a few of their codes differ from the exact ones; the bench prints the share.
"""

from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from torch import Tensor

from bench import harness
from bench.exactness import wrong_rows
from rvqa.errors import InputError
from rvqa.kernels import ops, registry

LEVELS, CODEWORDS = 8, 32


def problem(N: int, D: int) -> tuple[Tensor, Tensor]:
    """Make Gaussian rows x_ND, and codebooks_MKD fitted to the residuals of each level by a few rounds of k-means."""
    generator = torch.Generator().manual_seed(D)
    x_ND = torch.randn(N, D, generator=generator) * torch.linspace(2, 0.1, D)
    return x_ND, fitted(x_ND, generator)


def fitted(x_ND: Tensor, generator: torch.Generator) -> Tensor:
    """Fit codebooks [M, K, D] by greedy k-means on the first rows."""
    residual_ND = x_ND[:8192].clone()
    codebooks_MKD = torch.empty(LEVELS, CODEWORDS, x_ND.shape[1])
    for m in range(LEVELS):
        codebook_KD = residual_ND[torch.randperm(len(residual_ND), generator=generator)[:CODEWORDS]].clone()
        for _ in range(5):
            index_N, _ = ops.nearest_codeword(residual_ND, codebook_KD)
            count_K = torch.bincount(index_N, minlength=CODEWORDS)
            sums_KD = torch.zeros_like(codebook_KD).index_add_(0, index_N, residual_ND)
            codebook_KD = torch.where(count_K[:, None] > 0, sums_KD / count_K[:, None].clamp(min=1), codebook_KD)
        codebooks_MKD[m] = codebook_KD
        residual_ND = residual_ND - codebook_KD[ops.nearest_codeword(residual_ND, codebook_KD)[0]]
    return codebooks_MKD


def faiss_encoder(codebooks_MKD: Tensor, x_ND: Tensor, *, lut: bool) -> Callable[[], Tensor] | None:
    """Return FAISS's greedy encoder with these codebooks, or None if it is not installed."""
    if not harness.find_distribution("faiss-cpu"):
        return None
    import faiss

    M, K, D = codebooks_MKD.shape
    quantizer = faiss.ResidualQuantizer(D, M, K.bit_length() - 1)
    faiss.copy_array_to_vector(codebooks_MKD.numpy().ravel(), quantizer.codebooks)
    quantizer.max_beam_size = 1
    quantizer.use_beam_LUT = int(lut)
    quantizer.is_trained = True
    if lut:
        quantizer.compute_codebook_tables()
    x = x_ND.numpy()

    def run() -> Tensor:
        bits = np.unpackbits(quantizer.compute_codes(x), axis=1, bitorder="little")
        levels = bits[:, : M * 5].reshape(len(x), M, 5) @ (1 << np.arange(5))
        return torch.from_numpy(levels.astype(np.uint8))

    def timed() -> Tensor:  # without the unpacking, which only this bench needs
        return quantizer.compute_codes(x)

    timed.codes = run  # type: ignore[attr-defined]
    return timed


def vqp_encoder(codebooks_MKD: Tensor, x_ND: Tensor) -> Callable[[], Tensor] | None:
    """Return vector-quantize-pytorch's ResidualVQ in eval mode with these codebooks, or None if not installed."""
    if not harness.find_distribution("vector-quantize-pytorch"):
        return None
    from vector_quantize_pytorch import ResidualVQ

    M, K, D = codebooks_MKD.shape
    quantizer = ResidualVQ(dim=D, num_quantizers=M, codebook_size=K).eval()
    for layer, codebook_KD in zip(quantizer.layers, codebooks_MKD, strict=True):
        layer._codebook.embed.data.copy_(codebook_KD[None])
        layer._codebook.initted.data.fill_(True)

    def run() -> Tensor:
        with torch.inference_mode():
            return quantizer(x_ND[None])[1][0].to(torch.uint8)

    return run


def main() -> None:
    """Run the bench."""
    arguments = harness.parser(__doc__ or "")
    arguments.add_argument("--widths", type=int, nargs="+", default=[32, 64, 128, 256, 512])
    arguments.add_argument("--cells", type=int, help="rows; default: about half a second of work")
    arguments.add_argument("--latents", help="float32 [N, D] .npy file of real latents to time as well")
    options = arguments.parse_args()
    torch.set_num_threads(options.threads)
    if (reason := registry.backends()["cpu"]) is not None:
        raise InputError(f"there is nothing to time: {reason}")
    cases = [(f"D={D}", *problem(options.cells or 12_000_000 // D, D)) for D in options.widths]
    if options.latents:
        x_ND = torch.from_numpy(np.load(options.latents)).float()
        x_ND = x_ND.repeat(max(1, 12_000_000 // x_ND.numel()), 1)
        cases.append((f"real D={x_ND.shape[1]}", x_ND, fitted(x_ND, torch.Generator().manual_seed(0))))
    rows, figures = [], {"wrong_codes": 0.0}
    for case, x_ND, codebooks_MKD in cases:
        tables = ops.prepare(codebooks_MKD)
        contenders: dict[str, Callable[[], Tensor] | None] = {
            "rvqa": partial(ops.residual_quantize, x_ND, tables),
            "faiss": faiss_encoder(codebooks_MKD, x_ND, lut=False),
            "faiss LUT": faiss_encoder(codebooks_MKD, x_ND, lut=True),
            "vq-pytorch": vqp_encoder(codebooks_MKD, x_ND),
        }
        live = {name: run for name, run in contenders.items() if run is not None}
        exact_NM = ops.residual_quantize(x_ND, tables)
        figures["wrong_codes"] += wrong_rows(x_ND[:100_000], codebooks_MKD, exact_NM[:100_000])
        if figures["wrong_codes"]:
            raise InputError(f"{figures['wrong_codes']:.0f} rows have wrong codes in case {case}: nothing was timed")
        for name, run in live.items():
            codes_NM = getattr(run, "codes", run)()
            differ = float((codes_NM != exact_NM).any(1).double().mean())
            if differ > 0.02:
                raise InputError(f"{name} was not set up with the same codebooks: {differ:.1%} of rows differ")
            if name != "rvqa":
                figures[f"{name.replace(' ', '_')}_rows_not_exact_{case.replace('=', '').replace(' ', '_')}"] = differ
        peak = harness.fma_rate(3)
        floor = len(x_ND) * 2 * LEVELS * CODEWORDS * x_ND.shape[1] / peak
        timings = harness.interleave(live, options.repeats)
        suffix = case.replace("=", "").replace(" ", "_")
        for name, timing in timings.items():
            rate = len(x_ND) / timing.median
            rows.append(harness.Row(case, name, rate, "cells/s", timing.spread, floor / timing.median))
        ours = timings["rvqa"].median
        figures[f"cells_per_s_{suffix}"] = len(x_ND) / ours
        figures[f"fma_peak_share_{suffix}"] = floor / ours
        figures[f"fma_gflops_{suffix}"] = peak / 1e9
        faiss = [timing.median for name, timing in timings.items() if name.startswith("faiss")]
        if faiss:
            figures[f"ratio_faiss_{suffix}"] = min(faiss) / ours
        if "vq-pytorch" in timings:
            ratio = timings["vq-pytorch"].median / ours
            figures["ratio_vqp_min"] = min(ratio, figures.get("ratio_vqp_min", ratio))
    harness.report("residual_quantize", rows, figures, as_json=options.json)


if __name__ == "__main__":
    main()
