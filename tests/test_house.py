"""The house: imports go launch -> phi3v_dist -> shards, and what must start fast pulls in no torch."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FLOORS = {"shards": {"phi3v_dist", "launch"}, "phi3v_dist": {"launch"}, "launch": set()}


def imported(file: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
    return names


@pytest.mark.parametrize("package", FLOORS)
def test_nothing_imports_upward(package: str) -> None:
    files = sorted((ROOT / package).rglob("*.py"))
    assert files
    upward = [
        f"{file.relative_to(ROOT)}: {name}"
        for file in files
        for name in imported(file)
        if name.split(".")[0] in FLOORS[package]
    ]
    assert not upward


def test_training_takes_only_the_format_from_shards() -> None:
    allowed = {
        "shards.format",
        "shards.atomic",
        "shards.shipped",
        "shards.grey",
    }  # files that are whole or absent, where configs lie, what deep grey looks like: no knowledge of shards
    other = [
        f"{file.relative_to(ROOT)}: {name}"
        for file in (ROOT / "phi3v_dist").rglob("*.py")
        for name in imported(file)
        if name.split(".")[0] == "shards" and name not in allowed
    ]
    assert not other


@pytest.mark.parametrize(
    "module", ["shards", "launch", "launch.cli", "launch.local", "launch.demo", "phi3v_dist.config"]
)
def test_importing_it_pulls_in_no_torch(module: str) -> None:
    code = f"import sys, {module}; assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_the_map_names_every_module() -> None:
    page = (ROOT / "CONTRIBUTING.md").read_text()
    words = set(re.findall(r"[a-z0-9_]+", page[page.index("```") : page.rindex("```")]))
    modules = {
        file.stem for package in FLOORS for file in (ROOT / package).rglob("*.py") if file.stem != "__init__"
    }
    assert not modules - words, "CONTRIBUTING.md: not on the map"
