"""torchrun for tests: imports torch, transformers and DeepSpeed once, and forks the ranks from there.

    python tests/warm.py [TORCHRUN OPTIONS] SCRIPT|-m MODULE [ARGUMENTS]

Importing takes a rank longer than the few steps of most tests. Here only the agent imports; its ranks are
forks of it instead of new interpreters. Everything else is torchrun: rendezvous, environment, signals, exit
codes, restarts; a rank is a process of its own in a session of its own. Tests of Slurm, Kubernetes, the demo,
the documentation and benchmarks/chaos.py start ranks by the product's own way.

Works around: torch 2.13.0, `SubprocessHandler._popen`, the one place where its agent starts a rank.
"""

import atexit
import os
import runpy
import signal
import subprocess
import sys
import threading
import traceback
from pathlib import Path
from typing import Any


def fork_rank(handler: Any, command: tuple[str, ...], environment: dict[str, str]) -> subprocess.Popen[bytes]:
    """In place of `Popen(command, env=environment, start_new_session=True)`."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            os.setsid()
            become(handler, environment)
            code = run(list(command[1:]))
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    process = object.__new__(subprocess.Popen)
    vars(process).update(
        args=command, pid=pid, returncode=None, stdin=None, stdout=None, stderr=None, _input=None
    )
    vars(process).update(_child_created=True, _communication_started=False, _waitpid_lock=threading.Lock())
    return process


def become(handler: Any, environment: dict[str, str]) -> None:
    """What exec would have done: environment, output, and no handler of the agent's."""
    for number in signal.valid_signals():
        if callable(signal.getsignal(number)):
            signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.clear()
    os.environ.update(environment)
    for stream, file in ((sys.stdout, handler._stdout), (sys.stderr, handler._stderr)):
        if file is not None:
            os.dup2(file.fileno(), stream.fileno())
        stream.reconfigure(write_through=True)  # type: ignore[union-attr]


def run(words: list[str]) -> int:
    """`python WORDS`; the exit code."""
    if words[0] == "-u":
        words = words[1:]
    try:
        try:
            if words[0] == "-m":
                sys.argv[:], sys.path[0] = words[1:], os.getcwd()
                runpy.run_module(words[1], run_name="__main__", alter_sys=True)
            else:
                sys.argv[:], sys.path[0] = words, str(Path(words[0]).parent)
                runpy.run_path(words[0], run_name="__main__")
        except SystemExit as end:
            if isinstance(end.code, str):
                print(end.code, file=sys.stderr)
            return end.code if isinstance(end.code, int) else int(end.code is not None)
        except KeyboardInterrupt:
            return 128 + signal.SIGINT
        return 0
    finally:
        threading._shutdown()  # type: ignore[attr-defined]
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()


if __name__ == "__main__":
    import deepspeed  # noqa: F401
    from torch.distributed.elastic.multiprocessing.subprocess_handler import SubprocessHandler
    from torch.distributed.run import main

    import launch.cli.main  # noqa: F401
    import phi3v_dist.train.loop  # noqa: F401

    SubprocessHandler._popen = fork_rank
    main(sys.argv[1:])
