"""Separates the ranks of this start of a run from those of an earlier start.

With `--max-restarts` torchrun keeps its key-value store when it starts ranks again (torch 2.13). The store
still holds the addresses of ranks that have died, and a new process group that reads them would wait for
those ranks. So the ranks first agree on a new name, with which all their keys then begin.
"""

from __future__ import annotations

import json
import secrets
import time
from typing import Any

_POLL_S = 0.05


def agree_on_start(store: Any, rank: int, size: int, *, timeout_s: float) -> str:
    """Returns a new name that is the same on all ranks of this start. All ranks call it.

    Rank 0 chooses the name, waits for an answer of every other rank, and writes the list of answers. The
    others answer to the name in the store until a list contains their answer. The list of an earlier start
    never does, because an answer is random. Raises TimeoutError if a rank is missing after `timeout_s`
    seconds.
    """
    until = time.monotonic() + timeout_s
    me = secrets.token_hex(8)
    if rank == 0:
        store.set("start/name", me)
        missing = [f"start/{me}/{other}" for other in range(1, size)]
        while missing := [key for key in missing if not store.check([key])]:
            _wait(until, f"{len(missing)} of {size} ranks are missing, such as {missing[0].split('/')[-1]}")
        answers = {other: store.get(f"start/{me}/{other}").decode() for other in range(1, size)}
        store.set(f"start/{me}/list", json.dumps(answers))
        return me
    answered = None
    while True:
        name = store.get("start/name").decode() if store.check(["start/name"]) else None
        if name is not None and name != answered:
            store.set(f"start/{name}/{rank}", me)
            answered = name
        listed = f"start/{name}/list"
        if name is not None and store.check([listed]) and json.loads(store.get(listed)).get(str(rank)) == me:
            return str(name)
        _wait(until, "rank 0 is missing")


def _wait(until: float, what: str) -> None:
    if time.monotonic() > until:
        raise TimeoutError(f"the ranks could not agree on a start: {what}; read the logs of the other nodes")
    time.sleep(_POLL_S)
