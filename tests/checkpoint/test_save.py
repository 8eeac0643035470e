"""Checkpoints on one rank, in this process: whole or absent, found again, kept or removed, and what a disk
that fails does to a run.
"""

import json
import resource
import shutil
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from phi3v_dist.checkpoint import read as checkpoint
from phi3v_dist.checkpoint import save as saving
from phi3v_dist.checkpoint.manifest import COMPLETE, MANIFEST
from phi3v_dist.checkpoint.meta import Progress
from phi3v_dist.checkpoint.read import BEST, LATEST, checkpoints, find_resume, load, newest, point
from phi3v_dist.checkpoint.save import ModelCard, Saver
from phi3v_dist.checkpoint.state import KeptState
from phi3v_dist.config import CheckpointConfig, RunConfig, load_config
from phi3v_dist.engine.state import trained_slices
from phi3v_dist.engine.zero import (
    initialize,
    make_engine,
    partitioned_parameters,
    prepare_deepspeed,
    zero_config,
)
from phi3v_dist.model.configuration import Phi3VConfig
from phi3v_dist.model.hub import build_model, load_weights
from phi3v_dist.parallel.mesh import Mesh, open_mesh
from phi3v_dist.pretrained import prepare_pretrained
from shards.common.errors import BadInputError
from tests.conftest import tiny_tree


@dataclass
class Run:
    """A tiny engine on one rank, with two parameter groups that have taken one step."""

    engine: Any
    mesh: Mesh
    card: ModelCard
    about: dict[str, Any]

    def saver(self, folder: Path, **settings: Any) -> Saver:
        config = CheckpointConfig.model_validate({"timeout_s": 20.0, **settings})
        return Saver(
            self.engine, folder, self.mesh,
            card=self.card, run=self.about, wandb_id=folder / "no id", config=config, saved_step=0,
        )  # fmt: skip

    def state(self) -> dict[str, torch.Tensor]:
        """A copy of everything that training changes."""
        found = {}
        for each in trained_slices(self.engine):
            found[each.name] = each.of(each.master.data).clone()
            for kind, tensor in self.engine.optimizer.optimizer.state[each.master].items():
                if tensor.ndim:
                    found[f"{kind}/{each.name}"] = each.of(tensor).clone()
        return found

    def disturb(self) -> None:
        for flat in self.engine.optimizer.fp32_partitioned_groups_flat:
            flat.data.mul_(1.5)
            for kind, tensor in self.engine.optimizer.optimizer.state[flat].items():
                tensor.add_(7 if kind == "step" else 0.25)


@pytest.fixture(scope="module")
def run(products: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    yield from _open_run(products, tmp_path_factory.mktemp("run"))


def _open_run(products: Path, work: Path) -> Iterator[Run]:
    import yaml

    file = work / "tiny.yaml"
    file.write_text(yaml.safe_dump(tiny_tree(products, work / "runs")))
    config = load_config(file)
    config.run_dir.mkdir(parents=True)
    with open_mesh(40.0) as mesh:
        pretrained = prepare_pretrained(config, config.run_dir, mesh)
        prepare_deepspeed(mesh)
        with partitioned_parameters(zero_config(config, 1), torch.float32):
            model = build_model(pretrained.model_config, torch.float32)
        load_weights(model, pretrained.model_dir)
        learning = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
        matrices = [p for n, p in learning if len(p.ds_shape) > 1]
        vectors = [p for n, p in learning if len(p.ds_shape) == 1]
        groups = [
            {"params": matrices, "name": "matrices", "weight_decay": 0.1, "lr": 1e-3, "lr_scale": 1.0},
            {"params": vectors, "name": "vectors", "weight_decay": 0.0, "lr": 5e-4, "lr_scale": 0.5},
        ]
        engine = make_engine(model, groups, config, accumulation=1)
        for flat in engine.optimizer.fp32_partitioned_groups_flat:
            state = engine.optimizer.optimizer.state[flat]
            state["step"] = torch.tensor(3.0)
            for place, kind in enumerate(("exp_avg", "exp_avg_sq")):
                state[kind] = torch.rand(flat.shape, generator=torch.Generator().manual_seed(place))
        card = ModelCard(pretrained.model_config.to_dict(), 1, pretrained.model_dir, pretrained.tokenizer_dir)
        about = {"config": config.model_dump(mode="json"), "data_fingerprint": "f", "versions": {}}
        yield Run(engine, mesh, card, about)
        engine.destroy()


@pytest.mark.parametrize("in_background", [False, True])
def test_what_is_read_is_what_was_there_when_it_was_saved(
    run: Run, tmp_path: Path, in_background: bool
) -> None:
    saver = run.saver(tmp_path, **{"async": in_background})
    before, groups = run.state(), [dict(group) for group in run.engine.optimizer.param_groups]
    progress = Progress(step=7, rows=28, skipped_steps=2)
    saver.save(progress)
    run.disturb()  # training goes on at once
    run.engine.optimizer.param_groups[1]["weight_decay"] = 0.3
    assert saver.save_surely(progress) is None
    assert sorted(file.name for file in (tmp_path / "step-000007").iterdir()) == [
        COMPLETE, MANIFEST, "meta.json", "rank-00000.safetensors",
        "special_tokens_map.json", "tokenizer.json", "tokenizer_config.json",
    ]  # fmt: skip

    assert load(run.engine, tmp_path / "step-000007", run.mesh) == progress
    after = run.state()
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert [group["weight_decay"] for group in run.engine.optimizer.param_groups] == [0.1, 0.0]
    assert [group["lr"] for group in run.engine.optimizer.param_groups] == [g["lr"] for g in groups]
    assert {float(s["step"]) for s in run.engine.optimizer.optimizer.state.values()} == {3.0}


def test_another_optimizer_is_saved_and_read_with_no_change_here(run: Run, tmp_path: Path) -> None:
    """SGD with momentum: no step count, one tensor per element, and none before the first step."""
    config = RunConfig.model_validate(run.about["config"])
    with partitioned_parameters(zero_config(config, 1), torch.float32):
        model = build_model(Phi3VConfig(**run.card.config), torch.float32)
    load_weights(model, run.card.model_dir)
    learning = [p for p in model.parameters() if p.requires_grad]
    sgd = torch.optim.SGD([{"params": learning, "name": "all", "lr": 0.1}], momentum=0.9)
    engine = initialize(model, sgd, zero_config(config, 1))
    other = Run(engine, run.mesh, run.card, run.about)
    try:
        for flat in engine.optimizer.fp32_partitioned_groups_flat:
            engine.optimizer.optimizer.state[flat]["momentum_buffer"] = torch.rand_like(flat.data)
        before = other.state()
        other.saver(tmp_path).save(Progress(step=1))
        other.disturb()
        assert load(engine, tmp_path / "step-000001", run.mesh).step == 1
        after = other.state()
        assert sum(name.startswith("momentum_buffer/") for name in before) == len(learning)
        assert all(torch.equal(after[name], before[name]) for name in before)
        with pytest.raises(BadInputError, match="holds no exp_avg/.*written with another optimizer"):
            target = tmp_path / "step-000001"
            meta = checkpoint.read_meta(target)
            assert meta.adam_steps == [0.0]
            load(run.engine, target, run.mesh)
    finally:
        engine.destroy()


def damage(target: Path, how: str) -> None:
    file = target / "rank-00000.safetensors"
    if how == "truncated":
        file.write_bytes(file.read_bytes()[:-100])
    elif how == "one bit":
        data = bytearray(file.read_bytes())
        data[len(data) // 2] ^= 1
        file.write_bytes(data)
    elif how == "one bit of meta.json":
        data = bytearray((target / "meta.json").read_bytes())
        data[data.index(b'"step"') + 8] ^= 1
        (target / "meta.json").write_bytes(data)
    elif how == "manifest":
        (target / MANIFEST).write_text("{}")
    elif how == "half-written":
        (target / COMPLETE).unlink()
        file.unlink()


@pytest.mark.parametrize("how", ["truncated", "one bit", "one bit of meta.json", "manifest", "half-written"])
def test_a_damaged_newest_checkpoint_is_passed_over_with_a_warning(
    run: Run, tmp_path: Path, caplog: pytest.LogCaptureFixture, how: str
) -> None:
    saver = run.saver(tmp_path)
    for step in (999_999, 1_000_000):  # numbers, not names, say which is newer
        saver.save(Progress(step=step))
    good, bad = tmp_path / "step-999999", tmp_path / "step-1000000"
    assert newest(tmp_path) == bad
    damage(bad, how)
    assert newest(tmp_path) == good
    assert find_resume(tmp_path, run.mesh) == good
    assert "step-1000000: not used" in caplog.text and f"resuming from {good} instead" in caplog.text
    assert checkpoints(tmp_path) == [good], "the damaged one is set aside and never counts as the newest"
    saver.save(Progress(step=1_000_001))
    assert sorted(path.name for path in tmp_path.iterdir()) == [LATEST, "step-1000001", "step-999999"]


def test_with_none_but_damaged_checkpoints_the_user_decides(run: Run, tmp_path: Path) -> None:
    assert find_resume(tmp_path / "nothing yet", run.mesh) is None
    run.saver(tmp_path).save(Progress(step=3))
    damage(tmp_path / "step-000003", "one bit")
    with pytest.raises(BadInputError, match=r"step-000003.*differs from what was written.*no other"):
        find_resume(tmp_path, run.mesh)


def test_other_models_and_formats_are_refused_with_what_differs(run: Run, tmp_path: Path) -> None:
    run.saver(tmp_path).save(Progress(step=3))
    target = tmp_path / "step-000003"
    for parameter in list(run.engine.module.parameters())[:1]:
        parameter.requires_grad_(False)
    try:
        with pytest.raises(BadInputError, match=r"of another model: 1 parameters differ.*frozen here"):
            load(run.engine, target, run.mesh)
    finally:
        next(run.engine.module.parameters()).requires_grad_(True)
    meta = json.loads((target / "meta.json").read_text())
    (target / "meta.json").write_text(json.dumps({**meta, "format": 1}))
    (target / MANIFEST).unlink()
    with pytest.raises(BadInputError, match="checkpoint format 1, this program reads format 2"):
        find_resume(tmp_path, run.mesh)


def test_kept_are_the_newest_every_so_many_and_what_a_pointer_names(run: Run, tmp_path: Path) -> None:
    saver = run.saver(tmp_path, keep_last=2, keep_every=4)
    for step in range(1, 9):
        saver.save(Progress(step=step), as_best=(lambda: None) if step == 2 else None)
    assert [checkpoint.step_of(path) for path in checkpoints(tmp_path)] == [8, 7, 4, 2]
    assert (tmp_path / LATEST).read_text() == "step-000008\n"
    assert checkpoint.best(tmp_path) == tmp_path / "step-000002"
    point(tmp_path, BEST, 7)
    (tmp_path / ".step-000009.dead-1.partial").mkdir()  # left by a save that was killed
    saver.save(Progress(step=9))
    assert [checkpoint.step_of(path) for path in checkpoints(tmp_path)] == [9, 8, 7, 4]
    saver.save(Progress(step=10))
    assert [checkpoint.step_of(path) for path in checkpoints(tmp_path)] == [10, 9, 8, 7, 4]
    assert not list(tmp_path.glob(".*"))


@pytest.mark.system
@pytest.mark.parametrize("in_background", [False, True])
def test_a_full_disk_costs_saves_until_there_are_too_many(
    run: Run, small_disk: Path, caplog: pytest.LogCaptureFixture, in_background: bool
) -> None:
    size = sum(slot.size for slot in KeptState(run.engine, run.mesh, buffered=False).slots)
    subprocess.run(["mount", "-o", f"remount,size={int(1.6 * size)}", str(small_disk)], check=True)
    folder = small_disk / "checkpoints"
    saver = run.saver(folder, max_failures=2, **{"async": in_background})
    saver.save(Progress(step=1), wait=True)
    saver.save(Progress(step=2), wait=True)
    assert saver.failures == 1
    saver.agree(saver.failures)
    assert (
        "CHECKPOINT NOT WRITTEN (1 in a row, the run ends at 2): rank 0: No space left on device"
        in caplog.text
    )
    saver.save(Progress(step=3), wait=True)
    with pytest.raises(BadInputError, match=r"2 checkpoints in a row.*No space left.*step-000001"):
        saver.agree(saver.failures)
    assert find_resume(folder, run.mesh) == folder / "step-000001"
    assert not list(folder.glob(".step-*")), "what did not fit makes room again"
    subprocess.run(["mount", "-o", f"remount,size={4 * size}", str(small_disk)], check=True)
    assert saver.save_surely(Progress(step=4)) is None
    assert saver.failures == 0 and newest(folder) == folder / "step-000004"


def test_files_that_may_not_grow_fail_the_save(
    run: Run, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As with a quota; where no small disk can be mounted this stands for it."""
    saver = run.saver(tmp_path)
    saver.save(Progress(step=1))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        assert "File too large" in str(saver.save_surely(Progress(step=2)))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert newest(tmp_path) == tmp_path / "step-000001"
    assert saver.save_surely(Progress(step=2)) is None and saver.failures == 0


def test_a_folder_that_cannot_be_written_is_a_failure_not_a_crash(run: Run, tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    saver = run.saver(folder)
    saver.save(Progress(step=1))
    shutil.move(folder, tmp_path / "away")
    folder.write_text("a file, which not even root can write a directory into")
    assert "File exists" in str(saver.save_surely(Progress(step=2)))
    assert saver.failures >= 1


def test_a_slow_disk_fails_the_save_and_the_next_one_waits_for_it(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    write = saving.write_tensors

    def slowly(*arguments: Any) -> Any:
        time.sleep(2.0)
        return write(*arguments)

    saver = run.saver(tmp_path, **{"async": True}, timeout_s=0.5)
    monkeypatch.setattr(saving, "write_tensors", slowly)
    saver.save(Progress(step=1), wait=True)
    assert saver.failures == 1 and "within checkpoint.timeout_s=0.5 s" in caplog.text
    saver.save(Progress(step=2))
    assert saver.failures == 2 and "rank 0 is still writing the previous checkpoint" in caplog.text
    time.sleep(2.0)
    monkeypatch.setattr(saving, "write_tensors", write)
    assert saver.save_surely(Progress(step=3)) is None
    assert saver.failures == 0 and [path.name for path in checkpoints(tmp_path)] == ["step-000003"]


def test_a_save_that_has_ended_is_not_late_while_its_thread_leaves(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    end = Saver._end

    def lingering(self: Saver, save: Any, outcome: str) -> None:
        end(self, save, outcome)
        time.sleep(0.5)

    monkeypatch.setattr(Saver, "_end", lingering)
    saver = run.saver(tmp_path, **{"async": True})
    saver.save(Progress(step=1))
    saver.save(Progress(step=2), wait=True)
    assert saver.failures == 0 and len(checkpoints(tmp_path)) == 2


def test_frozen_weights_that_outweigh_the_rest_stay_in_their_model_directory(
    run: Run, tmp_path: Path
) -> None:
    """As with LoRA or a projector alone: small checkpoints, and other frozen weights are noticed."""
    full = dict(run.engine.module.named_parameters())
    learning = {each.name for each in trained_slices(run.engine)}
    groups = run.engine.optimizer.fp16_groups
    kept = [[p for p in group if p.ds_numel < 100] for group in groups]
    others = [p for name, p in full.items() if name in learning and p.ds_numel >= 100]
    whole = sum(slot.size for slot in KeptState(run.engine, run.mesh, buffered=False).slots)
    try:
        run.engine.optimizer.fp16_groups = kept
        for parameter in others:
            parameter.requires_grad_(False)
        pretrained = tmp_path / "origin"
        shutil.copytree(run.card.model_dir, pretrained)
        for (
            name,
            parameter,
        ) in full.items():  # earlier tests have not changed the engine's low-precision copies
            assert parameter.ds_tensor is not None, name
        card = ModelCard(run.card.config, 1, pretrained, run.card.tokenizer_dir)
        load_weights(run.engine.module, pretrained)
        saver = Run(run.engine, run.mesh, card, run.about).saver(tmp_path / "small")
        saver.save(Progress(step=1))
        target = tmp_path / "small" / "step-000001"
        assert (target / "rank-00000.safetensors").stat().st_size < whole / 5
        assert load(run.engine, target, run.mesh).step == 1
        read = dict(checkpoint.read_tensors(target))
        assert read.keys() == full.keys()
        assert all(
            torch.equal(read[n].view(-1), p.ds_tensor.data.view(-1)[: p.ds_numel]) for n, p in full.items()
        )

        others[0].ds_tensor.data.view(-1)[0] += 1
        with pytest.raises(BadInputError, match="other frozen weights"):
            load(run.engine, target, run.mesh)
        shutil.rmtree(pretrained)
        with pytest.raises(BadInputError, match="the frozen ones are those of"):
            dict(checkpoint.read_tensors(target))
    finally:
        run.engine.optimizer.fp16_groups = groups
        for parameter in others:
            parameter.requires_grad_(True)
