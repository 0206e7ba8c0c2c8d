"""The emulation finds errors that a GPU shows only sometimes; its tensor cores give the bits of mmasim."""

import pytest
import torch

from tests.cuda import emulated


@pytest.fixture(scope="module")
def faults(tmp_path_factory):
    built = emulated.compiled(tmp_path_factory.mktemp("faults") / "faults.so", emulated.ROOT / "tests/cuda/faults.cpp")
    return emulated.load("faults", built)


@pytest.fixture
def kernels():
    emulated.require()
    from rvqa.kernels.cuda import backend

    yield backend._native
    backend._native.emulate("forward", 0, "Hopper")


def test_a_missing_barrier_shows_in_some_order(faults):
    right = [*range(1, 64), 0]
    found = {True: set(), False: set()}
    for barrier in found:
        for order, seed in (("forward", 0), ("reversed", 0), ("shuffled", 1), ("shuffled", 2)):
            faults.emulate(order, seed, "Hopper")
            found[barrier].add(tuple(faults.neighbour(barrier)))
    assert found[True] == {tuple(right)}
    assert len(found[False]) > 1


@pytest.mark.parametrize("fault", ["leaves_early", "votes_alone"])
def test_a_thread_that_leaves_before_a_barrier_is_an_error(faults, fault):
    with pytest.raises(RuntimeError, match=f"{fault}: a thread left before a barrier"):
        getattr(faults, fault)()


def test_writing_outside_shared_memory_is_an_error(faults):
    with pytest.raises(RuntimeError, match="wrote outside its shared memory"):
        faults.writes_outside()


@pytest.mark.parametrize("architecture", ["Ampere", "Hopper"])
def test_tensor_cores_have_the_bits_of_mmasim(kernels, architecture):
    mmasim = pytest.importorskip("mmasim.nv_ptx")
    judge = mmasim.MMA(architecture, "m16n8k16.f32.f16.f16.f32")
    kernels.emulate("forward", 0, architecture)
    random = torch.Generator().manual_seed(0)
    for scale in (1e-7, 1e-4, 0.01, 1.0, 200.0):
        for _ in range(40):
            a, b = (torch.randn(n, 16, generator=random) * scale * 4.0 ** torch.randn(n, 16, generator=random)
                    for n in (16, 8))  # fmt: skip
            a, b = a.half(), b.half()
            addend = torch.randn(16, 8, generator=random) * scale**2 * 10.0 ** torch.randn(16, 8, generator=random)
            addend[0] = 0.0
            own = addend.clone()
            kernels.multiply_add(a.data_ptr(), b.data_ptr(), own.data_ptr())
            right = judge(a, b.T.contiguous(), addend)
            assert torch.equal(own.view(torch.int32), right.view(torch.int32))
