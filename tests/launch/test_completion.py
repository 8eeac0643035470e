"""What Tab offers: recipes, folders, keys of the config. As bash asks for it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from launch.cli.arguments import offer_configs, offer_keys

ROOT = Path(__file__).parents[2]


def test_recipes_and_folders_are_offered(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(ROOT)
    assert offer_configs("con") == offer_configs("configs/"), "behind one word the shell puts a space"
    assert "configs/tiny.yaml" in offer_configs("configs/") and "configs/shards/" in offer_configs("configs/")
    assert offer_configs("configs/ti") == ["configs/tiny.yaml"]
    assert offer_configs(f"{ROOT}/configs/ti") == [f"{ROOT}/configs/tiny.yaml"]
    (tmp_path / "mine.yml").touch()
    (tmp_path / "notes.txt").touch()
    monkeypatch.chdir(tmp_path)
    assert "mine.yml" in offer_configs("m") and offer_configs("n") == []
    assert offer_configs("no/such/place") == []


def test_keys_are_offered_until_their_equals_sign() -> None:
    assert offer_keys("train.l") == ["train.lr=", "train.lr_scale="]
    assert "model.lora.rank=" in offer_keys("model.lora.") and "checkpoint.async=" in offer_keys("check")
    assert offer_keys("train.warm") == ["train.warmup_steps=", "train.warmup_steps=0"]
    assert offer_keys("eval.metr") == ["eval.metrics="], "brackets and quotes are the shell's own"
    assert offer_keys("train.lr=") == [] and "data.sources=" in offer_keys("data.s")


def test_bash_gets_them() -> None:
    def ask(*words: str) -> list[str]:
        asked = {"COMP_WORDS": " ".join(words), "COMP_CWORD": str(len(words) - 1)}
        environment = {**os.environ, **asked, "_PHI3V_COMPLETE": "complete_bash"}
        command = [sys.executable, "-c", "from launch.cli.main import app; app(prog_name='phi3v')"]
        done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        return done.stdout.split()

    assert ask("phi3v", "shards", "b") == ["build"]
    assert ask("phi3v", "launch", "local", "configs/ti") == ["configs/tiny.yaml"]
    assert ask("phi3v", "train", "configs/tiny.yaml", "train.war") == [
        "train.warmup_steps=",
        "train.warmup_steps=0",
    ]
