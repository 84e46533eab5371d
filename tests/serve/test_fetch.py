"""Images by URL: from the hosts that were named, at public addresses, with the name's own certificate, whole, small and soon."""

# ruff: noqa: E402 - what is imported below needs the extras asked for above it

import socket
import ssl
import threading
import time

import pytest

for extra in ("fastapi", "uvicorn", "prometheus_client"):
    pytest.importorskip(extra, reason=f"{extra} is part of the extra `serve`")
pytest.importorskip("PIL.Image", reason="Pillow is part of the extra `serve`")

from http_server import running
from image_models import encoded, picture
from image_server import CHAT, body, generated, image, said, service

from foveal.errors import InputError
from foveal.serve.fetch import Fetcher, is_public
from foveal.serve.images import ImageLimits
from foveal.serve.limits import Limits

HOST = "images.example"
# A key pair for these tests alone: the certificate is of images.example, signed by itself.
PEM = """\
-----BEGIN PRIVATE KEY-----
MIGHAgEAMBMGByqGSM49AgEGCCqGSM49AwEHBG0wawIBAQQgq6yHICLehfvIZRZo
3z+w1k1VTRfAm+ZKqvhRUT/YyYOhRANCAAQ1twSTG+YZjf4FRWvfwswli1mmFS54
fHYAR3LW+TmxW5KKlx3En7u2iP6fxjUsYH/C6TklUDK20OlNfhjcvKV5
-----END PRIVATE KEY-----
-----BEGIN CERTIFICATE-----
MIIBcDCCARagAwIBAgIBATAKBggqhkjOPQQDAjAZMRcwFQYDVQQDDA5pbWFnZXMu
ZXhhbXBsZTAgFw0yMDAxMDEwMDAwMDBaGA8yMTIwMDEwMTAwMDAwMFowGTEXMBUG
A1UEAwwOaW1hZ2VzLmV4YW1wbGUwWTATBgcqhkjOPQIBBggqhkjOPQMBBwNCAAQ1
twSTG+YZjf4FRWvfwswli1mmFS54fHYAR3LW+TmxW5KKlx3En7u2iP6fxjUsYH/C
6TklUDK20OlNfhjcvKV5o00wSzAZBgNVHREEEjAQgg5pbWFnZXMuZXhhbXBsZTAP
BgNVHRMBAf8EBTADAQH/MB0GA1UdDgQWBBQjqT0mkvKcUzhtxEEiQ/TXtC9KHDAK
BggqhkjOPQQDAgNIADBFAiBcaAfqXh2ZBIDJer3OXH7d9Phm9kR/f2JQZ53u9MHx
yQIhAJuRWfVrdyUZkTrAswO3nmq/bUDB/IEA+ayfql1jJXRQ
-----END CERTIFICATE-----
"""
FILE = encoded(picture(1))
OK = b"HTTP/1.1 200 OK\r\nContent-Type: image/png\r\n"


class Site:
    """A web site on this machine: `answers` maps paths to the bytes that come back, or to a function of the connection."""

    def __init__(self, folder):
        pem = folder / "site.pem"
        pem.write_text(PEM)
        self.context = ssl.create_default_context(cafile=pem)
        own = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        own.load_cert_chain(pem)
        self._own, self.asked, self.resolved = own, [], []
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port = self.listener.getsockname()[1]
        self.answers = {
            "/good.png": OK + b"Content-Length: %d\r\n\r\n" % len(FILE) + FILE,
            "/no-length.png": OK + b"\r\n" + FILE,
            "/query.png?size=1&x=%20": OK + b"\r\n" + FILE,
            "/moved": b"HTTP/1.1 302 Found\r\nLocation: https://127.0.0.1/good.png\r\nContent-Length: 0\r\n\r\n",
            "/none": b"HTTP/1.1 404 Secret words\r\nContent-Length: 0\r\n\r\n",
            "/large": OK + b"\r\n" + bytes(300_000),
            "/said-large": OK + b"Content-Length: 999999999\r\n\r\n" + bytes(300_000),
            "/short": OK + b"Content-Length: 100000\r\n\r\n" + FILE,
            "/empty": OK + b"Content-Length: 0\r\n\r\n",
            "/nonsense": b"this is not HTTP\r\n\r\n",
            "/headers": b"HTTP/1.1 200 OK\r\n" + b"".join(b"X-%d: y\r\n" % i for i in range(5000)) + b"\r\n",
            "/text": OK + b"\r\nno image",
            "/slow": self._drip,
            "/silent": lambda link: time.sleep(3),
        }
        threading.Thread(target=self._serve, daemon=True).start()

    def _drip(self, link):
        link.sendall(OK + b"\r\n")
        for _ in range(60):  # a byte again and again: each wait is short
            time.sleep(0.05)
            link.sendall(b"x")

    def _serve(self):
        while True:
            try:
                plain, _ = self.listener.accept()
            except OSError:
                return
            threading.Thread(target=self._answer, args=(plain,), daemon=True).start()

    def _answer(self, plain):
        try:
            with self._own.wrap_socket(plain, server_side=True) as link:
                asked = b""
                while b"\r\n\r\n" not in asked:
                    asked += link.recv(4096) or b"\r\n\r\n"
                self.asked.append(asked)
                answer = self.answers[asked.split()[1].decode()]
                answer(link) if callable(answer) else link.sendall(answer)
        except OSError:
            pass  # who asked has hung up

    def resolve(self, host, port):
        self.resolved.append(host)
        return ["127.0.0.1"]

    def fetcher(self, **how):
        own = {
            "seconds": 1.0,
            "resolve": self.resolve,
            "allowed": lambda a: True,
            "port": self.port,
            "context": self.context,
        }
        return Fetcher((HOST, "other.example"), **own | how)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    found = Site(tmp_path_factory.mktemp("site"))
    yield found
    found.listener.close()


@pytest.fixture(scope="module")
def server(site):
    limits = Limits(images=ImageLimits(nbytes=200_000))
    with running(service("idefics3", limits=limits)) as found:
        found.service.api.fetcher = site.fetcher()
        yield found


def url(path, host=HOST):
    return image(f"https://{host}{path}")


def refused(server, part):
    status, answer = server.post(CHAT, body("see", part), wait=30)
    assert status == 400, answer
    assert server.service.api.room.held == 0
    assert answer["error"]["message"].startswith("messages[0].content[1]: ")
    assert "Secret" not in answer["error"]["message"]
    return answer["error"]["message"]


@pytest.mark.parametrize("path", ["/good.png", "/no-length.png", "/query.png?size=1&x=%20"])
def test_an_image_of_a_named_host_is_shown(server, site, path):
    before = len(site.resolved)
    wanted = generated("idefics3", "see", picture(1))[0]
    assert said(server, body("see", url(path)))[0] == wanted
    assert site.resolved[before:] == [HOST]  # once: another answer a moment later would change nothing
    assert b"\r\nHost: images.example\r\n" in site.asked[-1] and b"ookie" not in site.asked[-1]


@pytest.mark.parametrize(
    ("path", "why"),
    [
        ("/moved", "redirects are not followed"),
        ("/none", "status 404"),
        ("/large", "200,000 bytes"),
        ("/said-large", "200,000 bytes"),
        ("/short", "broke off"),
        ("/empty", "broke off"),
        ("/nonsense", "could not be reached"),
        ("/headers", "could not be reached"),
        ("/text", "no PNG"),
        ("/slow", "within 1 s"),
        ("/silent", "within 1 s"),
    ],
)
def test_an_answer_that_is_none_is_one_sentence(server, site, path, why):
    asked, began = len(site.asked), time.monotonic()
    assert why in refused(server, url(path))
    assert len(site.asked) == asked + 1 and time.monotonic() - began < 2.5


@pytest.mark.parametrize(
    "text",
    [
        "http://images.example/good.png",
        "https://images.example:8443/good.png",
        "https://user:word@images.example/good.png",
        "https://evil.example/good.png",
        "https://images.example.evil.example/good.png",
        "https://evil.example#images.example/good.png",
        "https://images.example@127.0.0.1/good.png",
        "https://127.0.0.1/good.png",
        "https://images.example./good.png",
        "https://images.example/a b\r\nX-Evil: 1",
        "https://[::1/good.png",
        "ftp://images.example/good.png",
        "file:///etc/passwd",
        "//images.example/good.png",
        "https://images.example:99999/x",
        "https://imäges.example/",
    ],
)
def test_another_url_is_not_asked_for(server, site, text):
    before = len(site.resolved), len(site.asked)
    refused(server, image(text))
    assert (len(site.resolved), len(site.asked)) == before


def test_an_error_waits_for_what_is_still_fetched(server, site, monkeypatch):
    fetcher, ended = site.fetcher(seconds=0.3), []
    real = fetcher.fetch

    def watched(place, most):
        try:
            return real(place, most)
        finally:
            ended.append(place.index)

    monkeypatch.setattr(fetcher, "fetch", watched)
    monkeypatch.setattr(server.service.api, "fetcher", fetcher)
    status, answer = server.post(CHAT, body(url("/none"), url("/silent"), url("/none")), wait=30)
    assert status == 400 and answer["error"]["message"].startswith("messages[0].content[0]: ")
    assert sorted(ended) == [0, 1, 2] and server.service.api.room.held == 0


def test_a_name_at_a_private_address_is_refused(server, site, monkeypatch):
    before = len(site.asked)
    for found in (["127.0.0.1"], ["8.8.8.8", "10.0.0.1"], []):
        fetcher = site.fetcher(resolve=lambda host, port, found=found: found, allowed=is_public)
        monkeypatch.setattr(server.service.api, "fetcher", fetcher)
        assert "public address" in refused(server, url("/good.png"))
    assert len(site.asked) == before


def test_the_certificate_must_be_the_name_s(server, site, monkeypatch):
    asked = len(site.asked)
    assert "could not be reached" in refused(server, url("/good.png", "other.example"))  # at the same address
    monkeypatch.setattr(server.service.api, "fetcher", site.fetcher(context=ssl.create_default_context()))
    assert "could not be reached" in refused(server, url("/good.png"))  # signed by nobody who is known
    assert len(site.asked) == asked


def test_what_is_a_public_address():
    private = "127.0.0.1 10.1.2.3 172.16.0.1 192.168.1.1 169.254.169.254 100.64.0.1 0.0.0.0 224.0.0.1 240.0.0.1 255.255.255.255"
    private += " ::1 :: fe80::1 fe80::1%eth0 fc00::1 fd00:ec2::254 ff02::1 ::ffff:127.0.0.1 ::ffff:8.8.8.8 64:ff9b::a00:1 2002:7f00:1::"
    private += " 2001:0:1:2:3:4:5:6 2001:db8::1 fec0::1 64:ff9b:1::1 ::7f00:1 192.0.2.1 198.18.0.1"
    assert [a for a in private.split() if is_public(a)] == []
    assert all(map(is_public, ("8.8.8.8", "93.184.215.14", "2606:4700::1111")))


@pytest.mark.parametrize(
    "host",
    [
        "",
        "https://a.example",
        "a.example:8443",
        "a.example/x",
        "A.example",
        "u@a.example",
        "::1",
        "ä.example",
        "a.example.",
        "a b",
    ],
)
def test_hosts_that_are_none_are_refused_at_the_start(host):
    with pytest.raises(InputError, match="--image-hosts"):
        Fetcher((host,))
