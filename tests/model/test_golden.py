"""The published convention against what the reference code computed: every case of tests/golden/model.

Each case runs with the packed attention and with transformers' eager attention, at the tolerances of
tests/golden/README.md.
"""

import json
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from phi3v_dist.model import PackedRow, Phi3VConfig, Phi3VForCausalLM
from phi3v_dist.model.attention import NAME
from phi3v_dist.processor.image import hd_tiles
from phi3v_dist.processor.processing import image_inputs

GOLDEN = Path(__file__).parents[1] / "golden"
CASES = sorted(path.stem for path in (GOLDEN / "model/cases").glob("*.npz"))
TOWER = "model.vision_embed_tokens.img_processor.vision_model."


@lru_cache
def golden_model(config_name: str, attention: str) -> Phi3VForCausalLM:
    config = Phi3VConfig(
        **json.loads((GOLDEN / f"model/config.{config_name}.json").read_text()),
        clip_vision_config=json.loads((GOLDEN / "model/clip_config.json").read_text()),
        attn_implementation=attention,
    )
    model = Phi3VForCausalLM(config)
    model.load_state_dict(load_file(GOLDEN / "model/model.safetensors"), strict=True)
    assert model.config._attn_implementation == attention
    return model.eval()


def case_inputs(case: str) -> tuple[dict, dict, dict]:
    """The recorded facts, the arrays, and the model's inputs of a case."""
    facts = json.loads((GOLDEN / f"model/cases/{case}.json").read_text())
    arrays = dict(np.load(GOLDEN / f"model/cases/{case}.npz"))
    inputs = {
        name: torch.from_numpy(arrays[name]).long()
        for name in ("input_ids", "attention_mask", "labels", "position_ids", "image_sizes")
        if name in arrays
    }
    if "pixel_seed" in facts and facts.get("pixel_values_shape"):
        pixels = np.random.RandomState(facts["pixel_seed"]).standard_normal(facts["pixel_values_shape"])
        pixels = pixels.astype(np.float32)
        for picture, (height, width) in enumerate(arrays["image_sizes"]):
            pixels[picture, 1 + (height // 336) * (width // 336) :] = 0
        inputs["pixel_values"] = torch.from_numpy(pixels)
    elif facts.get("pngs"):
        images = [Image.open(GOLDEN / f"image_processor/images/{name}.png") for name in facts["pngs"]]
        made = image_inputs(images, facts["num_crops"])
        assert torch.equal(made["image_sizes"], inputs["image_sizes"])
        inputs["pixel_values"] = made["pixel_values"]
    return facts, arrays, inputs


@pytest.mark.parametrize("attention", [NAME, "eager"])
@pytest.mark.parametrize("case", CASES)
def test_case(case: str, attention: str) -> None:
    facts, arrays, inputs = case_inputs(case)
    if facts["name"] == "text_only_nomask":
        inputs.pop("attention_mask", None)
    model = golden_model(facts["config"], attention)
    model.zero_grad(set_to_none=True)
    features: list[torch.Tensor] = []
    embeddings: list[torch.Tensor] = []
    hooks = [
        model.get_submodule(TOWER[:-1]).register_forward_hook(
            lambda m, a, out: features.append(out.detach())
        ),
        model.model.layers[0].register_forward_pre_hook(lambda m, a: embeddings.append(a[0].detach())),
    ]
    before = {name: value.clone() for name, value in inputs.items()}
    output = model(**inputs, use_cache=False)
    for hook in hooks:
        hook.remove()
    for name, value in inputs.items():
        assert torch.equal(value, before[name]), f"{name} was modified"

    rows, cols = torch.from_numpy(arrays["keep"]).long().unbind(1)
    torch.testing.assert_close(
        output.logits[rows, cols], torch.from_numpy(arrays["logits"]), atol=2e-5, rtol=0
    )
    assert abs(output.loss.item() - facts["loss"]) < 5e-6
    rows, cols = torch.from_numpy(arrays["embeds_keep"]).long().unbind(1)
    torch.testing.assert_close(
        embeddings[0][rows, cols, ::4], torch.from_numpy(arrays["embeds"]), atol=2e-5, rtol=0
    )
    if "pixel_values" in inputs:
        check_features(torch.cat(features), arrays, facts["clip_feat_shape"])

    output.loss.backward()
    none = {name for name, p in model.named_parameters() if p.grad is None}
    assert none == set(facts["grads_none"])
    assert set(facts["grads"]) == {name for name, _ in model.named_parameters()} - none
    for name, parameter in model.named_parameters():
        if name in none:
            continue
        golden = facts["grads"][name]["norm"]
        found = parameter.grad.double().norm().item()
        assert abs(found - golden) <= (1e-4 * golden if golden >= 1e-6 else 1e-6), (name, found, golden)


def check_features(features: torch.Tensor, arrays: dict, shape: list[int]) -> None:
    """features: [real views, patches, width], tiles before global views; golden: flat samples of `shape`
    [pictures * (num_crops + 1), patches, width], of which the padded views are not computed here.
    """
    counts = [(h // 336) * (w // 336) for h, w in arrays["image_sizes"]]
    assert len(features) == sum(counts) + len(counts)
    index = np.stack(np.unravel_index(arrays["clip_feat_idx"], shape))
    picture, view = np.divmod(index[0], shape[0] // len(counts))
    real = view <= np.array(counts)[picture]
    starts = np.cumsum([0, *counts[:-1]])
    place = np.where(view == 0, sum(counts) + picture, starts[picture] + view - 1)
    assert real.any()
    np.testing.assert_allclose(
        features.numpy()[place[real], index[1][real], index[2][real]],
        arrays["clip_feat"][real],
        atol=2e-5,
        rtol=0,
    )


@pytest.mark.parametrize(
    "case", ["text_only", "rope_len64_short", "rope_len65_long", "rope_len150_long", "png_two_images"]
)
@pytest.mark.parametrize("attention", [NAME, "eager"])
def test_the_same_numbers_as_a_packed_row(case: str, attention: str) -> None:
    """Cases of one document, pictures from uint8 tiles; loss = golden mean x number of labels."""
    facts, arrays, inputs = case_inputs(case)
    model = golden_model(facts["config"], attention)
    pictures = [
        Image.open(GOLDEN / f"image_processor/images/{name}.png").convert("RGB")
        for name in facts.get("pngs", [])
    ]
    tiles = [torch.from_numpy(hd_tiles(picture, facts["num_crops"])) for picture in pictures]
    input_ids = inputs["input_ids"][0]
    labels = inputs["labels"][0].clone()
    row = PackedRow(
        input_ids=input_ids,
        labels=labels,
        position_ids=torch.arange(len(input_ids)),
        cu_seqlens=torch.tensor([0, len(input_ids)], dtype=torch.int32),
        tiles=torch.cat(tiles) if tiles else torch.zeros(0, 3, 336, 336, dtype=torch.uint8),
        grids=inputs["image_sizes"] // 336 if pictures else torch.zeros(0, 2, dtype=torch.int64),
        image_positions=(input_ids < 0).nonzero()[:, 0],
        vision_calls=1,
    )
    with torch.no_grad():
        logits = model(row=row, return_logits=True)
        loss = model(row=row)
    rows, cols = torch.from_numpy(arrays["keep"]).long().unbind(1)
    assert not rows.any()
    torch.testing.assert_close(logits[cols], torch.from_numpy(arrays["logits"]), atol=2e-5, rtol=0)
    assert abs(loss.item() / facts["num_label_tokens"] - facts["loss"]) < 5e-6
