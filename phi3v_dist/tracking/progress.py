"""How far a run is, for whoever watches: one line that stays in place on a terminal, plain lines elsewhere.

In: the metrics of a window of steps. Out: the log, and on a terminal a line above which the log scrolls.
Called by the train loop.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping

from rich.console import Console
from rich.live import Live
from rich.text import Text

_log = logging.getLogger(__name__)


class ProgressLine:
    """`show` once per window, `close` at the end. on_terminal: keep one line in place instead of many."""

    def __init__(self, steps: int, on_terminal: bool) -> None:
        self._steps = steps
        self._live: Live | None = None
        self._handlers: list[logging.StreamHandler] = []
        if on_terminal:
            self._handlers = [
                handler
                for handler in logging.getLogger().handlers
                if isinstance(handler, logging.StreamHandler) and handler.stream is sys.stdout
            ]
            console = Console(file=sys.stdout, soft_wrap=True)
            self._live = Live(Text("starting"), console=console, auto_refresh=False, redirect_stderr=False)
            self._live.start()
            for handler in self._handlers:
                handler.setStream(sys.stdout)  # by now the one that scrolls above the line

    def show(self, step: int, metrics: Mapping[str, float | int | None]) -> None:
        """The line of `step`; into the files of the log in any case."""
        line = describe(step, self._steps, metrics)
        if self._live is None:
            _log.info(line)
            return
        self._live.update(Text(line, no_wrap=True, overflow="ellipsis"), refresh=True)
        record = _log.makeRecord(_log.name, logging.INFO, __file__, 0, line, (), None)
        for handler in logging.getLogger().handlers:
            if handler not in self._handlers:
                handler.handle(record)

    def close(self) -> None:
        if self._live is not None:
            self._live.stop()
            for handler in self._handlers:
                handler.setStream(sys.stdout)


def describe(step: int, steps: int, metrics: Mapping[str, float | int | None]) -> str:
    """Step, loss, learning rate, gradient norm, speed, MFU, memory, time left; what is not known is left
    out.
    """
    left = (steps - step) * float(metrics.get("time/step") or 0)
    hours, minutes = divmod(int(left) // 60, 60)
    clock = f"{hours}:{minutes:02d}:{int(left) % 60:02d}" if hours else f"{minutes}:{int(left) % 60:02d}"
    parts = [f"step {step}/{steps}  {clock} left"]  # in front: a narrow terminal cuts off the end
    for key, shown in (
        ("train/loss", "loss {:.4f}"),
        ("train/learning_rate", "lr {:.2e}"),
        ("perf/tokens_per_second", "{:.0f} tokens/s"),
        ("perf/mfu", "MFU {:.1%}"),
        ("train/grad_norm", "grad {:.2f}"),
        ("time/step", "{:.2f} s/step"),
        ("mem/peak_allocated_gb", "GPU {:.1f} GB"),
        ("mem/host_gb", "host {:.1f} GB"),
    ):
        value = metrics.get(key)
        if value is not None:
            parts.append(shown.format(value))
    return "  ".join(parts)
