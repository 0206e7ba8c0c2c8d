"""Engines: replies kept in a file, an engine that stops, and a server that is slow, broken or of another kind."""

import copy
import json
import sqlite3
import threading
import warnings
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest

import rvqa
from rvqa.errors import EngineError, InputError, InputWarning
from rvqa.language.grammar import Rule, is_valid_output
from rvqa.perturbation import perturbed_codes
from rvqa.serving.asks import Ask
from rvqa.serving.client import Client
from rvqa.serving.engines import open_engine
from rvqa.serving.hf import HuggingFace
from rvqa.serving.offline import Offline
from rvqa.serving.replies import gather


@pytest.fixture
def cells(shipped):
    return next(iter(shipped.tests.values()))[:40].copy()


def annotated(cells, model, **settings):
    target = cells.copy()
    rvqa.annotate(target, model, library_size_key="depth", progress=False, **settings)
    return target.obsm["rvqa_probabilities"]


class Stops:
    """The model in this process, which stops after some replies."""

    def __init__(self, model, after):
        self.inner, self.after, self.asked = HuggingFace(model, batch_size=8), after, 0

    def replies(self, asks):
        self.asked += len(asks)
        for i, reply in enumerate(self.inner.replies(asks)):
            if i == self.after:
                raise EngineError("The engine is gone.")
            yield reply


# ---- replies that are kept -----------------------------------------------------------------------------------------


def test_an_engine_that_stops_loses_nothing(cells, model, tmp_path):
    kept = tmp_path / "replies"
    expected = annotated(cells, model)
    with pytest.raises(
        EngineError, match=r"is gone\. 17 of 40 replies had come; they are kept in .*goes on from there"
    ):
        annotated(cells, model, engine=Stops(model, 17), resume=kept)
    again = Stops(model, 99)
    np.testing.assert_allclose(annotated(cells, model, engine=again, resume=kept), expected, atol=1e-6)
    assert again.asked == 40 - 17
    third = Stops(model, 0)
    np.testing.assert_allclose(annotated(cells, model, engine=third, resume=kept), expected, atol=1e-6)
    assert third.asked == 0
    with pytest.raises(EngineError, match=r"3 of 40 replies had come; pass resume=FILE"):
        annotated(cells, model, engine=Stops(model, 3))


def test_other_questions_are_not_answered_from_the_file(cells, model, tmp_path):
    kept = tmp_path / "replies"
    annotated(cells, model, resume=kept)
    asked = Stops(model, 99)
    annotated(cells, model, engine=asked, resume=kept, labels=model.card.labels[:2])
    assert asked.asked == 40
    codes = rvqa.encode(cells, model, library_size_key="depth", copy=True).obsm["rvqa_codes"]
    types = np.array([model.card.labels[0]] * 40)
    drawn = [
        perturbed_codes(model, codes, types, model.card.perturbations[0], 1.0, seed, resume=kept) for seed in (1, 1, 2)
    ]
    np.testing.assert_array_equal(drawn[0], drawn[1])
    assert (drawn[0] != drawn[2]).any()


def test_files_that_keep_no_replies_of_this_model(cells, model, tmp_path):
    (tmp_path / "text").write_text("no database at all, but some text that is long enough to be read as one")
    (tmp_path / "other").touch()
    with sqlite3.connect(tmp_path / "other") as file:
        file.execute("CREATE TABLE about (model TEXT)")
        file.execute("INSERT INTO about VALUES ('another')")
    for name, match in [
        ("text", "cannot be used for replies .*not a database"),
        ("other", "of another model"),
        ("", "is a directory"),
        ("a/b", "a/b"),
    ]:
        with pytest.raises(InputError, match=match):
            annotated(cells, model, resume=tmp_path / name)
    assert (tmp_path / "text").read_text().startswith("no database")


def test_engines_by_name(model):
    assert isinstance(open_engine(model, "hf"), HuggingFace)
    engine = HuggingFace(model)
    assert open_engine(model, engine) is engine
    with pytest.raises(InputError, match=r"no engine 'tpu'; expected hf, vllm, or a server's address"):
        open_engine(model, "tpu")
    with pytest.raises(InputError, match=r"this model has none\. Save it"):
        Offline(replace(model, source=""))
    with pytest.raises(InputError, match="was loaded without weights"):
        open_engine(replace(model, network=None), "hf")


def test_outputs_of_every_rule(model):
    """One call has mixed asks: each output is whole under its own rule, at any temperature."""
    prompt = tuple(model.prompts.ids("Cell type: {label}.", label="B")[0].tolist())
    rules = [
        Rule("free"),
        Rule("text"),
        Rule("one_cell"),
        Rule("n_cells", 2),
        Rule("choice", choices=(" B", " T cell")),
    ]
    asks = [
        Ask(prompt[: len(prompt) - i % 3], rule=rules[i % 5], max_tokens=30, temperature=2.0, seed=i) for i in range(30)
    ]
    for ask, reply in zip(asks, gather(model, HuggingFace(model), asks), strict=True):
        answers = [model.text_tokenizer.encode(text, add_special_tokens=False) for text in ask.rule.choices or ()]
        assert is_valid_output(reply.ids, ask.rule, model.vocabulary, stop_ids=[model.prompts.end], answers=answers)


@pytest.mark.parametrize("rule", [Rule("one_cell"), Rule("free")], ids=lambda rule: rule.mode)
def test_an_ask_draws_from_its_own_seed_whatever_else_is_asked(model, rule):
    """Order, batches and other asks do not change an output, and a stopped run continues the same way.

    In float64 the logits of other batches differ too little to change a draw.
    """
    exact = replace(model, network=copy.deepcopy(model.network).double())
    prompt = tuple(model.prompts.ids("Cell type: {label}.", label="B")[0].tolist())
    asks = [
        Ask(prompt[: len(prompt) - i % 3], rule=rule, max_tokens=12, temperature=1.0 + i % 2, seed=i // 2 - 3)
        for i in range(24)
    ]
    whole = gather(exact, HuggingFace(exact), asks)
    assert len({tuple(reply.ids) for reply in whole}) > 12
    order = np.random.default_rng(0).permutation(24).tolist()
    for size, chosen in ((256, order), (5, order), (1, order[:4]), (7, order[5:])):
        replies = gather(exact, HuggingFace(exact, batch_size=size), [asks[i] for i in chosen])
        assert [reply.ids for reply in replies] == [whole[i].ids for i in chosen]


def test_evidence_is_kept_and_scored(cells, model):
    target = cells[:5].copy()
    rvqa.annotate(target, model, library_size_key="depth", reasoning=6, progress=False)
    assert target.obs["rvqa_reasoning"].map(type).eq(str).all()
    np.testing.assert_allclose(target.obsm["rvqa_probabilities"].sum(1), 1, atol=1e-5)
    with pytest.raises(InputError, match="reasoning is -1"):
        rvqa.annotate(target, model, reasoning=-1)


# ---- over HTTP -----------------------------------------------------------------------------------------------------


class Server(ThreadingHTTPServer):
    """Speaks the client's part of vLLM's protocol for the model in this process; it fails on request."""

    daemon_threads = True

    def __init__(self, model):
        super().__init__(("127.0.0.1", 0), Handler)
        self.model, self.engine, self.lock = model, HuggingFace(model), threading.Lock()
        self.address = f"http://127.0.0.1:{self.server_address[1]}"
        self.names, self.failures, self.ignores_grammar, self.seen = ["m"], [], False, []
        threading.Thread(target=self.serve_forever, daemon=True).start()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments):
        pass

    def do_GET(self):
        self.send({"data": [{"id": name} for name in self.server.names]})

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        server = self.server
        with server.lock:
            server.seen.append((self.path, body, self.headers.get("Authorization")))
            failure = server.failures.pop(0) if server.failures and self.path != "/tokenize" else None
        if failure == "hang up":
            self.connection.close()
            self.close_connection = True
        elif failure is not None:
            self.send({"error": "not now"}, failure)
        elif self.path == "/tokenize":
            self.send({"tokens": server.model.text_tokenizer.encode(body["prompt"], add_special_tokens=False)})
        else:
            self.send({"choices": [self.choice(i, prompt, body) for i, prompt in enumerate(body["prompt"])]})

    def choice(self, i, prompt, body):
        server = self.server
        with server.lock:
            if "prompt_logprobs" in body:
                places = [None]
                for at in range(1, len(prompt)):
                    ((_, reply),) = server.engine.replies([Ask(tuple(prompt[:at]), answers=((prompt[at],),))])
                    places.append({str(prompt[at]): {"logprob": reply.scores[0]}})
                return {"index": i, "prompt_logprobs": places}
            rule = Rule("text") if server.ignores_grammar else Rule.from_options(body["vllm_xargs"])
            ask = Ask(tuple(prompt), rule=rule, max_tokens=body["max_tokens"], temperature=body["temperature"])
            ((_, reply),) = server.engine.replies([ask])
            return {"index": i, "token_ids": reply.ids}

    def answer(self, value, status=200):
        self.rfile.read(int(self.headers["Content-Length"]))
        self.send(value, status)

    def send(self, value, status=200):
        data = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


@pytest.fixture
def server(model):
    made = Server(model)
    yield made
    made.shutdown()
    made.server_close()


def test_labels_over_http_and_failures_on_the_way(cells, model, server):
    few = cells[:4].copy()
    expected = annotated(few, model)
    server.failures = [503, "hang up", 429, 500]
    np.testing.assert_allclose(annotated(few, model, engine=server.address + "/v1/"), expected, atol=1e-5)
    assert not server.failures


def test_perturbed_codes_over_http(cells, model, server):
    codes = rvqa.encode(cells[:6], model, library_size_key="depth", copy=True).obsm["rvqa_codes"]
    arguments = (model, codes, np.array([model.card.labels[0]] * 6), model.card.perturbations[0], 0.0, 0)
    np.testing.assert_array_equal(perturbed_codes(*arguments, engine=server.address), perturbed_codes(*arguments))
    server.ignores_grammar = True
    with pytest.raises(EngineError, match=r"is not one cell. Start the server with --logits-processors rvqa\.serving"):
        perturbed_codes(*arguments, engine=server.address)


def test_a_refusal_is_told_at_once_and_patience_ends(cells, model, server):
    client = Client(model, server.address, patience=0.6)
    server.failures = [400]
    with pytest.raises(EngineError, match=r"answered 400: .*not now.* 0 of 1 replies had come"):
        gather(model, client, [Ask((1, 2), answers=((3,),))])
    server.failures = [503] * 50
    with pytest.raises(EngineError, match="answered 503"):
        gather(model, client, [Ask((1, 2), answers=((3,),))])
    assert 40 < len(server.failures) < 50


def test_which_model_and_whose_tokens(model, server, monkeypatch):
    monkeypatch.setenv("RVQA_API_KEY", "secret")
    Client(model, server.address)
    assert server.seen[-1][2] == "Bearer secret"
    server.names = ["a", "b"]
    with pytest.raises(InputError, match="serves a, b; none of them is"):
        Client(model, server.address)
    server.names = ["a", model.source]
    assert Client(model, server.address).name == model.source
    server.names = [model.source, model.source]  # served under two names
    assert Client(model, server.address).name == model.source
    with pytest.raises(InputError, match="does not answer"):
        Client(model, "http://127.0.0.1:9")
    from rvqa.language.vocabulary import CellVocabulary

    with pytest.raises(InputError, match="reads the cell tokens as other ids"):
        Client(replace(model, vocabulary=CellVocabulary(model.vocabulary.base + 1)), server.address)


def test_a_gateway_without_tokenize_is_said(model, server, monkeypatch):
    monkeypatch.setattr(Handler, "do_POST", lambda self: self.answer({"error": "no such path"}, 404))
    with pytest.warns(InputWarning, match=r"has no /tokenize"):
        Client(model, server.address)


def test_what_is_no_vllm(model, server, monkeypatch):
    monkeypatch.setattr(Handler, "choice", lambda self, i, prompt, body: {"index": i, "text": "hello"})
    client = Client(model, server.address)
    with pytest.raises(EngineError, match="sent no token_ids"):
        gather(model, client, [Ask((1, 2), rule=Rule("one_cell"), max_tokens=11)])
    monkeypatch.setattr(Handler, "choice", lambda self, i, prompt, body: {"index": i, "prompt_logprobs": None})
    with pytest.raises(EngineError, match="sent no prompt_logprobs"):
        gather(model, client, [Ask((1, 2), answers=((3,),))])


def test_addresses_keys_and_temperatures_that_cannot_be(model, server, monkeypatch):
    for address in ("http://host:abc", "http://"):
        with pytest.raises(InputError, match=r"cannot be used|does not answer"):
            open_engine(model, address)
    with pytest.raises(InputError, match=r"vLLM takes 0 to 2. Use engine=\"hf\""):
        gather(model, Client(model, server.address), [Ask((1,), rule=Rule("one_cell"), max_tokens=11, temperature=3.0)])
    monkeypatch.setenv("RVQA_API_KEY", "schl\u00fcssel")
    with pytest.raises(InputError, match="RVQA_API_KEY cannot be used"):
        Client(model, server.address)


def test_replies_that_are_no_objects(model, server, monkeypatch):
    client = Client(model, server.address)
    for value in ([], {}, {"choices": 5}, {"choices": [{}]}, {"choices": []}, None):
        monkeypatch.setattr(Handler, "do_POST", lambda self, value=value: self.answer(value))
        with pytest.raises(EngineError, match="s it vLLM"):
            gather(model, client, [Ask((1, 2), rule=Rule("one_cell"), max_tokens=11)])
    monkeypatch.setattr(Handler, "do_GET", lambda self: self.send([]))
    with pytest.raises(InputError, match=r"/v1/models holds a list; expected an object"):
        Client(model, server.address)


def test_a_database_of_something_else(cells, model, tmp_path):
    kept = tmp_path / "replies"
    annotated(cells, model, resume=kept)
    with sqlite3.connect(kept) as other:
        other.execute("DROP TABLE replies")
        other.execute("CREATE TABLE replies (something TEXT)")
    with pytest.raises(InputError, match="is a database of something else"):
        annotated(cells, model, resume=kept)


def test_seeds_of_numpy(cells, model):
    codes = rvqa.encode(cells[:4], model, library_size_key="depth", copy=True).obsm["rvqa_codes"]
    arguments = (model, codes, np.array([model.card.labels[0]] * 4), model.card.perturbations[0], 1.0)
    np.testing.assert_array_equal(perturbed_codes(*arguments, np.int64(5)), perturbed_codes(*arguments, 5))


def test_draws_go_out_alone_and_alike_asks_together(model, server):
    prompt = tuple(model.prompts.ids("Cell type: {label}.", label="B")[0].tolist())
    client = Client(model, server.address)
    rule = Rule("one_cell")
    for temperature, calls in ((0.0, 1), (1.0, 5)):
        server.seen.clear()
        asks = [Ask(prompt, rule=rule, max_tokens=11, temperature=temperature, seed=i) for i in range(5)]
        replies = gather(model, client, asks)
        assert len(server.seen) == calls
        assert all(is_valid_output(reply.ids, rule, model.vocabulary) for reply in replies)
    assert sorted(body["seed"] for _, body, _ in server.seen) == [0, 1, 2, 3, 4]


def test_no_warning_where_all_is_well(model, server):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Client(model, server.address)
