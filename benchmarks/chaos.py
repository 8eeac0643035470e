"""A run is killed with SIGKILL at random moments; the same command must then finish it with the same result.

    python benchmarks/chaos.py [--kills 30] [--seed 0] [--ranks 2] [--json PATH]

A tiny model trains on CPU ranks in float32, under `phi3v launch local`. For every kill, a new run of the same
config is started, and at a random moment one of these is killed: a rank, a rank while a checkpoint is
written, the launcher, or all processes at once. Then the command is started again. The run has survived if
the command ends with 0, the last weights are bit for bit those of an undisturbed run, no line of metrics is
missing, repeated or different, and no process is left. Exits 1 if a run has not survived.
"""

import argparse
import itertools
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parents[1])

import psutil
import torch
import yaml

from benchmarks.record import Comparison, report
from phi3v_dist.checkpoint import read as checkpoint
from shards.build import BuildOptions, build
from shards.sample import make_catalogue

ROOT = Path(__file__).resolve().parents[1]
KINDS = ("rank", "rank in a save", "launcher", "everything")
STEPS, EVERY = 12, 3
LIMIT_S = 420.0


@dataclass(frozen=True)
class Trial:
    """How one run was killed, and the result. killed: number of processes; 0 if the run had ended before.
    fault: what is wrong; None if the run has survived.
    """

    number: int
    kind: str
    killed: int
    killed_at_s: float
    steps_before: int
    seconds: float
    fault: str | None


def tiny_run(work: Path) -> Path:
    """Makes the data and the config of a run that takes seconds; returns the path of the config."""
    make_catalogue(work / "catalogue", 60, seed=1)
    options = BuildOptions(group_by="product_code", shard_samples=25)
    build(str(work / "catalogue/products.csv"), str(work / "shards"), options)
    tree: dict[str, Any] = yaml.safe_load((ROOT / "configs/tiny.yaml").read_text())
    tree["name"], tree["runs_dir"] = "straight", str(work / "runs")
    tree["data"] |= {"path": str(work / "shards"), "seq_len": 256}
    tree["train"] |= {"steps": STEPS, "warmup_steps": 2}
    tree["checkpoint"] = {"every_steps": EVERY, "async": True}
    tree["eval"] |= {"every_steps": 0, "loss_samples": 6, "generate_samples": 2, "max_new_tokens": 4}
    tree["track"] = {"log_every": 1, "mode": "disabled"}
    file = work / "tiny.yaml"
    file.write_text(yaml.safe_dump(tree))
    return file


def start(config: Path, name: str, ranks: int) -> subprocess.Popen[bytes]:
    """Starts `phi3v launch local` for the run `name`. Its output goes to a log beside the config."""
    command = [sys.executable, "-m", "launch.cli", "launch", "local", str(config)]
    command += ["--processes", str(ranks), f"name={name}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    with (config.parent / f"{name}.log").open("ab") as log:
        return subprocess.Popen(
            command, stdout=log, stderr=log, env=environment, cwd=ROOT, start_new_session=True
        )


def processes_of(config: Path, name: str, word: str = "", but: str | None = None) -> list[psutil.Process]:
    """The processes of this run of this config whose command line has `word` and does not have `but`."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        line = " ".join(process.info["cmdline"] or [])
        is_ours = str(config) in line and f"name={name}" in line and process.pid != os.getpid()
        if is_ours and word in line and (but is None or but not in line):
            found.append(process)
    return found


def kill(processes: list[psutil.Process]) -> int:
    """Kills the processes; returns how many of them were still running."""
    killed = 0
    for process in processes:
        try:
            process.kill()
            killed += 1
        except psutil.NoSuchProcess:
            continue
    return killed


def disturb(
    kind: str, delay_s: float, chance: random.Random, config: Path, name: str, run_dir: Path, run: Any
) -> int:
    """Waits for the moment, then kills. Returns the number of killed processes; 0 if the run had ended. A
    rank is killed as soon as one is running.
    """
    began = time.monotonic()
    if kind == "rank in a save":
        saves = chance.randint(1, STEPS // EVERY)
        seen: set[str] = set()
        while run.poll() is None and time.monotonic() - began < LIMIT_S:
            seen |= {path.name for path in run_dir.glob("checkpoints/.step-*.partial")}
            if len(seen) >= saves:
                break
            time.sleep(0.001)
        time.sleep(chance.random() * 0.05)
    else:
        while run.poll() is None and time.monotonic() - began < delay_s:
            time.sleep(0.02)
    if kind == "launcher":
        return kill([psutil.Process(run.pid)] if run.poll() is None else [])
    if kind == "everything":
        return kill(processes_of(config, name))
    ranks: list[psutil.Process] = []
    while not ranks and run.poll() is None and time.monotonic() - began < LIMIT_S:
        ranks = sorted(
            processes_of(config, name, "launch.torchrun.rank", "launch.torchrun.agent"),
            key=lambda each: each.pid,
        )
        time.sleep(0.02)
    return kill([chance.choice(ranks)] if ranks else [])


def losses(run_dir: Path) -> list[tuple[int, float]]:
    """(step, loss) of every line of metrics.jsonl; a repeated line is there twice."""
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [(line["train/global_step"], line["train/loss"]) for line in lines if "train/loss" in line]


def weights(run_dir: Path) -> dict[str, torch.Tensor]:
    """The weights of the last step."""
    newest = checkpoint.newest(run_dir / "checkpoints")
    assert newest is not None and checkpoint.step_of(newest) == STEPS, f"no last checkpoint in {run_dir}"
    return dict(checkpoint.read_tensors(newest))


def fault_of(config: Path, name: str, ranks: int, straight: Path) -> str | None:
    """Starts the command again. Returns what is wrong afterwards; None if nothing."""
    run_dir = straight.parent / name
    again = start(config, name, ranks)
    try:
        code = again.wait(LIMIT_S)
    except subprocess.TimeoutExpired:
        kill(processes_of(config, name))
        return f"the second start still ran after {LIMIT_S:g} s"
    if code:
        return f"the second start ended with {code}"
    time.sleep(1.5)
    if left := processes_of(config, name):
        kill(left)
        return f"{len(left)} processes were left running"
    ours, theirs = weights(run_dir), weights(straight)
    if different := [key for key in theirs if not torch.equal(ours[key], theirs[key])]:
        return f"{len(different)} tensors differ, the first is {different[0]}"
    if losses(run_dir) != losses(straight):
        return "the losses differ"
    partial = list(run_dir.glob("checkpoints/.step-*"))
    return f"{partial[0]} was left" if partial else None


def trial(number: int, config: Path, ranks: int, straight: Path, length_s: float, seed: int) -> Trial:
    """Starts a run, kills it and starts it again. length_s: seconds of an undisturbed run."""
    chance = random.Random(f"{seed} {number}")
    kind, name, began = KINDS[number % len(KINDS)], f"chaos-{number:03d}", time.monotonic()
    run = start(config, name, ranks)
    run_dir = straight.parent / name
    killed = disturb(kind, chance.random() * length_s, chance, config, name, run_dir, run)
    killed_at = time.monotonic() - began
    before = [checkpoint.step_of(path) for path in checkpoint.checkpoints(run_dir / "checkpoints")]
    if kind != "launcher":  # its ranks save and end by themselves, the second start has to wait for them
        try:
            run.wait(120)
        except subprocess.TimeoutExpired:
            kill(processes_of(config, name))
            return Trial(number, kind, killed, killed_at, 0, 0, "the launcher did not notice within 120 s")
    else:
        run.wait(10)
    fault = fault_of(config, name, ranks, straight)
    return Trial(number, kind, killed, killed_at, max(before, default=0), time.monotonic() - began, fault)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--json")
    parser.add_argument("--work", type=Path, help="directory to keep; default: a temporary one")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        work = (options.work or Path(temporary)).resolve()
        config = tiny_run(work)
        began = time.monotonic()
        if start(config, "straight", options.ranks).wait(LIMIT_S):
            print(f"the undisturbed run failed; see {work / 'straight.log'}")
            return 1
        length_s = time.monotonic() - began
        print(f"undisturbed: {STEPS} steps on {options.ranks} ranks in {length_s:.1f} s, seed {options.seed}")
        trials: list[Trial] = []
        numbers = itertools.count()
        while len(trials) < options.kills:
            number = next(numbers)
            last = trial(number, config, options.ranks, work / "runs/straight", length_s, options.seed)
            if not last.killed and last.fault is None:
                print(f"{number:3d} {last.kind:15} had ended before; tried again")
                continue
            trials.append(last)
            print(
                f"{number:3d} {last.kind:15} after {last.killed_at_s:5.1f} s, newest checkpoint "
                f"{last.steps_before:2d}: "
                f"{last.fault or 'finished, bit for bit'} ({last.seconds:.0f} s)",
                flush=True,
            )
    survived = sum(each.fault is None for each in trials)
    share = survived / max(1, len(trials))
    what = "runs killed at a random moment that end bit for bit as the undisturbed one"
    found = Comparison(what, "all of them", survived, len(trials), "runs", share, "all", share == 1)
    return report("chaos", [found], options.json)


if __name__ == "__main__":
    raise SystemExit(main())
