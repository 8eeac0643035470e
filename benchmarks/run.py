"""Runs the benchmarks one after the other, and writes the table of docs/benchmarks from their results.

    python benchmarks/run.py [NAME ...]        (make bench)
    python benchmarks/run.py --table           only writes the table again

In: the scripts named in SCRIPTS. Out: docs/benchmarks/NAME.json and docs/benchmarks/README.md. If a
script fails or misses its bar, the exit status is 1, and the others still run. gpu.py needs a GPU and is
started by hand. profile_loop.py compares nothing and prints a table of its own.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)

from shards.common.files import write_atomically

RESULTS = ROOT / "docs/benchmarks"
# Script -> arguments, and the seconds after which it is stopped.
SCRIPTS: dict[str, tuple[list[str], int]] = {
    "checkpoint": ([], 600),
    "image_processor": ([], 300),
    "loss_head": ([], 300),
    "packing": ([], 300),
    "shards": ([], 1800),
    "plan": ([], 900),
    "loader": ([], 900),
    "evaluate": ([], 600),
    "tracking": ([], 600),
    "step_overhead": ([], 600),
    "start_up": ([], 600),
    "sequence": ([], 900),
    "long_context": ([], 2400),
    "chaos": (["--kills", "30"], 5400),
}


def run(name: str) -> bool:
    """Runs one script. Returns whether it ended with 0."""
    arguments, limit = SCRIPTS[name]
    target = RESULTS / f"{name}.json"
    command = [sys.executable, f"benchmarks/{name}.py", *arguments, "--json", str(target)]
    print(f"== {name}", flush=True)
    began = time.monotonic()
    try:
        code = subprocess.run(command, cwd=ROOT, timeout=limit, check=False).returncode
    except subprocess.TimeoutExpired:
        print(f"{name}: stopped after {limit} s", file=sys.stderr)
        return False
    print(f"== {name}: exit status {code}, {time.monotonic() - began:.0f} s", flush=True)
    return code == 0


def table() -> str:
    """docs/benchmarks/README.md from the JSON files there."""
    lines = [
        "# Measured",
        "",
        "Made by `make bench`. Each line compares two ways of doing one thing in one run on one machine, so",
        "only the ratio is shown; the JSON files beside this page have the times. A bar is what the project",
        "demands of itself.",
        "",
        "| what | against | ratio | bar | |",
        "|---|---|---|---|---|",
    ]
    sources = []
    for file in sorted(RESULTS.glob("*.json")):
        content = json.loads(file.read_text())
        if "comparisons" not in content:
            continue
        for each in content["comparisons"]:
            verdict = {True: "met", False: "**missed**", None: ""}[each["met"]]
            cells = (each["what"], each["peer"], f"{each['ratio']:.3g}", each["bar"], verdict)
            lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
        where = content["machine"]
        sources.append(
            f"- [{file.name}]({file.name}): `{content['command']}`, {content['date']}, {where['processor']}, "
            f"{where['memory']}, load {where['load']}, torch {where['torch']}"
        )
    return "\n".join([*lines, "", "Commands, dates and machines:", "", *sources, ""])


def main() -> int:
    """Runs the named benchmarks, or all. Returns the exit status."""
    parser = argparse.ArgumentParser(description="all benchmarks, one table")
    parser.add_argument(
        "names", nargs="*", metavar="NAME", help=f"of {', '.join(SCRIPTS)}; all if none is given"
    )
    parser.add_argument("--table", action="store_true", help="only write the table")
    options = parser.parse_args()
    if unknown := [name for name in options.names if name not in SCRIPTS]:
        parser.error(f"no benchmark {unknown[0]!r}; there are {', '.join(SCRIPTS)}")
    RESULTS.mkdir(parents=True, exist_ok=True)
    failed = [] if options.table else [name for name in options.names or SCRIPTS if not run(name)]
    write_atomically(RESULTS / "README.md", table().encode())
    if failed:
        print(f"failed or below a bar: {', '.join(failed)}", file=sys.stderr)
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
