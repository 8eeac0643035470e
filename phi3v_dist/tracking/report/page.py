"""One HTML page about one or more runs: curves, evaluations, answers with their images, configurations.

In: run directories. Out: the page as text. It needs no script, font or file from elsewhere, so that it can be
opened from a mail and printed. Several runs share their charts, and their configurations are compared. This
module prepares the values; templates/report.html.j2 holds the markup and escapes them.
"""

from __future__ import annotations

import base64
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from markupsafe import Markup

from phi3v_dist.config import flatten
from phi3v_dist.run.layout import STEP
from phi3v_dist.tracking.predictions import StoredAnswer
from phi3v_dist.tracking.report.charts import COLOURS, Curve, chart, number
from phi3v_dist.tracking.report.read import Run, StoredEvaluation, read_run
from shards.common.errors import BadInputError
from shards.common.html import render_page

_TEMPLATES = Path(__file__).with_name("templates")
_ANSWERS = 100  # of an evaluation
_IMAGE_BYTES = 2_500_000  # of all images of the page
_CURVES = (
    ("Loss", ("train/loss", "eval/loss")),
    ("Learning rate", ("train/learning_rate",)),
    ("Gradient norm", ("train/grad_norm",)),
    ("Tokens per second", ("perf/tokens_per_second",)),
    ("Model FLOPs utilisation", ("perf/mfu",)),
    ("Seconds per step", ("time/step",)),
    ("Seconds per step spent waiting for data", ("time/data_wait",)),
    ("Seconds that training waits for a checkpoint", ("time/checkpoint",)),
    ("GPU memory, peak GB", ("mem/peak_allocated_gb",)),
    ("Host memory, GB", ("mem/host_gb", "mem/host_peak_gb")),
    ("Fill of the rows", ("data/fill",)),
    ("Unreadable samples", ("data/bad_samples",)),
)
_DATA_SETTINGS = (
    "path", "sources", "train_split", "seq_len", "num_crops", "packing", "shuffle", "over_long",
)  # fmt: skip
_STATES = {None: "running, or killed", 0: "done", 3: "stopped, can resume", 4: "diverged"}


@dataclass(frozen=True)
class Head:
    """The cards (title, value) of a run."""

    name: str
    colour: str
    cards: list[tuple[str, str]]


@dataclass(frozen=True)
class Table:
    """columns: names, one more than the cells of a record. records: (name, cells)."""

    columns: list[str]
    records: list[tuple[str, list[str]]]
    title: str = ""


@dataclass(frozen=True)
class ShownAnswer:
    """A line of a table of answers. image: a data URL, None without one. prompt: without control tokens of
    its ends. values: of the metrics, as text.
    """

    stored: StoredAnswer
    image: str | None
    prompt: str
    values: list[tuple[str, str]]


@dataclass(frozen=True)
class AnswersTable:
    """The answers of one evaluation. box: id of the checkbox "only errors". total: samples answered."""

    title: str
    box: str
    metrics: list[str]
    answers: list[ShownAnswer]
    wrong: int
    total: int


class _ImageBudget:
    """Data URLs of images, until the page would have too many bytes of them."""

    def __init__(self, left: int) -> None:
        self._left = left

    def url(self, data: bytes | None) -> str | None:
        """The data URL of a JPEG; None without one, or if it is larger than what is left."""
        if not data or len(data) > self._left:
            return None
        self._left -= len(data)
        return f"data:image/jpeg;base64,{base64.b64encode(data).decode()}"


def report(run_dirs: Sequence[Path] | Path, *, answers: int = _ANSWERS) -> str:
    """The page about one or several runs. answers: most answers of an evaluation on it.

    Raises BadInputError without a run, or if a directory is not a run directory.
    """
    folders = [run_dirs] if isinstance(run_dirs, Path) else list(run_dirs)
    if not folders:
        raise BadInputError("no run given; give at least one run directory")
    runs = [read_run(folder, answers) for folder in folders]
    budget = _ImageBudget(_IMAGE_BYTES)
    shown = [
        (run, evaluation)
        for run in runs
        for evaluation in [*run.in_training[-1:], *run.afterwards]
        if evaluation.answers
    ]
    return render_page(
        _TEMPLATES,
        "report.html.j2",
        title=" and ".join(run.name for run in runs),
        heads=[_head(run, colour) for colour, run in enumerate(runs)],
        training_charts=_training_charts(runs),
        timeline_chart=_timeline_chart(runs),
        starts=_starts_table(runs),
        evaluation_charts=_evaluation_charts(runs),
        scores=[_scores(run, e) for run in runs for e in run.afterwards]
        + [_scores(run, e) for run in runs for e in run.in_training[-1:]],
        answer_tables=[_answers(run, evaluation, budget) for run, evaluation in shown],
        data=_data(runs),
        differences=_differences(runs) if len(runs) > 1 else None,
        runs=[(run.name, _last_values(run), json.dumps(run.config, indent=1)) for run in runs],
    )


def _head(run: Run, colour: int) -> Head:
    last = run.last
    seconds = sum(end - start for start, end in _spans(run))
    steps = (run.config.get("train") or {}).get("steps")
    cards = [
        ("state", _STATES.get(run.exit_code, "failed")),
        ("steps", f"{last.get(STEP, 0):,}" + (f" of {steps:,}" if steps else "")),
        ("hours of work", f"{seconds / 3600:.2f}"),
        ("tokens seen", number(last.get("train/tokens_seen", 0))),
        ("images seen", number(last.get("train/images_seen", 0))),
        ("training loss", number(last["train/loss"]) if "train/loss" in last else "-"),
        ("tokens / s", number(last.get("perf/tokens_per_second", 0))),
        ("restarts", str(len(run.restarts))),
    ]
    if "perf/mfu" in last:
        cards.append(("MFU", f"{last['perf/mfu']:.1%}"))
    if run.best:
        cards.append((f"best {run.best.metric}, step {run.best.step}", number(run.best.value)))
    return Head(run.name, COLOURS[colour % len(COLOURS)], cards)


def _training_charts(runs: Sequence[Run]) -> list[Markup]:
    """A chart for each entry of _CURVES that any run has metrics of."""
    charts = []
    marks = runs[0].restarts if len(runs) == 1 else []
    for title, keys in _CURVES:
        curves = []
        for place, run in enumerate(runs):
            for order, key in enumerate(keys):
                name = key if len(runs) == 1 else f"{run.name} {key if len(keys) > 1 else ''}".strip()
                colour = place if len(runs) > 1 else order
                dashed = order > 0 and len(runs) > 1
                curves.append(Curve(name, run.series(key), colour, dashed=dashed, dots=key == "eval/loss"))
        charts.append(chart(title, curves, marks))
    return charts


def _spans(run: Run) -> list[tuple[float, float]]:
    """When the run was at work, seconds since the epoch: from each start to its last line before the next."""
    times = [line["time/unix"] for line in run.lines if "time/unix" in line]
    starts = [start.time for start in run.starts] or times[:1]
    spans = []
    for start, until in zip(starts, [*starts[1:], float("inf")], strict=True):
        spans.append((start, max([each for each in times if start <= each < until], default=start)))
    return spans


def _timeline_chart(runs: Sequence[Run]) -> Markup:
    """Steps over the time since the first start of each run."""
    longest = max((spans[-1][1] - spans[0][0] for run in runs if (spans := _spans(run))), default=0.0)
    unit, seconds = ("hours", 3600) if longest > 2 * 3600 else ("minutes", 60)
    curves = []
    for place, run in enumerate(runs):
        if spans := _spans(run):
            begin = spans[0][0]
            times = [(line["time/unix"], line[STEP]) for line in run.lines if "time/unix" in line]
            curves.append(Curve(run.name, [((t - begin) / seconds, step) for t, step in times], place))
    marks = []
    if len(runs) == 1 and runs[0].starts:
        first, *others = runs[0].starts
        marks = [(start.time - first.time) / seconds for start in others]
    return chart("Steps over time; red where the run resumed", curves, marks, unit=unit)


def _starts_table(runs: Sequence[Run]) -> Table:
    records = []
    for run in runs:
        for start, (began, ended) in zip(run.starts, _spans(run), strict=False):
            job = ", ".join(f"{name}={value}" for name, value in start.job.items() if "ELASTIC" not in name)
            cells = [
                time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(began)),
                f"step {start.step}",
                f"{(ended - began) / 60:.1f} min",
                "-" if start.world_size is None else str(start.world_size),
                start.host or "-",
                job or "-",
            ]
            records.append((run.name, cells))
    return Table(["run", "started", "from", "at work", "ranks", "host", "job"], records)


def _evaluation_charts(runs: Sequence[Run]) -> list[Markup]:
    """A chart for each metric eval/*, with the confidence intervals of the evaluations in training."""
    keys = dict.fromkeys(key for run in runs for line in run.lines for key in line if key.startswith("eval/"))
    charts = []
    for key in keys:
        curves = []
        for place, run in enumerate(runs):
            intervals = {e.step: e.intervals.get(key.removeprefix("eval/")) for e in run.in_training}
            points = run.series(key)
            band = [(x, *pair) for x, _ in points if (pair := intervals.get(int(x))) is not None]
            curves.append(Curve(run.name, points, place, band, dots=True))
        interval = ", 95 % interval" if any(curve.band for curve in curves) else ""
        charts.append(chart(f"{key}{interval}", curves))
    return charts


def _scores(run: Run, evaluation: StoredEvaluation) -> Table:
    columns = list(dict.fromkeys(name for values in evaluation.scores.values() for name in values))
    records = [
        (name, [_cell(values.get(column)) for column in columns])
        for name, values in evaluation.scores.items()
    ]
    return Table(["", *columns], records, f"{run.name}: {evaluation.name}")


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, int | float) else str(value)


def _answers(run: Run, evaluation: StoredEvaluation, budget: _ImageBudget) -> AnswersTable:
    answers = evaluation.answers
    metrics = list(answers[0].values)
    name = f"{run.name}-{evaluation.name}"
    return AnswersTable(
        title=f"{run.name}, {evaluation.name}",
        box="only-" + "".join(c if c.isalnum() else "-" for c in name),
        metrics=metrics,
        answers=[_shown(answer, metrics, budget) for answer in answers],
        wrong=sum(not answer.is_exact for answer in answers),
        total=len(answers) if evaluation.samples is None else evaluation.samples,
    )


def _shown(answer: StoredAnswer, metrics: Sequence[str], budget: _ImageBudget) -> ShownAnswer:
    prompt = answer.prompt.replace("<|user|>\n", "").replace("<|end|>\n<|assistant|>\n", "")
    values = [(name, _cell(answer.values.get(name))) for name in metrics]
    return ShownAnswer(answer, budget.url(answer.image), prompt, values)


def _data(runs: Sequence[Run]) -> Table:
    """The metrics data/* (last value and mean over the lines), and the settings of the data."""
    records = []
    for key in dict.fromkeys(key for run in runs for key in run.last if key.startswith("data/")):
        records.append((f"{key}, last", [_cell(run.last.get(key)) for run in runs]))
        values = [[value for _, value in run.series(key)] for run in runs]
        records.append((f"{key}, mean", [_cell(sum(v) / len(v)) if v else "-" for v in values]))
    for name in _DATA_SETTINGS:
        found = [(run.config.get("data") or {}).get(name) for run in runs]
        if any(value is not None for value in found):
            records.append((f"data.{name}", [json.dumps(value) for value in found]))
    return Table(["", *(run.name for run in runs)], records)


def _differences(runs: Sequence[Run]) -> Table:
    """The keys whose values are not the same in all configurations."""
    flat = [dict(flatten(run.config)) for run in runs]
    records = []
    for key in sorted({key for config in flat for key in config}):
        values = [json.dumps(config.get(key)) for config in flat]
        if len(set(values)) > 1:
            records.append((key, values))
    return Table(["key", *(run.name for run in runs)], records)


def _last_values(run: Run) -> Table:
    return Table(["metric", "last value"], [(key, [_cell(v)]) for key, v in sorted(run.last.items())])
