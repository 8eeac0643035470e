"""The optimizer in files (ZeRO-Infinity): curve, checkpoints and resume are those of one in host memory.

Needs DeepSpeed's asynchronous I/O, which is compiled at first use for some minutes: only when asked for.
"""

import os
import shutil
from pathlib import Path

import pytest
import torch

from phi3v_dist import checkpoint
from phi3v_dist.config import load_config
from tests.train.ranks import run_ranks
from tests.train.test_train import metrics, weights


@pytest.mark.skipif(
    os.environ.get("PHI3V_NVME") != "1",
    reason="DeepSpeed compiles its async_io for some minutes; PHI3V_NVME=1 asks for it (libaio-dev needed)",
)
def test_the_optimizer_in_files_is_the_one_in_memory(tiny_config: Path, tmp_path: Path) -> None:
    """A model whose groups are large enough to be swapped (1 MB), two ranks, stopped after step 3 of 6."""
    found = {}
    for where, more in (("cpu", []), ("nvme", [f"parallel.offload_path={tmp_path / 'disk'}"])):
        options = [f"name={where}", f"parallel.offload_optimizer={where}", *more]
        options += ["eval.generate_samples=0", "train.min_lr_ratio=1", "model.config.vocab_size=4096"]
        run_ranks(tiny_config, 2, *options, "train.steps=3", limit=1500)
        run_ranks(tiny_config, 2, *options, "train.steps=6", limit=1500)
        run_dir = load_config(tiny_config, options).run_dir
        found[where] = (metrics(run_dir, "train/loss"), weights(run_dir / "checkpoints/step-000006"))
    assert any(file.stat().st_size >= 2**20 for file in (tmp_path / "disk").rglob("*.swp")), "nothing swapped"
    assert found["cpu"][0] == found["nvme"][0] and len(found["cpu"][0]) == 6
    ours, theirs = found["nvme"][1], found["cpu"][1]
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert checkpoint.read_meta(run_dir / "checkpoints/step-000006")["adam_steps"][0] == 6.0
    shutil.rmtree(tmp_path / "disk")
