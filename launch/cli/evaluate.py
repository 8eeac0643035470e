"""`phi3v evaluate | ask`: what a trained model answers."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from phi3v_dist.exits import USAGE
from shards.common.errors import BadInputError

if TYPE_CHECKING:
    from phi3v_dist.evaluation.evaluate import Evaluation


def evaluate(
    model: Annotated[
        str, typer.Argument(help="A run (RUN:best, RUN:1500), a checkpoint, or a model directory.")
    ],
    dataset: Annotated[str, typer.Argument(help="A dataset directory of phi3v shards build.")],
    split: Annotated[str | None, typer.Option(help="The split to answer (default: data.val_split).")] = None,
    samples: Annotated[
        int | None,
        typer.Option(min=1, help="Number of samples, evenly spread over the split (default: all)."),
    ] = None,
    swap: Annotated[
        bool, typer.Option(help="Answer a second time with the images swapped between samples.")
    ] = True,
    loss: Annotated[bool, typer.Option(help="Also compute the loss of the reference replies.")] = True,
    metric: Annotated[
        list[str] | None,
        typer.Option(
            help="Metric: price, category, title, exact_match, anls or module:function; repeatable."
        ),
    ] = None,
    slice_by: Annotated[
        str | None,
        typer.Option(
            help="Field of the samples' meta whose values are scored separately (default: eval.slice_by)."
        ),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Directory for scores.json and predictions.*.")] = None,
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="Prompts answered together (default: eval.batch_size).")
    ] = None,
    max_new_tokens: Annotated[
        int | None,
        typer.Option(min=1, help="Longest answer, in tokens (default: eval.max_new_tokens)."),
    ] = None,
    seed: Annotated[
        int | None,
        typer.Option(min=0, help="Seed of the swap and of the confidence intervals (default: seed)."),
    ] = None,
    weights: Annotated[
        str | None,
        typer.Option(
            help="Weights while answering: whole on every rank, partitioned (ZeRO-3), or auto "
            "(default: eval.weights)."
        ),
    ] = None,
    processes: Annotated[
        int | None, typer.Option(min=1, help="Start this many ranks on this machine; not inside torchrun.")
    ] = None,
) -> None:
    """Generate answers for a split and score them; compare with a constant predictor and swapped images.

    In one process, with --processes N, or inside torchrun on all its ranks: the results are the same.

    Example: phi3v evaluate runs/demo:best runs/demo/data/shards --out runs/demo/eval/best
    """
    if weights not in (None, "auto", "whole", "partitioned"):
        raise BadInputError(f"--weights {weights}: use auto, whole or partitioned")
    if processes is not None:
        from launch.local import launch_here

        raise SystemExit(launch_here(_without_processes(sys.argv[1:]), processes))
    given: dict[str, Any] = {
        "split": split,
        "samples": samples,
        "swap": swap,
        "batch_size": batch_size,
        "max_new_tokens": max_new_tokens,
        "metrics": tuple(metric) if metric else None,
        "slice_by": slice_by,
        "seed": seed,
        "loss": loss,
        "weights": weights,
    }
    _evaluate(model, dataset, {name: value for name, value in given.items() if value is not None}, out=out)


def _evaluate(model: str, dataset: str, given: dict[str, Any], *, out: Path | None) -> None:
    """Evaluates on all ranks; rank 0 prints and writes the result. given: the settings that are not the
    defaults.
    """
    from phi3v_dist.checkpoint.restore import find_source
    from phi3v_dist.evaluation.evaluate import EvalSettings, write_evaluation
    from phi3v_dist.evaluation.evaluate import evaluate as evaluate_model
    from phi3v_dist.parallel.mesh import open_mesh

    settings = EvalSettings(**given)
    is_main = os.environ.get("RANK", "0") == "0"
    try:
        with open_mesh(3600.0) as mesh:
            # While the run trains, another rank might see a newer checkpoint.
            source = mesh.on_main(lambda: find_source(model))
            result = evaluate_model(source, dataset, settings, mesh=mesh)
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
    table = Table("", "model", "95 % of resamples", "images swapped", "constant answer")
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
        parts = Table(str(result.settings["slice_by"]), "samples", *result.scores.values)
        for name, scores in result.by_slice.items():
            parts.add_row(name, str(scores.samples), *(_shown(v) for v in scores.values.values()))
        console.print(parts)


def _shown(value: float | int | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def ask(
    model: Annotated[str, typer.Argument(help="A run, a checkpoint, or a model directory.")],
    image: Annotated[Path, typer.Argument(help="An image file.")],
    prompt: Annotated[
        str, typer.Option(help="The question; the image is put before it unless the text has an image tag.")
    ] = ("What is shown in this image?"),
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 128,
) -> None:
    """Show a model one image and print its answer.

    Example: phi3v ask runs/demo/export shoe.jpg --prompt "What is this?"
    """
    from phi3v_dist.checkpoint.restore import find_source, restore_for_answers
    from phi3v_dist.evaluation.generate import ask as ask_model

    if not image.is_file():
        raise BadInputError(f"{image}: no such file")
    restored = restore_for_answers(find_source(model))
    print(ask_model(restored, image.read_bytes(), prompt, max_new_tokens=max_new_tokens))
