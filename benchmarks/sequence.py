"""The cost of sharing a row: tokens/s of two gloo ranks with sp 2, against two ranks with a row each.

    python benchmarks/sequence.py [--tokens 8192] [--steps 6] [--json PATH]

The tiny model of benchmarks/long_context.py, text and images, one core per rank. Data parallelism is
the cheapest way where a row fits; sequence parallelism also sends the queries, keys, values and outputs of
each layer. One rank alone on one core is measured too: it shows how much a second core can give. The layers
here are tiny, so the exchange weighs more than in the full-size model.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch

from benchmarks.long_context import model_config, run_config, synthetic_row, train_step
from benchmarks.record import Comparison, report
from phi3v_dist.engine.zero import make_engine, partitioned_parameters, prepare_deepspeed, zero_config
from phi3v_dist.model.hub import build_model
from phi3v_dist.model.memory import save_memory
from phi3v_dist.parallel.mesh import open_mesh
from phi3v_dist.train.optim import parameter_groups


def worker(sp: int, tokens: int, steps: int, out: str) -> None:
    """Runs on every rank. Rank 0 writes the seconds of each step but the first to the file `out`."""
    torch.set_num_threads(1)
    config = run_config(tokens, sp=sp)
    with open_mesh(600, sp) as mesh:
        prepare_deepspeed(mesh)
        with partitioned_parameters(zero_config(config, 1), torch.float32):
            model = build_model(model_config(), torch.float32)
        for parameter in model.parameters():
            parameter.ds_tensor.normal_(0.0, 0.02)
        model.sequence = mesh.sequence
        save_memory(model, config)
        engine = make_engine(model, parameter_groups(model, config.train), config, accumulation=1)
        row, seconds = synthetic_row(tokens), []
        for _ in range(steps + 1):
            began = time.perf_counter()
            train_step(engine, row, mesh)
            seconds.append(time.perf_counter() - began)
        if mesh.is_main:
            Path(out).write_text(json.dumps(seconds[1:]))
        engine.destroy()


def step_seconds(ranks: int, sp: int, tokens: int, steps: int) -> float:
    """The median seconds of a step of newly started ranks."""
    with tempfile.TemporaryDirectory() as folder:
        out = f"{folder}/seconds.json"
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
        command += [__file__, "--worker", json.dumps([sp, tokens, steps, out])]
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "DS_ACCELERATOR": "cpu",
            "PYTHONWARNINGS": "ignore",
        }
        run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
        if run.returncode:
            raise SystemExit(run.stdout[-2000:] + run.stderr[-4000:])
        return statistics.median(json.loads(Path(out).read_text()))


def main() -> int:
    """Runs the three ways. Returns the exit status."""
    parser = argparse.ArgumentParser(description="sequence parallelism against data parallelism")
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--json")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        worker(*json.loads(options.worker))
        return 0
    tokens = options.tokens
    ways = {"shared": (2, 2, 1), "own rows": (2, 1, 2), "alone": (1, 1, 1)}
    speed = {
        name: rows * tokens / step_seconds(ranks, sp, tokens, options.steps)
        for name, (ranks, sp, rows) in ways.items()
    }
    what = f"tokens/s of 2 ranks that share a row of {tokens:,}"
    comparisons = [
        Comparison(what, "2 ranks with a row each", speed["shared"], speed["own rows"], "tokens/s",
                   speed["shared"] / speed["own rows"]),
        Comparison(what, "1 rank on one core", speed["shared"], speed["alone"], "tokens/s",
                   speed["shared"] / speed["alone"]),
    ]  # fmt: skip
    return report("sequence", comparisons, options.json)


if __name__ == "__main__":
    sys.exit(main())
