"""Two Ray nodes on this machine: the results of one process, also where a worker or a node is lost on the way."""

import os
import signal
from pathlib import Path

import pytest

pytest.importorskip("ray")

import ray
from crews import Broken, Summer
from models import tiny
from ray.cluster_utils import Cluster
from test_tasks import characters

from foveal.compare import compare
from foveal.scale import Lost, WorkersError, crew, pool
from foveal.tasks import get_task
from foveal.tune import tune
from foveal.verify import BytesAtMost, Claim
from foveal.verify import run as verify_run

pytestmark = pytest.mark.xdist_group("ray")  # clusters on one machine: one at a time
ROOM = {"object_store_memory": 100 * 2**20}


@pytest.fixture(scope="module")
def cluster():
    os.environ["PYTHONPATH"] = os.pathsep.join(map(str, (Path(__file__).parent, Path.cwd())))  # what nodes begin with
    os.environ["OMP_NUM_THREADS"] = "1"
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1} | ROOM)
    cluster.second = cluster.add_node(num_cpus=1, **ROOM)
    cluster.wait_for_nodes()
    yield cluster
    ray.shutdown()
    cluster.shutdown()


@pytest.fixture(scope="module")
def tools():
    return tiny("llama", vocab_size=257, max_position_embeddings=1024), characters(chat_template=None)


def test_cells_run_on_both_nodes_and_one_of_a_killed_worker_runs_again(cluster, tools, tmp_path):
    with crew(Summer, *tools) as here:
        want = dict(here.each([3, 17, 40]))
    with crew(Summer, *tools, ray=cluster.address) as hands:
        assert hands.size == 2
        first = dict(hands.each([("sleep", 8)] * 2))
        assert len(set(first.values())) == 2
        got = dict(hands.each([3, ("die", str(tmp_path / "once")), 17, 40]))
        assert got[1] == "alive" and [got[i] for i in (0, 2, 3)] == list(want.values())
        pids = []

        def begin(i):
            if i == 2 and pids:  # a worker is killed from outside
                os.kill(pids.pop(), signal.SIGKILL)

        pids += dict(hands.each([("pid",)], at_once=1)).values()
        assert len(dict(hands.each([("sleep", 1), ("sleep", 1), 3], begin))) == 3
        assert isinstance(dict(hands.each([("die",)]))[0], Lost)


def records(result):
    return [(r.method, r.budget, r.task, r.length, r.score, r.kv_bytes, r.n, r.status) for r in result.records]


def test_a_comparison_goes_on_where_a_node_is_lost(cluster, tools, tmp_path):
    plan = {
        "methods": ("h2o", "quest", "streaming-llm"),
        "tasks": [get_task("passkey", max_new_tokens=6), get_task("perplexity", max_new_tokens=8)],
        "lengths": (500,),
        "samples": 24,
    }
    want = compare(*tools, **plan)
    lines = []

    def lose(line, share):
        lines.append(line)
        if len(lines) == 4:
            cluster.remove_node(cluster.second, allow_graceful=False)

    found = compare(*tools, **plan, ray=cluster.address, journal=tmp_path / "answers.jsonl", progress=lose)
    assert records(found) == records(want)
    assert found.meta["workers"] == {"count": 2, "on": "ray"}
    lines.clear()
    plan |= {"progress": lambda line, share: lines.append(line), "journal": tmp_path / "answers.jsonl"}
    again = compare(*tools, **plan, ray=cluster.address)
    assert records(again) == records(want) and lines == ["done"]
    cluster.second = cluster.add_node(num_cpus=1, **ROOM)
    cluster.wait_for_nodes()


def test_tune_and_verify_give_what_one_process_gives(cluster, tools, tmp_path, monkeypatch):
    plan = {
        "tasks": [get_task("perplexity", max_new_tokens=4)],
        "length": 300,
        "samples": 4,
        "names": ["h2o", "snapkv"],
        "memory": 0.6,
        "max_drop": 0.9,
    }
    want, got = (tune(*tools, **plan, out=tmp_path / str(r), ray=r) for r in (None, cluster.address))
    assert records(got.comparison) == records(want.comparison) and got.config.method == want.config.method
    claims = {
        name: Claim("w", experiments=(BytesAtMost(f"{name}(budget=0.5)", 0.6, "perplexity", length=300, n=1),))
        for name in ("h2o", "scissorhands")
    }
    monkeypatch.setattr(verify_run, "claims", lambda: claims)
    here, there = (verify_run.verify(*tools, list(claims), ray=r) for r in (None, cluster.address))
    told = [sorted((r.name, r.verdict, str(r.findings)) for r in found.results) for found in (here, there)]
    assert told[0] == told[1] and len(told[0]) == 2


def test_workers_that_cannot_start_are_told(cluster, tools, monkeypatch):
    monkeypatch.setattr(pool, "PATIENCE", 90)
    with (
        crew(Broken, *tools, workers=1, ray=cluster.address) as hands,
        pytest.raises(WorkersError, match="cannot start"),
    ):
        dict(hands.each([3]))
