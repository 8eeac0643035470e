"""The command line with a rank that only counts steps, so that what Slurm does is seen without minutes of
imports.

Called as `phi3v`; every override `standin.KEY=VALUE` is for the stand-in (see standin_rank.py), the others
are real.
"""

import sys
from pathlib import Path

import launch.cluster
from launch.cli.main import main

STANDIN = Path(__file__).with_name("standin_rank.py")


def standin_command(config: str, overrides: list[str]) -> list[str]:
    run_dir = launch.cluster.load_config(config, overrides).run_dir
    return [str(STANDIN), str(run_dir)]


launch.cluster.rank_command = standin_command
sys.argv[0] = "phi3v"
main()
