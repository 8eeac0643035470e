"""Stands in for a rank of training in a pod: steps of 0.1 s that all ranks take together over gloo, and
checkpoints.

Argument: run directory. Every step all-reduces whether a rank was told to stop; then all leave with 3 after a
checkpoint. RUN/started gets a line per start: rank, world size, first step. RUN/steps: steps of the run.
"""

import signal
import sys
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from launch.torchrun.watch import watch_parent
from phi3v_dist.exits import record_exit


def main() -> None:
    run_dir = Path(sys.argv[1])
    asked: list[int] = []
    signal.signal(signal.SIGUSR1, lambda signum, frame: asked.append(signum))
    watch_parent()
    dist.init_process_group("gloo", timeout=timedelta(seconds=20))
    rank = dist.get_rank()
    (run_dir / "checkpoints").mkdir(exist_ok=True)
    names = sorted(path.name for path in (run_dir / "checkpoints").iterdir())
    first = int(names[-1].removeprefix("step-")) if names else 0
    with (run_dir / "started").open("a") as stream:
        stream.write(f"{rank} {dist.get_world_size()} {first}\n")
    if (run_dir / "diverge").exists():
        if rank == 0:
            record_exit(run_dir, 4, "diverged")
        sys.exit(4)
    for step in range(first + 1, int((run_dir / "steps").read_text()) + 1):
        time.sleep(0.1)
        flag = torch.tensor([len(asked)])
        dist.all_reduce(flag)
        if rank == 0 and (flag.item() or step % 5 == 0):
            (run_dir / "checkpoints" / f"step-{step:06d}").mkdir(exist_ok=True)
        if flag.item():
            dist.barrier()
            if rank == 0:
                record_exit(run_dir, 3, "signal")
            sys.exit(3)
    dist.barrier()
    if rank == 0:
        record_exit(run_dir, 0, "done")
    dist.destroy_process_group()


main()
