"""From the command to the end of the first step: `phi3v train` against a bare script that takes one step.

    python benchmarks/start_up.py [--rounds 3] [--json PATH]

The model of configs/tiny.yaml on one rank, data of 300 generated products. Ours checks the config, data, disk
and ranks, counts the tokens of the samples, plans the rows, starts the data workers and writes the run
directory. The bare script imports torch, transformers and DeepSpeed, makes the same model and takes a step on
random text. New: a new run, including its tokenizer and first weights. Again: the same command once more,
from a checkpoint. The ways take turns; medians.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks.record import Comparison, report
from shards.build import BuildOptions, build
from shards.sample import make_catalogue

ROOT = Path(__file__).resolve().parents[1]
STEPS = 2  # that each start trains
BARE = """
import sys
import torch, torch.distributed as dist, transformers, deepspeed
from phi3v_dist.config import load_config
from phi3v_dist.model.configuration import Phi3VConfig
from phi3v_dist.model.modeling import Phi3VForCausalLM
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
deepspeed.init_distributed("gloo", verbose=False)
fields = load_config(sys.argv[1]).model.config
model = Phi3VForCausalLM(Phi3VConfig(**{"vocab_size": 512, "pad_token_id": 0, **fields}))
settings = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 3},
            "zero_allow_untested_optimizer": True}
adam = torch.optim.AdamW(model.parameters())
engine, *_ = deepspeed.initialize(model=model, optimizer=adam, config=settings)
ids = torch.randint(10, 500, (1, 1024))
loss = engine(input_ids=ids, labels=ids).loss
engine.backward(loss)
engine.step()
print("stepped", flush=True)
engine.destroy()
"""


def until(command: list[str], sign: str) -> float:
    """Seconds until the command prints a line with `sign`. The command runs to its end."""
    environment = {
        **os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "RANK": "0", "WORLD_SIZE": "1",
        "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29481",
    }  # fmt: skip
    began, seen, lines = time.perf_counter(), None, []
    with subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            lines.append(line)
            if seen is None and sign in line:
                seen = time.perf_counter() - began
    if process.returncode or seen is None:
        raise SystemExit(f"{command} failed: {''.join(lines)[-3000:]}")
    return seen


def main() -> int:
    """Runs the three ways in turns. Returns the exit status."""
    parser = argparse.ArgumentParser(description="time to the first step")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json")
    options = parser.parse_args()
    found: dict[str, list[float]] = {"new": [], "again": [], "bare": []}
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        make_catalogue(work / "catalogue", 300, seed=1)
        build(
            str(work / "catalogue/products.csv"), str(work / "shards"), BuildOptions(group_by="product_code")
        )
        for number in range(options.rounds):
            ours = [
                sys.executable,
                "-m",
                "launch.cli",
                "train",
                "configs/tiny.yaml",
                f"name=start-{number}",
            ]
            ours += [f"data.path={work / 'shards'}", f"runs_dir={work / 'runs'}", "track.mode=disabled"]
            ours += [
                "track.log_every=1",
                "train.epochs=null",
                "eval.generate_samples=0",
                "eval.loss_samples=1",
            ]
            ours += ["eval.every_steps=0", "data.seq_len=1024"]
            found["new"].append(until([*ours, f"train.steps={STEPS}"], f"step 1/{STEPS}"))
            again = [*ours, f"train.steps={2 * STEPS}"]
            found["again"].append(until(again, f"step {STEPS + 1}/{2 * STEPS}"))
            found["bare"].append(until([sys.executable, "-c", BARE, "configs/tiny.yaml"], "stepped"))
    middle = {way: statistics.median(seconds) for way, seconds in found.items()}
    peer = "a bare DeepSpeed script"
    comparisons = [
        Comparison(f"command to first step, {name}", peer, middle[way], middle["bare"], "s",
                   middle["bare"] / middle[way])
        for way, name in (("new", "a new run"), ("again", "from a checkpoint"))
    ]  # fmt: skip
    return report("start_up", comparisons, options.json)


if __name__ == "__main__":
    sys.exit(main())
