"""`phi3v launch local`: what it starts, and what it refuses before it starts anything."""

import os
from pathlib import Path

import pytest

from launch import local
from launch.torchrun.node import NodeResult
from shards.common.errors import BadInputError

CONFIG = """
name: a-run
runs_dir: "{runs}"
model: {{config: {{}}}}
data: {{path: "{data}"}}
train: {{steps: 1}}
"""


@pytest.fixture
def config(tmp_path: Path, products: Path) -> str:
    file = tmp_path / "a config.yaml"
    file.write_text(CONFIG.format(runs=tmp_path / "runs with space", data=products))
    return str(file)


def test_config_is_checked_before_anything_starts(config: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local, "run_node", lambda *arguments, **named: pytest.fail("started"))
    with pytest.raises(BadInputError, match=r"did you mean train\.lr"):
        local.launch_local(config, ["train.lrr=1"])
    with pytest.raises(BadInputError, match="no such config file"):
        local.launch_local("nowhere.yaml", [])
    with pytest.raises(BadInputError, match="no such dataset directory"):
        local.launch_local(config, ["data.path=nowhere"])
    with pytest.raises(BadInputError, match="at least one"):
        local.launch_local(config, [], processes=0)


def test_ranks_get_config_and_overrides_unchanged(config: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)  # set where a mesh was opened in this process
    seen: list[object] = []
    monkeypatch.setattr(
        local,
        "run_node",
        lambda *arguments, environment, grace_s: (
            seen.extend([*arguments, environment]) or NodeResult(0, False)
        ),
    )
    monkeypatch.setattr(local, "visible_gpus", lambda: 0)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert local.launch_local(config, ["train.lr=0.1", "track.group=two words"], processes=2) == 0
    options, command, run_dir, environment = seen
    assert options[-2:] == ["--nproc-per-node", "2"]
    assert command == ["-m", "launch.torchrun.rank", "train", config, "train.lr=0.1", "track.group=two words"]
    assert run_dir == Path(config).parent / "runs with space" / "a-run"
    assert environment["DS_ACCELERATOR"] == "cpu"
    assert int(environment["OMP_NUM_THREADS"]) == max(1, len(os.sched_getaffinity(0)) // 2)


def test_more_processes_than_gpus_is_refused(config: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local, "visible_gpus", lambda: 2)
    with pytest.raises(BadInputError, match=r"4 processes asked for, but 2 GPU\(s\) are visible"):
        local.launch_local(config, [], processes=4)


@pytest.mark.parametrize(
    ("visible", "expected"), [(None, 2), ("0", 1), ("", 0), ("-1", 0), ("GPU-a,GPU-b", 2)]
)
def test_gpus_are_those_of_the_driver_and_of_cuda_visible_devices(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, visible: str | None, expected: int
) -> None:
    driver = tmp_path / "nvidia-smi"
    driver.write_text("#!/bin/sh\necho 'GPU 0: A (UUID: GPU-a)'\necho 'GPU 1: B (UUID: GPU-b)'\n")
    driver.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert local.visible_gpus() == expected


def test_debug_runs_one_process_that_reads_this_terminal(
    config: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    typed = tmp_path / "typed"
    typed.write_text("p 6 * 7\nc\n")
    program = "import os; breakpoint(); raise SystemExit(3 if os.environ['WORLD_SIZE'] == '1' else 1)"
    monkeypatch.setattr(local, "rank_command", lambda config, overrides: ["-c", program])
    saved = os.dup(0)
    with typed.open() as stream:
        os.dup2(stream.fileno(), 0)
        try:
            assert local.launch_local(config, [], debug=True) == 3
        finally:
            os.dup2(saved, 0)
            os.close(saved)
    assert "42" in capfd.readouterr().out
