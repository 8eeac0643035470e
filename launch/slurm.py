"""`phi3v launch slurm`: submits a run with submitit, one task a node, from a snapshot of the code.

In: config, overrides, the job's size, sbatch options. Out: job ids, or with `wait` the exit code of the run.
What a task does is launch.cluster's business, as under slurm/train.sh; requeueing is done here, after all
ranks have saved: submitit's own way would save on rank 0 alone, inside a signal handler, while the others
wait in a collective.
"""

from __future__ import annotations

import itertools
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import launch
import phi3v_dist
import shards
from launch import health
from launch.cluster import run_cluster_node
from launch.description import MAX_REQUEUES, STOP_LEAD_S, JobDescription, check_batch, job_name
from launch.health import UNHEALTHY
from phi3v_dist.config import load_config
from phi3v_dist.exits import CRASHED, DONE, PREEMPTED, USAGE
from shards.common.errors import BadInputError

POLL_S = 2.0
JOBS = "slurm"
"""Folder of submitit's files in the run directory."""


@dataclass(frozen=True)
class SlurmOptions:
    """What sbatch is told besides the size. more: any other of its options, without dashes ("constraint":
    "h100"). lead_s: seconds before the time limit at which the ranks are told to stop.
    """

    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    lead_s: int = STOP_LEAD_S
    max_requeues: int = MAX_REQUEUES
    more: Mapping[str, str] = field(default_factory=dict)


DEFAULTS = SlurmOptions()


@dataclass(frozen=True)
class NodeTask:
    """What submitit runs on each node; pickled, so it holds plain values only."""

    config: str
    overrides: tuple[str, ...]
    max_requeues: int

    def __call__(self) -> int:
        """Runs this node's ranks; returns their exit code. Stopped ranks put the job back into the queue."""
        environment = dict(os.environ)
        environment["PHI3V_HEAD"] = head_address(environment)
        try:
            if faults := health.faults_here(load_config(self.config, self.overrides), environment):
                node = health.node_name(environment)
                print(f"phi3v: {node} is not healthy: {'; '.join(faults)}", file=sys.stderr, flush=True)
                return self._again(UNHEALTHY, environment, node)
            code = run_cluster_node(self.config, self.overrides, environment)
        except BadInputError as error:
            print(f"phi3v: {error}", file=sys.stderr, flush=True)
            return _ended(USAGE)
        return self._again(code, environment) if code == PREEMPTED else _ended(code)

    def _again(self, code: int, environment: Mapping[str, str], avoid: str = "") -> int:
        """The job goes back into the queue, without the node `avoid`; if it was cancelled or has been back
        often enough it ends with `code`.
        """
        if cancelled(environment):
            print("phi3v: cancelled; submit the same command to go on", file=sys.stderr, flush=True)
            return _ended(code)
        if int(environment.get("SLURM_RESTART_COUNT", "0")) >= self.max_requeues:
            return _ended(code)
        if avoid or environment.get("SLURM_NODEID") == "0":
            _requeue(environment, avoid)
        return _wait_for_the_end()


def _requeue(environment: Mapping[str, str], avoid: str) -> None:
    """Puts the job back into the queue. avoid: a node that it shall not get any more, "" for none."""
    job = own_job(environment)
    for each in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(each, signal.SIG_IGN)  # Slurm ends this task now, and by force after KillWait
    subprocess.run(["scontrol", "requeue", job], check=True)
    if avoid:  # possible once the job is pending
        known = _shown(job).get("ExcNodeList", "(null)")
        nodes = avoid if known == "(null)" else f"{known},{avoid}"
        subprocess.run(["scontrol", "update", f"JobId={job}", f"ExcNodeList={nodes}"], check=False)


def _wait_for_the_end() -> int:
    """Until Slurm ends this task of a job that was requeued: its result would say that the run is over."""
    for each in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(each, signal.SIG_DFL)
    time.sleep(120)
    return PREEMPTED


def _ended(code: int) -> int:
    """`code` as the task's result. If it is not 0 the process ends with it here: to Slurm a function that
    returns is a job that COMPLETED.
    """
    if code == DONE:
        return code
    from submitit import JobEnvironment
    from submitit.core.utils import cloudpickle_dump, temporary_save_path

    with temporary_save_path(JobEnvironment().paths.result_pickle) as file:
        cloudpickle_dump(("success", code), file)
    raise SystemExit(code)


def own_job(environment: Mapping[str, str]) -> str:
    """What scontrol calls this job. One task of an array has the number of the whole array as its own, and
    by that number all of them would be requeued.
    """
    array, task = environment.get("SLURM_ARRAY_JOB_ID"), environment.get("SLURM_ARRAY_TASK_ID")
    return f"{array}_{task}" if array and task else environment["SLURM_JOB_ID"]


def cancelled(environment: Mapping[str, str]) -> bool:
    """Whether this job was cancelled. Slurm calls a job that it ends COMPLETING, whatever it ends it for, and
    would requeue even one that was cancelled; what else ends jobs leaves a trace in `scontrol show job`.
    """
    fields = _shown(own_job(environment))
    requeued = fields.get("Restarts") != environment.get("SLURM_RESTART_COUNT", "0")
    preempted = fields.get("PreemptTime", "None") != "None"
    other = requeued or preempted or fields.get("Reason") != "None"
    state = fields.get("JobState")
    return state == "CANCELLED" or (state == "COMPLETING" and not other)


def _shown(job: str) -> dict[str, str]:
    """The fields of `scontrol show job`; none if the controller does not answer."""
    shown = subprocess.run(["scontrol", "show", "job", job], capture_output=True, text=True, check=False)
    return dict(re.findall(r"(\S+?)=(\S*)", shown.stdout))


def head_address(environment: Mapping[str, str]) -> str:
    """Address of the job's first node, as Slurm itself reaches it."""
    listed = ["scontrol", "show", "hostnames", environment["SLURM_JOB_NODELIST"]]
    first = subprocess.run(listed, capture_output=True, text=True, check=True).stdout.split()[0]
    shown = subprocess.run(
        ["scontrol", "show", "node", first], capture_output=True, text=True, check=True
    ).stdout
    addresses = [word.removeprefix("NodeAddr=") for word in shown.split() if word.startswith("NodeAddr=")]
    return addresses[0] if addresses else first


def launch_slurm(
    config_path: str,
    overrides: Sequence[str],
    nodes: int = 1,
    gpus_per_node: int = 8,
    cpu_processes: int = 0,
    minutes: int = 24 * 60,
    cpus_per_gpu: int = 8,
    options: SlurmOptions = DEFAULTS,
    sweep: Sequence[str] = (),
    wait: bool = False,
    show: bool = False,
) -> int:
    """Submits the run, or one run per combination of `sweep` ("train.lr=1e-5,2e-5") as a job array.

    wait: follows the log until the job ends, Ctrl-C cancels it; returns its exit code. show: prints the batch
    script and submits nothing. Raises BadInputError: config or sizes not usable, no sbatch, Slurm refused.
    """
    runs = combinations(config_path, overrides, sweep)
    config = load_config(config_path, runs[0])
    job = JobDescription(
        name=job_name(config.name),
        config=str(Path(config_path).resolve()),
        overrides=runs[0],
        nodes=nodes,
        gpus_per_node=0 if cpu_processes else gpus_per_node,
        cpu_processes=cpu_processes,
        cpus_per_gpu=cpus_per_gpu,
        minutes=minutes,
    )
    for run in runs:
        swept = load_config(config_path, run)
        check_batch(job, swept.train, swept.parallel.sp)
    run_dir = load_config(config_path, overrides).run_dir.resolve()
    folder = run_dir / JOBS
    if show:
        print(batch_script(job, folder, run_dir / "code", options), end="")
        return DONE
    if shutil.which("sbatch") is None:
        raise BadInputError("no sbatch on the PATH: submit from a login node of the cluster")
    os.environ["SUBMITIT_PREEMPT_SIGNAL"] = "USR1"
    from submitit import SlurmExecutor

    executor = SlurmExecutor(folder=folder)
    executor.update_parameters(**batch_parameters(job, take_snapshot(run_dir), options))
    tasks = [NodeTask(job.config, run, options.max_requeues) for run in runs]
    try:
        jobs = (
            executor.map_array(lambda task: task(), tasks) if len(tasks) > 1 else [executor.submit(tasks[0])]
        )
    except Exception as error:
        reason = " ".join(str(error).split())
        raise BadInputError(f"Slurm refused the job: {reason[-300:]}") from error
    for submitted, run in zip(jobs, runs, strict=True):
        print(
            f"job {submitted.job_id}: {load_config(config_path, run).run_dir}, log {submitted.paths.stdout}"
        )
    if not wait:
        return DONE
    try:
        return max(follow(submitted) for submitted in jobs)
    except KeyboardInterrupt:
        numbers = [str(submitted.job_id) for submitted in jobs]
        subprocess.run(["scancel", *numbers], check=False)
        print(f"cancelled: job {', '.join(numbers)}", file=sys.stderr)
        return 128 + signal.SIGINT


def combinations(config_path: str, overrides: Sequence[str], sweep: Sequence[str]) -> list[tuple[str, ...]]:
    """The overrides of each run of a sweep, each with a name of its own; without a sweep, the overrides.

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


def batch_script(job: JobDescription, folder: Path, snapshot: Path, options: SlurmOptions) -> str:
    """The script as submitit 1.5.4 writes it; the function is its own, the executor would ask for an srun
    here."""
    from submitit.slurm.slurm import _make_sbatch_string

    command = "python -u -m submitit.core._submit FOLDER"
    return str(_make_sbatch_string(command, folder, **batch_parameters(job, snapshot, options)))


def batch_parameters(job: JobDescription, snapshot: Path, options: SlurmOptions) -> dict[str, Any]:
    """submitit's parameters for the job: one task a node, no srun flag that would end it before it has
    saved."""
    environment = {"SUBMITIT_PREEMPT_SIGNAL": "USR1", **job.environment}
    settings = Path(os.environ.get("PHI3V_CLUSTER_ENV", "slurm/cluster.env")).resolve()
    if job.cpu_processes:
        environment["PHI3V_CPU_PROCESSES"] = str(job.cpu_processes)
    optional = {
        "gpus_per_node": job.gpus_per_node or None,
        "partition": options.partition,
        "account": options.account,
        "qos": options.qos,
    }
    cpus = job.cpu_processes or job.gpus_per_node * job.cpus_per_gpu
    return {
        "job_name": job.name,
        "nodes": job.nodes,
        "ntasks_per_node": 1,
        "cpus_per_task": cpus,
        "time": job.minutes,
        "signal_delay_s": options.lead_s,
        "stderr_to_stdout": True,
        "setup": [
            # Slurm signals this shell too; it must live until the ranks have saved.
            "trap : TERM USR1",
            *([f"set -a; source {shlex.quote(str(settings))}; set +a"] if settings.is_file() else []),
            *(f"export {name}={shlex.quote(value)}" for name, value in environment.items()),
            f"export PYTHONPATH={shlex.quote(str(snapshot))}${{PYTHONPATH:+:$PYTHONPATH}}",
        ],
        # Since Slurm 22.05 srun asks for one core unless it is told again.
        "srun_args": ["--mpi=none", "--kill-on-bad-exit=0", "--wait=300", f"--cpus-per-task={cpus}"],
        "additional_parameters": {"requeue": True, "signal": f"USR1@{options.lead_s}", **options.more},
        **{key: value for key, value in optional.items() if value},
    }


def take_snapshot(run_dir: Path) -> Path:
    """Copies the three packages into the run directory: a requeued job runs the code that it was submitted
    with."""
    target = run_dir / "code" / time.strftime("%Y%m%d-%H%M%S")
    for package in (launch, phi3v_dist, shards):
        source = Path(package.__path__[0])
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(source, target / source.name, ignore=ignored, dirs_exist_ok=True)
    return target


def follow(job: Any) -> int:
    """Prints the job's logs as they grow, over all its requeues; returns the exit code of the run. The logs
    of all nodes: rank 0, which reports, is where the rendezvous puts it, not always on the first.
    """
    tasks = job._sub_jobs or [job]
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
    from submitit.core.utils import pickle_load

    outcome, value = pickle_load(result)
    return int(value) if outcome == "success" else CRASHED


def in_queue(job_id: str) -> bool:
    """Whether Slurm still has the job: pending, running or on its way out. A controller that does not answer
    has not forgotten it.
    """
    shown = subprocess.run(
        ["squeue", "--noheader", "--jobs", job_id], capture_output=True, text=True, check=False
    )
    if shown.returncode and "Invalid job id" not in shown.stderr:
        return True
    return bool(shown.stdout.strip())


def _print_from(file: Path, position: int) -> int:
    if not file.exists():
        return position
    with file.open("rb") as stream:
        stream.seek(position)
        text = stream.read()
    sys.stdout.write(text.decode(errors="replace"))
    sys.stdout.flush()
    return position + len(text)
