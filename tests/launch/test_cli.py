"""The command line as a user meets it: help, refusals in one line, exit codes, nothing written by mistake."""

import subprocess
import sys
from pathlib import Path

import pytest

COMMANDS = ["train", "plan", "evaluate", "export", "ask", "demo", "shards", "launch"]


def phi3v(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "launch.cli.main", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, timeout=60)


def test_help_names_every_command(tmp_path: Path) -> None:
    shown = phi3v("--help", cwd=tmp_path)
    assert shown.returncode == 0
    assert all(command in shown.stdout for command in COMMANDS)
    assert "Example" in phi3v("evaluate", "--help", cwd=tmp_path).stdout


GOOD = "name: x\nmodel: {config: {vocab_size: 300}}\ndata: {path: nowhere}\ntrain: {steps: 5}\n"


@pytest.mark.parametrize("command", [("train",), ("launch", "local"), ("plan",)])
@pytest.mark.parametrize(
    ("text", "overrides", "words"),
    [
        (GOOD.replace("steps", "setps"), [], "train.steps"),
        (GOOD, ["train.lr=fast"], "train.lr"),
        (GOOD, ["train.lr"], "key=value"),
        (None, [], "no such config file"),
        (GOOD, [], "nowhere: no such dataset directory"),
    ],
)
def test_a_bad_config_ends_with_one_line_exit_2_and_nothing_written(
    tmp_path: Path, command: tuple[str, ...], text: str | None, overrides: list[str], words: str
) -> None:
    if text is not None:
        (tmp_path / "a config.yaml").write_text(text)
    before = sorted(tmp_path.rglob("*"))
    done = phi3v(*command, "a config.yaml", *overrides, cwd=tmp_path)
    assert done.returncode == 2
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("phi3v: ") and words in lines[0], done.stderr
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["evaluate", "nothing", "nowhere"], "nothing: neither a run"),
        (["export", "nothing", "out"], "nothing: neither a run"),
        (["ask", "nothing", "no.jpg"], "no.jpg: no such file"),
        (["shards", "build", "no.csv", "--out", "out"], "no.csv"),
    ],
)
def test_what_is_not_there_is_named(tmp_path: Path, arguments: list[str], words: str) -> None:
    done = phi3v(*arguments, cwd=tmp_path)
    assert done.returncode == 2
    assert len(done.stderr.strip().splitlines()) == 1 and words in done.stderr
    assert not list(tmp_path.rglob("*"))
