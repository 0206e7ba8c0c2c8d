"""vLLM's OpenAI server with the processor, on loopback: annotation over HTTP, and a server that dies."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time

import httpx
import numpy as np
import openai
import pytest

import rvqa
from rvqa.errors import EngineError, InputError
from rvqa.language.grammar import Rule, is_valid_output
from rvqa.perturbation import perturbed_codes
from rvqa.serving.asks import Ask
from rvqa.serving.client import Client
from rvqa.serving.replies import gather


class Server:
    """The server of `vllm serve` in its own process group; the CPU build has no `vllm` command."""

    def __init__(self, model_dir, log):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.model_dir, self.log = model_dir, log
        self.address = f"http://127.0.0.1:{self.port}"
        self.process = None

    def start(self):
        options = (
            f"--host 127.0.0.1 --port {self.port} --dtype float32 --max-model-len 256 --max-num-seqs 64 "
            "--enforce-eager --logits-processors rvqa.serving.vllm:CellSpans"
        )
        with self.log.open("a") as log:
            self.process = subprocess.Popen(
                [
                    sys.executable,
                    "-m",
                    "vllm.entrypoints.openai.api_server",
                    "--model",
                    str(self.model_dir),
                    *options.split(),
                ],
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        for _ in range(600):
            try:
                if httpx.get(f"{self.address}/health").is_success:
                    return
            except httpx.TransportError:
                pass
            assert self.process.poll() is None, self.log.read_text()[-3000:]
            time.sleep(0.2)
        raise AssertionError(self.log.read_text()[-3000:])

    def kill(self):
        if self.process is not None and self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()


@pytest.fixture(scope="module")
def server(model_dir, tmp_path_factory):
    made = Server(model_dir, tmp_path_factory.mktemp("server") / "log")
    made.start()
    yield made
    made.kill()


@pytest.fixture(scope="module")
def model(model_dir):
    return rvqa.load(model_dir)


@pytest.fixture(scope="module")
def here(model, held_out):
    """Held-out cells annotated in this process."""
    cells = held_out.copy()
    rvqa.annotate(cells, model, progress=False)
    return cells


def test_held_out_cells_are_annotated_over_http(server, model_dir, held_out, here):
    """Labels and probabilities equal those in this process, although the client has no language model's weights."""
    light = rvqa.load(model_dir, weights=False)
    cells = held_out.copy()
    rvqa.annotate(cells, light, engine=server.address, progress=False)
    assert list(cells.obs["rvqa_cell_type"]) == list(here.obs["rvqa_cell_type"])
    np.testing.assert_allclose(cells.obsm["rvqa_probabilities"], here.obsm["rvqa_probabilities"], atol=1e-4)
    truth = held_out.obs["cell_type"].astype(str)
    assert (cells.obs["rvqa_cell_type"].astype(str) == truth).mean() > truth.value_counts(normalize=True).max() + 0.1
    with pytest.raises(InputError, match="was loaded without weights"):
        rvqa.annotate(cells, light, progress=False)


def test_perturbed_cells_over_http(server, model, held_out):
    codes = rvqa.encode(held_out[:40], model, copy=True).obsm["rvqa_codes"]
    types = held_out[:40].obs["cell_type"].astype(str).to_numpy()
    greedy = [perturbed_codes(model, codes, types, "IFN-beta", 0.0, 0, engine=e) for e in ("hf", server.address)]
    np.testing.assert_array_equal(*greedy)
    drawn = [perturbed_codes(model, codes, types, "IFN-beta", 1.0, seed, engine=server.address) for seed in (1, 1, 2)]
    np.testing.assert_array_equal(drawn[0], drawn[1])
    assert (drawn[0] != drawn[2]).any()


def test_any_client_can_ask(server, model):
    """OpenAI's own client works, with the options in `vllm_xargs`."""
    client = openai.OpenAI(base_url=f"{server.address}/v1", api_key="none")
    prompt = model.prompts.ids("Cell type: {label}. Condition: control.", label="B cell")[0].tolist()
    end = model.prompts.end
    for rule in (Rule("one_cell"), Rule("n_cells", 3), Rule("choice", choices=(" B cell", " T cell"))):
        answer = client.completions.create(
            model=str(server.model_dir),
            prompt=prompt,
            max_tokens=40,
            temperature=2.0,
            extra_body={"vllm_xargs": rule.options(), "return_token_ids": True},
        )
        choice = answer.choices[0]
        assert choice.finish_reason == "stop"
        if rule.cells > 0:
            assert is_valid_output(choice.token_ids, rule, model.vocabulary, stop_ids=[end])
            assert len(model.vocabulary.codes_from_texts([choice.text[: len(choice.text) // rule.cells]])) == 1
        else:
            assert choice.text in rule.choices
    for body, match in [
        ({"vllm_xargs": {"rvqa_mode": "cells"}}, "no mode 'cells'"),
        ({"vllm_xargs": {"rvqa_mode": "one_cell"}, "ignore_eos": True}, "ignore_eos=True could break a cell"),
    ]:
        with pytest.raises(openai.BadRequestError, match=match):
            client.completions.create(model=str(server.model_dir), prompt=prompt, max_tokens=16, extra_body=body)


def test_a_server_of_another_model(server, model):
    from dataclasses import replace

    from rvqa.language.vocabulary import CellVocabulary

    other = replace(model, vocabulary=CellVocabulary(model.vocabulary.base + 1))
    with pytest.raises(InputError, match="reads the cell tokens as other ids"):
        Client(other, server.address)
    with pytest.raises(InputError, match="does not answer"):
        Client(model, "http://127.0.0.1:9")


def test_a_refused_call_is_told_at_once(server, model):
    with pytest.raises(EngineError, match=r"400.*maximum"):
        gather(model, Client(model, server.address), [Ask(tuple([1] * 300))])


def test_a_server_that_dies_and_comes_back(server, model, held_out, here, tmp_path):
    """Killed in the middle: returned replies are kept, the rerun continues from them and waits for a restart."""
    kept = tmp_path / "replies"
    cells = held_out.copy()
    killed = []

    def kill_soon():
        while not kept.exists() or rows(kept) < 30:
            time.sleep(0.005)
        server.kill()
        killed.append(rows(kept))

    watcher = threading.Thread(target=kill_soon)
    client = Client(model, server.address, concurrency=4, patience=1.0)
    watcher.start()
    with pytest.raises(EngineError, match=r"does not answer.*the same call goes on from there"):
        rvqa.annotate(cells, model, engine=client, resume=kept, progress=False)
    watcher.join()
    assert "rvqa_cell_type" not in cells.obs  # nothing half-written
    saved = rows(kept)
    assert killed[0] <= saved < held_out.n_obs

    restarted = threading.Thread(target=server.start)
    restarted.start()  # this takes many seconds, so the client tries again until the server is up
    asked = []
    plain = client._call
    client.patience = 120.0
    client._call = lambda *call: asked.append(len(call[1])) or plain(*call)
    rvqa.annotate(cells, model, engine=client, resume=kept, progress=False)
    restarted.join()
    assert sum(asked) == held_out.n_obs - saved
    assert list(cells.obs["rvqa_cell_type"]) == list(here.obs["rvqa_cell_type"])
    np.testing.assert_allclose(cells.obsm["rvqa_probabilities"], here.obsm["rvqa_probabilities"], atol=1e-4)


def test_the_command_line_keeps_replies_beside_its_output(server, model_dir, held_out, tmp_path):
    held_out[:30].write_h5ad(tmp_path / "cells.h5ad")
    command = [sys.executable, "-m", "rvqa", "annotate", tmp_path / "cells.h5ad", "--model", model_dir]
    command += ["-o", tmp_path / "out.h5ad", "--engine"]
    gone = subprocess.run([*command, "http://127.0.0.1:9"], capture_output=True, text=True, check=False)
    assert gone.returncode == 2
    assert "127.0.0.1:9 does not answer" in gone.stderr
    done = subprocess.run([*command, server.address], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cells.h5ad", "out.h5ad"]


def rows(path):
    import sqlite3

    try:
        with sqlite3.connect(path) as file:
            return file.execute("SELECT count(*) FROM replies").fetchone()[0]
    except sqlite3.OperationalError:
        return 0
