"""A run is asked to stop: by SIGUSR1, SIGTERM or SIGINT, or by a file STOP in its directory.

Nothing happens at once: a flag is set, which the train loop shares with all ranks at the end of a step. Only
a wait for data, which may never end, is interrupted.
"""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

STOP = "STOP"
SIGNALS = (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT)
PATIENCE_S = 2.0
"""Seconds that data may still take after the run was asked to stop."""


class StoppedWaitingError(BaseException):
    """The run is to stop and what was waited for has not come.

    It may be raised at any line, as KeyboardInterrupt may. It is no Exception, so that no `except Exception`
    on the way takes it for a fault of an image or a file.
    """


class Stop:
    """Remembers that this process was asked to stop. A second signal changes nothing.

    file: its existence is a request as well, looked up whenever `requested` is read; None: no such file.
    Installs handlers for SIGNALS and uses SIGALRM.
    """

    def __init__(self, file: Path | None) -> None:
        self._file = file
        self._requested = self._waiting = False
        for number in SIGNALS:
            signal.signal(number, self._on_signal)
        signal.signal(signal.SIGALRM, self._on_alarm)

    @property
    def requested(self) -> bool:
        """Whether this process was asked to stop, or the file exists."""
        if not self._requested and self._file is not None and self._file.exists():
            self._requested = True
        return self._requested

    def remove_file(self) -> None:
        """Removes the file, so that the next start does not stop at once."""
        if self._file is not None:
            with contextlib.suppress(OSError):
                self._file.unlink()

    @contextlib.contextmanager
    def interrupting(self) -> Iterator[None]:
        """Inside, StoppedWaitingError is raised PATIENCE_S seconds after the run was asked to stop."""
        self._waiting = True
        if self._requested:
            signal.setitimer(signal.ITIMER_REAL, PATIENCE_S)
        try:
            yield
        finally:
            self._waiting = False
            signal.setitimer(signal.ITIMER_REAL, 0)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._requested = True
        if self._waiting:
            signal.setitimer(signal.ITIMER_REAL, PATIENCE_S)

    def _on_alarm(self, number: int, frame: FrameType | None) -> None:
        if self._waiting:
            self._waiting = False
            raise StoppedWaitingError
