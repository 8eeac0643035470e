"""generate(): greedy is the argmax of full forwards, with and without cache, across the factor switch."""

import pytest
import torch

from shards.common.errors import BadInputError

LIMIT = 64  # positions with short factors in the tiny config


def collate(documents: list[dict]) -> dict[str, torch.Tensor]:
    """Left-padded batch of published inputs."""
    width = max(d["input_ids"].shape[1] for d in documents)
    batch = {
        "input_ids": torch.full((len(documents), width), 150),
        "attention_mask": torch.zeros(len(documents), width, dtype=torch.int64),
    }
    for row, document in enumerate(documents):
        length = document["input_ids"].shape[1]
        batch["input_ids"][row, width - length :] = document["input_ids"][0]
        batch["attention_mask"][row, width - length :] = 1
    pictures = [d for d in documents if "pixel_values" in d]
    if pictures:
        views = max(d["pixel_values"].shape[1] for d in pictures)
        padded = [
            torch.nn.functional.pad(d["pixel_values"], (0, 0) * 3 + (0, views - d["pixel_values"].shape[1]))
            for d in pictures
        ]
        batch["pixel_values"] = torch.cat(padded)
        batch["image_sizes"] = torch.cat([d["image_sizes"] for d in pictures])
    return batch


def inputs_of(tiny, *arguments) -> dict:
    inputs = tiny.published(tiny.document(*arguments))
    del inputs["labels"]
    return inputs


def greedy(model, inputs: dict, steps: int) -> torch.Tensor:
    """The argmax of a full forward, again and again; no cache, nothing shared with generate()."""
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    pictures = {k: v for k, v in inputs.items() if k in ("pixel_values", "image_sizes")}
    for _ in range(steps):
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        logits = model(ids, mask, position_ids=positions, use_cache=False, **pictures).logits[:, -1]
        ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], dim=1)
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
    return ids


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize(
    ("text", "grids"),
    [
        (20, ()),  # stays short
        (LIMIT - 3, ()),  # crosses while generating
        (LIMIT, ()),  # the prompt is the last short one
        (LIMIT + 1, ()),  # long from the start
        (12, ((1, 1),)),  # a picture, crosses
        (10, ((1, 2), (2, 1))),  # two pictures, long
    ],
)
@torch.no_grad()
def test_generate_is_the_argmax_of_full_forwards(tiny, text, grids, use_cache) -> None:
    model = tiny.model(seed=3, spread=0.2)
    inputs = inputs_of(tiny, 11, text, grids)
    expected = greedy(model, inputs, 12)
    found = model.generate(
        **inputs, max_new_tokens=12, do_sample=False, use_cache=use_cache, eos_token_id=None, pad_token_id=150
    )
    assert torch.equal(found, expected)
    assert len(set(expected[0, -12:].tolist())) > 2, "a model that repeats itself proves nothing"


@pytest.mark.parametrize("use_cache", [True, False])
@torch.no_grad()
def test_left_padded_batch_of_different_pictures(tiny, use_cache) -> None:
    """Lengths and picture counts differ; the batch crosses the limit as one, at its longest row."""
    model = tiny.model(seed=3, spread=0.2)
    batch = collate(
        [inputs_of(tiny, 1, 7, ((1, 1),)), inputs_of(tiny, 2, 30), inputs_of(tiny, 3, 9, ())],
    )
    before = {k: v.clone() for k, v in batch.items()}
    expected = greedy(model, batch, 30)
    found = model.generate(
        **batch, max_new_tokens=30, do_sample=False, use_cache=use_cache, eos_token_id=None, pad_token_id=150
    )
    assert batch["input_ids"].shape[1] < LIMIT < found.shape[1]
    assert torch.equal(found, expected)
    assert all(torch.equal(batch[k], before[k]) for k in before)


@torch.no_grad()
def test_rows_of_a_batch_answer_as_alone(tiny) -> None:
    model = tiny.model(seed=4, spread=0.2)
    alone = [inputs_of(tiny, 5, 12), inputs_of(tiny, 6, 40), inputs_of(tiny, 7, 3)]
    options = {"max_new_tokens": 15, "do_sample": False, "eos_token_id": None, "pad_token_id": 150}
    together = model.generate(**collate(alone), **options)[:, -15:]
    for row, inputs in zip(together, alone, strict=True):
        assert torch.equal(row, model.generate(**inputs, **options)[0, -15:])


@torch.no_grad()
def test_the_picture_is_seen_once_and_again_after_the_switch(tiny) -> None:
    model = tiny.model(seed=3, spread=0.2)
    calls: list[int] = []
    tower = model.model.vision_embed_tokens.img_processor.vision_model
    tower.register_forward_pre_hook(lambda module, inputs: calls.append(len(inputs[0])))
    inputs = inputs_of(tiny, 11, 12, ((1, 1),))
    length = inputs["input_ids"].shape[1]
    model.generate(**inputs, max_new_tokens=LIMIT - length, do_sample=False, eos_token_id=None)
    assert calls == [2]
    model.generate(**inputs, max_new_tokens=LIMIT - length + 5, do_sample=False, eos_token_id=None)
    assert calls == [2, 2, 2]


@torch.no_grad()
def test_beam_search_crosses_the_limit(tiny) -> None:
    model = tiny.model(seed=3, spread=0.2)
    inputs = inputs_of(tiny, 11, 12, ((1, 1),))
    options = {
        "max_new_tokens": 25,
        "num_beams": 3,
        "do_sample": False,
        "eos_token_id": None,
        "pad_token_id": 150,
    }
    cached = model.generate(**inputs, **options)
    assert torch.equal(cached, model.generate(**inputs, **options, use_cache=False))


@torch.no_grad()
def test_a_second_turn_goes_on_from_the_cache(tiny) -> None:
    model = tiny.model(seed=3, spread=0.2)
    inputs = inputs_of(tiny, 11, 12, ((1, 1),))
    options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "pad_token_id": 150}
    first = model.generate(**inputs, **options, return_dict_in_generate=True)
    ids = torch.cat([first.sequences, torch.tensor([[17, 18, 19]])], dim=1)
    pictures = {k: inputs[k] for k in ("pixel_values", "image_sizes")}
    again = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **pictures}
    found = model.generate(**again, **options, past_key_values=first.past_key_values)
    assert torch.equal(found, model.generate(**again, **options))


@torch.no_grad()
def test_tokens_after_a_cache_in_one_forward(tiny) -> None:
    """Several new tokens at once, padded rows: as one forward over everything."""
    model = tiny.model(seed=3, spread=0.2)
    batch = collate([inputs_of(tiny, 1, 30), inputs_of(tiny, 2, 22)])
    whole = model(**batch).logits
    first = model(batch["input_ids"][:, :20], batch["attention_mask"][:, :20], use_cache=True)
    rest = model(batch["input_ids"][:, 20:], batch["attention_mask"], past_key_values=first.past_key_values)
    torch.testing.assert_close(rest.logits, whole[:, 20:], atol=1e-5, rtol=0)


@torch.no_grad()
def test_a_cache_of_short_factors_is_not_continued_with_long_ones(tiny) -> None:
    model = tiny.model(seed=3, spread=0.2)
    ids = torch.randint(4, 140, (1, LIMIT + 1))
    cache = model(ids[:, :LIMIT], use_cache=True).past_key_values
    with pytest.raises(BadInputError, match="needs the long RoPE factors"):
        model(ids[:, LIMIT:], past_key_values=cache)


@torch.no_grad()
def test_the_boundary_of_the_published_model(tiny) -> None:
    """4,096 short positions, as published, at tiny width."""
    model = tiny.model(
        seed=5, spread=0.2, original_max_position_embeddings=4096, max_position_embeddings=131072
    )
    ids = torch.randint(4, 140, (1, 4094), generator=torch.Generator().manual_seed(1))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    expected = greedy(model, inputs, 5)
    for use_cache in (True, False):
        found = model.generate(
            **inputs,
            max_new_tokens=5,
            do_sample=False,
            use_cache=use_cache,
            eos_token_id=None,
            pad_token_id=150,
        )
        assert torch.equal(found, expected)


def test_generation_stops_at_the_end_of_a_turn(tiny) -> None:
    assert tiny.model(vocab_size=32064, num_hidden_layers=1).generation_config.eos_token_id == [32007, 32000]
