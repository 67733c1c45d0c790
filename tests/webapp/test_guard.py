"""Which requests are answered, without a server."""

import asyncio
import socket

import pytest
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.responses import PlainTextResponse
from starlette.routing import Route

from shortcut_jax.errors import UsageError
from shortcut_jax.webapp.guard import MAX_BODY, MAX_UPLOAD, Address, Guard, foreign, hosts_of, parse_address

LOOPBACK = hosts_of("127.0.0.1")


@pytest.mark.parametrize(
    "text, address",
    [
        ("localhost:7860", Address("localhost", 7860)),
        ("[::1]:7860", Address("::1", 7860)),
        ("Images.Example.org.", Address("images.example.org")),
        ("127.0.0.1", Address("127.0.0.1")),
        ("", None),
        ("https://example.org", None),
        ("example.org/x", None),
        ("user@localhost", None),
        ("localhost:x", None),
        ("*", None),
        ("a b", None),
        ("[::1", None),
    ],
)
def test_addresses(text, address):
    assert parse_address(text) == address


@pytest.mark.parametrize(
    "headers",
    [
        {"host": "localhost:7860"},
        {"host": "127.0.0.1:7860", "origin": "http://127.0.0.1:7860"},
        {"host": "[::1]:7860", "origin": "http://[::1]:7860"},
        {"host": "LOCALHOST:8000", "origin": "http://localhost:8000"},  # a tunnel
        {"host": "localhost", "origin": "http://localhost:80"},
    ],
)
def test_its_own_pages_are_answered(headers):
    assert foreign(headers, LOOPBACK) == ""


@pytest.mark.parametrize(
    "headers, message",
    [
        ({}, "not served as ''"),
        ({"host": "evil.example:7860"}, "not served as 'evil.example:7860': .*--allow_host=evil.example"),
        ({"host": "localhost.evil.example"}, "not served as"),
        ({"host": "127.0.0.1.nip.io"}, "not served as"),
        ({"host": "192.168.1.7:7860"}, "not served as"),
        ({"host": "localhost:7860", "x-forwarded-host": "evil.example"}, "not served as 'evil.example'"),
        ({"host": "localhost:7860", "origin": "http://evil.example"}, "pages of 'http://evil.example' are not"),
        ({"host": "localhost:7860", "origin": "http://localhost:3000"}, "pages of"),
        ({"host": "localhost:7860", "origin": "http://127.0.0.1:7860"}, "pages of"),
        ({"host": "localhost:7860", "origin": "null"}, "pages of 'null'"),
        ({"host": "localhost:7860", "origin": "file://localhost:7860"}, "pages of"),
        ({"host": "x" * 5000}, "not served as"),
    ],
)
def test_foreign_names_and_pages_are_refused_in_one_line(headers, message):
    import re

    reason = foreign(headers, LOOPBACK)
    assert re.search(message, reason) and "\n" not in reason


def test_the_names_of_other_hosts(monkeypatch):
    monkeypatch.setattr(socket, "gethostname", lambda: "gpu01.lab")
    everywhere = hosts_of("0.0.0.0")
    for host in ("192.168.1.7:7860", "gpu01.lab:7860", "gpu01.local", "[fe80::1]:7860", "localhost:7860"):
        assert foreign({"host": host, "origin": f"http://{host}"}, everywhere) == "", host
    assert foreign({"host": "evil.example"}, everywhere) and foreign({"host": "gpu02.lab"}, everywhere)
    # Another service of the machine is another site.
    assert foreign({"host": "gpu01.lab:7860", "origin": "http://gpu01.lab:8888"}, everywhere)
    one = hosts_of("192.0.2.5")
    assert not foreign({"host": "192.0.2.5:7860"}, one) and foreign({"host": "192.0.2.6:7860"}, one)
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_: [(0, 0, 0, "", ("192.0.2.9", 0))])
    named = hosts_of("gpu01.lab")
    assert not foreign({"host": "gpu01.lab:7860"}, named) and not foreign({"host": "192.0.2.9:7860"}, named)


def test_the_name_of_a_proxy():
    hosts = hosts_of("127.0.0.1", ["images.example.org", "other.example:8443"])
    for headers in (
        {"host": "images.example.org", "origin": "https://images.example.org"},
        {"host": "localhost:7860", "origin": "https://images.example.org"},
        {"host": "other.example:8443", "origin": "https://other.example:8443"},
        {"host": "localhost:7860", "x-forwarded-host": "images.example.org", "origin": "https://images.example.org"},
    ):
        assert foreign(headers, hosts) == "", headers
    for headers in ({"host": "other.example"}, {"host": "localhost:7860", "origin": "https://other.example"}):
        assert foreign(headers, hosts), headers
    for text in ("https://images.example.org", "*", "", "a/b"):
        with pytest.raises(UsageError, match="must be a host name"):
            hosts_of("127.0.0.1", [text])


def _answer(path="/echo", headers=(), chunks=(b"",), kind="http"):
    """Status, headers and body of a request to an app that says how much it read, through a guard."""
    allowed = lambda app: _Permissive(app)

    async def echo(request):
        return PlainTextResponse(str(len(await request.body())))

    routes = [Route(where, echo, methods=["POST"]) for where in ("/echo", "/gradio_api/upload")]
    guarded = Guard(Starlette(routes=routes, middleware=[Middleware(allowed)]), LOOPBACK)
    sent, waiting = [], list(chunks)

    async def receive():
        return {"type": "http.request", "body": waiting.pop(0), "more_body": bool(waiting)}

    async def send(message):
        sent.append(message)

    raw = [(k.encode(), v.encode()) for k, v in {"host": "localhost:7860", **dict(headers)}.items()]
    scope = {"type": kind, "method": "POST", "path": path, "query_string": b"", "headers": raw, "root_path": ""}
    asyncio.run(guarded(scope, receive, send))
    return sent, len(chunks) - len(waiting)


class _Permissive:
    """As gradio's own, which lets every page in under a foreign name."""

    def __init__(self, app):
        self.app = app

    async def __call__(self, scope, receive, send):
        async def permitted(message):
            if message["type"] == "http.response.start":
                message["headers"].append((b"Access-Control-Allow-Credentials", b"true"))
            await send(message)

        await self.app(scope, receive, permitted)


def test_bodies_are_bounded_before_they_are_read_and_while_they_are():
    (start, body), read = _answer(chunks=[b"x" * 1000, b"y"])
    assert start["status"] == 200 and body["body"] == b"1001" and read == 2
    assert not [k for k, _ in start["headers"] if k.lower().startswith(b"access-control")]
    for length in (str(200 * 2**20), "-1", "1e3"):
        (start, body), read = _answer(headers={"content-length": length})
        assert start["status"] == 413 and read == 0 and body["body"].count(b"\n") == 1
    chunk = b"x" * 2**19
    (start, *_), read = _answer(chunks=[chunk] * 400)
    assert start["status"] == 413 and read * len(chunk) <= MAX_BODY + 2 * len(chunk)
    (start, *_), _ = _answer("/gradio_api/upload", {"content-length": str(2 * MAX_BODY)}, [chunk] * 4)
    assert start["status"] == 200
    (start, *_), read = _answer("/gradio_api/upload", chunks=[chunk] * 400)
    assert start["status"] == 413 and read * len(chunk) <= MAX_UPLOAD + 2 * len(chunk)


def test_a_foreign_websocket_is_closed_before_it_opens():
    (message,), read = _answer(headers={"origin": "http://evil.example"}, kind="websocket")
    assert message["type"] == "websocket.close" and read == 0
