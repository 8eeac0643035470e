"""The command line with tests/k8s/standin_rank.py in the place of a training rank."""

import sys
from pathlib import Path

import launch.cluster
from launch.cli.main import main


def standin_command(config: str, overrides: list[str]) -> list[str]:
    run_dir = launch.cluster.load_config(config, overrides).run_dir
    return [str(Path(__file__).with_name("standin_rank.py")), str(run_dir)]


launch.cluster.rank_command = standin_command
sys.argv[0] = "phi3v"
main()
