"""What the processes of one model say to each other: JSON in frames, read as one of a few forms. Nothing in a message can be run.

Bytes that are anything else, a pickle among them, are never looked into further: the rank that reads them stops, and the others with it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from multiprocessing.connection import Connection
from typing import Any, Literal

from .request import Finish, Request
from .sampling import Choice

log = logging.getLogger("foveal.serve")
LARGEST = 1 << 30  # bytes of a message: over a thousand prompts of 100,000 tokens, all come in one step


class Garbled(RuntimeError):
    """Another rank sent what is no message."""


@dataclass(frozen=True)
class Failed:
    """What a rank says last when it cannot start."""

    sentence: str


class Form:
    """What a message may be, and nothing more: a type for pydantic, taken strictly."""

    def __init__(self, kind: Any):
        self.kind = kind

    @cached_property
    def read(self) -> Callable[[bytes], Any]:
        """From JSON. Raises ValueError."""
        from pydantic import ConfigDict, TypeAdapter  # part of the extra `serve`; who is alone reads nothing

        return TypeAdapter(self.kind, config=ConfigDict(strict=True, extra="forbid")).validate_json


STEP = tuple[Literal["step"], list[Request], list[tuple[str, Finish]]]
ORDER = Form(STEP | tuple[Literal["kept"], str] | tuple[Literal["close"]])
"""What rank 0 tells: who has come and who is over before a step, whose keys to count, that it is over."""
CHOSEN = Form(list[Choice])
Brought = int | bool | list[list[int]] | Literal["ready"] | None
"""What a rank brings for all to see: a number, keys by layer and head, that it is ready."""
BROUGHT = Form(Brought | Failed)
ALL_BROUGHT = Form(list[Brought])


class Wire:
    """One end of the line between two ranks; `handle` is a socket's, which it owns."""

    def __init__(self, handle: int):
        from pydantic_core import to_json

        self._line, self._written = Connection(handle), to_json

    def say(self, message: Any) -> None:
        """Send what the other end reads by a form."""
        self._line.send_bytes(self._written(message))

    def hear(self, form: Form) -> Any:
        """The next message. Raises Garbled for anything but the form or what is too large, EOFError and OSError where the line is cut."""
        try:
            return form.read(self._line.recv_bytes(LARGEST))
        except OSError as error:
            if error.errno is not None:
                raise
            why = str(error)  # of the frame's length
        except ValueError as error:  # pydantic's; its own words quote the message, which may hold a prompt
            why = ", ".join(sorted({found["type"] for found in error.errors(include_input=False)}))
        log.error("a message between ranks cannot be read (%s): this one stops", why)
        raise Garbled(f"a message between ranks cannot be read ({why})")

    def waits(self, seconds: float) -> bool:
        """Whether there is something to hear, or the line is cut."""
        return self._line.poll(seconds)

    def close(self) -> None:
        """Cut the line."""
        self._line.close()
