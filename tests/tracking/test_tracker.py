"""metrics.jsonl and W&B: one line a step whatever was killed, and a W&B that fails stops nothing."""

import json
import logging
import math
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from phi3v_dist.config import RunConfig, load_config
from phi3v_dist.evaluation.generate import thumbnail
from phi3v_dist.evaluation.in_training import BestSoFar
from phi3v_dist.run.layout import evaluation_dir
from phi3v_dist.run.provenance import provenance
from phi3v_dist.tracking.progress import describe
from phi3v_dist.tracking.tracker import Tracker, host_memory, read_metrics, resolve_mode
from phi3v_dist.tracking.wandb_file import history
from tests.alone import ALONE


def config(tmp_path: Path, mode: str, *overrides: str) -> RunConfig:
    file = tmp_path / "c.yaml"
    file.write_text("name: r\nmodel: {path: m}\ndata: {path: d}\ntrain: {steps: 5}\n")
    more = [f"track.mode={mode}", f"runs_dir={tmp_path.parent}", f"name={tmp_path.name}"]
    return load_config(file, [*more, *overrides])


def steps(tmp_path: Path) -> list[int]:
    return [line["train/global_step"] for line in read_metrics(tmp_path / "metrics.jsonl")]


def recorded(tmp_path: Path, number: int) -> list[dict[str, Any]]:
    """What W&B has on disk, in the order of its starts: `number` steps, for which it may take a moment."""
    until = time.time() + 20
    while True:
        files = sorted(tmp_path.glob("wandb/offline-run-*/*.wandb"), key=lambda file: file.stat().st_mtime)
        found = [items for file in files for items in history(file)]
        if len(found) >= number or time.time() > until:
            return found
        time.sleep(0.05)


@pytest.fixture
def run_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("WANDB_DATA_DIR", "WANDB_MODE", "WANDB_API_KEY"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    return tmp_path


def test_a_resumed_run_has_no_step_twice_and_no_half_line(run_dir: Path) -> None:
    first = Tracker(config(run_dir, "disabled"), run_dir, 0, about={"world_size": 2})
    for step in range(1, 6):
        first.log(step, {"train/loss": step / 2, "eval/price_mae": None, "x": float("nan")})
    first.close()
    with (run_dir / "metrics.jsonl").open("a") as stream:
        stream.write('\0\0\0 left by a crash of the machine\n{"train/global_step": 6, "train/lo')
    assert len(read_metrics(run_dir / "metrics.jsonl")) == 5
    second = Tracker(config(run_dir, "disabled"), run_dir, 3, about={"world_size": 4})
    second.log(4, {"train/loss": 9.0})
    second.close()
    lines = read_metrics(run_dir / "metrics.jsonl")
    assert [line["train/global_step"] for line in lines] == [1, 2, 3, 4]
    assert lines[0].keys() == {"train/global_step", "train/loss", "time/unix"} and lines[3]["train/loss"] == 9
    starts = [json.loads(line) for line in (run_dir / "starts.jsonl").read_text().splitlines()]
    assert [(start["step"], start["world_size"]) for start in starts] == [(0, 2), (3, 4)]


def test_one_wandb_run_over_all_starts_has_every_step_once(run_dir: Path) -> None:
    about = {"data_fingerprint": "abc", "config": {"not": "twice"}}
    first = Tracker(config(run_dir, "offline"), run_dir, 0, about=about)
    answers = evaluation_dir(run_dir, 2)
    answers.mkdir(parents=True)
    row = {"key": "k", "slice": "BAGS", "prompt": "p", "truth": "t", "prediction": "q", "price_mae": 1.0}
    picture = thumbnail(Image.new("RGB", (300, 200)))
    pq.write_table(pa.Table.from_pylist([{**row, "picture": picture}]), answers / "predictions.parquet")
    for step in range(1, 6):
        first.log(step, {"train/loss": 1.0 / step, **({"eval/price_mae": 1.0} if step == 2 else {})})
    first.close(1)
    recorded(run_dir, 5)
    # killed at 5, goes on from the checkpoint of 3: 4 and 5 come again, for W&B they are there already
    second = Tracker(config(run_dir, "offline"), run_dir, 3, about=about)
    for step in (4, 5, 6):
        second.log(step, {"train/loss": 1.0 / step})
    second.close()
    run_id = (run_dir / "wandb_id").read_text()
    kept = sorted(run_dir.glob("wandb/offline-run-*"))
    assert len(kept) == 2 and all(run_id in folder.name for folder in kept)
    found = recorded(run_dir, 6)
    assert [items["train/global_step"] for items in found] == steps(run_dir) == [1, 2, 3, 4, 5, 6]
    table = found[1]["eval/predictions"]
    assert (table["nrows"], table["_type"]) == (1, "table-file")
    raw = b"".join(file.read_bytes() for file in kept[0].glob("*.wandb"))
    assert b"data_fingerprint" in raw and b"not" not in raw.split(b"data_fingerprint")[0][-9:]

    # what W&B has lost is sent again by the next start, from metrics.jsonl
    shutil.rmtree(kept[1])
    third = Tracker(config(run_dir, "offline"), run_dir, 6, about=about)
    third.close()
    assert [items["train/global_step"] for items in recorded(run_dir, 6)] == [1, 2, 3, 4, 5, 6]


def test_a_killed_wandb_stops_nothing_and_misses_nothing(
    run_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tracker = Tracker(config(run_dir, "offline", "track.close_timeout_s=20"), run_dir, 0, about={})
    tracker.log(1, {"train/loss": 1.0})
    until = time.time() + 60
    mirror = tracker.mirror
    assert mirror is not None
    while mirror.sent < 1:
        assert time.time() < until
        time.sleep(0.1)
    services = [p for p in psutil.Process().children() if "wandb-core" in " ".join(p.cmdline())]
    assert services
    for service in services:
        service.kill()
    for step in range(2, 30):
        tracker.log(step, {"train/loss": 1.0})
    tracker.close()
    assert steps(run_dir) == list(range(1, 30))
    assert caplog.text.count("W&B failed") == caplog.text.count("starting it again") == 1
    assert [items["train/global_step"] for items in recorded(run_dir, 29)] == list(range(1, 30))


def test_a_wandb_that_dies_as_it_starts_is_started_again(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import wandb

    init, failures = wandb.init, [ConnectionResetError("Connection lost")]

    def fails_once(**settings: Any) -> Any:
        if failures:
            raise failures.pop()
        return init(**settings)

    monkeypatch.setattr(wandb, "init", fails_once)
    tracker = Tracker(config(run_dir, "offline"), run_dir, 0, about={})
    tracker.log(1, {"train/loss": 1.0})
    tracker.close(3)
    assert not failures and [items["train/global_step"] for items in recorded(run_dir, 1)] == [1]


SLOW = """
import time
from types import SimpleNamespace
class Settings:
    def __init__(self, **_): pass
errors = SimpleNamespace(Error=RuntimeError)
class Run:
    id, summary = "x", {}
    def __getattr__(self, name): return lambda *_, **__: time.sleep(10)
def init(**_):
    time.sleep(10)
    return Run()
"""
DISABLED = "raise ImportError('must not be imported')"
TRAIN = """
import sys, time
from pathlib import Path
from phi3v_dist.config import load_config
from phi3v_dist.tracking.tracker import Tracker
run_dir = Path(sys.argv[1])
tracker = Tracker(load_config(run_dir / "c.yaml", sys.argv[2:]), run_dir, 0, about={})
slowest = 0.0
for step in range(1, 50):
    began = time.perf_counter()
    tracker.log(step, {"train/loss": 1.0})
    slowest = max(slowest, time.perf_counter() - began)
tracker.close()
print(slowest < 1, "wandb" in sys.modules)
"""


@pytest.mark.parametrize(
    ("wandb", "mode", "imported"), [(SLOW, "online", "True"), (DISABLED, "disabled", "False")]
)
def test_a_slow_wandb_holds_nothing_up_and_a_disabled_one_is_not_imported(
    run_dir: Path, wandb: str, mode: str, imported: str
) -> None:
    config(run_dir, "auto")
    (run_dir / "fake").mkdir()
    (run_dir / "fake" / "wandb.py").write_text(wandb)
    environment = {**os.environ, "PYTHONPATH": str(run_dir / "fake"), "WANDB_MODE": mode}
    command = [sys.executable, "-c", TRAIN, str(run_dir), "track.close_timeout_s=1", "name=r"]
    began = time.monotonic()
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert done.stdout.split() == ["True", imported], done.stderr
    assert time.monotonic() - began < 30 and steps(run_dir) == list(range(1, 50))
    assert ("--sync` sends it" in done.stderr) == (mode == "online")


def test_a_wandb_that_cannot_start_is_said_once(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    import wandb

    monkeypatch.setattr(wandb, "init", lambda **_: (_ for _ in ()).throw(RuntimeError("no network")))
    with caplog.at_level(logging.WARNING):
        tracker = Tracker(config(run_dir, "online"), run_dir, 0, about={})
        tracker.log(1, {"train/loss": 1.0})
        tracker.close()
    assert caplog.text.count("W&B failed (RuntimeError: no network); continuing without it") == 1
    assert steps(run_dir) == [1]


def test_a_full_disk_keeps_the_lines_in_memory(run_dir: Path, caplog: pytest.LogCaptureFixture) -> None:
    tracker = Tracker(config(run_dir, "disabled"), run_dir, 0, about={})
    tracker.log(1, {"train/loss": 1.0})
    (run_dir / "metrics.jsonl").rename(run_dir / "aside")
    (run_dir / "metrics.jsonl").symlink_to("/dev/full")
    tracker.log(2, {"train/loss": 1.0})
    tracker.log(3, {"train/loss": 1.0})
    assert caplog.text.count("No space left on device") == 1
    (run_dir / "aside").replace(run_dir / "metrics.jsonl")
    tracker.log(4, {"train/loss": 1.0})
    tracker.close()
    assert steps(run_dir) == [1, 2, 3, 4]


def test_the_mode_follows_config_environment_and_key(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(run_dir))
    assert resolve_mode(config(run_dir, "auto")) == "offline"
    monkeypatch.setenv("WANDB_API_KEY", "k")
    assert resolve_mode(config(run_dir, "auto")) == "online"
    assert resolve_mode(config(run_dir, "offline")) == "offline"
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert (resolve_mode(config(run_dir, "auto")), resolve_mode(config(run_dir, "online"))) == (
        "offline",
        "online",
    )
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert resolve_mode(config(run_dir, "online")) == "disabled"


def test_the_best_evaluation_outlives_a_restart(run_dir: Path) -> None:
    ours = config(run_dir, "disabled", "eval.best_metric=eval/f1", "eval.best_mode=max")
    best = BestSoFar(ours, ALONE)
    assert best.improves({"eval/f1": 0.5}, nothing) and not best.improves({"eval/loss": 1.0}, nothing)
    write = best.record_when_saved(10, {"eval/f1": 0.5})
    assert not (run_dir / "eval/best.json").exists(), "it is written down when its checkpoint is there"
    write()
    again = BestSoFar(ours, ALONE)
    assert again.improves({"eval/f1": 0.6}, nothing) and not again.improves({"eval/f1": 0.5}, nothing)
    assert not again.improves({"eval/f1": math.nan}, nothing)
    others = BestSoFar(config(run_dir, "disabled"), ALONE)
    assert others.improves({"eval/loss": 9.0}, nothing), "that was of another metric"


def test_an_evaluation_is_not_the_best_if_its_checkpoint_failed(run_dir: Path) -> None:
    best = BestSoFar(config(run_dir, "disabled"), ALONE)
    best.record_when_saved(10, {"eval/loss": 1.0})
    assert not best.improves({"eval/loss": 2.0}, lambda: True), "that one is still being written"
    assert best.improves({"eval/loss": 2.0}, nothing), "it is not there"


def nothing() -> bool:
    """Nothing is being saved."""
    return False


def test_what_made_a_run_is_told_without_secrets(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    monkeypatch.setenv("WANDB_API_KEY", "very-secret")
    found = provenance(config(run_dir, "auto"), "abc")
    assert (found["data_fingerprint"], found["job"]["SLURM_JOB_ID"]) == ("abc", "77")
    assert set(found["versions"]) >= {"phi3v-dist", "torch", "deepspeed"} and "secret" not in json.dumps(
        found
    )
    assert found["git"]["commit"] is None or len(found["git"]["commit"]) == 40
    memory = host_memory()
    assert 0.05 < (memory["mem/host_peak_gb"] or 0) < 100


def test_the_progress_line_has_what_is_known() -> None:
    found = {
        "train/loss": 1.5,
        "perf/tokens_per_second": 1000.0,
        "perf/mfu": 0.41,
        "time/step": 2.0,
        "train/grad_norm": None,
    }
    assert (
        describe(10, 2000, found)
        == "step 10/2000  1:06:20 left  loss 1.5000  1000 tokens/s  MFU 41.0%  2.00 s/step"
    )
