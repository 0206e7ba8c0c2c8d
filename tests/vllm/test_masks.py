"""One grammar, four times: automaton, Hugging Face, vLLM V1 and Model Runner V2 leave the same ids in each row.

V1 and V2 get vLLM's own classes of batch updates, request state and context. V2 keeps its buffers on a GPU; here they
are tensors of the same shape.
"""

from itertools import product
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from vllm import SamplingParams
from vllm.v1.sample.logits_processor.interface import BatchUpdate, MoveDirectionality
from vllm.v1.worker.gpu.sample.logits_processor.interface import LogitsContext, LogitsProcRequestState

from rvqa.errors import InputError
from rvqa.language import grammar
from rvqa.language.grammar import Rule
from rvqa.language.prompts import word_ids
from rvqa.language.vocabulary import CellVocabulary
from rvqa.serving.hf import CellSpanLogitsProcessor
from rvqa.serving.vllm import CellSpans
from tests import qwen_fixture, spans

TOKENIZER = qwen_fixture.byte_tokenizer()
CELL = CellVocabulary.install(TOKENIZER)
END_ID, ROWS = TOKENIZER.eos_token_id, 560
PROMPT = [7, CELL.opener, 9]  # spans in the prompt have no effect
LENGTH = 64
TEXT_ID = 5


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    TOKENIZER.save_pretrained(folder)
    return engine_config(folder)


def engine_config(folder, *, named=("rvqa.serving.vllm:CellSpans",), asynchronous=False):
    """Return the part of vLLM's configuration that the processor reads."""
    model = SimpleNamespace(
        model=str(folder),
        tokenizer=str(folder),
        tokenizer_revision=None,
        max_model_len=LENGTH,
        logits_processors=list(named),
    )
    return SimpleNamespace(model_config=model, scheduler_config=SimpleNamespace(async_scheduling=asynchronous))


def params(rule, max_tokens=None, **settings):
    made = SamplingParams(max_tokens=max_tokens, extra_args=rule.options(), **settings)
    made.update_from_generation_config({}, eos_token_id=END_ID)
    return made


def ours(ids):
    """Return ids of `tests.spans` in this tokenizer."""
    table = np.full(spans.ROWS, TEXT_ID)
    table[spans.END_ID] = END_ID
    table[spans.CELL.base : spans.CELL.closer + 1] = np.arange(CELL.base, CELL.closer + 1)
    return table[np.asarray(ids)]


def by_table(outputs, rule, budget):
    """Return the ids that the table leaves, bool [B, rows], by each output's trace and its last state's windows."""
    allowed = spans.allowed(CELL, ROWS, END_ID)
    last = [grammar.trace(row, CELL, rule.cells, stop_id=END_ID, max_new_tokens=budget)[-1] for row in outputs]
    return allowed[torch.tensor(last)]


def by_hf(outputs, rule, budget):
    processor = CellSpanLogitsProcessor(
        CELL,
        rule,
        prompt_length=len(PROMPT),
        max_new_tokens=budget,
        stop_ids=END_ID,
        answers=[word_ids(TOKENIZER, text) for text in rule.choices or ()],
    )
    ids = torch.tensor([[*PROMPT, *row] for row in outputs])
    return torch.isfinite(processor(ids, torch.zeros(len(outputs), ROWS)))


def by_v1(outputs, rule, budget, config):
    processor = CellSpans(config, torch.device("cpu"), is_pin_memory=False)
    request = params(rule, budget)
    added = [(i, request, list(PROMPT), [int(each) for each in row]) for i, row in enumerate(outputs)]
    processor.update_state(BatchUpdate(len(outputs), removed=[], added=added, moved=[]))
    logits = torch.zeros(len(outputs), ROWS)
    assert processor.apply(logits) is logits
    return torch.isfinite(logits)


class Buffers:
    """Request slots as Model Runner V2 keeps them, on the CPU."""

    def __init__(self, slots):
        def buffer(*shape):
            return SimpleNamespace(gpu=torch.zeros(shape, dtype=torch.int32))

        self.state = LogitsProcRequestState(
            device=torch.device("cpu"),
            max_num_reqs=slots,
            vocab_size=ROWS,
            all_token_ids=buffer(slots, LENGTH),
            prompt_len=buffer(slots),
            prefill_len=buffer(slots),
            total_len=buffer(slots),
        )
        self.state.all_token_ids.gpu.random_(0, ROWS)  # left there by an earlier request

    def fill(self, slot, output, prompt=PROMPT):
        whole = [*prompt, *output]
        self.state.all_token_ids.gpu[slot, : len(whole)] = torch.tensor(whole)
        self.state.prompt_len.gpu[slot] = len(prompt)
        self.state.prefill_len.gpu[slot] = len(whole)
        self.state.total_len.gpu[slot] = len(whole)

    def fill_all(self, slots, outputs):
        """Call `fill` for outputs of one length."""
        prompts = np.tile(PROMPT, (len(outputs), 1))
        whole = np.concatenate([prompts, np.asarray(outputs, dtype=np.int64).reshape(len(outputs), -1)], axis=1)
        self.state.all_token_ids.gpu[torch.from_numpy(slots), : whole.shape[1]] = torch.from_numpy(whole).int()
        self.state.prompt_len.gpu.fill_(len(PROMPT))
        for each in (self.state.prefill_len, self.state.total_len):
            each.gpu.fill_(whole.shape[1])

    def context(self, slots, drafts=None):
        """Return one row for each slot, and one for each of its draft tokens."""
        drafts = drafts or [[] for _ in slots]
        slot_of = [slot for slot, draft in zip(slots, drafts, strict=True) for _ in range(len(draft) + 1)]
        local = [i for draft in drafts for i in range(len(draft) + 1)]
        total = self.state.total_len.gpu
        pos = [int(total[slot]) - 1 + i for slot, i in zip(slot_of, local, strict=True)]
        last = {slot: int(self.state.all_token_ids.gpu[slot, int(total[slot]) - 1]) for slot in slots}
        fed = [each for slot, draft in zip(slots, drafts, strict=True) for each in [last[slot], *draft]]
        return LogitsContext(
            expanded_idx_mapping=torch.tensor(slot_of, dtype=torch.int32),
            idx_mapping=torch.tensor(slots, dtype=torch.int32),
            idx_mapping_np=np.array(slots),
            expanded_local_pos=torch.tensor(local, dtype=torch.int32),
            input_ids=torch.tensor(fed, dtype=torch.int32),
            pos=torch.tensor(pos),
            seq_lens_upper_bound_np=np.array(
                [int(total[slot]) + len(d) for slot, d in zip(slots, drafts, strict=True)]
            ),
        )


def by_v2(outputs, rule, budget, config):
    buffers = Buffers(len(outputs))
    processor = CellSpans(config, buffers.state)
    slots = np.random.default_rng(0).permutation(len(outputs))
    buffers.fill_all(slots, outputs)
    request = params(rule, budget)
    for slot in slots.tolist():
        assert processor.add_request(slot, request)
    processor.apply_staged_writes()
    logits = torch.zeros(len(outputs), ROWS)
    assert processor.apply(logits, buffers.context(slots.tolist())) is logits
    return torch.isfinite(logits)


def require_equal(outputs, rule, budget, config, *, table=None):
    masks = [by_hf(outputs, rule, budget), by_v1(outputs, rule, budget, config), by_v2(outputs, rule, budget, config)]
    if rule.mode != "choice":
        masks.append(by_table(outputs, rule, budget) if table is None else table)
    for mask in masks[1:]:
        assert torch.equal(mask, masks[0])
    return masks[0]


@pytest.mark.parametrize("budget", [40, 13])
@pytest.mark.parametrize("rule", spans.RULES, ids=lambda rule: rule.mode)
def test_every_short_string(rule, budget, config):
    if rule.cells * 10 > budget:
        with pytest.raises(ValueError, match="cannot hold 2 cells"):
            CellSpans.validate_params(params(rule, budget))
        return
    for length in range(5):
        _, ids = spans.every_string(spans.CELL, length)
        require_equal(ours(ids).tolist(), rule, budget, config)


@pytest.mark.parametrize("rule", spans.RULES, ids=lambda rule: rule.mode)
def test_every_state_and_token_class(rule, config):
    """There is an output for each state that a rule reaches, followed by each token class."""
    codes = [CELL.code_id(m, 31) for m in range(8)]
    span = [CELL.opener, *codes, CELL.closer]
    classes = [TEXT_ID, END_ID, *span]
    beginnings = [[*before, *span[:n]] for before in ([], [TEXT_ID], span) for n in range(11)]
    outputs = [[*beginning, each] for beginning, each in product(beginnings, classes)]
    for length in sorted({len(output) for output in outputs}):
        require_equal([output for output in outputs if len(output) == length], rule, 40, config)


@pytest.mark.parametrize("rule", spans.RULES, ids=lambda rule: rule.mode)
def test_random_walks(rule, config):
    """There are 100,000 walks, 25,000 of each rule, checked at each of their 25 places."""
    walks, traces = spans.random_walks(rule, 25_000, 24, budget=30, seed=2)
    walks, allowed = ours(walks), spans.allowed(CELL, ROWS, END_ID)
    for length in range(25):
        states = torch.from_numpy(traces[:, length])
        require_equal(walks[:, :length].tolist(), rule, 30, config, table=allowed[states])


def test_choices(config):
    rule = Rule("choice", choices=(" B", " B cell", " CD4 T", " CD8 T"))
    ids = [word_ids(TOKENIZER, text) for text in rule.choices]
    for answer, budget in product(ids, (40, 5, 2)):
        for length in range(len(answer) + 2):
            outputs = [answer[:length], [*answer, END_ID][:length]]
            if length:
                outputs.append([*answer[: length - 1], TEXT_ID])
            outputs = [output for output in outputs if len(output) == length]
            if outputs:
                require_equal(outputs, rule, budget, config)
    left = require_equal([[]], rule, 40, config)
    assert left[0].nonzero().flatten().tolist() == [ids[0][0]]


def test_choices_at_the_bound_and_beyond(config):
    """A request may have the most choices, which stay distinct; one more is rejected at admission."""
    most = tuple(f" cell type number {i:4d}" for i in range(1024))
    rule = Rule("choice", choices=most)
    CellSpans.validate_params(params(rule, 40))
    ids = [word_ids(TOKENIZER, text) for text in (most[0], most[-1])]
    require_equal([answer[:3] for answer in ids], rule, 40, config)
    with pytest.raises(ValueError, match="There are 1,025 choices; expected at most 1,024"):
        CellSpans.validate_params(SamplingParams(extra_args={"rvqa_mode": "choice", "rvqa_choices": [*most, "x"]}))
    with pytest.raises(ValueError, match="could break a cell") as refused:
        CellSpans.validate_params(SamplingParams(logit_bias={1: 1e9}, bad_words=["x" * 10**6], extra_args=None))
    assert len(str(refused.value)) < 500


def test_a_batch_of_many_rules_that_changes(config):
    """Rows come, go, move and swap as in vLLM; each follows its own rule."""
    processor = CellSpans(config, torch.device("cpu"), is_pin_memory=False)
    choice = Rule("choice", choices=(" B", " T"))
    rules = [*spans.RULES, choice, Rule("n_cells", 3)]
    rng = np.random.default_rng(0)
    rows: dict[int, tuple[Rule, list[int]]] = {}
    for step in range(60):
        removed, added, moved = [], [], []
        for row in list(rows):
            if rng.random() < 0.2:
                removed.append(row)
                del rows[row]
        for row in range(8):
            if row not in rows and rng.random() < 0.6:
                rule = rules[rng.integers(len(rules))]
                written: list[int] = []
                rows[row] = (rule, written)
                added.append((row, params(rule, 40), list(PROMPT), written))
        removed = [row for row in removed if row not in rows]  # vLLM reports only rows that stay empty
        here = sorted(rows)
        if len(here) > 1 and rng.random() < 0.5:
            a, b = (int(each) for each in rng.choice(here, 2, replace=False))
            moved.append((a, b, MoveDirectionality.SWAP))
            rows[a], rows[b] = rows[b], rows[a]
        processor.update_state(BatchUpdate(8, removed=sorted(removed, reverse=True), added=added, moved=moved))
        logits = torch.zeros(8, ROWS)
        processor.apply(logits)
        for row in range(8):
            left = torch.isfinite(logits[row])
            if row not in rows:
                assert left.all()
                continue
            rule, written = rows[row]
            assert torch.equal(left, by_hf([written], rule, 40)[0]), (step, rule, written)
            written.append(int(rng.choice(left.nonzero().flatten().numpy())))


def test_slots_of_v2_are_used_again(config):
    buffers = Buffers(3)
    processor = CellSpans(config, buffers.state)
    for step, rules in enumerate(
        [spans.RULES[:3], spans.RULES[1:], [Rule("choice", choices=(" B",)), *spans.RULES[:2]]]
    ):
        for slot, rule in enumerate(rules):
            buffers.fill(slot, [])
            processor.add_request(slot, params(rule, 30 - step))
        processor.apply_staged_writes()
        for order in ([0, 1, 2], [2, 0], [1]):
            logits = torch.zeros(len(order), ROWS)
            processor.apply(logits, buffers.context(order))
            for row, slot in enumerate(order):
                assert torch.equal(torch.isfinite(logits[row]), by_hf([[]], rules[slot], 30 - step)[0])


@pytest.mark.parametrize("rule", [*spans.RULES, Rule("choice", choices=(" B cell", " CD4 T"))], ids=lambda r: r.mode)
def test_rows_of_draft_tokens(rule, config):
    """In speculative decoding V2 has a row per draft token; each is masked as if the drafts had been written."""
    rng = np.random.default_rng(0)
    buffers = Buffers(4)
    processor = CellSpans(config, buffers.state)
    answer = [*word_ids(TOKENIZER, " CD4 T"), END_ID]
    for trial in range(40):
        whole = ours(spans.random_walks(rule, 4, 24, seed=trial)[0]).tolist() if rule.mode != "choice" else [answer] * 4
        outputs, drafts = [], []
        for slot, row in enumerate(whole):
            cut = int(rng.integers(0, len(row)))
            outputs.append(row[:cut])
            drafts.append(row[cut : cut + int(rng.integers(0, 5))])
            buffers.fill(slot, outputs[-1])
            processor.add_request(slot, params(rule, 30))
        processor.apply_staged_writes()
        slots = rng.permutation(4).tolist()
        context = buffers.context(slots, [drafts[slot] for slot in slots])
        logits = torch.zeros(len(context.pos), ROWS)
        processor.apply(logits, context)
        expected = [[*outputs[slot], *drafts[slot][:n]] for slot in slots for n in range(len(drafts[slot]) + 1)]
        for row, output in enumerate(expected):
            assert torch.equal(torch.isfinite(logits[row]), by_hf([output], rule, 30)[0])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="Model Runner V2 keeps its requests on a GPU")
@pytest.mark.parametrize("rule", spans.RULES, ids=lambda rule: rule.mode)
def test_on_the_request_state_of_a_gpu(rule, config):
    """This uses V2's own buffers instead of tensors of their shape."""
    from vllm.v1.worker.gpu.states import RequestState

    device = torch.device("cuda")
    state = RequestState(64, LENGTH, 256, 0, ROWS, device)
    processor = CellSpans(config, LogitsProcRequestState.from_request_state(state))
    outputs = ours(spans.random_walks(rule, 64, 24, seed=3)[0]).tolist()
    for i, row in enumerate(outputs):
        state.add_request(str(i), len(PROMPT), [*PROMPT, *row], 0, 30)
    slots = [state.req_id_to_index[str(i)] for i in range(64)]
    for slot in slots:
        processor.add_request(slot, params(rule, 30))
    state.apply_staged_writes()
    processor.apply_staged_writes()
    rows = torch.tensor(slots, dtype=torch.int32, device=device)
    place = torch.full((64,), len(PROMPT) + 24 - 1, device=device)
    context = LogitsContext(
        expanded_idx_mapping=rows,
        idx_mapping=rows,
        idx_mapping_np=np.array(slots),
        expanded_local_pos=torch.zeros_like(rows),
        input_ids=torch.tensor([row[-1] for row in outputs], dtype=torch.int32, device=device),
        pos=place,
        seq_lens_upper_bound_np=np.full(64, len(PROMPT) + 24),
    )
    logits = processor.apply(torch.zeros(64, ROWS, device=device), context)
    assert torch.equal(torch.isfinite(logits).cpu(), by_hf(outputs, rule, 30))


def test_what_cannot_be_counted_opens_no_span(config):
    """Cases: a stop token inside spans, a prompt of embeddings, the end of the model's length."""
    seen = {}
    for name, request, prompt in [
        ("plain", params(Rule("free"), 30), [1]),
        ("stops inside", params(Rule("free"), 30, stop_token_ids=[CELL.code_id(3, 1)]), [1]),
        ("stops at the closer", params(Rule("free"), 30, stop_token_ids=[CELL.closer]), [1]),
        ("no prompt ids", params(Rule("free"), 30), None),
        ("model's length", params(Rule("free"), None), [1] * (LENGTH - 9)),
        ("just room", params(Rule("free"), None), [1] * (LENGTH - 10)),
    ]:
        processor = CellSpans(config, torch.device("cpu"), is_pin_memory=False)
        processor.update_state(BatchUpdate(1, removed=[], added=[(0, request, prompt, [])], moved=[]))
        left = torch.isfinite(processor.apply(torch.zeros(1, ROWS)))[0]
        seen[name] = bool(left[CELL.opener])
        assert left[TEXT_ID]
        if prompt is not None:
            buffers = Buffers(1)
            buffers.fill(0, [], prompt)
            processor = CellSpans(config, buffers.state)
            processor.add_request(0, request)
            processor.apply_staged_writes()
            again = torch.isfinite(processor.apply(torch.zeros(1, ROWS), buffers.context([0])))[0]
            assert torch.equal(again, left)
    assert seen == {
        "plain": True,
        "stops inside": False,
        "stops at the closer": True,
        "no prompt ids": False,
        "model's length": False,
        "just room": True,
    }


def test_ids_that_vllm_does_not_know_yet_are_refused(config):
    """Async scheduling shows -1 to processors registered only by entry point, but lengths are still known."""
    for rule, fails in [
        (Rule("free"), True),
        (Rule("choice", choices=(" B",)), True),
        (Rule("one_cell"), False),
        (Rule("text"), False),
    ]:
        processor = CellSpans(config, torch.device("cpu"), is_pin_memory=False)
        written = [CELL.opener, -1] if rule.mode != "choice" else [-1]
        processor.update_state(BatchUpdate(1, removed=[], added=[(0, params(rule, 30), [1], written)], moved=[]))
        if fails:
            with pytest.raises(RuntimeError, match=r"--logits-processors rvqa\.serving\.vllm:CellSpans"):
                processor.apply(torch.zeros(1, ROWS))
        else:
            left = torch.isfinite(processor.apply(torch.zeros(1, ROWS)))[0]
            assert left[CELL.code_id(1, 0)] == (rule.mode == "one_cell")


def test_models_without_cell_tokens_are_left_alone(tmp_path):
    """This holds even if the tokenizer cannot be opened and nobody named the class: its entry point sees any model."""
    qwen_fixture.byte_tokenizer().save_pretrained(tmp_path)
    for folder in (tmp_path, tmp_path / "nothing"):
        config = engine_config(folder, named=(), asynchronous=True)
        processor = CellSpans(config, torch.device("cpu"), is_pin_memory=False)
        rules = [Rule("free"), Rule("one_cell"), Rule("choice", choices=(" B",))]
        added = [(i, params(rule, 30), [1], []) for i, rule in enumerate(rules)]
        processor.update_state(BatchUpdate(3, removed=[], added=added, moved=[]))
        assert torch.isfinite(processor.apply(torch.zeros(3, 300))).all()
        assert not CellSpans(config, Buffers(2).state).add_request(0, params(rules[0]))
    with pytest.raises(OSError, match="nothing"):
        CellSpans(engine_config(tmp_path / "nothing"), torch.device("cpu"), is_pin_memory=False)


def test_an_entry_point_alone_and_async_scheduling_do_not_start(config):
    folder = config.model_config.model
    with pytest.raises(
        InputError, match=r"vllm#52461.*Start it with --logits-processors rvqa\.serving\.vllm:CellSpans"
    ):
        CellSpans(engine_config(folder, named=(), asynchronous=True), torch.device("cpu"), is_pin_memory=False)
    CellSpans(engine_config(folder, named=()), torch.device("cpu"), is_pin_memory=False)
    CellSpans(engine_config(folder, asynchronous=True), torch.device("cpu"), is_pin_memory=False)
    CellSpans(engine_config(folder, named=(CellSpans,), asynchronous=True), torch.device("cpu"), is_pin_memory=False)


def opens(config, request):
    """Return whether a request may begin with a cell."""
    processor = CellSpans(config, torch.device("cpu"), is_pin_memory=False)
    processor.update_state(BatchUpdate(1, removed=[], added=[(0, request, [1], [])], moved=[]))
    left = torch.isfinite(processor.apply(torch.zeros(1, ROWS)))[0]
    assert left.any()
    return bool(left[CELL.opener])


def test_requests_without_options_of_ours_are_served_as_text_where_a_cell_could_break(config):
    assert opens(config, SamplingParams(max_tokens=30))
    for settings in ({"stop": ["x"]}, {"allowed_token_ids": [5]}, {"bad_words": ["<|c0_00|>"]}):
        request = SamplingParams(max_tokens=30, **settings)
        CellSpans.validate_params(request)
        assert not opens(config, request)


def test_stop_tokens_that_would_cut_what_was_asked_for(config):
    code = CELL.code_id(2, 3)
    for rule, settings, fine in [
        (Rule("n_cells", 2), {"stop_token_ids": [CELL.closer]}, False),
        (Rule("one_cell"), {"stop_token_ids": [CELL.closer]}, True),
        (Rule("one_cell"), {"stop_token_ids": [code]}, False),
        (Rule("free"), {"stop_token_ids": [CELL.closer]}, True),
        (Rule("free"), {"stop_token_ids": [CELL.closer], "min_tokens": 20}, False),
        (Rule("free"), {"stop_token_ids": [5]}, True),
    ]:
        assert opens(config, params(rule, 30, **settings)) == fine
    rule = Rule("choice", choices=(" B", " T"))
    inside = word_ids(TOKENIZER, " T")[-1]
    processor = CellSpans(config, torch.device("cpu"), is_pin_memory=False)
    added = [(i, params(rule, 30, stop_token_ids=stops), [1], []) for i, stops in enumerate([[inside], [CELL.closer]])]
    processor.update_state(BatchUpdate(2, removed=[], added=added, moved=[]))
    left = torch.isfinite(processor.apply(torch.zeros(2, ROWS)))
    assert left[0].nonzero().flatten().tolist() == [END_ID]  # the answer is empty, not cut
    assert not left[1, END_ID]


@pytest.mark.parametrize(
    ("rule", "settings", "match"),
    [
        (Rule("free"), {"stop": ["Question:"]}, "stop="),
        (Rule("choice", choices=(" B",)), {"stop": ["B"]}, "stop="),
        (Rule("text"), {"stop": ["<"]}, None),
        (Rule("free"), {"repetition_penalty": 1e38}, "repetition_penalty="),
        (Rule("text"), {"repetition_penalty": 1e-30}, "repetition_penalty="),
        (Rule("free"), {"repetition_penalty": 1.3, "presence_penalty": 2.0, "min_p": 0.5, "top_k": 1}, None),
        (Rule("free"), {"logit_bias": {5: 100.0}}, None),
        (Rule("free"), {"allowed_token_ids": [5]}, "allowed_token_ids="),
        (Rule("text"), {"allowed_token_ids": [5]}, None),
        (Rule("free"), {"bad_words": ["<|c0_00|>"]}, "bad_words="),
        (Rule("free"), {"bad_words": ["cancer"]}, None),
        (Rule("one_cell"), {"bad_words": ["cancer"]}, "bad_words="),
        (Rule("one_cell"), {"max_tokens": 9}, "cannot hold a cell"),
        (Rule("one_cell"), {"ignore_eos": True}, "ignore_eos="),
        (Rule("one_cell"), {"min_tokens": 3}, "min_tokens="),
        (Rule("free"), {"min_tokens": 3, "ignore_eos": True}, None),
        (Rule("n_cells", 3), {"max_tokens": 29}, "cannot hold 3 cells"),
    ],
    ids=str,
)
def test_options_that_could_break_a_span(rule, settings, match):
    made = params(rule, **{"max_tokens": 16, **settings})
    if match is None:
        CellSpans.validate_params(made)
    else:
        with pytest.raises(ValueError, match=match):
            CellSpans.validate_params(made)


def test_structured_outputs_and_early_ends_are_refused():
    from vllm.sampling_params import RepetitionDetectionParams, StructuredOutputsParams

    for name, value in [
        ("structured_outputs", StructuredOutputsParams(regex="a")),
        ("repetition_detection", RepetitionDetectionParams(max_pattern_size=3, min_count=2)),
        ("thinking_token_budget", 5),
    ]:
        CellSpans.validate_params(params(Rule("text"), 16, **{name: value}))
        with pytest.raises(ValueError, match=f"{name}="):
            CellSpans.validate_params(params(Rule("free"), 16, **{name: value}))
    for bias in (float("-inf"), float("nan"), 1e9):
        with pytest.raises(ValueError, match="logit_bias="):
            CellSpans.validate_params(SamplingParams(logit_bias={CELL.closer: bias}))
    with pytest.raises(ValueError, match="no option 'rvqa_x'"):
        CellSpans.validate_params(SamplingParams(extra_args={"rvqa_x": 1}))
