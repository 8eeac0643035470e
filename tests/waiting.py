"""Waiting for what other processes do, with a limit."""

import time
from collections.abc import Callable

import pytest


def wait_for(
    condition: Callable[[], bool], seconds: float, what: str, explain: Callable[[], str] = lambda: ""
) -> None:
    """Polls until `condition` holds; fails the test after `seconds`, with what `explain` returns."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            pytest.fail(f"waited {seconds} s for {what}\n{explain()}")
        time.sleep(0.05)
