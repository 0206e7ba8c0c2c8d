"""Parts that only the native backend has: instruction sets, threads after fork and spawn, large sizes."""

import multiprocessing
import os
import subprocess
import sys
import threading
from importlib import import_module

import pytest
import torch

from rvqa.errors import InputError
from rvqa.kernels import ops, registry
from tests.kernels.exact import natural

if registry.backends()["cpu"] is not None:
    pytest.skip("the native module was not built", allow_module_level=True)

FINGERPRINT = """
import hashlib, torch
from rvqa.kernels import ops
from rvqa.kernels.cpu import backend as cpu
from tests.kernels.exact import FAMILIES, natural
from tests.kernels.test_csr_project import counts
from tests.kernels.test_span_mask import BITS, random_logits, windows

digest = hashlib.sha256()
def add(*tensors):
    for tensor in tensors:
        digest.update(tensor.numpy().tobytes())

cases = [make() for make in FAMILIES.values()] + [natural(700, 3, K, D) for K in (5, 32, 33, 256) for D in (3, 32, 100)]
for x, codebooks in cases:
    tables = ops.prepare(codebooks)
    codes = ops.residual_quantize(x, tables)
    add(codes, ops.decode(codes, tables), *ops.nearest_codeword(x, codebooks[0]), ops.residual_norms(x, codes, tables))
for H in (1, 19, 64, 100, 256):
    for fractions in (False, True):
        weight = torch.randn(50, H, generator=torch.Generator().manual_seed(H))
        add(ops.csr_project(*counts(300, fractions=fractions), weight, torch.ones(H)))
for dtype in BITS:
    for V in (1, 7, 290, 70_001):
        logits, around = random_logits(len(windows(V)), V, dtype=dtype, offset=3, beyond=1)
        ops.apply_span_mask_(logits, torch.arange(len(windows(V))), windows(V))
        add(around.view(BITS[dtype]))
logits, around = random_logits(60, 300_000, offset=1)  # past the caches
ops.apply_span_mask_(logits, torch.ones(60, dtype=torch.int64), windows(300_000))
add(around)
print(cpu.isa(), digest.hexdigest())
"""


def fingerprint(isa):
    environment = {**os.environ, "RVQA_ISA": isa, "RVQA_BACKEND": "cpu"}
    return subprocess.run([sys.executable, "-c", FINGERPRINT], env=environment, capture_output=True, text=True)


def test_every_instruction_set_gives_the_same_bits():
    """The sets that this CPU runs are compared with one another; `portable` runs anywhere."""
    runs = {isa: fingerprint(isa) for isa in ("portable", "avx2", "avx512")}
    results = {}
    for isa, done in runs.items():
        if done.returncode:
            assert isa != "portable", done.stderr
            assert "this CPU cannot run" in done.stderr or "this build has" in done.stderr, done.stderr
        else:
            used, digest = done.stdout.split()
            assert used == isa
            results[isa] = digest
    assert len(set(results.values())) == 1, results


def test_an_unknown_instruction_set_is_refused():
    done = fingerprint("mmx")
    assert done.returncode
    assert "RVQA_ISA is mmx; this build has" in done.stderr


def problem():
    x, codebooks = natural(4000, 8, 32, 32)
    return x, ops.prepare(codebooks)


def in_child(expected):
    torch.set_num_threads(2)
    sys.exit(0 if torch.equal(ops.residual_quantize(*problem()), expected) else 1)


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_works_in_a_child_process(method):
    """After fork the parent's threads are gone; a pool that waits for them would hang."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        expected = ops.residual_quantize(*problem())
        child = multiprocessing.get_context(method).Process(target=in_child, args=(expected,))
        child.start()
        child.join(60)
        assert child.exitcode == 0
    finally:
        torch.set_num_threads(before)
        if child.is_alive():
            child.kill()


def test_calls_from_many_threads_at_once():
    torch.set_num_threads(2)
    x, tables = problem()
    expected = ops.residual_quantize(x, tables)
    wrong = []

    def work():
        for _ in range(10):
            if not torch.equal(ops.residual_quantize(x, tables), expected):
                wrong.append(1)

    callers = [threading.Thread(target=work) for _ in range(6)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join(120)
    assert not wrong
    assert not any(caller.is_alive() for caller in callers)


def test_tables_that_are_none_are_refused():
    x, tables = problem()
    other = ops.prepare(torch.ones(8, 32, 64)).packed
    for packed in (tables.packed[:-64], torch.zeros(100, dtype=torch.uint8), other):
        with pytest.raises(ValueError, match="not tables"):
            ops.residual_quantize(x, ops.Tables(tables.codebooks_MKD, packed))


@pytest.mark.parametrize("fill", [float("nan"), float("inf"), -3e38, 0.0])
@pytest.mark.parametrize("K", [5, 32, 40])
def test_no_code_leaves_tables_that_someone_wrote(K, fill):
    """The tables have the right sizes and random content: codes are meaningless, but below K."""
    x, codebooks = natural(50, 3, K, 8)
    tables = ops.prepare(codebooks)
    tables.packed[64:].view(torch.float32).fill_(fill)
    assert int(ops.residual_quantize(x, tables).max()) < K


def test_what_is_written_to_is_not_what_is_read():
    """A row of latents must not become the codes of the next."""
    memory = torch.zeros(64)
    codes, tables = memory.view(torch.uint8)[100:104].view(2, 2), ops.prepare(torch.ones(2, 3, 4))
    for out in (memory[25:33], memory[18:26]):
        with pytest.raises(InputError, match="out shares memory with codes or codebooks"):
            ops.decode(codes, tables, out=out.view(2, 4))
    for out in (memory[26:34], memory[17:25]):
        assert torch.equal(ops.decode(codes, tables, out=out.view(2, 4)), torch.full((2, 4), 2.0))
        memory.zero_()
    with pytest.raises(InputError, match="out shares memory"):
        ops.decode(codes.clone(), tables, out=tables.codebooks_MKD[0, :2])
    logits, windows = memory.view(4, 16), torch.tensor([[2, 5, 1]])
    with pytest.raises(InputError, match="logits share memory with states or windows"):
        ops.apply_span_mask_(logits, memory.view(torch.int32)[12:16], windows)
    assert not memory.any()


def test_memory_that_is_not_aligned():
    tables = ops.prepare(torch.ones(2, 3, 4))
    for dtype in (torch.float32, torch.float16):
        x = torch.frombuffer(bytearray(33), dtype=dtype, count=8, offset=1).view(2, 4)
        with pytest.raises(InputError, match="begins between two of its elements"):
            ops.residual_quantize(x, tables)
        assert ops.residual_quantize(x.clone(), tables).shape == (2, 2)


def test_a_row_of_more_entries_than_can_be_counted():
    """Only the pointers are read."""
    indptr, total = torch.tensor([0, 2**31]), torch.empty(1, dtype=torch.float64)
    parts = (indptr.data_ptr(), 0, "int32", 0, "uint8", 2**33, 1)
    native = import_module("rvqa._native")
    assert native.csr_totals(*parts, 0, 9, 1, total.data_ptr()) == -1
    assert not native.csr_project(*parts, 0, 0, 9, 0, 1e4, 0, 9, 0, 1, 0)


def test_a_row_of_the_sparse_matrix_longer_than_a_block():
    """One row has more entries than a block of 128 rows may have."""
    n = (1 << 22) + 7
    genes, hidden = 97, 3
    indices = torch.arange(n, dtype=torch.int32) % genes
    weight, bias = torch.randn(genes, hidden), torch.zeros(hidden)
    once = torch.bincount(indices, minlength=genes)
    got = ops.csr_project(torch.tensor([0, n, n]), indices, torch.ones(n, dtype=torch.uint8), weight, bias)
    right = ops.csr_project(torch.tensor([0, genes, genes]), torch.arange(genes), once.int(), weight, bias)
    assert torch.equal(got, right)
