"""`foveal chat`."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import InputError
from .shared import (
    BudgetText,
    Device,
    Dtype,
    MethodName,
    Model,
    ProfileFile,
    app,
    budget_value,
    console,
    errors,
    load_model,
)

if TYPE_CHECKING:
    from ..serve import Sampling, Worker

HELP = (
    "[dim]/new forgets the conversation, /kept draws the keys of the last answer, /exit ends; Ctrl-C stops an answer[/]"
)
LOOK = 0.1  # seconds between two looks at the keys kept
SHADES = " ▁▂▃▄▅▆▇█"


@app.command()
def chat(
    model: Model = None,
    method: MethodName = None,
    budget: BudgetText = None,
    profile: ProfileFile = None,
    system: Annotated[str | None, typer.Option(help="What the model is told before the conversation.")] = None,
    tokens: Annotated[int, typer.Option(help="Most tokens of an answer.", min=1)] = 512,
    temperature: Annotated[float, typer.Option(help="0 is greedy.", min=0, max=2)] = 0.0,
    top_p: Annotated[float, typer.Option(help="Sample from the smallest set of tokens this likely together.")] = 1.0,
    seed: Annotated[
        int | None, typer.Option(help="For the same answers again, where --temperature is above 0.")
    ] = None,
    memory: Annotated[float, typer.Option(help="GiB for the cache.")] = 2.0,
    device: Device = None,
    dtype: Dtype = None,
) -> None:
    """Talk to a model, and see after each answer what its cache kept, what it dropped, and how fast it was."""
    from ..profile import chosen
    from ..serve import Sampling, Worker

    if not 0 < memory < 1e6:
        raise InputError(f"--memory {memory}: expected a number of GiB above 0")
    sampling = Sampling(temperature=temperature, top_p=top_p, seed=seed, max_tokens=tokens)
    found, keeper = chosen(method, budget_value(budget, "--budget"), profile)
    network, tokenizer = load_model(found.model.get("name") if found and model is None else model, device, dtype)
    if not tokenizer.chat_template:
        raise InputError("this model has no chat template, so it cannot be talked to: use `foveal generate --plain`")
    if found is not None:
        found.check(network)
    layout = found.layout if found else None
    with Worker(network, tokenizer, method=keeper, layout=layout, memory=int(memory * 2**30)) as worker:
        Conversation(worker, tokenizer, sampling, system).run()


class Conversation:
    """One conversation over the engine: every turn is a request of its own whose prompt is all that was said before."""

    def __init__(self, worker: Worker, tokenizer, sampling: Sampling, system: str | None):
        self.worker, self.tokenizer, self.sampling = worker, tokenizer, sampling
        self.start = [] if system is None else [{"role": "system", "content": system}]
        self.messages, self.turn = list(self.start), 0
        self.kept: list[list[int]] | None = None

    def run(self) -> None:
        """Until /exit, the end of the input, or Ctrl-C at the prompt."""
        errors.print(
            f"[bold]foveal chat[/], cache: {self.worker.methods['default']}\n{HELP}", highlight=False, soft_wrap=True
        )
        while True:
            try:
                text = console.input("\n[bold cyan]you >[/] ") if sys.stdin.isatty() else input()
            except (EOFError, KeyboardInterrupt):
                errors.print()
                return
            text = text.strip()
            if text in ("/exit", "/quit"):
                return
            if text == "/new":
                self.messages, self.kept = list(self.start), None
                errors.print("[dim]a new conversation[/]")
            elif text == "/kept":
                self._draw()
            elif text.startswith("/"):
                errors.print(HELP, highlight=False)
            elif text:
                self._answer(text)

    def _answer(self, text: str) -> None:
        from ..serve import Request, TooLong
        from ..tasks.task import encode

        self.messages.append({"role": "user", "content": text})
        prompt = self.tokenizer.apply_chat_template(self.messages, tokenize=False, add_generation_prompt=True)
        self.turn += 1
        id, asked = f"turn-{self.turn}", time.perf_counter()
        try:
            stream = self.worker.submit(Request(id, encode(self.tokenizer, prompt), self.sampling))
        except TooLong as error:
            self.messages.pop()
            errors.print(f"[yellow]{error}; /new starts another conversation[/]", highlight=False)
            return
        answer, times, last, looked = [], [], None, -LOOK
        console.print("[bold green]model >[/] ", end="")
        while last is None:
            try:
                for event in stream:
                    if event.kind == "token":
                        times.append(time.perf_counter())
                        if times[-1] - looked >= LOOK:
                            looked = times[-1]
                            self.kept = self.worker.kept(id) or self.kept
                    else:
                        last = event
                    if event.kind != "error":
                        answer.append(event.text)
                        console.print(event.text, end="", markup=False, highlight=False, soft_wrap=True)
            except KeyboardInterrupt:
                stream.cancel()
        console.print()
        if last.kind == "error":
            self.messages.pop()
            errors.print(f"[red]{last.text}[/]", highlight=False)
            return
        self.messages.append({"role": "assistant", "content": "".join(answer)})
        errors.print(f"[dim]{summary(last, asked, times)}[/]", highlight=False, soft_wrap=True)

    def _draw(self) -> None:
        """Layers from left to right, a line for each KV head; the fuller a block, the more of the longest head's keys it held."""
        if not self.kept:
            errors.print("[dim]no answer yet[/]")
            return
        most = max(max(layer) for layer in self.kept)
        for head in range(len(self.kept[0])):
            line = "".join(SHADES[round((len(SHADES) - 1) * layer[head] / most)] for layer in self.kept)
            errors.print(f"[dim]head {head:>2}[/] {line}", highlight=False)
        errors.print(f"[dim]layers 0 to {len(self.kept) - 1}; a full block is {most:,} keys[/]", highlight=False)


def summary(last, asked: float, times: list[float]) -> str:
    """What one answer cost, in a line."""
    usage = last.usage
    seen = usage.prompt + usage.completion
    # the newest token is never read, so it has no key
    dropped = max(0, seen - 1 - usage.kept)
    parts = [
        f"{seen:,} tokens",
        f"{usage.kept:,} kept in a head, {dropped:,} dropped ({usage.kept / max(1, seen - 1):.0%})",
    ]
    if times:
        reused = f", {usage.cached:,} of {usage.prompt:,} known" if usage.cached else ""
        parts.append(f"first token after {times[0] - asked:.1f} s{reused}")
    if len(times) > 1:
        parts.append(f"{(len(times) - 1) / max(times[-1] - times[0], 1e-9):.1f} tokens/s")
    if last.finish in ("length", "cancelled"):
        parts.append({"length": "cut at --tokens or the end of the context", "cancelled": "stopped"}[last.finish])
    return " · ".join(parts)
