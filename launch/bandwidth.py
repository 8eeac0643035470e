"""One rank of `phi3v doctor --bandwidth`: all-reduces 64 MB a few times; rank 0 writes the rate to a file."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

from launch.torchrun.watch import watch_parent

FLOATS, ROUNDS = 16 << 20, 5


def main(result: Path) -> None:
    """Writes "X GB/s" to `result`: the bus bandwidth, 2 (n - 1) / n of the bytes, as nccl-tests defines
    it.
    """
    import torch
    import torch.distributed as dist

    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if on_gpu else "gloo")
    values = torch.ones(FLOATS, device=device)
    dist.all_reduce(values)
    if on_gpu:
        torch.cuda.synchronize()
    began = time.perf_counter()
    for _ in range(ROUNDS):
        dist.all_reduce(values)
    if on_gpu:
        torch.cuda.synchronize()
    seconds = (time.perf_counter() - began) / ROUNDS
    world = dist.get_world_size()
    if dist.get_rank() == 0:
        result.write_text(f"{4 * FLOATS * 2 * (world - 1) / max(world, 1) / seconds / 1e9:.1f} GB/s")
    dist.destroy_process_group()


if __name__ == "__main__":
    watch_parent()
    main(Path(sys.argv[1]))
