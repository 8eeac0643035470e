"""Stands in for a rank of training: counts steps of 0.1 s in RUN, checkpoints when told to stop, goes on from
there.

Argument: run directory. RUN/steps holds how many steps the run has. Rank 0 writes `RUN/started` lines: node,
world size, the step it goes on from. On SIGUSR1 or SIGTERM, two seconds later: a checkpoint, exit 3.
"""

import os
import signal
import sys
import time
from pathlib import Path

from launch.torchrun.watch import watch_parent
from phi3v_dist.exits import record_exit


def main() -> None:
    run_dir, rank = Path(sys.argv[1]), int(os.environ["RANK"])
    asked: list[int] = []
    signal.signal(signal.SIGUSR1, lambda signum, frame: asked.append(signum))
    signal.signal(signal.SIGTERM, lambda signum, frame: asked.append(signum))
    watch_parent()
    (run_dir / "checkpoints").mkdir(parents=True, exist_ok=True)
    names = sorted(path.name for path in (run_dir / "checkpoints").iterdir())
    first = int(names[-1].removeprefix("step-")) if names else 0
    steps = int((run_dir / "steps").read_text())
    node = os.environ.get("SLURMD_NODENAME", "")
    with (run_dir / "started").open("a") as stream:
        stream.write(f"{rank} {node} {os.environ['WORLD_SIZE']} {first}\n")
    for step in range(first, steps):
        time.sleep(0.1)
        if asked:
            time.sleep(2)  # a step takes longer than the signals of a job that ends are apart
            if rank == 0:
                (run_dir / "checkpoints" / f"step-{step + 1:06d}").mkdir(exist_ok=True)
                record_exit(run_dir, 3, "signal")
            sys.exit(3)
    if rank == 0:
        record_exit(run_dir, 0, "done")


main()
