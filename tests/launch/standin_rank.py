"""Stands in for a rank of training: keeps a file per rank alive, and behaves as its first argument says.

Arguments: run directory, behaviour, each optional behaviour argument. Steps are 50 ms; SIGUSR1 sets a flag
that is looked at after each step, as in training.
"""

import os
import signal
import sys
import time
from pathlib import Path

from launch.torchrun.watch import watch_parent
from phi3v_dist.exits import record_exit


def main() -> None:
    run_dir, behaviour = Path(sys.argv[1]), sys.argv[2]
    rank = int(os.environ["RANK"])
    asked: list[int] = []
    if behaviour != "deaf":
        signal.signal(signal.SIGUSR1, lambda signum, frame: asked.append(signum))
    else:
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    watch_parent()
    (run_dir / f"pid-{rank}").write_text(str(os.getpid()))
    (run_dir / f"arguments-{rank}").write_text("\n".join(sys.argv[1:]))
    for step in range(1200):
        time.sleep(0.05)
        if asked:
            (run_dir / f"checkpoint-{rank}").write_text(str(step))
            if rank == 0:
                record_exit(run_dir, 3, "signal")
            sys.exit(3)
        if behaviour == "finish" and step == 3:
            if rank == 0:
                record_exit(run_dir, 0, "done")
            sys.exit(0)
        if behaviour == "exit" and step == 3 and rank == 1:
            sys.exit(int(sys.argv[3]))
        if behaviour == "crash" and step == 3 and rank == 1:
            os.kill(os.getpid(), signal.SIGSEGV)


main()
