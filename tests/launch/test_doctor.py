"""`phi3v doctor`: what it finds, and that it says how to fix it."""

from __future__ import annotations

from pathlib import Path

import pytest

from launch.doctor import clusters, machine, run
from launch.doctor.finding import Finding, line
from launch.doctor.report import run_doctor
from phi3v_dist.config import load_config
from shards.common.errors import BadInputError


def test_a_config_that_can_run_has_nothing_red(tiny_config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_doctor(str(tiny_config), ["train.global_batch=4"]) == 0
    output = capsys.readouterr().out
    assert not [each for each in output.splitlines() if each.startswith("red")]
    for subject in (
        "torch",
        "/dev/shm",
        "rendezvous",
        "run directory",
        "write speed",
        "shards",
        "model",
        "batch",
    ):
        assert f" {subject}: " in output
    assert not list(tiny_config.parent.glob("**/.probe-*")), "leaves nothing behind"


def test_what_will_fail_is_red_and_says_how_to_fix_it(
    tiny_config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    overrides = [
        "data.path=no shards here",
        "train.global_batch=3",
        "model.config=null",
        "model.path=no weights",
    ]
    assert run_doctor(str(tiny_config), overrides, environment={"PHI3V_CPU_PROCESSES": "2"}) == 5
    reds = [each for each in capsys.readouterr().out.splitlines() if each.startswith("red")]
    assert len(reds) == 3
    assert "shards build" in reds[0] and "set model.path" in reds[1] and "set train.global_batch=4" in reds[2]


def test_shards_of_the_wrong_size_and_missing_splits_are_seen(
    products: Path, tiny_config: Path, tmp_path: Path
) -> None:
    import shutil

    copy = tmp_path / "a copy"
    shutil.copytree(products, copy)
    config = load_config(tiny_config, [f"data.path={copy}", "data.val_split=test"])
    next(iter(sorted(copy.glob("*.tar")))).write_bytes(b"short")
    found = [finding.found for finding in run.dataset(config)]
    assert any("1 shard(s) of the wrong size" in each for each in found)
    assert any("no sample in split test" in each for each in found)


def test_a_bad_config_is_wrong_input_not_a_finding(tiny_config: Path) -> None:
    with pytest.raises(BadInputError, match="did you mean"):
        run_doctor(str(tiny_config), ["train.lrr=1"])


@pytest.mark.ranks
def test_ranks_start_and_reduce(capsys: pytest.CaptureFixture[str]) -> None:
    found = list(machine.all_reduce())
    assert [finding.status for finding in found] == ["green"] and "GB/s" in found[0].found


def test_a_cluster_that_is_not_there_is_red(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    for check in (clusters.slurm_cluster, clusters.kubernetes_cluster):
        assert [finding.status for finding in check()] == ["red"]


KUBECTL = """#!/bin/sh
case "$*" in
    *"get crd pytorchjobs"*) echo 'Error from server (NotFound)' >&2; exit 1 ;;
    *"get secret"*) echo 'secrets "phi3v-wandb" not found' >&2; exit 1 ;;
esac
"""


def test_a_cluster_with_the_trainer_alone_is_good(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "kubectl").write_text(KUBECTL)
    (tmp_path / "kubectl").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    found = [(finding.status, finding.subject, finding.found) for finding in clusters.kubernetes_cluster()]
    assert found == [
        ("green", "API server", "there"),
        ("green", "training operator", "v2: `phi3v launch k8s --operator v2`"),
        ("green", "permission", "create trainjobs.trainer.kubeflow.org"),
        ("yellow", "W&B secret", 'secrets "phi3v-wandb" not found'),
    ]


def test_wandb_is_used_as_training_would(tiny_config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/nowhere")
    config = load_config(tiny_config, ["track.mode=auto"])
    for environment, said in (
        ({"WANDB_API_KEY": "x"}, "online"),
        ({"WANDB_API_KEY": "x", "WANDB_MODE": "offline"}, "offline, `phi3v report"),
        ({}, "offline, `phi3v report"),
        ({"WANDB_MODE": "disabled"}, "disabled"),
        ({"WANDB_MODE": "online"}, "online without WANDB_API_KEY"),
    ):
        (finding,) = run.wandb(config, environment)
        assert finding.found.startswith(said), environment


def test_a_line_names_status_subject_and_fix() -> None:
    finding = Finding("yellow", "GPUs", "none", "rent some")
    assert line(finding, colour=False) == "yellow GPUs: none; rent some"


def test_a_gpu_that_is_too_small_is_red_and_says_what_to_change(
    tiny_config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = load_config(tiny_config, ["train.global_batch=4"])
    assert [finding.status for finding in run.memory(config, {})] == ["green"]
    monkeypatch.setattr(run, "visible_gpus", lambda: 2)
    monkeypatch.setattr(run, "gpu_bytes", lambda: 80 * 10**9)
    assert [finding.status for finding in run.memory(config, {})] == ["green"]
    monkeypatch.setattr(run, "gpu_bytes", lambda: 10**9)
    (finding,) = run.memory(config, {})
    assert finding.status == "red" and "the GPU has 1" in finding.found and "=" in finding.fix


def test_ranks_that_share_a_row_are_counted_as_one(
    tiny_config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "visible_gpus", lambda: 4)
    overrides = ["train.global_batch=2", "parallel.sp=2"]
    (finding,) = run.batch(load_config(tiny_config, overrides), {})
    assert finding.status == "green" and "2 to a row" in finding.found
    (finding,) = run.batch(load_config(tiny_config, [*overrides, "parallel.sp=3"]), {})
    assert finding.status == "red" and "divisor of 4" in finding.fix
