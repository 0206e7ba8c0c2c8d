"""The choice of the backend, the operators' registration, and the cost of imports."""

import importlib
import subprocess
import sys

import pytest
import torch

from rvqa.kernels import ops, registry
from tests.kernels.exact import natural

CPU = torch.device("cpu")


def forget():
    registry.reason_absent.cache_clear()
    registry._bound.cache_clear()


@pytest.fixture
def without_native(monkeypatch):
    """The registry on a machine where the native module was not built."""

    def refuse(name):
        if name == "rvqa.kernels.cpu.backend":
            raise ImportError("No module named 'rvqa._native'")
        return importlib.import_module(name)

    forget()
    monkeypatch.setattr(registry, "import_module", refuse)
    yield
    forget()


def sparse():
    return torch.tensor([0, 2, 3]), torch.tensor([1, 0, 2]), torch.tensor([1.0, 2.0, 3.0])


def operator_calls():
    x, codebooks = natural(9, 3, 8, 5)
    codes = torch.zeros(9, 3, dtype=torch.uint8)
    weight, bias = torch.ones(4, 6), torch.zeros(6)
    tables = ops.prepare(codebooks)
    return {
        "residual_quantize": (x, *tables, 2, False),
        "residual_norms": (x, codes, *tables),
        "nearest_codeword": (x, codebooks[0]),
        "decode": (codes, codebooks, 2),
        "decode_into": (codes, codebooks, 2, torch.empty(9, 5)),
        "csr_project": (*sparse(), weight, bias, 1e4, torch.tensor([0, -1, 3]), torch.ones(2)),
        "apply_span_mask_": (torch.ones(3, 7), torch.tensor([1, -1, 0]), torch.tensor([[2, 4, 1], [2, 4, 0]])),
    }


def test_default_is_the_fastest_live_backend(monkeypatch):
    monkeypatch.delenv("RVQA_BACKEND", raising=False)
    assert registry.select(CPU) == ("cpu" if registry.backends()["cpu"] is None else "reference")
    live = registry.backends()["triton"] is None
    assert registry.select(torch.device("cuda")) == ("triton" if live else "reference")


def test_override(backend):
    assert registry.select(CPU) == backend
    assert registry.dispatch("decode", CPU).__module__ == registry._MODULES[backend]


def test_unknown_override_raises(monkeypatch):
    monkeypatch.setenv("RVQA_BACKEND", "fast")
    with pytest.raises(ValueError, match="'fast' is not a backend; choose one of reference, cpu, triton, cuda"):
        ops.decode(torch.zeros(1, 1, dtype=torch.uint8), ops.prepare(torch.ones(1, 1, 1)))


def test_override_raises_where_the_native_module_is_missing(monkeypatch, without_native):
    monkeypatch.setenv("RVQA_BACKEND", "cpu")
    with pytest.raises(
        ValueError, match=r"RVQA_BACKEND=cpu cannot be used: No module named 'rvqa._native'.*RVQA_BUILD"
    ):
        ops.decode(torch.zeros(1, 1, dtype=torch.uint8), ops.prepare(torch.ones(1, 1, 1)))


def test_everything_runs_without_the_native_module(monkeypatch, without_native):
    monkeypatch.delenv("RVQA_BACKEND", raising=False)
    assert registry.backends()["reference"] is None
    assert "rvqa._native" in registry.backends()["cpu"]
    for name, arguments in operator_calls().items():
        getattr(torch.ops.rvqa, name)(*arguments)


def test_cpu_backend_refuses_other_devices(monkeypatch):
    if registry.backends()["cpu"] is not None:
        pytest.skip("the native module was not built")
    monkeypatch.setenv("RVQA_BACKEND", "cpu")
    with pytest.raises(ValueError, match="cannot run on cuda:0 tensors"):
        registry.select(torch.device("cuda:0"))


@pytest.mark.parametrize("operation", operator_calls())
def test_opcheck(backend, operation):
    torch.library.opcheck(getattr(torch.ops.rvqa, operation), operator_calls()[operation])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiles_in_one_graph(backend, dtype):
    x, codebooks = natural(9, 3, 8, 5)
    tables = ops.prepare(codebooks)

    def model(x, weight, bias):
        codes = ops.residual_quantize(x, tables)
        nearest, distance = ops.nearest_codeword(x, tables.codebooks_MKD[0])
        hidden = ops.csr_project(*sparse(), weight, bias)
        return codes, ops.decode(codes, tables) * 2, nearest, distance + 1, hidden - 1

    arguments = (x.to(dtype), torch.ones(4, 6), torch.zeros(6))
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)(*arguments)
    for got, right in zip(compiled, model(*arguments), strict=True):
        assert torch.equal(got, right)


def test_tables_of_another_backend_will_do(monkeypatch):
    if registry.backends()["cpu"] is not None:
        pytest.skip("the native module was not built")
    x, codebooks = natural(9, 3, 8, 5)
    codes = []
    for makes, runs in (("reference", "cpu"), ("cpu", "reference")):
        monkeypatch.setenv("RVQA_BACKEND", makes)
        tables = ops.prepare(codebooks)
        monkeypatch.setenv("RVQA_BACKEND", runs)
        codes.append(ops.residual_quantize(x, tables))
    assert torch.equal(*codes)


def test_importing_the_package_imports_no_torch():
    code = "import sys, rvqa.kernels; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
