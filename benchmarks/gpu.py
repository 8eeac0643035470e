"""The full-size model on one GPU: longest row that trains with each memory feature, step time, tokens/s, MFU
and peak memory against `phi3v estimate`, at 4K to 128K.

    python benchmarks/gpu.py --out docs/benchmarks            one GPU; no new measurement after 7 minutes
    python benchmarks/gpu.py --tiny --lengths 256 512         the same code at tiny size on a CPU, as a test

Weights are random, rows are synthetic: square images at num_crops 16 with 120 tokens of text each, 40 of
them targets. Every row takes the path of training: ZeRO-3 engine, packed row, chunked loss, checkpointing.
The result says which lengths do not fit; settings that cannot fit by the estimate are not tried. Writes
gpu-NAME.json and gpu-NAME.md.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

# When this runs as a script, its folder is first on the path, and shards.py there would hide the package.
sys.path[:] = [place for place in sys.path if Path(place or ".").resolve() != Path(__file__).resolve().parent]

from phi3v_dist.budget.flops import peak_tflops, row_flops, shape_of
from phi3v_dist.budget.memory import Estimate, estimate
from phi3v_dist.config import RunConfig
from phi3v_dist.data.collate import Document, collate
from phi3v_dist.engine.zero import make_engine, partitioned_parameters, prepare_deepspeed, zero_config
from phi3v_dist.model.configuration import Phi3VConfig
from phi3v_dist.model.dtypes import torch_dtype
from phi3v_dist.model.hub import build_model
from phi3v_dist.model.memory import save_memory
from phi3v_dist.model.row import PackedRow
from phi3v_dist.parallel.mesh import Mesh, open_mesh
from phi3v_dist.processor.geometry import hd_grid, image_token_count, tile_side_tokens, vision_calls_needed
from phi3v_dist.train.optim import parameter_groups

TEXT, LEARNT = 120, 40
OFFLOAD = {"tile_mlp": 4096, "offload_checkpoints": True, "offload_optimizer": "cpu"}
SETTINGS: dict[str, dict[str, Any]] = {
    "all on the GPU": {},
    "tiles": {"tile_mlp": 4096},
    "optimizer on the host": {"offload_optimizer": "cpu"},
    "and tiles, layer inputs on the host": OFFLOAD,
}


def synthetic_row(config: Phi3VConfig, length: int, num_crops: int, chunk: int) -> PackedRow:
    """Documents of one image and TEXT tokens until `length` is full; the last one has text alone."""
    rng = np.random.default_rng(length)
    grid = hd_grid(1000, 1000, num_crops, tile=config.tile)
    image = image_token_count(grid.rows, grid.cols, tile_side_tokens(config.tile))
    documents, left = [], length
    while left > 0:
        with_image = left >= image + TEXT
        tokens = image + TEXT if with_image else min(left, 2048)
        ids = rng.integers(10, config.vocab_size - 1, tokens).tolist()
        labels = [-100] * max(0, tokens - LEARNT) + ids[-LEARNT:]
        if with_image:
            ids[4 : 4 + image] = [-1] * image
        shape = (grid.rows * grid.cols if with_image else 0, 3, config.tile, config.tile)
        tiles = rng.integers(0, 255, shape, dtype=np.uint8)
        grids = [(grid.rows, grid.cols)] if with_image else []
        documents.append(Document(ids, labels[-tokens:], tiles, grids))
        left -= tokens
    num_images = sum(len(d.grids) for d in documents)
    calls = vision_calls_needed(sum(len(d.tiles) for d in documents), num_images, chunk)
    return collate(documents, 0, config.tile, vision_calls=calls)


def measure(engine: Any, config: Phi3VConfig, run: RunConfig, length: int, steps: int) -> dict[str, Any]:
    """Trains steps on one row of `length` tokens: seconds and peak memory, or that it does not fit."""
    device = engine.device
    cuda = device.type == "cuda"
    row = synthetic_row(config, length, run.data.num_crops, run.model.vision_chunk).to(device)
    views = len(row.tiles) + len(row.grids)
    expected = estimate_row(run, config, length, row.num_targets, (len(row.grids), views))
    facts: dict[str, Any] = {
        "tokens": len(row.input_ids),
        "images": len(row.grids),
        "views": views,
        "estimate_gb": expected.without_reserve / 1e9,
        "busiest": expected.busiest,
    }
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    try:
        seconds = []
        for _ in range(steps + 1):  # the first one warms up
            began = time.perf_counter()
            loss = engine(row=row)
            engine.backward(loss / max(1, row.num_targets))
            engine.step()
            if cuda:
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - began)
    except torch.OutOfMemoryError:
        engine.zero_grad()
        torch.cuda.empty_cache()
        return {**facts, "fits": False}
    best = min(seconds[1:])
    flops = row_flops(run, config, shape_of(row, length))
    peak = peak_tflops(device)
    return {
        **facts,
        "fits": True,
        "seconds_per_step": best,
        "seconds_all": seconds[1:],
        "tokens_per_second": facts["tokens"] / best,
        "model_tflop": flops.model / 1e12,
        "hardware_tflop": flops.hardware / 1e12,
        "mfu": None if peak is None else flops.model / best / 1e12 / peak,
        "hfu": None if peak is None else flops.hardware / best / 1e12 / peak,
        "peak_allocated_gb": torch.cuda.max_memory_allocated() / 1e9 if cuda else None,
        "loss": float(loss) / max(1, row.num_targets),
    }


def estimate_row(
    run: RunConfig, config: Phi3VConfig, length: int, targets: int | None, images: tuple[int, int] | None
) -> Estimate:
    """The estimate for a row of `length`."""
    longer = run.model_copy(update={"data": run.data.model_copy(update={"seq_len": length})})
    return estimate(longer, config, 1, targets=targets, images=images, cuda=torch.cuda.is_available())


def try_settings(
    mesh: Mesh, config: Phi3VConfig, run: RunConfig, name: str, lengths: list[int], steps: int, stop_at: float
) -> list[dict[str, Any]]:
    """One engine, all lengths until one does not fit. stop_at: time.monotonic() of the last start."""
    gpu = torch.cuda.mem_get_info()[1] if mesh.device.type == "cuda" else None
    first = estimate_row(run, config, lengths[0], None, None)
    if gpu is not None and first.without_reserve > gpu:
        return [
            {
                "settings": name, "tokens": lengths[0], "images": 0, "fits": False,
                "estimate_gb": first.without_reserve / 1e9, "tried": False,
            }
        ]  # fmt: skip
    dtype = torch_dtype(run.model.dtype)
    with partitioned_parameters(zero_config(run, 1), dtype):
        model = build_model(config, dtype)
    for parameter_name, parameter in model.named_parameters():
        norm = parameter_name.endswith(("norm.weight", "layernorm.weight", "norm1.weight", "norm2.weight"))
        parameter.ds_tensor.fill_(1.0) if norm else parameter.ds_tensor.normal_(0.0, 0.02)
    save_memory(model, run)
    engine = make_engine(model, parameter_groups(model, run.train), run, accumulation=1)
    runs: list[dict[str, Any]] = []
    for length in lengths:
        if time.monotonic() > stop_at:
            break
        runs.append({"settings": name, "tried": True, **measure(engine, config, run, length, steps)})
        print(json.dumps(runs[-1]), flush=True)
        if not runs[-1]["fits"]:
            break  # longer ones fit even less
    engine.destroy()
    del engine, model
    gc.collect()
    if mesh.device.type == "cuda":
        torch.cuda.empty_cache()
    return runs


def model_config(tiny: bool) -> Phi3VConfig:
    """The published sizes, or a tiny model to test the script with."""
    if not tiny:
        factors = {"short_factor": [1.0] * 48, "long_factor": [1.0 + i for i in range(48)], "type": "su"}
        return Phi3VConfig(rope_scaling=factors)
    clip = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    return Phi3VConfig(
        vocab_size=512,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        pad_token_id=0,
        clip_vision_config={**clip, "image_size": 112},
    )


def table(result: dict[str, Any]) -> str:
    """The page for docs/benchmarks."""
    lines = [
        f"# One GPU, full-size model: {result['device']}",
        "",
        f"{result['date']}, torch {result['torch']}. Command: `{result['command']}`.",
        "",
        "| settings | tokens | images | s/step | tokens/s | MFU | peak GB | estimate GB |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for run in result["runs"]:
        start = f"| {run['settings']} | {run['tokens']:,} | {run['images']} "
        if not run["fits"]:
            outcome = "out of memory" if run["tried"] else "cannot fit, not tried"
            lines.append(f"{start}| {outcome} | | | | {run['estimate_gb']:.1f} |")
            continue
        mfu = "" if run["mfu"] is None else f"{run['mfu']:.1%}"
        peak = "" if run["peak_allocated_gb"] is None else f"{run['peak_allocated_gb']:.1f}"
        lines.append(
            f"{start}| {run['seconds_per_step']:.2f} | {run['tokens_per_second']:,.0f} | {mfu} | {peak} | "
            f"{run['estimate_gb']:.1f} |"
        )
    return "\n".join(lines) + "\n"


def run_config(num_crops: int, **parallel: Any) -> RunConfig:
    """The configuration of one row per step. parallel: the settings to measure."""
    dtype = "bfloat16" if torch.cuda.is_available() else "float32"
    return RunConfig.model_validate(
        {
            "name": "gpu-benchmark",
            "model": {"path": "none", "dtype": dtype, "vision_chunk": 16},
            "data": {"path": "none", "num_crops": num_crops},
            "train": {"steps": 1, "global_batch": 1, "lr": 1e-6},
            "parallel": parallel,
        }
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--lengths", type=int, nargs="+", default=[4096, 8192, 32768, 131072])
    parser.add_argument("--settings", nargs="+", choices=[*SETTINGS], default=[*SETTINGS])
    parser.add_argument("--steps", type=int, default=1)
    parser.add_argument("--num-crops", type=int, default=16)
    parser.add_argument(
        "--limit", type=float, default=420, help="seconds after which no new measurement starts"
    )
    parser.add_argument("--tiny", action="store_true", help="tiny sizes, also without a GPU")
    parser.add_argument("--out", type=Path, help="directory for the JSON and the table")
    options = parser.parse_args()
    if not torch.cuda.is_available() and not options.tiny:
        raise SystemExit("no GPU here; try the script at tiny size with --tiny")
    stop_at = time.monotonic() + options.limit
    config = model_config(options.tiny)
    runs: list[dict[str, Any]] = []
    with open_mesh(600) as mesh:
        prepare_deepspeed(mesh)
        for name in options.settings:
            if time.monotonic() > stop_at:
                break
            run = run_config(options.num_crops, **SETTINGS[name])
            runs += try_settings(mesh, config, run, name, options.lengths, options.steps, stop_at)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    result = {
        "device": device,
        "date": datetime.date.today().isoformat(),
        "torch": torch.__version__,
        "command": " ".join(["python", *sys.argv]),
        "longest_that_trains": {
            name: max((r["tokens"] for r in runs if r["fits"] and r["settings"] == name), default=0)
            for name in options.settings
        },
        "runs": runs,
    }
    print(table(result))
    if options.out is not None:
        options.out.mkdir(parents=True, exist_ok=True)
        name = device.lower().replace(" ", "-")
        (options.out / f"gpu-{name}.json").write_text(json.dumps(result, indent=1) + "\n")
        (options.out / f"gpu-{name}.md").write_text(table(result))


if __name__ == "__main__":
    main()
