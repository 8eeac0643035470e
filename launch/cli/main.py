"""The command line, `phi3v`. Each command is a thin function that imports its room when it runs.

Exit codes: 0 done, 2 bad config or usage (one line on the standard error), 3 stopped by a signal after a
checkpoint, 4 training diverged or data unusable, others a crash.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from launch.cli.arguments import Config, Overrides
from launch.cli.debug import app as debug_app
from launch.cli.launch import app as launch_app
from launch.cli.launch import doctor
from launch.cli.shards import app as shards_app
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

if TYPE_CHECKING:
    from phi3v_dist.evaluation.evaluate import Evaluation

app = typer.Typer(
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    help="Full fine-tuning of Phi-3-Vision-128K on clusters: shards, ZeRO-3 training, evaluation, export.",
)
app.add_typer(shards_app, name="shards")
app.add_typer(launch_app, name="launch")
app.add_typer(debug_app, name="debug")
app.command()(doctor)


@app.command()
def train(config: Config, overrides: Overrides = None) -> None:
    """Train; run by the launchers inside torchrun, one process per GPU. Resumes by itself.

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
            logging.getLogger(__name__).error(reason)  # in this rank's log, should it be the only one
    except LostRankError as error:
        reason = str(error)
        logging.getLogger(__name__).error(reason)
        print(f"phi3v: {reason}", file=sys.stderr)  # every survivor says who was lost
    finally:
        if is_main and run.run_dir.is_dir():
            with contextlib.suppress(OSError):  # of a full disk; the launcher sees the process's own code
                record_exit(run.run_dir, code, reason)
    if code:
        raise SystemExit(code)


@app.command()
def plan(
    config: Config,
    overrides: Overrides = None,
    dp: Annotated[int, typer.Option(min=1, help="Data-parallel ranks.")] = 1,
) -> None:
    """Show what a config makes of its data: rows, fill, steps, balance. No GPU, no picture is read.

    Example: phi3v plan configs/burberry.yaml --dp 16
    """
    from phi3v_dist.run.inputs import load_run

    run = load_run(config, overrides or [])
    from phi3v_dist.data.describe import describe_plan

    print("\n".join(describe_plan(run, dp)))


@app.command()
def estimate(
    config: Config,
    overrides: Overrides = None,
    gpus: Annotated[int, typer.Option(min=1, help="GPUs of the job.")] = 8,
    gpu_memory: Annotated[float, typer.Option(min=1, max=10_000, help="GB (10^9 bytes) of one GPU.")] = 80.0,
    scaling: Annotated[bool, typer.Option("--scaling", help="Time of a step on 8 to 1,024 GPUs.")] = False,
    gpu: Annotated[str, typer.Option(help="For --scaling: the GPU's name.")] = "H100",
    efficiency: Annotated[
        float,
        typer.Option(min=0.01, max=1, help="For --scaling: part of the peak reached (perf/hfu)."),
    ] = 0.5,
    nvlink: Annotated[
        float | None,
        typer.Option(min=0.1, help="For --scaling: GB/s of a GPU, one direction, inside a node."),
    ] = None,
    network: Annotated[
        float | None,
        typer.Option(min=0.1, help="For --scaling: GB/s of a GPU, one direction, between nodes."),
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="For --scaling: a page with the curve.")] = None,
) -> None:
    """Show how much memory a config needs on each GPU. Neither data nor weights are needed.

    Example: phi3v estimate configs/burberry.yaml --gpus 8

    With --scaling: how long a step takes on 8 to 1,024 GPUs, and where the time goes.

    Example: phi3v estimate configs/full-128k.yaml --scaling --gpu H100
    """
    from phi3v_dist.config import load_config

    run = load_config(config, overrides or [])
    from phi3v_dist.budget.memory import describe
    from phi3v_dist.pretrained import model_config_of
    from phi3v_dist.run.limits import check_shapes

    model = model_config_of(run)
    if scaling:
        from phi3v_dist.budget import scaling as paper
        from shards.common.files import write_atomically

        check_shapes(run, model, run.parallel.sp)
        nodes = paper.cluster(gpu, efficiency, nvlink, network)
        print("\n".join(paper.describe_scaling(run, model, nodes)))
        if plot is not None:
            write_atomically(plot, paper.plot(run, model, nodes).encode())
            print(f"wrote {plot}")
        return
    check_shapes(run, model, gpus)
    print("\n".join(describe(run, model, gpus, int(gpu_memory * 1e9))))


@app.command()
def evaluate(
    model: Annotated[
        str, typer.Argument(help="A run (RUN:best, RUN:1500), a checkpoint, or a model directory.")
    ],
    dataset: Annotated[str, typer.Argument(help="A dataset directory of phi3v shards build.")],
    split: Annotated[str, typer.Option(help="The split to answer.")] = "val",
    samples: Annotated[
        int | None, typer.Option(min=1, help="So many of its samples, evenly spread; default all.")
    ] = None,
    swap: Annotated[
        bool, typer.Option(help="Answer once more with the pictures swapped between samples.")
    ] = True,
    loss: Annotated[bool, typer.Option(help="Also the loss of the reference replies.")] = True,
    metric: Annotated[
        list[str] | None,
        typer.Option(
            help="Metric: price, category, title, exact_match, anls or module:function; repeatable."
        ),
    ] = None,
    slice_by: Annotated[
        str, typer.Option(help="Field of the samples' meta to score part by part.")
    ] = "category",
    out: Annotated[Path | None, typer.Option(help="Directory for scores.json and predictions.*.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Questions answered together.")] = 16,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 64,
    seed: Annotated[int, typer.Option(min=0, help="Of the swap and the confidence intervals.")] = 0,
    weights: Annotated[
        str, typer.Option(help="For the answers: whole on every rank, partitioned (ZeRO-3), or auto.")
    ] = "auto",
    processes: Annotated[
        int | None, typer.Option(min=1, help="Start so many ranks on this machine; not inside torchrun.")
    ] = None,
) -> None:
    """Answer a split by generation and score the answers, beside a constant predictor and swapped pictures.

    In one process, with --processes N, or inside torchrun on all its ranks: the results are the same.

    Example: phi3v evaluate runs/demo:best runs/demo/data/shards --out runs/demo/eval/best
    """
    if weights not in ("auto", "whole", "partitioned"):
        raise BadInputError(f"--weights {weights}: use auto, whole or partitioned")
    if processes is not None:
        from launch.local import launch_here

        raise SystemExit(launch_here(_without_processes(sys.argv[1:]), processes))
    from phi3v_dist.checkpoint.restore import find_source
    from phi3v_dist.evaluation.evaluate import How, write_evaluation
    from phi3v_dist.evaluation.evaluate import evaluate as evaluate_model
    from phi3v_dist.parallel.mesh import open_mesh

    how = How(split, samples, swap, batch_size, max_new_tokens, slice_by=slice_by, seed=seed, loss=loss,
              weights=weights, **({"metrics": tuple(metric)} if metric else {}))  # fmt: skip
    is_main = os.environ.get("RANK", "0") == "0"
    try:
        with open_mesh(3600.0) as mesh:
            # A run that goes on may have a newer checkpoint when the next rank looks.
            source = mesh.on_main(lambda: find_source(model))
            result = evaluate_model(source, dataset, how, mesh)
            if mesh.is_main:
                if out is not None:
                    write_evaluation(result, out)
                _print_evaluation(result)
    except BadInputError:
        if not is_main:
            raise SystemExit(USAGE) from None
        raise


def _without_processes(arguments: list[str]) -> list[str]:
    """The command line of one rank: without --processes N."""
    kept: list[str] = []
    for argument in arguments:
        if argument.startswith("--processes="):
            continue
        if kept and kept[-1] == "--processes":
            kept.pop()
            continue
        kept.append(argument)
    return kept


def _print_evaluation(result: Evaluation) -> None:
    from rich.console import Console
    from rich.table import Table

    columns = {"scores": result.scores, "swapped": result.swapped, "baseline": result.baseline}
    table = Table("", "model", "95 % of resamples", "pictures swapped", "constant answer")
    for name in result.scores.values:
        between = result.scores.intervals[name]
        cells = ["-" if s is None else _shown(s.values[name]) for s in columns.values()]
        table.add_row(
            name, cells[0], "-" if between is None else f"{between[0]:.4g} .. {between[1]:.4g}", *cells[1:]
        )
    if result.loss is not None:
        table.add_row("loss", f"{result.loss:.6g}", "-", "-", "-")
    table.caption = f"{result.scores.samples} samples, {result.seconds:.1f} s"
    console = Console(soft_wrap=True, highlight=False)
    console.print(table)
    if len(result.by_slice) > 1:
        parts = Table(str(result.how["slice_by"]), "samples", *result.scores.values)
        for name, scores in result.by_slice.items():
            parts.add_row(name, str(scores.samples), *(_shown(v) for v in scores.values.values()))
        console.print(parts)


def _shown(value: float | int | None) -> str:
    return "-" if value is None else f"{value:.4g}"


@app.command()
def export(
    model: Annotated[str, typer.Argument(help="A run (RUN:best, RUN:latest, RUN:1500) or a checkpoint.")],
    out: Annotated[Path, typer.Argument(help="Directory to make.")],
    dtype: Annotated[
        str | None, typer.Option(help="Of the weights: bfloat16 or float32; default: as trained.")
    ] = None,
    max_shard_gb: Annotated[float, typer.Option(min=0.001, help="Largest weight file, 10^9 bytes.")] = 5.0,
    verify: Annotated[
        bool, typer.Option("--verify", help="Load it again and compare weights and answers.")
    ] = False,
    dataset: Annotated[
        str | None, typer.Option(help="Questions for --verify; default: the run's data.")
    ] = None,
    adapter: Annotated[
        bool, typer.Option("--adapter", help="Of a LoRA run: the adapters alone, in PEFT's format.")
    ] = False,
) -> None:
    """Write a trained model in the published layout: safetensors, config, tokenizer, processor.

    What a LoRA run has learnt is in the weights, unless --adapter asks for the adapters alone.

    Example: phi3v export runs/demo:best runs/demo/export --verify
    """
    from phi3v_dist.checkpoint.restore import find_source
    from phi3v_dist.export import export as export_model
    from phi3v_dist.export import export_adapter
    from phi3v_dist.export import verify as verify_export

    if dtype not in (None, "bfloat16", "float32"):
        raise BadInputError(f"--dtype {dtype}: use bfloat16 or float32")
    source = find_source(model)
    if adapter:
        if verify or dtype:
            raise BadInputError("--adapter writes adapters as trained; leave out --verify and --dtype")
        print(f"adapters exported to {export_adapter(source, out)}")
        return
    print(f"exported to {export_model(source, out, dtype, int(max_shard_gb * 1e9))}")
    if verify:
        answers = verify_export(source, out, dataset or _data_of(source.directory))
        print(f"verified: every weight and {len(answers)} answers are those of {source.directory}")


def _data_of(checkpoint: Path) -> str | None:
    """The dataset that a checkpoint's run trained on, if it is still there."""
    from phi3v_dist.checkpoint.read import read_meta

    data = read_meta(checkpoint).run["config"]["data"]
    path = data.get("path") or next((source["path"] for source in data.get("sources") or []), None)
    return path if path is not None and ("://" in path or Path(path).is_dir()) else None


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(help="Run directories; several are laid over each other.")],
    out: Annotated[Path | None, typer.Option(help="The page; default RUN/report.html of the first.")] = None,
    sync: Annotated[
        bool, typer.Option("--sync", help="Upload to W&B what the runs recorded offline.")
    ] = False,
) -> None:
    """Write one HTML page about one or more runs: curves, evaluations, answers. It needs no network.

    Example: phi3v report runs/demo
    """
    from phi3v_dist.tracking.report import report as make_report
    from shards.common.files import write_atomically

    page = make_report(runs)
    target = out or runs[0] / "report.html"
    write_atomically(target, page.encode())
    print(f"wrote {target} ({len(page.encode()) / 1e6:.2f} MB)")
    if sync:
        from phi3v_dist.tracking.wandb_run import sync as sync_run

        for run in runs:
            print(sync_run(run))


@app.command()
def ask(
    model: Annotated[str, typer.Argument(help="A run, a checkpoint, or a model directory.")],
    picture: Annotated[Path, typer.Argument(help="An image file.")],
    prompt: Annotated[
        str, typer.Option(help="The question; the picture goes in front unless it has a tag.")
    ] = ("What is shown in this image?"),
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 128,
) -> None:
    """Show a model one picture and print its answer.

    Example: phi3v ask runs/demo/export shoe.jpg --prompt "What is this?"
    """
    from phi3v_dist.checkpoint.restore import find_source, restore_for_answers
    from phi3v_dist.evaluation.generate import ask as ask_model

    if not picture.is_file():
        raise BadInputError(f"{picture}: no such file")
    restored = restore_for_answers(find_source(model))
    print(ask_model(restored, picture.read_bytes(), prompt, max_new_tokens))


@app.command()
def demo(
    config: Annotated[str, typer.Option(help="The run's config.")] = "configs/tiny.yaml",
    rows: Annotated[int, typer.Option(help="Products in the catalogue.")] = 2000,
    overrides: Overrides = None,
) -> None:
    """Do the whole job at tiny size here: drawn catalogue, shards, ZeRO-3 training, evaluation, export.

    Run it again after an interruption: it goes on where it stopped.

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


_NOT_HERE = (
    errno.EACCES, errno.EPERM, errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.EROFS,
    errno.ENOSPC, errno.EDQUOT,
)  # fmt: skip


def main() -> None:
    """Runs the command line; bad input ends with one line and exit code 2, as does a place where nothing can
    be written.
    """
    try:
        app()
    except BadInputError as error:
        print(f"phi3v: {error}", file=sys.stderr)
        raise SystemExit(USAGE) from None
    except OSError as error:
        if error.errno not in _NOT_HERE or error.filename is None:
            raise
        print(f"phi3v: {error.filename}: {error.strerror}; choose another place", file=sys.stderr)
        raise SystemExit(USAGE) from None


if __name__ == "__main__":
    main()
