"""131,072 tokens on two CPU ranks: `phi3v estimate` against resident memory, and how memory grows.

    python benchmarks/long_context.py [--json PATH] [--lengths 32768 65536 131072] [--features]

Each case starts two new processes that share a row (parallel.sp=2) of text and images at num_crops 16 (64
images at 131,072 tokens), with tiles of the tiny model, and train two steps as `phi3v train` does. Measured
is the highest resident memory of a rank above what it had before the model was built: the memory of the
libraries, if it counted, would make the estimate look better. Bars: within 15 % of the estimate; memory grows
in a straight line from the shortest row to the longest; no feature changes the loss. On a CPU the host is the
device, so offload must not change the sum.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np
import torch

from benchmarks.record import Comparison, report
from phi3v_dist.budget.memory import estimate
from phi3v_dist.config import RunConfig
from phi3v_dist.data.collate import Document, collate
from phi3v_dist.engine.zero import make_engine, partitioned_parameters, prepare_deepspeed, zero_config
from phi3v_dist.model.configuration import Phi3VConfig
from phi3v_dist.model.hub import build_model
from phi3v_dist.model.memory import save_memory
from phi3v_dist.model.row import PackedRow
from phi3v_dist.parallel.mesh import Mesh, open_mesh
from phi3v_dist.processor.geometry import image_token_count, vision_calls_needed
from phi3v_dist.train.optim import parameter_groups

CHUNK, LEARNT, DOCUMENT = 64, 8, 2048
FEATURES: dict[str, dict[str, Any]] = {
    "checkpointing": {},
    "all kept, no checkpointing": {"checkpointing": False},
    "tiles": {"tile_mlp": 2048},
    "checkpoints on the host": {"offload_checkpoints": True},
    "optimizer on the host": {"offload_optimizer": "cpu"},
}


def model_config() -> Phi3VConfig:
    """A small model with the published shape: short and long RoPE factors, a tower."""
    long = [1.0, 1.1, 1.2, 1.4, 1.6, 2.0, 2.5, 3.2, 4.0, 6.0, 9.0, 13.0, 18.0, 24.0, 30.0, 32.0]
    return Phi3VConfig(
        vocab_size=512,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=6,
        num_attention_heads=4,
        pad_token_id=0,
        rope_scaling={"type": "su", "short_factor": [1.0] * 16, "long_factor": long},
        clip_vision_config={
            "hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4,
            "image_size": 112,
        },
    )  # fmt: skip


def run_config(length: int, checkpointing: bool = True, **parallel: Any) -> RunConfig:
    """The configuration of rows of `length` tokens that two ranks share."""
    return RunConfig.model_validate(
        {
            "name": "long-context",
            "model": {
                "path": "none", "dtype": "float32", "vision_chunk": CHUNK,
                "gradient_checkpointing": checkpointing,
            },
            "data": {"path": "none", "seq_len": length},
            "train": {"steps": 2, "global_batch": 1, "lr": 1e-3},
            "parallel": {"sp": 2, "persistence_threshold": 0, **parallel},
        }
    )  # fmt: skip


def synthetic_row(length: int) -> PackedRow:
    """Documents of 2,048 tokens, but the first has 6,144 (more than 4,096). Each has an image of 16 tiles,
    and LEARNT of every 64 tokens of text are targets.
    """
    rng = np.random.default_rng(length)
    image = image_token_count(4, 4, 4)
    documents: list[Document] = []
    left = length
    while left:
        tokens = min(left, DOCUMENT if documents else 3 * DOCUMENT)
        ids = rng.integers(10, 500, tokens)
        labels = np.where(np.arange(tokens) % 64 < LEARNT, ids, -100)
        tiles = rng.integers(0, 255, (16, 3, 112, 112), dtype=np.uint8)
        ids[4 : 4 + image], labels[4 : 4 + image] = -1, -100
        documents.append(Document(ids.tolist(), labels.tolist(), tiles, [(4, 4)]))
        left -= tokens
    calls = vision_calls_needed(16 * len(documents), len(documents), 2 * CHUNK)
    return collate(documents, 0, 112, vision_calls=calls)


def status(field: str) -> int:
    """A field of /proc/self/status, in bytes."""
    found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


def worker(case: dict[str, Any]) -> None:
    """Runs two steps on every rank. Rank 0 writes the results of all ranks to the file case["out"]."""
    config, model_of = run_config(case["length"], **case["settings"]), model_config()
    with open_mesh(600, config.parallel.sp) as mesh:
        prepare_deepspeed(mesh)
        row = synthetic_row(case["length"])
        with partitioned_parameters(zero_config(config, 1), torch.float32):
            model = build_model(model_of, torch.float32)
        generator = torch.Generator().manual_seed(mesh.rank)
        for name, parameter in model.named_parameters():
            norm = name.endswith(("norm.weight", "layernorm.weight", "norm1.weight", "norm2.weight"))
            values = parameter.ds_tensor
            values.fill_(1.0) if norm else values.normal_(0.0, 0.05, generator=generator)
        model.sequence = mesh.sequence
        save_memory(model, config)
        engine = make_engine(model, parameter_groups(model, config.train), config, accumulation=1)
        # A short row first: DeepSpeed and torch load many of their modules at the first step.
        losses = [float(train_step(engine, synthetic_row(1024), mesh))]
        before = status("VmRSS") - lasting(config, model_of)
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak
        for _ in range(2):
            losses.append(train_step(engine, row, mesh))
        ranks = mesh.gather({"before": before, "peak": status("VmHWM")})
        if mesh.is_main:
            facts = {
                "images": len(row.grids),
                "targets": row.num_targets,
                "losses": losses[1:],
                "ranks": ranks,
            }
            Path(case["out"]).write_text(json.dumps(facts))
        engine.destroy()


def train_step(engine: Any, row: PackedRow, mesh: Mesh) -> float:
    """Trains one step; returns the loss before it."""
    loss = engine(row=row)
    engine.backward(loss * (mesh.size / row.num_targets))
    engine.step()
    return mesh.sum([float(loss.detach())])[0] / row.num_targets


def lasting(config: RunConfig, model_of: Phi3VConfig) -> int:
    """Bytes of weights, gradients and optimizer state on a rank, by the estimate."""
    found = estimate(config, model_of, 2, reserve=0, cuda=False)
    return sum(found[name].gpu + found[name].host for name in ("weights", "gradients", "optimizer"))


def measure(length: int, settings: dict[str, Any]) -> dict[str, Any]:
    """Starts two new ranks. Returns what they measured and what the estimate says."""
    with tempfile.TemporaryDirectory() as folder:
        case: dict[str, Any] = {"length": length, "settings": settings, "out": f"{folder}/facts.json"}
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
        command += [__file__, "--worker", json.dumps(case)]
        environment = {
            "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PYTHONWARNINGS": "ignore",
            "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1",
        }  # fmt: skip
        run = subprocess.run(
            command, env={**os.environ, **environment}, capture_output=True, text=True, timeout=1800
        )
        if run.returncode:
            raise SystemExit(run.stdout[-2000:] + run.stderr[-4000:])
        facts: dict[str, Any] = json.loads(Path(case["out"]).read_text())
    config = run_config(length, **settings)
    images = facts["images"]
    found = estimate(
        config, model_config(), 2, targets=facts["targets"] // 2, images=(images, 17 * images),
        reserve=0, cuda=False,
    )  # fmt: skip
    expected = found.total + found.host
    grown = max(rank["peak"] - rank["before"] for rank in facts["ranks"])
    result = {
        "tokens": length,
        "settings": settings,
        "images": images,
        "losses": facts["losses"],
        "grown_mb": grown / 1e6,
        "estimate_mb": expected / 1e6,
        "ratio": grown / expected,
        "peak_rss_mb": max(rank["peak"] for rank in facts["ranks"]) / 1e6,
        "ratio_with_libraries": max(r["peak"] / (r["before"] + expected) for r in facts["ranks"]),
        "busiest": found.busiest,
        "components_mb": {c.name: round((c.gpu + c.host) / 1e6, 1) for c in found.components},
    }
    print(
        f"{length:7,} tokens, {images:3} images, {settings or 'checkpointing'}: grew by "
        f"{result['grown_mb']:,.0f} MB, estimate {result['estimate_mb']:,.0f} MB ({found.busiest}), ratio "
        f"{result['ratio']:.2f}; with libraries {result['peak_rss_mb']:,.0f} MB, ratio "
        f"{result['ratio_with_libraries']:.2f}; loss {facts['losses'][1]:.6f}",
        flush=True,
    )
    return result


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--lengths", type=int, nargs="+", default=[32768, 65536, 131072])
    parser.add_argument(
        "--features", type=int, default=32768, help="tokens of the rows that compare features"
    )
    parser.add_argument("--json")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        worker(json.loads(options.worker))
        return 0
    rows = [measure(length, {"tile_mlp": 2048}) for length in options.lengths]
    features = {name: measure(options.features, settings) for name, settings in FEATURES.items()}

    def near(case: dict[str, Any]) -> bool:
        return abs(case["ratio"] - 1) <= 0.15

    found = [
        Comparison(
            f"memory of a rank at {case['tokens']:,} tokens, sp 2, {name}", "phi3v estimate",
            case["grown_mb"], case["estimate_mb"], "MB", case["ratio"], "within 15 %", near(case),
        )
        for name, case in [*(("tiles", row) for row in rows), *features.items()]
    ]  # fmt: skip
    tokens, grown = ([case[key] for case in rows] for key in ("tokens", "grown_mb"))
    slope, start = np.polyfit(tokens, grown, 1)
    off = max(abs(start + slope * t - g) / g for t, g in zip(tokens, grown, strict=True))
    print(
        f"memory of a rank = {start:,.0f} MB + {slope * 1024:.2f} MB for every 1,024 tokens; off by {off:.1%}"
    )
    found.append(
        Comparison(
            "growth of memory with the row", "a straight line", max(grown),
            float(start + slope * max(tokens)), "MB", 1 + float(off), "within 5 %", bool(off <= 0.05),
        )
    )  # fmt: skip
    plain = features["checkpointing"]["losses"][1]
    for name, case in features.items():
        same = abs(case["losses"][1] / plain - 1)
        found.append(
            Comparison(
                f"loss with {name}", "without", case["losses"][1], plain, "", 1 + same, "1e-6", same <= 1e-6
            )
        )
    return report("long_context", found, options.json)


if __name__ == "__main__":
    raise SystemExit(main())
