"""`phi3v launch ...` and `phi3v doctor`: each command imports its launcher and returns its exit code."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from launch.cli.arguments import Config, Overrides

app = typer.Typer(no_args_is_help=True, help="Start a run: on this machine, under Slurm or on Kubernetes.")

Partition = Annotated[str | None, typer.Option(help="Slurm partition.")]
Account = Annotated[str | None, typer.Option(help="Slurm account.")]
Qos = Annotated[str | None, typer.Option(help="Slurm QOS.")]
Sbatch = Annotated[
    list[str] | None, typer.Option(help="Any other option of sbatch, such as constraint=h100; repeatable.")
]


@app.command()
def local(
    config: Config,
    overrides: Overrides = None,
    gpus: Annotated[
        int | None,
        typer.Option("--gpus", "--processes", help="Number of ranks (default: one per GPU, else 2 on CPU)."),
    ] = None,
    debug: Annotated[
        bool, typer.Option("--debug", help="Run one process in this terminal, for pdb.")
    ] = False,
) -> None:
    """Train on this machine.

    Example: phi3v launch local configs/tiny.yaml train.steps=20 --processes 2
    """
    from launch.local import launch_local

    raise typer.Exit(launch_local(config, overrides or [], gpus, debug=debug))


@app.command()
def node(config: Config, overrides: Overrides = None) -> None:
    """Run one node's part of a Slurm job or a PyTorchJob (slurm/train.sh and k8s/ call this).

    Example: phi3v launch node configs/burberry.yaml
    """
    from launch.cluster import run_cluster_node

    raise typer.Exit(run_cluster_node(config, overrides or [], os.environ))


@app.command("check-node")
def check_node(config: Config, overrides: Overrides = None) -> None:
    """Check that this node can train (slurm/train.sh calls this on every node).

    Example: phi3v launch check-node configs/burberry.yaml
    """
    from launch import health

    raise typer.Exit(health.check_node(config, overrides or [], os.environ))


@app.command()
def slurm(
    config: Config,
    overrides: Overrides = None,
    nodes: Annotated[int, typer.Option(help="Number of machines.")] = 1,
    gpus_per_node: Annotated[int, typer.Option(help="GPUs of each machine; one rank per GPU.")] = 8,
    cpu_processes: Annotated[int, typer.Option(help="Ranks on each machine for a run without GPUs.")] = 0,
    minutes: Annotated[
        int, typer.Option(help="Time limit in minutes; before it the run requeues itself.")
    ] = 24 * 60,
    cpus_per_gpu: Annotated[int, typer.Option(min=1, help="CPU cores for each GPU.")] = 8,
    partition: Partition = None,
    account: Account = None,
    qos: Qos = None,
    sbatch: Sbatch = None,
    sweep: Annotated[
        list[str] | None,
        typer.Option(help="key=value,value submits a job array with one run per value; repeatable."),
    ] = None,
    wait: Annotated[bool, typer.Option("--wait", help="Follow the log; Ctrl-C cancels the job.")] = False,
    show: Annotated[bool, typer.Option("--print", help="Print the batch script, submit nothing.")] = False,
) -> None:
    """Submit a run to Slurm with submitit, from a snapshot of the code.

    Example: phi3v launch slurm configs/burberry.yaml --nodes 2 --gpus-per-node 8 --print
    """
    from launch.description import JobSize
    from launch.slurm import SlurmOptions, launch_slurm

    options = SlurmOptions(partition=partition, account=account, qos=qos, more=_more(sbatch))
    size = JobSize(
        nodes=nodes,
        gpus_per_node=gpus_per_node,
        cpu_processes=cpu_processes,
        cpus_per_gpu=cpus_per_gpu,
        minutes=minutes,
    )
    code = launch_slurm(
        config, overrides or [], size, options=options, sweep=sweep or [], wait=wait, show=show
    )
    raise typer.Exit(code)


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def shards(
    context: typer.Context,
    source: Annotated[str, typer.Argument(help="As for `phi3v shards build`.")],
    out: Annotated[str, typer.Option(help="Directory of the dataset that all nodes see, or a URL.")],
    tasks: Annotated[int, typer.Option(help="Jobs in the array; each builds its part of the dataset.")] = 8,
    cpus: Annotated[int, typer.Option(help="CPU cores of a task.")] = 2,
    minutes: Annotated[
        int, typer.Option(help="Time limit of a task in minutes; the task then resumes in a new job.")
    ] = 24 * 60,
    logs: Annotated[str, typer.Option(help="Folder for logs and submitit's files.")] = "logs/shards",
    partition: Partition = None,
    account: Account = None,
    qos: Qos = None,
    sbatch: Sbatch = None,
    show: Annotated[bool, typer.Option("--print", help="Print the batch script, submit nothing.")] = False,
) -> None:
    """Build shards as a Slurm job array with submitit; other options are passed to `phi3v shards build`.

    Example: phi3v launch shards products.csv --out /shared/products --tasks 16 --group-by product_code
    """
    from launch.shards_array import ArraySize, launch_shards
    from launch.slurm import SlurmOptions

    options = SlurmOptions(partition=partition, account=account, qos=qos, more=_more(sbatch))
    _check_build([source, "--out", out, *context.args])
    size = ArraySize(tasks, cpus, minutes)
    code = launch_shards(source, out, context.args, size=size, logs=logs, options=options, show=show)
    raise typer.Exit(code)


def _check_build(words: list[str]) -> None:
    """Raises BadInputError if `phi3v shards build` would refuse these words. It is better to know that now
    than in every task.
    """
    from launch.cli.shards import app as shards_app
    from shards.common.errors import BadInputError

    command: Any = typer.main.get_command(shards_app)
    usage_error: Any = typer.BadParameter.__base__  # of the click that typer contains
    try:
        command.commands["build"].make_context("build", [*words, "--task", "0/1"])
    except usage_error as error:
        raise BadInputError(f"shards build: {error.format_message()}") from error


def _more(sbatch: list[str] | None) -> dict[str, str]:
    """The entries `option=value` as a mapping. Raises BadInputError for another form."""
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
    nodes: Annotated[int, typer.Option(help="Number of machines: one Master, the others Workers.")] = 2,
    gpus_per_node: Annotated[int, typer.Option(help="GPUs of each machine; one rank per GPU.")] = 8,
    image: Annotated[str, typer.Option(help="Container image built from the Dockerfile.")] = "",
    cpus_per_gpu: Annotated[int, typer.Option(min=1, help="CPU cores for each GPU.")] = 8,
    memory_gb: Annotated[
        int | None, typer.Option(min=1, help="GiB of host memory of a node (default: 100, plus 100 per GPU).")
    ] = None,
    namespace: Annotated[str, typer.Option(help="Namespace of all objects.")] = "phi3v",
    data_size: Annotated[str, typer.Option(help="Size of the claim for shards and weights.")] = "1Ti",
    runs_size: Annotated[str, typer.Option(help="Size of the claim for run directories.")] = "1Ti",
    operator: Annotated[
        Literal["v1", "v2"],
        typer.Option(help="v1: training operator, PyTorchJob. v2: Kubeflow Trainer, TrainJob."),
    ] = "v1",
    out: Annotated[Path | None, typer.Option(help="Write the files into this directory.")] = None,
    apply: Annotated[bool, typer.Option("--apply", help="Apply them with kubectl.")] = False,
    show: Annotated[bool, typer.Option("--print", help="Print them; the default.")] = False,
) -> None:
    """Print or apply the Kubernetes objects of a run.

    Example: phi3v launch k8s configs/burberry.yaml --nodes 2 --out manifests
    """
    from launch.description import JobSize
    from launch.k8s import launch_k8s
    from launch.manifests import IMAGE, KubernetesOptions

    options = KubernetesOptions(
        namespace=namespace, data_size=data_size, runs_size=runs_size, operator=operator
    )
    size = JobSize(
        nodes=nodes, gpus_per_node=gpus_per_node, cpus_per_gpu=cpus_per_gpu, memory_gb_per_node=memory_gb
    )
    code = launch_k8s(
        config,
        overrides or [],
        size,
        image=image or IMAGE,
        options=options,
        apply=apply and not show,
        out=out,
    )
    raise typer.Exit(code)


def doctor(
    config: Annotated[
        str | None, typer.Argument(help="Recipe whose data, weights and disk are checked too.")
    ] = None,
    overrides: Overrides = None,
    slurm: Annotated[bool, typer.Option("--slurm", help="Check the Slurm cluster too.")] = False,
    k8s: Annotated[bool, typer.Option("--k8s", help="Check the Kubernetes cluster too.")] = False,
    bandwidth: Annotated[
        bool, typer.Option("--bandwidth", help="Time an all-reduce on this machine too.")
    ] = False,
) -> None:
    """Find what would go wrong before it costs GPU hours; exit code 5 if something would fail.

    Example: phi3v doctor configs/burberry.yaml --slurm
    """
    from launch.doctor.report import run_doctor

    raise typer.Exit(run_doctor(config, overrides or [], slurm=slurm, k8s=k8s, bandwidth=bandwidth))
