"""The page of `phi3v estimate --scaling --plot`: tokens per second of one GPU over the number of GPUs.

In: the numbers of budget.scaling. Out: an HTML page, from templates/scaling.html.j2.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from phi3v_dist.budget.scaling import StepTime
from phi3v_dist.tracking.report.charts import Curve, chart
from shards.common.html import render_page

_TEMPLATES = Path(__file__).with_name("templates")


def scaling_page(name: str, times: Sequence[StepTime], text: str) -> str:
    """The page for the config `name`: a chart of `times`, with and without communication, over the binary
    logarithm of the number of GPUs, and `text` below it.
    """
    compute_only = [(_log2(t.gpus), t.tokens / (t.compute + t.optimizer) / t.gpus) for t in times]
    whole_step = [(_log2(t.gpus), t.tokens_per_gpu) for t in times]
    curves = [
        Curve("arithmetic alone", compute_only, 1, dashed=True),
        Curve("with communication", whole_step, 0, dots=True),
    ]
    figure = chart("tokens per second of one GPU", curves, unit="log2 GPUs")
    return render_page(_TEMPLATES, "scaling.html.j2", name=name, figure=figure, text=text)


def _log2(power_of_two: int) -> float:
    return power_of_two.bit_length() - 1.0
