"""A run is told to stop: by SIGUSR1, SIGTERM or SIGINT, or by a file STOP in its directory.

Nothing happens at once: a flag is set, which the train loop shares with all ranks at the end of a step. Only
a wait for data, which may never end, is broken off. Called by the train loop.
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
"""Seconds that data may still take once the run is to stop."""


class StoppedWaitingError(BaseException):
    """The run is to stop and what was waited for has not come. It may come anywhere, like KeyboardInterrupt,
    so no `except Exception` on its way shall take it for a fault of a picture or a file.
    """


class Stop:
    """Remembers that this process was told to stop. A second signal changes nothing.

    file: also looked for whenever `asked` is asked; None for none. Uses SIGALRM.
    """

    def __init__(self, file: Path | None) -> None:
        self._file = file
        self._asked = self._waiting = False
        for number in SIGNALS:
            signal.signal(number, self._remember)
        signal.signal(signal.SIGALRM, self._give_up)

    @property
    def asked(self) -> bool:
        """Whether this process was told to stop, or the file is there."""
        if not self._asked and self._file is not None and self._file.exists():
            self._asked = True
        return self._asked

    def forget_file(self) -> None:
        """Removes the file, so that the next start goes on."""
        if self._file is not None:
            with contextlib.suppress(OSError):
                self._file.unlink()

    @contextlib.contextmanager
    def breaking_off(self) -> Iterator[None]:
        """What waits in here gets StoppedWaitingError when the run is to stop and PATIENCE_S have passed."""
        self._waiting = True
        if self._asked:
            signal.setitimer(signal.ITIMER_REAL, PATIENCE_S)
        try:
            yield
        finally:
            self._waiting = False
            signal.setitimer(signal.ITIMER_REAL, 0)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self._asked = True
        if self._waiting:
            signal.setitimer(signal.ITIMER_REAL, PATIENCE_S)

    def _give_up(self, number: int, frame: FrameType | None) -> None:
        if self._waiting:
            self._waiting = False
            raise StoppedWaitingError
