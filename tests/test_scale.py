"""Work spread over processes gives what one process gives, also where workers die; clusters that are not there are told."""

import socket
import sys
import threading

import pytest
import torch
from crews import Broken, Summer
from models import tiny

from foveal.cli.workers import RayCommand
from foveal.errors import InputError
from foveal.scale import Lost, WorkersError, connect, crew
from foveal.scale import cluster as ray_cluster
from foveal.scale.processes import Processes


@pytest.fixture(scope="module")
def model():
    return tiny("llama")


def done(hands, cells, **more):
    return dict(hands.each(cells, **more))


@pytest.fixture(scope="module")
def hands(model):
    with crew(Summer, model, None, workers=2) as hands:
        yield hands


def test_processes_give_what_this_process_gives(model, hands):
    cells, begun = [3, 17, 40, 9, 5], []
    with crew(Summer, model, None) as here:
        want = done(here, cells)
        assert here.size == 1 and list(want) == [0, 1, 2, 3, 4]
    assert done(hands, cells, begin=begun.append) == want
    assert sorted(begun) == [0, 1, 2, 3, 4]
    assert hands.size == 2 and hands.machines == [{"device": "cpu"}]


def test_a_model_in_another_process_gives_its_hidden_states(model):
    model(torch.arange(1, 9)[None], output_hidden_states=True)  # leaves hooks that no pickle takes
    with crew(Summer, model, None, workers=1) as hands:
        assert done(hands, [("states",)]) == {0: model.config.num_hidden_layers + 1}


def test_both_work_at_once_unless_told_otherwise(hands):
    assert len(set(done(hands, [("sleep", 0.3)] * 4).values())) == 2
    assert len(set(done(hands, [("pid",)] * 4, at_once=1).values())) == 1


def test_what_a_dead_worker_had_goes_to_another(hands, tmp_path):
    cells = [3, ("die", str(tmp_path / "once")), 4, 5]
    got = done(hands, cells)
    assert got[1] == "alive"
    assert [len(got[i]) for i in (0, 2, 3)] == [128] * 3


def test_a_cell_that_kills_every_worker_is_lost_and_the_rest_is_not(hands):
    got = done(hands, [("die",), 3, 4])
    assert isinstance(got[0], Lost) and "3 workers died on it" in got[0].why and "code -9" in got[0].why
    assert len(got[1]) == len(got[2]) == 128
    assert len(done(hands, [3, 4, 5])) == 3  # new ones came


def test_an_exception_of_a_worker_is_raised_here(hands):
    with pytest.raises(KeyError, match="no such thing"):
        done(hands, [("raise", "no such thing"), ("sleep", 30)])  # nobody waits for the other
    assert len(done(hands, [3])[0]) == 128


def test_workers_that_cannot_start_are_told(model):
    with crew(Broken, model, None, workers=1) as hands, pytest.raises(WorkersError, match=r"cannot start .*code 3"):
        done(hands, [3])


def test_what_cannot_be_sent_is_told(model, hands):
    with pytest.raises(InputError, match="cannot be sent to other processes"):
        done(hands, [lambda: 3])
    with pytest.raises(InputError, match="cannot be sent to other processes"):
        crew(lambda model, tokenizer: None, model, None, workers=1)


@pytest.mark.parametrize("workers", [-1, 1.5, True, "2"])
def test_bad_numbers_of_workers_are_refused(workers, model):
    with pytest.raises(InputError, match="expected how many processes"):
        crew(Summer, model, None, workers=workers)


def test_no_more_workers_come_than_there_are_cells(model, monkeypatch):
    came, start = [], Processes._start
    monkeypatch.setattr(Processes, "_start", lambda self: came.append(1) or start(self))
    with crew(Summer, model, None, workers=16) as hands:
        done(hands, [("sleep", 0.1)] * 2)
        assert len(came) == 2
        done(hands, [3])
        assert len(came) == 2
        done(hands, [("sleep", 0.1)] * 3, at_once=1)
        assert len(came) == 2


def test_a_thousand_processes_are_refused(model, monkeypatch):
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    with pytest.raises(InputError, match=r"workers = 1,000: this machine has 2 cores, .* ask for at most 32"):
        crew(Summer, model, None, workers=1000)


# ---------------------------------------------------------------------- clusters that are not there


@pytest.fixture
def some_ray(monkeypatch):
    """As if Ray were there: nothing of it may be reached for."""
    ray = type(sys)("ray")
    ray.is_initialized = lambda: False
    ray.init = lambda **options: (_ for _ in ()).throw(ConnectionError("nobody answers"))
    monkeypatch.setitem(sys.modules, "ray", ray)


def test_without_ray_its_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(InputError, match=r"pip install 'foveal\[ray\]'"):
        connect("auto")


@pytest.mark.parametrize("address", ["cluster", "host:", ":6379", "host:port"])
def test_what_is_no_address_is_refused(address, some_ray):
    with pytest.raises(InputError, match="is no address of a Ray cluster"):
        connect(address)


def test_a_cluster_that_cannot_be_reached_is_told_soon(some_ray, monkeypatch):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    monkeypatch.setattr(ray_cluster, "REACH", 1.0)
    with pytest.raises(InputError, match=f"cannot reach a Ray cluster at ray://127.0.0.1:{port} "):
        connect(f"ray://127.0.0.1:{port}")
    with pytest.raises(InputError, match=r"no Ray cluster runs here .*nobody answers"):
        connect("auto")


@pytest.mark.parametrize("answer", [b"HTTP/1.0 400 Bad request\r\n\r\n", b"", bytes(3) + b"\x04" + bytes(5)])
def test_only_what_speaks_as_ray_does_is_joined(answer, some_ray):
    """Ray would try for minutes to join whatever else listens there."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve():
            line, _ = server.accept()
            with line:
                line.recv(100)
                line.sendall(answer)

        threading.Thread(target=serve, daemon=True).start()
        address = f"127.0.0.1:{server.getsockname()[1]}"
        speaks = answer[3:4] == b"\x04"
        with pytest.raises(
            InputError, match="nobody answers" if speaks else f"what answers at {address} is no Ray cluster"
        ):
            connect(address)


@pytest.mark.parametrize(
    ("args", "ray", "model"),
    [
        ([], None, None),
        (["--ray"], "auto", None),
        (["--ray", "--seed", "3"], "auto", None),
        (["--ray", "Qwen/Qwen3-0.6B"], "auto", "Qwen/Qwen3-0.6B"),
        (["--ray", "head:6379"], "head:6379", None),
        (["folder", "--ray", "local"], "local", "folder"),
        (["--ray=ray://head:10001"], "ray://head:10001", None),
    ],
)
def test_ray_may_stand_without_an_address(args, ray, model):
    from typer.main import get_command

    from foveal.cli import app

    command = get_command(app).commands["compare"]
    assert isinstance(command, RayCommand)
    with command.make_context("compare", list(args)) as context:
        assert (context.params["ray"], context.params["model"]) == (ray, model)
