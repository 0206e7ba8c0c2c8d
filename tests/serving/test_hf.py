"""Hugging Face generation: only valid spans at any temperature, and a fast path that equals `generate`."""

import pytest
import torch
from transformers import GenerationConfig, GPT2Config, GPT2LMHeadModel, LogitsProcessor, LogitsProcessorList

from rvqa.errors import InputError
from rvqa.language import grammar
from rvqa.language.grammar import Rule, is_valid_output
from rvqa.language.prompts import word_ids
from rvqa.language.rows import install_rows
from rvqa.language.vocabulary import CellVocabulary
from rvqa.serving import hf
from rvqa.serving.hf import CellSpanLogitsProcessor, generate_cells
from tests import qwen_fixture, spans

TOKENIZER = qwen_fixture.byte_tokenizer()
CELL = CellVocabulary.install(TOKENIZER)
END_ID, PAD_ID = TOKENIZER.eos_token_id, TOKENIZER.pad_token_id
CODEBOOKS = torch.randn(8, 32, 12, generator=torch.Generator().manual_seed(0))


def cell_model(**settings):
    """A random model with cell tokens; wide initial weights make its distributions uneven."""
    settings = {"eos_token_id": END_ID, "pad_token_id": PAD_ID, "initializer_range": 0.3, **settings}
    model = qwen_fixture.qwen_model(560, **settings)
    install_rows(model, CELL, CODEBOOKS, seed=0)
    return model


@pytest.fixture(scope="module")
def model():
    return cell_model()


def prompts(texts=("a cell of blood:", "T cell <|cell|><|c0_03|>", "x")):
    batch = TOKENIZER(list(texts), padding=True, return_tensors="pt")
    return batch["input_ids"], batch["attention_mask"]


class Eager(LogitsProcessor):
    """Makes the opener, and now and then the end, likely, because random models rarely write them."""

    def __call__(self, input_ids, scores):
        scores = scores.clone()
        scores[:, CELL.opener] += 12
        scores[:, END_ID] += 4
        return scores


# ---- the processor -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["free", "text", "one_cell"])
@pytest.mark.parametrize("budget", [1, 9, 10, 11, 24])
def test_hot_generation_is_always_valid(model, mode, budget):
    ids_BL, mask_BL = prompts(("a cell:", "T cell <|cell|><|c0_03|>", "<|cell|>", "x") * 4)
    L = ids_BL.shape[1]
    if mode == "one_cell" and budget < 10:
        with pytest.raises(InputError, match=f"max_new_tokens={budget} cannot hold a cell"):
            CellSpanLogitsProcessor(CELL, Rule(mode), prompt_length=L, max_new_tokens=budget, stop_ids=END_ID)
        return
    processor = CellSpanLogitsProcessor(CELL, Rule(mode), prompt_length=L, max_new_tokens=budget, stop_ids=END_ID)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(budget)
        output = model.generate(
            ids_BL,
            attention_mask=mask_BL,
            logits_processor=LogitsProcessorList([Eager(), processor]),
            max_new_tokens=budget,
            do_sample=True,
            temperature=2.0,
            top_k=0,
        )[:, L:]
    for row in output.tolist():
        assert is_valid_output(row, Rule(mode), CELL, stop_ids=[END_ID, PAD_ID]), row
    spans = [CELL.find_spans(row) for row in output.tolist()]
    if mode == "one_cell":
        assert [[start for start, _ in found] for found in spans] == [[0]] * 16
        assert (output[:, 10:11] == END_ID).all()
    else:
        assert any(spans) == (mode == "free" and budget >= 10)


def test_masks_leave_the_given_scores_alone(model):
    processor = CellSpanLogitsProcessor(CELL, Rule("one_cell"), prompt_length=2, max_new_tokens=10)
    scores = torch.randn(3, 560)
    before = scores.clone()
    masked = processor(torch.full((3, 2), CELL.opener), scores)
    assert torch.equal(scores, before)
    assert (masked > -torch.inf).nonzero().tolist() == [[row, CELL.opener] for row in range(3)]


def test_one_cell_wants_an_end_token_where_there_is_room_for_one():
    CellSpanLogitsProcessor(CELL, Rule("one_cell"), prompt_length=0, max_new_tokens=10)
    with pytest.raises(InputError, match="no end token"):
        CellSpanLogitsProcessor(CELL, Rule("one_cell"), prompt_length=0, max_new_tokens=11)
    with pytest.raises(InputError, match="no mode"):
        CellSpanLogitsProcessor(CELL, Rule("cell"), prompt_length=0, max_new_tokens=11)


@pytest.mark.parametrize("rule", [Rule("n_cells", 2), Rule("choice", choices=(" B", " B cell", " T<|cell|>"))])
def test_outputs_that_the_grammar_ends(model, rule):
    answers = [word_ids(TOKENIZER, text) for text in rule.choices or ()]
    ids_BL, mask_BL = prompts(("a cell:", "T cell <|cell|>", "x") * 5)
    processor = CellSpanLogitsProcessor(
        CELL, rule, prompt_length=ids_BL.shape[1], max_new_tokens=30, stop_ids=END_ID, answers=answers
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        output = model.generate(
            ids_BL,
            attention_mask=mask_BL,
            max_new_tokens=30,
            do_sample=True,
            temperature=3.0,
            top_k=0,
            logits_processor=LogitsProcessorList([Eager(), processor]),
        )
    written = output[:, ids_BL.shape[1] :]
    for row in written.tolist():
        assert is_valid_output(row, rule, CELL, stop_ids=[END_ID, PAD_ID], answers=answers)
        assert END_ID in row
    if rule.choices:
        assert len({tuple(row) for row in written.tolist()}) == 3
        assert (CELL.kinds(written) < 0).all()


@pytest.mark.parametrize("rule", spans.RULES, ids=lambda rule: rule.mode)
def test_masks_are_the_automaton(rule):
    """Covers every string of up to 4 token classes, and 25,000 random walks at every length."""
    allowed = spans.allowed()

    def require(ids, budget):
        processor = CellSpanLogitsProcessor(
            spans.CELL, rule, prompt_length=1, max_new_tokens=budget, stop_ids=spans.END_ID
        )
        prompts = torch.full((len(ids), 1), spans.CELL.opener)
        left = torch.isfinite(processor(torch.cat([prompts, ids], dim=1), torch.zeros(len(ids), spans.ROWS)))
        last = [
            grammar.trace(row, spans.CELL, rule.cells, stop_id=spans.END_ID, max_new_tokens=budget)[-1]
            for row in ids.tolist()
        ]
        assert torch.equal(left, allowed[torch.tensor(last)])

    for length in range(5):
        require(spans.every_string(spans.CELL, length)[1], 40)
    walks = torch.from_numpy(spans.random_walks(rule, 25_000, 24, seed=1)[0])
    for length, rows in enumerate(walks.tensor_split(25)):
        require(rows[:, :length], 30)


# ---- generate_cells ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{}, {"tied": False}, {"use_sliding_window": True, "sliding_window": 8}])
def test_fast_and_generate_take_the_same_codes(settings):
    for seed in range(2):
        model = cell_model(seed=seed, **settings)
        if settings.get("tied") is False:
            bias = torch.randn(560, generator=torch.Generator().manual_seed(seed))
            model.lm_head.bias = torch.nn.Parameter(bias)
        ids_BL, mask_BL = prompts()
        fast, plain = (generate_cells(model, ids_BL, mask_BL, CELL, engine=engine) for engine in ("fast", "generate"))
        assert fast.shape == (3, 8)
        assert fast.dtype == "uint8"
        assert fast.tolist() == plain.tolist()
        # Padding has no effect: each prompt alone gives the same cell.
        for row in range(3):
            alone = ids_BL[row : row + 1, int((mask_BL[row] == 0).sum()) :]
            assert generate_cells(model, alone, None, CELL).tolist() == fast[row : row + 1].tolist()


def test_fast_and_generate_agree_on_absolute_positions():
    """Padding does not shift rotary positions, but it would shift the learned positions of GPT-2."""
    config = GPT2Config(vocab_size=560, n_embd=32, n_layer=2, n_head=2, n_positions=64, initializer_range=0.5)
    config.bos_token_id = config.eos_token_id = END_ID
    for seed in range(2):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = GPT2LMHeadModel(config).eval()
        install_rows(model, CELL, CODEBOOKS, seed=seed)
        fast, plain = (generate_cells(model, *prompts(), CELL, engine=engine) for engine in ("fast", "generate"))
        assert fast.tolist() == plain.tolist()


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_fast_and_generate_draw_from_the_same_distribution(model, monkeypatch, temperature):
    """Both are forced to draw fixed codes; their probabilities must agree at each of the 8 levels."""
    bent = GenerationConfig(do_sample=True, top_k=3, top_p=0.5, min_p=0.3, repetition_penalty=3.0, min_new_tokens=12)
    monkeypatch.setattr(model, "generation_config", bent)
    ids_BL, mask_BL = prompts()
    seen = []

    def draw(logits, given, uniform):
        level = len(seen) - (logits.shape[1] > 32)
        seen.append((logits.double() / given).softmax(1))
        if logits.shape[1] == 32:
            return torch.full((3, 1), 3 * level)
        forced = {-1: CELL.opener, 8: CELL.closer}
        return torch.full((3, 1), forced[level] if level in forced else CELL.code_id(level, 3 * level))

    monkeypatch.setattr(hf, "_drawn", draw)
    codes = generate_cells(model, ids_BL, mask_BL, CELL, temperature=temperature, engine="fast")
    fast, seen = seen, []
    assert (generate_cells(model, ids_BL, mask_BL, CELL, temperature=temperature, engine="generate") == codes).all()
    assert codes.tolist() == [[0, 3, 6, 9, 12, 15, 18, 21]] * 3
    assert model.generation_config is bent
    assert len(fast) == 8
    assert len(seen) == 10
    for level in range(8):
        lo, hi = CELL.level_range(level)
        assert seen[level + 1][:, lo:hi].sum(1).tolist() == pytest.approx([1.0] * 3)
        torch.testing.assert_close(seen[level + 1][:, lo:hi], fast[level], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.0])
def test_draws_follow_the_softmax(temperature):
    """Evenly spread numbers in [0, 1) give each id in proportion to its probability, and never a masked id."""
    logits = 3 * torch.randn(40, generator=torch.Generator().manual_seed(0))
    logits[[0, 7, 8, 39]] = -torch.inf
    n = 100_000
    uniform = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    drawn = torch.cat([hf._drawn(logits.expand(len(u), -1), temperature, u) for u in uniform.split(10_000)])
    count = torch.bincount(drawn.flatten(), minlength=40)
    assert (count - n * (logits.double() / temperature).softmax(0)).abs().max() <= 1 + 1e-6
    assert count[[0, 7, 8, 39]].tolist() == [0] * 4
    ends = torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64)
    assert hf._drawn(logits.expand(2, -1), temperature, ends).flatten().tolist() == [1, 38]


@pytest.mark.parametrize("engine", ["fast", "generate"])
def test_a_row_draws_from_its_own_seed_whatever_the_batch(engine):
    """In float64, logits of other batches differ too little to change a draw; engines also draw alike."""
    model = cell_model().double()
    texts = [f"a cell{'!' * (i % 4)}:" for i in range(24)]
    seeds = [7, 7, *range(22)]
    ids_BL, mask_BL = prompts(texts)
    whole = generate_cells(model, ids_BL, mask_BL, CELL, temperature=1.0, seed=seeds, engine="fast")
    order = torch.randperm(24, generator=torch.Generator().manual_seed(0))
    for rows in (order, order[:5], order[7:8], torch.arange(24)):
        own = [seeds[row] for row in rows.tolist()]
        part = generate_cells(model, ids_BL[rows], mask_BL[rows], CELL, temperature=1.0, seed=own, engine=engine)
        assert part.tolist() == whole[rows.numpy()].tolist()
    few, all_ = (
        generate_cells(model, ids_BL[:n], mask_BL[:n], CELL, temperature=1.0, seed=3, engine=engine) for n in (6, 24)
    )
    assert few.tolist() == all_[:6].tolist()
    assert len({tuple(row) for row in whole.tolist()}) > 20
    with pytest.raises(InputError, match="There are 3 seeds for 24 prompts"):
        generate_cells(model, ids_BL, mask_BL, CELL, seed=[1, 2, 3])


@pytest.mark.parametrize("engine", ["fast", "generate"])
def test_draws_follow_the_seed_and_leave_the_random_state_alone(model, engine):
    ids_BL, mask_BL = prompts(["a cell:"] * 32)
    state = torch.get_rng_state()
    first, again, other = (
        generate_cells(model, ids_BL, mask_BL, CELL, temperature=2.0, seed=seed, engine=engine) for seed in (1, 1, 2)
    )
    assert torch.equal(torch.get_rng_state(), state)
    assert (first == again).all()
    assert (first != other).any()
    assert len({tuple(codes) for codes in first.tolist()}) > 16


def test_a_tiny_temperature_is_greedy(model):
    ids_BL, mask_BL = prompts()
    greedy = generate_cells(model, ids_BL, mask_BL, CELL)
    assert (generate_cells(model, ids_BL, mask_BL, CELL, temperature=1e-30) == greedy).all()


def test_cells_of_the_real_vocabulary(ref_dir):
    tokenizer, vocabulary = qwen_fixture.qwen_tokenizer_with_cells(ref_dir)
    model = qwen_fixture.qwen_model(initializer_range=0.3)
    install_rows(model, vocabulary, CODEBOOKS, seed=0)
    batch = tokenizer(["A CD14 monocyte of blood: ", "B cell "], padding=True, return_tensors="pt")
    arguments = (model, batch["input_ids"], batch["attention_mask"], vocabulary)
    codes = generate_cells(*arguments)
    assert codes.tolist() == generate_cells(*arguments, engine="generate").tolist()
    assert generate_cells(*arguments, temperature=2.0, seed=3).shape == (2, 8)


def test_settings_after_the_output_matrix_go_through_generate(model, monkeypatch):
    ids_BL, mask_BL = prompts()
    expected = generate_cells(model, ids_BL, mask_BL, CELL)
    monkeypatch.setattr(model.config, "final_logit_softcapping", 30.0, raising=False)
    with pytest.raises(InputError, match=r"its final_logit_softcapping is 30\.0"):
        generate_cells(model, ids_BL, mask_BL, CELL, engine="fast")
    assert (generate_cells(model, ids_BL, mask_BL, CELL) == expected).all()

    class Adapter(torch.nn.Linear):
        pass

    monkeypatch.setattr(model.lm_head, "__class__", Adapter)
    with pytest.raises(InputError, match="output layer is a Adapter"):
        generate_cells(model, ids_BL, mask_BL, CELL, engine="fast")


def test_what_cannot_be(model):
    ids_BL, mask_BL = prompts()
    with pytest.raises(InputError, match="Pad prompts on the left"):
        generate_cells(model, ids_BL.flip(1), mask_BL.flip(1), CELL)
    with pytest.raises(InputError, match="not empty"):
        generate_cells(model, ids_BL[:, :0], None, CELL)
    with pytest.raises(InputError, match=r"temperature is -1\.0"):
        generate_cells(model, ids_BL, mask_BL, CELL, temperature=-1.0)
    with pytest.raises(InputError, match="282 rows"):
        generate_cells(qwen_fixture.qwen_model(282), ids_BL, mask_BL, CELL)
