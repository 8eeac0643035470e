"""Holds what `make test-fast` promises: a test that is marked neither `ranks` nor `system` starts no training
ranks, no Slurm and no browser.

conftest.py sets PHI3V_TEST_UNMARKED to a file around each unmarked test. An audit hook then refuses to start
such a program, and notes it in that file, because the code under test may catch the error. This directory
is on PYTHONPATH, so that Python imports this module at the start of every process that a test starts, and the
hook holds there as well. Standard library only: it is imported before anything else.
"""

import os
import re
import sys
from pathlib import Path
from typing import Any

UNMARKED = "PHI3V_TEST_UNMARKED"
MODULES = re.compile(r"torch\.distributed\.(run|launch)$|launch\.torchrun\.(agent|node)$")
PROGRAMS = {
    "torchrun": "ranks",
    "sbatch": "system",
    "srun": "system",
    "salloc": "system",
    "slurmd": "system",
    "slurmctld": "system",
    "munged": "system",
    "chromium": "system",
    "chromium-browser": "system",
    "google-chrome": "system",
}


def marker_needed(words: list[str]) -> str | None:
    """The marker that a test needs to run this command; None if it needs none. A stand-in is none of these
    programs: a file under the temporary directory that has the name of one.
    """
    if not words:
        return None
    program = Path(words[0])
    if program.name in PROGRAMS and not _stand_in(words[0]):
        return PROGRAMS[program.name]
    if program.name.startswith("python"):
        for before, word in zip(words, words[1:], strict=False):
            if before == "-m" and MODULES.match(word):
                return "ranks"
            if word.endswith(("/torchrun", "tests/warm.py")):
                return "ranks"
    return None


def _stand_in(program: str) -> bool:
    import shutil
    import tempfile

    found = program if "/" in program else shutil.which(program)
    return found is None or found.startswith(tempfile.gettempdir())


def _words(event: str, arguments: tuple[Any, ...]) -> list[str]:
    """The command line of an audit event that starts a program."""
    if event == "os.system":
        return os.fsdecode(arguments[0]).split()
    executable, command = arguments[0], arguments[1]
    if isinstance(command, str | bytes | os.PathLike):
        command = os.fsdecode(command).split()
    words = [os.fsdecode(word) for word in command]
    return [os.fsdecode(executable), *words[1:]] if executable and words else words


def watch(event: str, arguments: tuple[Any, ...]) -> None:
    """The audit hook."""
    if event not in ("subprocess.Popen", "os.exec", "os.posix_spawn", "os.system"):
        return
    notes = os.environ.get(UNMARKED)
    if not notes:
        return
    words = _words(event, arguments)
    marker = marker_needed(words)
    if marker is not None:
        text = f"a test that starts {' '.join(words)[:300]!r} needs the marker `{marker}`"
        with open(notes, "a") as file:
            file.write(f"{text}\n")
        raise RuntimeError(text)


if os.environ.get(UNMARKED) or "pytest" in sys.modules:
    sys.addaudithook(watch)
