"""`foveal serve` as a process: bad input at start, kill -9, a full disk under the log, a signal to stop; on a tiny model."""

# ruff: noqa: E402 - what is imported below needs the extras asked for above it

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from urllib.error import URLError
from urllib.request import Request, urlopen

import pytest

for extra in ("fastapi", "uvicorn", "prometheus_client"):
    pytest.importorskip(extra, reason=f"{extra} is part of the extra `serve`")

import torch
from fake_worker import byte_tokenizer
from http_server import tiny_model

from foveal.errors import InputError, ModelFileError
from foveal.hub import model_identity
from foveal.method import get_method
from foveal.profile import Profile
from foveal.serve.launch import Plan, check_files
from foveal.serve.run import listen


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    found = tmp_path_factory.mktemp("tiny")
    tiny_model().save_pretrained(found)
    byte_tokenizer().save_pretrained(found)
    return found


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as found:
        return found.getsockname()[1]


def test_bad_options_are_refused_in_one_sentence_before_anything_is_loaded(tmp_path):
    wrong = {
        "without-key": Plan(host="0.0.0.0"),
        "snapkv": Plan(method="snapkw"),
        "dense attention": Plan(budget=0.5),
        "a profile says": Plan(profile="x.toml", method="h2o"),
        "cannot read the profile": Plan(profile="nothing.toml"),
        "--memory": Plan(memory=float("nan")),
        "--deadline": Plan(deadline=0.0),
        "--context": Plan(context=1),
        "ASCII": Plan(api_keys=("short",)),
        "parameters": Plan(allow=("x=h2o(budget=)",)),
        "the name is empty": Plan(allow=("=h2o",)),
        "the server's own": Plan(allow=("default=h2o",)),
        "there already": Plan(allow=("a=h2o", "a=snapkv")),
        "no method that takes one": Plan(method="dense", budgets=(0.5,)),
    }
    for sentence, plan in wrong.items():
        with pytest.raises(InputError, match=sentence):
            plan.check()
    Plan(host="0.0.0.0", api_keys=("long-enough-key",)).check()
    Plan(allow=("half=h2o(budget=0.5)",), budgets=(0.5,)).check()
    # What could never be taken is refused for good, not told to try again.
    assert [
        Plan(**few).limits.choices for few in ({}, {"max_per_key": 3}, {"max_waiting": 2}, {"max_choices": 20})
    ] == [8, 3, 2, 20]
    assert Plan(allow=("half=h2o(budget=0.5)", "h2o(budget=0.25)", "dense")).offered == {
        "half": "h2o(budget=0.5)",
        "h2o(budget=0.25)": "h2o(budget=0.25)",
        "dense": "dense",
    }


def test_a_port_in_use_and_an_address_elsewhere():
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(InputError, match=r"use\): choose .* --port"):
        listen("127.0.0.1", taken.getsockname()[1])
    with pytest.raises(InputError):
        listen("192.0.2.1", 0)


def test_pickles_are_not_loaded(folder, tmp_path):
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    torch.save({}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ModelFileError, match="safetensors"):
        check_files(str(tmp_path))
    check_files(str(folder))


def test_a_profile_of_another_model_and_memory_for_nothing(folder, tmp_path):
    profile = Profile(get_method("h2o", budget=0.5), model_identity(tiny_model(seed=1)))
    profile.save(tmp_path / "foveal.toml")
    with pytest.raises(InputError, match="was made for"):
        Plan(model=str(folder), profile=str(tmp_path / "foveal.toml"), device="cpu").worker()
    with pytest.raises(InputError, match="memory"):
        Plan(model=str(folder), memory=1e-7, device="cpu").worker()


class Process:
    """A served process and its address."""

    def __init__(self, *arguments, stderr, own=()):
        self.port = free_port()
        command = [
            sys.executable,
            "-m",
            "foveal.cli",
            "serve",
            *arguments,
            "--port",
            str(self.port),
            "--device",
            "cpu",
            *own,
        ]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
        self.process = subprocess.Popen(command, stderr=stderr, stdout=subprocess.DEVNULL, env=environment)

    def ask(self, path, body=None, timeout=30):
        data = None if body is None else json.dumps(body).encode()
        request = Request(f"http://127.0.0.1:{self.port}{path}", data, {"Content-Type": "application/json"})
        with urlopen(request, timeout=timeout) as found:
            return json.loads(found.read())

    def ready(self, seconds=150):
        end = time.monotonic() + seconds
        while time.monotonic() < end and self.process.poll() is None:
            with contextlib.suppress(URLError, OSError):
                return self.ask("/health", timeout=10)
            time.sleep(0.2)
        pytest.fail("the server never became ready")

    def children(self):
        return [int(p) for p in Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_process_lives_through_kill_9_and_a_full_disk_and_stops_when_told(folder):
    body = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 5, "temperature": 0}
    with Path("/dev/full").open("w") as full:
        served = Process(str(folder), "--method", "h2o", "--budget", "0.5", stderr=full)
    try:
        assert served.ready() == {"status": "ok"}
        first = served.ask("/v1/chat/completions", body)
        assert first["usage"]["completion_tokens"] <= 5 and first["usage"]["kept_tokens"] > 0
        (engine,) = served.children()
        os.kill(engine, signal.SIGKILL)
        assert served.ready() == {"status": "ok"}
        assert served.children() != [engine]
        again = served.ask("/v1/chat/completions", body)
        assert again["choices"][0]["message"] == first["choices"][0]["message"]
        served.process.send_signal(signal.SIGTERM)
        assert served.process.wait(40) == 0
    finally:
        served.process.kill()
        served.process.wait()


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (("--memory", "0.0000001"), b"give the server more memory"),
        (("--method", "snapkw"), b"snapkv"),
        (("--port", "TAKEN"), b"choose another with --port"),
    ],
)
def test_bad_input_ends_the_command_with_2(folder, options, sentence):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        own = [str(taken.getsockname()[1]) if option == "TAKEN" else option for option in options]
        served = Process(str(folder), own=own, stderr=subprocess.PIPE)
        _, said = served.process.communicate(timeout=150)
    assert served.process.returncode == 2
    assert sentence in b" ".join(said.split()) and b"error: " in said and b"Traceback" not in said
