"""torchrun for one node, with two differences that a restartable run needs.

In: `python -m launch.torchrun.agent TORCHRUN_OPTIONS RANK_COMMAND`. Out: the exit code of the first rank that
failed, where torchrun itself always exits with 1. A stop signal (SIGUSR1, SIGTERM, SIGINT) is forwarded as
SIGUSR1 to the ranks alone, and the agent waits for them; torchrun itself would signal their process groups,
data workers included, and kill everything 30 seconds later.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Sequence
from types import FrameType

import psutil

from launch.torchrun.watch import PARENT_VARIABLE, stop_grace_s, watch_parent
from phi3v_dist.exits import DONE, PREEMPTED

NO_RENDEZVOUS = 75
"""Exit code: the nodes did not find each other and no rank was started; a retry may help (EX_TEMPFAIL)."""
STOP_SIGNALS = (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT)


class _StoppedBeforeStartError(Exception):
    """A stop signal came while no rank was running."""


def main(arguments: Sequence[str]) -> int:
    """Runs torchrun with `arguments` in this process; returns the exit code."""
    stopping = imported = False

    def forward(signum: int, frame: FrameType | None) -> None:
        nonlocal stopping
        ranks = psutil.Process().children()
        if not ranks and not stopping:
            stopping = True
            if not imported:  # nothing is open yet, and a library might catch an exception
                os._exit(PREEMPTED)
            raise _StoppedBeforeStartError
        if not stopping:
            stopping = True
            signal.alarm(max(1, round(stop_grace_s())))
        for rank in ranks:
            _send(rank, signal.SIGUSR1)

    def out_of_grace(signum: int, frame: FrameType | None) -> None:
        print("launch.torchrun.agent: ranks did not stop in time; killing them", file=sys.stderr, flush=True)
        for rank in psutil.Process().children(recursive=True):
            _send(rank, signal.SIGKILL)

    for stop_signal in STOP_SIGNALS:
        signal.signal(stop_signal, forward)
    signal.signal(signal.SIGALRM, out_of_grace)
    watch_parent()
    os.environ[PARENT_VARIABLE] = str(os.getpid())

    from torch.distributed import run as torchrun
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous import RendezvousError

    imported = True
    try:
        torchrun.run(torchrun.parse_args(["--signals-to-handle", "SIGHUP,SIGQUIT", *arguments]))
        return DONE
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode < 0:
            name = signal.Signals(-failure.exitcode).name
            if not stopping:
                print(f"launch.torchrun.agent: rank {rank} was killed by {name}", file=sys.stderr, flush=True)
            return 128 - failure.exitcode
        return int(failure.exitcode)
    except _StoppedBeforeStartError:
        return PREEMPTED
    except SignalException as error:
        return 128 + int(error.sigval)
    except RendezvousError as error:
        if stopping:
            return PREEMPTED
        reason = " ".join(str(error).split()) or type(error).__name__
        print(
            f"launch.torchrun.agent: the nodes did not find each other: {reason}", file=sys.stderr, flush=True
        )
        return NO_RENDEZVOUS


def _send(process: psutil.Process, signum: signal.Signals) -> None:
    with contextlib.suppress(psutil.NoSuchProcess):
        process.send_signal(signum)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
