"""`phi3v demo`: the whole job at tiny size, from drawn images to an exported model, with the real commands.

In: a config with overrides, the number of products. Out: RUN/summary.json and a table. Every stage finds out
itself what is already done, so a demo that was killed resumes where it stopped.
"""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from launch.local import launch_local
from phi3v_dist.config import RunConfig, load_config
from phi3v_dist.exits import DONE
from shards.common.errors import BadInputError
from shards.common.files import write_atomically
from shards.format.index import read_index

SUMMARY = "summary.json"
_SECONDS = "demo-seconds.json"
_STAGES = ("sample", "build", "train", "evaluate", "export")


def run_demo(config_path: str, rows: int, overrides: Sequence[str]) -> int:
    """Runs the stages that are not done yet; returns the exit code of the first that fails, else 0.

    rows: products in the catalogue. The dataset is written to the config's data.path, the catalogue beside
    it. Raises BadInputError for a config that cannot be used.
    """
    config = load_config(config_path, overrides)
    if config.data.path is None:
        raise BadInputError(f"{config_path}: the demo makes one dataset; set data.path, not data.sources")
    run_dir, dataset = config.run_dir, Path(config.data.path)
    catalogue, export = dataset.parent / "catalogue", run_dir / "export"
    made_with = {"config": config.model_dump(mode="json"), "rows": rows}
    console = Console(soft_wrap=True, highlight=False)
    done = _read(run_dir / SUMMARY)
    if done.get("made_with") == made_with:
        _print_summary(console, done)
        console.print(f"Already done; delete {run_dir} to run the demo again.")
        return DONE
    run_dir.mkdir(parents=True, exist_ok=True)
    clock = _Clock(run_dir / _SECONDS, console)

    table = str(catalogue / "products.csv")
    with clock.stage("sample"):
        _run(["shards", "sample", "--rows", str(rows), "--seed", str(config.seed), "--out", str(catalogue)])
    with clock.stage("build"):
        # Fetched by URL from a server on loopback, as the images of a real catalogue would be.
        serve = ["--group-by", "product_code", "--serve-dir", str(catalogue)]
        _run(["shards", "build", table, "--out", str(dataset), *serve])
    with clock.stage("train"):
        _show(["launch", "local", config_path, *overrides])
        code = launch_local(config_path, overrides)
    if code != DONE:
        console.print(
            f"Training ended with exit code {code}; run the demo again to resume from its checkpoint."
        )
        return code
    with clock.stage("evaluate"):
        before, after = _evaluate(run_dir, dataset)
    with clock.stage("export"):
        if not (export / "README.md").exists():
            _run(["export", str(run_dir), str(export)])
        answer = _ask(export, dataset, catalogue)

    summary = {
        "baseline": after["baseline"],
        "before": before["scores"],
        "after": after["scores"],
        "after_shuffled_images": after["swapped"],
        "train": _train_facts(config),
        "seconds": clock.seconds,
        "export": str(export),
        "answer": answer,
        "wandb": next((str(path) for path in sorted(run_dir.glob("wandb/*run-*"), reverse=True)), None),
        "metrics": str(run_dir / "metrics.jsonl"),
        "checkpoints": str(run_dir / "checkpoints"),
        "made_with": made_with,
    }
    write_atomically(run_dir / SUMMARY, (json.dumps(summary, indent=1) + "\n").encode())
    _print_summary(console, summary)
    return DONE


def _evaluate(run_dir: Path, dataset: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The scores of the initial and of the trained weights. Both evaluations run at the same time, on a
    core each.
    """
    outs = [run_dir / "eval" / "before", run_dir / "eval" / "after"]
    commands = [
        ["evaluate", str(run_dir / "init"), str(dataset), "--no-swap", "--out", str(outs[0])],
        ["evaluate", str(run_dir), str(dataset), "--out", str(outs[1])],
    ]
    missing = [c for c, out in zip(commands, outs, strict=True) if not (out / "scores.json").exists()]
    for command in missing:
        _show(command)
    running = [_start(command, subprocess.PIPE) for command in missing]
    for command, process in zip(missing, running, strict=True):
        output = process.communicate()[0]
        _check(command, process, output)
        print(output.rstrip())
    return _read(outs[0] / "scores.json"), _read(outs[1] / "scores.json")


def _ask(export: Path, dataset: Path, catalogue: Path) -> str:
    """Loads the export in a new process and asks it about one image of the val split; returns the answer."""
    record = read_index(str(dataset), "val", ["messages", "meta"]).slice(0, 1).to_pylist()[0]
    image = catalogue / "images" / json.loads(record["meta"])["imageurl"].rsplit("/", 1)[-1]
    command = ["ask", str(export), str(image), "--prompt", record["messages"][0]["content"]]
    _show(command)
    process = _start(command, subprocess.PIPE)
    answer = process.communicate()[0].strip()
    _check(command, process, answer)
    print(f"answer: {answer!r}\ntruth:  {record['messages'][-1]['content']!r}")
    return answer


def _train_facts(config: RunConfig) -> dict[str, Any]:
    lines = [json.loads(line) for line in (config.run_dir / "metrics.jsonl").read_text().splitlines()]
    losses = [line["train/loss"] for line in lines if "train/loss" in line]
    checkpoints = config.run_dir / "checkpoints"
    latest = checkpoints / (checkpoints / "latest").read_text().strip()
    meta = _read(latest / "meta.json")
    return {
        "steps": meta["progress"]["step"],
        "tokens": meta["progress"]["tokens"],
        "loss_first": losses[0],
        "loss_last": losses[-1],
        "world_size": meta["run"]["world_size"],
        "zero_stage": meta["run"]["zero_stage"],
    }


def _run(arguments: Sequence[str]) -> None:
    """Runs `phi3v ARGUMENTS` in another process and shows its output."""
    _show(arguments)
    process = _start(arguments, None)
    process.communicate()
    _check(arguments, process, "")


def _start(arguments: Sequence[str], stdout: int | None) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "launch.cli.main", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, stdout=stdout, text=True, env=environment)


def _show(arguments: Sequence[str]) -> None:
    print(f"$ phi3v {shlex.join(arguments)}", flush=True)


def _check(arguments: Sequence[str], process: subprocess.Popen[str], output: str) -> None:
    if process.returncode:
        raise StageError(
            process.returncode, f"phi3v {arguments[0]} ended with exit code {process.returncode} {output}"
        )


class StageError(RuntimeError):
    """A stage failed, and its own output says why. code: its exit code."""

    def __init__(self, code: int, message: str) -> None:
        super().__init__(message.strip())
        self.code = code


def _read(path: Path) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads(path.read_text())
        return found
    except (OSError, ValueError):
        return {}


class _Clock:
    """Prints the name of each stage and records the seconds of all, including those of a demo that was
    killed.
    """

    def __init__(self, path: Path, console: Console) -> None:
        self.seconds: dict[str, float] = _read(path)
        self._path, self._console = path, console

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        self._console.print(f"[bold]\\[{_STAGES.index(name) + 1}/{len(_STAGES)}] {name}[/bold]")
        began = time.monotonic()
        try:
            yield
        finally:
            self.seconds[name] = round(self.seconds.get(name, 0.0) + time.monotonic() - began, 2)
            write_atomically(self._path, json.dumps(self.seconds).encode())


def _print_summary(console: Console, summary: dict[str, Any]) -> None:
    table = Table("", "price MAE", "price parsed", "category", "title")
    for key, name in (
        ("baseline", "constant answer"),
        ("before", "before training"),
        ("after", "after training"),
        ("after_shuffled_images", "after, images swapped"),
    ):
        scores = summary[key]
        mae = "-" if scores["price_mae"] is None else f"{scores['price_mae']:.2f}"
        parts = [f"{scores[k]:.1%}" for k in ("price_parse_rate", "category_accuracy", "title_accuracy")]
        table.add_row(name, mae, *parts)
    console.print(table)
    train = summary["train"]
    console.print(
        f"{train['steps']} steps, {train['tokens']:,} tokens on {train['world_size']} processes, ZeRO stage "
        f"{train['zero_stage']}: loss {train['loss_first']:.3f} -> {train['loss_last']:.4f}"
    )
    console.print("  ".join(f"{name} {seconds:.0f} s" for name, seconds in summary["seconds"].items()))
    for key in ("wandb", "metrics", "checkpoints", "export"):
        console.print(f"{key:12} {summary[key]}")
