"""A bound on work that a client's input could make endless."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import TypeVar

Result = TypeVar("Result")


def within(seconds: float, function: Callable[..., Result], *args) -> Result:
    """Call a function of pure Python that may run away: past so much work of this thread it ends with TimeoutError, in whatever line
    it is. What it calls that is not Python is waited for."""
    end = time.thread_time() + seconds

    def watch(frame, event, arg):
        if time.thread_time() > end:
            raise TimeoutError
        return watch

    before = sys.gettrace()
    sys.settrace(watch)
    try:
        return function(*args)
    finally:
        sys.settrace(before)
