"""One finding of `phi3v doctor`: what was looked at, what was found, and how to fix it."""

from __future__ import annotations

import subprocess
from dataclasses import dataclass
from typing import Literal

Status = Literal["green", "yellow", "red"]
GB = 1e9


@dataclass(frozen=True)
class Finding:
    """One line of the report. status: green works, yellow works but deserves a look, red will fail. fix: what
    to do about it, empty where nothing is wrong.
    """

    status: Status
    subject: str
    found: str
    fix: str = ""


def line(finding: Finding, colour: bool) -> str:
    """A finding as text."""
    codes = {"green": "32", "yellow": "33", "red": "31"}
    status = f"{finding.status:6}"
    shown = f"\033[{codes[finding.status]}m{status}\033[0m" if colour else status
    fix = f"; {finding.fix}" if finding.fix else ""
    return f"{shown} {finding.subject}: {finding.found}{fix}"


@dataclass(frozen=True)
class Output:
    """How a command ended. fault: why it failed in one line, None if it succeeded. text: its standard
    output.
    """

    fault: str | None
    text: str


def output_of(*command: str) -> Output:
    """Runs a command for at most 30 seconds."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    except subprocess.TimeoutExpired:
        return Output(f"{command[0]} did not answer within 30 s", "")
    reason = " ".join((done.stderr or done.stdout).split())[-160:] or f"exit code {done.returncode}"
    return Output(reason if done.returncode else None, done.stdout)
