"""A hostile server: whatever it sends or withholds, a call ends in time with one sentence and bounded memory.
Credentials (token, password) go only to its address and are never shown."""

import itertools
import json
import logging
import os
import random
import re
import signal
import socket
import sqlite3
import struct
import subprocess
import sys
import threading
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import anndata
import numpy as np
import pytest

import rvqa
from rvqa.errors import EngineError, InputError
from rvqa.language.grammar import Rule, is_valid_output
from rvqa.serving.asks import Ask, is_log_probability
from rvqa.serving.client import Client
from rvqa.serving.engines import open_engine
from rvqa.serving.replies import gather
from tests.attacks.cases import mutated, survive
from tests.attacks.servers import Loopback, annotates, completion, places, response

TOKEN = "t0ken-of-this-test"
SCORES = Ask((5, 6, 7), answers=((8,), (9, 10)))
CELL = Ask((5, 6), rule=Rule("one_cell"), max_tokens=11)


@pytest.fixture(autouse=True)
def token(monkeypatch):
    monkeypatch.setenv("RVQA_API_KEY", TOKEN)


def in_time(act):
    """Return the result of a call that must end by itself; the limit is many times what it needs."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(act).result(timeout=40)


def refusal(model, act, ask=SCORES, **settings):
    """Return the client's error if a server answers with `act`."""
    with Loopback(act, model.vocabulary) as server:
        client = Client(model, server.address, **{"timeout": 1.0, "patience": 0.0} | settings)
        with pytest.raises(EngineError) as failed:
            in_time(lambda: gather(model, client, [ask]))
    said = str(failed.value)
    assert "\n" not in said
    assert len(said) < 800
    assert TOKEN not in said
    assert said.isprintable()
    return said


# ---- what holds a client, and what fills its memory ----------------------------------------------------------------


def drip(parts, every=0.05):
    """Send a few bytes at a time, for ever."""

    def act(connection, body):
        for part in parts():
            connection.sendall(part)
            time.sleep(every)

    return act


def flood(start, part):
    """Send the same bytes for ever, as fast as the client takes them."""

    def act(connection, body):
        connection.sendall(start)
        while True:
            connection.sendall(part * (65536 // len(part)))

    return act


def once(data):
    def act(connection, body):
        connection.sendall(data)

    return act


OK = b"HTTP/1.1 200 OK\r\n"

HOLDING = {
    "no answer": lambda connection, body: threading.Event().wait(30),
    "a status line in drips": drip(lambda: itertools.repeat(b"H")),
    "headers in drips": drip(lambda: itertools.chain([OK + b"a: "], itertools.repeat(b"b"))),
    "a body in drips": drip(lambda: itertools.chain([OK + b"Content-Length: 9000\r\n\r\n"], itertools.repeat(b" "))),
    "chunks in drips": drip(
        lambda: itertools.chain([OK + b"Transfer-Encoding: chunked\r\n\r\n"], itertools.repeat(b"1\r\n \r\n"))
    ),
    "an extension of a chunk in drips": drip(
        lambda: itertools.chain([OK + b"Transfer-Encoding: chunked\r\n\r\n1;"], itertools.repeat(b"x"))
    ),
    "100 Continue for ever": flood(b"", b"HTTP/1.1 100 Continue\r\n\r\n"),
    "trailers for ever": flood(OK + b"Transfer-Encoding: chunked\r\n\r\n1\r\n{\r\n0\r\n", b"a: b\r\n"),
}


@pytest.mark.parametrize("how", HOLDING)
def test_a_server_that_holds_on(model, how):
    assert "sent no whole answer within 1 seconds" in refusal(model, HOLDING[how])


def test_a_server_that_reads_nothing(model):
    """The request is larger than the buffers of the system."""
    with Loopback(annotates, model.vocabulary) as server:
        client = Client(model, server.address, timeout=1.0, patience=0.0)
        deaf = socket.create_server(("127.0.0.1", 0))
        client.server.url = client.server.url._replace(netloc=f"127.0.0.1:{deaf.getsockname()[1]}")
        with deaf, pytest.raises(EngineError, match="no whole answer within 1 seconds"):
            in_time(lambda: gather(model, client, [Ask(tuple(range(4_000_000)), answers=((1,),))]))


ENDLESS = {
    "a body without end": (OK + b"\r\n", b" "),
    "a body as long as it says": (OK + b"Content-Length: 99999999999999\r\n\r\n", b" "),
    "chunks without end": (OK + b"Transfer-Encoding: chunked\r\n\r\n", b"4\r\n    \r\n"),
    "an error without end": (b"HTTP/1.1 400 Bad Request\r\n\r\n", b"no "),
    "a status line without end": (b"", b"HTTP"),
    "headers without end": (OK, b"a: b\r\n"),
    "a header without end": (OK + b"a: ", b"b"),
}


@pytest.mark.parametrize("how", ENDLESS)
def test_what_is_endless_is_not_read_to_its_end(model, how):
    start, part = ENDLESS[how]
    taken = []

    def act(connection, body):
        connection.sendall(start)
        while True:
            connection.sendall(part * (65536 // len(part)))
            taken.append(65536)

    said = refusal(model, act, timeout=60.0)
    assert "more than" in said or "does not answer" in said or "answered 400: no no no" in said
    assert sum(taken) < 16 * 2**20  # most of it is in buffers of the system


def test_a_gzip_bomb_is_not_unpacked(model):
    bomb = zlib.compressobj(9, wbits=31)
    data = b"".join(bomb.compress(bytes(2**20)) for _ in range(64)) + bomb.flush()
    act = once(response(data, "200 OK", "Content-Encoding: gzip"))
    assert "in the encoding 'gzip'; expected it as it is" in refusal(model, act)


def test_a_call_says_that_bodies_come_as_they_are_and_what_it_carries(model):
    with Loopback(annotates, model.vocabulary) as server:
        gather(model, Client(model, server.address), [SCORES])
        head = server.seen[-1]
        assert "Accept-Encoding: identity\r\n" in head
        assert f"Authorization: Bearer {TOKEN}\r\n" in head
        assert head.count("Host: ") == 1


# ---- what is no answer ---------------------------------------------------------------------------------------------


def reset(connection, body):
    connection.sendall(OK + b"Content-Length: 5000\r\n\r\n{")
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def echoes(connection, body):
    connection.sendall(response(f"you came with {TOKEN}\x1b[31m\nand {TOKEN}".encode(), "401 Unauthorized"))


NO_ANSWERS = {
    "a reset": (reset, "does not answer"),
    "a body cut short": (once(OK + b"Content-Length: 5000\r\n\r\n{"), "does not answer .*IncompleteRead"),
    "nothing": (once(b""), "does not answer"),
    "garbage": (once(bytes(range(256)) * 4), "does not answer"),
    "HTTP of another world": (once(b"HTTP/9.9 banana\r\n\r\n"), "does not answer"),
    "a wrong length of a chunk": (once(OK + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n{}\r\n"), "does not answer"),
    "HTML": (once(response(b"<html>welcome</html>")), "is not valid JSON"),
    "no Unicode": (once(response(b'{"choices": "\xff\xfe"}')), "is not valid JSON"),
    "brackets": (once(response(b"[" * 60_000)), "is not valid JSON"),
    "a list": (once(response([])), "holds a list; expected an object"),
    "a number of 5,000 digits": (once(response(b'{"choices": ' + b"9" * 5000 + b"}")), "is not valid JSON"),
    "a lone surrogate": (once(response(b'{"choices": "\\ud800"}')), "is not valid JSON"),
    "an early hint": (once(b"HTTP/1.1 103 Early Hints\r\n\r\n"), "answered 103"),
    "other protocols": (once(b"HTTP/1.1 101 Switching Protocols\r\n\r\n"), "answered 101"),
    "no content": (once(b"HTTP/1.1 204 No Content\r\n\r\n"), "is not valid JSON"),
    "an error that shows the token": (echoes, r"answered 401: you came with \.\.\. \[31m and \.\.\."),
}


@pytest.mark.parametrize("what", NO_ANSWERS)
def test_what_is_no_answer(model, what):
    act, match = NO_ANSWERS[what]
    assert re.search(match, refusal(model, act))


def test_an_answer_of_http_1_0_is_one(model):
    def act(connection, body):
        connection.sendall(
            b"HTTP/1.0 200 OK\r\nContent-Type: text/plain\r\n\r\n" + json.dumps(completion(body)).encode()
        )

    with Loopback(act, model.vocabulary) as server:
        (reply,) = gather(model, Client(model, server.address), [SCORES])
    assert all(map(is_log_probability, reply.scores))


@pytest.mark.parametrize("answers", [b"HTTP/1.1 400 Bad Request\r\n\r\n", b""], ids=["an error", "nothing"])
def test_tls_where_there_is_none(model, answers):
    with socket.create_server(("127.0.0.1", 0)) as plain:
        address = f"https://127.0.0.1:{plain.getsockname()[1]}"
        with ThreadPoolExecutor(1) as pool:
            calling = pool.submit(Client, model, address, timeout=2.0)
            connection, _ = plain.accept()
            with connection:
                connection.sendall(answers)
                said = str(calling.exception(timeout=40))
    assert "does not answer" in said
    assert ("SSL" if answers else "handshake operation timed out") in said
    assert "\n" not in said


# ---- answers with something else than asked for --------------------------------------------------------------------


def with_choices(change):
    """Return a completion whose list of choices is changed."""

    def act(connection, body):
        whole = completion(body)
        whole["choices"] = change(whole["choices"])
        connection.sendall(response(whole))

    return act


def with_places(change):
    """Return a completion with changed entries for each id of the first prompt."""

    def changed(choices):
        return [choices[0] | {"prompt_logprobs": change(choices[0]["prompt_logprobs"])}, *choices[1:]]

    return with_choices(changed)


def valued(value):
    return with_places(lambda told: [*told[:-1], {name: {"logprob": value} for name in told[-1]}])


WRONG_SCORES = {
    "NaN": (valued(float("nan")), "it holds NaN"),
    "infinity": (valued(float("-inf")), "it holds -Infinity"),
    "1e999": (
        once(response(b'{"choices": [{"index": 0, "prompt_logprobs": [null, {"6": {"logprob": -1e999}}]}]}')),
        "it holds -1e999",
    ),
    "above 0": (valued(0.5), "the log probability 0.5; expected a finite number, at most 0"),
    "far below": (valued(-1e300), "the log probability -1e[+]300"),
    "a huge integer": (valued(10**400), "the log probability 1000000.*; expected a finite number"),
    "text": (valued("-1"), "the log probability '-1'"),
    "null": (valued(None), "the log probability None"),
    "true": (valued(True), "the log probability True"),
    "a list": (valued([-1.0]), r"the log probability \[-1.0\]"),
    "no choices": (with_choices(lambda choices: []), "sent no prompt_logprobs for each of 2 prompts"),
    "a missing choice": (with_choices(lambda choices: choices[:1]), "sent no prompt_logprobs"),
    "an extra choice": (with_choices(lambda choices: [*choices, choices[0] | {"index": 2}]), "sent no prompt_logprobs"),
    "an index twice": (
        with_choices(lambda choices: [choices[0], choices[1] | {"index": 0}]),
        "sent no prompt_logprobs",
    ),
    "an index below 0": (with_choices(lambda choices: [choices[0], choices[1] | {"index": -1}]), "sent no prompt_l"),
    "choices of text": (with_choices(lambda choices: "choices"), "sent no prompt_logprobs"),
    "an object of choices": (with_choices(lambda choices: dict(enumerate(choices))), "sent no prompt_logprobs"),
    "ids of another prompt": (
        with_choices(lambda choices: [choices[0] | {"prompt_token_ids": [1, 2]}, choices[1]]),
        "sent no prompt_logprobs",
    ),
    "log probabilities of another prompt": (with_places(lambda told: places([5, 6, 1, 8])), "sent no prompt_logprobs"),
    "those of other tokens": (with_places(lambda told: [*told[:-1], {"99": {"logprob": -1.0}}]), "sent no prompt_l"),
    "too few": (with_places(lambda told: told[:-1]), "sent no prompt_logprobs"),
    "too many": (with_places(lambda told: [*told, *told]), "sent no prompt_logprobs"),
    "none": (with_places(lambda told: None), "sent no prompt_logprobs"),
}


@pytest.mark.parametrize("what", WRONG_SCORES)
def test_scores_that_are_none(model, what):
    act, match = WRONG_SCORES[what]
    assert re.search(match, refusal(model, act))


def cell_ids(model):
    return model.vocabulary.ids(np.zeros((1, model.vocabulary.levels), dtype=np.uint8))[0].tolist()


WRONG_IDS = {
    "text": (lambda ids: [1, 2, 3], "which is not one cell. Start the server with --logits-processors"),
    "nothing": (lambda ids: [], "is not one cell"),
    "half a cell": (lambda ids: ids[:5], "is not one cell"),
    "two levels swapped": (lambda ids: [*ids[:3], ids[4], ids[3], *ids[5:]], "is not one cell"),
    "two cells": (lambda ids: [*ids, *ids], "wrote 20 tokens where it was asked for at most 11"),
    "an id that there is not": (
        lambda ids: [*ids[:-1], 10**9],
        "wrote the id 1000000000; the ids of this model are 0 to",
    ),
    "an id below 0": (lambda ids: [-1, *ids[1:]], "wrote the id -1"),
    "a huge id": (lambda ids: [10**300], "wrote the id 1000"),
    "true": (lambda ids: [True], "wrote the id True"),
    "numbers as text": (lambda ids: [str(each) for each in ids], "wrote the id '"),
    "text for a list": (lambda ids: "text", "wrote the id 't'"),
    "floats": (lambda ids: [float(each) for each in ids], "wrote the id "),
    "none": (lambda ids: None, "sent no token_ids"),
}


@pytest.mark.parametrize("what", WRONG_IDS)
def test_ids_that_are_none(model, what):
    change, match = WRONG_IDS[what]
    act = with_choices(lambda choices: [choices[0] | {"token_ids": change(cell_ids(model))}])
    assert match in refusal(model, act, CELL)


def test_an_output_ends_with_its_end_token(model):
    end = model.prompts.end
    text = Ask((5, 6), rule=Rule("text"), max_tokens=4)
    act = with_choices(lambda choices: [choices[0] | {"token_ids": [1, end, 1]}])
    assert "not an output of mode 'text'" in refusal(model, act, text)
    with Loopback(with_choices(lambda choices: [choices[0] | {"token_ids": [1, end]}]), model.vocabulary) as server:
        assert gather(model, Client(model, server.address), [text])[0].ids == [1, end]


# ---- where credentials go ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_no_redirect_is_followed(model, status):
    with Loopback(annotates, model.vocabulary) as elsewhere:
        act = once(response({}, f"{status} Elsewhere", f"Location: {elsewhere.address}/v1/completions"))
        assert f"answered {status}: go to {elsewhere.address}/v1/completions; give" in refusal(model, act)
        assert elsewhere.seen == []


def test_no_proxy_is_asked_and_no_netrc_read(model, monkeypatch, tmp_path):
    (tmp_path / ".netrc").write_text("machine 127.0.0.1 login someone password of-netrc\n")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("RVQA_API_KEY")
    with Loopback(annotates, model.vocabulary) as proxy, Loopback(annotates, model.vocabulary) as server:
        for name in ("http_proxy", "HTTP_PROXY", "ALL_PROXY", "HTTPS_PROXY"):
            monkeypatch.setenv(name, proxy.address)
        gather(model, Client(model, server.address), [SCORES])
        assert proxy.seen == []
        assert not any("Authorization" in head for head in server.seen)


def test_a_cookie_is_not_kept(model):
    def act(connection, body):
        connection.sendall(response(completion(body), "200 OK", "Set-Cookie: big=" + "x" * 5000))
        return True

    with Loopback(act, model.vocabulary) as server:
        client = Client(model, server.address)
        gather(model, client, [SCORES])
        gather(model, client, [SCORES, CELL][:1])
        assert not any("cookie" in head.lower() for head in server.seen)


def test_user_and_password_of_an_address_are_used_and_never_shown(model, caplog):
    caplog.set_level(logging.DEBUG)
    with Loopback(echo_head, model.vocabulary) as server:
        address = server.address.replace("//", "//some%40one:pa%2F55@")
        client = Client(model, address + "/v1", timeout=5.0, patience=0.0)
        assert client.address == server.address
        with pytest.raises(EngineError, match=r"answered 403: .*Authorization: Basic [.]{3}") as failed:
            gather(model, client, [SCORES])
        assert "Authorization: Basic c29tZUBvbmU6cGEvNTU=\r\n" in server.seen[-1]
    for said in (str(failed.value), caplog.text):
        assert not any(secret in said for secret in ("pa/55", "pa%2F55", "c29tZUBvbmU6cGEvNTU", TOKEN))


def echo_head(connection, body):
    known = "Authorization: Basic c29tZUBvbmU6cGEvNTU=; some@one:pa/55, some%40one:pa%2F55"
    connection.sendall(response(known.encode(), "403 Forbidden"))


@pytest.mark.parametrize(
    "address",
    [
        "http://me:pa55@127.0.0.1:9",
        "http://me:pa55@",
        "http://me:pa55/x@host:80",
        "http://me:pa55@ho st",
        "http://me:pa55@host:port",
        "htp://me:pa55@host",
        "me:pa55@host:8000",
        "https://me:pa55@127.0.0.1:9/v1",
        "http://me:pa55@host/?a=b",
    ],
)
def test_an_address_that_leads_nowhere_is_shown_without_its_password(model, address):
    with pytest.raises(InputError) as refused:
        in_time(lambda: open_engine(model, address))
    assert "pa55" not in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_report_shows_the_command_without_the_password(monkeypatch):
    from rvqa.report.page import command_line

    given = [
        "rvqa",
        "annotate",
        "me@home.h5ad",
        "--engine",
        "https://me:pa55@host:80",
        "--engine=http://me:p/a@55@host",
    ]
    monkeypatch.setattr(sys, "argv", given)
    assert command_line() == "rvqa annotate me@home.h5ad --engine https://...@host:80 --engine=http://...@host"


@pytest.mark.parametrize("key", ["line\nbreak", "schl\u00fcssel", "tab\tkey"])
def test_a_token_that_no_header_takes(model, monkeypatch, key):
    monkeypatch.setenv("RVQA_API_KEY", key)
    with pytest.raises(InputError, match="RVQA_API_KEY cannot be used") as refused:
        Client(model, "http://127.0.0.1:9")
    assert key not in str(refused.value)


# ---- requests to a server of ours ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "match"),
    [
        (
            {"rvqa_mode": "choice", "rvqa_choices": [f"{i:04x}" for i in range(63_488)]},
            "63,488 choices; expected at most",
        ),
        (
            {"rvqa_mode": "choice", "rvqa_choices": ["a", "b" * 65_536]},
            "2 choices of up to 65,536 bytes; expected at most",
        ),
        ({"rvqa_mode": "choice", "rvqa_choices": ["a"] * 1024}, "each different"),
        ({"rvqa_mode": "choice", "rvqa_choices": "a" * 10**6}, "rvqa_choices is 'aaa"),
        ({"rvqa_mode": "m" * 10**6}, "no mode 'mmm"),
        ({"rvqa_mode": "text", "rvqa_choices": ["a" * 10**6]}, "choices with mode"),
        ({"rvqa_mode": "n_cells", "rvqa_n_cells": 10**4000}, "n_cells is 1000"),
        ({"rvqa_" + "x" * 10**6: 1}, "no option 'rvqa_xxx"),
    ],
)
def test_what_a_request_may_ask_for_is_bounded(options, match):
    with pytest.raises(InputError, match=match) as refused:
        Rule.from_options(options)
    assert len(str(refused.value)) < 800


# ---- fuzzed answers ------------------------------------------------------------------------------------------------


@cache
def fuzzed():
    """Return a client and its server, made once per process; the server sends what `data` holds."""
    loaded = rvqa.load(os.environ["RVQA_ATTACKED_MODEL"], weights=False)
    data = {}
    server = Loopback(lambda connection, body: connection.sendall(data["next"]), loaded.vocabulary)
    return loaded, Client(loaded, server.address, timeout=2.0, patience=0.0), data


def altered_answer(number, folder):
    loaded, client, data = fuzzed()
    ask = (SCORES, CELL)[number % 2]
    answer = completion({"prompt": ask.prompts()})
    if not ask.answers:
        answer["choices"][0]["token_ids"] = cell_ids(loaded)
    whole = response(answer)
    head = whole.index(b"\r\n\r\n") + 4
    data["next"] = mutated(whole, number) if number % 3 else response(mutated(whole[head:], number))
    (reply,) = gather(loaded, client, [ask])
    if ask.answers:
        assert len(reply.scores) == 2
        assert all(map(is_log_probability, reply.scores))
    else:
        assert is_valid_output(reply.ids, ask.rule, loaded.vocabulary, stop_ids=[loaded.prompts.end])


def test_altered_answers(model_path, tmp_path, monkeypatch):
    monkeypatch.setenv("RVQA_ATTACKED_MODEL", str(model_path))
    survive(altered_answer, tmp_path)


# ---- a client that is killed ---------------------------------------------------------------------------------------

KILLS = int(os.environ.get("RVQA_KILLS", "2"))


def rows(path):
    if not path.exists():
        return 0
    with sqlite3.connect(path) as file:
        try:
            return file.execute("SELECT count(*) FROM replies").fetchone()[0]
        except sqlite3.OperationalError:  # killed before the tables were made
            return 0


def test_annotate_over_http_survives_kills(shipped, model, model_path, tmp_path):
    """Killed at random replies, the same command continues to the same labels and asks only for missing replies."""
    cells = next(iter(shipped.tests.values()))[:200].copy()
    cells.write_h5ad(tmp_path / "cells.h5ad")
    kept, out = tmp_path / "out.h5ad.replies", tmp_path / "out.h5ad"
    command = [sys.executable, "-m", "rvqa", "annotate", tmp_path / "cells.h5ad", "--model", model_path, "-o", out]
    command += ["--library-size-key", "depth", "--quiet", "--engine"]
    rng = random.Random(KILLS)
    at, process = [0], []

    def act(connection, body):
        if len(server.bodies) == at[0]:
            process[0].send_signal(signal.SIGKILL)
        return annotates(connection, body)

    with Loopback(act, model.vocabulary) as server:
        expected = cells.copy()
        rvqa.annotate(expected, model, library_size_key="depth", engine=server.address, progress=False)
        for _ in range(KILLS):
            server.bodies.clear()
            before = rows(kept)
            at[0] = rng.randint(1, max(1, (cells.n_obs - before) * 2 // 3))
            process[:] = [subprocess.Popen([*command, server.address], stderr=subprocess.PIPE)]
            assert process[0].wait() == -signal.SIGKILL, process[0].stderr.read()
            assert before <= rows(kept) <= before + len(server.bodies)
            assert not out.exists()
        left = cells.n_obs - rows(kept)
        server.bodies.clear()
        at[0] = -1
        subprocess.run([*command, server.address], check=True, capture_output=True)
        assert len(server.bodies) == left
    found = anndata.read_h5ad(out)
    np.testing.assert_array_equal(found.obsm["rvqa_probabilities"], expected.obsm["rvqa_probabilities"])
    assert list(found.obs["rvqa_cell_type"]) == list(expected.obs["rvqa_cell_type"])
    assert sorted(each.name for each in tmp_path.iterdir()) == ["cells.h5ad", "out.h5ad"]
