"""Replicas on a local Ray cluster of several nodes: one is killed under load, nothing accepted is lost, and service returns."""

# ruff: noqa: E402 - what is imported below needs the extras asked for above it

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import Request as HttpRequest
from urllib.request import urlopen

import pytest

for extra in ("fastapi", "uvicorn", "prometheus_client"):
    pytest.importorskip(extra, reason=f"{extra} is part of the extra `serve`")
ray = pytest.importorskip("ray", reason="ray is the extra `ray`")

from fake_worker import FakeWorker, byte_tokenizer
from http_server import tiny_model

from foveal.errors import InputError
from foveal.serve.app import Service
from foveal.serve.cluster import RemoteWorker, _reason, application, serve_on_ray
from foveal.serve.launch import Plan
from foveal.serve.request import Full, Request

pytestmark = pytest.mark.xdist_group("ray")  # clusters on one machine: one at a time
HERE = Path(__file__).parent


def make_worker():
    tokenizer = byte_tokenizer()
    return FakeWorker(tokenizer, step=0.02, context=4000), tokenizer


def make_service(worker):
    return Service(worker, byte_tokenizer(), name="fake")


def start(place):
    """Two nodes. Ray gives a node half a minute to start, which a machine that does much else may exceed."""
    from ray.cluster_utils import Cluster

    node = {"num_cpus": 2, "object_store_memory": 80 << 20}
    for _ in range(3):
        cluster = Cluster()
        try:
            cluster.add_node(**node, temp_dir=place, include_dashboard=False)
            cluster.add_node(**node)
            return cluster
        except Exception as error:
            cluster.shutdown()
            if "startup" not in str(error):
                raise
    raise RuntimeError("no Ray node started within half a minute, three times")


@pytest.fixture(scope="module")
def url():
    from ray import serve

    os.environ["PYTHONPATH"] = os.pathsep.join([str(HERE), str(HERE.parents[1]), os.environ.get("PYTHONPATH", "")])
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    place = tempfile.mkdtemp(prefix="fv")  # short, for names of sockets; and apart from other clusters of this machine
    cluster = start(place)
    ray.init(address=cluster.address, log_to_driver=False)
    serve.start(proxy_location="HeadOnly", http_options={"host": "127.0.0.1", "port": port})
    app = application(make_worker, make_service, replicas=2, max_running=32, max_waiting=32, num_cpus=0.1)
    serve.run(app, name="foveal", blocking=False)
    yield f"http://127.0.0.1:{port}"
    serve.shutdown()
    ray.shutdown()
    cluster.shutdown()
    shutil.rmtree(place, ignore_errors=True)


def ask(url, text, headers=None, **more):
    body = {"model": "fake", "messages": [{"role": "user", "content": text}], **more}
    request = HttpRequest(
        url + "/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json", **(headers or {})}
    )
    with urlopen(request, timeout=120) as found:
        return found.read().decode()


def content(answer):
    if not answer.startswith("data:"):
        return json.loads(answer)["choices"][0]["message"]["content"]
    events = [json.loads(e[6:]) for e in answer.split("\n\n") if e.startswith("data: {")]
    assert answer.endswith("data: [DONE]\n\n") and not any("error" in e for e in events), answer[-300:]
    return "".join(c["delta"].get("content", "") for e in events for c in e["choices"])


def engines():
    """Names of the engines' actors that are there now."""
    return {a["name"] for a in ray.util.list_named_actors(all_namespaces=True) if "foveal#engine#" in a["name"]}


def test_a_killed_replica_loses_no_accepted_request(url):
    assert content(ask(url, "first")) == "first"
    with pytest.raises(HTTPError) as caught:
        ask(url, "x" * 5000)
    assert json.loads(caught.value.read())["error"]["code"] == "context_length_exceeded"
    answers = {}

    def one(index):
        text = f"request {index} " * 12
        answers[index] = (text.strip(), content(ask(url, text.strip(), stream=index % 2 == 0)))

    threads = [threading.Thread(target=one, args=(i,)) for i in range(16)]
    for thread in threads:
        thread.start()
    time.sleep(1.0)
    victims = engines()
    assert len(victims) == 2
    victim = min(victims)
    ray.kill(ray.get_actor(victim, namespace="serve"))
    for thread in threads:
        thread.join()
    assert len(answers) == 16 and all(said == text for text, said in answers.values())
    end = time.monotonic() + 90
    while len(engines() - {victim}) < 2 and time.monotonic() < end:
        time.sleep(0.5)
    assert len(engines() - {victim}) == 2  # service is whole again
    assert content(ask(url, "after")) == "after"


def test_the_front_sums_what_the_replicas_hold(url):
    def limit():
        with urlopen(url + "/metrics", timeout=30) as found:
            text = found.read().decode()
        return float(re.search(r'foveal_kv_bytes{kind="limit"} (\S+)', text)[1])

    end = time.monotonic() + 150  # the numbers are looked up now and then
    while limit() != 2e6 and time.monotonic() < end:
        time.sleep(0.5)
    assert limit() == 2e6
    with urlopen(url + "/v1/models", timeout=30) as found:
        assert json.loads(found.read())["data"][0]["foveal"]["context"] == 4000


def test_one_key_s_share_is_counted_over_all_replicas():
    worker = RemoteWorker(None, {"methods": {}, "context": 10}, max_live=5, max_per_key=2)
    worker._live = {0: "a", 1: "a", 2: "b"}
    with pytest.raises(Full, match="this key has 2"):
        worker.submit(Request("x", [1], key="a"))
    assert worker.stats().waiting == 3 and not worker.full  # how many run is not known yet
    worker._live |= {3: "c", 4: "c"}
    assert worker.full
    with pytest.raises(Full, match="5 requests"):
        worker.submit(Request("x", [1], key="b"))
    worker._closed.set()


def test_replicas_that_are_no_number():
    for wrong in ("0", "2-1", "many", "-1"):
        with pytest.raises(InputError, match="--replicas"):
            serve_on_ray(Plan(), wrong)


def test_a_port_in_use_is_said_before_anything_starts():
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(InputError, match="--port"):
        serve_on_ray(Plan(port=taken.getsockname()[1]), "1")


def test_what_a_replica_s_exception_said_is_found_in_the_traceback():
    quoted = """Deploying application foveal failed: The deployment failed to start 3 times in a row. Error:
ray::ServeReplica:foveal:engine.initialize_and_get_metadata() (pid=3, ip=192.0.2.2)
  File "menu.py", line 88, in __init__
    raise InputError(
foveal.errors.InputError: 100 usable bytes of cache cannot hold one short request: give the server more memory"""
    assert _reason(quoted).startswith("100 usable bytes of cache cannot")
    assert _reason("gone\nmore") == "gone"


def test_the_command_deploys_serves_and_stops_when_told(tmp_path):
    """`foveal serve --ray` as a process with a model of its own: keys, an answer, one more while it stops, exit code 0."""
    model, key = tmp_path / "tiny", "key-of-the-test"
    tiny_model().save_pretrained(model)
    byte_tokenizer().save_pretrained(model)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    place = tempfile.mkdtemp(prefix="fv")
    command = [sys.executable, "-m", "foveal.cli", "serve", str(model), "--ray", "--replicas", "1", "--name", "fake"]
    command += ["--port", str(port), "--memory", "0.05", "--device", "cpu"]
    environment = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"}
    paths = os.pathsep.join([str(HERE.parents[1]), os.environ.get("PYTHONPATH", "")])
    environment |= {"RAY_TMPDIR": place, "OMP_NUM_THREADS": "1", "FOVEAL_API_KEY": key, "PYTHONPATH": paths}
    url, headers = f"http://127.0.0.1:{port}", {"Authorization": f"Bearer {key}"}
    log = lambda: (tmp_path / "log").read_text()
    for _ in range(3):  # Ray gives itself half a minute, see `start`
        with (tmp_path / "log").open("w") as said:
            process = subprocess.Popen(command, env=environment, stdout=said, stderr=said)
        end = time.monotonic() + 300
        while "serving at" not in log() and process.poll() is None and time.monotonic() < end:
            time.sleep(0.5)
        if process.poll() is None:
            break
        assert process.returncode == 2 and "Ray cannot be started or reached" in log(), log()[-3000:]
    try:
        with pytest.raises(HTTPError) as caught:
            ask(url, "hello")
        assert caught.value.code == 401
        found = json.loads(ask(url, "hello", headers, max_tokens=5, temperature=0))
        assert found["usage"]["completion_tokens"] <= 5 < found["usage"]["kept_tokens"]
        last = []
        late = threading.Thread(target=lambda: last.append(ask(url, "tell", headers, max_tokens=300, temperature=0)))
        late.start()
        time.sleep(0.3)
        process.send_signal(signal.SIGTERM)
        assert process.wait(120) == 0, log()[-3000:]
        late.join()
        assert json.loads(last[0])["choices"][0]["finish_reason"] in ("stop", "length")
        assert key not in log() and "POST /v1/chat/completions 200" in log() and "Traceback" not in log()
    finally:
        process.kill()
        process.wait()
        shutil.rmtree(place, ignore_errors=True)
