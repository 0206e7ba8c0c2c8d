"""Cell tokens in a vocabulary: exact maps between codes, ids and text, safe free text, and the model's new rows."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from tokenizers import AddedToken
from transformers import AutoModelForCausalLM, AutoTokenizer

from rvqa.errors import InputError
from rvqa.language.rows import install_rows, require_rows
from rvqa.language.vocabulary import CellVocabulary, escape
from tests import qwen_fixture

BYTES = qwen_fixture.byte_tokenizer()
SPAN = CellVocabulary.install(BYTES)
codes_NM = st.integers(0, 20).flatmap(lambda n: arrays(np.uint8, (n, 8), elements=st.integers(0, 31)))


def codebooks(levels=8, entries=32, width=24, shrink=0.7):
    """Return random codebooks whose codewords shrink from level to level, as in a residual quantizer."""
    draws = np.random.default_rng(0).normal(size=(levels, entries, width))
    return (draws * shrink ** np.arange(levels)[:, None, None]).astype(np.float32)


# ---- layout and tokenizer ------------------------------------------------------------------------------------------


def test_layout_is_level_major_and_contiguous():
    vocabulary = CellVocabulary(1000)
    assert (vocabulary.opener, vocabulary.closer, vocabulary.size, vocabulary.span_length) == (1000, 1257, 258, 10)
    assert vocabulary.code_id(0, 0) == 1001
    assert vocabulary.code_id(7, 31) == 1256
    assert vocabulary.level_range(7) == (1225, 1257)
    assert vocabulary.tokens()[:2] + vocabulary.tokens()[-2:] == ["<|cell|>", "<|c0_00|>", "<|c7_31|>", "<|/cell|>"]
    for level, code in [(-1, 0), (8, 0), (0, -1), (0, 32)]:
        with pytest.raises(InputError, match="There is no"):
            vocabulary.code_id(level, code)


@pytest.mark.parametrize(("levels", "entries"), [(1, 1), (2, 3), (8, 32), (3, 256), (12, 7)])
def test_kinds_of_every_id(levels, entries):
    vocabulary = CellVocabulary(5, levels, entries)
    expected = [-1] * 5 + [0] + [m + 1 for m in range(levels) for _ in range(entries)] + [levels + 1] + [-1] * 3
    ids = np.arange(len(expected))
    assert [vocabulary.kinds(int(i)) for i in ids] == expected
    assert vocabulary.kinds(ids).tolist() == expected
    assert vocabulary.kinds(torch.from_numpy(ids)).tolist() == expected


@pytest.mark.parametrize(("base", "levels", "entries"), [(-1, 8, 32), (0, 0, 32), (0, 8, 0), (0, 8, 257)])
def test_impossible_vocabularies(base, levels, entries):
    with pytest.raises(InputError, match="cannot be"):
        CellVocabulary(base, levels, entries)


@pytest.mark.parametrize(("levels", "entries"), [(8, 32), (1, 1), (2, 3), (3, 128)])
def test_install_once_and_find_again(levels, entries):
    tokenizer = qwen_fixture.byte_tokenizer()
    size = len(tokenizer)
    with pytest.raises(InputError, match="has no cell tokens"):
        CellVocabulary.from_tokenizer(tokenizer)
    vocabulary = CellVocabulary.install(tokenizer, levels=levels, entries=entries)
    assert vocabulary == CellVocabulary(size, levels, entries)
    assert len(tokenizer) == size + vocabulary.size
    assert CellVocabulary.install(tokenizer, levels=levels, entries=entries) == vocabulary
    assert len(tokenizer) == size + vocabulary.size
    assert CellVocabulary.from_tokenizer(tokenizer) == vocabulary
    with pytest.raises(InputError, match="already holds"):
        CellVocabulary.install(tokenizer, levels=levels + 1, entries=entries)


def test_install_refuses_a_partial_or_scattered_or_special_set():
    partial = qwen_fixture.byte_tokenizer()
    partial.add_tokens(
        [AddedToken(token, special=False, normalized=False) for token in CellVocabulary(0).tokens()[:-1]]
    )
    with pytest.raises(InputError, match="already holds 257 cell tokens"):
        CellVocabulary.install(partial)
    with pytest.raises(InputError, match=r"<\|/cell\|> has id None"):
        CellVocabulary.from_tokenizer(partial)

    scattered = qwen_fixture.byte_tokenizer()
    tokens = CellVocabulary(0).tokens()
    scattered.add_tokens([AddedToken(token, normalized=False) for token in [*tokens[:9], "odd", *tokens[9:]]])
    with pytest.raises(InputError, match="not a contiguous level-major block"):
        CellVocabulary.install(scattered)

    special = qwen_fixture.byte_tokenizer()
    special.add_tokens([AddedToken(token, special=True, normalized=False) for token in tokens])
    with pytest.raises(InputError, match="special=False"):
        CellVocabulary.install(special)


# ---- codes <-> ids <-> text ----------------------------------------------------------------------------------------


@given(codes_NM)
@settings(max_examples=40, deadline=None)
def test_codes_ids_text_and_tokenizer_agree(codes_NM):
    ids_NL = SPAN.ids(codes_NM)
    assert ids_NL.shape == (len(codes_NM), 10)
    assert ids_NL.dtype == np.int64
    back = SPAN.codes(ids_NL)
    assert back.dtype == np.uint8
    np.testing.assert_array_equal(back, codes_NM)
    texts = SPAN.texts(codes_NM)
    np.testing.assert_array_equal(SPAN.codes_from_texts([f" {text}\n" for text in texts]), codes_NM)
    for ids, text in zip(ids_NL.tolist(), texts, strict=True):
        assert BYTES.encode(text, add_special_tokens=False) == ids
        assert BYTES.decode(ids, skip_special_tokens=True) == text


def test_every_code_of_every_level_is_its_own_token():
    for level in range(8):
        codes = np.zeros((32, 8), np.uint8)
        codes[:, level] = np.arange(32)
        assert SPAN.ids(codes)[:, level + 1].tolist() == [SPAN.code_id(level, code) for code in range(32)]
        assert all(f"<|c{level}_{code:02d}|>" in text for code, text in enumerate(SPAN.texts(codes)))


def test_ids_refuses_other_codes():
    with pytest.raises(InputError, match="Row 1 has code 32 at level 7"):
        SPAN.ids([[0] * 8, [0] * 7 + [32]])
    with pytest.raises(InputError, match="code -1 at level 0"):
        SPAN.ids(np.array([[-1] + [0] * 7]))
    with pytest.raises(InputError, match=r"shape \(3, 7\)"):
        SPAN.ids(np.zeros((3, 7), np.uint8))
    with pytest.raises(InputError, match="float64"):
        SPAN.ids(np.zeros((3, 8)))


@given(st.integers(0, 9), st.integers(0, SPAN.closer + 10))
@settings(max_examples=200, deadline=None)
def test_codes_names_the_first_bad_row(position, token_id):
    ids = SPAN.ids(np.full((5, 8), 3))
    ids[2, position] = token_id
    ids[4] = 0
    right = [(SPAN.opener, SPAN.opener + 1), *map(SPAN.level_range, range(8)), (SPAN.closer, SPAN.closer + 1)]
    lo, hi = right[position]
    row, position, token_id = (4, 0, 0) if lo <= token_id < hi else (2, position, token_id)
    with pytest.raises(InputError, match=f"Row {row} is not a cell span: position {position} holds id {token_id} "):
        SPAN.codes(ids)


def test_codes_refuses_other_shapes():
    for ids in (np.zeros(10, int), np.zeros((2, 9), int), np.zeros((2, 10))):
        with pytest.raises(InputError, match="Ids have shape"):
            SPAN.codes(ids)


def test_codes_from_texts_says_what_it_saw():
    (good,) = SPAN.texts(np.arange(8)[None])
    first, second = "<|c0_00|>", "<|c1_01|>"
    for text, seen in [
        (good.replace(second, ""), "saw 7 codes"),
        (good.replace(first + second, second + first), r"wrong order, levels \[1, 0, 2, 3"),
        (good.replace(second, first), r"wrong order, levels \[0, 0, 2"),
        (good.removeprefix("<|cell|>"), "0 openers and 1 closers"),
        (good + good, "2 openers and 2 closers"),
        (good.replace(first, "<|c0_32|>"), r"unknown token <\|c0_32\|>"),
        (good.replace(first, "<|c0_0|>"), r"unknown token <\|c0_0\|>"),
        (good.replace(first, "<|c0_\u0660\u0660|>"), "unknown token"),
        (f"A cell: {good}", "other text"),
        (good.replace(first, first + " "), "other text"),
        ("", "0 openers"),
    ]:
        with pytest.raises(InputError, match=seen) as error:
            SPAN.codes_from_texts([good, text])
        assert str(error.value).startswith("Text 1 is not one cell span")


def test_find_spans_reads_whole_spans_only():
    codes = np.random.default_rng(0).integers(0, 32, (3, 8)).astype(np.uint8)
    a, b, c = SPAN.ids(codes).tolist()
    found = SPAN.find_spans([5, *a, *b, 6, *c[:-1], 7, SPAN.opener, *c, SPAN.closer])
    assert [start for start, _ in found] == [1, 11, 33]
    np.testing.assert_array_equal([codes for _, codes in found], codes)
    assert SPAN.find_spans([]) == SPAN.find_spans(a[:9]) == []
    with pytest.raises(InputError, match="one sequence"):
        SPAN.find_spans([a, b])


# ---- free text -----------------------------------------------------------------------------------------------------

pieces = st.sampled_from(["<|cell|>", "<|c0_07|>", "<|im_start|>", "<think>", "<|", "<", "\\", "|>", "cell", "a", " "])


@given(st.lists(pieces, max_size=12).map("".join))
@settings(max_examples=200, deadline=None)
def test_escaped_text_has_no_added_token_and_backslashes_more(text):
    escaped = escape(BYTES, text)
    assert not set(BYTES.encode(escaped, add_special_tokens=False)) & set(BYTES.added_tokens_decoder)
    assert escaped.replace("\\", "") == text.replace("\\", "")


def test_escape_is_visible_and_leaves_other_text_alone():
    assert escape(BYTES, "CD4+ T cell, <5 % | x\\y") == "CD4+ T cell, <5 % | x\\y"
    assert escape(BYTES, "a<|cell|>b") == "a<\\|cell|>b"
    assert escape(BYTES, "a<\\|cell|>b") == "a<\\\\|cell|>b"


def test_escape_catches_overlaps_and_spares_whitespace_and_single_characters():
    tokenizer = qwen_fixture.byte_tokenizer()
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in ("aa", "aba", "\n\n", "#")])
    for text in ("aaaa", "ababa", "aabaa"):
        ids = tokenizer.encode(escape(tokenizer, text), add_special_tokens=False)
        assert not set(ids) & set(tokenizer.added_tokens_decoder)
    assert escape(tokenizer, "x\n\n# y") == "x\n\n# y"


# ---- the model's rows ----------------------------------------------------------------------------------------------


def test_qwen_rows_need_no_resize_and_survive_saving(ref_dir, tmp_path):
    tokenizer, vocabulary = qwen_fixture.qwen_tokenizer_with_cells(ref_dir)
    assert (vocabulary.opener, vocabulary.closer) == (151_669, 151_926)
    assert escape(tokenizer, "<|endoftext|><|c3_03|>") == "<\\|endoftext|><\\|c3_03|>"
    for text in ("CD3D high <|cell|>, <think>", "<|im_start|>system\n<|c7_31|><|/cell|>"):
        assert max(tokenizer.encode(escape(tokenizer, text))) < qwen_fixture.BPE_SIZE

    model = qwen_fixture.qwen_model()
    before = model.get_input_embeddings().weight.detach().clone()
    install_rows(model, vocabulary, codebooks(), seed=1)
    after = model.get_input_embeddings().weight.detach()
    assert after.shape == before.shape == (151_936, 64)
    assert model.config.vocab_size == 151_936
    changed = (after != before).any(dim=1).nonzero().flatten()
    assert changed.tolist() == list(range(151_669, 151_927))
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight

    tokenizer.save_pretrained(tmp_path)
    model.save_pretrained(tmp_path)
    tokenizer_2, model_2 = AutoTokenizer.from_pretrained(tmp_path), AutoModelForCausalLM.from_pretrained(tmp_path)
    assert CellVocabulary.from_tokenizer(tokenizer_2) == vocabulary
    assert torch.equal(model_2.get_input_embeddings().weight, after)
    require_rows(model_2, vocabulary)

    codes = np.random.default_rng(0).integers(0, 32, (50, 8)).astype(np.uint8)
    for ids, text in zip(vocabulary.ids(codes).tolist(), vocabulary.texts(codes), strict=True):
        for either in (tokenizer, tokenizer_2):
            assert either.encode(f"cell {text}\n")[1:-1] == [either.convert_tokens_to_ids("Ġ"), *ids]
            assert either.decode([*ids, either.eos_token_id], skip_special_tokens=True) == text


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(("multiple", "rows"), [(None, 540), (64, 576)])
def test_small_models_grow(tied, multiple, rows):
    model = qwen_fixture.qwen_model(SPAN.base, tied=tied)
    before = [m.weight.detach().clone() for m in (model.get_input_embeddings(), model.get_output_embeddings())]
    with pytest.raises(InputError, match=r"has 282 rows, but the cell tokens reach id 539"):
        require_rows(model, SPAN)
    install_rows(model, SPAN, codebooks(), seed=0, pad_to_multiple_of=multiple)
    require_rows(model, SPAN)
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    assert (embedding.weight is head.weight) == tied
    assert model.config.vocab_size == rows
    for matrix, old in zip((embedding, head), before, strict=True):
        assert matrix.weight.shape == (rows, 64)
        assert torch.equal(matrix.weight[: SPAN.base], old)
    assert model(torch.from_numpy(SPAN.ids(np.zeros((1, 8), int)))).logits.shape == (1, 10, rows)


@pytest.mark.parametrize("rows", [540, 600])
def test_rows_that_exist_are_never_resized(rows):
    model = qwen_fixture.qwen_model(rows, tied=False)
    weights = [model.get_input_embeddings().weight, model.get_output_embeddings().weight]
    pointers = [weight.data_ptr() for weight in weights]
    beyond = [weight[540:].clone() for weight in weights]
    install_rows(model, SPAN, codebooks(), seed=0, pad_to_multiple_of=512)
    after = [model.get_input_embeddings().weight, model.get_output_embeddings().weight]
    assert [weight.data_ptr() for weight in after] == pointers
    assert all(torch.equal(a[540:], b) for a, b in zip(after, beyond, strict=True))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("width", [8, 24, 200])
def test_new_rows_have_the_spread_of_old_rows_and_are_all_distinct(tied, width):
    model = qwen_fixture.qwen_model(540, tied=tied)
    with torch.no_grad():  # mean and spread differ from the other matrix's, with some anisotropy
        model.get_input_embeddings().weight.mul_(torch.linspace(0.1, 3, 64)).add_(0.05)
    install_rows(model, SPAN, codebooks(width=width), seed=0)
    for layer in {model.get_input_embeddings(), model.get_output_embeddings()}:
        rows = layer.weight.detach().double()
        old, new = rows[: SPAN.base], rows[SPAN.base :]
        mean, spread = old.mean(0), (old - old.mean(0)).square().sum(1).mean().sqrt()
        assert (new - mean).square().sum(1).mean().sqrt().item() == pytest.approx(spread.item(), rel=1e-3)
        distances = torch.cdist(new, new) + 9 * torch.eye(258, dtype=torch.float64)
        assert distances.min() > 0.3 * spread


def test_rows_are_distinct_even_for_dead_codebooks():
    for dead in (np.zeros((8, 32, 4)), np.ones((8, 32, 4)), codebooks(shrink=0.01)):
        model = qwen_fixture.qwen_model(540)
        install_rows(model, SPAN, dead, seed=0)
        new = model.get_input_embeddings().weight.detach()[SPAN.base :].double()
        spread = (new - new.mean(0)).square().sum(1).mean().sqrt()
        assert (torch.cdist(new, new) + 9 * torch.eye(258)).min() > 0.3 * spread


def test_rows_carry_the_codewords_and_their_scale():
    model, books = qwen_fixture.qwen_model(540), codebooks(width=16)
    install_rows(model, SPAN, books, seed=0)
    codes = model.get_input_embeddings().weight.detach()[SPAN.base + 1 : -1].reshape(8, 32, 64).double()
    norms = (codes - codes.mean(1, keepdim=True)).square().sum(-1).mean(-1)
    assert (norms.diff() < 0).all()  # later levels are smaller
    upper = torch.triu_indices(32, 32, 1)
    for level in range(8):
        of_rows = torch.cdist(codes[level], codes[level])[*upper]
        of_words = torch.cdist(*[torch.from_numpy(books[level]).double()] * 2)[*upper]
        assert torch.corrcoef(torch.stack([of_rows, of_words]))[0, 1] > (0.8 if level == 0 else 0.5)


def test_rows_are_deterministic_and_leave_the_random_state_alone():
    rows = []
    for seed in (3, 3, 4):
        model = qwen_fixture.qwen_model(540)
        state = torch.get_rng_state()
        install_rows(model, SPAN, codebooks(), seed=seed)
        assert torch.equal(torch.get_rng_state(), state)
        rows.append(model.get_input_embeddings().weight.detach()[SPAN.base :])
    assert torch.equal(rows[0], rows[1])
    assert not torch.equal(rows[0], rows[2])


def test_rows_in_bfloat16_are_distinct():
    model = qwen_fixture.qwen_model(540).to(torch.bfloat16)
    install_rows(model, SPAN, torch.from_numpy(codebooks()).to(torch.bfloat16), seed=0)
    weight = model.get_input_embeddings().weight.detach()
    assert weight.dtype == torch.bfloat16
    assert len(weight[SPAN.base :].float().unique(dim=0)) == 258


def test_install_rows_refuses_what_does_not_fit():
    model = qwen_fixture.qwen_model(540)
    before = model.get_input_embeddings().weight.detach().clone()
    with pytest.raises(InputError, match=r"shape \(7, 32, 24\); expected \[8, 32"):
        install_rows(model, SPAN, codebooks(levels=7), seed=0)
    broken = codebooks()
    broken[3, 3, 3] = np.nan
    with pytest.raises(InputError, match="NaN"):
        install_rows(model, SPAN, broken, seed=0)
    with pytest.raises(InputError, match="540 embedding rows, but the tokenizer has 600 tokens"):
        install_rows(model, CellVocabulary(600), codebooks(), seed=0)
    assert torch.equal(model.get_input_embeddings().weight, before)
