"""`phi3v launch slurm`: submits a run with submitit, one task per node, from a snapshot of the code.

In: config, overrides, the job's size, options of sbatch. Out: job ids, or with `wait` the exit code of the
run. What a task does on its node is in launch.slurm_task.
"""

from __future__ import annotations

import itertools
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import launch
import phi3v_dist
import shards
from launch.description import STOP_LEAD_S, JobDescription, JobSize, check_batch, describe_job
from launch.slurm_task import NodeTask
from phi3v_dist.config import load_config
from phi3v_dist.exits import CRASHED, DONE
from shards.common.errors import BadInputError
from shards.common.text import one_line

POLL_S = 2.0
JOBS = "slurm"
"""Folder of submitit's files in the run directory."""
ONE_DAY = 24 * 60
"""Default time limit in minutes."""


@dataclass(frozen=True)
class SlurmOptions:
    """What sbatch is told besides the size.

    more: any other of its options, without dashes ("constraint": "h100"). lead_s: seconds before the time
    limit at which the ranks are told to stop.
    """

    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    lead_s: int = STOP_LEAD_S
    more: Mapping[str, str] = field(default_factory=dict)

    @property
    def placement(self) -> dict[str, str]:
        """Partition, account and QOS as parameters of submitit, those that are set."""
        every = {"partition": self.partition, "account": self.account, "qos": self.qos}
        return {name: value for name, value in every.items() if value}


DEFAULTS = SlurmOptions()


def launch_slurm(
    config_path: str,
    overrides: Sequence[str],
    size: JobSize,
    *,
    options: SlurmOptions = DEFAULTS,
    sweep: Sequence[str] = (),
    wait: bool = False,
    show: bool = False,
) -> int:
    """Submits the run, or one run per combination of `sweep` ("train.lr=1e-5,2e-5") as a job array.

    wait: follows the log until the job ends (Ctrl-C cancels it) and returns its exit code. show: prints the
    batch script and submits nothing. Raises BadInputError: config or size not usable, no sbatch, Slurm
    refused.
    """
    size = size if size.minutes is not None else replace(size, minutes=ONE_DAY)
    runs = combinations(config_path, overrides, sweep)
    job = describe_job(str(Path(config_path).resolve()), runs[0], size)
    for run in runs:
        swept = load_config(config_path, run)
        check_batch(size, swept.train, swept.parallel.sp)
    run_dir = load_config(config_path, overrides).run_dir.resolve()
    folder = run_dir / JOBS
    if show:
        print(batch_script(folder, batch_parameters(job, run_dir / "code", options)), end="")
        return DONE
    os.environ["SUBMITIT_PREEMPT_SIGNAL"] = "USR1"
    executor = slurm_executor(folder)
    executor.update_parameters(**batch_parameters(job, take_snapshot(run_dir), options))
    tasks = [NodeTask(job.config, run) for run in runs]
    try:
        jobs = (
            executor.map_array(lambda task: task(), tasks) if len(tasks) > 1 else [executor.submit(tasks[0])]
        )
    except Exception as error:
        raise refused(error) from error
    for submitted, run in zip(jobs, runs, strict=True):
        print(
            f"job {submitted.job_id}: {load_config(config_path, run).run_dir}, log {submitted.paths.stdout}"
        )
    return _follow_all(jobs) if wait else DONE


def _follow_all(jobs: Sequence[Any]) -> int:
    """Follows the jobs to their end; returns the largest exit code. Ctrl-C cancels them."""
    try:
        return max(follow(submitted) for submitted in jobs)
    except KeyboardInterrupt:
        numbers = [str(submitted.job_id) for submitted in jobs]
        subprocess.run(["scancel", *numbers], check=False)
        print(f"cancelled: job {', '.join(numbers)}", file=sys.stderr)
        return 128 + signal.SIGINT


def combinations(config_path: str, overrides: Sequence[str], sweep: Sequence[str]) -> list[tuple[str, ...]]:
    """The overrides of each run of a sweep, each run with its own name; without a sweep, the overrides alone.

    Raises BadInputError: an entry that is not key=value,value or a combination that the config refuses.
    """
    choices = []
    for entry in sweep:
        key, equals, values = entry.partition("=")
        if not equals or not values:
            raise BadInputError(f"sweep {entry!r} is not of the form key=value,value (train.lr=1e-5,2e-5)")
        choices.append([f"{key}={value}" for value in values.split(",")])
    if not choices:
        return [tuple(overrides)]
    name = load_config(config_path, overrides).name
    runs = []
    for number, chosen in enumerate(itertools.product(*choices)):
        runs.append((*overrides, *chosen, f"name={name}-{number}", f"track.group={name}"))
        load_config(config_path, runs[-1])
    return runs


def slurm_executor(folder: Path) -> Any:
    """submitit's executor. folder: for its files and the logs. Raises BadInputError where there is no
    sbatch.
    """
    if shutil.which("sbatch") is None:
        raise BadInputError("no sbatch on the PATH: submit from a login node of the cluster")
    from submitit import SlurmExecutor

    return SlurmExecutor(folder=folder)


def refused(error: Exception) -> BadInputError:
    """The error that tells in one line why Slurm refused a job."""
    return BadInputError(f"Slurm refused the job: {one_line(error)[-300:]}")


def batch_script(folder: Path, parameters: Mapping[str, Any], *, tasks: int | None = None) -> str:
    """The script as submitit 1.5.4 would write it. tasks: size of the array, None for a single job.

    `_make_sbatch_string` is private, but submitit has no public way to see the script: its executor needs an
    srun on this machine.
    """
    from submitit.slurm.slurm import _make_sbatch_string

    command = "python -u -m submitit.core._submit FOLDER"
    array: dict[str, Any] = {} if tasks is None else {"map_count": tasks}
    return str(_make_sbatch_string(command, folder, **array, **parameters))


def batch_parameters(job: JobDescription, snapshot: Path, options: SlurmOptions) -> dict[str, Any]:
    """submitit's parameters for the job: one task per node, and no srun flag that would end it before it has
    saved.

    snapshot: directory with the code that the job runs.
    """
    size = job.size
    environment = {"SUBMITIT_PREEMPT_SIGNAL": "USR1"}
    settings = Path(os.environ.get("PHI3V_CLUSTER_ENV", "slurm/cluster.env")).resolve()
    if size.cpu_processes:
        environment["PHI3V_CPU_PROCESSES"] = str(size.cpu_processes)
    return {
        "job_name": job.name,
        "nodes": size.nodes,
        "ntasks_per_node": 1,
        "cpus_per_task": size.cpus_per_node,
        "time": size.minutes,
        "signal_delay_s": options.lead_s,
        "stderr_to_stdout": True,
        "setup": [
            # Slurm signals this shell too; it must live until the ranks have saved.
            "trap : TERM USR1",
            *([f"set -a; source {shlex.quote(str(settings))}; set +a"] if settings.is_file() else []),
            *(f"export {name}={shlex.quote(value)}" for name, value in environment.items()),
            f"export PYTHONPATH={shlex.quote(str(snapshot))}${{PYTHONPATH:+:$PYTHONPATH}}",
        ],
        # Since Slurm 22.05 srun no longer inherits --cpus-per-task and would ask for one core.
        "srun_args": [
            "--mpi=none",
            "--kill-on-bad-exit=0",
            "--wait=300",
            f"--cpus-per-task={size.cpus_per_node}",
        ],
        "additional_parameters": {"requeue": True, "signal": f"USR1@{options.lead_s}", **options.more},
        **({"gpus_per_node": size.gpus} if size.gpus else {}),
        **options.placement,
    }


def take_snapshot(run_dir: Path) -> Path:
    """Copies the three packages into the run directory, so that a requeued job runs the code that it was
    submitted with; returns the copy's directory.
    """
    target = run_dir / "code" / time.strftime("%Y%m%d-%H%M%S")
    for package in (launch, phi3v_dist, shards):
        source = Path(package.__path__[0])
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(source, target / source.name, ignore=ignored, dirs_exist_ok=True)
    return target


def follow(job: Any) -> int:
    """Prints the job's logs as they grow, over all its requeues; returns the exit code of the run.

    The logs of all nodes: rank 0, which reports, is where the rendezvous puts it, not always on the first
    node.
    """
    tasks = [job.task(number) for number in range(job.num_tasks)]
    positions = {Path(str(task.paths.stdout)): 0 for task in tasks}
    results = [Path(str(task.paths.result_pickle)) for task in tasks]
    while True:
        ended = all(result.exists() for result in results) or not in_queue(job.job_id)
        positions = {log: _print_from(log, position) for log, position in positions.items()}
        if ended:
            break
        time.sleep(POLL_S)
    codes = [_code_in(result) for result in results if result.exists()]
    worst = max(codes, default=CRASHED)
    return worst if len(codes) == len(results) else worst or CRASHED


def _code_in(result: Path) -> int:
    from submitit.core.utils import pickle_load  # not documented; as in 1.5.4

    outcome, value = pickle_load(result)
    return int(value) if outcome == "success" else CRASHED


def in_queue(job_id: str) -> bool:
    """Whether Slurm still has the job: pending, running or ending. True if the controller does not answer."""
    shown = subprocess.run(
        ["squeue", "--noheader", "--jobs", job_id], capture_output=True, text=True, check=False
    )
    if shown.returncode and "Invalid job id" not in shown.stderr:
        return True
    return bool(shown.stdout.strip())


def _print_from(file: Path, position: int) -> int:
    """Prints a file from a position in bytes; returns the position of its end."""
    if not file.exists():
        return position
    with file.open("rb") as stream:
        stream.seek(position)
        text = stream.read()
    sys.stdout.write(text.decode(errors="replace"))
    sys.stdout.flush()
    return position + len(text)
