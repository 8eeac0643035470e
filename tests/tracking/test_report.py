"""The page about runs: whole, escaped, in need of nothing from outside, and quiet in a browser."""

import io
import json
import os
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from phi3v_dist.tracking.report import report
from phi3v_dist.tracking.report.charts import Curve, chart, number
from shards.common.errors import BadInputError

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")


def make_run(run_dir: Path, lr: float = 1e-3) -> Path:
    keys = ("train/loss", "train/learning_rate", "train/grad_norm", "perf/tokens_per_second", "perf/mfu",
            "time/step", "time/data_wait", "mem/host_gb", "data/fill", "data/bad_samples")  # fmt: skip
    run_dir.mkdir()
    lines = [
        {"train/global_step": s, **{key: s / (1 + len(key)) for key in keys}, "time/unix": 1000.0 + 60 * s}
        for s in range(1, 9)
    ]
    for line in lines[3::4]:
        line |= {"eval/loss": 1.0, "eval/price_mae": 5.0}
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (run_dir / "metrics.jsonl").write_text(text + '{"train/glo')
    starts = [{"step": 0, "time": 1000.0, "world_size": 2, "host": "n1"}, {"step": 4, "time": 1300.0}]
    (run_dir / "starts.jsonl").write_text("".join(json.dumps(start) + "\n" for start in starts))
    (run_dir / "config.yaml").write_text(json.dumps({"train": {"lr": lr, "steps": 8}, "data": {"path": "d"}}))
    picture = io.BytesIO()
    Image.new("RGB", (40, 30), "red").save(picture, "JPEG")
    rows = [
        {"key": "k1", "prompt": "p", "truth": "t", "prediction": "t", "price_mae": 0.0},
        {
            "key": "k2",
            "prompt": "p",
            "truth": "<b>",
            "prediction": "<script>alert(1)</script>",
            "price_mae": 9.0,
        },
    ]
    for step in (4, 8):
        out = run_dir / "eval" / f"step-{step:06d}"
        out.mkdir(parents=True)
        scores = {"scores": {"samples": 2, "price_mae": None}, "intervals": {"price_mae": [4.0, 6.0]}}
        (out / "scores.json").write_text(json.dumps(scores))
        table = pa.Table.from_pylist([{**row, "picture": picture.getvalue()} for row in rows])
        pq.write_table(table, out / "predictions.parquet")
    return run_dir


def test_a_page_holds_curves_scores_pictures_and_restarts(tmp_path: Path) -> None:
    page = report(make_run(tmp_path / "one"))
    HTMLParser().feed(page)
    for word in ("Loss", "Learning rate", "Gradient norm", "Tokens per second", "Model FLOPs",
                 "waiting for data", "Host memory", "Fill of the rows", "eval/price_mae, 95 % interval",
                 "resumed from", "only errors (1 of 2 shown, 2 answered)"):  # fmt: skip
        assert word in page, word
    assert page.count("<img ") == 2 and 'tr class="right"' in page and 'tr class="wrong"' in page
    assert "&lt;script&gt;" in page and "<script" not in page
    assert "http://" not in page and "https://" not in page and 'src="data:' in page
    for tag in ("tr", "figure", "table", "section", "svg"):
        assert page.count(f"<{tag}") == page.count(f"</{tag}>"), tag


def test_several_runs_are_laid_over_each_other_and_compared(tmp_path: Path) -> None:
    page = report([make_run(tmp_path / "one"), make_run(tmp_path / "two", lr=2e-3)])
    assert "What differs in the configurations" in page and "<td>train.lr</td>" in page
    assert "<td>train.steps</td>" not in page and page.count("<polyline") >= 20


def test_a_directory_without_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInputError, match="no metrics.jsonl"):
        report(tmp_path)


def test_charts_stand_any_numbers() -> None:
    for points in (
        [(1, 0.0)],
        [(1, 5.0), (2, 5.0)],
        [(0, -1.0), (9, 1e9)],
        [(n, 1e-12 * n) for n in range(999)],
    ):
        figure = chart("t", [Curve("c", points)])
        assert figure.count("<svg") == 1 and "nan" not in figure and "inf" not in figure
    assert chart("t", [Curve("c", [])]) == ""
    assert [number(x) for x in (0, 1.23456, 12345.6, 2e6, 3.2e9, 1e-5)] == [
        "0",
        "1.235",
        "12.35k",
        "2M",
        "3.2G",
        "1.00e-05",
    ]


@pytest.mark.system
@pytest.mark.skipif(CHROMIUM is None, reason="system package: no Chromium, which opens the page")
def test_a_browser_opens_it_without_a_word(tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    page.write_text(report([make_run(tmp_path / "one"), make_run(tmp_path / "two")]))
    command = [str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr",
               f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=2000", "--dump-dom",
               page.as_uri()]  # fmt: skip
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=90, env={**os.environ, "HOME": str(tmp_path)}
    )
    assert done.returncode == 0 and done.stdout.count("<figure>") >= 10
    assert "CONSOLE" not in done.stderr, done.stderr[-2000:]
