"""The whole suite, the Slurm tests beside the others: they wait more than they work, and share one cluster.

    python tests/together.py [PYTEST ARGUMENTS]

Exit status 1 if either part failed. `make test` runs this.
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
    with tempfile.TemporaryFile() as said:
        slurm = subprocess.Popen([*pytest, SLURM], stdout=said, stderr=subprocess.STDOUT)
        try:
            # A file's tests stay on one worker, where they share fixtures.
            others = [*pytest, "-n", str(workers), "--dist", "loadfile", f"--ignore={SLURM}"]
            failed = subprocess.run(others, check=False).returncode
            failed = slurm.wait() or failed
        finally:
            slurm.terminate()
            slurm.wait()
        said.seek(0)
        print(f"== {SLURM}\n{said.read().decode(errors='replace')}", flush=True)
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
