"""A Slurm cluster on this machine for the tests: munged, slurmctld and three slurmd, all in one directory.

The nodes claim 8 cores and 8 GPUs each (empty files stand for the devices). Needs the packages slurm-wlm and
munge, and root. Everything started is ended by pid, also what a killed slurmd has left behind.
"""

from __future__ import annotations

import contextlib
import os
import pwd
import re
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path

import psutil

from tests.waiting import wait_for

NODES = ("node1", "node2", "node3")
NEEDED = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol")

SLURM_CONF = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller_port}
AuthType=auth/munge
AuthInfo=socket={directory}/munge.socket
CryptoType=crypto/munge
SlurmUser=root
SlurmdUser=root
StateSaveLocation={directory}/state
SlurmctldPidFile={directory}/slurmctld.pid
SlurmctldLogFile={directory}/slurmctld.log
SlurmdPidFile={directory}/slurmd-%n.pid
SlurmdSpoolDir={directory}/spool-%n
SlurmdLogFile={directory}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
SlurmdParameters=config_overrides
ReturnToService=2
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=2,sched_min_interval=0,batch_sched_delay=0
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmdTimeout=5
KillWait=30
GresTypes=gpu
{nodes}
PartitionName=main Nodes=node1,node2,node3 Default=YES MaxTime=60 PriorityTier=1 GraceTime=30
PartitionName=urgent Nodes=node1,node2,node3 MaxTime=60 PriorityTier=10
"""


class SlurmCluster:
    """The running cluster. directory: holds its configuration, logs and state. environment: to reach it."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.environment = {**os.environ, "SLURM_CONF": str(directory / "slurm.conf")}
        # What the shell that runs the tests has set must not decide what they prove.
        for name in [name for name in self.environment if name.startswith(("SBATCH_", "SRUN_", "PHI3V_"))]:
            del self.environment[name]
        self._outputs: dict[int, Path] = {}
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}

    def start(self) -> None:
        """Starts everything and waits until all nodes are idle."""
        self._write_configuration()
        self._start_munge()
        for sub in ("state", *(f"spool-{node}" for node in NODES)):
            (self.directory / sub).mkdir()
        self._spawn("slurmctld", ["slurmctld", "-D", "-f", self.environment["SLURM_CONF"]])
        for node in NODES:
            self._spawn(node, ["slurmd", "-D", "-N", node, "-f", self.environment["SLURM_CONF"]])
        wait_for(lambda: self.node_states() == {node: "idle" for node in NODES}, 60, "idle nodes", self.logs)

    def restart_node(self, node: str) -> None:
        """Brings a killed node back and waits until it is idle."""
        self._daemons.pop(node).wait(10)
        self._spawn(node, ["slurmd", "-D", "-N", node, "-f", self.environment["SLURM_CONF"]])
        wait_for(lambda: self.node_states()[node] == "idle", 60, f"{node} to be idle", self.logs)

    def kill_node(self, node: str) -> None:
        """The sudden death of a node: its slurmd, its steps and everything they run."""
        daemon = self._daemons[node]
        doomed = [
            process for process in self._processes() if _environment(process).get("SLURMD_NODENAME") == node
        ]
        for process in [psutil.Process(daemon.pid), *doomed]:
            _kill(process)

    def stop(self) -> None:
        """Ends every process of the cluster and of its jobs, by pid."""
        self.clear()
        for daemon in reversed(list(self._daemons.values())):
            daemon.terminate()
        for process in self._processes():
            _kill(process)
        for daemon in self._daemons.values():
            with contextlib.suppress(subprocess.TimeoutExpired):
                daemon.wait(5)
            daemon.kill()
            daemon.wait(5)
        shutil.rmtree(self.directory, ignore_errors=True)

    def clear(self) -> None:
        """Cancels every job and waits until none is left."""
        self.run("scancel", "--signal=KILL", "--full", "--user=root", check=False)
        self.run("scancel", "--user=root", check=False)
        wait_for(lambda: not self.run("squeue", "--noheader").strip(), 60, "an empty queue", self.logs)

    def run(self, *command: str, check: bool = True, timeout_s: float = 30, cwd: Path | None = None) -> str:
        """Output of a Slurm command; fails the test with its error output if it fails."""
        done = subprocess.run(
            command,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
            cwd=cwd,
        )
        assert not check or done.returncode == 0, f"{command}: {done.stdout}{done.stderr}\n{self.logs()}"
        return done.stdout

    def submit(self, *arguments: str, cwd: Path, environment: Mapping[str, str] | None = None) -> int:
        """`sbatch arguments` in `cwd`; returns the job's id."""
        command = ["sbatch", "--parsable", f"--output={cwd}/slurm-%j.out", *arguments]
        done = subprocess.run(
            command,
            env={**self.environment, **(environment or {})},
            capture_output=True,
            text=True,
            timeout=30,
            check=False,
            cwd=cwd,
        )
        assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        job = int(done.stdout.split(";")[0])
        self._outputs[job] = cwd / f"slurm-{job}.out"
        return job

    def job(self, job: int | str) -> dict[str, str]:
        """The fields of `scontrol show job`; of an array: ARRAY_TASK."""
        shown = self.run("scontrol", "show", "job", "--oneliner", str(job))
        return dict(re.findall(r"(\S+?)=(\S*)", shown))

    def state(self, job: int | str) -> str:
        return self.job(job)["JobState"]

    def resume(self, job: int | str) -> None:
        """Waits until the job is back in the queue; lets it go on without the two minutes that Slurm would
        wait."""
        self.wait_for_state(job, ("PENDING", "RUNNING"), 60)
        if self.state(job) == "PENDING":
            time.sleep(2)  # a slurmd refuses a job that starts in the second in which it was killed
            self.run("scontrol", "update", f"jobid={job}", "StartTime=now")

    def wait_for_state(self, job: int | str, states: str | tuple[str, ...], seconds: float) -> str:
        """Waits until the job is in one of `states`; fails the test if it ends in another."""
        wanted = (states,) if isinstance(states, str) else states
        final = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL"}

        def arrived() -> bool:
            state = self.state(job)
            assert state in wanted or state not in final, (
                f"job {job} is {state}\n{self.output(job)}\n{self.logs()}"
            )
            return state in wanted

        wait_for(arrived, seconds, f"job {job} to be {wanted}", lambda: self.output(job) + self.logs())
        return self.state(job)

    def output(self, job: int | str) -> str:
        """What a job of `submit` has written so far."""
        file = self._outputs.get(job) if isinstance(job, int) else None
        return file.read_text() if file is not None and file.exists() else ""

    def node_states(self) -> dict[str, str]:
        lines = self.run("sinfo", "--noheader", "--Node", "--partition=main", "--format=%N %T", check=False)
        return dict(line.split() for line in lines.splitlines())

    def logs(self) -> str:
        """The last lines of the daemons' logs, for the message of a test that failed."""
        tails = []
        for file in sorted(self.directory.glob("slurm*.log")):
            lines = [line for line in file.read_text().splitlines() if "pmix" not in line]
            tails.append(f"--- {file.name}\n" + "\n".join(lines[-8:]))
        return "\n".join(tails)

    def _write_configuration(self) -> None:
        ports = free_ports(1 + len(NODES))
        host = socket.gethostname()
        nodes = "\n".join(
            f"NodeName={node} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} "
            "CPUs=8 RealMemory=8000 Gres=gpu:8"
            for node, port in zip(NODES, ports[1:], strict=True)
        )
        text = SLURM_CONF.format(host=host, controller_port=ports[0], directory=self.directory, nodes=nodes)
        (self.directory / "slurm.conf").write_text(text)
        for gpu in range(8):
            (self.directory / f"nvidia{gpu}").touch()
        (self.directory / "gres.conf").write_text(f"Name=gpu File={self.directory}/nvidia[0-7]\n")

    def _start_munge(self) -> None:
        key = self.directory / "munge.key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o400)
        owner = pwd.getpwnam("munge")
        own = self.directory / "munge"
        own.mkdir(mode=0o755)
        for path in (key, own):
            os.chown(path, owner.pw_uid, owner.pw_gid)
        socket_path = self.directory / "munge.socket"
        options = {
            "key-file": key,
            "socket": own / "socket",
            "pid-file": own / "pid",
            "log-file": own / "log",
            "seed-file": own / "seed",
        }
        socket_path.symlink_to(own / "socket")
        command = ["munged", "--foreground", *(f"--{name}={path}" for name, path in options.items())]
        self._spawn("munged", command, user="munge")
        wait_for((own / "socket").exists, 20, "munged", self.logs)

    def _spawn(self, name: str, command: list[str], user: str | None = None) -> None:
        with (self.directory / f"{name}.out").open("ab") as log:
            self._daemons[name] = subprocess.Popen(
                command,
                env=self.environment,
                stdout=log,
                stderr=log,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
                user=user,
            )

    def _processes(self) -> list[psutil.Process]:
        """Every process of this cluster: they all know its configuration."""
        ours = self.environment["SLURM_CONF"]
        daemons = {daemon.pid for daemon in self._daemons.values()}
        return [
            process
            for process in psutil.process_iter()
            if process.pid not in daemons and _environment(process).get("SLURM_CONF") == ours
        ]


def free_ports(count: int) -> list[int]:
    """Ports that nothing listens on now."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [int(each.getsockname()[1]) for each in sockets]


def _environment(process: psutil.Process) -> Mapping[str, str]:
    try:
        return process.environ()
    except psutil.Error:
        return {}


def _kill(process: psutil.Process) -> None:
    with contextlib.suppress(psutil.Error):
        process.send_signal(signal.SIGKILL)
