"""One HTML page about one or more runs: curves, evaluations, answers with their pictures, their pretrained.

In: run directories. Out: the page as text; no script, font or file from elsewhere, so it opens from a mail
and prints. Several runs are laid over each other and their configurations compared. Called by `phi3v report`.
"""

from __future__ import annotations

import base64
import html
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from phi3v_dist.config import flatten
from phi3v_dist.run.layout import STEP
from phi3v_dist.tracking.report.charts import COLOURS, Curve, chart, number
from phi3v_dist.tracking.report.read import Evaluated, Run, read_run
from shards.common.errors import BadInputError

_ANSWERS = 100  # rows of a table of answers
_PICTURE_BYTES = 2_500_000  # of all pictures of the page
_CURVES = (
    ("Loss", ("train/loss", "eval/loss")),
    ("Learning rate", ("train/learning_rate",)),
    ("Gradient norm", ("train/grad_norm",)),
    ("Tokens a second", ("perf/tokens_per_second",)),
    ("Model FLOPs utilisation", ("perf/mfu",)),
    ("Seconds a step", ("time/step",)),
    ("Seconds a step waits for data", ("time/data_wait",)),
    ("Seconds a checkpoint holds the run up", ("time/checkpoint",)),
    ("GPU memory, peak GB", ("mem/peak_allocated_gb",)),
    ("Host memory, GB", ("mem/host_gb", "mem/host_peak_gb")),
    ("Fill of the rows", ("data/fill",)),
    ("Unreadable samples", ("data/bad_samples",)),
)
_STYLE = """
*{box-sizing:border-box}
body{font:15px/1.5 system-ui,sans-serif;max-width:1220px;margin:0 auto;padding:1rem;
color:#1f2937;background:#fff}
h1{font-size:1.6rem;margin:.3rem 0}h2{font-size:1.2rem;margin:2rem 0 .6rem;border-bottom:1px solid #e5e7eb}
.cards{display:grid;grid-template-columns:repeat(auto-fit,minmax(135px,1fr));gap:.6rem}
.card{background:#f3f4f6;border-radius:8px;padding:.5rem .7rem}.card b{display:block;font-size:1.15rem}
.card span{color:#4b5563;font-size:.85rem}
.charts.one figure{max-width:720px}
.charts{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(340px,100%),1fr));gap:1rem}
figure{margin:0;border:1px solid #e5e7eb;border-radius:8px;padding:.5rem;break-inside:avoid}
figcaption{font-weight:600;font-size:.95rem}figcaption small{display:block;font-weight:400;color:#4b5563}
.legend{display:block;font-weight:400;font-size:.85rem}
.legend i{display:inline-block;width:18px;vertical-align:middle;margin:0 4px 0 0}
svg{width:100%;height:auto;display:block}svg text{font-size:12px;fill:#4b5563}
.grid{stroke:#e5e7eb}.mark{stroke:#dc2626;stroke-dasharray:4 3}
.wide{overflow-x:auto}table{border-collapse:collapse;font-size:.9rem}
td,th{border:1px solid #e5e7eb;padding:.25rem .55rem;text-align:left;vertical-align:top}
th{background:#f9fafb}td.n{text-align:right;font-variant-numeric:tabular-nums}
.text{white-space:pre-wrap;overflow-wrap:anywhere;min-width:9rem}
tr.wrong td{background:#fef2f2}
.only:checked~.wide tr.right{display:none}label{margin-left:.3rem}
td img{display:block;width:80px;height:auto;image-rendering:auto}
pre{overflow:auto;background:#f3f4f6;padding:.8rem;border-radius:8px;font-size:.8rem}
summary{cursor:pointer;margin:.4rem 0}
@media(max-width:620px){body{padding:.6rem}
.answers table,.answers tbody,.answers tr,.answers td{display:block;width:100%;border:0}
.answers thead{display:none}
.answers tr{border:1px solid #e5e7eb;border-radius:8px;margin:0 0 .6rem;padding:.3rem}
.answers td.n{text-align:left}.answers td[data-name]::before{content:attr(data-name) ": ";color:#4b5563}}
@media print{body{max-width:none;font-size:11px}.charts{grid-template-columns:1fr 1fr}h2{break-after:avoid}
tr{break-inside:avoid}.only,.only+label{display:none}pre{white-space:pre-wrap;overflow-wrap:anywhere}
.wide{overflow:visible}table{width:100%;font-size:8px}td,th{padding:1px 3px;overflow-wrap:anywhere}
.text{min-width:0}td img{width:40px}.answers tr:nth-child(n+31){display:none}
.answers::after{content:"On paper the first 30 rows at most."}}
"""


def report(run_dirs: Sequence[Path] | Path, answers: int = _ANSWERS) -> str:
    """The page of some runs. answers: rows of each table of answers at most.

    Raises BadInputError if a directory holds no metrics.
    """
    folders = [run_dirs] if isinstance(run_dirs, Path) else list(run_dirs)
    if not folders:
        raise BadInputError("no run given; give at least one run directory")
    runs = [read_run(folder, answers) for folder in folders]
    title = html.escape(" and ".join(run.name for run in runs))
    room = [_PICTURE_BYTES]
    parts = [f"<h1>{title}</h1>"]
    parts += [_head(run, colour) for colour, run in enumerate(runs)]
    parts += [_section("Training", _charts(runs)), _section("Time line", _timeline(runs))]
    parts.append(_section("Evaluation", _evaluations(runs)))
    parts += [_answers(run, evaluated, room) for run in runs for evaluated in _shown_answers(run)]
    parts.append(_section("Data and packing", _data(runs)))
    if len(runs) > 1:
        parts.append(_section("What differs in the configurations", _differences(runs)))
    parts += [_details(f"Every metric of {run.name}, last value", _last(run)) for run in runs]
    for run in runs:
        text = html.escape(json.dumps(run.config, indent=1))
        parts.append(_details(f"Configuration of {run.name}", f"<pre>{text}</pre>"))
    head = (
        '<meta charset="utf-8"><meta name="viewport" content="width=device-width,initial-scale=1">'
        f'<link rel="icon" href="data:,"><title>{title}</title><style>{_STYLE}</style>'
    )
    return f"<!doctype html><html lang=en><head>{head}</head><body>{''.join(parts)}</body></html>\n"


def _section(title: str, body: str) -> str:
    return f"<section><h2>{html.escape(title)}</h2>{body}</section>" if body else ""


def _details(title: str, body: str) -> str:
    return f"<details><summary>{html.escape(title)}</summary>{body}</details>"


def _head(run: Run, colour: int) -> str:
    last = run.last
    code = run.exit.get("code")
    state = {None: "running, or killed", 0: "done", 3: "stopped, can go on", 4: "diverged"}.get(
        code, "failed"
    )
    seconds = sum(end - start for start, end in _spans(run))
    steps = (run.config.get("train") or {}).get("steps")
    cards = [
        ("state", state),
        ("steps", f"{last.get('train/global_step', 0):,}" + (f" of {steps:,}" if steps else "")),
        ("hours at work", f"{seconds / 3600:.2f}"),
        ("tokens seen", number(last.get("train/tokens_seen", 0))),
        ("pictures seen", number(last.get("train/images_seen", 0))),
        ("training loss", number(last["train/loss"]) if "train/loss" in last else "-"),
        ("tokens / s", number(last.get("perf/tokens_per_second", 0))),
        ("restarts", str(len(run.restarts))),
    ]
    if "perf/mfu" in last:
        cards.append(("MFU", f"{last['perf/mfu']:.1%}"))
    if run.best:
        cards.append((f"best {run.best['metric']}, step {run.best['step']}", number(run.best["value"])))
    name = f'<h2 style="border-color:{COLOURS[colour % len(COLOURS)]}">{html.escape(run.name)}</h2>'
    boxes = "".join(
        f'<div class="card"><b>{html.escape(value)}</b><span>{html.escape(key)}</span></div>'
        for key, value in cards
    )
    return f'{name}<div class="cards">{boxes}</div>'


def _charts(runs: Sequence[Run]) -> str:
    figures = []
    marks = runs[0].restarts if len(runs) == 1 else []
    for title, keys in _CURVES:
        curves = []
        for place, run in enumerate(runs):
            for order, key in enumerate(keys):
                name = key if len(runs) == 1 else f"{run.name} {key if len(keys) > 1 else ''}".strip()
                colour = place if len(runs) > 1 else order
                dashed = order > 0 and len(runs) > 1
                curves.append(Curve(name, run.series(key), colour, dashed=dashed, dots=key == "eval/loss"))
        figures.append(chart(title, curves, marks))
    return f'<div class="charts">{"".join(figures)}</div>'


def _spans(run: Run) -> list[tuple[float, float]]:
    """When the run was at work: from each start to its last line before the next start."""
    times = [line["time/unix"] for line in run.lines if "time/unix" in line]
    starts = [start["time"] for start in run.starts] or times[:1]
    spans = []
    for place, start in enumerate(starts):
        until = starts[place + 1] if place + 1 < len(starts) else float("inf")
        spans.append((start, max([each for each in times if start <= each < until], default=start)))
    return spans


def _timeline(runs: Sequence[Run]) -> str:
    curves, rows = [], []
    longest = max((spans[-1][1] - spans[0][0] for run in runs if (spans := _spans(run))), default=0.0)
    unit, seconds = ("hours", 3600) if longest > 2 * 3600 else ("minutes", 60)
    for place, run in enumerate(runs):
        spans = _spans(run)
        if not spans:
            continue
        begin = spans[0][0]
        times = [(line["time/unix"], line[STEP]) for line in run.lines if "time/unix" in line]
        curves.append(Curve(run.name, [((t - begin) / seconds, step) for t, step in times], place))
        for start, (began, ended) in zip(run.starts, spans, strict=False):
            job = ", ".join(f"{k}={v}" for k, v in (start.get("job") or {}).items() if "ELASTIC" not in k)
            when = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(began))
            cells = (run.name, when, f"step {start['step']}", f"{(ended - began) / 60:.1f} min",
                     f"{start.get('world_size', '-')}", str(start.get("host", "-")), job or "-")  # fmt: skip
            rows.append("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in cells) + "</tr>")
    marks = []
    if len(runs) == 1 and runs[0].starts:
        begin = runs[0].starts[0]["time"]
        marks = [(start["time"] - begin) / seconds for start in runs[0].starts[1:]]
    figure = chart("Steps over time; red where the run went on", curves, marks, unit)
    names = ("run", "started", "from", "at work", "ranks", "host", "job")
    head = "".join(f"<th>{name}</th>" for name in names)
    table = f'<div class="wide"><table><tr>{head}</tr>{"".join(rows)}</table></div>' if rows else ""
    return (f'<div class="charts one">{figure}</div>' if figure else "") + table


def _evaluations(runs: Sequence[Run]) -> str:
    keys = list(
        dict.fromkeys(key for run in runs for line in run.lines for key in line if key.startswith("eval/"))
    )
    figures = []
    for key in keys:
        curves = []
        for place, run in enumerate(runs):
            between = {e.step: e.scores.get("intervals", {}).get(key[5:]) for e in run.evaluations}
            points = run.series(key)
            band = [(x, *between[int(x)]) for x, _ in points if between.get(int(x))]
            curves.append(Curve(run.name, points, place, band, dots=True))
        figures.append(chart(f"{key}{', 95 % interval' if any(c.band for c in curves) else ''}", curves))
    tables = [_scores(run, e) for run in runs for e in run.evaluations if e.step is None]
    tables += [_scores(run, e) for run in runs for e in _in_training(run)[-1:]]
    return f'<div class="charts">{"".join(figures)}</div>{"".join(tables)}'


def _in_training(run: Run) -> list[Evaluated]:
    return sorted((e for e in run.evaluations if e.step is not None), key=lambda e: e.step or 0)


def _scores(run: Run, evaluated: Evaluated) -> str:
    found = {k: v for k, v in evaluated.scores.items() if k in ("scores", "swapped", "baseline") and v}
    found |= {f"only {k}": v for k, v in (evaluated.scores.get("slices") or {}).items()}
    columns = list(dict.fromkeys(name for row in found.values() for name in row))
    head = "".join(f"<th>{html.escape(column)}</th>" for column in columns)
    body = "".join(
        f"<tr><th>{html.escape(name)}</th>"
        + "".join(f'<td class="n">{_cell(row.get(c))}</td>' for c in columns)
        + "</tr>"
        for name, row in found.items()
    )
    title = f"<h3>{html.escape(run.name)}: {html.escape(evaluated.name)}</h3>"
    return f'{title}<div class="wide"><table><tr><th></th>{head}</tr>{body}</table></div>'


def _cell(value: Any) -> str:
    return (
        "-"
        if value is None
        else f"{value:.4g}"
        if isinstance(value, int | float)
        else html.escape(str(value))
    )


def _shown_answers(run: Run) -> list[Evaluated]:
    """The last evaluation in training and those made afterwards."""
    chosen = [*_in_training(run)[-1:], *(e for e in run.evaluations if e.step is None)]
    return [evaluated for evaluated in chosen if evaluated.rows]


def _answers(run: Run, evaluated: Evaluated, room: list[int]) -> str:
    rows = evaluated.rows
    metrics = [k for k in rows[0] if k not in ("key", "slice", "prompt", "truth", "prediction", "picture")]
    names = ("picture", "key", "prompt", "truth", "answer", *metrics)
    head = "".join(f"<th>{html.escape(name)}</th>" for name in names)
    wrong = sum(not _is_right(row) for row in rows)
    body = "".join(_answer(row, metrics, room) for row in rows)
    box = "only-" + "".join(c if c.isalnum() else "-" for c in f"{run.name}-{evaluated.name}")
    total = evaluated.scores.get("scores", {}).get("samples", len(rows))
    return (
        f'<section class="answers"><h2>Answers: {html.escape(run.name)}, {html.escape(evaluated.name)}</h2>'
        f'<input type="checkbox" class="only" id="{box}"><label for="{box}">only errors ({wrong} of '
        f"{len(rows)} shown, {total} answered)</label>"
        f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
        "</section>"
    )


def _is_right(row: dict[str, Any]) -> bool:
    return str(row["truth"]).strip() == str(row["prediction"]).strip()


def _answer(row: dict[str, Any], metrics: Sequence[str], room: list[int]) -> str:
    picture = ""
    data = row.get("picture")
    if data and len(data) <= room[0]:
        room[0] -= len(data)
        source = base64.b64encode(data).decode()
        name = html.escape(str(row["key"]), quote=True)
        picture = f'<img alt="picture of {name}" src="data:image/jpeg;base64,{source}">'
    prompt = str(row.get("prompt", "")).replace("<|user|>\n", "").replace("<|end|>\n<|assistant|>\n", "")
    texts = (("key", str(row["key"])), ("prompt", prompt), ("truth", str(row["truth"])),
             ("answer", str(row["prediction"])))  # fmt: skip
    cells = f"<td>{picture}</td>" + "".join(
        f'<td class="text" data-name="{name}">{html.escape(text)}</td>' for name, text in texts
    )
    cells += "".join(
        f'<td class="n" data-name="{html.escape(name, quote=True)}">{_cell(row.get(name))}</td>'
        for name in metrics
    )
    return f'<tr class="{"right" if _is_right(row) else "wrong"}">{cells}</tr>'


def _data(runs: Sequence[Run]) -> str:
    keys = list(dict.fromkeys(key for run in runs for key in run.last if key.startswith("data/")))
    settings = ("path", "sources", "train_split", "seq_len", "num_crops", "packing", "shuffle", "over_long")
    rows = []
    for key in keys:
        rows.append((f"{key}, last", [_cell(run.last.get(key)) for run in runs]))
        values = [[value for _, value in run.series(key)] for run in runs]
        rows.append((f"{key}, mean", [_cell(sum(v) / len(v)) if v else "-" for v in values]))
    for name in settings:
        found = [(run.config.get("data") or {}).get(name) for run in runs]
        if any(value is not None for value in found):
            rows.append((f"data.{name}", [html.escape(json.dumps(value)) for value in found]))
    return _table(["", *(run.name for run in runs)], rows)


def _differences(runs: Sequence[Run]) -> str:
    flat = [dict(flatten(run.config)) for run in runs]
    keys = sorted({key for each in flat for key in each})
    rows = []
    for key in keys:
        values = [json.dumps(each.get(key)) for each in flat]
        if len(set(values)) > 1:
            rows.append((key, [html.escape(value) for value in values]))
    return _table(["key", *(run.name for run in runs)], rows) if rows else "<p>Nothing.</p>"


def _last(run: Run) -> str:
    rows = [(key, [_cell(value)]) for key, value in sorted(run.last.items())]
    return _table(["metric", "last value"], rows)


def _table(names: Sequence[str], rows: Sequence[tuple[str, list[str]]]) -> str:
    head = "".join(f"<th>{html.escape(name)}</th>" for name in names)
    body = "".join(
        f"<tr><td>{html.escape(key)}</td>"
        + "".join(f'<td class="n">{value}</td>' for value in values)
        + "</tr>"
        for key, values in rows
    )
    return f'<div class="wide"><table><tr>{head}</tr>{body}</table></div>'
