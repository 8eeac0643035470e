"""The house: imports go one way, from a list of floors; there are no circles; what must start fast loads no
torch; DeepSpeed is known to engine/ alone.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# From the ground up. A module imports from its own floor and from those below it.
FLOORS = (
    "shards.common",
    "shards.format",
    "shards",
    "phi3v_dist.exits",
    "phi3v_dist.config",
    "phi3v_dist.processor",
    "phi3v_dist.parallel",
    "phi3v_dist.engine",
    "phi3v_dist.model",
    "phi3v_dist.budget",
    "phi3v_dist.run",
    "phi3v_dist.data",
    "phi3v_dist.pretrained",
    "phi3v_dist.checkpoint",
    "phi3v_dist.evaluation",
    "phi3v_dist.tracking",
    "phi3v_dist.replay",
    "phi3v_dist.export",
    "phi3v_dist.train",
    "launch.torchrun",
    "launch",
    "launch.cli",
    "launch.torchrun.rank",  # started by torchrun: runs the command line
)
PACKAGES = ("shards", "phi3v_dist", "launch")


def modules() -> dict[str, Path]:
    """Dotted name -> file of every module of the three packages."""
    found = {}
    for package in PACKAGES:
        for file in sorted((ROOT / package).rglob("*.py")):
            parts = file.relative_to(ROOT).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return found


def imports_of(file: Path, known: set[str]) -> set[str]:
    """The modules of the house that `file` imports, also inside functions."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                names.add(full if full in known else node.module)
    return names & known


def floor(module: str) -> int:
    """The number of the longest entry of FLOORS that is `module` or holds it."""
    fitting = [each for each in FLOORS if module == each or module.startswith(f"{each}.")]
    return FLOORS.index(max(fitting, key=len))


FILES = modules()
GRAPH = {name: imports_of(file, set(FILES)) - {"phi3v_dist"} for name, file in FILES.items()}
"""Module -> what it imports. `phi3v_dist` itself holds the version alone, and anything may ask for that."""


def test_every_module_stands_on_a_floor_of_the_list() -> None:
    roots = {"shards", "phi3v_dist", "launch"}
    homeless = [name for name in FILES if not any(name.startswith(each) for each in FLOORS)]
    assert len(FILES) > 100 and not set(homeless) - roots
    assert all(any(name == each or name.startswith(f"{each}.") for name in FILES) for each in FLOORS)


@pytest.mark.parametrize("package", PACKAGES)
def test_no_arrow_goes_up(package: str) -> None:
    upward = [
        f"{name} -> {target}"
        for name, targets in GRAPH.items()
        if name.split(".")[0] == package and name != "phi3v_dist"
        for target in sorted(targets)
        if floor(target) > floor(name)
    ]
    assert not upward


def test_there_is_no_circle() -> None:
    try:
        tuple(TopologicalSorter(GRAPH).static_order())
    except CycleError as error:
        pytest.fail(f"a circle of imports: {' -> '.join(error.args[1])}")


def test_training_takes_only_the_ground_floor_and_the_format_from_shards() -> None:
    other = [
        f"{name} -> {target}"
        for name, targets in GRAPH.items()
        if name.startswith("phi3v_dist")
        for target in sorted(targets)
        if target.startswith("shards") and not target.startswith(("shards.common", "shards.format"))
    ]
    assert not other


@pytest.mark.parametrize(
    "module", ["shards", "launch", "launch.cli.main", "launch.local", "launch.demo", "phi3v_dist.config"]
)
def test_importing_it_pulls_in_no_torch(module: str) -> None:
    code = f"import sys, {module}; assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def names_deepspeed(file: Path) -> list[str]:
    """Every import of DeepSpeed and every attribute or text by which its internals are reached."""
    found = []
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.append(node.module)
        elif isinstance(node, ast.Attribute):
            found.append(node.attr)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.isidentifier():
            found.append(node.value)  # getattr(parameter, "ds_shape")
    return [each for each in found if each.startswith(("deepspeed", "ds_", "fp16_"))]


def test_only_the_engine_knows_deepspeed() -> None:
    found = {
        name: names
        for name, file in FILES.items()
        if not name.startswith("phi3v_dist.engine") and (names := names_deepspeed(file))
    }
    assert not found
    assert names_deepspeed(FILES["phi3v_dist.engine.zero"])
