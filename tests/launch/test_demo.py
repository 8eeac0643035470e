"""The demo, smaller than the README's: all stages with real parts, going on after a kill, quick when done."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.ranks

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


@pytest.mark.timeout(300)
def test_a_killed_demo_goes_on_and_a_finished_one_says_so(tmp_path: Path) -> None:
    run_dir = tmp_path / "runs dir" / "demo"
    process = start(tmp_path)
    began = time.monotonic()
    while not (run_dir / "checkpoints" / "latest").exists():
        if process.poll() is not None or time.monotonic() - began > 100:
            break
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGKILL)
    output = process.communicate()[0]
    assert (run_dir / "checkpoints" / "latest").exists(), output[-3000:]
    assert not (run_dir / "summary.json").exists()

    output = finish(start(tmp_path))
    assert "going on from" in output
    summary: dict[str, Any] = json.loads((run_dir / "summary.json").read_text())
    for name in ("baseline", "before", "after", "after_shuffled_images"):
        assert {"price_mae", "price_parse_rate", "category_accuracy", "title_accuracy"} <= summary[
            name
        ].keys()
    assert summary["baseline"]["price_mae"] > 0 and summary["baseline"]["price_parse_rate"] == 1
    train = summary["train"]
    assert (train["steps"], train["zero_stage"], train["world_size"]) == (12, 3, 2)
    assert train["loss_last"] < train["loss_first"] and train["tokens"] > 0
    assert set(summary["seconds"]) == {"sample", "build", "train", "evaluate", "export"}
    for key in ("export", "wandb", "metrics", "checkpoints"):
        assert Path(summary[key]).exists()
    assert (Path(summary["export"]) / "model.safetensors").exists()
    steps = [
        json.loads(line)["train/global_step"] for line in Path(summary["metrics"]).read_text().splitlines()
    ]
    assert steps == sorted(set(steps)) and set(steps) >= {2, 4, 6, 8, 10, 12}

    began = time.monotonic()
    assert "Already done" in finish(start(tmp_path))
    assert time.monotonic() - began < 30
