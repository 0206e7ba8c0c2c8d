"""Checks a wheel in an environment that has nothing else: import, quantization, round trip, facts of doctor."""

import importlib.util
import os

import torch

import rvqa
from rvqa.doctor import report
from rvqa.kernels import ops

assert importlib.util.find_spec("kernels") is None, "the wheel must not install a top-level module `kernels`"
live = report()["backends"]["cpu"] is None
assert live == (os.environ["RVQA_EXPECTS"] == "cpu"), report()["backends"]
generator = torch.Generator().manual_seed(0)
tables = ops.prepare(torch.randn(8, 32, 16, generator=generator))
codes = ops.residual_quantize(tables.codebooks_MKD[0], tables, levels=1)
assert codes.flatten().tolist() == list(range(32)), "a codeword is nearest to itself"
assert torch.equal(ops.decode(codes, tables, levels=1), tables.codebooks_MKD[0])
whole = ops.residual_quantize(torch.randn(100, 16, generator=generator), tables)
print(f"rvqa {rvqa.__version__}: codes with the {'native' if live else 'reference'} backend, sum {int(whole.sum())}")
