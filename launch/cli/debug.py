"""`phi3v debug ...`: inspects one part of a run again."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from launch.cli.arguments import Config, Overrides

app = typer.Typer(no_args_is_help=True, help="Inspect one part of a run again.")


@app.callback()
def debug() -> None:
    """Inspect one part of a run again."""


@app.command()
def row(
    config: Config,
    step: Annotated[
        int, typer.Argument(min=0, help="Number of optimizer steps before the row, as in logs/rows-*.jsonl.")
    ],
    overrides: Overrides = None,
    rank: Annotated[int, typer.Option(min=0, help="Data-parallel rank that got the row.")] = 0,
    micro: Annotated[int, typer.Option(min=0, help="Number of the micro-batch within the step.")] = 0,
    ranks: Annotated[int, typer.Option(min=1, help="Number of data-parallel ranks of the run.")] = 1,
    model: Annotated[
        str | None,
        typer.Option(help="Also print the row's loss under a run, a checkpoint, or a model directory."),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Directory for the row's arrays as .npz.")] = None,
) -> None:
    """Show a packed row as a rank got it: samples, texts, targets, shapes, and optionally its loss.

    Example: phi3v debug row runs/demo/config.yaml 120 --rank 1 --ranks 2 --model runs/demo
    """
    from phi3v_dist.run.inputs import load_run

    run = load_run(config, overrides or [])
    from phi3v_dist import replay

    replayed = replay.replay(run, replay.Place(step, rank, micro, ranks))
    print("\n".join(replay.describe(replayed)))
    if out is not None:
        print(f"wrote {replay.write(replayed, out)}")
    if model is not None:
        print(f"loss {replay.row_loss(replayed, model):.6g} under {model}")
