"""What tests/conftest.py and tests/guard hold: each case is a small test file that pytest runs with them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.guard.sitecustomize import marker_needed

ROOT = Path(__file__).parents[1]
PLUGIN = ("-c", "pyproject.toml", "-p", "tests.conftest", "-p", "no:cacheprovider", "-o", "addopts=")
STARTS = """
import subprocess, sys, pytest
def start(*command):
    try:
        return subprocess.run(command, capture_output=True, text=True).stdout
    except RuntimeError:
        return None  # a test may not notice: the note in the file remains
"""


def run(tmp_path: Path, source: str, *options: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """A test file with `source` through pytest and our conftest."""
    file = tmp_path / "test_it.py"
    file.write_text(STARTS + source)
    command = [sys.executable, "-m", "pytest", "-n", "0", "-q", *PLUGIN, *options, str(file)]
    inner = {name: value for name, value in os.environ.items() if name != "PHI3V_REQUIRE_SYSTEM"}
    return subprocess.run(
        command, cwd=ROOT, env=inner | environment, capture_output=True, text=True, timeout=120
    )


@pytest.mark.parametrize(
    ("command", "marker"),
    [
        ("torchrun --nproc-per-node 2 x.py", "ranks"),
        ("/venv/bin/python3.11 /venv/bin/torchrun x.py", "ranks"),
        ("/venv/bin/python -u -m torch.distributed.run --standalone x.py", "ranks"),
        ("python -m launch.torchrun.agent --standalone", "ranks"),
        ("/usr/bin/sbatch slurm/train.sh", "system"),
        ("/usr/sbin/slurmctld -D", "system"),
        ("/usr/bin/chromium --headless", "system"),
        ("python -m launch.cli.main plan configs/tiny.yaml", None),
        ("python train.py --like torchrun", None),
        ("git ls-files", None),
        ("", None),
    ],
)
def test_which_commands_need_a_marker(
    command: str, marker: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tests.guard.sitecustomize._stand_in", lambda _: False)
    assert marker_needed(command.split()) == marker


def test_a_stand_in_is_no_slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "sbatch").write_text("#!/bin/sh\n")
    (tmp_path / "sbatch").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert marker_needed(["sbatch", "x.sh"]) is None
    monkeypatch.setenv("PATH", "")
    assert marker_needed(["sbatch", "x.sh"]) is None, "not installed: it cannot start"


def test_an_unmarked_test_cannot_start_ranks_nor_can_its_children(tmp_path: Path) -> None:
    command = "(sys.executable, '-m', 'torch.distributed.run', '--help')"
    source = f"""
def test_unmarked(): start(*{command})
@pytest.mark.ranks
def test_marked(): assert "nproc" in start(*{command})
def test_child():
    start(sys.executable, "-c", "import subprocess, sys; subprocess.call({command})")
@pytest.fixture(scope="module")
def ranks(): return start(*{command})
def test_through_a_fixture(ranks): pass
def test_other(): assert start(sys.executable, "-c", "print(1)") == "1\\n"
"""
    done = run(tmp_path, source)
    assert "2 failed, 2 passed, 1 error" in done.stdout, done.stdout
    for name in ("test_unmarked", "test_child", "test_through_a_fixture"):
        assert f"{name}: a test that starts" in done.stdout, done.stdout
    assert "needs the marker `ranks`" in done.stdout


def test_only_known_skips_of_system_tests_pass(tmp_path: Path) -> None:
    source = """
def test_unknown(): pytest.skip("no such file here")
def test_unmarked(): pytest.skip("system package: no slurmd")
@pytest.mark.skip(reason="later")
def test_by_a_mark(): pass
@pytest.fixture
def absent(): pytest.skip("system package: no slurmd")
@pytest.mark.system
def test_known(absent): pass
@pytest.mark.system
def test_asked_for(): pytest.skip("on request: takes an hour")
"""
    done = run(tmp_path, source, "-rs")
    assert "2 skipped" in done.stdout and "a reason that conftest.py does not know" in done.stdout
    assert sum(done.stdout.count(f"{name}: skipped") for name in ("unknown", "unmarked", "by_a_mark")) >= 3
    done = run(tmp_path, source, "-k", "known or asked", PHI3V_REQUIRE_SYSTEM="1")
    assert "test_known: skipped, but PHI3V_REQUIRE_SYSTEM=1: system package: no slurmd" in done.stdout
    assert "1 skipped" in done.stdout and done.returncode == 1


def test_a_file_that_skips_as_a_whole_fails(tmp_path: Path) -> None:
    done = run(tmp_path, 'pytest.importorskip("no_such_package")\n')
    assert done.returncode != 0 and "skips as a whole" in done.stdout


@pytest.mark.parametrize("workers", ["0", "2"])
def test_fast_says_how_many_of_how_many_it_ran(tmp_path: Path, workers: str) -> None:
    source = """
def test_plain(): pass
@pytest.mark.ranks
def test_ranks(): assert False
@pytest.mark.system
def test_system(): assert False
"""
    done = run(tmp_path, source, "--fast", "-n", workers)
    assert done.returncode == 0 and "test-fast: 1 of 3 tests" in done.stdout, done.stdout
