"""A server on a tiny model that reads images, requests for it, and what transformers itself answers to them."""

from __future__ import annotations

import copy

from image_models import data_url, idefics3, llava

from foveal.serve.app import Service
from foveal.serve.limits import Limits
from foveal.serve.sight import Sight
from foveal.serve.worker import Worker

CHAT = "/v1/chat/completions"
CHUNK = 32
METHODS = {"snapkv": "snapkv(budget=0.4, window=8)", "streaming": "streaming-llm(budget=24)"}
FAMILIES = {"idefics3": idefics3, "llava": llava}
TOKENS = 16


def image(of, detail="auto"):
    url = of if isinstance(of, str) else data_url(of)
    return {"type": "image_url", "image_url": {"url": url, "detail": detail}}


def body(*parts, **more):
    """A request: strings are text, all else images."""
    content = [
        {"type": "text", "text": p} if isinstance(p, str) else p if isinstance(p, dict) else image(p) for p in parts
    ]
    return {"messages": [{"role": "user", "content": content}], "temperature": 0, "max_tokens": TOKENS, **more}


def generated(family, *parts, tokens=TOKENS):
    """What transformers answers with the same processor, and the tokens of the prompt."""
    model, processor = FAMILIES[family]()
    shown = [{"type": "text", "text": p} if isinstance(p, str) else {"type": "image"} for p in parts]
    text = processor.apply_chat_template(
        [{"role": "user", "content": shown}], add_generation_prompt=True, tokenize=False
    )
    files = [p for p in parts if not isinstance(p, str)]
    inputs = processor(text=[text], images=[files] if files else None, return_tensors="pt")
    ids = model.generate(**inputs, max_new_tokens=tokens, do_sample=False)[0]
    length = inputs["input_ids"].shape[1]
    return processor.tokenizer.decode(ids[length:], skip_special_tokens=True), length


def service(family, **settings):
    model, processor = FAMILIES[family]()
    own = {"memory": 16 << 20, "chunk": CHUNK, "allow": METHODS, **settings}
    limits = own.pop("limits", Limits())
    model = copy.deepcopy(model)  # the other one answers as transformers does
    worker = Worker(model, processor.tokenizer, sight=Sight(model, processor), **own)
    return Service(worker, processor.tokenizer, name=family, limits=limits)


def said(server, asked, wait=60):
    """Text and usage of an answer."""
    status, answer = server.post(CHAT, asked, wait=wait)
    assert status == 200, answer
    return answer["choices"][0]["message"]["content"], answer["usage"]
