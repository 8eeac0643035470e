"""The optimizer in files (ZeRO-Infinity): curve, checkpoints and resume are those of one in host memory.

Needs DeepSpeed's asynchronous I/O, which is compiled at first use for some minutes: only when asked for.
"""

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from phi3v_dist.checkpoint import read as checkpoint
from phi3v_dist.config import load_config
from phi3v_dist.engine.nvme import swap_dir
from tests.ranks import logged, run_ranks
from tests.train.test_train import weights


def test_runs_on_one_node_have_folders_of_their_own(tiny_config: Path) -> None:
    there = ["parallel.offload_optimizer=nvme", "parallel.offload_path=/disk"]
    folders = {swap_dir(load_config(tiny_config, [*there, f"name={name}"])) for name in ("a", "b", "a")}
    assert len(folders) == 2 and {folder.parent for folder in folders} == {Path("/disk")}


@pytest.mark.system
@pytest.mark.ranks
@pytest.mark.skipif(
    os.environ.get("PHI3V_NVME") != "1",
    reason="on request: DeepSpeed compiles its async_io for some minutes; PHI3V_NVME=1 (needs libaio-dev)",
)
@pytest.mark.timeout(3600)
def test_the_optimizer_in_files_is_the_one_in_memory(tiny_config: Path, tmp_path: Path) -> None:
    """A model whose groups are large enough to be swapped (1 MB), two ranks, stopped after step 3 of 6.

    Between the two starts lies what one leaves that was killed: files of the optimizer, torch's lock file.
    """
    found = {}
    disk = tmp_path / "disk"
    for where, more in (("cpu", []), ("nvme", [f"parallel.offload_path={disk}"])):
        options = [f"name={where}", f"parallel.offload_optimizer={where}", *more]
        options += ["eval.generate_samples=0", "train.min_lr_ratio=1", "model.config.vocab_size=4096"]
        run_dir = load_config(tiny_config, options).run_dir
        with largest_swapped(disk) as sizes:
            run_ranks(tiny_config, 2, *options, "train.steps=3", limit=1500)
            if where == "nvme":
                left = (
                    swap_dir(load_config(tiny_config, options)) / "zero_stage_3/optimizer/rank7/0.tensor.swp"
                )
                left.parent.mkdir(parents=True)
                left.write_bytes(b"old")
                (locked,) = disk.glob("extensions/*/async_io")
                (locked / "lock").touch()
            run_ranks(tiny_config, 2, *options, "train.steps=6", limit=300)
        assert (max(sizes, default=0) >= 2**20) == (where == "nvme"), "swapped where it should not be, or not"
        found[where] = (logged(run_dir, "train/loss"), weights(run_dir / "checkpoints/step-000006"))
    assert [each.name for each in disk.iterdir()] == ["extensions"], "files of the optimizer are left"
    assert found["cpu"][0] == found["nvme"][0] and len(found["cpu"][0]) == 6
    ours, theirs = found["nvme"][1], found["cpu"][1]
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert checkpoint.read_meta(run_dir / "checkpoints/step-000006").adam_steps[0] == 6.0


@contextmanager
def largest_swapped(disk: Path) -> Iterator[list[int]]:
    """Sizes of the swapped files that were seen meanwhile."""
    seen: list[int] = []
    over = threading.Event()

    def look() -> None:
        while not over.wait(0.05):
            for file in disk.rglob("*.swp"):
                try:
                    seen.append(file.stat().st_size)
                except FileNotFoundError:
                    continue

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield seen
    finally:
        over.set()
        thread.join()
