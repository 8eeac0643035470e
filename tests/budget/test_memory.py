"""The memory estimate: figures that follow from the shapes, and what moves them."""

from pathlib import Path

import pytest
import torch

from phi3v_dist.budget.memory import advice, describe, estimate, head_chunk
from phi3v_dist.config import RunConfig, load_config
from phi3v_dist.model.configuration import Phi3VConfig

CONFIGS = Path(__file__).parents[2] / "configs"
GB = 10**9
PARAMETERS = 4_146_621_440
LEARNING = PARAMETERS - 12_598_272  # the last CLIP layer and the norm behind it feed nothing


def load(name: str, *overrides: str) -> RunConfig:
    return load_config(CONFIGS / f"{name}.yaml", overrides)


def gpu(config: RunConfig, gpus: int, name: str) -> int:
    return estimate(config, Phi3VConfig(), gpus)[name].gpu


def test_the_full_size_model_on_eight_gpus() -> None:
    config = load("burberry")
    assert gpu(config, 8, "weights") == PARAMETERS * 2 // 8
    assert gpu(config, 8, "optimizer") == LEARNING * 12 // 8
    assert gpu(config, 8, "gradients") * 3 == gpu(config, 8, "optimizer")
    assert gpu(config, 8, "layer inputs") == 32 * 8192 * 3072 * 2
    assert gpu(config, 1, "weights gathered") == 0


@pytest.mark.parametrize(
    ("name", "gpus", "memory"), [("full-128k", 8, 80), ("single-gpu-128k", 1, 80), ("debug", 1, 24)]
)
def test_the_recipes_fit_where_they_say(name: str, gpus: int, memory: int) -> None:
    config, model = load(name), Phi3VConfig()
    assert estimate(config, model, gpus).total < 0.9 * memory * GB
    assert f"of {memory} GB: fits" in "\n".join(describe(config, model, gpus, gpu_bytes=memory * GB))


def test_each_feature_saves_what_it_is_for() -> None:
    model = Phi3VConfig()
    long = load("full-128k", "parallel.sp=1", "parallel.tile_mlp=0")
    base = estimate(long, model, 8)

    def change(*overrides: str) -> dict[str, int]:
        found = estimate(load("full-128k", "parallel.sp=1", "parallel.tile_mlp=0", *overrides), model, 8)
        return {c.name: c.gpu for c in found.components} | {"host": found.host, "total": found.total}

    tiled = change("parallel.tile_mlp=4096")
    wide = "MLP (with what attention keeps)"
    assert tiled[wide] < base[wide].gpu * 0.6 and tiled["attention"] == base["attention"].gpu
    away = change("parallel.offload_checkpoints=true")
    assert away["layer inputs"] == 2 * 131072 * 3072 * 2
    assert away["host"] == 32 * 2**30  # pinned memory comes in powers of two
    optimizer = change("parallel.offload_optimizer=cpu")
    assert optimizer["optimizer"] == optimizer["gradients"] == optimizer["optimizer at work"] == 0
    assert optimizer["host"] == LEARNING // 8 * 20
    shared = change("parallel.sp=8")
    assert shared["layer inputs"] * 8 == base["layer inputs"].gpu
    assert shared["total"] < base.total / 2
    without = change("model.gradient_checkpointing=false")
    assert without["total"] > 5 * base.total
    disk = estimate(
        load("single-gpu-128k", "parallel.offload_optimizer=nvme", "parallel.offload_path=/disk"), model, 1
    )
    assert disk.disk == LEARNING * 16 and disk.host < 60 * GB


def test_it_says_what_to_change_and_that_helps() -> None:
    config, model = load("full-128k", "parallel.sp=1", "parallel.tile_mlp=0"), Phi3VConfig()
    text = describe(config, model, 8, gpu_bytes=60 * GB)
    assert any("of 60 GB: does not fit" in line for line in text)
    assert "parallel.sp=2" in advice(config, model, 8, gpu_bytes=60 * GB)[0]
    assert estimate(load("full-128k", "parallel.sp=2", "parallel.tile_mlp=0"), model, 8).total < 60 * GB
    (words,) = advice(config, model, 8, gpu_bytes=10 * GB)
    changes, total = words.split(" together: ")
    keys = [change.split("=")[0] for change in changes.split(", ")]
    assert len({*keys}) == len(keys) > 1 and "data.seq_len" not in keys
    both = load("full-128k", "parallel.tile_mlp=0", *changes.split(", "))
    assert f"{estimate(both, model, 8).total / GB:.0f} GB" == total
    assert advice(config, model, 8, gpu_bytes=2 * GB)[0].startswith("all of ")


def test_no_component_is_a_square_of_the_row_or_all_logits() -> None:
    """Twice the tokens are at most twice the bytes, and nowhere T x V of them."""
    model = Phi3VConfig()
    for name, gpus in (("full-128k", 8), ("single-gpu-128k", 1)):
        long = estimate(load(name), model, gpus)
        half = estimate(load(name, "data.seq_len=65536"), model, gpus)
        for component, smaller in zip(long.components, half.components, strict=True):
            assert component.gpu <= 2.1 * smaller.gpu, component
            assert component.gpu < 131072 * 32064 * 4


@pytest.mark.parametrize("targets", [1, 1000, 90_112, 90_113, 131_072])
def test_the_loss_head_works_in_the_chunks_that_torch_chooses(targets: int) -> None:
    model = Phi3VConfig()
    theirs = torch.nn.LinearCrossEntropyOptions()._compute_batch_chunk_size(
        targets, model.hidden_size, model.vocab_size, "aspect_ratio:2"
    )
    assert head_chunk(targets, model) == theirs
