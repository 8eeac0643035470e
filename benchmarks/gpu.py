"""The full-size model on one GPU: longest row that trains, step time, tokens/s, MFU and peak memory at 4K to
128K.

    python benchmarks/gpu.py --out docs/benchmarks            one GPU; about 5 minutes
    python benchmarks/gpu.py --tiny --lengths 256 512         the same code at tiny size on the CPU, to try it

Weights are random, rows are synthetic: square pictures at num_crops 16 with 120 tokens of text each, 40 of
them learnt. Every length runs the project's own path: ZeRO-3 engine, packed row, chunked loss, checkpointing.
A length that does not fit is recorded as such. Writes gpu-NAME.json and gpu-NAME.md.
"""

from __future__ import annotations

import argparse
import datetime
import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

# Run as a script, this folder comes first on the path, and its shards.py would hide the package.
sys.path[:] = [place for place in sys.path if Path(place or ".").resolve() != Path(__file__).resolve().parent]

from phi3v_dist.config import RunConfig
from phi3v_dist.data.collate import Document, collate
from phi3v_dist.model.configuration import Phi3VConfig
from phi3v_dist.model.hub import build_model
from phi3v_dist.model.row import PackedRow
from phi3v_dist.optim import parameter_groups
from phi3v_dist.parallel.mesh import open_mesh
from phi3v_dist.parallel.zero import make_engine, prepare_deepspeed, zero_config
from phi3v_dist.processor.geometry import hd_grid, image_token_count, tile_side_tokens, vision_calls_needed

PEAK_TFLOPS = {"H100": 989.0, "H200": 989.0, "A100": 312.0}  # dense bf16, NVIDIA data sheets (SXM)
TEXT, LEARNT = 120, 40


def synthetic_row(config: Phi3VConfig, length: int, num_crops: int, chunk: int) -> PackedRow:
    """Documents of one picture and TEXT tokens until `length` is full; the last one has text alone."""
    rng = np.random.default_rng(length)
    grid = hd_grid(1000, 1000, num_crops, config.tile)
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
    pictures = sum(len(d.grids) for d in documents)
    calls = vision_calls_needed(sum(len(d.tiles) for d in documents), pictures, chunk)
    return collate(documents, 0, config.tile, calls)


def model_flops(config: Phi3VConfig, row: PackedRow) -> float:
    """FLOPs of forward and backward of a row: attention within documents, vision per view, no
    recomputation.
    """
    hidden, layers = config.hidden_size, config.num_hidden_layers
    linear = 4 * hidden * hidden + 3 * hidden * config.intermediate_size  # multiply-adds a token and layer
    lengths = (row.cu_seqlens[1:] - row.cu_seqlens[:-1]).double()
    decoder = layers * (linear * float(lengths.sum()) + hidden * float((lengths**2).sum()))
    head = hidden * config.vocab_size * row.num_targets
    clip = config.clip_config()
    patches = (clip.image_size // clip.patch_size) ** 2 + 1
    views = len(row.tiles) + len(row.grids)
    per_patch = 4 * clip.hidden_size**2 + 2 * clip.hidden_size * clip.intermediate_size
    tower = (clip.num_hidden_layers - 1) * (per_patch * patches + 2 * clip.hidden_size * patches**2) * views
    projector = (4 * clip.hidden_size * hidden + hidden * hidden) * len(row.image_positions)
    return 6.0 * (decoder + head + tower + projector)  # 2 FLOPs a multiply-add, backward twice the forward


def measure(
    engine: Any, config: Phi3VConfig, length: int, steps: int, num_crops: int, chunk: int
) -> dict[str, Any]:
    """Steps of one row of `length`: seconds and peak bytes, or why it does not fit."""
    device = engine.device
    cuda = device.type == "cuda"
    row = synthetic_row(config, length, num_crops, chunk).to(device)
    facts = {
        "tokens": len(row.input_ids),
        "pictures": len(row.grids),
        "views": len(row.tiles) + len(row.grids),
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
    flops = model_flops(config, row)
    name = torch.cuda.get_device_name() if cuda else "cpu"
    peak = next((value for key, value in PEAK_TFLOPS.items() if key in name), None)
    return {
        **facts,
        "fits": True,
        "seconds_per_step": best,
        "seconds_all": seconds[1:],
        "tokens_per_second": facts["tokens"] / best,
        "model_tflop": flops / 1e12,
        "mfu": None if peak is None else flops / best / 1e12 / peak,
        "peak_allocated_gb": torch.cuda.max_memory_allocated() / 1e9 if cuda else None,
        "loss": float(loss) / max(1, row.num_targets),
    }


def model_config(tiny: bool) -> Phi3VConfig:
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
    lines = [
        f"# One GPU, full-size model: {result['device']}",
        "",
        f"{result['date']}, torch {result['torch']}. Command: `{result['command']}`.",
        "",
        "| tokens | pictures | s/step | tokens/s | MFU | peak GB |",
        "|---|---|---|---|---|---|",
    ]
    for run in result["runs"]:
        if not run["fits"]:
            lines.append(f"| {run['tokens']:,} | {run['pictures']} | out of memory | | | |")
            continue
        mfu = "" if run["mfu"] is None else f"{run['mfu']:.1%}"
        peak = "" if run["peak_allocated_gb"] is None else f"{run['peak_allocated_gb']:.1f}"
        lines.append(
            f"| {run['tokens']:,} | {run['pictures']} | {run['seconds_per_step']:.2f} | "
            f"{run['tokens_per_second']:,.0f} | {mfu} | {peak} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--lengths", type=int, nargs="+", default=[4096, 8192, 16384, 32768, 65536, 131072])
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--num-crops", type=int, default=16)
    parser.add_argument("--tiny", action="store_true", help="tiny sizes, also without a GPU")
    parser.add_argument("--out", type=Path, help="directory for the JSON and the table")
    options = parser.parse_args()
    if not torch.cuda.is_available() and not options.tiny:
        raise SystemExit("no GPU here; try the script at tiny size with --tiny")
    config = model_config(options.tiny)
    run = RunConfig.model_validate(
        {
            "name": "gpu-benchmark",
            "model": {"path": "none", "dtype": "bfloat16" if torch.cuda.is_available() else "float32"},
            "data": {"path": "none"},
            "train": {"steps": 1, "global_batch": 1, "lr": 1e-6},
        }
    )
    with open_mesh(600) as mesh:
        prepare_deepspeed(mesh)
        dtype = torch.bfloat16 if run.model.dtype == "bfloat16" else torch.float32
        model = build_model(config, dtype, zero_config(run, 1))
        for name, parameter in model.named_parameters():
            norm = name.endswith(("norm.weight", "layernorm.weight", "norm1.weight", "norm2.weight"))
            parameter.ds_tensor.fill_(1.0) if norm else parameter.ds_tensor.normal_(0.0, 0.02)
        model.gradient_checkpointing_enable()
        engine = make_engine(model, parameter_groups(model, run.train), run, 1)
        runs = []
        for length in options.lengths:
            runs.append(measure(engine, config, length, options.steps, options.num_crops, model.vision_chunk))
            print(json.dumps(runs[-1]), flush=True)
            if not runs[-1]["fits"]:
                break  # longer ones fit even less
        engine.destroy()
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    result = {
        "device": device,
        "date": datetime.date.today().isoformat(),
        "torch": torch.__version__,
        "command": " ".join(["python", *sys.argv]),
        "parameters": sum(p.ds_numel if hasattr(p, "ds_numel") else p.numel() for p in model.parameters()),
        "longest_that_trains": max((r["tokens"] for r in runs if r["fits"]), default=0),
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
