"""Where the time of a training step goes: the parts of our loop, as shares of the step.

    python benchmarks/profile_loop.py [--steps 16] [--markdown PATH]

The run of benchmarks/step_overhead.py (20M parameters, 1,024 positions, one rank, ZeRO-3, one data worker).
Each function that the loop calls is wrapped to measure its time, on a CPU, where nothing is asynchronous.
"The rest" is what the loop itself does between those calls.
"""

import argparse
import functools
import os
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parents[1])
os.environ.update(DS_ACCELERATOR="cpu", OMP_NUM_THREADS="1", WANDB_MODE="disabled")


from benchmarks.step_overhead import Recorder, be_the_only_rank, recipe
from phi3v_dist.config import load_config
from phi3v_dist.parallel.mesh import Mesh, open_mesh
from phi3v_dist.tracking.tracker import Tracker
from phi3v_dist.train import step
from phi3v_dist.train.feed import Feed
from phi3v_dist.train.loop import train


class Clock:
    """The seconds of each part, summed over all steps while `on` is set."""

    def __init__(self) -> None:
        self.parts: dict[str, float] = defaultdict(float)
        self.on = False

    def timed(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(call)
        def wrapper(*arguments: Any, **more: Any) -> Any:
            began = time.perf_counter()
            try:
                return call(*arguments, **more)
            finally:
                if self.on:
                    self.parts[name] += time.perf_counter() - began

        return wrapper


@contextmanager
def watched(clock: Clock) -> Iterator[None]:
    """Measures the parts of the loop with `clock` while the context is open."""
    from deepspeed.runtime.engine import DeepSpeedEngine

    places: list[tuple[Any, str, str]] = [
        (DeepSpeedEngine, "forward", "forward"),
        (DeepSpeedEngine, "backward", "backward, gradients reduced"),
        (DeepSpeedEngine, "step", "optimizer"),
        (DeepSpeedEngine, "get_global_grad_norm", "gradient norm"),
        (Feed, "next", "waiting for data"),
        (Mesh, "sum", "agreement of the ranks"),
        (Tracker, "log", "metrics.jsonl and W&B"),
    ]
    kept = [(owner, name, getattr(owner, name)) for owner, name, _ in places]
    for owner, name, part in places:
        setattr(owner, name, clock.timed(part, getattr(owner, name)))
    try:
        yield
    finally:
        for owner, name, call in kept:
            setattr(owner, name, call)


def main() -> int:
    """Runs the loop once and prints the table. Returns the exit status."""
    parser = argparse.ArgumentParser(description="where the time of a step goes")
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--markdown", type=Path)
    options = parser.parse_args()
    be_the_only_rank()
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder, open_mesh(600.0) as mesh:
        config = load_config(recipe(Path(folder), options.steps + 3), ["name=profile"])
        (config.run_dir / "logs").mkdir(parents=True)
        with watched(clock), Recorder() as recorder:
            counted = step.learning_rate

            def rate(*arguments: Any) -> float:  # leaves out the first two steps and the last one
                value = counted(*arguments)
                clock.on = 3 <= len(recorder.times) < options.steps + 3
                return value

            step.learning_rate = rate
            train(config, mesh)
        total = recorder.times[options.steps + 2] - recorder.times[2]
    lines = ["| part of a step | share |", "|---|---|"]
    for name, seconds in sorted(clock.parts.items(), key=lambda item: -item[1]):
        lines.append(f"| {name} | {seconds / total:.1%} |")
    lines.append(f"| the rest of the loop | {1 - sum(clock.parts.values()) / total:.1%} |")
    print("\n".join(lines))
    if options.markdown:
        options.markdown.write_text("\n".join(lines) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
