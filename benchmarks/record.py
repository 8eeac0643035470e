"""The result of a benchmark: lines on the terminal, JSON for docs/benchmarks.

In: comparisons. Out: printed lines, the JSON file, the exit status.
"""

from __future__ import annotations

import json
import os
import platform
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

import psutil


@dataclass(frozen=True)
class Comparison:
    """One piece of work, done in two ways in one run.

    what: the work. peer: the other way. ours, theirs: both in `unit`, both medians or both best values.
    ratio: how many times better ours is, or what `bar` says. bar: the requirement in words; "" for none. met:
    whether it is met; None without a bar.
    """

    what: str
    peer: str
    ours: float
    theirs: float
    unit: str
    ratio: float
    bar: str = ""
    met: bool | None = None


def report(name: str, comparisons: Sequence[Comparison], json_path: str | None) -> int:
    """Prints the comparisons and writes them to `json_path` if given; 1 if a bar is missed, else 0."""
    for each in comparisons:
        verdict = "" if each.met is None else f"  bar: {each.bar}  {'met' if each.met else 'MISSED'}"
        print(
            f"{each.what}: {each.ours:.4g} {each.unit}; {each.peer}: {each.theirs:.4g} {each.unit}; "
            f"ratio {each.ratio:.3g}{verdict}"
        )
    if json_path:
        content = {
            "name": name,
            "command": " ".join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *_shown()]),
            "date": time.strftime("%Y-%m-%d"),
            "machine": machine(),
            "comparisons": [asdict(each) for each in comparisons],
        }
        path = Path(json_path)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content, indent=1) + "\n")
    return int(any(each.met is False for each in comparisons))


def machine() -> dict[str, str]:
    """The machine and the versions that the results were measured with."""
    memory = psutil.virtual_memory().total / 2**30
    names = {"python": platform.python_version(), "torch": version("torch")}
    return {
        "processor": f"{os.cpu_count()} cores, {platform.machine()}",
        "memory": f"{memory:.0f} GiB",
        "load": f"{os.getloadavg()[0]:.1f}",
        **names,
    }


def _shown() -> list[str]:
    """The arguments of the command, without the path of the JSON file."""
    words = sys.argv[1:]
    return [
        word
        for place, word in enumerate(words)
        if word != "--json" and words[place - 1 : place] != ["--json"]
    ]
