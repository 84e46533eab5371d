"""`foveal look`: the summary, the files, and one sentence for everything that goes wrong."""

from test_cli import folder, foveal_cli, one_sentence  # noqa: F401  (fixtures)

from foveal.lens import Look

TEXT = "One. Two is here. Three? Four! Five it is. Six. Seven too. Eight. Nine, ten. Eleven."


def test_look_prints_a_summary_and_writes_both_files(foveal_cli, folder, tmp_path):  # noqa: F811
    (tmp_path / "text.txt").write_text(TEXT)
    result = foveal_cli("look", folder, "--text", "text.txt", "--out", "out/lens.json")
    assert result.code == 0, result.err
    assert "sinks.first" in result.out
    assert "wrote out/lens.json and out/lens.safetensors" in result.out
    seen = Look.load(tmp_path / "out" / "lens.json")
    assert "".join(seen.texts).endswith(TEXT)
    assert float(seen["sinks.first"].mean()) > 0


def test_look_reads_a_prompt_with_some_lenses_and_up_to_a_length(foveal_cli, folder, tmp_path):  # noqa: F811
    result = foveal_cli("look", folder, "--prompt", TEXT, "--lens", "sinks,profile", "--length", "20")
    assert result.code == 0, result.err
    seen = Look.load(tmp_path / "lens.json")
    assert len(seen.tokens) == 20
    assert set(seen.source["lenses"]) == {"sinks", "profile"}
    piped = foveal_cli("look", folder, "--text", "-", "--lens", "sinks", stdin=TEXT)
    assert piped.code == 0, piped.err
    assert len(Look.load(tmp_path / "lens.json").tokens) > 20


def test_what_goes_wrong_is_one_sentence(foveal_cli, folder):  # noqa: F811
    one_sentence(foveal_cli("look", folder), "--text", "--prompt")
    one_sentence(foveal_cli("look", folder, "--prompt", " "), "empty")
    one_sentence(foveal_cli("look", folder, "--prompt", "Hi", "--lens", "sink"), "did you mean 'sinks'")
    one_sentence(foveal_cli("look", folder, "--prompt", "Hi", "--length", "0"), "--length")
    one_sentence(foveal_cli("look", folder, "--text", "nothing.txt"), "nothing.txt")
    one_sentence(foveal_cli("look", folder, "--prompt", "Hi " * 600), "1,024 positions")
    one_sentence(foveal_cli("look", folder, "--prompt", "Hi. Ho.", "--lens", "receivers"), "at least 8")
