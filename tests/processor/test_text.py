"""Prompts: the published ids for the published tokenizer, labels, chat template, refusals."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from phi3v_dist.processor.processing import Phi3VProcessor
from phi3v_dist.processor.prompt import encode, render
from phi3v_dist.processor.tokenizer import load_tokenizer
from shards.format import BadInputError

GOLDEN = Path(__file__).parents[1] / "golden"
HUB = Path(__file__).parents[3] / "shared/phi3v-hub"
EXPECTED = json.loads((GOLDEN / "text_processor/expected.json").read_text())


@pytest.fixture(scope="module")
def tokenizer():
    if not HUB.exists():
        pytest.skip(f"the published tokenizer is not at {HUB}")
    return load_tokenizer(HUB)


def picture(name: str) -> Image.Image:
    return Image.open(GOLDEN / f"image_processor/images/{name}.png")


@pytest.mark.parametrize("case", EXPECTED["cases"], ids=lambda case: f"{case['name']}-{case['num_crops']}")
@pytest.mark.filterwarnings("ignore:the text names pictures")
def test_ids_are_the_published_ones(tokenizer, case) -> None:
    processor = Phi3VProcessor(tokenizer, num_crops=case["num_crops"])
    images = [picture(name) for name in case["images"]]
    if "error" in case:
        with pytest.raises(BadInputError, match="picture"):
            processor(case["text"], images)
        return
    inputs = processor(case["text"], images, return_tensors="pt")
    ids = [token for token, run in case["input_ids_rle"] for _ in range(run)]
    assert inputs["input_ids"].tolist() == [ids] and len(ids) == case["length"]
    assert inputs["attention_mask"].all() and inputs["attention_mask"].shape == (1, len(ids))
    if images:
        assert list(inputs["pixel_values"].shape) == case["pixel_values_shape"]
        assert inputs["image_sizes"].tolist() == case["image_sizes"]
        assert set(inputs) == {"input_ids", "attention_mask", "pixel_values", "image_sizes"}
    else:
        assert set(inputs) == {"input_ids", "attention_mask"}
