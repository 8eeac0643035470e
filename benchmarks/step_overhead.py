"""What our train loop adds to a step, against a bare DeepSpeed loop over rows that are already in memory.

    python benchmarks/step_overhead.py [--steps 24] [--json PATH]

One process, ZeRO-3, one model (20M parameters, 1,024 positions per row, so that a step takes some tenths of a
second, as on a GPU), the same rows. The bare loop runs forward, backward and step, nothing else. Ours is
`phi3v_dist.train.loop.train` with its loader, and with logs and metrics.jsonl at every step; the time of a
step is the wall clock time between the starts of two steps. The ways take turns; medians.
"""

import argparse
import functools
import logging
import os
import socket
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parents[1])
os.environ.update(DS_ACCELERATOR="cpu", OMP_NUM_THREADS="1", WANDB_MODE="disabled")

import torch

from benchmarks.record import Comparison, report
from phi3v_dist.config import load_config
from phi3v_dist.data.loader import LoadedRow
from phi3v_dist.parallel.mesh import open_mesh
from phi3v_dist.train import job, step
from phi3v_dist.train.loop import train
from shards.build import BuildOptions, build
from shards.sample import make_catalogue

BAR = 1.03


def recipe(root: Path, steps: int) -> Path:
    """configs/tiny.yaml with a larger model, on generated products."""
    import yaml

    make_catalogue(root / "catalogue", 300, seed=1)
    options = BuildOptions(group_by="product_code")
    build(str(root / "catalogue/products.csv"), str(root / "shards"), options)
    tree = yaml.safe_load((Path(__file__).parents[1] / "configs/tiny.yaml").read_text())
    model = tree["model"]["config"]
    model |= {
        "hidden_size": 384,
        "intermediate_size": 1024,
        "num_hidden_layers": 8,
        "num_attention_heads": 12,
    }
    model |= {"num_key_value_heads": 12}
    tree["runs_dir"] = str(root / "runs")
    tree["data"] |= {"path": str(root / "shards"), "seq_len": 1024, "workers": 1}
    tree["train"] |= {"steps": steps, "global_batch": 1, "warmup_steps": 1}
    tree["checkpoint"] = {"every_steps": 10**6}
    tree["eval"] = {"every_steps": 0, "loss_samples": 1, "generate_samples": 0}
    tree["track"] = {"log_every": 1, "mode": "disabled"}
    file = root / "bench.yaml"
    file.write_text(yaml.safe_dump(tree))
    return file


class Recorder:
    """Wraps functions that the loop calls. Records when each step began, its rows, and how its engine is
    made.
    """

    def __init__(self) -> None:
        self.times: list[float] = []
        self.rows: list[LoadedRow] = []
        self.make_engine: Callable[[], Any] | None = None
        self._kept = (step.learning_rate, job.load_rows, job._make_engine)

    def __enter__(self) -> "Recorder":
        learning_rate, load_rows, make_engine = self._kept

        def rate(*arguments: Any) -> float:  # called once per step
            self.times.append(time.perf_counter())
            return learning_rate(*arguments)

        def rows(*arguments: Any, **more: Any) -> Iterator[LoadedRow]:
            for row in load_rows(*arguments, **more):
                self.rows.append(row)
                yield row

        def engine(*arguments: Any, **more: Any) -> Any:
            self.make_engine = functools.partial(make_engine, *arguments, **more)
            return self.make_engine()

        step.learning_rate, job.load_rows, job._make_engine = rate, rows, engine
        return self

    def __exit__(self, *_: object) -> None:
        step.learning_rate, job.load_rows, job._make_engine = self._kept

    def seconds(self) -> list[float]:
        """The seconds of each step but the first two, and the last one, which evaluates and saves."""
        return [after - before for before, after in zip(self.times[2:], self.times[3:], strict=False)]


def be_the_only_rank() -> None:
    """Makes this process rank 0 of 1, without warnings and on one core."""
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
    os.environ["MASTER_PORT"] = str(port)


def bare(recorder: Recorder) -> list[float]:
    """The seconds of each step of the bare loop, on the recorded rows."""
    assert recorder.make_engine is not None
    engine = recorder.make_engine()
    seconds = []
    for row in recorder.rows:
        began = time.perf_counter()
        loss = engine(row=row.row)
        engine.backward(loss / row.row.num_targets)
        engine.step()
        seconds.append(time.perf_counter() - began)
    engine.destroy()
    return seconds[2:-1]


def main() -> int:
    """Runs both ways in turns. Returns the exit status."""
    parser = argparse.ArgumentParser(description="our loop against a bare DeepSpeed loop")
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json")
    options = parser.parse_args()
    be_the_only_rank()
    found: dict[str, list[float]] = {"ours": [], "bare": []}
    with tempfile.TemporaryDirectory() as folder, open_mesh(600.0) as mesh:
        file = recipe(Path(folder), options.steps)
        for turn in range(options.rounds):
            with Recorder() as recorder:
                config = load_config(file, [f"name=run{turn}"])
                (config.run_dir / "logs").mkdir(parents=True)  # as the command line does for its logs
                train(config, mesh)
            found["ours"] += recorder.seconds()
            found["bare"] += bare(recorder)
    ours, theirs = (statistics.median(found[way]) for way in ("ours", "bare"))
    comparison = Comparison(
        "time of a training step, loader and logging included",
        "a bare DeepSpeed loop on rows in memory",
        1000 * ours,
        1000 * theirs,
        "ms",
        ours / theirs,
        f"<= {BAR}",
        ours / theirs <= BAR,
    )
    return report("step_overhead", [comparison], options.json)


if __name__ == "__main__":
    sys.exit(main())
