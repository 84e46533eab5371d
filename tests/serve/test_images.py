"""Images in requests: the answer is what transformers' own `generate` says to them, whoever else is there."""

# ruff: noqa: E402 - what is imported below needs the extras asked for above it

import copy
import json
import socket
import threading
import time
from pathlib import Path

import pytest
import torch

for extra in ("fastapi", "uvicorn", "prometheus_client"):
    pytest.importorskip(extra, reason=f"{extra} is part of the extra `serve`")
pytest.importorskip("PIL.Image", reason="Pillow is part of the extra `serve`")

from fake_worker import byte_tokenizer
from http_server import running, tiny_model
from image_models import data_url, encoded, idefics3, llava, picture
from image_server import CHAT, CHUNK, FAMILIES, TOKENS, body, generated, image, said, service
from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

import foveal
from foveal.errors import InputError, ModelFileError, UnsupportedModel
from foveal.hub import load_processor, reads_images
from foveal.serve.images import places
from foveal.serve.launch import Plan, _reads_images, safe_source
from foveal.serve.scheduler import AHEAD
from foveal.serve.schema import ChatRequest
from foveal.serve.sight import Sight
from foveal.serve.worker import Worker

PROMPTS = [
    (picture(1), "What is this?"),
    (
        "Look: ",
        picture(2, (100, 30)),
        " and ",
        picture(3, (20, 90)),
        " which of them is it that you would rather have?",
    ),
    ("No image, but a text that is longer than one piece of a prompt.",),
]


@pytest.fixture(scope="module", params=[*FAMILIES])
def family(request):
    return request.param


@pytest.fixture(scope="module")
def server(family):
    with running(service(family)) as found:
        yield found


def free(server, seconds=5.0):
    """Whether nothing of any image is held within some seconds."""
    end = time.monotonic() + seconds
    while server.service.api.room.held and time.monotonic() < end:
        time.sleep(0.01)
    return server.service.api.room.held == 0


def test_answers_are_those_of_transformers(server, family):
    for parts in PROMPTS:
        wanted, length = generated(family, *parts)
        text, usage = said(server, body(*parts))
        assert (text, usage["prompt_tokens"]) == (wanted, length)
    assert generated(family, *PROMPTS[0])[0] != generated(family, picture(9), "What is this?")[0]  # a model that looks
    assert free(server)


def test_answers_beside_others_are_answers_alone(server, family):
    asked = {i: PROMPTS[i % 3] for i in range(9)}
    wanted = {i: generated(family, *parts)[0] for i, parts in asked.items()}
    found = {}

    def ask(i):
        found[i] = said(server, body(*asked[i]))[0]

    threads = [threading.Thread(target=ask, args=(i,)) for i in asked]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == wanted and free(server)


def test_who_steps_back_answers_as_if_nothing_had_been():
    parts = [(picture(i), f"Image {i}: " + "say what you see in it. " * 4) for i in range(3)]
    wanted, lengths = zip(*[generated("idefics3", *p, tokens=140) for p in parts], strict=True)
    room = sum(lengths) + 3 * AHEAD + 200  # tokens: all three come in, and cannot all grow to the end
    with running(service("idefics3", memory=room * 2 * 2 * 2 * 8 * 4 * 16 // 15, prefix=False)) as small:
        found = {}

        def ask(i):
            found[i] = said(small, body(*parts[i], max_tokens=140))[0]

        threads = [threading.Thread(target=ask, args=(i,)) for i in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert small.worker.stats().preemptions > 0
        assert tuple(found[i] for i in range(3)) == wanted and free(small)


def test_a_method_acts_on_images_as_on_text(server, family):
    model, processor = FAMILIES[family]()
    parts = (picture(4), "Say what is in it, and how you came to know of it, in a few words.")
    shown = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": parts[1]}]}]
    text = processor.apply_chat_template(shown, add_generation_prompt=True, tokenize=False)
    inputs = processor(text=[text], images=[[parts[0]]], return_tensors="pt")
    length = inputs["input_ids"].shape[1]
    with foveal.attach(copy.deepcopy(model), "snapkv(budget=0.4, window=8)") as session:
        ids = session.model.generate(**inputs, max_new_tokens=TOKENS, do_sample=False)[0, length:]
    answer, usage = said(server, body(*parts, foveal={"method": "snapkv"}))
    assert answer == processor.tokenizer.decode(ids, skip_special_tokens=True) != generated(family, *parts)[0]
    assert usage["kept_tokens"] < 0.6 * (length + TOKENS)


def test_a_known_beginning_is_that_of_the_same_image_alone(server, family):
    first, second = picture(20), picture(21)
    talk = "Tell me about it. " * 4
    _, length = generated(family, first, talk)
    cached = []
    for parts in [(first, talk), (first, talk), (second, talk), (first, talk, second, "And this?")]:
        answer, usage = said(server, body(*parts))
        assert answer == generated(family, *parts)[0]
        cached.append(usage["prompt_tokens_details"]["cached_tokens"])
    reused = (length - CHUNK) // CHUNK * CHUNK
    begins = 6  # "<user>", before any image
    assert begins < CHUNK and cached[:3] == [0, reused, 0] and cached[3] >= reused > 0


def test_an_image_whose_tokens_are_known_is_not_looked_at_again(server, monkeypatch):
    seen = []
    real = foveal.serve.sight.at_decoder
    monkeypatch.setattr(foveal.serve.sight, "at_decoder", lambda *args: seen.append(1) or real(*args))
    talk = "A long text after it, so that its tokens are in the first pieces. " * 2
    said(server, body(picture(30), talk))
    assert len(seen) == 1
    said(server, body(picture(30), talk))
    assert len(seen) == 1


def test_pixels_are_let_go_when_they_are_seen(server, family):
    api = server.service.api
    shown = [picture(50, (64, 64)), picture(51, (64, 64))]
    text = FAMILIES[family]()[1].apply_chat_template(
        [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "?"}, {"type": "image"}]}],
        add_generation_prompt=True,
        tokenize=False,
    )
    asked = ChatRequest.model_validate(body(shown[0], "?", shown[1]))
    ids, pictures = api.viewer(text, places(asked), [encoded(x) for x in shown])
    before = api.room.held
    assert before == pictures.nbytes > 2 * 3 * 32 * 32 * 4
    pictures.embeds(FAMILIES[family]()[0], ids, 0, len(ids))
    tokens = sum(p.tokens for p in pictures.pictures)
    assert api.room.held == pictures.nbytes == tokens * 32 * 4 < before
    pictures.join()
    pictures.leave()
    assert api.room.held > 0
    pictures.leave()
    assert api.room.held == 0 and pictures.pictures == []


def test_choices_share_what_is_seen(server, family, monkeypatch):
    seen = []
    real = foveal.serve.sight.at_decoder
    monkeypatch.setattr(foveal.serve.sight, "at_decoder", lambda *args: seen.append(1) or real(*args))
    status, answer = server.post(CHAT, body(picture(31), picture(32), "?", n=3), wait=60)
    assert status == 200 and len(seen) == 2
    wanted = generated(family, picture(31), picture(32), "?")[0]
    assert [c["message"]["content"] for c in answer["choices"]] == [wanted] * 3 and free(server)


def test_detail_low_shows_a_small_one_and_other_formats_are_read(server, family):
    large, small = picture(5, (700, 600)), picture(5, (700, 600)).copy()
    small.thumbnail((512, 512))
    talk = "A text after it that is long enough for a piece to be known again. " * 2
    assert said(server, body(image(large, "low"), talk))[0] == generated(family, small, talk)[0]
    for whole in (
        large,
        data_url(encoded(large) + b"low"),
    ):  # whatever stands behind a file's end, it is not the small one
        assert said(server, body(image(whole), talk))[1]["prompt_tokens_details"]["cached_tokens"] == 0
    frames = [picture(i, (40, 40)).convert("P") for i in (6, 7)]
    gif = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    for kind, data, shown in [
        ("gif", gif, frames[0].convert("RGB")),
        ("webp", encoded(picture(8), "WEBP", lossless=True), picture(8)),
        ("png", encoded(picture(8).convert("RGBA")), picture(8)),
    ]:
        assert said(server, body(image(data_url(data, kind)), "?"))[0] == generated(family, shown, "?")[0]


def test_who_leaves_frees_what_was_held(server):
    data = json.dumps(body(*[picture(40 + i) for i in range(3)], "?", max_tokens=1500, stream=True)).encode()
    head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
    before = server.worker.stats().finished.get("cancelled", 0)
    with socket.create_connection(("127.0.0.1", server.port), timeout=20) as link:
        link.sendall(head.encode() + data)
        assert b"200 OK" in link.recv(64)
        assert server.service.api.room.held > 0
    assert free(server)
    assert server.worker.stats().finished["cancelled"] == before + 1


def test_the_least_recent_request_without_room_is_told_to_come_back(family):
    held = []
    with running(service(family)) as small:
        room = small.service.api.room
        room.take(room.most - 1000)
        status, answer = small.post(CHAT, body(picture(1), "?"))
        held.append((status, answer["error"]["code"]))
        room.give(room.most - 1000)
        assert said(small, body(picture(1), "?"))[0] == generated(family, picture(1), "?")[0]
    assert held == [(429, "images_full")]


# ---------------------------------------------------------------------- models that cannot be right


def test_a_model_that_would_be_wrong_is_refused_at_the_start(family, monkeypatch):
    model, processor = FAMILIES[family]()
    model = copy.deepcopy(model)
    inner, kind = model.model, type(model.model)
    plain, features = kind.forward, kind.get_image_features

    def told_more(self, *args, **kwargs):
        return plain(self, *args, **kwargs, deeper=torch.ones(1))

    def by_company(self, pixel_values, *args, **kwargs):
        out = features(self, pixel_values, *args, **kwargs)
        out.pooler_output = [x + len(pixel_values.flatten()) % 7 for x in out.pooler_output]
        return out

    def blind(self, pixel_values=None, pixel_attention_mask=None, **kwargs):
        return plain(self, **kwargs)

    def ahead(self, *args, attention_mask=None, **kwargs):
        return plain(self, *args, attention_mask={"full_attention": torch.zeros(1)}, **kwargs)

    for name, broken, why in [
        ("forward", told_more, "deeper"),
        ("get_image_features", by_company, "depends on what else"),
        ("forward", blind, "changes nothing"),
        ("forward", ahead, "looks ahead"),
    ]:
        with monkeypatch.context() as patched:
            patched.setattr(kind, name, broken)
            with pytest.raises(UnsupportedModel, match=why):
                Sight(model, processor)
    assert Sight(model, processor).image >= 0 and inner is model.model


def test_rotary_positions_of_several_dimensions_are_refused():
    text = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    text |= {
        "num_key_value_heads": 2,
        "vocab_size": 320,
        "rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3]},
    }
    vision = {"embed_dim": 32, "depth": 1, "num_heads": 2, "hidden_size": 32}
    config = Qwen2VLConfig(text_config=text, vision_config=vision, image_token_id=258)
    with pytest.raises(UnsupportedModel, match="several dimensions"):
        Sight(Qwen2VLForConditionalGeneration(config), idefics3()[1])


@pytest.mark.parametrize("name", ["frugal-prompt", "bottlenecked"])
def test_a_method_that_looks_at_token_ids_is_refused_at_the_start(name):
    method = foveal.get_method(name, **({"newline": (10,), "processor": "random"} if name == "bottlenecked" else {}))
    model, processor = llava()
    model = copy.deepcopy(model)
    with pytest.raises(InputError, match="given no token ids"):
        Worker(model, processor.tokenizer, sight=Sight(model, processor), method=method, memory=16 << 20)
    assert model.get_decoder().config._attn_implementation != "foveal"


# ---------------------------------------------------------------------- from a folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    found = tmp_path_factory.mktemp("model")
    model, processor = idefics3()
    model.save_pretrained(found)
    processor.save_pretrained(found)
    return str(found)


def test_a_folder_is_served_as_it_is(folder):
    plan = Plan(model=folder, device="cpu", memory=0.02, image_hosts=("images.example",))
    plan.check()
    with running(plan.service(*plan.worker())) as found:
        wanted = generated("idefics3", picture(1), "What is this?")[0]
        assert said(found, body(picture(1), "What is this?", model=folder))[0] == wanted
        assert found.service.details["images"] is True


def test_a_path_is_looked_at_with_care(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(Path(folder).parent))
    assert _reads_images(safe_source(f"~/{Path(folder).name}"))
    file = tmp_path / "model.gguf"
    file.write_bytes(b"GGUF\xff")
    with pytest.raises(ModelFileError, match="is a file"):
        Plan(model=str(file), device="cpu").worker()
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    (damaged / "config.json").write_text("[]")
    with pytest.raises(ModelFileError, match="can load"):
        _reads_images(str(damaged))


def test_without_pillow_the_start_says_what_to_install(folder, monkeypatch):
    monkeypatch.setattr(foveal.hub, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"Pillow.*foveal\[serve\]"):
        Plan(model=folder, device="cpu").worker()


def test_what_cannot_be_served_with_images_is_said_at_the_start(folder, tmp_path):
    with pytest.raises(InputError, match="--tensor-parallel"):
        Plan(model=folder, device="cpu", tensor_parallel=2).worker()
    with pytest.raises(InputError, match="--image-hosts 'https://x'"):
        Plan(model=folder, image_hosts=("https://x",)).check()
    tiny_model().save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    assert reads_images(folder) and not reads_images(tmp_path)
    with pytest.raises(InputError, match="--image-hosts are for"):
        Plan(model=str(tmp_path), device="cpu", image_hosts=("a.example",)).worker()
    with pytest.raises(ModelFileError, match="image processor"):
        load_processor(tmp_path)
