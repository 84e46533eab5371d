"""A server on a free port of this machine, in a thread of the test's process, and ways to talk to it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from fake_worker import FakeWorker
from transformers import LlamaConfig, LlamaForCausalLM

from foveal.serve.app import Service
from foveal.serve.run import HttpServer, listen


@dataclass
class Server:
    """host and port of a running server, and its parts."""

    service: Service
    port: int
    http: HttpServer

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def worker(self) -> FakeWorker:
        return self.service.worker

    def raw(self, data: bytes, wait: float = 5.0) -> bytes:
        """What comes back for bytes as they are, until the server closes or `wait` seconds are over."""
        found = b""
        with socket.create_connection(("127.0.0.1", self.port), timeout=wait) as link, contextlib.suppress(OSError):
            link.sendall(data)
            while piece := link.recv(65536):
                found += piece
        return found

    def post(self, path: str, body: bytes | dict, headers: str = "", wait: float = 5.0) -> tuple[int, dict]:
        """Status and JSON of one request on its own connection."""
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Type: application/json\r\n"
        answer = self.raw(f"{head}Content-Length: {len(data)}\r\n{headers}\r\n".encode() + data, wait)
        top, _, rest = answer.partition(b"\r\n\r\n")
        return int(top.split()[1]), json.loads(rest)

    def idle(self, seconds: float = 5.0) -> bool:
        """Whether the engine comes to hold nothing within some seconds."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            stats = self.worker.stats()
            if (stats.running, stats.waiting, stats.bytes_used) == (0, 0, 0):
                return True
            time.sleep(0.01)
        return False


@contextlib.contextmanager
def running(service: Service) -> Iterator[Server]:
    """Serve until the block ends."""
    listener = listen("127.0.0.1", 0)
    ready = threading.Event()
    server = HttpServer(lambda: service, service.limits)
    thread = threading.Thread(target=lambda: asyncio.run(server.run_on(listener, ready.set)), daemon=True)
    thread.start()
    assert ready.wait(20)
    try:
        yield Server(service, listener.getsockname()[1], server)
    finally:
        server.should_exit = server.force_exit = True
        thread.join(20)
        listener.close()


def tiny_model(seed: int = 0) -> LlamaForCausalLM:
    """A model for `byte_tokenizer`."""
    torch.manual_seed(seed)
    shape = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=300, max_position_embeddings=512, eos_token_id=299, **shape))
