"""One HTML page about a run that needs no network: curves, evaluations, answers, where it came from.

In: a run directory (metrics.jsonl, the newest checkpoint, eval/*). Out: the page. Called by `phi3v report`.
"""

from __future__ import annotations

import html
import json
from pathlib import Path
from typing import Any

from phi3v_dist import checkpoint
from phi3v_dist.rundir import CHECKPOINTS
from phi3v_dist.track import METRICS
from shards.format import BadInputError

_WIDTH, _HEIGHT = 560, 180  # px of a curve
_CURVES = (
    ("train/loss", "training loss"),
    ("eval/loss", "validation loss"),
    ("train/learning_rate", "learning rate"),
    ("train/grad_norm", "gradient norm"),
    ("perf/tokens_per_second", "tokens a second"),
    ("time/data_wait", "seconds a step waits for data"),
    ("eval/price_mae", "price error"),
    ("eval/category_accuracy", "category accuracy"),
    ("mem/peak_allocated_gb", "peak GPU memory, GB"),
)
_STYLE = """
body{font:15px/1.5 system-ui,sans-serif;max-width:1180px;margin:2rem auto;padding:0 1rem;color:#222}
figure{display:inline-block;margin:0 1rem 1rem 0;max-width:100%}figcaption{font-weight:600}
svg{max-width:100%;height:auto;background:#f7f7f7}table{border-collapse:collapse}
td,th{border:1px solid #ddd;padding:.2rem .6rem;text-align:left;vertical-align:top;white-space:pre-wrap}
.wrong{background:#fdecea}pre{overflow:auto;background:#f7f7f7;padding:1rem}
"""


def report(run_dir: Path, answers: int = 100) -> str:
    """The page of a run. answers: rows of each table of predictions at most.

    Raises BadInputError if `run_dir` holds no metrics.
    """
    file = run_dir / METRICS
    if not file.exists():
        raise BadInputError(f"{run_dir}: no {METRICS}, so no run has been here; give a run directory")
    lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines() if line.endswith("}")]
    parts = [f"<h1>{html.escape(run_dir.name)}</h1>", _facts(run_dir, lines)]
    parts += [_curve(lines, key, title) for key, title in _CURVES]
    for scores in sorted(run_dir.glob("eval/*/scores.json")):
        parts.append(_evaluation(scores, answers))
    newest = checkpoint.newest(run_dir / CHECKPOINTS)
    if newest is not None:
        run = json.dumps(checkpoint.read_meta(newest)["run"], indent=1)
        parts.append(f"<h2>Made with</h2><pre>{html.escape(run)}</pre>")
    title = html.escape(run_dir.name)
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{title}</title>'
    body = "".join(parts)
    return (
        f"<!doctype html><html lang=en><head>{head}<style>{_STYLE}</style></head><body>{body}</body></html>\n"
    )


def _facts(run_dir: Path, lines: list[dict[str, Any]]) -> str:
    last: dict[str, Any] = {}
    for line in lines:
        last |= line
    rows = "".join(
        f"<tr><td>{html.escape(key)}</td><td>{value:,.6g}</td></tr>" for key, value in sorted(last.items())
    )
    return f"<details><summary>Last value of every metric</summary><table>{rows}</table></details>"


def _curve(lines: list[dict[str, Any]], key: str, title: str) -> str:
    points = [(line["train/global_step"], line[key]) for line in lines if key in line]
    if not points:
        return ""
    (first, last), values = (points[0][0], points[-1][0]), [value for _, value in points]
    low, high = min(values), max(values)
    x_scale, y_scale = _WIDTH / max(1, last - first), (_HEIGHT - 20) / ((high - low) or 1)
    path = " ".join(
        f"{(x - first) * x_scale:.1f},{_HEIGHT - 10 - (y - low) * y_scale:.1f}" for x, y in points
    )
    dots = "".join(
        f'<circle cx="{(x - first) * x_scale:.1f}" cy="{_HEIGHT - 10 - (y - low) * y_scale:.1f}" r="2">'
        f"<title>step {x}: {y:.6g}</title></circle>"
        for x, y in points
    )
    return (
        f'<figure><svg viewBox="-4 0 {_WIDTH + 8} {_HEIGHT}" width="{_WIDTH}" role="img">'
        f'<polyline points="{path}" fill="none" stroke="#2563eb" stroke-width="1.5"/>{dots}</svg>'
        f"<figcaption>{title}: {values[-1]:.4g} at step {last} (least {low:.4g}, most {high:.4g})"
        "</figcaption></figure>"
    )


def _evaluation(scores: Path, answers: int) -> str:
    found: dict[str, dict[str, Any]] = json.loads(scores.read_text())
    columns = list(next(iter(found.values())))
    head = "".join(f"<th>{html.escape(column)}</th>" for column in columns)
    body = "".join(
        f"<tr><th>{html.escape(name)}</th>"
        + "".join(f"<td>{'-' if row[c] is None else format(row[c], '.4g')}</td>" for c in columns)
        + "</tr>"
        for name, row in found.items()
    )
    lines = (scores.parent / "predictions.jsonl").read_text(encoding="utf-8").splitlines()[:answers]
    rows = "".join(_answer(json.loads(line)) for line in lines)
    return (
        f"<h2>Evaluation: {html.escape(scores.parent.name)}</h2><table><tr><th></th>{head}</tr>{body}</table>"
        f"<details><summary>{len(lines)} answers</summary><table>"
        "<tr><th>key</th><th>truth</th><th>answer</th></tr>"
        f"{rows}</table></details>"
    )


def _answer(line: dict[str, str]) -> str:
    kind = "" if line["truth"].strip() == line["prediction"].strip() else ' class="wrong"'
    cells = "".join(f"<td>{html.escape(line[key])}</td>" for key in ("key", "truth", "prediction"))
    return f"<tr{kind}>{cells}</tr>"
