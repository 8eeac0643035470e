"""A rank of training that something happens to: `faulty_rank.py FAULT[,FAULT...] train CONFIG [key=value
...]`.

A fault is `what:rank:step:where`. It happens once in the life of a run (a file beside the config notes it),
when that rank begins `where` in that step (from 0): one of the places of Heartbeat.at, or `backward`.
what: a signal's name, `sleep` (for ever), `config` (the rank has another learning rate; at once), `data` (it
looks for its data in the directory `elsewhere` beside the config; at once), `stall` (no row comes any more
after the second), `nan` (the losses of that step, however often), `nans` (of every step).
"""

import contextlib
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

from launch.torchrun.watch import watch_parent

RANK = int(os.environ.get("RANK", "0"))


def once(config: str, fault: str) -> bool:
    try:
        Path(config).with_name(f"happened {fault}").touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


def happen(what: str) -> None:
    if what == "sleep":
        while True:
            time.sleep(3600)
    os.kill(os.getpid(), getattr(signal, what))


def install(fault: str, config: str) -> None:
    what, rank, step, where = (fault.split(":") + ["", "", ""])[:4]
    if int(rank) != RANK:
        return
    if what in ("config", "data"):
        elsewhere = Path(config).with_name("elsewhere")
        sys.argv.append({"config": "train.lr=0.123", "data": f"data.path={elsewhere}"}[what])
        return
    from deepspeed.runtime.engine import DeepSpeedEngine

    from phi3v_dist.parallel.heartbeat import Heartbeat
    from phi3v_dist.train.feed import Feed

    now: list[Any] = [0, ""]
    at = Heartbeat.at

    def watched(self: Heartbeat, at_step: int, doing: str) -> None:
        at(self, at_step, doing)
        now[:] = [at_step, doing]
        if (
            what not in ("nan", "nans", "stall")
            and (at_step, doing) == (int(step), where)
            and once(config, fault)
        ):
            happen(what)

    Heartbeat.at = watched  # type: ignore[method-assign]
    if where == "backward":
        backward = DeepSpeedEngine.backward

        def struck(self: Any, loss: Any, **options: Any) -> Any:
            if now[0] == int(step) and once(config, fault):
                happen(what)
            return backward(self, loss, **options)

        DeepSpeedEngine.backward = struck
    if what in ("nan", "nans"):
        forward = DeepSpeedEngine.forward

        def poisoned(self: Any, *inputs: Any, **options: Any) -> Any:
            loss = forward(self, *inputs, **options)
            return loss * float("nan") if self.training and (what == "nans" or now[0] == int(step)) else loss

        DeepSpeedEngine.forward = poisoned
    if what == "stall":
        start = Feed.__init__

        def stuck(self: Feed, rows: Any, *rest: Any, **named: Any) -> None:
            start(self, stalling(rows), *rest, **named)

        def stalling(rows: Any) -> Any:
            for number, row in enumerate(rows):
                if number == 2 and once(config, fault):
                    Path(config).with_name("stalled").touch()
                    with contextlib.suppress(Exception):  # as a decoder may that reads in this process
                        happen("sleep")
                yield row

        Feed.__init__ = stuck  # type: ignore[method-assign]


if __name__ == "__main__":
    watch_parent()
    faults = sys.argv.pop(1)
    for each in faults.split(","):
        install(each, sys.argv[2])
    from launch.cli.main import main

    main()
