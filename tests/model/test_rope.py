"""LongRoPE: the published numbers, and factors chosen per document, whatever is done to the model."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from phi3v_dist.model import Phi3VConfig
from phi3v_dist.model.hub import build_model
from phi3v_dist.model.rope import LongRope

GOLDEN = Path(__file__).parents[1] / "golden/rope/official_rope.npz"
HUB = Path(__file__).parents[1] / "golden/hub"
CASES = sorted({tuple(name.split("|")[:2]) for name in np.load(GOLDEN)})


@pytest.mark.parametrize(("model", "case"), CASES)
def test_published_cos_and_sin(model: str, case: str) -> None:
    directory = HUB / "phi-3.5" if "3.5" in model else HUB
    arrays = np.load(GOLDEN)
    positions = torch.from_numpy(arrays[f"{model}|{case}|position_ids"]).long()
    rope = LongRope(Phi3VConfig(**json.loads((directory / "config.json").read_text())))
    cos, sin = rope.batch(positions, torch.float32)
    half = rope.head_dim // 2
    for found, golden in ((cos, "cos48"), (sin, "sin48")):
        expected = torch.from_numpy(arrays[f"{model}|{case}|{golden}"])
        torch.testing.assert_close(found[..., :half], expected, atol=1e-6, rtol=0)
        assert torch.equal(found[..., :half], found[..., half:])
    is_long = int(positions.max()) >= 4096
    np.testing.assert_allclose(rope.inv_freq()[int(is_long)], arrays[f"{model}|{case}|inv_freq"], rtol=1e-7)


def test_the_published_scale(tiny) -> None:
    published = tiny.config(max_position_embeddings=131072, original_max_position_embeddings=4096)
    assert LongRope(published).scale == pytest.approx(1.1902380714238083, abs=1e-15)
    assert LongRope(tiny.config(rope_scaling=None)).scale == 1.0


def test_each_document_has_the_factors_of_its_own_length(tiny) -> None:
    rope = LongRope(tiny.config())
    lengths = [64, 65, 3, 200, 64]
    positions = torch.cat([torch.arange(n) for n in lengths])
    cos, sin = rope.packed(positions, torch.tensor([0, *np.cumsum(lengths)]), torch.float32)
    start = 0
    for length in lengths:
        alone = rope.batch(torch.arange(length)[None], torch.float32)
        for found, expected in zip((cos, sin), alone, strict=True):
            assert torch.equal(found[:, start : start + length], expected)
        start += length
    assert not torch.equal(cos[:, :64], cos[:, 64:128])


def test_casting_and_the_meta_device_do_not_touch_the_frequencies(tiny) -> None:
    expected = LongRope(tiny.config()).inv_freq()
    cast = tiny.model().to(torch.bfloat16)
    built = build_model(tiny.config(), torch.bfloat16)
    with torch.device("meta"):
        moved = type(cast)(tiny.config())
    moved.to_empty(device="cpu")
    for model in (cast, built, moved):
        assert model.model.rope.inv_freq().dtype == torch.float32
        assert torch.equal(model.model.rope.inv_freq(), expected)
        assert not [name for name, _ in model.named_buffers() if "inv_freq" in name]


def test_bf16_rotation_is_rounded_once_at_the_end(tiny) -> None:
    rope = LongRope(tiny.config())
    positions = torch.arange(2000)[None]
    exact, _ = rope.batch(positions, torch.float32)
    rounded, _ = rope.batch(positions, torch.bfloat16)
    assert torch.equal(rounded, exact.to(torch.bfloat16))
