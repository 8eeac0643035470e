"""`phi3v launch shards`: a Slurm job array over the tasks of `phi3v shards build`, and a job that closes the
dataset.

The same as slurm/shards.sh, from Python through submitit: tasks that are preempted or reach their time limit
go back into the queue and resume after their last finished partition.

In: the arguments of `phi3v shards build`, the size of the array. Out: job ids.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launch.description import STOP_LEAD_S
from launch.slurm import DEFAULTS, ONE_DAY, SlurmOptions, batch_script, refused, slurm_executor
from phi3v_dist.exits import DONE
from shards.common.errors import BadInputError

_PHI3V = """
import signal
for each in (signal.SIGUSR1, signal.SIGUSR2):  # submitit handles them
    signal.signal(each, signal.SIG_IGN)
from launch.cli.main import main
main()
"""


@dataclass(frozen=True)
class ShardsTask:
    """What submitit runs in a job: `phi3v` with these words. It is pickled, so it holds plain values only."""

    words: tuple[str, ...]

    def __call__(self) -> int:
        """Raises RuntimeError if the command fails, so that Slurm sees a failed job; its own message is in
        the log.
        """
        done = subprocess.run([sys.executable, "-c", _PHI3V, *self.words], check=False)
        if done.returncode:
            raise RuntimeError(f"phi3v {' '.join(self.words[:2])} ended with exit code {done.returncode}")
        return done.returncode

    def checkpoint(self) -> Any:
        """submitit calls this before the time limit. The same task again: finished partitions are kept."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self)


@dataclass(frozen=True)
class ArraySize:
    """tasks: jobs in the array; each builds its part of the dataset. cpus: cores of a task. minutes: its time
    limit.
    """

    tasks: int
    cpus: int = 2
    minutes: int = ONE_DAY

    def __post_init__(self) -> None:
        """Raises BadInputError for a size that cannot be started."""
        if self.tasks < 1:
            raise BadInputError(f"{self.tasks} tasks: at least one is needed (--tasks)")
        if self.minutes * 60 <= STOP_LEAD_S:
            raise BadInputError(
                f"a time limit of {self.minutes} min leaves no time to build: a task is told to stop "
                f"{STOP_LEAD_S} s before it"
            )


def launch_shards(
    source: str,
    out: str,
    more: Sequence[str],
    *,
    size: ArraySize,
    logs: str = "logs/shards",
    options: SlurmOptions = DEFAULTS,
    show: bool = False,
) -> int:
    """Submits an array whose tasks run `phi3v shards build SOURCE --out OUT MORE`, and after it `shards
    verify`.

    logs: folder of submitit's files and the logs, on a disk that all nodes see. show: prints the batch script
    of the array and submits nothing. Raises BadInputError: --task, --out or --retry-failed among `more`, no
    sbatch, Slurm refused.
    """
    taken = [word for word in more if word.split("=")[0] in ("--task", "--out", "--retry-failed")]
    if taken:
        raise BadInputError(f"{taken[0]} is not for the tasks of an array; run `phi3v shards build` for it")
    build = ("shards", "build", source, "--out", out, *more)
    array = [ShardsTask((*build, "--task", f"{task}/{size.tasks}")) for task in range(size.tasks)]
    folder = Path(logs).resolve()
    if show:
        print(batch_script(folder, _parameters("phi3v-shards", size, options), tasks=size.tasks), end="")
        return DONE
    executor = slurm_executor(folder)
    try:
        executor.update_parameters(**_parameters("phi3v-shards", size, options))
        jobs = executor.map_array(lambda task: task(), array)
        number = str(jobs[0].job_id).split("_")[0]
        close = _parameters("phi3v-shards-close", size, options)
        close["additional_parameters"] |= {"dependency": f"afterok:{number}"}
        executor.update_parameters(**close)
        last = executor.submit(ShardsTask(("shards", "verify", out)))
    except Exception as error:
        raise refused(error) from error
    print(f"job {number}: {size.tasks} tasks of shards build, logs in {folder}")
    print(f"job {last.job_id}: then closes {out} and checks it, log {last.paths.stdout}")
    return DONE


def _parameters(name: str, size: ArraySize, options: SlurmOptions) -> dict[str, Any]:
    """submitit's parameters of one task."""
    return {
        "job_name": name,
        "nodes": 1,
        "ntasks_per_node": 1,
        "cpus_per_task": size.cpus,
        "time": size.minutes,
        "signal_delay_s": STOP_LEAD_S,
        "stderr_to_stdout": True,
        "additional_parameters": {"requeue": True, **options.more},
        **options.placement,
    }
