"""How the ranks of one start distinguish themselves from those of an earlier start.

torchrun keeps its key-value store over `--max-restarts` (torch 2.13). It still holds the addresses of ranks
that have died, and a new process group that reads them waits for these. So the ranks first agree on a new
name, and prefix all their keys with it.
"""

from __future__ import annotations

import json
import secrets
import time
from typing import Any

_POLL_S = 0.05


def agree_on_start(store: Any, rank: int, size: int, *, timeout_s: float) -> str:
    """Returns a name that is the same on all ranks of this start and new.

    Rank 0 chooses the name and lists the ranks that answered to it. The others answer to the name in the
    store until a list holds their answer; the list of an earlier start never does. Raises TimeoutError if not
    all ranks come within `timeout_s` seconds.
    """
    until = time.monotonic() + timeout_s
    me = secrets.token_hex(8)
    if rank == 0:
        store.set("start/name", me)
        missing = [f"start/{me}/{other}" for other in range(1, size)]
        while missing := [key for key in missing if not store.check([key])]:
            _wait(until, f"{len(missing)} of {size} ranks have not come, such as {missing[0].split('/')[-1]}")
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
        _wait(until, "rank 0 has not come")


def _wait(until: float, what: str) -> None:
    if time.monotonic() > until:
        raise TimeoutError(f"the ranks did not meet: {what}; read the logs of the other nodes")
    time.sleep(_POLL_S)
