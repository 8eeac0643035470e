"""`phi3v train` with parallel.sp: the same curve, checkpoints that go from one sp to another, evaluation."""

import shutil
from pathlib import Path

import pytest

from phi3v_dist.config import load_config
from tests.ranks import finish, logged, run_ranks, start_ranks

pytestmark = [pytest.mark.ranks, pytest.mark.timeout(420)]  # three runs one after the other


def test_sp_1_then_2_then_1_draws_one_curve(tiny_config: Path) -> None:
    run_dir = load_config(tiny_config).run_dir
    checkpoints = run_dir / "checkpoints"
    every = ["checkpoint.every_steps=2", "checkpoint.keep_last=5", "model.gradient_checkpointing=true"]
    run_ranks(tiny_config, 2, *every)
    straight = {key: logged(run_dir, key) for key in ("train/loss", "train/tokens_seen", "eval/loss")}
    assert list(straight["train/loss"]) == [1, 2, 3, 4, 5, 6]

    for step in (4, 6):
        shutil.rmtree(checkpoints / f"step-{step:06d}")
    features = ["parallel.tile_mlp=64", "parallel.offload_checkpoints=true", "parallel.offload_optimizer=cpu"]
    output = run_ranks(tiny_config, 2, *every, "parallel.sp=2", *features)
    assert "resuming from" in output and "step-000002" in output
    for key, values in straight.items():
        assert logged(run_dir, key) == pytest.approx(values, rel=1e-5), key

    shutil.rmtree(checkpoints / "step-000006")
    run_ranks(tiny_config, 2, *every)
    for key, values in straight.items():
        assert logged(run_dir, key) == pytest.approx(values, rel=1e-5), key


def test_sp_that_does_not_divide_the_ranks_is_refused(tiny_config: Path) -> None:
    code, output = finish(start_ranks(tiny_config, 2, "parallel.sp=4"))
    assert code != 0
    assert "parallel.sp=4 does not divide the 2 ranks" in output and "use 2" in output
    assert not (load_config(tiny_config).run_dir / "init").exists()
