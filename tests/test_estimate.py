"""The memory estimate: figures that follow from the shapes, and what moves them."""

from pathlib import Path

import pytest

from phi3v_dist.config import RunConfig, load_config
from phi3v_dist.estimate import describe, estimate
from phi3v_dist.model.configuration import Phi3VConfig

CONFIGS = Path(__file__).parents[1] / "configs"


def load(name: str, *overrides: str) -> RunConfig:
    return load_config(CONFIGS / f"{name}.yaml", overrides)


def test_the_full_size_model_on_eight_gpus() -> None:
    found = estimate(load("burberry"), Phi3VConfig(), 8).components
    parameters = 4_146_621_440
    assert found["weights"] == found["gradients"] == parameters * 2 // 8
    assert found["optimizer (fp32 master, two moments)"] == parameters * 12 // 8
    assert found["layer inputs"] == 32 * 8192 * 3072 * 2


def test_what_moves_it() -> None:
    model = Phi3VConfig()
    base = estimate(load("burberry"), model, 8).components
    longer = estimate(load("burberry", "data.seq_len=16384"), model, 8).components
    assert longer["layer inputs"] == 2 * base["layer inputs"]
    without = estimate(load("burberry", "model.gradient_checkpointing=false"), model, 8)
    assert without.total > 2 * sum(base.values())
    frozen = estimate(load("debug"), model, 1).components
    assert frozen["gradients"] == pytest.approx(22_034_432 * 2, rel=1e-6)
    assert frozen["weights gathered for a layer"] == 0


def test_it_says_whether_it_fits() -> None:
    found = estimate(load("burberry"), Phi3VConfig(), 8)
    assert describe(found, 80 * 10**9)[-1].endswith("fits")
    assert "does not fit: use more GPUs" in describe(found, 10 * 10**9)[-1]
    assert sum(found.components.values()) == found.total
