"""The `cuda` backend on a CUDA device, against exact integers and the reference; tests/cuda runs it without one."""

from functools import cache

import pytest
import torch

from rvqa.kernels import reference, registry
from tests.kernels.exact import FAMILIES, exact_codes, natural

if (reason := registry.reason_absent("cuda")) is not None:
    pytest.skip(f"backend cuda is not live: {reason}", allow_module_level=True)
if not torch.cuda.is_available():
    pytest.skip("there is no CUDA device", allow_module_level=True)

from rvqa.kernels.cuda import backend


@cache
def exact_family(family):
    return exact_codes(*FAMILIES[family]())


def quantize(x, codebooks):
    return backend.residual_quantize(x.cuda(), (codebooks.cuda(),) * 2, len(codebooks))[0].cpu()


@pytest.mark.parametrize("family", FAMILIES)
def test_adversarial_rows_are_exact(family):
    x, codebooks = FAMILIES[family]()
    assert torch.equal(quantize(x, codebooks).long(), exact_family(family))


@pytest.mark.parametrize("D", [8, 33, 64, 100, 512, 1500])
@pytest.mark.parametrize("N", [1, 31, 33, 129, 1025])
def test_natural_rows_have_the_codes_of_the_reference(N, D):
    x, codebooks = natural(N, 8, 32, D, seed=N)
    assert torch.equal(quantize(x, codebooks), reference.residual_quantize(x, (codebooks, codebooks), 8)[0])


def test_nearest_of_many_codewords():
    x, codebooks = natural(300, 1, 5000, 40)
    found = backend.nearest_codeword(x.cuda(), codebooks[0].cuda())
    right = reference.nearest_codeword(x, codebooks[0])
    assert torch.equal(found[0].cpu(), right[0])
    assert torch.equal(found[1].cpu(), right[1])


def test_projection_has_the_bits_of_the_reference():
    counts = torch.poisson(torch.full((60, 700), 0.3), generator=torch.Generator().manual_seed(0)).to_sparse_csr()
    parts = (counts.crow_indices(), counts.col_indices(), counts.values())
    weight, bias = torch.randn(700, 130), torch.randn(130)
    order = torch.randperm(700)
    for column_map in (None, order):
        found = backend.csr_project(
            *(each.cuda() for each in (*parts, weight, bias)), column_map=None if column_map is None else order.cuda()
        )
        assert torch.equal(found.cpu(), reference.csr_project(*parts, weight, bias, column_map=column_map))


def test_a_captured_graph_gives_the_codes_of_new_rows():
    x, codebooks = natural(257, 8, 32, 64)
    still, on_device = x.cuda(), codebooks.cuda()
    backend.quantize(still, on_device, 8)  # the first call makes the tables
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        codes, _ = backend.quantize(still, on_device, 8)
    still.copy_(x.flip(0).cuda())
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(codes.cpu(), reference.residual_quantize(x.flip(0), (codebooks, codebooks), 8)[0])
