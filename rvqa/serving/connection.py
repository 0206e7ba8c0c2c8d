"""HTTP to one server of which nothing is trusted: an answer has a deadline as a whole, and a largest size.

It is the standard library's `http.client`, which follows no redirect, knows no proxy, cookie or .netrc, and asks for
bodies as they are: credentials go to the address given alone. Here every wait on a socket ends with the deadline of the
answer, however the server drips, and credentials are taken out of what is shown.
"""

from __future__ import annotations

import base64
import http.client
import json
import os
import select
import socket
import ssl
import time
from collections.abc import Callable
from contextlib import suppress
from threading import Event
from typing import Any, TypeVar
from urllib.parse import SplitResult, unquote, urlsplit

from rvqa.errors import EngineError, InputError
from rvqa.io.json_text import object_of
from rvqa.serving.asks import without_password

T = TypeVar("T")

ROOM = 1 << 16
"""Bytes that any answer may have, whatever was asked."""

NETWORK = (OSError, http.client.HTTPException)
"""What a network, or a server that does not speak HTTP, ends in."""

_CONNECT = 10.0
"""Seconds to connect: no work of the server goes into it."""

_SLICE = 1.0
"""Seconds after which a wait looks whether calls were stopped."""


class Connections:
    """Calls of one server, from any thread.

    Parameters
    ----------
    address
        "http://host:8000", with or without "/v1", and with or without "user:password@".
    timeout
        Seconds for one answer, from the call to its last byte.
    """

    def __init__(self, address: str, timeout: float) -> None:
        self.url, self.timeout = _parsed(address), timeout
        host = self.url.netloc.rpartition("@")[2]
        self.prefix = self.url.path.rstrip("/").removesuffix("/v1")
        self.address = f"{self.url.scheme}://{host}{self.prefix}"
        authorization, self.secrets = _authorization(self.url)
        self.headers = {"Host": host, "Content-Type": "application/json", **authorization}
        self.tls = ssl.create_default_context() if self.url.scheme == "https" else None
        if self.tls:
            self.tls.sslsocket_class = _TlsSocket
        self.idle: list[Any] = []

    def close(self) -> None:
        """Close the connections that no call uses."""
        while self.idle:
            self.idle.pop().close()

    def call(self, method: str, path: str, body: object, *, most: int, stopped: Event | None = None) -> dict[str, Any]:
        """JSON object that the server answers.

        Parameters
        ----------
        method, path
            "GET" or "POST", and what is called.
        body
            What JSON knows; None for nothing.
        most
            Bytes that the answer may have at most.
        stopped
            The call ends soon after this is set.

        Raises
        ------
        EngineError
            The server is gone, too slow, rejects the call, or answers with anything but such an object.
        """
        where = self.address + path
        sent = None if body is None else json.dumps(body).encode()
        stopped = stopped or Event()
        clock = _Clock(time.monotonic() + self.timeout, stopped)
        whole = False
        try:
            connection = self._connection(clock)
            try:
                connection.request(method, self.prefix + path, sent, self.headers)
                answer = connection.getresponse()
                good = 200 <= answer.status < 300
                data = _read(answer, most if good else ROOM)
                whole = answer.isclosed() and connection.sock is not None  # the server goes on with the connection
            finally:
                if whole and not stopped.is_set():
                    self.idle.append(connection)
                else:
                    connection.close()
        except _TooLate as error:
            raise EngineError(f"{where} sent no whole answer within {self.timeout:g} seconds.") from error
        except (*NETWORK, ValueError) as error:
            told = self.shown(f"{type(error).__name__}: {error}")
            raise EngineError(f"{self.address} does not answer ({told}).") from error
        if not good:
            said = data.decode("utf-8", "replace")
            if answer.status // 100 == 3:
                said = f"go to {answer.headers.get('Location', '')}; give the address that it stands for"
            failed = EngineError(f"{where} answered {answer.status}: {self.shown(said)}.")
            failed.status = answer.status
            raise failed
        encoding = answer.headers.get("Content-Encoding", "identity")
        if encoding.lower() != "identity":
            raise EngineError(f"{where} sent a body in the encoding {self.shown(encoding)!r}; expected it as it is.")
        if len(data) > most:
            raise EngineError(f"{where} sent more than {most:,} bytes, the most that the call can need.")
        try:
            return object_of(data, f"The answer of {where}", "Is it vLLM 0.31 or 0.32?")
        except InputError as error:
            raise EngineError(self.shown(str(error))) from error

    def shown(self, text: str) -> str:
        """Text of the server as it may be shown: a line, not long, without the credentials that it could send back."""
        for secret in self.secrets:
            text = text.replace(secret, "...")
        return " ".join("".join(each if each.isprintable() else " " for each in text[:300]).split())

    def _connection(self, clock: _Clock) -> Any:
        """One on which nothing is on the way; its waits end by the clock."""
        with suppress(IndexError):
            while True:
                connection = self.idle.pop()
                if not _is_readable(connection.sock):
                    connection.sock.clock = clock
                    return connection
                connection.close()  # the server has closed it, or says what nobody asked
        host, port = str(self.url.hostname), self.url.port or (443 if self.tls else 80)
        plain = socket.create_connection((host, port), min(_CONNECT, clock.left()))
        try:
            plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if self.tls:  # the socket's timeout holds for the handshake as a whole
                made: Any = self.tls.wrap_socket(plain, server_hostname=host)
            else:
                made = _Socket(fileno=plain.detach())
        finally:
            plain.close()  # nothing, where another socket has taken it over
        made.clock = clock
        connection = http.client.HTTPConnection(host, port)
        connection.auto_open, connection.sock = 0, made
        return connection


class _TooLate(TimeoutError):
    """The deadline of an answer has passed, or calls were stopped."""


class _Clock:
    """When the answer at hand must be there."""

    def __init__(self, deadline: float, stopped: Event) -> None:
        self.deadline, self.stopped = deadline, stopped

    def left(self) -> float:
        """Seconds until then."""
        left = self.deadline - time.monotonic()
        if left <= 0 or self.stopped.is_set():
            raise _TooLate
        return left


class _Clocked:
    """A socket whose every wait ends with the clock."""

    clock: _Clock

    def recv_into(self, *arguments: Any) -> int:
        """Read what is there."""
        return self._in_time(lambda: super(_Clocked, self).recv_into(*arguments))  # type: ignore[misc]

    def sendall(self, data: Any, flags: int = 0) -> None:
        """Write all, which the server may read as slowly as it likes."""
        rest = memoryview(data)
        while rest:
            part = rest
            rest = rest[self._in_time(lambda part=part: super(_Clocked, self).send(part, flags)) :]  # type: ignore[misc]

    def _in_time(self, act: Callable[[], T]) -> T:
        while True:
            self.settimeout(min(_SLICE, self.clock.left()))  # type: ignore[attr-defined]
            try:
                return act()
            except TimeoutError:
                continue


class _Socket(_Clocked, socket.socket):
    """A socket in plain text."""


class _TlsSocket(_Clocked, ssl.SSLSocket):
    """A socket under TLS."""


def _read(answer: http.client.HTTPResponse, most: int) -> bytes:
    """Body of an answer, or one byte and more above `most` of a larger one."""
    parts, size = [], 0
    while size <= most and (part := answer.read(min(ROOM, most + 1 - size))):
        parts.append(part)
        size += len(part)
    if size <= most and answer.length:
        raise http.client.IncompleteRead(b"", answer.length)
    return b"".join(parts)


def _is_readable(sock: socket.socket) -> bool:
    """Whether a read would not wait."""
    poll = select.poll()
    poll.register(sock, select.POLLIN)
    return bool(poll.poll(0))


def _parsed(address: str) -> SplitResult:
    try:
        url = urlsplit(address)
        _ = url.port
        usable = bool(url.hostname) and address.isascii() and address.isprintable() and " " not in address
        usable = usable and not (url.query or url.fragment)
    except ValueError:
        usable = False
    if not usable:
        raise InputError(
            f"The address {without_password(address)!r} cannot be used; expected http://host:8000, where / and @ in a "
            "password are %2F and %40."
        )
    return url


def _authorization(url: SplitResult) -> tuple[dict[str, str], list[str]]:
    """Header that carries credentials, and what of them is never shown."""
    if "@" in url.netloc:
        given = url.netloc.rpartition("@")[0]
        user, password = unquote(url.username or ""), unquote(url.password or "")
        token = base64.b64encode(f"{user}:{password}".encode()).decode()
        secrets = [token, given, password, url.password or ""]
        return {"Authorization": f"Basic {token}"}, _forms(secrets)
    if key := os.environ.get("RVQA_API_KEY"):
        if not (key.isascii() and key.isprintable()):
            raise InputError("RVQA_API_KEY cannot be used: a line break or a sign that is not plain ASCII is in it.")
        return {"Authorization": f"Bearer {key}"}, _forms([key])
    return {}, []


def _forms(secrets: list[str]) -> list[str]:
    """Secrets, and how they stand in a message that quotes them."""
    return [form for secret in secrets if secret for form in (secret, repr(secret)[1:-1])]
