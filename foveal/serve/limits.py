"""Bounds of the HTTP side: sizes and times, who may call from where, and a protocol that holds connections to them."""

from __future__ import annotations

import ipaddress
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from .images import ImageLimits
from .schema import ApiError


@dataclass(frozen=True)
class Limits:
    """What one client may ask for. Sizes in bytes, times in seconds; the values are this server's own choice."""

    body: int = 4 << 20
    headers: int = 16 << 10
    connections: int = 256
    header_time: float = 10.0  # from connecting, or from the last answer, to the end of the headers
    body_time: float = 30.0
    send_time: float = 30.0  # a reader that takes nothing for so long is cut off
    deadline: float = 600.0  # the longest a request may take
    ping: float = 15.0  # silence in a stream before a comment keeps proxies from closing it
    drain: float = 30.0
    render_time: float = 2.0
    choices: int = 8
    default_tokens: int = 1024  # of a chat answer whose request names no length
    images: ImageLimits = field(default_factory=ImageLimits)


class Guard:
    """Says whether a request may come from where it claims to: `Host` names this server, `Origin` is the server's own page.

    host: what the server is bound to. allowed: further names it is reached by; on an address that is not loopback, none means any.
    """

    def __init__(self, host: str, allowed: tuple[str, ...] = ()):
        self.names = {"localhost", "127.0.0.1", "::1", host.lower(), *(name.lower() for name in allowed)}
        self.any_host = not is_loopback(host) and not allowed

    def check(self, headers: Mapping[str, str]) -> None:
        """Raise ApiError 403 for a foreign page or a name that is not this server's (DNS rebinding)."""
        host = headers.get("host", "")
        if not self.any_host and _hostname(host) not in self.names:
            raise ApiError(403, "the Host header does not name this server", code="host_not_allowed")
        origin = headers.get("origin")
        if origin is not None and _netloc(origin) != host.lower():
            raise ApiError(403, "requests from other web pages are refused", code="origin_not_allowed")
        if headers.get("sec-fetch-site", "none") not in ("none", "same-origin"):
            raise ApiError(403, "requests from other web pages are refused", code="origin_not_allowed")


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches the address."""
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _netloc(origin: str) -> str:
    """Host and port of an Origin header, "" where it is not a web page's."""
    try:
        parts = urlsplit(origin.lower())
    except ValueError:
        return ""
    return parts.netloc if parts.scheme in ("http", "https") else ""


def _hostname(host: str) -> str:
    try:
        return urlsplit(f"//{host.lower()}").hostname or ""
    except ValueError:
        return ""


def bounded_protocol(limits: Limits) -> type[H11Protocol]:
    """uvicorn's HTTP/1.1 protocol with a bound on connections and on how long headers may take, errors in OpenAI's shape, and
    `scope["state"]["abort"]`, which cuts a connection whose reader has stopped."""

    class Bounded(H11Protocol):
        waiting = None

        def connection_made(self, transport) -> None:
            super().connection_made(transport)
            if len(self.connections) > limits.connections:
                transport.write(_plain(503, "too many connections: try again in a second", "Retry-After: 1\r\n"))
                transport.close()
                return
            self.app_state = {**self.app_state, "abort": transport.abort}
            self._expect_headers()

        def connection_lost(self, exc) -> None:
            self._headers_came()
            super().connection_lost(exc)

        def data_received(self, data: bytes) -> None:
            if self.transport.is_closing():
                return
            super().data_received(data)
            if self.cycle is not None and not self.cycle.response_complete:
                self._headers_came()

        def on_response_complete(self) -> None:
            self._expect_headers()
            super().on_response_complete()

        def send_400_response(self, msg: str) -> None:
            unanswered = self.cycle is None or not self.cycle.response_started or self.cycle.response_complete
            if unanswered and self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
                self.transport.write(_plain(400, "this is not a valid HTTP request"))
            self.transport.close()

        def _expect_headers(self) -> None:
            self._headers_came()
            self.waiting = self.loop.call_later(limits.header_time, self.transport.abort)

        def _headers_came(self) -> None:
            if self.waiting is not None:
                self.waiting.cancel()
                self.waiting = None

    return Bounded


def _plain(status: int, message: str, more: str = "") -> bytes:
    body = json.dumps(ApiError(status, message).body()).encode()
    phrase = {400: "Bad Request", 503: "Service Unavailable"}[status]
    head = f"HTTP/1.1 {status} {phrase}\r\ncontent-type: application/json\r\n{more}content-length: {len(body)}\r\nconnection: close\r\n\r\n"
    return head.encode() + body


def announced_length(scope: dict[str, Any]) -> int:
    """Bytes of the body by its Content-Length; 0 without one, or where it is no number."""
    text = dict(scope["headers"]).get(b"content-length", b"0")
    return int(text[:20]) if text.isdigit() else 0


async def read_body(scope: dict[str, Any], receive, limit: int) -> bytes:
    """The request's body. Raises ApiError 413 past `limit` bytes, before reading where its length is announced; ConnectionError when the
    client has gone."""
    headers = dict(scope["headers"])
    announced = headers.get(b"content-length", b"0")
    too_large = ApiError(413, f"the body has more than {limit:,} bytes: shorten it", code="body_too_large")
    if not announced.isdigit() or int(announced[:20]) > limit:
        raise too_large
    body = bytearray()
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ConnectionError
        body += message.get("body", b"")
        if len(body) > limit:
            raise too_large
        if not message.get("more_body", False):
            return bytes(body)
