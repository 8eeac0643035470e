"""`phi3v launch shards`: a Slurm job array over the tasks of `phi3v shards build`, and a job that closes it.

The same as slurm/shards.sh, from Python through submitit: tasks that are preempted or reach their time limit
go back into the queue and on behind their last finished window.

In: the arguments of `phi3v shards build`, the number of tasks, the job's size. Out: job ids. Called by
launch.cli.launch.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launch.description import STOP_LEAD_S
from launch.slurm import DEFAULTS, SlurmOptions
from phi3v_dist.exits import DONE
from shards.common.errors import BadInputError

_PHI3V = """
import signal
for each in (signal.SIGUSR1, signal.SIGUSR2):  # they are for submitit
    signal.signal(each, signal.SIG_IGN)
from launch.cli.main import main
main()
"""


@dataclass(frozen=True)
class ShardsTask:
    """What submitit runs in a job: `phi3v` with these words; pickled, so it holds plain values only."""

    words: tuple[str, ...]

    def __call__(self) -> int:
        """Raises RuntimeError if it fails, so that Slurm sees a failed job; the log has its one line."""
        done = subprocess.run([sys.executable, "-c", _PHI3V, *self.words], check=False)
        if done.returncode:
            raise RuntimeError(f"phi3v {' '.join(self.words[:2])} ended with exit code {done.returncode}")
        return done.returncode

    def checkpoint(self) -> Any:
        """submitit calls this before the time limit: the same again, for what is finished is kept."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self)


def launch_shards(
    source: str,
    out: str,
    more: Sequence[str],
    tasks: int,
    cpus: int = 2,
    minutes: int = 24 * 60,
    logs: str = "logs/shards",
    options: SlurmOptions = DEFAULTS,
    show: bool = False,
) -> int:
    """Submits `tasks` tasks of `phi3v shards build SOURCE --out OUT MORE` and, behind them, `shards verify`.

    cpus, minutes: of one task. logs: folder of submitit's files and the logs, on a disk that all nodes see.
    show: prints the batch script of the array and submits nothing. Raises BadInputError: no task, --task or
    --out among `more`, no sbatch, Slurm refused.
    """
    if tasks < 1:
        raise BadInputError(f"{tasks} tasks: at least one is needed (--tasks)")
    taken = [word for word in more if word.split("=")[0] in ("--task", "--out", "--retry-failed")]
    if taken:
        raise BadInputError(f"{taken[0]} is not for the tasks of an array; run `phi3v shards build` for it")
    if minutes * 60 <= STOP_LEAD_S:
        raise BadInputError(
            f"a time limit of {minutes} min leaves no time to build: a task is told to stop {STOP_LEAD_S} s "
            "before it"
        )
    build = ("shards", "build", source, "--out", out, *more)
    _check_words(build)
    array = [ShardsTask((*build, "--task", f"{task}/{tasks}")) for task in range(tasks)]
    folder = Path(logs).resolve()
    if show:
        from submitit.slurm.slurm import _make_sbatch_string

        command = "python -u -m submitit.core._submit FOLDER"
        parameters = _parameters("phi3v-shards", cpus, minutes, options)
        print(_make_sbatch_string(command, folder, map_count=tasks, **parameters), end="")
        return DONE
    if shutil.which("sbatch") is None:
        raise BadInputError("no sbatch on the PATH: submit from a login node of the cluster")
    from submitit import SlurmExecutor

    executor = SlurmExecutor(folder=folder)
    try:
        executor.update_parameters(**_parameters("phi3v-shards", cpus, minutes, options))
        jobs = executor.map_array(lambda task: task(), array)
        number = str(jobs[0].job_id).split("_")[0]
        close = _parameters("phi3v-shards-close", cpus, minutes, options)
        close["additional_parameters"] |= {"dependency": f"afterok:{number}"}
        executor.update_parameters(**close)
        last = executor.submit(ShardsTask(("shards", "verify", out)))
    except Exception as error:
        raise BadInputError(f"Slurm refused the job: {' '.join(str(error).split())[-300:]}") from error
    print(f"job {number}: {tasks} tasks of shards build, logs in {folder}")
    print(f"job {last.job_id}: then closes {out} and checks it, log {last.paths.stdout}")
    return DONE


def _check_words(build: Sequence[str]) -> None:
    """Raises BadInputError if `phi3v` would refuse these words: better now than in every task."""
    import typer

    from launch.cli.shards import app

    command: Any = typer.main.get_command(app)
    usage_error: Any = typer.BadParameter.__base__  # of the click inside typer
    try:
        command.commands["build"].make_context("build", [*build[2:], "--task", "0/1"])
    except usage_error as error:
        raise BadInputError(f"{' '.join(build[:2])}: {error.format_message()}") from error


def _parameters(name: str, cpus: int, minutes: int, options: SlurmOptions) -> dict[str, Any]:
    optional = {"partition": options.partition, "account": options.account, "qos": options.qos}
    return {
        "job_name": name,
        "nodes": 1,
        "ntasks_per_node": 1,
        "cpus_per_task": cpus,
        "time": minutes,
        "signal_delay_s": STOP_LEAD_S,
        "stderr_to_stdout": True,
        "additional_parameters": {"requeue": True, **options.more},
        **{key: value for key, value in optional.items() if value},
    }
