"""The tests on all cores. `make test` and `make test-fast` run this.

    python tests/together.py [--fast] [PYTEST ARGUMENTS]

The Slurm tests run beside the others: they wait more than they work, and share one cluster. Exit status 1 if
either part failed. --fast: the tests marked neither `ranks` nor `system`, so none of Slurm's.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

SLURM = "tests/slurm"


def main() -> int:
    """Runs both parts, shows one after the other; the exit status."""
    os.chdir(Path(__file__).parents[1])
    pytest = [sys.executable, "-m", "pytest", *sys.argv[1:]]
    workers = min(4, max(2, os.cpu_count() or 1))
    # A file's tests stay on one worker, where they share fixtures; conftest.py puts the longest files first.
    spread = ["-n", str(workers), "--dist", "loadfile", "--no-loadscope-reorder"]
    if "--fast" in sys.argv:
        return subprocess.run([*pytest, *spread], check=False).returncode
    with tempfile.TemporaryFile() as output:
        slurm = subprocess.Popen([*pytest, SLURM], stdout=output, stderr=subprocess.STDOUT)
        try:
            failed = subprocess.run([*pytest, *spread, f"--ignore={SLURM}"], check=False).returncode
            failed = slurm.wait() or failed
        finally:
            slurm.terminate()
            slurm.wait()
        output.seek(0)
        print(f"== {SLURM}\n{output.read().decode(errors='replace')}", flush=True)
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
