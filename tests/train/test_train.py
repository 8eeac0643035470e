"""The loop on real ranks: the same curve as plain torch, exact resume, agreement to stop, refusals."""

import os
import shutil
import signal
import time
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
import torch
import yaml

from phi3v_dist.checkpoint import read as checkpoint
from phi3v_dist.checkpoint.restore import find_source, restore
from phi3v_dist.config import load_config
from phi3v_dist.data.epoch import Layout
from phi3v_dist.data.loader import RowMaker, load_rows
from phi3v_dist.data.plan import Plan, RankRows
from phi3v_dist.data.samples import read_samples
from phi3v_dist.data.tokens import Counter, sample_costs
from phi3v_dist.exits import DIVERGED, DONE, PREEMPTED, USAGE, recorded_exit
from phi3v_dist.export import export, verify
from phi3v_dist.model.groups import choose_learning
from phi3v_dist.model.hub import build_model, load_weights
from phi3v_dist.model.hub import load_config as load_model_config
from phi3v_dist.processor.tokenizer import load_tokenizer
from phi3v_dist.tracking.tracker import read_metrics
from phi3v_dist.tracking.wandb_file import history
from phi3v_dist.train.optim import learning_rate, parameter_groups, set_learning_rate
from shards.common.errors import BadInputError
from shards.format.index import read_index
from tests.conftest import tiny_tree
from tests.ranks import finish, logged, run_ranks, start_ranks

# several starts one after the other; ranks that share cores with others are slow
pytestmark = [pytest.mark.ranks, pytest.mark.timeout(420)]


def weights(target: Path) -> dict[str, torch.Tensor]:
    return dict(checkpoint.read_tensors(target))


def plain_losses(config_path: Path, init: Path) -> list[float]:
    """The same run as a plain torch loop on one process, one row at a time."""
    config = load_config(config_path)
    model = build_model(load_model_config(init), torch.float32)
    load_weights(model, init)
    choose_learning(model, config.model, config.seed)
    tokenizer = load_tokenizer(init)
    samples = read_samples(config.data.paths, "train")
    costs = sample_costs(samples, Counter(tokenizer, 1, 112))
    layout = Layout(samples.shard_numbers(), samples.bounds())
    plan = Plan(
        costs, config.data.seq_len, config.seed, global_batch=config.train.global_batch, layout=layout
    )
    maker = RowMaker(samples, tokenizer, 1, tile=112)
    steps = config.train.steps or 0
    mine = RankRows(plan, dp_rank=0, dp_size=1, vision_chunk=64, first_row=0, steps=steps)
    rows = load_rows(maker, mine, 0, prefetch=1, timeout_s=60)
    groups = parameter_groups(model, config.train)
    optimizer = torch.optim.AdamW(
        groups, betas=(config.train.betas[0], config.train.betas[1]), eps=config.train.eps
    )
    losses = []
    for step in range(config.train.steps or 0):
        targets = plan.step(step * config.train.global_batch).targets
        loss = torch.zeros(())
        for _ in range(config.train.global_batch):
            part = model(row=next(rows).row) / targets
            part.backward()
            loss += part.detach()
        losses.append(float(loss))
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.train.grad_clip)
        set_learning_rate(optimizer.param_groups, learning_rate(step, config.train.steps or 0, config.train))
        optimizer.step()
        optimizer.zero_grad()
    return losses


@dataclass(frozen=True)
class Trained:
    """Six steps on two ranks, checkpoints after 3 and 6. Read only: tests that go further take a `copy`."""

    config: Path
    run_dir: Path
    output: str
    losses: dict[int, float]
    weights: dict[str, torch.Tensor]

    def copy(self, work: Path, *, without_last: bool = False) -> Path:
        """The run in directory `work`, and its config; returns the config."""
        shutil.copytree(self.run_dir.parent, work / "runs")
        config = work / self.config.name
        config.write_text(
            yaml.safe_dump(yaml.safe_load(self.config.read_text()) | {"runs_dir": f"{work}/runs"})
        )
        if without_last:
            shutil.rmtree(load_config(config).run_dir / "checkpoints/step-000006")
        return config


@pytest.fixture(scope="module")
def trained(products: Path, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    work = tmp_path_factory.mktemp("trained")
    config = work / "tiny.yaml"
    config.write_text(yaml.safe_dump(tiny_tree(products, work / "runs")))
    run_dir = load_config(config).run_dir
    output = run_ranks(config, 2)
    final = weights(run_dir / "checkpoints/step-000006")
    return Trained(config, run_dir, output, losses=logged(run_dir, "train/loss"), weights=final)


def test_two_ranks_learn_as_plain_torch(trained: Trained) -> None:
    assert list(trained.losses) == [1, 2, 3, 4, 5, 6]
    plain = plain_losses(trained.config, trained.run_dir / "init")
    assert list(trained.losses.values()) == pytest.approx(plain, rel=2e-5)


def test_a_run_ends_with_an_evaluation_a_checkpoint_and_exit_done(trained: Trained) -> None:
    assert "ZeRO-3 keeps 50." in trained.output
    assert logged(trained.run_dir, "eval/loss").keys() == {6}
    assert recorded_exit(trained.run_dir, 0) == DONE
    assert (trained.run_dir / "checkpoints/latest").read_text() == "step-000006\n"


def test_only_the_dead_clip_tensors_stay_as_they_were(trained: Trained) -> None:
    first = build_model(load_model_config(trained.run_dir / "init"), torch.float32)
    load_weights(first, trained.run_dir / "init")
    still = {name for name, p in first.named_parameters() if torch.equal(p, trained.weights[name])}
    assert still == {name for name, p in first.named_parameters() if not p.requires_grad}


def test_the_export_holds_what_was_learnt_under_the_official_names(trained: Trained, tmp_path: Path) -> None:
    out = export(find_source(trained.run_dir), tmp_path / "export")
    taken = restore(find_source(out), "cpu", torch.float32).model
    assert all(torch.equal(p, trained.weights[name]) for name, p in taken.named_parameters())
    assert sorted(file.name for file in out.iterdir()) == [
        "README.md", "config.json", "generation_config.json", "model.safetensors", "preprocessor_config.json",
        "special_tokens_map.json", "tokenizer.json", "tokenizer_config.json",
    ]  # fmt: skip
    with pytest.raises(BadInputError, match="is not an empty directory"):
        export(find_source(trained.run_dir), out)
    data = str(load_config(trained.config).data.path)
    assert len(verify(find_source(trained.run_dir), out, data, samples=2)) == 2
    assert "| exact_match |" in (out / "README.md").read_text()


def test_checkpoints_are_found_by_name(trained: Trained) -> None:
    run_dir = trained.run_dir
    found = [find_source(f"{run_dir}:{name}").step for name in ("best", "latest", "3")]
    assert found == [6, 6, 3]
    with pytest.raises(BadInputError, match="no checkpoint of step 5; there are: 3, 6"):
        find_source(f"{run_dir}:5")


def test_a_damaged_checkpoint_is_passed_over(trained: Trained, tmp_path: Path) -> None:
    checkpoints = Path(shutil.copytree(trained.run_dir / "checkpoints", tmp_path / "checkpoints"))
    damaged = checkpoints / "step-000009"
    shutil.copytree(checkpoints / "step-000006", damaged)
    (damaged / "rank-00001.safetensors").write_bytes(b"short")
    assert checkpoint.newest(checkpoints) == checkpoints / "step-000006"
    with pytest.raises(BadInputError, match="rank-00001.safetensors has 5 bytes"):
        checkpoint.read_meta(damaged)


def test_a_finished_run_says_so(trained: Trained, tmp_path: Path) -> None:
    assert "already finished at step 6" in run_ranks(trained.copy(tmp_path), 1)


def test_from_step_3_again_it_is_bit_for_bit_the_same(trained: Trained, tmp_path: Path) -> None:
    """No line of metrics is missing or double, not even after one that was cut short."""
    config = trained.copy(tmp_path, without_last=True)
    run_dir = load_config(config).run_dir
    with (run_dir / "metrics.jsonl").open("a") as stream:
        stream.write('{"train/global_step": 7, "tr')
    assert "resuming from" in run_ranks(config, 2)
    again = weights(run_dir / "checkpoints/step-000006")
    assert all(torch.equal(again[name], trained.weights[name]) for name in trained.weights)
    assert logged(run_dir, "train/loss") == trained.losses


def test_one_rank_resumes_the_checkpoint_of_two(trained: Trained, tmp_path: Path) -> None:
    """The same curve to rounding."""
    config = trained.copy(tmp_path, without_last=True)
    run_dir = load_config(config).run_dir
    run_ranks(config, 1)
    ours = list(logged(run_dir, "train/loss").values())
    assert ours == pytest.approx(list(trained.losses.values()), rel=1e-5)
    alone = weights(run_dir / "checkpoints/step-000006")
    assert max(float((alone[n] - trained.weights[n]).abs().max()) for n in trained.weights) < 1e-4


@dataclass(frozen=True)
class Stopped:
    """Two ranks, of which one got SIGUSR1 after two steps. began: when, in seconds since the epoch."""

    config: Path
    run_dir: Path
    began: float
    code: int
    output: str


@pytest.fixture(scope="module")
def stopped(products: Path, tmp_path_factory: pytest.TempPathFactory) -> Stopped:
    work = tmp_path_factory.mktemp("stopped")
    config = work / "tiny.yaml"
    config.write_text(yaml.safe_dump(tiny_tree(products, work / "runs")))
    run_dir = load_config(config).run_dir
    began = time.time()
    endless = ("train.steps=5000", "checkpoint.every_steps=5000")
    process = start_ranks(config, 2, *endless, "data.workers=1", "track.mode=offline")
    try:
        while len(logged(run_dir, "train/loss") if (run_dir / "metrics.jsonl").exists() else []) < 2:
            assert time.time() - began < 90 and process.poll() is None
            time.sleep(0.2)
        ranks = [
            p for p in psutil.Process(process.pid).children() if "launch.cli.main" in " ".join(p.cmdline())
        ]
        assert len(ranks) == 2
        os.kill(ranks[1].pid, signal.SIGUSR1)
    finally:
        code, output = finish(process, 90)
    return Stopped(config, run_dir, began, code, output=output)


def test_a_signal_on_one_rank_stops_all_with_a_checkpoint(stopped: Stopped) -> None:
    assert stopped.code != 0 and "stopped by a signal after step" in stopped.output
    assert recorded_exit(stopped.run_dir, stopped.began) == PREEMPTED
    newest = checkpoint.newest(stopped.run_dir / "checkpoints")
    assert newest is not None
    assert checkpoint.read_meta(newest).progress.step == max(logged(stopped.run_dir, "train/loss"))


def test_a_stopped_run_resumes_as_one_run(stopped: Stopped, tmp_path: Path) -> None:
    """metrics.jsonl and the one W&B run have every step once."""
    shutil.copytree(stopped.run_dir, run_dir := tmp_path / "runs" / stopped.run_dir.name)
    newest = checkpoint.newest(run_dir / "checkpoints")
    assert newest is not None
    end = checkpoint.step_of(newest) + 2
    here = (f"runs_dir={tmp_path / 'runs'}", f"train.steps={end}", "track.mode=offline")
    assert f"resuming from {newest}" in run_ranks(stopped.config, 2, *here)
    every = list(range(1, end + 1))
    assert list(logged(run_dir, "train/loss")) == every
    lines = read_metrics(run_dir / "metrics.jsonl")
    assert [line["train/global_step"] for line in lines] == every
    files = sorted(run_dir.glob("wandb/offline-run-*/*.wandb"))
    assert len(files) == 2 and len({file.name for file in files}) == 1
    assert [items["train/global_step"] for file in files for items in history(file)] == every


def test_another_model_in_the_same_run_directory_is_refused(stopped: Stopped) -> None:
    began = time.time()
    _, output = finish(start_ranks(stopped.config, 1, "data.seq_len=512"))
    assert recorded_exit(stopped.run_dir, began) == USAGE
    assert "holds a run with another data.seq_len" in output and "Traceback" not in output.split("torch")[0]


def test_unreadable_samples_are_left_out_and_too_many_stop_the_run(tiny_config: Path, products: Path) -> None:
    config = load_config(tiny_config)
    damaged = tiny_config.parent / "damaged"
    shutil.copytree(products, damaged)
    index = read_index(str(damaged), "train", ["shard", "images"]).to_pylist()
    for record in index[:3]:
        image = record["images"][0]
        with (damaged / record["shard"]).open("r+b") as stream:
            stream.seek(image["offset"])
            stream.write(b"\0" * image["length"])
    epoch = [f"data.path={damaged}", "train.steps=null", "train.epochs=1", "eval.generate_samples=0"]
    output = run_ranks(tiny_config, 2, *epoch, "data.max_bad_fraction=0.1")
    logs = "".join((config.run_dir / "logs" / f"rank-{rank}.log").read_text() for rank in (0, 1))
    assert logs.count("sample left out") == 3 and "undecodable image" in logs
    assert list(logged(config.run_dir, "data/bad_samples").values())[-1] == 3
    assert "saved" in output

    for record in index[:20]:
        image = record["images"][0]
        with (damaged / record["shard"]).open("r+b") as stream:
            stream.seek(image["offset"])
            stream.write(b"\0" * image["length"])
    began = time.time()
    code, output = finish(start_ranks(tiny_config, 2, *epoch, "name=worse"))
    assert code != 0 and "unreadable samples" in output
    assert recorded_exit(config.run_dir.parent / "worse", began) == DIVERGED
    listed = (config.run_dir.parent / "worse/bad-samples.txt").read_text().splitlines()
    assert listed and all("shard-" in line and "undecodable image" in line for line in listed)
    assert listed[0] in output
