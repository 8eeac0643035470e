"""metrics.jsonl and W&B: one line a step whatever was killed, and a W&B that fails stops nothing."""

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from phi3v_dist.config import RunConfig, load_config
from phi3v_dist.track import Tracker


def config(tmp_path: Path, mode: str) -> RunConfig:
    file = tmp_path / "c.yaml"
    file.write_text("name: r\nmodel: {path: m}\ndata: {path: d}\ntrain: {steps: 5}\n")
    return load_config(file, [f"track.mode={mode}", f"runs_dir={tmp_path}"])


def lines(tmp_path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]


def test_a_resumed_run_has_no_step_twice_and_no_half_line(tmp_path: Path) -> None:
    first = Tracker(config(tmp_path, "disabled"), tmp_path, 0, {})
    for step in range(1, 6):
        first.log(step, {"train/loss": step / 2, "eval/price_mae": None, "x": float("nan")})
    first.close()
    with (tmp_path / "metrics.jsonl").open("a") as stream:
        stream.write('{"train/global_step": 6, "train/lo')
    second = Tracker(config(tmp_path, "disabled"), tmp_path, 3, {})
    second.log(4, {"train/loss": 9.0})
    second.close()
    assert [line["train/global_step"] for line in lines(tmp_path)] == [1, 2, 3, 4]
    assert lines(tmp_path)[0] == {"train/global_step": 1, "train/loss": 0.5}
    assert lines(tmp_path)[3]["train/loss"] == 9.0


def test_an_offline_run_keeps_its_id_and_holds_config_metrics_and_pictures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_DATA_DIR", "")
    monkeypatch.delenv("WANDB_DATA_DIR")
    for start in (0, 2):
        tracker = Tracker(config(tmp_path, "offline"), tmp_path, start, {"data_fingerprint": "abc"})
        assert tracker.wandb_dir is not None
        for step in (start + 1, start + 2):
            tracker.log(step, {"train/loss": 1.0 / step})
        row = {
            "picture": Image.new("RGB", (8, 8)),
            "prompt": "p",
            "truth": "t",
            "prediction": "q",
            "price_error": 1.0,
        }
        tracker.log_predictions(start + 2, [row])
        tracker.close()
    run_id = (tmp_path / "wandb_id").read_text()
    kept = sorted(tmp_path.glob("wandb/offline-run-*"))
    assert len(kept) == 2 and all(run_id in folder.name for folder in kept)
    staged = [file.read_bytes() for file in tmp_path.glob("wandb/data/**/*") if file.is_file()]
    assert sum(data.startswith(b"\x89PNG") for data in staged) >= 2
    found = b"".join(file.read_bytes() for file in kept[0].glob("*.wandb"))
    for word in (b"train/loss", b"data_fingerprint", b"eval/predictions"):
        assert word in found


def test_a_failing_wandb_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    import wandb

    monkeypatch.setattr(wandb, "init", lambda **_: (_ for _ in ()).throw(RuntimeError("no network")))
    tracker = Tracker(config(tmp_path, "online"), tmp_path, 0, {})
    assert "W&B failed (RuntimeError: no network); going on without it" in caplog.text

    class Broken:
        dir = str(tmp_path)

        def log(self, *_: object) -> None:
            raise OSError("disk full")

    tracker._run = Broken()
    tracker.log(1, {"train/loss": 1.0})
    tracker.log(2, {"train/loss": 1.0})
    tracker.close()
    assert [line["train/global_step"] for line in lines(tmp_path)] == [1, 2]
    assert caplog.text.count("disk full") == 1
