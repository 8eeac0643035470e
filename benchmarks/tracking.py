"""Step time while W&B is unreachable, answers after 10 s, or is killed, against the same steps without it.

    python benchmarks/tracking.py [--steps 12] [--pairs 4] [--json PATH]

A step is forward and backward of the model of configs/tiny.yaml on one packed row and one line of metrics.
Blocks of steps with and without W&B take turns in one process; each block has a tracker of its own. Medians
over all steps. Killed: the wandb-core process is killed after a third of the block.
"""

import argparse
import contextlib
import http.server
import logging
import os
import statistics
import sys
import tempfile
import threading
import time
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])

import psutil
import torch

from benchmarks.packing import VISION_CHUNK, documents, packed
from benchmarks.record import Comparison, report
from phi3v_dist.config import RunConfig, load_config
from phi3v_dist.model.configuration import Phi3VConfig
from phi3v_dist.model.modeling import Phi3VForCausalLM
from phi3v_dist.processor.geometry import image_token_count, tile_side_tokens
from phi3v_dist.tracking.tracker import Tracker

BAR = 1.05
DELAY_S = 10.0
UNREACHABLE = "http://127.0.0.1:9"


class Slow(http.server.BaseHTTPRequestHandler):
    """Answers every request with an error after DELAY_S."""

    def do_POST(self) -> None:
        time.sleep(DELAY_S)
        with contextlib.suppress(OSError):  # the client has left
            self.send_error(503)

    do_GET = do_POST

    def log_message(self, *_: object) -> None:
        pass


def block(step: object, config: RunConfig, folder: Path, steps: int, kill: bool) -> list[float]:
    """The seconds of each step of a block, without the start and the close of the tracker."""
    run_dir = Path(tempfile.mkdtemp(dir=folder))
    tracker = Tracker(config, run_dir, 0, about={})
    seconds = []
    for number in range(1, steps + 1):
        if kill and number == steps // 3:
            for child in psutil.Process().children():
                with contextlib.suppress(psutil.Error):  # ended already
                    if any("wandb-core" in part for part in child.cmdline()):
                        child.kill()
        began = time.perf_counter()
        step()  # type: ignore[operator]
        tracker.log(number, {"train/loss": 1.0, "perf/tokens_per_second": 1.0})
        seconds.append(time.perf_counter() - began)
    tracker.close()
    return seconds


def main() -> int:
    """Measures the three cases. Returns the exit status."""
    parser = argparse.ArgumentParser(description="step time beside a broken W&B")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--pairs", type=int, default=4)
    parser.add_argument("--json")
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    recipe = Path(__file__).parents[1] / "configs/tiny.yaml"
    fields = load_config(recipe).model.config
    model = Phi3VForCausalLM(Phi3VConfig(**{"vocab_size": 512, "pad_token_id": 0, **(fields or {})})).train()
    model.vision_chunk = VISION_CHUNK
    tile = model.config.tile
    (row,) = packed(documents(24, tile, image_token_count(1, 1, tile_side_tokens(tile))), tile)

    def step() -> None:
        model(row=row).backward()
        model.zero_grad()

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Slow)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    os.environ["WANDB_API_KEY"] = "0" * 40
    os.environ["WANDB_SILENT"] = "true"
    ways = {
        "unreachable": (UNREACHABLE, "online", False),
        "answering after 10 s": (f"http://127.0.0.1:{server.server_port}", "online", False),
        "killed": (UNREACHABLE, "offline", True),
    }
    comparisons = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        for name, (address, mode, kill) in ways.items():
            os.environ["WANDB_BASE_URL"] = address
            found: dict[str, list[float]] = {"off": [], "on": []}
            for turn in range(options.pairs + 1):
                for which in ("off", "on"):
                    way = mode if which == "on" else "disabled"
                    config = load_config(recipe, [f"track.mode={way}", "track.close_timeout_s=2"])
                    seconds = block(step, config, folder, options.steps, kill and which == "on")
                    if turn:
                        found[which] += seconds
            on, off = (statistics.median(found[which]) for which in ("on", "off"))
            comparisons.append(
                Comparison(
                    f"a step with W&B {name}",
                    "without W&B",
                    on,
                    off,
                    "s",
                    on / off,
                    f"ratio <= {BAR:g}",
                    on / off <= BAR,
                )  # fmt: skip
            )
    code = report("tracking", comparisons, options.json)
    sys.stdout.flush()
    return code


if __name__ == "__main__":
    sys.exit(main())
