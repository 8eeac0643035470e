"""Parameter groups by official names, and the schedule."""

import pytest

from phi3v_dist.config import TrainConfig
from phi3v_dist.model.configuration import Phi3VConfig
from phi3v_dist.model.groups import freeze, group_of
from phi3v_dist.model.modeling import Phi3VForCausalLM
from phi3v_dist.train.optim import learning_rate, parameter_groups


def tiny_model() -> Phi3VForCausalLM:
    clip = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 112,
    }
    return Phi3VForCausalLM(
        Phi3VConfig(
            vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2,
            pad_token_id=3, clip_vision_config=clip,
        )
    )  # fmt: skip


def test_every_parameter_that_learns_is_in_one_group() -> None:
    model = tiny_model()
    config = TrainConfig(steps=10, lr=1.0, weight_decay=0.1, lr_scale={"vision": 0.5})
    groups = parameter_groups(model, config)
    found = [id(p) for group in groups for p in group["params"]]
    learning = [p for p in model.parameters() if p.requires_grad]
    assert sorted(found) == sorted(id(p) for p in learning)
    assert {g["name"] for g in groups} == {
        f"{part}{kind}" for part in ("vision", "projector", "decoder") for kind in ("", " vectors")
    }
    for group in groups:
        assert group["lr"] == (0.5 if group["name"].startswith("vision") else 1.0)
        assert group["weight_decay"] == (0.0 if group["name"].endswith("vectors") else 0.1)
    vectors = next(g for g in groups if g["name"] == "projector vectors")["params"]
    assert any(p is model.model.vision_embed_tokens.glb_GN for p in vectors)


def test_frozen_parts_get_no_group() -> None:
    model = tiny_model()
    freeze(model, ["vision", "projector"])
    assert {g["name"] for g in parameter_groups(model, TrainConfig(steps=1))} == {
        "decoder",
        "decoder vectors",
    }
    assert {group_of(n) for n, p in model.named_parameters() if p.requires_grad} == {"decoder"}


def test_the_schedule_warms_up_and_falls_to_its_floor() -> None:
    config = TrainConfig(steps=100, lr=2.0, warmup_steps=10, min_lr_ratio=0.1)
    rates = [learning_rate(step, 100, config) for step in range(101)]
    assert rates[0] == pytest.approx(0.2) and rates[9] == rates[10] == pytest.approx(2.0)
    assert all(a >= b for a, b in zip(rates[10:], rates[11:], strict=False))
    assert rates[55] == pytest.approx(1.1) and rates[100] == pytest.approx(0.2)
    assert learning_rate(0, 1, TrainConfig(steps=1, lr=1.0)) == 1.0


def test_groups_are_those_of_the_official_names() -> None:
    assert group_of("model.vision_embed_tokens.img_processor.vision_model.pre_layrnorm.weight") == "vision"
    assert group_of("model.vision_embed_tokens.img_projection.0.bias") == "projector"
    assert group_of("model.vision_embed_tokens.sub_GN") == "projector"
    assert group_of("lm_head.weight") == group_of("model.embed_tokens.weight") == "decoder"
