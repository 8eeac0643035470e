"""What happens to real ranks: killed, asleep, told to stop, without data, with numbers that are none. Each
run ends as docs/faults.md says, leaves nothing behind, and the same command goes on as if nothing had been.
"""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
import yaml

from phi3v_dist.checkpoint import read as checkpoint
from phi3v_dist.config import load_config
from phi3v_dist.data.plan import MicroRow
from phi3v_dist.data.prepare import prepare_data
from phi3v_dist.exits import CRASHED, DIVERGED, DONE, PREEMPTED, USAGE, recorded_exit
from phi3v_dist.pretrained import model_config_of
from phi3v_dist.processor.tokenizer import load_tokenizer
from phi3v_dist.replay import Place, describe, replay, row_loss
from shards.common.errors import BadInputError
from tests.conftest import tiny_tree
from tests.ranks import WARM, finish, logged
from tests.waiting import wait_for

# several starts one after the other; ranks that share cores with others are slow
pytestmark = [pytest.mark.ranks, pytest.mark.timeout(420)]

FAULTY = Path(__file__).with_name("faulty_rank.py")
QUICK = ("eval.generate_samples=0", "eval.loss_samples=2", "train.steps=6")


class Job:
    """Ranks of one config that something happens to."""

    def __init__(self, config: Path, name: str = "tiny") -> None:
        self.config, self.name = config, name
        self.run_dir = load_config(config).run_dir.with_name(name)
        self.began = time.time()

    def start(
        self, ranks: int, faults: str, *overrides: str, options: tuple[str, ...] = ()
    ) -> subprocess.Popen[str]:
        self.began = time.time()
        command = [sys.executable, str(WARM), "--standalone", *options]
        command += [f"--nproc-per-node={ranks}", str(FAULTY), faults, "train", str(self.config)]
        return subprocess.Popen(
            [*command, *QUICK, f"name={self.name}", *overrides],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
            env={**os.environ, "DS_ACCELERATOR": "cpu"},
        )

    def run(
        self, ranks: int, faults: str, *overrides: str, options: tuple[str, ...] = (), limit: float = 150
    ) -> tuple[int | None, str]:
        """The exit code that rank 0 recorded, and all output; nothing is left running."""
        process = self.start(ranks, faults, *overrides, options=options)
        code, output = finish(process, limit)
        assert not self.left(), "processes were left running"
        recorded = recorded_exit(self.run_dir, self.began)
        assert (code == 0) == (recorded == DONE), output[-3000:]
        return recorded, output

    def left(self) -> list[str]:
        """Command lines of this run's processes."""
        lines = [" ".join(p.info["cmdline"] or []) for p in psutil.process_iter(["cmdline"])]
        return [line for line in lines if str(self.config) in line]

    def weights(self, step: int) -> dict[str, torch.Tensor]:
        return dict(checkpoint.read_tensors(self.run_dir / "checkpoints" / checkpoint.checkpoint_name(step)))

    def losses(self) -> dict[int, float]:
        return logged(self.run_dir, "train/loss")


def same(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> bool:
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.fixture(scope="module")
def straight(products: Path, tmp_path_factory: pytest.TempPathFactory) -> Job:
    """A run on two ranks that nothing happens to but a third step without a finite loss."""
    work = tmp_path_factory.mktemp("straight")
    (work / "tiny.yaml").write_text(yaml.safe_dump(tiny_tree(products, work / "runs")))
    job = Job(work / "tiny.yaml")
    code, output = job.run(2, "nan:0:2")
    assert code == DONE and "step 2: the loss is nan; skipped on all ranks (1 in a row)" in output
    return job


def test_a_step_without_a_finite_loss_is_skipped(straight: Job) -> None:
    assert list(straight.losses()) == [1, 2, 4, 5, 6], "the skipped step has no loss"
    meta = checkpoint.read_meta(straight.run_dir / "checkpoints/step-000006")
    assert meta.progress.skipped_steps == 1 and meta.progress.bad_streak == 0
    assert set(meta.adam_steps) == {5.0}


def test_the_rows_of_a_skipped_step_are_noted_and_found_again(straight: Job) -> None:
    notes = (straight.run_dir / "logs/rows-rank-0.jsonl").read_text().splitlines()
    assert [json.loads(line)["micro"] for line in notes] == [0, 1]
    assert not (straight.run_dir / "logs/rows-rank-1.jsonl").exists(), "its rows were good"
    note = json.loads(notes[1])
    again = replay(load_config(straight.config), Place(note["step"], note["rank"], note["micro"], 2))
    assert list(again.keys) == note["keys"]
    assert "Price:" in "".join(describe(again))
    assert row_loss(again, straight.run_dir) > 0


def test_ranks_that_die_sleep_or_stall_lose_nothing(tiny_config: Path, straight: Job) -> None:
    """One start after another in one directory; the end is that of the undisturbed run, bit for bit."""
    # killed in a save, then brought back by torchrun alone, then a rank that sleeps for ever
    job = Job(tiny_config)
    code, output = job.run(
        2,
        "nan:0:2,SIGKILL:1:3:save,sleep:1:4:forward and backward",
        "checkpoint.async=true",
        "parallel.timeout_s=8",
        options=("--max-restarts=1",),
        limit=400,
    )
    assert code == CRASHED
    assert "silent: rank 1 on" in output and "in step 4 (forward and backward)" in output
    assert "lost its peers" in json.loads((job.run_dir / "exit.json").read_text())["reason"]

    # data that does not come any more, and then the order to stop
    process = job.start(2, "nan:0:2,stall:1", "parallel.timeout_s=60", "checkpoint.every_steps=1")
    try:
        wait_for((tiny_config.parent / "stalled").exists, 90, "the stall")
        process.send_signal(signal.SIGTERM)
    finally:
        code, output = finish(process, 60)
    assert recorded_exit(job.run_dir, job.began) == PREEMPTED and "not completed, data did not come" in output
    assert not job.left()
    assert "resuming from" in job.run(2, "nan:0:2")[1]
    assert same(job.weights(6), straight.weights(6)) and job.losses() == straight.losses()


def test_any_number_of_ranks_goes_on_where_another_stopped(tiny_config: Path, straight: Job) -> None:
    """2 -> 4 -> 1 -> 2 that share rows -> 2 ranks: every row once, the same losses."""
    job = Job(tiny_config)
    for ranks, step, overrides in (
        (2, 1, ()),
        (4, 2, ()),
        (1, 3, ()),
        (2, 4, ("parallel.sp=2",)),
        (2, 9, ()),
    ):
        code, output = job.run(ranks, f"nan:0:2,SIGUSR1:0:{step}:end of the step", *overrides, limit=400)
        assert code == (DONE if step == 9 else PREEMPTED), output[-3000:]
    assert list(job.losses()) == [1, 2, 4, 5, 6]
    assert list(job.losses().values()) == pytest.approx(list(straight.losses().values()), rel=1e-5)
    metas = [checkpoint.read_meta(each.run_dir / "checkpoints/step-000006") for each in (job, straight)]
    assert metas[0].progress == metas[1].progress and metas[0].progress.rows == 24
    assert metas[0].groups == metas[1].groups and len({g["weight_decay"] for g in metas[0].groups}) == 2
    ours, theirs = job.weights(6), straight.weights(6)
    assert max(float((ours[name] - theirs[name]).abs().max()) for name in theirs) < 1e-4


@pytest.mark.parametrize("place", ["backward", "end of the step", "evaluation", "save"])
def test_a_signal_anywhere_ends_with_a_checkpoint_after_a_step_at_most(tiny_config: Path, place: str) -> None:
    job = Job(tiny_config)
    code, output = job.run(
        1, f"SIGTERM:0:2:{place}", "train.steps=40", "eval.every_steps=2", "checkpoint.every_steps=2"
    )
    assert code == PREEMPTED, output[-3000:]
    newest = checkpoint.newest(job.run_dir / "checkpoints")
    assert newest is not None and checkpoint.step_of(newest) in (2, 3, 4)
    assert ("evaluation interrupted" in output) == (place == "evaluation")
    assert f"stopped by a signal after step {checkpoint.step_of(newest)} of 40" in output


def test_an_evaluation_that_was_broken_off_is_made_by_the_next_start(tiny_config: Path) -> None:
    """That of the last step: nothing is left to train, and the best is only known after it."""
    job = Job(tiny_config)
    steps = ("train.steps=2", "eval.every_steps=0", "checkpoint.every_steps=9")
    code, output = job.run(2, "SIGTERM:0:2:evaluation", *steps)
    assert code == PREEMPTED and "the next start makes it" in output
    assert list(job.losses()) == [1]
    code, output = job.run(2, "none:9", *steps)
    assert code == DONE and "step 2  eval/loss" in output
    _, line = map(json.loads, (job.run_dir / "metrics.jsonl").read_text().splitlines())
    assert line["train/global_step"] == 2 and line["train/loss"] > 0 and line["eval/loss"] > 0
    assert json.loads((job.run_dir / "eval/best.json").read_text())["step"] == 2
    assert checkpoint.best(job.run_dir / "checkpoints") == job.run_dir / "checkpoints/step-000002"
    assert not (job.run_dir / "eval/owed.json").exists()
    assert "already finished" in job.run(1, "none:9", *steps)[1]


def test_numbers_that_stay_bad_end_the_run_with_the_weights_as_they_were(tiny_config: Path) -> None:
    job = Job(tiny_config)
    code, output = job.run(2, "nans:0,nans:1", "train.max_bad_steps=3", "train.steps=9", "parallel.sp=2")
    assert code == DIVERGED
    assert not (job.run_dir / "logs/rows-rank-1.jsonl").exists(), "the two ranks share their rows"
    notes = (job.run_dir / "logs/rows-rank-0.jsonl").read_text().splitlines()
    assert {(json.loads(note)["rank"], json.loads(note)["row_loss"]) for note in notes} == {(0, "nan")}
    assert "and 3 steps in a row were skipped" in output
    first = checkpoint.newest(job.run_dir / "checkpoints")
    assert first is None, "nothing was learnt, nothing is to be saved"


def test_a_file_stop_and_a_signal_before_the_first_step(tiny_config: Path) -> None:
    job = Job(tiny_config)
    job.run_dir.mkdir(parents=True)
    (job.run_dir / "STOP").touch()
    code, output = job.run(1, "none:9")
    assert code == PREEMPTED and "stopped before the first step" in output
    assert not (job.run_dir / "STOP").exists() and not (job.run_dir / "checkpoints").exists()


def test_a_row_of_a_prolonged_run_is_found_again(tiny_config: Path) -> None:
    """A part of an epoch ends with a short step, behind which the rows of the whole one go on."""
    job = Job(tiny_config)
    whole = ("train.steps=null", "train.epochs=1", "data.shuffle=false")
    assert job.run(1, "none:9", *whole[:1], "train.epochs=0.3", *whole[2:])[0] == DONE
    short = checkpoint.newest(job.run_dir / "checkpoints")
    assert short is not None
    progress = checkpoint.read_meta(short).progress
    assert progress.rows % 4, "the last step is a short one"
    assert job.run(1, "none:9", *whole)[0] == DONE
    config = load_config(job.run_dir / "config.yaml")
    keys = [replay(config, Place(progress.step, 0, micro, 1)).keys for micro in range(4)]
    plan = prepare_data(
        config, load_tokenizer(job.run_dir / "tokenizer"), model_config_of(config).tile,
        directory=job.run_dir / "plan", writer=False,
    )  # fmt: skip
    rows = plan.plan.step(progress.rows).rows
    assert sorted(keys) == sorted(tuple(plan.maker.keys(MicroRow(row, 1))) for row in rows)
    with pytest.raises(BadInputError, match="the run ends before step 99"):
        replay(config, Place(99, 0, 0, 1))


def test_ranks_that_are_not_alike_are_refused_by_name(tiny_config: Path) -> None:
    code, output = Job(tiny_config).run(2, "config:1")
    assert code == USAGE
    assert "rank 1 (" in output and "train.lr is 0.123 there, 0.0015 here" in output


def test_what_one_rank_alone_cannot_use_is_said_by_all(tiny_config: Path) -> None:
    elsewhere = tiny_config.with_name("elsewhere")
    elsewhere.mkdir()
    code, output = Job(tiny_config).run(2, "data:1")
    assert code == USAGE
    assert f"phi3v: rank 1 ({socket.gethostname()}): {elsewhere}" in output


def test_storage_that_fails_before_the_first_step_is_one_line(tiny_config: Path) -> None:
    job = Job(tiny_config)
    job.run_dir.mkdir(parents=True)
    (job.run_dir / "plan").write_text("a file, where no directory can be made")
    code, output = job.run(2, "none:9")
    assert code == USAGE and f"phi3v: {job.run_dir / 'plan'}: File exists; fix the storage" in output


def test_an_evaluation_that_fails_costs_the_run_nothing_else(tiny_config: Path) -> None:
    job = Job(tiny_config)
    answering = ("eval.loss_samples=1", "eval.generate_samples=3", "eval.every_steps=1")
    code, output = job.run(2, "none:9", *answering, "train.steps=1", "eval.metrics=[json:loads]")
    assert code == DONE, output[-3000:]
    assert "step 1: NO SCORES of the answers: metric loads failed" in output
    shutil.move(job.run_dir / "eval/best.json", job.run_dir / "best.json")
    (job.run_dir / "eval").rmdir()
    (job.run_dir / "eval").write_text("a file, where no directory can be made")
    code, output = job.run(2, "none:9", *answering, "train.steps=2", "eval.best_metric=null")
    assert code == DONE and "the answers cannot be written" in output
    (job.run_dir / "eval").unlink()
    code, output = job.run(1, "none:9", *answering, "train.steps=3")
    lines = [json.loads(line) for line in (job.run_dir / "metrics.jsonl").read_text().splitlines()]
    assert [("eval/loss" in line, "eval/exact_match" in line) for line in lines] == [
        (True, False), (True, True), (True, True),
    ]  # fmt: skip
    predictions = (job.run_dir / "eval/step-000003/predictions.jsonl").read_text().splitlines()
    assert len(predictions) == 2, "all of the split, though only one sample has its loss taken"
