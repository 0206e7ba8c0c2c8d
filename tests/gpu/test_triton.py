"""The `triton` backend against exact integers and the reference: in Triton's interpreter, or on a CUDA device."""

import json
import os
import re
import subprocess
import sys
from functools import cache

import pytest
import torch

from rvqa.kernels import ops, reference, registry
from tests.kernels.exact import FAMILIES, exact_codes, natural
from tests.kernels.test_span_mask import BITS, check, random_logits, random_states, windows

if (reason := registry.reason_absent("triton")) is not None:
    pytest.skip(f"backend triton is not live: {reason}", allow_module_level=True)

from rvqa.kernels.triton import backend as triton_backend
from rvqa.kernels.triton import codes as triton_codes
from rvqa.kernels.triton import mask as triton_mask

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = [
    # The interpreter computes in numpy, which reports what overflows.
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
]

SIZES, WIDTHS = (1, 31, 33, 129), (8, 33, 64, 100)


def quantize(x, codebooks, levels=None):
    levels = len(codebooks) if levels is None else levels
    codebooks = codebooks.to(DEVICE)
    return triton_backend.residual_quantize(x.to(DEVICE), (codebooks, codebooks), levels)[0].cpu()


def right_codes(x, codebooks, levels):
    return reference.residual_quantize(x, (codebooks, codebooks), levels)[0]


def nearest(x, codebook):
    index, distance, _, _ = triton_backend.nearest_codeword(x.to(DEVICE), codebook.to(DEVICE))
    return index.cpu(), distance.cpu()


def project(*args, **given):
    def move(value):
        return value.to(DEVICE) if isinstance(value, torch.Tensor) else value

    args = [move(value) for value in args]
    return triton_backend.csr_project(*args, **{name: move(value) for name, value in given.items()}).cpu()


@cache
def exact_family(family):
    return exact_codes(*FAMILIES[family]())


@pytest.mark.parametrize("family", FAMILIES)
def test_adversarial_rows_are_exact(family):
    x, codebooks = FAMILIES[family]()
    assert torch.equal(quantize(x, codebooks).long(), exact_family(family))


@pytest.mark.parametrize("family", FAMILIES)
def test_nearest_codeword_on_adversarial_rows(family):
    """This is the same problem as the first level alone."""
    x, codebooks = FAMILIES[family]()
    index, distance = nearest(x, codebooks[0])
    assert index.dtype == torch.int64
    assert torch.equal(index, exact_family(family)[:, 0])
    assert torch.equal(distance, reference.nearest_codeword(x, codebooks[0])[1])


def lost_residual():
    """After the first level float64 residuals are off by up to 128 and give a wrong second code."""
    c_2D = torch.tensor([[1.0, 1.0, -1.0], [-1.0, -1.0, 1.0]])
    c_0D = torch.tensor([2.0**60, 2.0**60, 2.0**61])
    return torch.tensor([[65.0, 193.0, 259.0]]), torch.stack([c_0D.expand(2, 3), c_2D])


def edge_of_overflow():
    """Twice the product with the farther codeword exceeds float32, but its score does not."""
    x_1D = torch.full((1, 1), 2.0**63.5)
    return x_1D, torch.stack([x_1D[0] * 1.3, x_1D[0] * 0.9])[None]


@pytest.mark.parametrize("make", [lost_residual, edge_of_overflow])
def test_rows_that_need_the_limits(make):
    x, codebooks = make()
    assert torch.equal(quantize(x, codebooks).long(), exact_codes(x, codebooks))


@pytest.mark.parametrize("family", [*FAMILIES, "lost_residual"])
def test_float64_kernel_alone(family):
    """No row is certified in float32."""
    make = FAMILIES.get(family, lost_residual)
    x, codebooks = (value[:80].to(DEVICE) for value in make())
    tables = triton_codes.prepare_tables(codebooks, len(codebooks))
    tables = tables._replace(longest_1=torch.full_like(tables.longest_1, -1.0))
    codes = triton_codes.residual_quantize(x, codebooks, len(codebooks), tables).cpu().long()
    assert torch.equal(codes, exact_codes(*make())[:80] if make is lost_residual else exact_family(family)[:80])


@pytest.mark.parametrize("D", WIDTHS)
@pytest.mark.parametrize("N", SIZES)
def test_natural_rows(N, D):
    x, codebooks = natural(N, 3, 32, D)
    assert torch.equal(quantize(x, codebooks), right_codes(x, codebooks, 3))


@pytest.mark.parametrize(("M", "K", "D"), [(8, 5, 8), (4, 33, 64), (2, 256, 33), (1, 1, 1), (20, 2, 3), (2, 7, 1030)])
def test_other_shapes(M, K, D):
    x, codebooks = natural(33, M, K, D, seed=20)
    assert torch.equal(quantize(x, codebooks), right_codes(x, codebooks, M))
    assert torch.equal(quantize(x, codebooks, 1), right_codes(x, codebooks, 1))


def test_without_a_gram_table():
    """More codewords than the Gram table takes: every row takes the float64 kernel."""
    x, codebooks = natural(5, 17, 256, 8, seed=21)
    assert torch.equal(quantize(x, codebooks), right_codes(x, codebooks, 17))


def test_most_rows_are_certified_in_float32(monkeypatch):
    """No natural row reaches the reference and few reach the float64 kernel, so the bound is useful."""
    x, codebooks = (value.to(DEVICE) for value in natural(500, 8, 32, 64, seed=22))
    seen = []
    monkeypatch.setattr(
        torch, "nonzero", lambda flags, take=torch.nonzero: seen.append(int(flags.sum())) or take(flags)
    )
    codes = torch.empty(500, 8, dtype=torch.uint8, device=DEVICE)
    triton_codes._certified(x, codebooks, codes, triton_codes.prepare_tables(codebooks, 8))
    assert seen[0] <= 0.05 * 500
    assert sum(seen[1:]) == 0


def test_prepared_tables_are_the_same():
    x, codebooks = (value.to(DEVICE) for value in natural(31, 3, 5, 8))
    tables = triton_codes.prepare_tables(codebooks, 2)
    codes = triton_codes.residual_quantize(x, codebooks, 2, tables)
    assert torch.equal(codes, triton_codes.residual_quantize(x, codebooks, 2))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_means_its_float32_values(dtype):
    x, codebooks = natural(33, 3, 32, 33)
    assert torch.equal(quantize(x.to(dtype), codebooks), quantize(x.to(dtype).float(), codebooks))
    assert torch.equal(nearest(x.to(dtype), codebooks[0])[0], nearest(x.to(dtype).float(), codebooks[0])[0])


def test_no_rows():
    assert quantize(torch.empty(0, 8), torch.ones(3, 4, 8)).shape == (0, 3)
    assert nearest(torch.empty(0, 8), torch.ones(4, 8))[0].shape == (0,)
    assert triton_backend.decode(torch.empty(0, 3, dtype=torch.uint8), torch.ones(3, 4, 8), 3).shape == (0, 8)


@pytest.mark.parametrize(("N", "K", "D"), [(1, 1, 1), (31, 33, 33), (129, 256, 8), (33, 3001, 100)])
def test_nearest_codeword(N, K, D):
    x, codebooks = natural(N, 1, K, D, seed=23)
    index, distance = nearest(x, codebooks[0])
    right, squared, _, _ = reference.nearest_codeword(x, codebooks[0])
    assert torch.equal(index, right)
    assert torch.equal(distance, squared)


@pytest.mark.parametrize("D", [1, 8, 33, 300])
@pytest.mark.parametrize("N", SIZES)
def test_decode(N, D):
    g = torch.Generator().manual_seed(N)
    _, codebooks = natural(0, 5, 33, D)
    codebooks[0, :, 0] = -0.0
    codes = torch.randint(0, 33, (N, 5), generator=g, dtype=torch.uint8)
    for levels in (1, 5):
        out = triton_backend.decode(codes.to(DEVICE), codebooks.to(DEVICE), levels).cpu()
        assert out.numpy().tobytes() == reference.decode(codes, codebooks, levels).numpy().tobytes()


def mask(logits, states, spans):
    """Mask rows in place within larger memory, on the device where the kernel runs."""
    moved = logits.to(DEVICE) if DEVICE == "cuda" else logits
    triton_backend.apply_span_mask_(moved, states.to(DEVICE), spans.to(DEVICE))
    logits.copy_(moved)


@pytest.mark.parametrize("dtype", BITS)
@pytest.mark.parametrize("V", [1, 7, 1000, 4096, 9001])
def test_masks(V, dtype):
    """Covers every window and several row counts; columns beyond a row stay."""
    S = len(windows(V))
    for states in (torch.arange(S), random_states(17, S, dtype=torch.int32)):
        logits, around = random_logits(len(states), V, dtype=dtype, offset=3, beyond=2)
        check(logits, around, states, windows(V), offset=3, run=mask)


def test_masks_a_vocabulary():
    V, opener = 151_936, 151_669
    spans = torch.tensor([(opener + 1 + 32 * m, opener + 33 + 32 * m, 1) for m in range(8)] + [(opener, V, 0)])
    logits, around = random_logits(3, V)
    check(logits, around, torch.tensor([7, 8, -1]), spans, run=mask)


def test_masks_nothing():
    spans = torch.tensor([[0, 3, 1]])
    for B, V in ((0, 5), (3, 0)):
        mask(torch.empty(B, V), torch.zeros(B, dtype=torch.int64), spans)


def test_a_state_without_a_window_leaves_its_row():
    """On a device no state is rejected, so the kernel is called directly, as it would be there."""
    logits = torch.ones(4, 5, device=DEVICE)
    states = torch.tensor([-7, 2, 2**40, 0], device=DEVICE)
    triton_mask.apply_span_mask_(logits, states, torch.tensor([[0, 5, 0], [0, 5, 0]], device=DEVICE))
    assert logits.isinf().all(1).tolist() == [False, False, False, True]
    assert logits.isfinite().all(1).tolist() == [True, True, True, False]


def counts(N, columns=50, *, order="sorted", seed=0, fractions=False):
    """CSR parts with empty rows and stored zeros."""
    g = torch.Generator().manual_seed(seed)
    dense = torch.randint(1, 40, (N, columns), generator=g) * (torch.rand(N, columns, generator=g) < 0.3)
    dense[4::5] = 0
    indices, data, stored = [], [], [0]
    for row in dense:
        columns_E = torch.nonzero(row + (torch.rand(columns, generator=g) < 0.05)).flatten()
        if order == "shuffled":
            columns_E = columns_E[torch.randperm(len(columns_E), generator=g)]
        indices.append(columns_E)
        data.append(row[columns_E] * (0.1 if fractions else 1))
        stored.append(stored[-1] + len(columns_E))
    return torch.tensor(stored), torch.cat(indices), torch.cat(data)


def layer(G=50, H=19):
    g = torch.Generator().manual_seed(1)
    return torch.randn(G, H, generator=g), torch.randn(H, generator=g)


COUNT_DTYPES = [torch.float32, torch.float64, torch.int32, torch.uint8, torch.uint16]


@pytest.mark.parametrize("dtype", COUNT_DTYPES)
@pytest.mark.parametrize("order", ["sorted", "shuffled"])
def test_projection_of_whole_counts_has_the_bits_of_the_reference(order, dtype):
    indptr, indices, data = counts(6, order=order)
    data = data.to(dtype)
    right = reference.csr_project(indptr, indices, data, *layer())
    assert torch.equal(project(indptr, indices, data, *layer()), right)
    assert torch.equal(project(indptr.int(), indices.int(), data, *layer()), right)


@pytest.mark.parametrize(("N", "H"), [(1, 1), (5, 64), (5, 1100), (31, 19), (33, 19), (129, 19)])
def test_projection_sizes(N, H):
    """Rows have few entries, because the interpreter takes milliseconds for each."""
    parts = counts(N, columns=50 if N < 30 else 6)
    assert torch.equal(project(*parts, *layer(H=H)), reference.csr_project(*parts, *layer(H=H)))


@pytest.mark.parametrize("fractions", [False, True])
@pytest.mark.parametrize("order", ["sorted", "shuffled"])
def test_column_map_adds_and_drops(order, fractions):
    indptr, indices, data = counts(6, columns=60, order=order, fractions=fractions)
    g = torch.Generator().manual_seed(2)
    for column_map in (torch.randint(-1, 50, (60,), generator=g), torch.arange(60).where(torch.arange(60) < 50, -1)):
        right = reference.csr_project(indptr, indices, data, *layer(), column_map=column_map)
        result = project(indptr, indices, data, *layer(), column_map=column_map)
        assert torch.allclose(result, right, rtol=1e-5, atol=1e-5)
        assert torch.equal(project(indptr, indices, data, *layer(), column_map=column_map.int()), result)


@pytest.mark.parametrize("dtype", COUNT_DTYPES)
def test_repeated_columns_add_up(dtype):
    once = project(torch.tensor([0, 2]), torch.tensor([3, 8]), torch.tensor([6.0, 1.0]), *layer())
    for order in ([3, 8, 3, 3], [3, 3, 3, 8]):
        data = torch.tensor([1.0, 1.0, 3.0, 2.0] if order[1] == 8 else [1.0, 3.0, 2.0, 1.0])
        assert torch.equal(project(torch.tensor([0, 4]), torch.tensor(order), data.to(dtype), *layer()), once)
    mapped = torch.tensor([-1, 3, 3, 8, 3])
    parts = torch.tensor([0, 4]), torch.tensor([1, 2, 3, 4]), torch.tensor([1.0, 3.0, 1.0, 2.0])
    assert torch.equal(project(*parts, *layer(), column_map=mapped), once)
    # Two columns have one target, in increasing order: only the map shows that they repeat.
    parts = torch.tensor([0, 3]), torch.tensor([1, 2, 3]), torch.tensor([4.0, 2.0, 1.0])
    assert torch.equal(project(*parts, *layer(), column_map=mapped), once)


def test_library_size_and_target_sum():
    indptr, indices, data = counts(6)
    library = torch.rand(6, generator=torch.Generator().manual_seed(3), dtype=torch.float64) * 1000 + 1
    for given in (library, library.float()):
        right = reference.csr_project(indptr, indices, data, *layer(), 333.3, library_size=given)
        assert torch.equal(project(indptr, indices, data, *layer(), target_sum=333.3, library_size=given), right)


def test_a_row_does_not_see_its_batch():
    """Rows with repeated columns do not change their neighbours; pointers need not start at 0."""
    indptr, indices, data = counts(6, columns=60, order="shuffled", fractions=True)
    column_map = torch.randint(-1, 50, (60,), generator=torch.Generator().manual_seed(4))
    whole = project(indptr, indices, data, *layer(), column_map=column_map)
    for size in (1, 4):
        parts = [
            project(indptr[start : start + size + 1], indices, data, *layer(), column_map=column_map)
            for start in range(0, 6, size)
        ]
        assert torch.equal(torch.cat(parts), whole)


def test_rows_without_counts_give_the_bias():
    weight, bias = layer()
    weight[0] = float("inf")
    empty = project(torch.tensor([0, 0, 2]), torch.tensor([0, 4]), torch.zeros(2), weight, bias)
    assert torch.equal(empty, bias.repeat(2, 1))
    unmapped = project(
        torch.tensor([0, 1]), torch.tensor([0]), torch.ones(1), weight, bias, column_map=torch.tensor([-1])
    )
    assert torch.equal(unmapped, bias[None])
    none = project(torch.tensor([0]), torch.empty(0, dtype=torch.int64), torch.empty(0), weight, bias)
    assert none.shape == (0, 19)


def test_values_are_the_reference_log1p():
    """With one gene of weight 1, no bias and a size factor of 1, the output is the value."""
    g = torch.Generator().manual_seed(5)
    y = torch.cat([10 ** (torch.rand(600, generator=g).double() * 34 - 18), torch.arange(200).double()])
    rows = torch.zeros(1, dtype=torch.int64), torch.arange(len(y)), torch.eye(len(y)), torch.zeros(len(y))
    pointers = torch.tensor([0, len(y)])
    result = project(pointers, rows[1], y, *rows[2:], target_sum=1.0, library_size=torch.ones(1))
    assert torch.equal(result[0], reference.log1p(y).float())


COMPILE = r"""
import json, os, re, subprocess, sys, tempfile
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from rvqa.kernels.triton import codes, csr, mask as triton_mask

tools = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin")
results = []


def check(kernel, types, constants, **options):
    types = iter(types.split())
    names = [parameter.name for parameter in kernel.params]
    signature = {name: "constexpr" if name in constants else next(types) for name in names}
    aligned = [i for i, name in enumerate(names) if signature[name].startswith("*") or name in "DKH"]
    attributes = {(i,): [["tt.divisibility", 16]] for i in aligned}
    source = ASTSource(kernel, signature, constants, attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        used = subprocess.run([f"{tools}/cuobjdump", "-res-usage", file.name], capture_output=True, text=True).stdout
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", used).groups()
    results.append({
        "kernel": kernel.__name__, "constants": {k: v for k, v in constants.items()}, "registers": int(registers),
        "stack": int(stack), "shared": compiled.metadata.shared, "fused": "fma.rn" in compiled.asm["ptx"],
        "tensor_cores": "mma" in compiled.asm["ptx"],
    })


for K, levels, out in ((32, 8, "*u8"), (256, 8, "*u8"), (4096, 1, "*i64")):
    blocks = codes.code_blocks(K)
    options = {name: blocks.pop(name) for name in ("num_warps", "num_stages")}
    constants = {**blocks, "LEVELS": levels, **({"levels": 1} if levels == 1 else {})}
    types = f"{'*fp32 ' * 6}{out} *u8 i32 i32 i32 {'i32' if levels > 1 else ''}"
    check(codes._propose_kernel, types, constants, **options)
for DP in (8, 128, 1024):
    rows, tile = codes._FLOAT64_BLOCK
    constants = {"BR": rows, "BK": min(32, max(1, tile // (rows * DP))), "DP": DP}
    check(codes._verify_kernel, "*i64 *fp32 *fp32 *fp64 *fp64 *u8 *fp64 *u8 *u8 i32 i32 i32 i32", constants)
for BD in (16, 256):
    check(codes._decode_kernel, "*u8 *fp32 *fp32 i32 i32 i32 i32 i32", {"BN": 2048 // BD, "BD": BD})
for logits in ("*fp32", "*bf16", "*fp16"):
    check(triton_mask._mask_kernel, f"{logits} *i64 *i64 i32 i32 i32", {"BLOCK": triton_mask._BLOCK}, num_warps=8)
for index, count, mapped in (("i32", "fp32", False), ("i64", "u16", True), ("i32", "u8", True)):
    maps, none = ("*i64 *u8", {}) if mapped else ("", {"map_ptr": None, "shared_ptr": None})
    constants = {"GIVEN": mapped, "MAPPED": mapped, "BE": 128, **none}
    types = f"*i64 *{index} *{count} {maps} *fp64 *fp64 *fp32 *u8 i64"
    check(csr._values_kernel, types, constants, enable_fp_fusion=False)
    constants = {"MAPPED": mapped, "BH": 512, "INTERPRETED": False, **({} if mapped else {"map_ptr": None})}
    types = f"*i64 *{index} {'*i64' if mapped else ''} *fp32 *fp32 *fp32 *fp32 i64 i32"
    check(csr._gather_kernel, types, constants, enable_fp_fusion=False)
print(json.dumps(results))
"""


def test_kernels_compile_for_hopper(tmp_path):
    """Compilation needs no GPU: machine code for sm_90, few spills, no TF32, and sums fused only as defined."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    done = subprocess.run([sys.executable, "-c", COMPILE], capture_output=True, text=True, env=environment, check=False)
    missing = re.search(r"^(ImportError|ModuleNotFoundError|FileNotFoundError): .*", done.stderr, re.MULTILINE)
    if done.returncode and missing:
        pytest.skip(f"this triton cannot compile ahead of time: {missing.group()}")
    assert done.returncode == 0, done.stderr[-3000:]
    results = json.loads(done.stdout.splitlines()[-1])
    print(*results, sep="\n")
    assert {result["kernel"].strip("_") for result in results} >= {"propose_kernel", "verify_kernel", "gather_kernel"}
    for result in results:
        assert result["stack"] <= 16, result
        assert not result["tensor_cores"], result
        if result["kernel"] in ("_values_kernel", "_gather_kernel"):
            assert result["fused"] == (result["kernel"] == "_gather_kernel"), result


def test_is_one_backend_among_others(monkeypatch):
    """`rvqa.kernels.ops` gives marks, errors and codes that agree."""
    monkeypatch.setenv("RVQA_BACKEND", "triton")
    x, codebooks = (value.to(DEVICE) for value in natural(33, 3, 8, 8))
    x[3, 1] = torch.nan
    tables = ops.prepare(codebooks)
    codes = ops.residual_quantize(x, tables, not_finite="mark")
    assert codes[3].tolist() == [255] * 3
    whole = torch.arange(33, device=DEVICE) != 3
    monkeypatch.delenv("RVQA_BACKEND")
    assert torch.equal(codes[whole].cpu(), right_codes(x[whole].cpu(), codebooks.cpu(), 3))
    with pytest.raises(ValueError, match="1 of 33 rows, first in row 3"):
        ops.residual_quantize(x, tables)


def test_says_why_it_cannot_run():
    script = "import sys; sys.modules['triton'] = None\nfrom rvqa.kernels import registry\nprint(registry.backends())"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment, check=True)
    assert "triton" in done.stdout
    assert "None in sys.modules" in done.stdout
