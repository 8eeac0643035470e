"""One rank of test_parity.py, started by torchrun: python parity_rank.py DIRECTORY.

DIRECTORY holds `model` (a hub directory), `grouped` (one with fewer key-value heads), `small` (for the 20
steps), `rows.pt` and `short.pt` (four packed rows each). Rank 0 writes DIRECTORY/world-N.pt: for every case
the loss and all gradients of one optimizer step, and the losses of 20 steps for each sp.
"""

import gc
import sys
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from phi3v_dist.config import RunConfig
from phi3v_dist.engine.zero import make_engine, partitioned_parameters, prepare_deepspeed, zero_config
from phi3v_dist.model.hub import build_model, load_config, load_weights
from phi3v_dist.model.memory import save_memory
from phi3v_dist.model.row import PackedRow
from phi3v_dist.parallel.mesh import Mesh, open_mesh, sequence_group
from phi3v_dist.processor.geometry import vision_calls_needed
from phi3v_dist.train.optim import parameter_groups

CHUNK = 4
FEATURES: dict[str, dict[str, Any]] = {
    "plain": {},
    "checkpointing": {"checkpointing": True},
    "tiling": {"tile_mlp": 16},
    "all": {"checkpointing": True, "tile_mlp": 16, "offload_checkpoints": True, "offload_optimizer": "cpu"},
}
# (features, accumulation) by the number of ranks
CASES = {
    2: [("plain", 1), ("plain", 3), ("checkpointing", 1), ("tiling", 3), ("all", 1), ("all", 3)],
    4: [("plain", 1), ("all", 3)],
}


def run_config(accumulation: int, **parallel: Any) -> RunConfig:
    checkpointing = parallel.pop("checkpointing", False)
    return RunConfig.model_validate(
        {
            "name": "parity",
            "model": {"path": "none", "dtype": "float32", "gradient_checkpointing": checkpointing},
            "data": {"path": "none"},
            "train": {"steps": 20, "lr": 1e-3, "global_batch": accumulation, "weight_decay": 0.1},
            "parallel": {"persistence_threshold": 1000, **parallel},
        }
    )


def engine_of(directory: Path, config: RunConfig, accumulation: int, mesh: Mesh) -> Any:
    with partitioned_parameters(zero_config(config, accumulation), torch.float32):
        model = build_model(load_config(directory), torch.float32)
    load_weights(model, directory)
    model.sequence = mesh.sequence
    save_memory(model, config)
    return make_engine(model, parameter_groups(model, config.train), config, accumulation=accumulation)


def micro_rows(rows: list[PackedRow], mesh: Mesh) -> list[PackedRow]:
    """This rank's row of every micro-step; all rows of a micro-step ask for the same number of calls."""
    mine = []
    for first in range(0, len(rows), mesh.dp_size):
        together = rows[first : first + mesh.dp_size]
        views = CHUNK * mesh.sp_size
        calls = max(vision_calls_needed(len(row.tiles), len(row.grids), views) for row in together)
        mine.append(replace(together[mesh.dp_rank], vision_calls=calls))
    return mine


def backward(engine: Any, rows: list[PackedRow], mesh: Mesh) -> float:
    """The gradients of a step over `rows`, all ranks together, and its loss."""
    mine = micro_rows(rows, mesh)
    targets = sum(row.num_targets for row in rows)
    total = 0.0
    for micro, row in enumerate(mine):
        loss = engine(row=row)
        engine.backward(loss * (mesh.size * len(mine) / targets))
        total += loss.item()
        if micro < len(mine) - 1:
            engine.step()
    return mesh.sum([total])[0] / targets


def close(engine: Any) -> None:
    engine.destroy()
    gc.collect()


def main(directory: Path) -> None:
    from deepspeed.utils import safe_get_full_grad

    warnings.simplefilter("ignore")
    rows = torch.load(directory / "rows.pt", weights_only=False)
    short = torch.load(directory / "short.pt", weights_only=False)
    steps: dict[tuple[str, int, str, int], tuple[float, dict[str, torch.Tensor]]] = {}
    curves: dict[int, list[float]] = {}
    with open_mesh(300) as world:
        prepare_deepspeed(world)
        for sp in [1, 2, 4] if world.size == 4 else [2]:
            mesh = replace(world, sequence=sequence_group(world.rank, world.size, sp))
            grouped = [("grouped", "all", 1)] if world.size == 2 else []
            for name, features, accumulation in [("model", *case) for case in CASES[world.size]] + grouped:
                config = run_config(accumulation, sp=sp, **FEATURES[features])
                engine = engine_of(directory / name, config, accumulation, mesh)
                used = (rows * 3)[: mesh.dp_size * accumulation]
                loss = backward(engine, used, mesh)
                gradients = {
                    parameter_name: safe_get_full_grad(parameter).clone()
                    for parameter_name, parameter in engine.module.named_parameters()
                    if parameter.requires_grad
                }
                steps[name, sp, features, accumulation] = (loss, gradients)
                close(engine)
                del engine
            if world.size == 4:
                accumulation = 4 // mesh.dp_size
                config = run_config(accumulation, sp=sp, persistence_threshold=5000)  # fewer collectives
                engine = engine_of(directory / "small", config, accumulation, mesh)
                curves[sp] = []
                for step in range(20):
                    curves[sp].append(backward(engine, short[step % 3 :] + short[: step % 3], mesh))
                    engine.step()
                close(engine)
                del engine
        if world.is_main:
            torch.save({"steps": steps, "curves": curves}, directory / f"world-{world.size}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
