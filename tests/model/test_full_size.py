"""The model at its published size, on the meta device: names, shapes, number of parameters."""

import json
from pathlib import Path

import pytest
import torch

from phi3v_dist.model import Phi3VConfig, Phi3VForCausalLM
from phi3v_dist.model.hub import expected_shapes

GOLDEN = Path(__file__).parents[1] / "golden/state_dict_official.json"
HUB = Path(__file__).parents[1] / "golden/hub"


def test_official_names_shapes_and_parameter_count() -> None:
    with torch.device("meta"):
        model = Phi3VForCausalLM(Phi3VConfig())
    published = json.loads(GOLDEN.read_text())
    found = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    assert found == published["shapes"]
    assert len(found) == 592
    assert sum(p.numel() for p in model.parameters()) == 4_146_621_440
    frozen = {name: p.numel() for name, p in model.named_parameters() if not p.requires_grad}
    assert set(frozen) == set(published["never_used_in_forward"]) and sum(frozen.values()) == 12_598_272
    assert {name: tuple(shape) for name, shape in found.items()} == expected_shapes(Phi3VConfig())


@pytest.mark.parametrize("model", ["", "phi-3.5"])
def test_published_configs_build_it(model) -> None:
    config = Phi3VConfig.from_pretrained(HUB / model)
    assert sum(torch.Size(shape).numel() for shape in expected_shapes(config).values()) == 4_146_621_440
