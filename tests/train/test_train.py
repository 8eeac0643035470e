"""The loop on real ranks: the same curve as plain torch, exact resume, agreement to stop, refusals."""

import os
import shutil
import signal
import time
from pathlib import Path

import psutil
import pytest
import torch

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
from tests.ranks import finish, logged, run_ranks, start_ranks

pytestmark = pytest.mark.ranks


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
    plan = Plan(costs, config.data.seq_len, config.seed, config.train.global_batch, layout=layout)
    maker = RowMaker(samples, tokenizer, 1, 112, tokenizer.pad_token_id)
    rows = load_rows(maker, RankRows(plan, 0, 1, 64, 0, config.train.steps or 0), 0, 1, 60)
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


def test_two_ranks_learn_as_plain_torch_and_resume_exactly(tiny_config: Path) -> None:
    run_dir = load_config(tiny_config).run_dir
    checkpoints = run_dir / "checkpoints"
    output = run_ranks(tiny_config, 2)
    assert "ZeRO-3 keeps 50." in output

    # the curve is that of one process without DeepSpeed
    ours, plain = logged(run_dir, "train/loss"), plain_losses(tiny_config, run_dir / "init")
    assert list(ours) == [1, 2, 3, 4, 5, 6]
    assert list(ours.values()) == pytest.approx(plain, rel=2e-5)
    assert logged(run_dir, "eval/loss").keys() == {6}
    assert recorded_exit(run_dir, 0) == DONE
    assert (checkpoints / "latest").read_text() == "step-000006\n"
    straight = weights(checkpoints / "step-000006")

    # the dead CLIP tensors never change, everything else that learns does
    first = build_model(load_model_config(run_dir / "init"), torch.float32)
    load_weights(first, run_dir / "init")
    still = {name for name, p in first.named_parameters() if torch.equal(p, straight[name])}
    assert still == {name for name, p in first.named_parameters() if not p.requires_grad}

    # what is taken home is what was learnt, with the official names
    out = export(find_source(run_dir), run_dir / "export")
    taken = restore(find_source(out), "cpu", torch.float32).model
    assert all(torch.equal(p, straight[name]) for name, p in taken.named_parameters())
    assert sorted(file.name for file in out.iterdir()) == [
        "README.md", "config.json", "generation_config.json", "model.safetensors", "preprocessor_config.json",
        "special_tokens_map.json", "tokenizer.json", "tokenizer_config.json",
    ]  # fmt: skip
    with pytest.raises(BadInputError, match="is no empty directory"):
        export(find_source(run_dir), out)
    assert len(verify(find_source(run_dir), out, str(load_config(tiny_config).data.path), 2)) == 2
    assert "| exact_match |" in (out / "README.md").read_text()

    # the best checkpoint has a name, and W&B's step is never twice
    best = find_source(f"{run_dir}:best")
    assert (best.step, find_source(f"{run_dir}:latest").step, find_source(f"{run_dir}:3").step) == (6, 6, 3)
    with pytest.raises(BadInputError, match="no checkpoint of step 5; there are: 3, 6"):
        find_source(f"{run_dir}:5")

    # a damaged newest checkpoint is passed over; nothing but a whole one is read
    damaged = checkpoints / "step-000009"
    shutil.copytree(checkpoints / "step-000006", damaged)
    (damaged / "rank-00001.safetensors").write_bytes(b"short")
    assert checkpoint.newest(checkpoints) == checkpoints / "step-000006"
    with pytest.raises(BadInputError, match="rank-00001.safetensors has 5 bytes"):
        checkpoint.read_meta(damaged)
    shutil.rmtree(damaged)

    # done is done
    assert "already finished at step 6" in run_ranks(tiny_config, 2)

    # from step 3 again: bit for bit the same, and no line of metrics is missing or double
    shutil.rmtree(checkpoints / "step-000006")
    (run_dir / "metrics.jsonl").open("a").write('{"train/global_step": 7, "tr')
    assert "going on from" in run_ranks(tiny_config, 2)
    again = weights(checkpoints / "step-000006")
    assert all(torch.equal(again[name], straight[name]) for name in straight)
    assert logged(run_dir, "train/loss") == ours

    # on one rank from the checkpoint of two: the same curve to rounding
    shutil.rmtree(checkpoints / "step-000006")
    run_ranks(tiny_config, 1)
    assert list(logged(run_dir, "train/loss").values()) == pytest.approx(list(ours.values()), rel=1e-5)
    alone = weights(checkpoints / "step-000006")
    assert max(float((alone[n] - straight[n]).abs().max()) for n in straight) < 1e-4


def test_a_signal_on_one_rank_stops_all_with_a_checkpoint(tiny_config: Path) -> None:
    run_dir = load_config(tiny_config).run_dir
    began = time.time()
    process = start_ranks(
        tiny_config,
        2,
        "train.steps=5000",
        "checkpoint.every_steps=5000",
        "data.workers=1",
        "track.mode=offline",
    )
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
    assert code != 0 and "stopped by a signal after step" in output
    assert recorded_exit(run_dir, began) == PREEMPTED
    newest = checkpoint.newest(run_dir / "checkpoints")
    assert newest is not None
    step = checkpoint.read_meta(newest)["progress"]["step"]
    assert max(logged(run_dir, "train/loss")) == step

    output = run_ranks(tiny_config, 2, f"train.steps={step + 2}", "track.mode=offline")
    assert f"going on from {newest}" in output
    assert list(logged(run_dir, "train/loss")) == list(range(1, step + 3))
    lines = read_metrics(run_dir / "metrics.jsonl")
    assert [line["train/global_step"] for line in lines] == list(range(1, step + 3))
    files = sorted(run_dir.glob("wandb/offline-run-*/*.wandb"))  # one W&B run, every step once
    assert len(files) == 2 and len({file.name for file in files}) == 1
    found = [items["train/global_step"] for file in files for items in history(file)]
    assert found == list(range(1, step + 3))

    # another model in the same run directory is refused, and nothing changes
    code, output = finish(start_ranks(tiny_config, 2, "data.seq_len=512"))
    assert recorded_exit(run_dir, began) == USAGE
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
    assert logs.count("sample left out") == 3 and "undecodable picture" in logs
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
    assert listed and all("shard-" in line and "undecodable picture" in line for line in listed)
    assert listed[0] in output
