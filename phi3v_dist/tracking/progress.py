"""The progress of a run: one line that stays in place on a terminal, plain log lines elsewhere.

In: the metrics of a window of steps. Out: the log; on a terminal also a line above which the log scrolls.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping

from rich.console import Console
from rich.progress import Progress, TextColumn
from rich.table import Column

_log = logging.getLogger(__name__)


class ProgressLine:
    """Call `show` once per window, `close` at the end.

    steps: of the whole run. on_terminal: keep one line in place on the standard output.
    """

    def __init__(self, steps: int, on_terminal: bool) -> None:
        self._steps = steps
        self._progress: Progress | None = None
        self._handlers: list[logging.StreamHandler] = []
        if on_terminal:
            self._handlers = [
                handler
                for handler in logging.getLogger().handlers
                if isinstance(handler, logging.StreamHandler) and handler.stream is sys.stdout
            ]
            one_line = Column(no_wrap=True, overflow="ellipsis")
            self._progress = Progress(
                TextColumn("{task.description}", markup=False, table_column=one_line),
                console=Console(file=sys.stdout, soft_wrap=True),
                auto_refresh=False,
                redirect_stderr=False,
            )
            self._task = self._progress.add_task("starting", total=steps)
            self._progress.start()
            for handler in self._handlers:
                handler.setStream(sys.stdout)  # which rich has replaced by one that scrolls above the line

    def show(self, step: int, metrics: Mapping[str, float | int | None]) -> None:
        """Shows the line of `step`. It also goes to the files of the log, with or without a terminal."""
        line = describe(step, self._steps, metrics)
        if self._progress is None:
            _log.info(line)
            return
        self._progress.update(self._task, completed=step, description=line, refresh=True)
        record = _log.makeRecord(
            _log.name, logging.INFO, fn=__file__, lno=0, msg=line, args=(), exc_info=None
        )
        for handler in logging.getLogger().handlers:
            if handler not in self._handlers:
                handler.handle(record)

    def close(self) -> None:
        """Leaves the last line on the terminal and restores the log."""
        if self._progress is not None:
            self._progress.stop()
            for handler in self._handlers:
                handler.setStream(sys.stdout)


def describe(step: int, steps: int, metrics: Mapping[str, float | int | None]) -> str:
    """One line with step, time left, loss, learning rate, speed, MFU, gradient norm and memory, as far as
    they are known.
    """
    left = (steps - step) * float(metrics.get("time/step") or 0)
    hours, minutes = divmod(int(left) // 60, 60)
    clock = f"{hours}:{minutes:02d}:{int(left) % 60:02d}" if hours else f"{minutes}:{int(left) % 60:02d}"
    parts = [f"step {step}/{steps}  {clock} left"]  # first, because a narrow terminal cuts off the end
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
