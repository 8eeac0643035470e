"""The command line, `phi3v`: all commands under one name. Each command imports the package that does its work
only when it runs, so that `phi3v --help` is fast.

Exit codes: 0 done, 2 bad config or usage (one line on standard error), 3 stopped by a signal after a
checkpoint, 4 training diverged or data unusable, 5 a node or a check of `phi3v doctor` that is not healthy,
others a crash.
"""

from __future__ import annotations

import errno
import sys

import typer

from launch.cli.debug import app as debug_app
from launch.cli.evaluate import ask, evaluate
from launch.cli.launch import app as launch_app
from launch.cli.launch import doctor
from launch.cli.results import export, report
from launch.cli.shards import app as shards_app
from launch.cli.train import demo, estimate, plan, train
from phi3v_dist.exits import USAGE
from shards.common.errors import BadInputError

app = typer.Typer(
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    help="Full fine-tuning of Phi-3-Vision-128K on clusters: shards, ZeRO-3 training, evaluation, export.",
)
app.add_typer(shards_app, name="shards")
app.add_typer(launch_app, name="launch")
app.add_typer(debug_app, name="debug")
for command in (doctor, train, plan, estimate, evaluate, export, report, ask, demo):
    app.command()(command)

_FAULTS_OF_STORAGE = (
    errno.EACCES, errno.EPERM, errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.EROFS,
    errno.ENOSPC, errno.EDQUOT,
)  # fmt: skip


def main() -> None:
    """Runs the command line. Bad input ends with one line and exit code 2, and so does a file or directory
    that cannot be read or written.
    """
    try:
        app()
    except BadInputError as error:
        print(f"phi3v: {error}", file=sys.stderr)
        raise SystemExit(USAGE) from None
    except OSError as error:
        if error.errno not in _FAULTS_OF_STORAGE or error.filename is None:
            raise
        print(f"phi3v: {error.filename}: {error.strerror}; choose another place", file=sys.stderr)
        raise SystemExit(USAGE) from None


if __name__ == "__main__":
    main()
