"""One rank of test_zero.py, started by torchrun: python zero3_rank.py DIRECTORY.

DIRECTORY holds `big` and `tiny`, two hub directories, and `rows.pt`, one packed row per rank. Writes
DIRECTORY/rank-R.json: what loading `big` took, whether the bits are right, `tiny`'s losses of two steps; and
DIRECTORY/weights.pt, its weights after them.
"""

import gc
import json
import re
import sys
import threading
import time
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from safetensors import safe_open

from phi3v_dist.engine.zero import partitioned_parameters
from phi3v_dist.model import hub
from phi3v_dist.model.hub import build_model, load_config, load_weights

deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # needs a compiler and 24 s


def zero_config(dtype: torch.dtype) -> dict:
    return {
        "train_micro_batch_size_per_gpu": 1,
        "bf16": {"enabled": dtype == torch.bfloat16},
        "steps_per_print": 10**9,
        "zero_allow_untested_optimizer": True,
        "gradient_clipping": 0.0,
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
    }


def built(directory: Path, dtype: torch.dtype) -> Any:
    """The model of a directory, partitioned while it is built."""
    with partitioned_parameters(zero_config(dtype), dtype):
        return build_model(load_config(directory), dtype)


class Memory:
    """Peak growth of this process's private memory while it is open, bytes."""

    def __enter__(self) -> "Memory":
        gc.collect()
        self.base = private_bytes()
        self.peak = 0
        self.stop = False
        self.thread = threading.Thread(target=self.watch, daemon=True)
        self.thread.start()
        return self

    def watch(self) -> None:
        while not self.stop:
            self.peak = max(self.peak, private_bytes() - self.base)
            time.sleep(0.002)

    def __exit__(self, *exception: object) -> None:
        self.stop = True
        self.thread.join()


def private_bytes() -> int:
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"RssAnon:\s+(\d+) kB", status)[1]) * 1024


class CountingFile:
    """A safetensors handle that counts the bytes it hands out."""

    read = 0

    def __init__(self, handle: Any) -> None:
        self.handle = handle

    def keys(self) -> list[str]:
        return list(self.handle.keys())

    def get_slice(self, name: str) -> "CountingFile":
        return CountingFile(self.handle.get_slice(name))

    def get_shape(self) -> list[int]:
        return self.handle.get_shape()

    def __getitem__(self, rows: slice) -> torch.Tensor:
        values = self.handle[rows]
        CountingFile.read += values.nbytes
        return values

    def __enter__(self) -> "CountingFile":
        self.handle.__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        self.handle.__exit__(*exception)


def bits_are_right(model: torch.nn.Module, file: Path) -> bool:
    right = True
    with safe_open(file, "pt") as stored:
        for name, parameter in model.named_parameters():
            with deepspeed.zero.GatheredParameters([parameter]):
                right &= torch.equal(parameter.data, stored.get_tensor(name).to(parameter.dtype))
    return right


def main(directory: Path) -> None:
    deepspeed.init_distributed(dist_backend="gloo", verbose=False)
    rank = dist.get_rank()
    result: dict = {}
    hub.safe_open = lambda *arguments: CountingFile(safe_open(*arguments))
    with Memory() as memory:
        big = built(directory / "big", torch.float32)
        load_weights(big, directory / "big")
    hub.safe_open = safe_open
    result |= {"private": memory.peak, "read": CountingFile.read}
    result["held"] = sum(p.ds_tensor.nbytes for p in big.parameters())
    result["right"] = bits_are_right(big, directory / "big/model.safetensors")
    del big

    for dtype in (torch.bfloat16, torch.float32):
        model = built(directory / "tiny", dtype)
        load_weights(model, directory / "tiny")
        result["right"] &= bits_are_right(model, directory / "tiny/model.safetensors")
        result["right"] &= {p.dtype for p in model.parameters()} == {dtype}
        result["right"] &= model.model.rope.inv_freq().dtype == torch.float32
    rows = torch.load(directory / "rows.pt", weights_only=False)
    targets = sum(row.num_targets for row in rows)
    model.gradient_checkpointing_enable()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    engine, *_ = deepspeed.initialize(model=model, config=zero_config(torch.float32), optimizer=optimizer)
    engine.train()
    losses = []
    for _ in range(2):
        loss = engine(row=rows[rank])
        engine.backward(loss * (dist.get_world_size() / targets))
        engine.step()
        losses.append(loss.item())
    del loss
    result["losses"] = losses
    weights = {}
    for name, parameter in model.named_parameters():
        with deepspeed.zero.GatheredParameters([parameter]):
            weights[name] = parameter.data.clone()
    if rank == 0:
        torch.save(weights, directory / "weights.pt")
    (directory / f"rank-{rank}.json").write_text(json.dumps(result))
    engine.destroy()
    del engine
    gc.collect()
    dist.barrier()
    dist.destroy_process_group()


main(Path(sys.argv[1]))
