"""Masking logits by a grammar's windows on a CPU, against bit masks, a gathered bias, and only writing.

python -m bench.span_mask [--json] [--batches 1 16 64 256]

Every row is inside a span, at a random level: 32 of 151,936 ids stay (float32, opener at id 151,669, 8 levels of 32).
Masks, biases and bits are made beforehand; only their use is timed. xgrammar applies bit masks by its CPU kernel,
its default for CPU tensors, or under torch.compile; its third way, eager torch, is slower than both. The bias is
gathered and added (two calls, into existing memory), gathered and added under torch.compile, or added row by row. The
floor is a write of the same bytes: the faster of torch's `fill_` and memset in the same run.

Calls are timed in bursts of at least 30 ms after a pause, because a single call would mostly time how long threads take
to wake. Every contender runs on one thread and on all. The faster counts, and the table shows its number of threads:
where a kernel packs threads on one core, two can be 100 times slower than one.
"""

import time
from collections.abc import Callable
from functools import partial
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from bench import harness
from rvqa.errors import InputError
from rvqa.kernels import ops

VOCABULARY, OPENER, LEVELS, CODEWORDS = 151_936, 151_669, 8, 32
BURST = 0.03
"""Least seconds of calls that are timed together."""


def windows() -> Tensor:
    """Return the window of ids that each level may write."""
    first_M = OPENER + 1 + CODEWORDS * torch.arange(LEVELS)
    return torch.stack([first_M, first_M + CODEWORDS, torch.ones_like(first_M)], dim=1)


def bias_of(spans: Tensor) -> Tensor:
    """Return 0 for the ids that a level may write and -inf for the others, float32 [levels, V]."""
    bias = torch.full((len(spans), VOCABULARY), -torch.inf)
    for row, (lo, hi, _) in zip(bias, spans.tolist(), strict=True):
        row[lo:hi] = 0
    return bias


def bits_of(bias: Tensor) -> Tensor:
    """Return the same as xgrammar's bit masks, int32 [levels, ceil(V / 32)]."""
    allowed = torch.nn.functional.pad(bias == 0, (0, -VOCABULARY % 32)).view(len(bias), -1, 32)
    return (allowed.long() << torch.arange(32)).sum(2).to(torch.int32)


def gather(logits: Tensor, bias: Tensor, states: Tensor, gathered: Tensor) -> None:
    """Gather into existing memory, then add."""
    torch.index_select(bias, 0, states, out=gathered)
    logits.add_(gathered)


def row_by_row(logits: Tensor, bias: Tensor, states: Tensor) -> None:
    """Add the bias row by row: no gathered copy, but a call for every row."""
    for row, state in zip(logits, states.tolist(), strict=True):
        row.add_(bias[state])


@torch.compile(dynamic=True)
def fused(logits: Tensor, bias: Tensor, states: Tensor) -> None:
    """Gather and add in one loop that the compiler generates."""
    logits.add_(bias[states])


def contenders(logits: Tensor, states: Tensor) -> dict[str, Callable[[], Any]]:
    """Return all contenders; each sets ruled-out logits to -inf, in place."""
    spans = windows()
    bias = bias_of(spans)
    ruled_out, gathered = (bias != 0)[states], torch.empty_like(logits)
    calls: dict[str, Callable[[], Any]] = {"rvqa": partial(ops.apply_span_mask_, logits, states, spans)}
    if harness.find_distribution("xgrammar"):
        apply, bits = import_module("xgrammar").apply_token_bitmask_inplace, bits_of(bias)[states]
        calls["xgrammar"] = partial(apply, logits, bits, backend="cpu")
        calls["xgrammar compiled"] = partial(apply, logits, bits, backend="torch_compile")
    return calls | {
        "bias": partial(gather, logits, bias, states, gathered),
        "bias compiled": partial(fused, logits, bias, states),
        "bias by rows": partial(row_by_row, logits, bias, states),
        "masked_fill_": partial(logits.masked_fill_, ruled_out, -torch.inf),
    }


def floors(logits: Tensor) -> dict[str, Callable[[], Any]]:
    """Return the calls that only write the same bytes."""
    set_memory, size = import_module("rvqa._native").set_memory, logits.numel() * logits.element_size()
    return {
        "floor: fill_": partial(logits.fill_, -torch.inf),
        "floor: memset": lambda: set_memory(logits.data_ptr(), size, torch.get_num_threads()),
    }


def in_bursts(call: Callable[[], Any], threads: int) -> tuple[Callable[[], Any], int]:
    """Return a function of as many calls as take `BURST` on these threads, and their number."""
    torch.set_num_threads(threads)
    for _ in range(3):
        call()
    start = time.perf_counter()
    call()
    calls = 1 + int(BURST / max(time.perf_counter() - start, 1e-5))

    def burst() -> None:
        torch.set_num_threads(threads)
        for _ in range(calls):
            call()

    return burst, calls


def measure(logits: Tensor, states: Tensor, threads: int, repeats: int) -> dict[str, tuple[float, float, int]]:
    """Return seconds per call, spread and threads of every contender and floor, after a check that all agree."""
    calls, start, right = contenders(logits, states), logits.clone(), None
    for name, call in calls.items():
        logits.copy_(start)
        call()
        right = logits.clone() if right is None else right
        if not torch.equal(logits.view(torch.int32), right.view(torch.int32)):
            raise InputError(f"{name} and rvqa mask different logits; nothing was timed")
    calls |= floors(logits)
    at = {f"{name} ({T})": (name, T, *in_bursts(call, T)) for name, call in calls.items() for T in sorted({1, threads})}
    timings = harness.interleave({key: burst for key, (_, _, burst, _) in at.items()}, repeats)
    torch.set_num_threads(threads)
    result: dict[str, tuple[float, float, int]] = {}
    for key, (name, T, _, many) in at.items():
        seconds = timings[key].median / many
        if name not in result or seconds < result[name][0]:
            result[name] = seconds, timings[key].spread, T
    return result


def main() -> None:
    """Run the bench."""
    arguments = harness.parser(__doc__ or "")
    arguments.add_argument("--batches", type=int, nargs="+", default=[1, 16, 64, 256])
    options = arguments.parse_args()
    torch.set_num_threads(options.threads)
    rows: list[harness.Row] = []
    figures: dict[str, float] = {}
    for B in options.batches:
        generator = torch.Generator().manual_seed(B)
        states = torch.randint(0, LEVELS, (B,), generator=generator)
        logits = torch.randn(B, VOCABULARY, generator=generator)
        measured = measure(logits, states, options.threads, options.repeats)
        ours = measured["rvqa"][0]
        floor = min(seconds for name, (seconds, _, _) in measured.items() if name.startswith("floor"))
        for name, (seconds, spread, T) in measured.items():
            rows.append(harness.Row(f"B={B}", f"{name} ({T})", 1e6 * seconds, "us", spread, floor / seconds))
            if not name.startswith(("rvqa", "floor")):
                figures[f"ratio_{name.replace(' ', '_')}_B{B}"] = seconds / ours
        figures[f"share_of_floor_B{B}"] = floor / ours
    for rival in ("xgrammar", "xgrammar_compiled", "bias", "bias_compiled", "bias_by_rows"):
        ratios = {B: figures.get(f"ratio_{rival}_B{B}", 0.0) for B in options.batches}
        figures[f"ratio_{rival}_min"] = min((ratio for B, ratio in ratios.items() if B >= 16), default=0.0)
        figures[f"ratio_{rival}_b1"] = ratios.get(1, 0.0)
    figures["share_of_floor"] = min(value for name, value in figures.items() if name.startswith("share_of_floor_B"))
    harness.report("span_mask", rows, figures, as_json=options.json)


if __name__ == "__main__":
    main()
