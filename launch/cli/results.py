"""`phi3v export | report`: a finished run into the published layout, or into one page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from shards.common.errors import BadInputError


def export(
    model: Annotated[str, typer.Argument(help="A run (RUN:best, RUN:latest, RUN:1500) or a checkpoint.")],
    out: Annotated[Path, typer.Argument(help="Directory to create.")],
    dtype: Annotated[
        str | None, typer.Option(help="Type of the weights: bfloat16 or float32 (default: as trained).")
    ] = None,
    max_shard_gb: Annotated[
        float, typer.Option(min=0.001, help="Largest weight file, in GB (10^9 bytes).")
    ] = 5.0,
    verify: Annotated[
        bool, typer.Option("--verify", help="Load the result again and compare weights and answers.")
    ] = False,
    dataset: Annotated[
        str | None, typer.Option(help="Dataset with prompts for --verify (default: the run's data).")
    ] = None,
    adapter: Annotated[
        bool, typer.Option("--adapter", help="For a LoRA run: write only the adapters, in PEFT's format.")
    ] = False,
) -> None:
    """Write a trained model in the published layout: safetensors, config, tokenizer, processor.

    The adapters of a LoRA run are merged into the weights, unless --adapter asks for the adapters alone.

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
    print(f"exported to {export_model(source, out, dtype, max_shard_bytes=int(max_shard_gb * 1e9))}")
    if verify:
        answers = verify_export(source, out, dataset or _data_of(source.directory))
        print(f"verified: every weight and {len(answers)} answers are those of {source.directory}")


def _data_of(checkpoint: Path) -> str | None:
    """The dataset that a checkpoint's run trained on, if it is still there."""
    from phi3v_dist.checkpoint.read import read_meta

    data = read_meta(checkpoint).run["config"]["data"]
    path = data.get("path") or next((source["path"] for source in data.get("sources") or []), None)
    return path if path is not None and ("://" in path or Path(path).is_dir()) else None


def report(
    runs: Annotated[list[Path], typer.Argument(help="Run directories; several are drawn over each other.")],
    out: Annotated[
        Path | None, typer.Option(help="The page (default: report.html in the first run).")
    ] = None,
    sync: Annotated[
        bool, typer.Option("--sync", help="Upload to W&B what the runs have recorded offline.")
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
