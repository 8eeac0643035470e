"""The vision side: only real crops are computed, in bounded chunks, from uint8; what is refused."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from phi3v_dist.processor.geometry import image_token_count, vision_calls_needed
from phi3v_dist.processor.pixels import global_views, normalise
from shards.common.errors import BadInputError


def tower_views(model) -> list[int]:
    views: list[int] = []
    tower = model.model.vision_embed_tokens.img_processor.vision_model
    tower.register_forward_pre_hook(lambda module, inputs: views.append(len(inputs[0])))
    return views


def test_padded_views_never_reach_the_tower(tiny) -> None:
    """num_crops 16: 17 views each, of which 2 + 1 and 1 + 1 are real."""
    model = tiny.model()
    inputs = tiny.published(tiny.document(1, 9, ((1, 2), (1, 1))))
    views = inputs["pixel_values"]
    inputs["pixel_values"] = torch.cat(
        [views, torch.full((2, 17 - views.shape[1], *views.shape[2:]), 9.0)], dim=1
    )
    seen = tower_views(model)
    with torch.no_grad():
        padded = model(**inputs)
        unpadded = model(**{**inputs, "pixel_values": views})
    assert seen == [5, 5]
    assert torch.equal(padded.logits, unpadded.logits)


def test_compute_is_proportional_to_real_crops(tiny) -> None:
    """FLOPs of tower and projection; a wide and a tall picture cost the same."""
    model = tiny.model()
    vision = model.model.vision_embed_tokens
    spent = {}
    for rows, cols in [(1, 1), (1, 3), (3, 1), (2, 4), (3, 5)]:
        tiles = torch.randint(0, 256, (rows * cols, 3, 112, 112), dtype=torch.uint8)
        with FlopCounterMode(display=False) as counter:
            vision.img_processor.vision_model(normalise(torch.cat([tiles, tiles[:1]])))
            alone = counter.get_total_flops()
        with FlopCounterMode(display=False) as counter:
            vectors = vision(tiles, None, torch.tensor([[rows, cols]]), calls=1)
        assert len(vectors) == image_token_count(rows, cols, 4)
        spent[rows, cols] = alone / (rows * cols + 1)
        tokens = 16 * (rows * cols + 1) + 2  # the two separators are projected once
        projection = 2 * tokens * (128 * 64 + 64 * 64)
        assert counter.get_total_flops() == alone + projection
    assert len(set(spent.values())) == 1


@pytest.mark.parametrize("chunk", [1, 3, 64])
def test_chunks_are_bounded_and_change_nothing(tiny, chunk) -> None:
    model = tiny.model()
    inputs = tiny.published(tiny.document(1, 9, ((1, 2), (2, 2))))
    row = tiny.pack([tiny.document(1, 9, ((1, 2), (2, 2)))], chunk=chunk)
    with torch.no_grad():
        expected = model(**inputs).logits[0]
        seen = tower_views(model)
        model.vision_chunk = chunk
        found = model(**inputs).logits[0]
        packed = model(row=row, return_logits=True)
    assert max(seen) <= chunk and sum(seen) == 2 * 8
    assert len(seen) == 2 * vision_calls_needed(6, 2, chunk)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(packed, expected, atol=1e-5, rtol=0)


def saved_bytes(model, row) -> int:
    """Bytes that backward keeps, each storage once."""
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = model(row=row)
    total = sum(size for pointer, size in kept.items() if pointer not in own)
    del loss
    return total


def test_many_crops_keep_little_with_checkpointing(tiny) -> None:
    """100 views in 10 calls: backward keeps the uint8 tiles and the features, not the tower's insides."""
    model = tiny.model().train()
    document = tiny.document(1, 9, ((4, 4),) * 5 + ((2, 7),))
    row = tiny.pack([document], chunk=10)
    assert row.vision_calls == 10 and len(row.tiles) + len(row.grids) == 100
    plain = saved_bytes(model, row)
    model.gradient_checkpointing_enable()
    saving = saved_bytes(model, row)
    features = 100 * 64 * 32 * 4
    assert saving < row.tiles.nbytes + 12 * features < plain / 3


def test_global_view_is_the_published_one(tiny) -> None:
    tiles = torch.randint(0, 256, (6, 3, 112, 112), dtype=torch.uint8)
    canvas = tiles.view(2, 3, 3, 112, 112).permute(2, 0, 3, 1, 4).reshape(3, 224, 336)
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(3, 1, 1)
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(3, 1, 1)
    expected = torch.nn.functional.interpolate(
        ((canvas.float() / 255 - mean) / std)[None], size=(112, 112), mode="bicubic", align_corners=False
    )
    assert torch.equal(global_views(tiles, torch.tensor([[2, 3]])), expected)


def test_tiles_are_not_modified_by_normalising() -> None:
    tiles = torch.full((1, 3, 4, 4), 7, dtype=torch.uint8)
    assert normalise(tiles).dtype == torch.float32 and (tiles == 7).all()


def test_inputs_that_do_not_fit_together_are_refused(tiny) -> None:
    model = tiny.model()
    good = tiny.published(tiny.document(1, 9, ((1, 2),)))
    text = tiny.published(tiny.document(1, 9))
    wrong = [
        ({**good, "pixel_values": None}, "no pixel_values"),
        ({**good, "image_sizes": None}, "need image_sizes"),
        (
            {**good, "input_ids": text["input_ids"], "labels": None, "attention_mask": None},
            "no image position",
        ),
        ({**good, "image_sizes": torch.tensor([[112, 112]])}, "image positions but the images have"),
        ({**good, "image_sizes": torch.tensor([[1120, 1120]])}, "do not fit pixel_values"),
        (
            {**good, "pixel_values": good["pixel_values"][..., :56]},
            r"expected \[images, views, 3, 112, 112\]",
        ),
    ]
    for inputs, says in wrong:
        with pytest.raises(BadInputError, match=says) as refused:
            model(**inputs)
        assert "\n" not in str(refused.value)


def test_a_row_whose_grids_and_ids_disagree_is_refused(tiny) -> None:
    row = tiny.pack([tiny.document(1, 9, ((1, 2),))])
    shifted = type(row)(**{**row.__dict__, "image_positions": row.image_positions[1:]})
    with pytest.raises(BadInputError, match="input_ids and grids disagree"):
        tiny.model()(row=shifted)
