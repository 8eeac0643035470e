"""The demo, smaller than the README's: all stages with real parts, going on after a kill, quick when done."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.ranks, pytest.mark.timeout(300)]

CONFIG = "configs/tiny.yaml"
ROOT = Path(__file__).parents[2]


def start(tmp_path: Path) -> subprocess.Popen[str]:
    overrides = [
        f"runs_dir={tmp_path}/runs dir",
        f"data.path={tmp_path}/runs dir/data/shards",
        "train.steps=12",
        "train.warmup_steps=2",
        "checkpoint.every_steps=4",
        "eval.every_steps=6",
        "eval.loss_samples=8",
        "eval.generate_samples=2",
        "eval.max_new_tokens=8",
        "track.log_every=2",
        "track.mode=offline",
    ]
    return subprocess.Popen(
        [sys.executable, "-m", "launch.cli.main", "demo", "--rows", "80", "--config", CONFIG, *overrides],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=ROOT,
        start_new_session=True,
    )


def finish(process: subprocess.Popen[str], timeout: float = 150) -> str:
    try:
        output, _ = process.communicate(timeout=timeout)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 0, output[-3000:]
    return output


@dataclass(frozen=True)
class Demo:
    """A demo killed after its first checkpoint, and the same command again. Read only."""

    work: Path
    run_dir: Path
    summary_after_kill: bool
    output: str
    summary: dict[str, Any]


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Demo:
    work = tmp_path_factory.mktemp("demo")
    run_dir = work / "runs dir" / "demo"
    process = start(work)
    began = time.monotonic()
    while not (run_dir / "checkpoints" / "latest").exists():
        if process.poll() is not None or time.monotonic() - began > 100:
            break
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGKILL)
    output = process.communicate()[0]
    assert (run_dir / "checkpoints" / "latest").exists(), output[-3000:]
    summary_after_kill = (run_dir / "summary.json").exists()
    output = finish(start(work))
    summary = json.loads((run_dir / "summary.json").read_text())
    return Demo(work, run_dir, summary_after_kill, output, summary=summary)


def test_a_killed_demo_resumes(demo: Demo) -> None:
    assert not demo.summary_after_kill
    assert "resuming from" in demo.output
    train = demo.summary["train"]
    assert (train["steps"], train["zero_stage"], train["world_size"]) == (12, 3, 2)
    assert train["loss_last"] < train["loss_first"] and train["tokens"] > 0


def test_its_summary_has_the_scores_of_every_stage(demo: Demo) -> None:
    wanted = {"price_mae", "price_parse_rate", "category_accuracy", "title_accuracy"}
    for name in ("baseline", "before", "after", "after_shuffled_images"):
        assert wanted <= demo.summary[name].keys()
    assert demo.summary["baseline"]["price_mae"] > 0
    assert demo.summary["baseline"]["price_parse_rate"] == 1
    assert set(demo.summary["seconds"]) == {"sample", "build", "train", "evaluate", "export"}


def test_what_its_summary_names_is_there(demo: Demo) -> None:
    for key in ("export", "wandb", "metrics", "checkpoints"):
        assert Path(demo.summary[key]).exists()
    assert (Path(demo.summary["export"]) / "model.safetensors").exists()
    lines = Path(demo.summary["metrics"]).read_text().splitlines()
    steps = [json.loads(line)["train/global_step"] for line in lines]
    assert steps == sorted(set(steps)) and set(steps) >= {2, 4, 6, 8, 10, 12}


def test_a_finished_demo_says_so_at_once(demo: Demo) -> None:
    began = time.monotonic()
    assert "Already done" in finish(start(demo.work))
    assert time.monotonic() - began < 30
