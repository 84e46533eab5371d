"""A worker without a model, with the interface of `foveal.serve.Worker`: it says what a script tells it to, a token a step."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Iterable

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from foveal.serve.request import Event, Full, NotAllowed, Request, Stats, Stream, TooLong, Unavailable, Usage
from foveal.serve.text import Text

BYTES = 100  # of cache, for each token
QUEUED = 0.3  # seconds every request says it waited
TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'system' and not loop.first %}{{ raise_exception('system comes first') }}"
    "{% endif %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token for each byte, and an end of text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    found = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<end>")
    found.chat_template = TEMPLATE
    return found


class FakeWorker:
    """script: from a request to the tokens of its answer; the end of text follows where they end before max_tokens. By default the
    answer is the prompt's last message again. step: seconds of one step. Raises on its thread, as an engine that breaks would, at a
    request whose prompt holds "BREAK"; dies with all others at one that holds "DIE"."""

    def __init__(
        self,
        tokenizer,
        script: Callable[[Request], Iterable[int]] | None = None,
        *,
        step: float = 0.0,
        context: int = 1000,
        max_waiting: int = 64,
        max_running: int = 64,
        max_per_key: int | None = None,
    ):
        self.tokenizer, self.step, self.context = tokenizer, step, context
        self.script = script or self._echo
        self.max_waiting, self.max_running, self.max_per_key = max_waiting, max_running, max_per_key
        self.methods = {"default": "dense", "half": "h2o(budget=0.5)"}
        self.budgets = (0.25,)
        self.requests: list[Request] = []  # all that were accepted
        self.restart()

    def restart(self) -> None:
        self._lock = threading.Condition()
        self._live: dict[str, _Running] = {}
        self._draining = self._closed = False
        self._why: str | None = None
        self._steps = 0
        self._finished: dict[str, int] = {}
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    @property
    def alive(self) -> bool:
        return self._thread.is_alive() and not self._closed

    @property
    def full(self) -> bool:
        return len(self._live) >= self.max_waiting + self.max_running

    def submit(self, request: Request) -> Stream:
        with self._lock:
            if self._draining or not self.alive:
                raise Unavailable("the engine takes no requests")
            if len(request.prompt_ids) >= self.context:
                raise TooLong(len(request.prompt_ids), self.context)
            if request.method is not None and request.method not in self.methods:
                raise NotAllowed(f"the method '{request.method}' is not offered here")
            if request.budget is not None and request.budget not in self.budgets:
                raise NotAllowed(f"the budget {request.budget} is not offered here")
            if self.full:
                raise Full("the queue is full: try again in 2 seconds", 2)
            if self.max_per_key is not None and self._of(request.key) >= self.max_per_key:
                raise Full("this key has too many requests: try again in 2 seconds", 2)
            stream = Stream(request)
            stream.on_cancel = lambda: self._cancel(request.id)
            self._live[request.id] = _Running(request, stream, self)
            self.requests.append(request)  # last: tests look at it without the lock
            self._lock.notify()
            return stream

    def stats(self) -> Stats:
        live = list(self._live.values())
        running = live[: self.max_running]
        held = sum(BYTES * (len(r.request.prompt_ids) + r.made) for r in running)
        return Stats(
            alive=self.alive,
            draining=self._draining,
            running=len(running),
            waiting=len(live) - len(running),
            bytes_used=held,
            bytes_limit=10**6,
            dense_bytes=2 * held,
            steps=self._steps,
            finished=dict(self._finished),
            why=self._why,
        )

    def kept(self, id: str, timeout: float = 5.0) -> list[list[int]] | None:
        found = self._live.get(id)
        if found is None:
            return None
        total = len(found.request.prompt_ids) + found.made
        return [[max(1, total * (1 + (3 * layer + head) % 8) // 8) for head in range(3)] for layer in range(12)]

    def drain(self, timeout: float | None = None) -> bool:
        self._draining = True
        end = time.monotonic() + (timeout or 1e9)
        while self._live and time.monotonic() < end:
            time.sleep(0.01)
        return not self._live

    def close(self) -> None:
        with self._lock:
            self._closed = True
            self._lock.notify()
        self._thread.join()

    def _of(self, key: str) -> int:
        return sum(r.request.key == key for r in self._live.values())

    def _echo(self, request: Request) -> Iterable[int]:
        text = self.tokenizer.decode(request.prompt_ids)
        said = text.removesuffix("<assistant>").rpartition("<user>")[2]
        return self.tokenizer(said)["input_ids"]

    def _cancel(self, id: str) -> None:
        running = self._live.get(id)
        if running is not None:
            running.cancelled = True

    def _run(self) -> None:
        try:
            while True:
                with self._lock:
                    self._lock.wait_for(lambda: self._live or self._closed)
                    if self._closed:
                        break
                    running = list(self._live.values())[: self.max_running]
                if self.step:
                    time.sleep(self.step)
                for one in running:
                    if one.breaks == "DIE":
                        raise RuntimeError("the engine broke")
                    if not one.advance():
                        with self._lock:
                            del self._live[one.request.id]
                            self._finished[one.ended] = self._finished.get(one.ended, 0) + 1
                self._steps += 1
        except Exception as error:
            self._why = str(error)
        for one in self._live.values():
            one.stream.put(Event("error", text="the engine stopped"))
        self._live.clear()


class _Running:
    def __init__(self, request: Request, stream: Stream, worker: FakeWorker):
        self.request, self.stream, self.worker = request, stream, worker
        self.answer = Text(lambda ids: worker.tokenizer.decode(ids, skip_special_tokens=True), request.sampling.stop)
        text = worker.tokenizer.decode(request.prompt_ids)
        self.breaks = next((word for word in ("BREAK", "DIE") if word in text), None)
        room = worker.context - len(request.prompt_ids)
        self.most = min(request.sampling.max_tokens, room)
        self.tokens = itertools.islice(iter(worker.script(request)), self.most)
        self.made, self.ended, self.cancelled = 0, "", False

    def advance(self) -> bool:
        """One token, or the end: False."""
        if self.breaks:
            self.ended = "error"
            self.stream.put(Event("error", text="this request failed"))
            return False
        late = self.request.deadline is not None and time.monotonic() > self.request.deadline
        if self.cancelled or late:
            return self._end("cancelled" if self.cancelled else "deadline")
        token = next(self.tokens, None)
        if token is None:
            ends = self.made < self.most
            self.made += ends
            return self._end("stop" if ends else "length")
        self.made += 1
        text, stopped = self.answer.add(token)
        chances = {}
        if self.request.sampling.logprobs is not None:
            others = tuple((t, -1.0 - t) for t in range(self.request.sampling.logprobs))
            chances = {"logprob": -0.5, "top": others}
        self.stream.put(Event("token", token=token, text=text, **chances))
        return self._end("stop") if stopped else True

    def _end(self, finish: str) -> bool:
        prompt = len(self.request.prompt_ids)
        usage = Usage(prompt, self.made, 0, (prompt + self.made) // 2, QUEUED)
        self.ended = finish
        self.stream.put(Event("end", text=self.answer.flush(), finish=finish, usage=usage))
        return False
