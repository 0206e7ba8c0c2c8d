"""Codes to latents on a CPU: bandwidth against a measured copy.

python -m bench.decode [--json] [--widths 64 128 256]

The floor is memory: N (4 D + 8) bytes at the rate of a large copy (bytes read and written per second) on the same
threads in the same run. Both write to memory that exists already. A fill, which only writes, and new memory are timed.
"""

from functools import partial

import torch
from torch import Tensor

from bench import harness
from bench.residual_quantize import CODEWORDS, LEVELS
from rvqa.errors import InputError
from rvqa.kernels import ops, reference


def eager(codes_NM: Tensor, codebooks_MKD: Tensor) -> Tensor:
    """Decode as one would in torch: an embedding bag over all codewords."""
    M, K, D = codebooks_MKD.shape
    at = codes_NM.long() + torch.arange(M) * K
    return torch.nn.functional.embedding_bag(at, codebooks_MKD.reshape(M * K, D), mode="sum")


def main() -> None:
    """Run the bench."""
    arguments = harness.parser(__doc__ or "")
    arguments.add_argument("--widths", type=int, nargs="+", default=[64, 128, 256])
    arguments.add_argument("--megabytes", type=int, default=512, help="size of the result")
    options = arguments.parse_args()
    torch.set_num_threads(options.threads)
    rows, figures = [], {}
    for D in options.widths:
        N = options.megabytes * 2**20 // (4 * D)
        generator = torch.Generator().manual_seed(0)
        tables = ops.prepare(torch.randn(LEVELS, CODEWORDS, D, generator=generator))
        codes = torch.randint(0, CODEWORDS, (N, LEVELS), generator=generator, dtype=torch.uint8)
        source = torch.randn(N, D)
        target = torch.empty_like(source)
        contenders = {
            "rvqa": partial(ops.decode, codes, tables, out=target),
            "rvqa, new memory": partial(ops.decode, codes, tables),
            "floor: copy": lambda source=source, target=target: target.copy_(source),
            "fill": lambda target=target: target.fill_(1.0),
            "clone": source.clone,
            "torch": partial(eager, codes, tables.codebooks_MKD),
        }
        if not torch.equal(ops.decode(codes, tables), reference.decode(codes, tables.codebooks_MKD, LEVELS)):
            raise InputError("decode differs from the reference; nothing was timed")
        timings = harness.interleave(contenders, options.repeats)
        ours = timings["rvqa"].median
        rate = {name: 8 * N * D / timings[name].median for name in ("floor: copy", "clone")}
        rate["rvqa"] = N * (4 * D + 8) / ours
        rate["fill"] = 4 * N * D / timings["fill"].median
        figures[f"fill_share_D{D}"] = rate["rvqa"] / rate["fill"]
        for name, timing in timings.items():
            share = rate.get(name, N * (4 * D + 8) / timing.median) / rate["floor: copy"]
            rows.append(harness.Row(f"D={D}", name, N / timing.median, "cells/s", timing.spread, share))
        figures[f"bandwidth_share_D{D}"] = rate["rvqa"] / rate["floor: copy"]
        figures[f"ratio_torch_D{D}"] = timings["torch"].median / timings["rvqa, new memory"].median
    figures["bandwidth_share"] = min(value for key, value in figures.items() if key.startswith("bandwidth_share_"))
    harness.report("decode", rows, figures, as_json=options.json)


if __name__ == "__main__":
    main()
