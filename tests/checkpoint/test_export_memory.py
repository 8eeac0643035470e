"""Export of a checkpoint many times as large as the memory it may take."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import safe_open

from phi3v_dist.checkpoint.manifest import lay_out, seal, sum_file, write_tensors
from phi3v_dist.checkpoint.meta import FORMAT, META
from phi3v_dist.model.configuration import Phi3VConfig
from phi3v_dist.model.hub import expected_shapes
from phi3v_dist.processor.tokenizer import train_tokenizer

RANKS = 2
# Exports in a process of its own; prints by how much its own memory (not the mapped files) grew at most.
EXPORT = """
import re, sys, threading
from pathlib import Path
from phi3v_dist.export import export
from phi3v_dist.checkpoint.restore import find_source

def anonymous():
    return int(re.search(r"RssAnon:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024

source, seen, done = find_source(sys.argv[1]), [anonymous()], threading.Event()
def watch():
    while not done.wait(0.002):
        seen.append(anonymous())
watcher = threading.Thread(target=watch)
watcher.start()
export(source, Path(sys.argv[2]), max_shard_bytes=20_000_000)
done.set()
watcher.join()
print(max(seen) - seen[0])
"""


def large_config() -> Phi3VConfig:
    return Phi3VConfig(
        vocab_size=64, hidden_size=1024, intermediate_size=4096, num_hidden_layers=8, num_attention_heads=8,
        pad_token_id=0, rope_scaling=None,
        clip_vision_config={
            "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
            "image_size": 112,
        },
    )  # fmt: skip


def write_checkpoint(target: Path, config: Phi3VConfig) -> int:
    """As a run on two ranks leaves it, its moments left out; the bytes of the weights."""
    shapes = expected_shapes(config)
    widths = {name: -(-torch.Size(shape).numel() // RANKS) for name, shape in shapes.items()}
    train_tokenizer(["a b c"], target, 40)
    slots = lay_out([(f"master/{name}", torch.float32, width) for name, width in widths.items()])
    files = []
    for rank in range(RANKS):

        def data(rank: int = rank) -> Iterator[torch.Tensor]:
            for number, slot in enumerate(slots):
                yield torch.full((widths[slot.name.removeprefix("master/")],), float(rank + number))

        files.append(write_tensors(target / f"rank-{rank:05d}.safetensors", slots, data()))
    settings = {"name": "large", "model": {"dtype": "bfloat16", "path": None}, "data": {"train_split": "t"}}
    meta = {
        "format": FORMAT,
        "world_size": RANKS,
        "frozen_sums": None,
        "num_crops": 1,
        "run": {"config": settings, "data_fingerprint": "x", "versions": {}},
        "model_config": json.loads(config.to_json_string()),
        "progress": {"step": 1, "tokens": 1, "images": 1},
        "parameters": {name: {"shape": list(shape), "frozen": False} for name, shape in shapes.items()},
    }
    (target / META).write_text(json.dumps(meta))
    others = [sum_file(path) for path in target.iterdir() if not path.name.startswith("rank-")]
    seal(target, [*files, *others])
    return 4 * sum(torch.Size(shape).numel() for shape in shapes.values())


def test_memory_is_that_of_a_shard_and_a_tensor(tmp_path: Path) -> None:
    target = tmp_path / "run/checkpoints/step-000001"
    target.mkdir(parents=True)
    held = write_checkpoint(target, large_config())
    command = [sys.executable, "-c", EXPORT, str(target), str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    grown = int(done.stdout.split()[-1])
    # The largest tensor is 34 MB in float32, and there twice; 20 MB of a shard wait beside it.
    assert held > 400e6 and grown < 0.35 * held, f"{grown / 1e6:.0f} MB for {held / 1e6:.0f} MB of weights"
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    last = "model.layers.7.mlp.gate_up_proj.weight"
    with safe_open(tmp_path / "out" / index["weight_map"][last], "pt") as file:
        assert file.get_tensor(last).dtype == torch.bfloat16
    assert len(set(index["weight_map"].values())) > 10
