"""The subcommands of `phi3v launch`, thin: each imports its launcher and returns its exit code.

Mounted by launch.cli as `phi3v launch`; BadInputError escapes to it, which prints one line and exits 2.
"""

from __future__ import annotations

import os
from typing import Annotated

import typer

app = typer.Typer(no_args_is_help=True, help="Start a run: on this machine, under Slurm or on Kubernetes.")

Config = Annotated[str, typer.Argument(help="Recipe, such as configs/tiny.yaml.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[key=value]...", help="Settings on top of the recipe.")
]


@app.command()
def local(
    config: Config,
    overrides: Overrides = None,
    gpus: Annotated[
        int | None, typer.Option("--gpus", "--processes", help="Ranks (default: every GPU, else 2 on CPU).")
    ] = None,
    debug: Annotated[bool, typer.Option("--debug", help="One process in this terminal, for pdb.")] = False,
) -> None:
    """Train on this machine."""
    from launch.local import launch_local

    raise typer.Exit(launch_local(config, overrides or [], gpus, debug))


@app.command()
def node(config: Config, overrides: Overrides = None) -> None:
    """Run one node's part of a Slurm job or a PyTorchJob (slurm/train.sh and k8s/ call this)."""
    from launch.cluster import run_cluster_node

    raise typer.Exit(run_cluster_node(config, overrides or [], os.environ))


@app.command("check-node")
def check_node(config: Config, overrides: Overrides = None) -> None:
    """Look whether this node is fit for the run (slurm/train.sh calls this on every node)."""
    from launch import health

    raise typer.Exit(health.check_node(config, overrides or [], os.environ))
