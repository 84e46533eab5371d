"""Which file of a kind is taken for a model: the one that ships for it, else the user's own."""

from models import tiny

from foveal import known
from foveal.hub import model_identity
from foveal.known import known_file, own_file


def test_what_ships_for_this_model_comes_before_the_users_own(tmp_path, monkeypatch):
    monkeypatch.setenv("FOVEAL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(known, "files", lambda package: tmp_path / package)
    shipped = tmp_path / "foveal.data" / "scores"
    shipped.mkdir(parents=True)
    model = tiny("llama")
    weights = model_identity(model)["weights"]

    def ask(kind="scores"):
        return known_file(model, kind, ".json", lambda path: {"weights": path.read_text()})

    (shipped / "a.json").write_text("another model's")
    (shipped / "b.safetensors").write_text(weights)  # another kind of file
    assert ask() is None and ask("a kind that nobody ships") is None
    own = own_file(model, "scores", ".json")
    own.parent.mkdir(parents=True)
    own.write_text("not asked: whoever reads it says what is wrong")
    assert own.is_relative_to(tmp_path / "cache") and weights in own.name
    assert ask() == own
    (shipped / "c.json").write_text(weights)
    assert ask() == shipped / "c.json"
