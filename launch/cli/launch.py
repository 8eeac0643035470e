"""The subcommands of `phi3v launch`, thin: each imports its launcher and returns its exit code.

Mounted by launch.cli.main as `phi3v launch`; BadInputError escapes to it, which prints one line and exits 2.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Literal

import typer

from launch.cli.arguments import Config, Overrides

app = typer.Typer(no_args_is_help=True, help="Start a run: on this machine, under Slurm or on Kubernetes.")

Partition = Annotated[str | None, typer.Option(help="Slurm partition.")]
Account = Annotated[str | None, typer.Option(help="Slurm account.")]
Qos = Annotated[str | None, typer.Option(help="Slurm QOS.")]
Sbatch = Annotated[
    list[str] | None, typer.Option(help="Other options of sbatch, such as constraint=h100; repeatable.")
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
    """Train on this machine.

    Example: phi3v launch local configs/tiny.yaml train.steps=20 --processes 2
    """
    from launch.local import launch_local

    raise typer.Exit(launch_local(config, overrides or [], gpus, debug))


@app.command()
def node(config: Config, overrides: Overrides = None) -> None:
    """Run one node's part of a Slurm job or a PyTorchJob (slurm/train.sh and k8s/ call this).

    Example: phi3v launch node configs/burberry.yaml
    """
    from launch.cluster import run_cluster_node

    raise typer.Exit(run_cluster_node(config, overrides or [], os.environ))


@app.command("check-node")
def check_node(config: Config, overrides: Overrides = None) -> None:
    """Look whether this node is fit for the run (slurm/train.sh calls this on every node).

    Example: phi3v launch check-node configs/burberry.yaml
    """
    from launch import health

    raise typer.Exit(health.check_node(config, overrides or [], os.environ))


@app.command()
def slurm(
    config: Config,
    overrides: Overrides = None,
    nodes: Annotated[int, typer.Option(help="Machines.")] = 1,
    gpus_per_node: Annotated[int, typer.Option(help="GPUs, and so ranks, on each.")] = 8,
    cpu_processes: Annotated[int, typer.Option(help="Ranks on each without GPUs.")] = 0,
    minutes: Annotated[int, typer.Option(help="Time limit; the run requeues itself before it.")] = 24 * 60,
    cpus_per_gpu: Annotated[int, typer.Option(min=1, help="Cores for each GPU.")] = 8,
    partition: Partition = None,
    account: Account = None,
    qos: Qos = None,
    sbatch: Sbatch = None,
    sweep: Annotated[
        list[str] | None, typer.Option(help="key=value,value: a job array, one run each; repeatable.")
    ] = None,
    wait: Annotated[bool, typer.Option("--wait", help="Follow the log; Ctrl-C cancels the job.")] = False,
    show: Annotated[bool, typer.Option("--print", help="Print the batch script, submit nothing.")] = False,
) -> None:
    """Submit to Slurm with submitit, from a snapshot of the code.

    Example: phi3v launch slurm configs/burberry.yaml --nodes 2 --gpus-per-node 8 --print
    """
    from launch.slurm import SlurmOptions, launch_slurm

    options = SlurmOptions(partition=partition, account=account, qos=qos, more=_more(sbatch))
    code = launch_slurm(
        config,
        overrides or [],
        nodes,
        gpus_per_node,
        cpu_processes,
        minutes,
        cpus_per_gpu,
        options,
        sweep or [],
        wait,
        show,
    )
    raise typer.Exit(code)


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def shards(
    context: typer.Context,
    source: Annotated[str, typer.Argument(help="As for `phi3v shards build`.")],
    out: Annotated[str, typer.Option(help="Directory of the dataset that all nodes see, or a URL.")],
    tasks: Annotated[int, typer.Option(help="Jobs in the array; each builds its part.")] = 8,
    cpus: Annotated[int, typer.Option(help="Cores of a task.")] = 2,
    minutes: Annotated[int, typer.Option(help="Time limit of a task; it goes on in a new job.")] = 24 * 60,
    logs: Annotated[str, typer.Option(help="Folder for logs and submitit's files.")] = "logs/shards",
    partition: Partition = None,
    account: Account = None,
    qos: Qos = None,
    sbatch: Sbatch = None,
    show: Annotated[bool, typer.Option("--print", help="Print the batch script, submit nothing.")] = False,
) -> None:
    """Build shards as a Slurm job array with submitit; other options go to `phi3v shards build`.

    Example: phi3v launch shards products.csv --out /shared/products --tasks 16 --group-by product_code
    """
    from launch.shards_array import launch_shards
    from launch.slurm import SlurmOptions

    options = SlurmOptions(partition=partition, account=account, qos=qos, more=_more(sbatch))
    raise typer.Exit(launch_shards(source, out, context.args, tasks, cpus, minutes, logs, options, show))


def _more(sbatch: list[str] | None) -> dict[str, str]:
    """option=value, ... as a mapping."""
    from shards.common.errors import BadInputError

    more = {}
    for entry in sbatch or []:
        key, equals, value = entry.removeprefix("--").partition("=")
        if not equals:
            raise BadInputError(f"--sbatch {entry!r} is not of the form option=value")
        more[key] = value
    return more


@app.command()
def k8s(
    config: Config,
    overrides: Overrides = None,
    nodes: Annotated[int, typer.Option(help="Machines: one Master and the rest Workers.")] = 2,
    gpus_per_node: Annotated[int, typer.Option(help="GPUs, and so ranks, on each.")] = 8,
    image: Annotated[str, typer.Option(help="Container image built from the Dockerfile.")] = "",
    cpus_per_gpu: Annotated[int, typer.Option(min=1, help="Cores for each GPU.")] = 8,
    memory_gb: Annotated[
        int | None, typer.Option(min=1, help="GiB of host memory of a node (default: 100, and 100 a GPU).")
    ] = None,
    namespace: Annotated[str, typer.Option(help="Namespace of all objects.")] = "phi3v",
    data_size: Annotated[str, typer.Option(help="Size of the claim for shards and weights.")] = "1Ti",
    runs_size: Annotated[str, typer.Option(help="Size of the claim for run directories.")] = "1Ti",
    operator: Annotated[
        Literal["v1", "v2"],
        typer.Option(help="v1: training operator, PyTorchJob. v2: Kubeflow Trainer, TrainJob."),
    ] = "v1",
    out: Annotated[Path | None, typer.Option(help="Write the files into this directory.")] = None,
    apply: Annotated[bool, typer.Option("--apply", help="Hand them to kubectl.")] = False,
    show: Annotated[bool, typer.Option("--print", help="Print them; the default.")] = False,
) -> None:
    """Print or apply the Kubernetes objects of a run.

    Example: phi3v launch k8s configs/burberry.yaml --nodes 2 --out manifests
    """
    from launch.k8s import IMAGE, KubernetesOptions, launch_k8s

    options = KubernetesOptions(namespace, data_size, runs_size, operator)
    apply = apply and not show
    code = launch_k8s(
        config,
        overrides or [],
        nodes,
        gpus_per_node,
        image or IMAGE,
        cpus_per_gpu,
        memory_gb,
        options,
        apply,
        out,
    )
    raise typer.Exit(code)


def doctor(
    config: Annotated[
        str | None, typer.Argument(help="Recipe whose data, weights and disk to look at.")
    ] = None,
    overrides: Overrides = None,
    slurm: Annotated[bool, typer.Option("--slurm", help="Also the Slurm cluster.")] = False,
    k8s: Annotated[bool, typer.Option("--k8s", help="Also the Kubernetes cluster.")] = False,
    bandwidth: Annotated[bool, typer.Option("--bandwidth", help="Also time an all-reduce here.")] = False,
) -> None:
    """Find what would go wrong before it costs GPU hours; exit code 5 if anything would fail.

    Example: phi3v doctor configs/burberry.yaml --slurm
    """
    from launch.doctor import run_doctor

    raise typer.Exit(run_doctor(config, overrides or [], slurm, k8s, bandwidth))
