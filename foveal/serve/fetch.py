"""Images by URL, from hosts the server was told of and from no others: https alone, one address, no redirects, nothing private.

A name is resolved once and the connection goes to the address that was looked at, so a name that changes its mind in between (DNS
rebinding) changes nothing; the certificate must still be the name's.
"""

from __future__ import annotations

import asyncio
import http.client
import io
import ipaddress
import re
import socket
import ssl
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from urllib.parse import urlsplit

from ..errors import InputError
from .images import ImageLimits, Place, file_of

_PIECE = 64 << 10
_HOST = re.compile(r"[a-z0-9]([a-z0-9.-]*[a-z0-9])?")


def resolve(host: str, port: int) -> list[str]:
    """The addresses of a host. Raises OSError where it has none."""
    return [found[4][0] for found in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)]


def is_public(address: str) -> bool:
    """Whether an address is of the internet at large: not this machine, not a private net, not a cloud's own."""
    found = ipaddress.ip_address(address.partition("%")[0])
    # Other addresses in disguise; those of NAT64 and Teredo are reserved or private in any case.
    if found.version == 6 and (found.ipv4_mapped or found.sixtofour or found.is_site_local):
        return False
    return found.is_global and not (found.is_multicast or found.is_reserved)


class Fetcher:
    """Fetches images of `hosts`, names without ports. seconds: for one image from the name to the last byte.

    resolve, allowed, port, context: how names become addresses, which of these may be asked, where, and whose certificates count.
    Raises InputError for a host that is none.
    """

    def __init__(
        self,
        hosts: Sequence[str],
        *,
        seconds: float = 10.0,
        resolve: Callable[[str, int], list[str]] = resolve,
        allowed: Callable[[str], bool] = is_public,
        port: int = 443,
        context: ssl.SSLContext | None = None,
    ):
        for host in hosts:
            if not _HOST.fullmatch(host):
                raise InputError(
                    f"--image-hosts '{host}': expected names of hosts such as images.example.org, in small letters of ASCII"
                )
        self.hosts, self.seconds, self.port = frozenset(hosts), seconds, port
        self.resolve, self.allowed = resolve, allowed
        self.context = context or ssl.create_default_context()
        self.pool = ThreadPoolExecutor(8, thread_name_prefix="fetch")

    def fetch(self, place: Place, most: int) -> bytes:
        """The file at an image's URL. Raises ApiError 400 that says what is wrong, without the other side's words."""
        host, path = self._target(place)
        end = time.monotonic() + self.seconds
        try:
            addresses = self.resolve(host, self.port)
            if not addresses or not all(map(self.allowed, addresses)):
                raise place.refusal(f"'{host}' is not at a public address", "image_not_fetched")
            with socket.create_connection((addresses[0], self.port), timeout=self._left(end)) as plain:
                plain.settimeout(self._left(end))
                with self.context.wrap_socket(plain, server_hostname=host) as link:
                    return self._read(place, link, host, path, most, end)
        except (OSError, ValueError, http.client.HTTPException) as error:
            late = isinstance(error, TimeoutError)
            why = f"did not answer within {self.seconds:g} s" if late else "could not be reached, or its answer is none"
            raise place.refusal(f"'{host}' {why}", "image_not_fetched") from None

    def _target(self, place: Place) -> tuple[str, str]:
        """Host and path of a URL that may be asked for."""
        url = place.part.image_url.url
        try:
            parts = urlsplit(url)
            port, host = parts.port, parts.hostname or ""
        except ValueError:
            raise place.refusal("this is no URL", "image_not_fetched") from None
        plain = url.isascii() and url.isprintable() and " " not in url and len(url) <= 4096
        if parts.scheme != "https" or not plain or "@" in parts.netloc or port not in (None, 443):
            raise place.refusal("expected a data: URL, or a plain https one without port or user", "image_not_fetched")
        if host not in self.hosts:
            raise place.refusal(
                "images are not fetched from this host: send the image as a data: URL", "image_not_fetched"
            )
        return host, (parts.path or "/") + (f"?{parts.query}" if parts.query else "")

    def _left(self, end: float) -> float:
        left = end - time.monotonic()
        if left <= 0:
            raise TimeoutError
        return left

    def _read(self, place: Place, link: ssl.SSLSocket, host: str, path: str, most: int, end: float) -> bytes:
        link.settimeout(self._left(end))
        link.sendall(f"GET {path} HTTP/1.0\r\nHost: {host}\r\nAccept: image/*\r\nConnection: close\r\n\r\n".encode())
        answer = http.client.HTTPResponse(_Timed(link, lambda: self._left(end)), method="GET")
        with answer:
            answer.begin()
            if answer.status != 200:
                moved = "redirects are not followed" if 300 <= answer.status < 400 else f"status {answer.status}"
                raise place.refusal(f"'{host}' did not give the image ({moved})", "image_not_fetched")
            data = bytearray()
            while piece := answer.read(min(_PIECE, most + 1 - len(data))):
                data += piece
                if len(data) > most:
                    raise place.refusal(f"the file has more than {most:,} bytes: send a smaller one")
        if not data or (answer.length or 0) > 0:
            raise place.refusal(f"'{host}' broke off before the end of the image", "image_not_fetched")
        return bytes(data)


class _Timed(io.RawIOBase):
    """What a socket gives to read, where the time that is left of the whole bounds every wait."""

    def __init__(self, link: ssl.SSLSocket, left: Callable[[], float]):
        self.link, self.left = link, left

    def makefile(self, mode: str) -> io.BufferedReader:
        """What `http.client` reads from."""
        return io.BufferedReader(self, _PIECE)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        self.link.settimeout(self.left())
        return self.link.recv_into(buffer)


async def files_of(found: Sequence[Place], limits: ImageLimits, fetcher: Fetcher | None, pool: Executor) -> list[bytes]:
    """The files of a request's images: decoded in `pool`, or fetched. Raises ApiError 400 that names the image."""
    loop = asyncio.get_running_loop()
    work = [
        loop.run_in_executor(fetcher.pool, fetcher.fetch, place, limits.nbytes)
        if fetcher is not None and place.is_remote
        else loop.run_in_executor(pool, file_of, place, limits)
        for place in found
    ]
    # All are waited for: what went on after an error would hold memory that nobody counts any more.
    files = await asyncio.gather(*work, return_exceptions=True)
    for file in files:
        if isinstance(file, BaseException):
            raise file
    return files
