"""Servers on loopback, with real sockets, that speak the client's part of vLLM's protocol or break it."""

import hashlib
import json
import socket
import threading


class Loopback:
    """A server that lets `act(connection, body)` answer completions; it answers all else as vLLM does.

    `seen` has the head of every request, `connections` counts them. `act` may send anything; the connection
    is closed after it unless it returns True.
    """

    def __init__(self, act, vocabulary, names=("m",)):
        self.act, self.vocabulary, self.names = act, vocabulary, names
        self.seen, self.bodies = [], []
        self.listener = socket.create_server(("127.0.0.1", 0), backlog=128)
        self.port = self.listener.getsockname()[1]
        self.address = f"http://127.0.0.1:{self.port}"
        threading.Thread(target=self._accept, daemon=True).start()

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.listener.close()

    def _accept(self):
        while True:
            try:
                connection, _ = self.listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection):
        with connection, connection.makefile("rb") as stream:
            try:
                while head := request_head(stream):
                    self.seen.append(head)
                    path = head.split(" ")[1]
                    body = json.loads(stream.read(content_length(head)) or "null")
                    if path.endswith("/models"):
                        connection.sendall(response({"data": [{"id": name} for name in self.names]}))
                    elif path.endswith("/tokenize"):
                        ids = list(range(self.vocabulary.base, self.vocabulary.closer + 1))
                        connection.sendall(response({"tokens": ids}))
                    else:
                        self.bodies.append(body)
                        if not self.act(connection, body):
                            return
            except OSError:  # the client has left
                return


def request_head(stream):
    lines = []
    while (line := stream.readline()) not in (b"", b"\r\n"):
        lines.append(line.decode("latin-1"))
    return "".join(lines)


def content_length(head):
    return next((int(line.split(":")[1]) for line in head.splitlines() if line.lower().startswith("content-length")), 0)


def response(value, status="200 OK", *headers):
    data = value if isinstance(value, bytes) else json.dumps(value).encode()
    lines = [f"HTTP/1.1 {status}", "Content-Type: application/json", f"Content-Length: {len(data)}", *headers]
    return "\r\n".join([*lines, "", ""]).encode() + data


def log_probability(prompt):
    """Return a number that depends only on the prompt."""
    return -1 - hashlib.sha256(repr(prompt).encode()).digest()[0] / 32


def places(prompt):
    """Return what vLLM reports of a prompt's ids."""
    told = [
        {str(token_id): {"logprob": log_probability(prompt[: i + 2]), "rank": 1, "decoded_token": "x"}}
        for i, token_id in enumerate(prompt[1:])
    ]
    return [None, *told]


def completion(body):
    """Return what vLLM would answer; an output is one cell if one is asked for."""
    choices = [
        {"index": i, "text": "", "token_ids": [0], "prompt_token_ids": prompt, "prompt_logprobs": places(prompt)}
        for i, prompt in enumerate(body["prompt"])
    ]
    return {"id": "cmpl", "object": "text_completion", "choices": choices}


def annotates(connection, body):
    """A correct server."""
    connection.sendall(response(completion(body)))
    return True
