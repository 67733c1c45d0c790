"""Which requests the web page answers: those to its own names, from its own pages, with bodies of a bounded size.

A page of another site can reach a server on loopback: directly, or under its own name where that name is made to
resolve to 127.0.0.1 (DNS rebinding). The first sends a foreign `Origin`, the second a foreign `Host`; both are refused.
"""

import ipaddress
import re
import socket
from collections.abc import Iterable
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from shortcut_jax.errors import UsageError

MAX_UPLOAD = 32 * 2**20
"""Bytes of an uploaded image."""

MAX_BODY = 2**20
"""Bytes of any other request, which are parsed in memory: a prompt has 1,000 characters."""

LOOPBACK = ("localhost", "127.0.0.1", "::1")
_NAME = re.compile(r"[a-z0-9_]([a-z0-9_.-]*[a-z0-9_])?")


class Address(NamedTuple):
    """A host name or IP address in lower case without brackets, and a port; None for the scheme's own."""

    name: str
    port: int | None = None


class Hosts(NamedTuple):
    """The names under which the page is served.

    Attributes:
      allowed: a port of None stands for any.
      proxied: those of them that pages may come from while a proxy names the server by another one.
      literal: whether every IP address is allowed, which DNS rebinding cannot use: it needs a name.
    """

    allowed: frozenset[Address]
    proxied: frozenset[Address] = frozenset()
    literal: bool = False

    def serves(self, address: Address) -> bool:
        """Whether requests to this address are answered."""
        if self.allowed & {address, address._replace(port=None)}:
            return True
        return self.literal and _ip(address.name) is not None


def parse_address(text: str) -> Address | None:
    """`localhost:7860`, `[::1]:7860` or `example.org`; None where it is no such thing."""
    try:
        parts = urlsplit(f"//{text}")
        name, port = (parts.hostname or "").rstrip("."), parts.port
    except ValueError:
        return None
    if parts.netloc != text or "@" in text or not (_ip(name) or _NAME.fullmatch(name)):
        return None
    return Address(name, port)


def hosts_of(host: str, extra: Iterable[str] = ()) -> Hosts:
    """The names of a server that listens on `host`: loopback, the host itself, and what `--allow_host` adds.

    On all interfaces (0.0.0.0 or ::) also the machine's name and every IP address; on a name what it resolves to.
    Loopback names are allowed with any port, as a tunnel (`ssh -L 8000:localhost:7860`) makes them.

    Raises:
      UsageError: an extra one is no host name.
    """
    names, literal = {*LOOPBACK, host.strip("[]").lower()}, False
    ip = _ip(host.strip("[]"))
    if host == "" or (ip is not None and ip.is_unspecified):
        literal = True
        own = socket.gethostname().lower()
        names |= {own, f"{own.partition('.')[0]}.local"}
    elif ip is None:
        names |= {str(found[4][0]).lower() for found in socket.getaddrinfo(host, None)}
    proxied = set()
    for text in extra:
        address = parse_address(text.lower())
        if address is None:
            raise UsageError(f"--allow_host={text}, but must be a host name, such as images.example.org")
        proxied.add(address)
    return Hosts(frozenset(Address(name) for name in names) | proxied, frozenset(proxied), literal)


class Guard:
    """ASGI middleware around the whole page, which refuses with a status and one line of text.

    Bodies are refused by their `Content-Length` before they are read, and others as soon as they are too long.
    """

    def __init__(self, app: Any, hosts: Hosts):
        """Takes the application behind it, and the names of the server."""
        self._app, self._hosts = app, hosts

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Answers, or refuses. Raises what the application does."""
        if scope["type"] not in ("http", "websocket"):
            await self._app(scope, receive, send)
            return
        headers: dict[str, str] = {}
        for name, value in scope["headers"]:
            headers.setdefault(name.decode("latin-1").lower(), value.decode("latin-1"))
        reason = foreign(headers, self._hosts)
        if reason:
            await _refuse(scope, send, 403, reason)
            return
        limit = MAX_UPLOAD if scope["path"].rstrip("/").endswith("/upload") else MAX_BODY
        length = headers.get("content-length", "0")
        # The form around an uploaded file takes some bytes; gradio holds the file itself to the bound.
        if not length.isdigit() or int(length) > limit + 2**16:
            await _refuse(scope, send, 413, _too_long(limit))
            return
        await self._app(scope, _counted(receive, limit), _closed(send))


def foreign(headers: dict[str, str], hosts: Hosts) -> str:
    """Why a request with these headers is not for this page; empty where it is."""
    host = parse_address(headers.get("host", ""))
    for name in ("host", "x-forwarded-host"):  # the second one ends up in the addresses that gradio answers with
        for text in headers.get(name, "").split(",") if name == "host" or name in headers else ():
            address = parse_address(text.strip())
            if address is None or not hosts.serves(address):
                return f"the page is not served as {_shown(text)}: {_hint(address)}"
    origin = headers.get("origin")
    if origin is None:
        return ""
    scheme, _, rest = origin.partition("://")
    default = {"http": 80, "https": 443}.get(scheme)
    address = parse_address(rest) if default else None
    with_port = lambda a: a._replace(port=a.port or default)
    if address and host and with_port(address) == with_port(host):
        return ""
    if address and hosts.proxied & {address, with_port(address), address._replace(port=None)}:
        return ""
    return f"requests from pages of {_shown(origin)} are not answered: {_hint(address)}"


def _hint(address: Address | None) -> str:
    name = address.name if address else "NAME"
    return f"if it is a name of this server, start the app with --allow_host={name}"


def _shown(text: str) -> str:
    return repr(text if len(text) <= 100 else f"{text[:97]}...")


def _too_long(limit: int) -> str:
    return f"a request of this kind has at most {limit // 2**20} MiB"


def _counted(receive: Any, limit: int) -> Any:
    """The same body, or HTTP error 413 where it goes beyond the limit."""
    from starlette.exceptions import HTTPException

    read = 0

    async def counted() -> Any:
        nonlocal read
        message = await receive()
        read += len(message.get("body", b""))
        if read > limit + 2**16:
            raise HTTPException(413, _too_long(limit), {"connection": "close"})
        return message

    return counted


def _closed(send: Any) -> Any:
    """Without gradio's permission for pages of other sites, which none needs that gets this far."""

    async def closed(message: Any) -> None:
        if message["type"] == "http.response.start":
            kept = [(k, v) for k, v in message.get("headers", ()) if not k.lower().startswith(b"access-control-")]
            message = {**message, "headers": kept}
        await send(message)

    return closed


async def _refuse(scope: Any, send: Any, status: int, reason: str) -> None:
    if scope["type"] == "websocket":
        await send({"type": "websocket.close", "code": 1008, "reason": reason[:100]})
        return
    body = f"{reason}\n".encode()
    headers = [(b"content-type", b"text/plain; charset=utf-8"), (b"x-content-type-options", b"nosniff")]
    headers += [(b"content-length", str(len(body)).encode()), (b"connection", b"close")]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def _ip(name: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(name)
    except ValueError:
        return None
