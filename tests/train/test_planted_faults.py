"""What a tired engineer meets in a whole run: an image bomb in the data, a disk that fills up, a kill -9."""

import io
import json
import os
import time
from pathlib import Path

import pytest
import yaml
from PIL import Image
from webdataset.writer import TarWriter

from benchmarks import chaos
from phi3v_dist.checkpoint import read as checkpoint
from phi3v_dist.config import load_config
from phi3v_dist.exits import DIVERGED, DONE, USAGE, recorded_exit
from shards.index import IndexOptions, build_index
from tests.conftest import tiny_tree
from tests.ranks import finish, start_ranks

# several starts one after the other; ranks that share cores with others are slow
pytestmark = [pytest.mark.ranks, pytest.mark.timeout(420)]

QUICK = ["eval.generate_samples=0", "eval.loss_samples=2"]


def bomb(side: int) -> bytes:
    """A PNG of a few hundred kB that decodes to side x side pixels of one colour."""
    data = io.BytesIO()
    Image.new("1", (side, side)).save(data, "PNG")
    return data.getvalue()


def test_an_image_bomb_costs_its_sample_or_ends_the_run_in_one_line(products: Path, tmp_path: Path) -> None:
    """Tars of another writer; the index was told to let a picture of 144 million pixels pass."""
    root = tmp_path / "foreign"
    root.mkdir()
    with TarWriter(str(root / "000.tar")) as tar:
        for number in range(24):
            data = io.BytesIO()
            Image.new("RGB", (60 + number, 40), (number * 10, 99, 30)).save(data, "JPEG")
            tar.write({"__key__": f"{number:03d}", "jpg": data.getvalue(), "txt": f"a sheet number {number}"})
        tar.write({"__key__": "bomb", "png": bomb(12_000), "txt": "a bomb"})
    build_index(str(root), IndexOptions(prompt="What?", answer="{txt}", val_fraction=0, max_pixels=10**9))
    tree = tiny_tree(root, tmp_path / "runs")
    tree["data"] |= {"val_split": "train", "max_bad_fraction": 0.5}
    config = tmp_path / "tiny.yaml"
    config.write_text(yaml.safe_dump(tree))
    run_dir = load_config(config).run_dir

    code, output = finish(start_ranks(config, 1, *QUICK, "train.steps=4", "data.workers=1"))
    assert code == 0 and "12000x12000 px" in output, output[-3000:]
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["data/bad_samples"] >= 1

    began = time.time()
    strict = ["name=strict", "data.max_bad_fraction=0", "train.steps=4"]
    code, output = finish(start_ranks(config, 1, *QUICK, *strict))
    assert recorded_exit(run_dir.with_name("strict"), began) == DIVERGED, output[-3000:]
    assert "data.max_bad_fraction" in output and "bomb" in output


def fill(disk: Path, leave: int) -> None:
    """Takes the room of `disk` but `leave` bytes."""
    free = os.statvfs(disk)
    with (disk / "ballast").open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, free.f_bavail * free.f_frsize - leave)


@pytest.mark.system
def test_a_disk_that_fills_up_ends_the_run_with_the_last_checkpoint_whole(
    products: Path, tmp_path: Path, small_disk: Path
) -> None:
    """Full at the start: refused. Later: warned of, then an end. Room again: goes on."""
    config = tmp_path / "tiny.yaml"
    config.write_text(yaml.safe_dump(tiny_tree(products, small_disk / "runs")))
    run_dir = load_config(config).run_dir
    command = [*QUICK, "train.steps=400", "checkpoint.every_steps=2", "checkpoint.max_failures=2"]

    fill(small_disk, 2_000_000)
    began = time.time()
    code, output = finish(start_ranks(config, 1, *command))
    assert recorded_exit(run_dir, began) == USAGE and "are needed for two checkpoints" in output, output[
        -3000:
    ]
    (small_disk / "ballast").unlink()

    began = time.time()
    process = start_ranks(config, 1, *command, "checkpoint.keep_last=1")
    deadline = time.monotonic() + 100
    while checkpoint.newest(run_dir / "checkpoints") is None and time.monotonic() < deadline:
        time.sleep(0.02)
    fill(small_disk, 100_000)
    code, output = finish(process)
    assert recorded_exit(run_dir, began) == USAGE, output[-3000:]
    assert "CHECKPOINT NOT WRITTEN (1 in a row, the run ends at 2)" in output and "No space left" in output
    assert "2 checkpoints in a row" in output
    good = checkpoint.newest(run_dir / "checkpoints")
    assert good is not None

    (small_disk / "ballast").unlink()
    step = checkpoint.step_of(good)
    began = time.time()
    code, output = finish(start_ranks(config, 1, *QUICK, f"train.steps={step + 2}"))
    assert recorded_exit(run_dir, began) == DONE, output[-3000:]
    assert f"step-{step:06d}" in output


def test_a_kill_of_the_launcher_at_a_random_moment_changes_nothing(tmp_path: Path) -> None:
    """The short form of benchmarks/chaos.py: one kill (test_faults has that of a rank in a save)."""
    config = chaos.tiny_run(tmp_path)
    began = time.monotonic()
    assert chaos.start(config, "straight", 2).wait(chaos.LIMIT_S) == 0
    length = time.monotonic() - began
    number = chaos.KINDS.index("launcher")
    found = chaos.trial(number, config, 2, tmp_path / "runs/straight", length, seed=5)
    assert found.fault is None, found
