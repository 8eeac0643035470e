"""`phi3v train | plan | estimate | demo`: a config into a run, and what can be known before the run."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import tempfile
from pathlib import Path
from typing import Annotated

import typer

from launch.cli.arguments import Config, Overrides
from phi3v_dist.exits import (
    CRASHED,
    DIVERGED,
    DONE,
    PREEMPTED,
    USAGE,
    DivergedError,
    LostRankError,
    PreemptedError,
    record_exit,
)
from shards.common.errors import BadInputError


def train(config: Config, overrides: Overrides = None) -> None:
    """Train a model; the launchers run this inside torchrun, one process per GPU. Resumes by itself.

    Example: torchrun --nproc-per-node 8 -m launch.cli.main train configs/burberry.yaml train.lr=1e-5
    """
    from phi3v_dist.config import load_config
    from phi3v_dist.run.inputs import check_inputs, load_run

    is_main = os.environ.get("RANK", "0") == "0"
    run = load_run(config, overrides or []) if is_main else load_config(config, overrides or [])
    code, reason = CRASHED, "crashed"
    try:
        from phi3v_dist.parallel.mesh import open_mesh
        from phi3v_dist.run.logs import log_to_files
        from phi3v_dist.train.loop import train as train_run

        with open_mesh(run.parallel.timeout_s, run.parallel.sp, run.run_dir / "logs") as mesh:
            log_to_files(run.run_dir, mesh.rank)
            try:
                mesh.everywhere(lambda: check_inputs(run))
                train_run(run, mesh)
            except (BadInputError, PreemptedError, DivergedError, LostRankError):
                raise
            except Exception:
                logging.getLogger(__name__).exception("rank %d crashed", mesh.rank)
                raise
        code, reason = DONE, "done"
    except (BadInputError, PreemptedError, DivergedError) as error:
        codes = {BadInputError: USAGE, PreemptedError: PREEMPTED, DivergedError: DIVERGED}
        code, reason = codes[type(error)], str(error)
        if is_main:
            print(f"phi3v: {reason}", file=sys.stderr)
        else:
            logging.getLogger(__name__).error(reason)  # in the log of this rank: it may be the only one
    except LostRankError as error:
        reason = str(error)
        logging.getLogger(__name__).error(reason)
        print(f"phi3v: {reason}", file=sys.stderr)  # every rank that is left names the one that was lost
    finally:
        if is_main and run.run_dir.is_dir():
            with contextlib.suppress(
                OSError
            ):  # the disk may be full; the launcher still sees the exit code of the process
                record_exit(run.run_dir, code, reason)
    if code:
        raise SystemExit(code)


def plan(
    config: Config,
    overrides: Overrides = None,
    dp: Annotated[int, typer.Option(min=1, help="Data-parallel ranks.")] = 1,
) -> None:
    """Show how a config packs its data: rows, fill, steps, balance. Needs no GPU and reads no image.

    Example: phi3v plan configs/burberry.yaml --dp 16
    """
    from phi3v_dist.run.inputs import load_run

    run = load_run(config, overrides or [])
    from phi3v_dist.data.describe import describe_plan
    from phi3v_dist.pretrained import model_config_of, tokenizer_dir
    from phi3v_dist.processor.tokenizer import load_tokenizer

    with tempfile.TemporaryDirectory() as scratch:  # a tokenizer that training would train is trained there
        tokenizer = load_tokenizer(tokenizer_dir(run, Path(scratch)))
    print("\n".join(describe_plan(run, dp, tokenizer, tile=model_config_of(run).tile)))


def estimate(
    config: Config,
    overrides: Overrides = None,
    gpus: Annotated[int, typer.Option(min=1, help="GPUs of the job.")] = 8,
    gpu_memory: Annotated[
        float, typer.Option(min=1, max=10_000, help="Memory of one GPU, in GB (10^9 bytes).")
    ] = 80.0,
    scaling: Annotated[
        bool, typer.Option("--scaling", help="Show the time of a step on 8 to 1,024 GPUs instead.")
    ] = False,
    gpu: Annotated[str, typer.Option(help="For --scaling: the GPU's name.")] = "H100",
    efficiency: Annotated[
        float,
        typer.Option(
            min=0.01, max=1, help="For --scaling: fraction of the peak FLOP/s that is reached (perf/hfu)."
        ),
    ] = 0.5,
    nvlink: Annotated[
        float | None,
        typer.Option(min=0.1, help="For --scaling: GB/s per GPU, one direction, inside a node."),
    ] = None,
    network: Annotated[
        float | None,
        typer.Option(min=0.1, help="For --scaling: GB/s per GPU, one direction, between nodes."),
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(help="For --scaling: write an HTML page with the curve.")
    ] = None,
) -> None:
    """Show how much memory a config needs on each GPU. Neither data nor weights are needed.

    Example: phi3v estimate configs/burberry.yaml --gpus 8

    With --scaling: how long a step takes on 8 to 1,024 GPUs, and what the time is spent on.

    Example: phi3v estimate configs/full-128k.yaml --scaling --gpu H100
    """
    from phi3v_dist.config import load_config

    run = load_config(config, overrides or [])
    from phi3v_dist.budget.memory import describe
    from phi3v_dist.pretrained import model_config_of
    from phi3v_dist.run.limits import check_shapes

    model = model_config_of(run)
    if scaling:
        from phi3v_dist.budget.scaling import cluster, describe_scaling, step_times

        check_shapes(run, model, run.parallel.sp)
        nodes = cluster(gpu, efficiency=efficiency, inside=nvlink, across=network)
        text = "\n".join(describe_scaling(run, model, nodes))
        print(text)
        if plot is not None:
            from phi3v_dist.tracking.report.scaling import scaling_page
            from shards.common.files import write_atomically

            page = scaling_page(run.name, list(step_times(run, model, nodes)), text)
            write_atomically(plot, page.encode())
            print(f"wrote {plot}")
        return
    check_shapes(run, model, gpus)
    print("\n".join(describe(run, model, gpus, gpu_bytes=int(gpu_memory * 1e9))))


def demo(
    config: Annotated[str, typer.Option(help="Config of the run.")] = "configs/tiny.yaml",
    rows: Annotated[int, typer.Option(help="Number of products in the catalogue.")] = 2000,
    overrides: Overrides = None,
) -> None:
    """Do the whole job at tiny size on this machine: catalogue, shards, ZeRO-3 training, evaluation, export.

    After an interruption run it again: it resumes where it stopped.

    Example: phi3v demo --rows 500 train.steps=50
    """
    from launch.demo import StageError, run_demo

    try:
        code = run_demo(config, rows, overrides or [])
    except StageError as error:
        print(f"phi3v: {error}", file=sys.stderr)
        code = error.code
    if code:
        raise SystemExit(code)
