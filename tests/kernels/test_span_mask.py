"""On every backend, masking changes exactly the ids that a row's window rules out."""

import numpy as np
import pytest
import torch

from rvqa.kernels import ops, reference, registry

BITS = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}
INFINITY = {torch.float32: 0xFF800000, torch.bfloat16: 0xFF80, torch.float16: 0xFC00}


def windows(V):
    """Windows inside and outside spans: in the middle, at the edges, beyond them, empty, whole, and of one id."""
    a, b = V // 3, V // 3 + V // 5 + 1
    spans = [(a, b), (0, a), (b, V), (0, V), (0, 0), (b, a), (a, a), (V, V), (V - 1, V), (0, 1)]
    spans += [(-5, b), (a, V + 5), (-(2**62), 2**62), (V + 3, V + 9), (-9, -3), (2**62, -(2**62))]
    return torch.tensor([(lo, hi, inside) for lo, hi in spans for inside in (0, 1)])


def random_logits(B, V, *, dtype=torch.float32, offset=0, beyond=0, seed=0):
    """Return random bit patterns, including NaN and infinities, and the memory around the rows."""
    size = torch.iinfo(BITS[dtype])
    shape = (B, offset + V + beyond)
    generator = torch.Generator().manual_seed(seed)
    around = torch.randint(size.min, size.max + 1, shape, generator=generator, dtype=BITS[dtype]).view(dtype)
    return around[:, offset : offset + V], around


def random_states(B, S, *, dtype=torch.int64, seed=0):
    return torch.randint(-1, S, (B,), generator=torch.Generator().manual_seed(seed), dtype=dtype)


def bits(logits):
    return logits.view(BITS[logits.dtype]).numpy()


def definition(logits, states, windows):
    """Compute the operator's definition in numpy; return the bits of the result."""
    result = bits(logits).copy()
    infinity = np.array(INFINITY[logits.dtype]).astype(f"uint{8 * result.itemsize}").view(result.dtype)
    id_V = np.arange(result.shape[1])
    for row, state in zip(result, states.tolist(), strict=True):
        if state != -1:
            lo, hi, inside = windows[state].tolist()
            within = (id_V >= lo) & (id_V < hi)
            row[~within if inside else within] = infinity
    return result


def check(logits, around, states, windows, *, offset=0, run=ops.apply_span_mask_):
    right = bits(around).copy()
    right[:, offset : offset + logits.shape[1]] = definition(logits, states, windows)
    run(logits, states, windows)
    assert np.array_equal(bits(around), right)


@pytest.fixture(params=[1, 2])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", BITS)
@pytest.mark.parametrize("V", [1, 7, 31, 290, 1000])
@pytest.mark.parametrize("B", [0, 1, 3, 17])
def test_bits(backend, B, V, dtype):
    for offset, beyond in ((0, 0), (1, 0), (3, 8)):
        for seed in range(3):
            logits, around = random_logits(B, V, dtype=dtype, offset=offset, beyond=beyond, seed=seed)
            states = random_states(B, len(windows(V)), dtype=(torch.int64, torch.int32)[seed % 2], seed=seed)
            check(logits, around, states, windows(V), offset=offset)


@pytest.mark.parametrize("dtype", BITS)
def test_every_window(backend, dtype):
    for V in (1, 2, 64, 1001):
        logits, around = random_logits(len(windows(V)), V, dtype=dtype, offset=2, beyond=3)
        check(logits, around, torch.arange(len(windows(V))), windows(V), offset=2)


@pytest.mark.parametrize("dtype", BITS)
@pytest.mark.parametrize("B", [1, 3, 17])
def test_a_vocabulary(backend, threads, B, dtype):
    """Rows have many parts, which threads share."""
    V, opener = 151_936, 151_669
    spans = torch.tensor([(opener + 1 + 32 * m, opener + 33 + 32 * m, 1) for m in range(8)] + [(opener, V, 0)])
    for all_windows in (spans, windows(V)):
        logits, around = random_logits(B, V, dtype=dtype, offset=5, beyond=11)
        check(logits, around, random_states(B, len(all_windows)), all_windows, offset=5)


def test_past_the_caches(backend, threads):
    """There are more bytes than the native kernel keeps in the caches."""
    V = 151_936
    logits, around = random_logits(120, V, offset=1, beyond=2)
    check(logits, around, torch.full((120,), 1), windows(V), offset=1)


def test_many_short_rows(backend, threads):
    logits, around = random_logits(100_000, 19, beyond=1)
    check(logits, around, random_states(100_000, len(windows(19)), dtype=torch.int32), windows(19))


def test_nothing_to_do(backend):
    for B, V in ((0, 5), (3, 0), (0, 0)):
        logits = torch.empty(B, V)
        states = torch.zeros(B, dtype=torch.int64)
        assert ops.apply_span_mask_(logits, states, torch.tensor([[0, 3, 1]])) is logits
    logits = torch.zeros(2, 3)
    ops.apply_span_mask_(logits, torch.tensor([-1, -1]), torch.empty(0, 3, dtype=torch.int64))
    assert torch.equal(logits, torch.zeros(2, 3))


def test_any_strides_of_one_row_and_of_states(backend):
    logits = torch.zeros(4, 3)
    ops.apply_span_mask_(logits[:1].expand(1, 3), torch.arange(8)[::8], torch.tensor([[1, 2, 1]]))
    assert logits[0].tolist() == [-torch.inf, 0, -torch.inf]
    ops.apply_span_mask_(logits[1:], torch.tensor([0, 9, -1, 9, 0, 9])[::2], torch.tensor([[1, 2, 0]]))
    assert logits[1:, 1].tolist() == [-torch.inf, 0, -torch.inf]
    assert not logits[1:, ::2].any()


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize(
    ("states", "message"),
    [
        ([0, 2, -1, 7], r"2 states are outside -1..1; the first is 2 in row 1"),
        ([0, 1, 0, -2], r"1 states are outside -1..1; the first is -2 in row 3"),
    ],
)
def test_refuses_states_and_writes_nothing(backend, states, message, dtype):
    logits = torch.ones(4, 3)
    with pytest.raises(ValueError, match=message):
        ops.apply_span_mask_(logits, torch.tensor(states, dtype=dtype), torch.tensor([[0, 1, 1], [0, 0, 1]]))
    assert torch.equal(logits, torch.ones(4, 3))


def test_refuses_what_does_not_fit(backend):
    logits, states, spans = torch.ones(4, 6), torch.zeros(4, dtype=torch.int64), torch.zeros(2, 3, dtype=torch.int64)
    for arguments, message in [
        ((logits.double(), states, spans), "logits has dtype float64; expected float32 or bfloat16 or float16"),
        ((logits, states.short(), spans), "states has dtype int16"),
        ((logits, states, spans.int()), "windows has dtype int32; expected int64"),
        ((logits.tolist(), states, spans), "logits is a list"),
        ((logits[0], states, spans), r"logits \(6,\), states \(4,\) and windows \(2, 3\) do not fit"),
        ((logits, states[:3], spans), "do not fit as"),
        ((logits, states[:, None], spans), "do not fit as"),
        ((logits, states, spans[:, :2]), "do not fit as"),
        ((logits, states, spans[0]), "do not fit as"),
        ((logits.T.contiguous().T, states, spans), r"strides \(1, 4\)"),
        ((logits[:1].expand(4, 6), states, spans), r"strides \(0, 1\)"),
        ((logits, states, torch.zeros(3, 2, dtype=torch.int64).T), "contiguous windows"),
        ((logits, states.to("meta"), spans), "states on meta, windows on cpu"),
        ((logits, states, spans.to("meta")), "states on cpu, windows on meta"),
    ]:
        with pytest.raises(ValueError, match=message):
            ops.apply_span_mask_(*arguments)
    assert torch.equal(logits, torch.ones(4, 6))


def test_a_gradient(backend):
    logits, states, spans = torch.ones(2, 4, requires_grad=True), torch.tensor([0, -1]), torch.tensor([[1, 3, 1]])
    with pytest.raises(ValueError, match=r"require a gradient.*use rvqa.language.masks.apply_mask_"):
        ops.apply_span_mask_(logits * 1, states, spans)
    with torch.no_grad():
        ops.apply_span_mask_(logits * 1, states, spans)
    masked = logits * 1
    reference.apply_span_mask_(masked, states, spans)
    masked[torch.isfinite(masked)].sum().backward()
    assert logits.grad.tolist() == [[0, 1, 1, 0], [1, 1, 1, 1]]


def test_autograd_notices_the_change(backend):
    logits, weight = torch.ones(1, 3), torch.ones(1, 3, requires_grad=True)
    product = weight * logits
    ops.apply_span_mask_(logits, torch.tensor([0]), torch.tensor([[0, 1, 1]]))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.sum().backward()
    with torch.inference_mode():
        kept = ops.apply_span_mask_(torch.ones(1, 3), torch.tensor([0]), torch.tensor([[0, 1, 1]]))
    assert kept.tolist() == [[1, -torch.inf, -torch.inf]]


@pytest.mark.parametrize("dtype", BITS)
def test_compiles_in_one_graph(backend, dtype):
    states, spans = torch.tensor([0, 1, -1]), torch.tensor([[1, 3, 1], [2, 4, 0]])

    def model(hidden, weight):
        return ops.apply_span_mask_(hidden @ weight, states, spans).float().softmax(1)

    arguments = torch.randn(3, 8).to(dtype), torch.randn(8, 6).to(dtype)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(*arguments), model(*arguments))
    logits, right = torch.ones(3, 6).to(dtype), torch.ones(3, 6).to(dtype)
    torch.compile(ops.apply_span_mask_, backend="aot_eager", fullgraph=True)(logits, states, spans)
    assert torch.equal(logits, ops.apply_span_mask_(right, states, spans))


def test_meta_tensors(backend):
    logits = torch.empty(3, 6, device="meta")
    states, spans = (
        torch.empty(3, dtype=torch.int64, device="meta"),
        torch.empty(2, 3, dtype=torch.int64, device="meta"),
    )
    assert ops.apply_span_mask_(logits, states, spans) is logits
    reference.apply_span_mask_(logits, states, spans)


def test_reference_compiles_for_training():
    spans = torch.tensor([[1, 3, 1]])

    def model(logits, states):
        reference.apply_span_mask_(logits, states, spans)
        return logits

    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)(torch.ones(2, 4), torch.tensor([0, -1]))
    assert torch.equal(compiled, model(torch.ones(2, 4), torch.tensor([0, -1])))


def test_is_an_operation():
    for name, reason in registry.backends().items():
        if reason is None:
            assert callable(registry.function(name, "apply_span_mask_"))
