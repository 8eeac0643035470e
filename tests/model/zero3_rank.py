"""One rank of test_zero3.py, started by torchrun: python zero3_rank.py DIRECTORY.

DIRECTORY holds `big` and `tiny`, two hub directories, and `rows.pt`, one packed row per rank. Writes
DIRECTORY/rank-R.json: what loading `big` took, whether the bits are right, and `tiny`'s losses and weights after
two steps.
"""

import gc
import json
import re
import sys
import threading
import time
from pathlib import Path

import deepspeed
import torch
import torch.distributed as dist
from safetensors import safe_open

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


class Memory:
    """What this process takes while it is open, bytes: peak growth of its private memory, and peak residence of
    mapped weight files.
    """

    def __enter__(self) -> "Memory":
        gc.collect()
        self.base = private_bytes()
        self.private = self.mapped = 0
        self.stop = False
        self.thread = threading.Thread(target=self.watch, daemon=True)
        self.thread.start()
        return self

    def watch(self) -> None:
        while not self.stop:
            self.private = max(self.private, private_bytes() - self.base)
            self.mapped = max(self.mapped, mapped_bytes())
            time.sleep(0.002)

    def __exit__(self, *exception: object) -> None:
        self.stop = True
        self.thread.join()


def private_bytes() -> int:
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"RssAnon:\s+(\d+) kB", status)[1]) * 1024


def mapped_bytes() -> int:
    maps = Path("/proc/self/smaps").read_text()
    sizes = re.findall(r"\.safetensors\n(?:[A-Z].*\n)*?Rss:\s+(\d+) kB", maps)
    return sum(map(int, sizes)) * 1024


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
    with Memory() as memory:
        big = build_model(load_config(directory / "big"), torch.float32, zero_config(torch.float32))
        load_weights(big, directory / "big")
    result |= {"private": memory.private, "mapped": memory.mapped, "tensors": len(list(big.parameters()))}
    result["held"] = sum(p.ds_tensor.nbytes for p in big.parameters())
    result["right"] = bits_are_right(big, directory / "big/model.safetensors")
    del big

    for dtype in (torch.bfloat16, torch.float32):
        model = build_model(load_config(directory / "tiny"), dtype, zero_config(dtype))
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
